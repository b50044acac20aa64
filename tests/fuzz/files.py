"""Cases of files: whole ones give their values, damaged ones one line that names them."""

import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import roifile
import tifffile
import torch
import zarr
from PIL import Image

from unet_fast import load_model, predict, train
from unet_fast.cli import main
from unet_fast.images.files import read_image, read_labels, write_labels
from unet_fast.images.source import open_source

sys.path.append(str(Path(__file__).parents[1]))  # where pytest finds it by itself
from runs import config, discs_in

logging.getLogger("asyncio").disabled = True  # as in the program; it tells of errors again
log = logging.StreamHandler(os.fdopen(2, "w", closefd=False))  # where silent() looks
for name in ("tifffile", "imagecodecs", "roifile"):
    logging.getLogger(name).addHandler(log)


class TooLongError(BaseException):
    """No Exception, as the package takes those of decoders for damage."""

    @classmethod
    def ring(cls, *_):
        raise cls


def run(check, number):
    """Runs a case with its random numbers in an empty folder; no file may hang its reader."""
    signal.signal(signal.SIGPROF, TooLongError.ring)
    signal.setitimer(signal.ITIMER_PROF, 20)
    try:
        with tempfile.TemporaryDirectory() as folder:
            check(
                np.random.default_rng([zlib.crc32(check.__name__.encode()), number]), Path(folder)
            )
    except TooLongError:
        raise AssertionError("took more than 20 s of the CPU") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextlib.contextmanager
def silent():
    """Fails on a warning, a log entry of a decoder or a line that C code writes to stderr."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)  # old spellings
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        found = [*said.read().splitlines(), *(str(w.message) for w in warned)]
    assert not found, found


def promises(path, read):
    """What `read` returns; None after a ValueError of one line that names the file."""
    with silent():
        try:
            return read()
        except ValueError as error:
            text = str(error)
    assert (len(text.splitlines()), path.name in text) == (1, True), text
    return None


def choice(rng, values):
    return values[rng.integers(len(values))]


def mutated(content, rng):
    """Bytes with three of them changed, cut off, or with a piece repeated; often near an end."""
    size, how, result = len(content), rng.integers(3), bytearray(content)
    near = rng.integers(min(size, 200), size=3)
    places = choice(rng, [near, size - 1 - near, rng.integers(size, size=3)])
    if how == 0:
        for place in places[: rng.integers(1, 4)]:
            result[place] = choice(rng, [0, 255, rng.integers(256)])
    elif how == 1:
        del result[places[0] :]
    else:
        result[places[0] : places[0]] = content[places[1] :][: rng.integers(1, 40)]
    return bytes(result)


STRANGE = [None, True, -1, 0, 1, 0.5, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), ""]
STRANGE += ["x", "\0", "a\nb", "../x", "/etc", "0/../../x", [], [1, 2], {}, {"x": 1}, "DEEP"]


def altered(text, rng):
    """JSON with an entry that has another value, is missing, or is there twice."""
    tree = json.loads(text)
    places, todo, again = [], [tree], ""
    for node in todo:
        keys = range(len(node)) if isinstance(node, list) else list(node)
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
    (holder, key), how = choice(rng, places), rng.integers(8)
    if how == 0:
        del holder[key]
    elif how == 1:
        again = f", {json.dumps(choice(rng, list(tree)))}: {json.dumps(choice(rng, STRANGE))}"
    elif how == 2 and type(holder[key]) in (int, float):
        holder[key] += choice(rng, [-1, 1, holder[key]])
    else:
        holder[key] = choice(rng, STRANGE)
    depth = choice(rng, [100, 100_000])  # which json itself cannot write
    deep = "[" * depth + "]" * depth
    return (json.dumps(tree)[:-1] + again + "}").replace('"DEEP"', deep)


TOML = ["true", "-1", "0", "1", "0.5", "nan", "-inf", "1e308", str(2**31), str(10**30), "9" * 5000]
TOML += ["1979-05-27", "07:32:00", '""', '"x"', '"none"', '"\\u0000"', '"a\\nb"', "[1, 2]", "[]"]
TOML += ['["x"]', "{}", "{x = 1}", "[" * 50 + "]" * 50, "[" * 2000 + "]" * 2000, "[[", "é"]


def damage(path, rng):
    """Changes bytes of a file or, so that the rest can be read, a value in what is text in it."""
    content = path.read_bytes()
    if rng.random() < 0.3:
        content = mutated(content, rng)
    elif path.suffix == ".toml":
        lines = re.sub(r"\n(?=    |\])", "", content.decode()).split("\n")  # a list in one line
        number, how = rng.integers(len(lines)), rng.integers(8)
        name = choice(rng, ["weights", "x"]) if how == 2 else lines[number].split(" ")[0]
        other = f"{name} = {choice(rng, TOML)}"
        lines[number : number + 1] = [[], [lines[number]] * 2, [other]][min(how, 2)]
        content = "\n".join(lines).encode()
    elif path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        facts = header["__metadata__"]
        facts["unet_fast"] = altered(facts["unet_fast"], rng)
        text = altered(content[8:end], rng) if rng.random() < 0.3 else json.dumps(header)
        content = len(text).to_bytes(8, "little") + text.encode() + content[end:]
    else:
        content = altered(content, rng).encode()
    path.write_bytes(content)
    return path


def values_of(rng, shape, dtype):
    """Values of all the range, but no 0: chunks of zeros have no file in Zarr."""
    dtype, count = np.dtype(dtype), math.prod(shape)
    made = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype)
    made = rng.normal(0, 99, count) if dtype.kind == "f" else made
    return np.where(made == 0, 1, made).astype(dtype).reshape(shape)


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a colour type; PNG specification, table 11.1
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
PASSES = {0: [(0, 0, 1, 1)], 1: [*ADAM7, (1, 0, 2, 1)]}  # begin and steps; section 8.2


def png(rng, folder, *, indices=False, damaged=False):
    """A PNG of any kind, without any library that reads it."""
    kind = choice(rng, [0, 3, 4] if indices else [0, 2, 3, 4, 6])
    bits, interlaced = choice(rng, DEPTHS[kind]), rng.integers(2)
    height, width = rng.integers(1, 41, 2)
    values, rows = rng.integers(0, 2**bits, (height, width, CHANNELS[kind])), b""
    for row, column, down, right in PASSES[interlaced]:
        part = values[row::down, column::right]
        for line in part.reshape(len(part), -1) if part.size else []:
            places = (line[:, None] >> np.arange(bits - 1, -1, -1)) & 1
            rows += b"\0" + np.packbits(places.reshape(-1)).tobytes()
    size = np.array([width, height], ">u4").tobytes()
    parts = {b"IHDR": size + bytes([bits, kind, 0, 0, interlaced])}
    palette = rng.integers(0, 256, (2 ** min(bits, 8), 3), np.uint8)
    parts |= {b"PLTE": palette.tobytes()} if kind == 3 else {}
    if kind in (0, 2, 3) and rng.random() < 0.3:  # one colour is transparent, or all
        parts[b"tRNS"] = bytes(choice(rng, [1, 2**bits]) if kind == 3 else 2 * CHANNELS[kind])
    parts |= {b"IDAT": zlib.compress(rows), b"IEND": b""}
    if damaged:  # with checksums that do not tell
        name = choice(rng, list(parts)[:-1])
        parts[name] = mutated(parts[name], rng)
    chunks = [len(x).to_bytes(4) + n + x + zlib.crc32(n + x).to_bytes(4) for n, x in parts.items()]
    (folder / "a.png").write_bytes(b"".join([b"\x89PNG\r\n\x1a\n", *chunks]))
    values = palette[values[..., 0]] if kind == 3 and not indices else values
    return folder / "a.png", np.moveaxis(values[..., : -1 if kind in (4, 6) else None], -1, 0)[None]


def bmp_or_jpeg(rng, folder):
    """Smooth, as JPEG does not keep values."""
    path = folder / choice(rng, ["a.bmp", "a.jpg", "a.JPEG"])
    planes = np.add.outer(*(rng.uniform(0, 3) * np.arange(n) for n in rng.integers(1, 41, 2)))[None]
    planes = planes.astype(np.uint8).repeat(choice(rng, [1, 3]), 0)
    Image.fromarray(planes[0] if len(planes) == 1 else np.moveaxis(planes, 0, -1)).save(path)
    return path, planes[None]


DTYPES = ["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8", "f2"]


def tiff(rng, folder):
    """A TIFF as tifffile writes it: ImageJ, OME or neither, tiled, compressed, planar, a stack."""
    kind, layouts = choice(rng, ["plain", "ome", "imagej"]), ["YX", "CYX", "ZYX", "YXS", "SYX"]
    kinds = {"plain": DTYPES, "ome": DTYPES[:8], "imagej": ["u1", "u2", "f4"]}
    layout = choice(rng, layouts[:3] if kind == "imagej" else layouts)
    dtype, (height, width) = choice(rng, kinds[kind]), rng.integers(1, 41, 2)
    width += 4 * (kind == "imagej")  # tifffile takes a last axis of up to 4 for colours
    lengths, count = {"Y": height, "X": width, "S": choice(rng, [3, 4])}, rng.integers(2, 5)
    array = values_of(rng, [lengths.get(axis, count) for axis in layout], dtype)
    options = {"photometric": "minisblack", "metadata": {"axes": layout}}
    if "S" in layout:
        options = {"photometric": "rgb", "extrasamples": ["unassalpha"] * (lengths["S"] - 3)}
        options["planarconfig"] = "contig" if layout == "YXS" else "separate"
    if kind == "plain":
        options |= {"byteorder": choice(rng, "<>"), "bigtiff": rng.random() < 0.3}
        if rng.random() < 0.3 and "C" not in layout:  # else channels would be pages of a stack
            options["metadata"] = None
    if kind != "imagej":
        packed = choice(rng, [None, "zlib", "lzw", "zstd", "packbits"])
        predicts = packed not in (None, "packbits") and rng.random() < 0.5
        options |= {"compression": packed, "predictor": predicts}
        options |= choice(rng, [{}, {"rowsperstrip": 5}, {"tile": (16, 16)}, {"tile": (16, 32)}])
    path = folder / choice(rng, ["a.tif", "A.TIFF"] if kind != "ome" else ["a.ome.tif"])
    tifffile.imwrite(path, array, imagej=kind == "imagej", ome=kind == "ome", **options)
    array = np.moveaxis(array, -1, 0) if layout == "YXS" else array
    planes = array.reshape(-1, 1 if layout in ("YX", "ZYX") else len(array), height, width)
    return path, planes[:, :3] if "S" in layout else planes


def ome_zarr(rng, folder):
    """An OME-Zarr image of Zarr version 2 (OME 0.4) or 3 (OME 0.5)."""
    path, version = folder / "a.zarr", choice(rng, [2, 3])
    axes = choice(rng, ["YX", "CYX", "ZYX", "TYX", "TZYX", "CZYX", "TCYX", "TCZYX"])
    shape = [*rng.integers(1, 4, len(axes) - 2).tolist(), *rng.integers(1, 41, 2)]
    array = values_of(rng, shape, choice(rng, DTYPES if version == 3 else [*DTYPES, ">u2", ">f4"]))
    chunks = tuple(int(rng.integers(-(-n // 3), n + 1)) for n in shape)
    options = {"chunk_key_encoding": {"name": "v2", "separator": choice(rng, "./")}}
    if version == 3:
        options = {"shards": tuple(2 * n for n in chunks)} if rng.random() < 0.3 else {}
    named = [{"name": axis.lower(), "unit": "micrometer"} for axis in axes]
    scale = [{"type": "scale", "scale": [0.5] * len(axes)}]
    image = {"axes": named, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    facts = {"version": "0.5", "multiscales": [image]}
    facts = {"ome": facts} if version == 3 else facts
    group = zarr.create_group(path, zarr_format=version, attributes=facts)
    group.create_array("0", shape=shape, dtype=array.dtype, chunks=chunks, **options)[...] = array
    channels = shape[axes.index("C")] if "C" in axes else 1
    array = np.moveaxis(array, axes.index("C"), -3) if "C" in axes else array
    return path, array.reshape(-1, channels, *shape[-2:])


def planes_in(path):
    """All planes of an image; of one that says to be huge only a corner."""
    source = open_source(path, None)
    stack = source.stack
    planes = source.planes if math.prod(stack.values()) < 100 else [(0,) * len(stack)]
    return [source.pixels(plane)(slice(64), slice(64)) for plane in planes]


def images(rng, folder):
    path, planes = choice(rng, [png, png, bmp_or_jpeg, tiff, tiff, tiff, ome_zarr])(rng, folder)
    with silent():
        found = np.stack(planes_in(path))
    if path.suffix in (".jpg", ".JPEG"):
        assert abs(found - planes.astype(float)).max() < 8
    else:
        np.testing.assert_array_equal(found, planes)
    image = promises(path, lambda: read_image(path))
    assert (image is not None) == (path.is_file() and len(planes) == 1)
    if image is not None:
        np.testing.assert_array_equal(image, found[0].astype(np.float32))


def damaged_images(rng, folder):
    path, _ = choice(rng, [png, bmp_or_jpeg, tiff, tiff])(rng, folder)
    path.write_bytes(mutated(path.read_bytes(), rng))
    if path.suffix == ".png" and rng.random() < 0.7:
        png(rng, folder, damaged=True)
    planes = promises(path, lambda: planes_in(path)) or []
    assert all(plane.ndim == 3 and plane.dtype.kind in "buif" for plane in planes)
    image = promises(path, lambda: read_image(path))
    assert image is None or np.isfinite(image).all()
    found = promises(path, lambda: read_labels(path))
    assert found is None or found.min() >= 0


def damaged_outlines(rng, folder):
    """ROIs of ImageJ, GeoJSON."""
    ring = rng.uniform(-10, 50, (rng.integers(3, 9), 2)).round(1)
    roi = roifile.ImagejRoi.frompoints(choice(rng, [ring, np.abs(ring).astype(int)]))
    geometry = {"type": "Polygon", "coordinates": [ring.tolist()]}
    text = json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature"}]})
    text = text.replace('"Feature"}', f'"Feature", "geometry": {json.dumps(geometry)}}}')
    kind = choice(rng, [".roi", ".zip", ".geojson"])
    path = folder / f"a{kind}"
    if kind == ".geojson":
        content = choice(rng, [mutated(text.encode(), rng), altered(text, rng).encode()])
    elif kind == ".roi":
        content = mutated(roi.tobytes(), rng)
    else:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", choice(rng, [0, zipfile.ZIP_DEFLATED])) as made:
            made.writestr("a.roi", choice(rng, [roi.tobytes(), mutated(roi.tobytes(), rng)]))
        content = choice(rng, [archive.getvalue(), mutated(archive.getvalue(), rng)])
    path.write_bytes(content)
    found = promises(path, lambda: read_labels(path, (30, 40)))
    assert found is None or (found.shape == (30, 40) and found.min() >= 0)


def labels(rng, folder):
    """Numbers are read as they are, colours as one number each; JPEG and the rest are refused."""
    kind = choice(rng, ["png", "tiff", "write", "jpeg", "colours", "outlines", "grey"])
    expected = rng.integers(0, choice(rng, [2, 256, 65536]), rng.integers(1, 41, 2))
    path, drawn = folder / "a.png", np.dstack([expected % 256] * 3).astype(np.uint8)
    if kind == "png":
        expected = png(rng, folder, indices=True)[1][0, 0]
    elif kind == "tiff":
        path, values = folder / "a.tif", values_of(rng, expected.shape, choice(rng, DTYPES))
        values = choice(rng, [values, np.abs(np.rint(values / 2)).astype(values.dtype)])
        tifffile.imwrite(path, values)
        fits = (values == np.rint(values)).all() and values.min() >= 0 and int(values.max()) < 2**31
        expected = values if fits else None
    elif kind == "write":
        write_labels(path, expected)
    else:
        if kind == "outlines":  # red over grey
            drawn[0] = 255, 0, 0
        path = folder / ("a.jpg" if kind == "jpeg" else "a.png")
        colours = rng.integers(0, 256, (256, 3), np.uint8)[drawn[..., 0]]  # of each object
        drawn = {"jpeg": drawn[..., 0], "colours": colours}.get(kind, drawn)
        Image.fromarray(drawn).save(path)
        image = read_image(path)
        expected = image[0] if kind != "jpeg" and (image == image[:1]).all() else None
    found = promises(path, lambda: read_labels(path))
    if kind in ("colours", "outlines") and expected is None:
        if found is not None:  # a number for each colour
            both = np.concatenate([found[None], image]).reshape(4, -1)
            counts = {len(np.unique(x, axis=1).T) for x in (both[:1], both[1:], both)}
            assert len(counts) == 1
        return
    assert (found is None) == (expected is None)
    if found is not None:
        np.testing.assert_array_equal(found, expected)


def damaged_zarr(rng, folder):
    path, planes = ome_zarr(rng, folder)
    shutil.copytree(path / "0", folder / "x")  # with other values, which must not be read
    zarr.open_array(folder / "x", mode="r+")[...] = 77
    kinds = ".zattrs", ".zgroup", "*/.zarray", "**/zarr.json"
    damage(choice(rng, sorted(x for kind in kinds for x in path.glob(kind))), rng)
    found = promises(path, lambda: planes_in(path)) or []
    assert not any((plane == 77).all() for plane in found) or 77 in planes[..., :1, :1]


@functools.cache
def begun():
    """A folder with images, labels and a run of one step, until the process ends."""
    folder = tempfile.TemporaryDirectory()
    small = {"base_channels": 2, "depth": 1, "tile": 16, "optimizer": "adam", "norm": "batch"}
    discs, out = discs_in(Path(folder.name)), Path(folder.name) / "run"
    with contextlib.redirect_stderr(io.StringIO()):
        train(config(discs, out, **small | {"steps": 1, "evaluate_every": 9}))
    return folder


def damaged_models(rng, folder):
    """They are refused, or predict."""
    path = damage(Path(shutil.copy(f"{begun().name}/run/last.safetensors", folder)), rng)
    model = promises(path, lambda: load_model(path))
    if model is not None:
        assert all(x.isfinite().all() for x in model.state_dict().values())
        image = torch.rand(int(model.config["in_channels"]), 9, 8)
        assert predict(model, image, output="instances").shape == (9, 8)


def trains(call, where):
    """Whether the command trains; if not, its last line names a file in that place or a setting."""
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        code = main(["train", *map(str, call)])
    if code:
        said = re.split(r"[\n\r]+", stderr.getvalue().strip())[-1]
        assert (code, said[:11]) == (2, "unet-fast: "), stderr.getvalue()
        known = re.findall(r"\w+(?= =|\])", Path(begun().name, "run/config.toml").read_text())
        words = re.findall(r"\w+", said.replace("--", "").replace("-", "_"))
        assert str(where) in said or {*known} & {*words}, said
    return code == 0


def damaged_settings(rng, folder):
    """The command trains, or refuses the settings."""
    file = damage(Path(shutil.copy(f"{begun().name}/run/config.toml", folder / "a.toml")), rng)
    tells, trains_now = "unet_fast.cli.training._tell_of", "unet_fast.training.loop.train"
    with mock.patch(tells), mock.patch(trains_now) as trained:
        assert trains(["--config", file], file) == trained.called


def damaged_runs(rng, folder):
    """A run goes on to its end, or one line tells why not."""
    out, home = folder / "out", Path(begun().name)
    shutil.copytree(home / "run", out)
    names = ["config.toml", "log.jsonl", "split.json", *["state.safetensors"] * 3]
    damage(out / choice(rng, names), rng)
    words = [home / "images", home / "labels", "--out", out, "--resume", "--previews", "0"]
    words += ["--steps", choice(rng, [1, 2, 2]), "--no-compile", "--no-tensorboard"]
    if trains(words, out):
        load_model(out)


ALL = (
    *(images, damaged_images, labels, damaged_outlines, damaged_zarr, damaged_models),
    *(damaged_settings, damaged_runs),
)
CASES = {check.__name__.replace("_", " "): functools.partial(run, check) for check in ALL}
