"""Files in, files out: formats, images larger than memory, kills, clusters, what is refused."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import numpy as np
import pytest
import tifffile
import torch
import zarr
from budget import first
from ome_zarr_models.v05.image import Image as OmeImage
from ome_zarr_models.v05.image_label import ImageLabel
from PIL import Image

from unet_fast import UNet, load_model, predict, save_model
from unet_fast.cli import main
from unet_fast.images import formats
from unet_fast.images.source import open_source
from unet_fast.images.zarr import create
from unet_fast.prediction.cluster import cluster
from unet_fast.prediction.options import Options
from unet_fast.prediction.out_of_core import Worker, is_begun, predict_blocks, remove_rest

SIZE = {"X": 0.65, "Y": 0.5}


def model_in(folder, channels=1, seed=4, size=(99, 99), **options):
    """A network with something to say: nearly as many pixels of either class."""
    torch.manual_seed(seed)
    net = UNet(channels, **{"base_channels": 4, "depth": 2} | options)
    net.normalisation = "percentile"
    image = torch.rand(channels, *size)
    scores = predict(net, image, output="scores")
    net.head.bias.data[1] += (scores[0] - scores[1]).median()
    save_model(net, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("run"))


def pixels(*shape, seed=0):
    """Blobs of grey values, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (*shape[:-2], -(-shape[-2] // 6), -(-shape[-1] // 6)))
    fine = coarse.repeat(6, -2).repeat(6, -1)[..., : shape[-2], : shape[-1]]
    return (fine * 0.8 + rng.integers(0, 50, shape)).astype(np.uint8)


def zarr_in(path, array, axes="YX", chunks=None, **options):
    made = create(
        path,
        name="x",
        shape=array.shape,
        axes=axes,
        chunks=chunks or tuple(min(64, n) for n in array.shape),
        dtype=str(array.dtype),
        pixel_size=SIZE,
        labels=False,
        **options,
    )
    made[...] = array
    return path


def predicted(run, image, output="instances", **options):
    options.setdefault("tile", 64)
    return predict(load_model(run), image, output=output, **options)


def call(*words, precision="float32"):
    return main(["predict", *map(str, words), "--precision", precision])


FORMATS = [
    ("instances", "png", "x.png"),
    ("labels", "tiff", "x.tif"),
    ("instances", "ome-tiff", "x.ome.tif"),
    ("probabilities", "auto", "x.tif"),
    ("scores", "ome-tiff", "x.ome.tif"),
    ("instances", "ome-zarr", "x.ome.zarr"),
    ("probabilities", "ome-zarr", "x.ome.zarr"),
]


@pytest.mark.filterwarnings("default")
def test_instances_is_the_default_and_goes(run, tmp_path, capsys):
    Image.fromarray(pixels(40, 50)).save(tmp_path / "x.png")
    assert call(run, tmp_path / "x.png", "--out", tmp_path / "one", "--instances") == 0
    assert "warning: --instances is the default of predict" in capsys.readouterr().err
    assert call(run, tmp_path / "x.png", "--out", tmp_path / "two") == 0
    assert "warning" not in capsys.readouterr().err
    one, two = (np.asarray(Image.open(tmp_path / d / "x.png")) for d in ("one", "two"))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(("output", "format", "name"), FORMATS)
def test_formats(run, tmp_path, output, format, name):
    """Each holds what `predict` gives, and the pixel size of the image."""
    image, out = pixels(150, 131), tmp_path / "out"
    tifffile.imwrite(
        tmp_path / "x.tif", image, resolution=(1e4 / 0.65, 1e4 / 0.5), resolutionunit="CENTIMETER"
    )
    words = "--output", output, "--format", format, "--tile", 64
    assert call(run, tmp_path / "x.tif", "--out", out, *words) == 0
    expected = predicted(run, image, output)
    channels = 2 if expected.ndim == 3 else 1
    found = open_source(out / name, channels)
    rows, columns = slice(None), slice(None)
    assert np.array_equal(found.pixels()(rows, columns), expected.reshape(channels, *image.shape))
    if format != "png":
        assert found.pixel_size == pytest.approx(SIZE)
    else:
        with Image.open(out / name) as picture:
            assert picture.info["dpi"] == pytest.approx((25400 / 0.65, 25400 / 0.5), rel=1e-4)
    with Image.open(out / "overlays" / "x.png") as picture:
        assert picture.size == (131, 150)
        assert picture.mode == "RGB"
    assert sorted(p.name for p in out.iterdir()) == sorted([name, "overlays"])


def test_stacks_are_predicted_plane_by_plane(run, tmp_path):
    stack = pixels(2, 3, 60, 70)
    tifffile.imwrite(tmp_path / "x.tif", stack, ome=True, metadata={"axes": "TZYX"})
    expected = np.stack([[predicted(run, plane) for plane in planes] for planes in stack])
    for format, name in (("auto", "x.tif"), ("ome-tiff", "x.ome.tif"), ("ome-zarr", "x.ome.zarr")):
        out = tmp_path / format
        assert call(run, tmp_path / "x.tif", "--out", out, "--format", format, "--tile", 64) == 0
        found = open_source(out / name, 1)
        assert found.stack == {"T": 2, "Z": 3}
        for plane in found.planes:
            there = found.pixels(plane)(slice(None), slice(None))[0]
            assert np.array_equal(there, expected[plane])


def test_axes_that_no_file_says(tmp_path, capsys):
    """Pages of a TIFF that are channels, in one piece and block by block."""
    run = model_in(tmp_path / "run", 5)
    image = pixels(5, 60, 70)
    tifffile.imwrite(tmp_path / "x.tif", image, photometric="minisblack", metadata=None)
    assert call(run, tmp_path / "x.tif", "--out", tmp_path / "no") == 2
    assert "must have 5 channels as the model, got 1 (--axes CYX if its" in capsys.readouterr().err
    assert call(run, tmp_path / "x.tif", "--out", tmp_path / "no", "--axes", "CYC") == 2
    assert "axes must be letters of TZCYX, each once" in capsys.readouterr().err
    for format, name in (("auto", "x.png"), ("ome-zarr", "x.ome.zarr")):
        out = tmp_path / format
        words = "--out", out, "--format", format, "--tile", 64, "--axes", "CYX"
        assert call(run, tmp_path / "x.tif", *words) == 0
        found = open_source(out / name, 1)
        assert not found.stack
        there = found.pixels()(slice(None), slice(None))[0]
        assert np.array_equal(there, predicted(run, image))


def test_several_channels_and_old_zarr(tmp_path):
    """A stack of two planes of three channels, OME-Zarr 0.4, axes in its order."""
    run = model_in(tmp_path / "run", 3)
    image = pixels(3, 2, 50, 40).astype(np.uint16)
    group = zarr.create_group(tmp_path / "x.zarr", zarr_format=2)
    group.create_array("s0", data=image, chunks=(1, 1, 32, 32))
    scale = [{"type": "scale", "scale": [1, 2, 500, 250]}]
    units = [{}, *({"unit": "nanometer"} for _ in range(3))]
    axes = [{"name": n} | u for n, u in zip("czyx", units, strict=True)]
    group.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": axes,
            "datasets": [{"path": "s0", "coordinateTransformations": scale}],
        }
    ]
    words = "--output", "probabilities", "--tile", 64
    assert call(run, tmp_path / "x.zarr", "--out", tmp_path / "out", *words) == 0
    result = zarr.open_group(tmp_path / "out" / "x.ome.zarr")
    assert result["0"].shape == (2, 2, 50, 40)  # C, Z, Y, X
    for z in range(2):
        expected = predicted(run, image[:, z], "probabilities")
        assert np.array_equal(result["0"][:, z], expected)
    scales = result.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scales[0]["scale"] == pytest.approx([1, 0.002, 0.5, 0.25])


def test_plain_arrays(run, tmp_path):
    image = pixels(40, 50)
    zarr.create_array(tmp_path / "x.zarr", data=image, chunks=(16, 16))
    assert call(run, tmp_path / "x.zarr", "--out", tmp_path, "--format", "png", "--tile", 64) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), predicted(run, image))


@pytest.mark.parametrize("output", ["instances", "probabilities"])
def test_metadata_are_valid(run, tmp_path, output):
    zarr_in(tmp_path / "x.ome.zarr", pixels(70, 70))
    out = tmp_path / "out"
    assert call(run, tmp_path / "x.ome.zarr", "--out", out, "--output", output) == 0
    group = zarr.open_group(out / "x.ome.zarr", mode="r")
    assert OmeImage.from_zarr(group).attributes.ome.version == "0.5"
    if output == "instances":
        ImageLabel.from_zarr(group)
    assert group["0"].dtype == ("int32" if output == "instances" else "float32")
    assert group["0"].nchunks_initialized == group["0"].nchunks


@pytest.mark.filterwarnings("default")
def test_colour_and_grey(run, tmp_path):
    grey = pixels(40, 40)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "x.png")
    assert call(run, tmp_path / "x.png", "--out", tmp_path / "out") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/x.png")), predicted(run, grey))
    three = model_in(tmp_path / "three", 3)
    Image.fromarray(grey).save(tmp_path / "y.png")
    assert call(three, tmp_path / "y.png", "--out", tmp_path / "out") == 0
    expected = predicted(three, np.stack([grey] * 3))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/y.png")), expected)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "jpeg2000"])
def test_tiffs_larger_than_memory(monkeypatch, tmp_path, compression):
    """Mapped, or decoded tile by tile, big-endian, colour, with levels of lower resolution."""
    monkeypatch.setattr(formats, "LARGE_BYTES", 0)
    image = pixels(3, 90, 100).transpose(1, 2, 0)
    file = tmp_path / "x.tif"
    with tifffile.TiffWriter(file, byteorder=">") as tiff:
        options = {"tile": (32, 32), "photometric": "rgb"} if compression else {}
        tiff.write(image, subifds=1, compression=compression, **options)
        tiff.write(image[::2, ::2], subfiletype=1, compression=compression, **options)
    opened = open_source(file, 3)
    assert not isinstance(opened.array, np.ndarray) or isinstance(opened.array, np.memmap)
    found = opened.pixels()(slice(10, 80), slice(20, 99))
    assert np.array_equal(found, image[10:80, 20:99].transpose(2, 0, 1))
    assert opened.size == (90, 100)


def test_imagej_pixel_size(tmp_path):
    options = {"metadata": {"axes": "ZYX", "spacing": 2.0, "unit": "nm"}, "resolution": (0.5, 0.25)}
    tifffile.imwrite(tmp_path / "x.tif", pixels(2, 9, 9), imagej=True, **options)
    sizes = open_source(tmp_path / "x.tif", 1).pixel_size
    assert sizes == pytest.approx({"X": 0.002, "Y": 0.004, "Z": 0.002})
    tifffile.imwrite(tmp_path / "x.tif", pixels(9, 9), resolution=(300, 300), resolutionunit="INCH")
    assert open_source(tmp_path / "x.tif", 1).pixel_size == {}  # of paper


WORKER = """
import sys
import torch
torch.set_num_threads(1)
from unet_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(*words, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-c", WORKER, "predict", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, process=None):
    for _ in range(6000):
        if condition():
            return
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("nothing happened in a minute")


@pytest.mark.parametrize("output", first("labels", "instances"))
def test_goes_on_after_a_kill(run, tmp_path, output):
    """1,500 x 1,500 pixels, killed with some blocks done: these are not computed again."""
    image = zarr_in(tmp_path / "x.ome.zarr", pixels(1500, 1500), chunks=(512, 512))
    out = tmp_path / "out"
    words = run, image, "--out", out, "--tile", 256, "--precision", "float32", "--output", output
    process = start(*words)
    part = out / "x.ome.zarr.part"
    wait_for(lambda: len(list(part.glob("blocks/*"))) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    done = {p.name for p in (part / "blocks").iterdir()}
    assert 3 <= len(done) < 9
    assert not (out / "x.ome.zarr").exists()
    folder = part / ("classes" if output == "instances" else "image") / "0" / "c"
    side = 512
    corners = ([int(i) // side for i in name.split(".")] for name in done)
    chunks = [folder / str(row) / str(column) for row, column in corners]
    assert all(chunk.is_file() for chunk in chunks)
    before = {chunk: (chunk.stat().st_ino, chunk.stat().st_mtime_ns) for chunk in chunks}

    assert main(["predict", *map(str, words)]) == 2  # neither --resume nor --overwrite
    assert main(["predict", *map(str, (*words, "--resume", "--tile", 128))]) == 2  # other settings
    again = start(*words, "--resume")
    if output == "labels":  # the folder is renamed in the end: same files
        after = out / "x.ome.zarr" / "0" / "c"
        _, error = again.communicate()
        assert again.returncode == 0, error
        for chunk, was in before.items():
            stat = (after / chunk.relative_to(folder)).stat()
            assert (stat.st_ino, stat.st_mtime_ns) == was
    else:
        _, error = again.communicate()
        assert again.returncode == 0, error
    assert not part.exists()
    found = zarr.open_array(out / "x.ome.zarr" / "0", mode="r")[...]
    assert np.array_equal(found, predicted(run, pixels(1500, 1500), output, tile=256))
    # Once more: there is nothing left to do.
    assert main(["predict", *map(str, (*words, "--resume"))]) == 0


@pytest.mark.thorough
def test_memory_stays_small(run, tmp_path):
    """2,000 x 2,000 pixels in float64: 32 MB; the budget bounds what the process adds."""
    image = zarr_in(tmp_path / "x.ome.zarr", pixels(2000, 2000).astype(float), chunks=(256, 256))
    code = WORKER.replace(
        "sys.exit(main(sys.argv[1:]))",
        "import resource, unet_fast.prediction.files\n"  # which brings libraries of its own
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "sys.exit(code)",
    )
    words = run, image, "--out", tmp_path / "out", "--memory-budget", "32MB", "--no-overlay"
    command = [sys.executable, "-c", code, "predict", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 500_000  # kB; torch's own first steps take most


@pytest.mark.parametrize("kill", first(True, False))
def test_a_cluster_gives_the_same(run, tmp_path, kill):
    """Two processes; one of them dies while it works."""
    image = zarr_in(tmp_path / "x.ome.zarr", pixels(600, 500), chunks=(128, 128))
    source, out = open_source(image, 1), tmp_path / "out.ome.zarr"
    options = Options("instances", tile=64)
    with cluster(2, None) as client:
        address = client.scheduler.address
        for security in (None, distributed.Security.temporary()):  # strangers cannot send tasks
            kind = "tcp" if security is None else "tls"
            with pytest.raises(OSError, match=r"ertificate|closed"):
                distributed.Client(address.replace("tls", kind), timeout=5, security=security)
        if kill:
            victim = next(iter(client.run(os.getpid).values()))

            def murder():
                wait_for(lambda: len(list(tmp_path.glob("out.ome.zarr.part/blocks/*"))) >= 2)
                os.kill(victim, signal.SIGKILL)

            threading.Thread(target=murder).start()
        told = []
        predict_blocks(
            run,
            source,
            out,
            options,
            client=client,
            progress=lambda *done: told.append(done),
        )
        if kill:
            assert victim not in client.run(os.getpid).values()
    assert told[-1] == (told[0][1], told[0][1])
    found = zarr.open_array(out / "0", mode="r")[...]
    predict_blocks(run, source, tmp_path / "alone.ome.zarr", options)
    alone = zarr.open_array(tmp_path / "alone.ome.zarr" / "0", mode="r")[...]
    assert np.array_equal(found, alone)
    assert np.array_equal(found, predicted(run, pixels(600, 500)))


def test_command_line_with_workers(run, tmp_path):
    image = zarr_in(tmp_path / "x.ome.zarr", pixels(600, 600), chunks=(128, 128))
    assert call(run, image, "--out", tmp_path / "out", "--workers", 2, "--tile", 64) == 0
    found = zarr.open_array(tmp_path / "out" / "x.ome.zarr" / "0", mode="r")[...]
    assert np.array_equal(found, predicted(run, pixels(600, 600)))


def complaint(capsys, *words):
    """The one line that a command ends with."""
    assert call(*words) == 2
    text = capsys.readouterr().err
    assert text.startswith("unet-fast: ")
    assert text.count("\n") == 1
    return text


def test_refuses_damaged_images(run, tmp_path, capsys):
    out = tmp_path / "out"
    image = pixels(300, 300)
    for name, options in (("raw", {}), ("tiled", {"tile": (64, 64), "compression": "zlib"})):
        file = tmp_path / f"{name}.tif"
        tifffile.imwrite(file, image, **options)
        file.write_bytes(file.read_bytes()[:20000])
        text = complaint(capsys, run, file, "--out", out)
        assert f"{file}: " in text
        assert "cannot be read" in text
    broken = zarr_in(tmp_path / "broken.ome.zarr", image)
    (broken / "0" / "c" / "2" / "1").unlink()
    text = complaint(capsys, run, broken, "--out", out)
    assert (
        "must have all its chunks, 25, got 24 (missing ones are taken as 0 with --missing" in text
    )
    assert call(run, broken, "--out", out, "--missing-chunks", "--tile", 64) == 0
    filled = image.copy()
    filled[128:192, 64:128] = 0
    found = zarr.open_array(out / "broken.ome.zarr" / "0", mode="r")[...]
    assert np.array_equal(found, predicted(run, filled))
    cut = zarr_in(tmp_path / "cut.ome.zarr", image)
    chunk = cut / "0" / "c" / "4" / "4"
    chunk.write_bytes(chunk.read_bytes()[:10])
    assert f"{cut}: cannot be read: " in complaint(capsys, run, cut, "--out", out)
    zarr.create_group(tmp_path / "group.zarr")
    text = complaint(capsys, run, tmp_path / "group.zarr", "--out", out)
    assert "must be an OME-Zarr image, got a group without multiscales" in text
    assert not any(p.name.startswith(("raw", "tiled", "cut.ome.zarr0")) for p in out.iterdir())
    assert not (out / "cut.ome.zarr").exists()


def test_too_little_memory_for_any_image_is_said_once(run, tmp_path, capsys):
    for name in "ab":
        Image.fromarray(pixels(40, 40)).save(tmp_path / f"{name}.png")
    text = complaint(capsys, run, tmp_path, "--out", tmp_path / "out", "--memory-budget", "1kB")
    assert "predict: memory_budget must hold 1 tile" in text
    text = complaint(capsys, run, tmp_path, "--out", tmp_path / "out", "--tile", "0")
    assert "predict: tile must be one or two sides >= 1, got 0" in text


@pytest.mark.filterwarnings("default")
def test_grey_images_for_a_network_of_colours(tmp_path, capsys):
    run = model_in(tmp_path / "run", 3)
    Image.fromarray(pixels(40, 40)).save(tmp_path / "x.png")
    assert call(run, tmp_path / "x.png", "--out", tmp_path / "out") == 0
    told = "warning: grey images are repeated as the 3 channels that the model takes"
    assert told in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_axes_of_a_plain_zarr_are_told(run, tmp_path, capsys):
    zarr.create_array(tmp_path / "x.zarr", data=pixels(2, 40, 40))
    assert call(run, tmp_path / "x.zarr", "--out", tmp_path / "out") == 0
    assert "x.zarr: taken for 2 planes, each an image; --axes says" in capsys.readouterr().err


def test_refuses_what_does_not_fit(run, tmp_path, capsys):
    out = tmp_path / "out"
    two = tmp_path / "two.tif"
    tifffile.imwrite(two, pixels(2, 40, 40), metadata={"axes": "CYX"})
    assert "must have 1 channel as the model, got 2" in complaint(capsys, run, two, "--out", out)
    colours = np.stack([pixels(40, 40, seed=i) for i in range(3)], -1)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    text = complaint(capsys, run, tmp_path / "colours.png", "--out", out)
    assert "colours.png: must have 1 channel as the model, got colours" in text
    hole = pixels(90, 90).astype(np.float32)
    hole[50, 60] = np.nan
    tifffile.imwrite(tmp_path / "hole.tif", hole)
    zarr_in(tmp_path / "hole.ome.zarr", hole)
    for name in ("hole.tif", "hole.ome.zarr"):
        text = complaint(capsys, run, tmp_path / name, "--out", out)
        assert f"{name}: image must be finite in float32, got nan" in text
    Image.fromarray(pixels(40, 40)).save(tmp_path / "x.png")
    for words, message in (
        (("--format", "png", "--output", "scores"), "format must not be png for output scores"),
        (("--memory-budget", "much"), "memory-budget must be like 500MB or 2GiB, got much"),
        (("--memory-budget", "1kB"), "predict: memory_budget must hold 1 tile of 4 x 4"),
        (("--tile", "0"), "predict: tile must be one or two sides >= 1, got 0"),
        (("--tta", "all"), "tta must be flips, rotations, square or angles like 0,30,60, got all"),
        (("--workers", "-1"), "workers must be >= 0, got -1"),
        (("--workers", "2", "--format", "png"), "format must be ome-zarr with several workers"),
        (("--workers", "2", "--scheduler", "tcp://127.0.0.1:9"), "workers must be 0 with a sched"),
        (("--scheduler", "nowhere:::"), "scheduler must answer, got nowhere:::"),
        (("--average", "probabilities", "--output", "scores"), "average must be scores"),
        (("--instances", "--output", "labels"), "output must be instances with --instances, got"),
    ):
        assert message in complaint(capsys, run, tmp_path / "x.png", "--out", out, *words)
    tifffile.imwrite(tmp_path / "stack.tif", pixels(2, 40, 40), metadata={"axes": "ZYX"})
    text = complaint(capsys, run, tmp_path / "stack.tif", "--out", out, "--format", "png")
    assert "a stack must go into tiff or ome-tiff, got png" in text
    missing = tmp_path / "nothing.tif"
    assert f"{missing}: no such file or folder\n" in complaint(capsys, run, missing, "--out", out)
    (tmp_path / "a.czi").write_bytes(b"")
    text = complaint(capsys, run, tmp_path / "a.czi", "--out", out)
    assert "a.czi: cannot be read as an image: it must be exported as TIFF (e.g. in Fiji" in text
    assert not list(out.glob("*.png"))


def test_refuses_foreign_models(tmp_path, capsys, monkeypatch):
    Image.fromarray(pixels(40, 40)).save(tmp_path / "x.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"not a model")
    words = tmp_path / "run", tmp_path / "x.png", "--out", tmp_path / "out"
    assert "must hold a model, but it cannot be read" in complaint(capsys, *words)
    monkeypatch.setattr("unet_fast.model_file.FORMAT", 2)
    model_in(tmp_path / "run")
    monkeypatch.undo()
    text = complaint(capsys, *words)
    assert "must hold a model of format 1, got 2: it is of a newer unet_fast" in text


@pytest.mark.thorough
def test_nothing_looks_finished_on_a_full_disk(run, tmp_path):
    """No file may grow beyond 4 kB: as on a disk that is full, but for the words."""
    Image.fromarray(pixels(300, 300)).save(tmp_path / "x.png")
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))}
    for format in ("tiff", "ome-zarr"):
        out = tmp_path / format
        words = "--out", out, "--format", format, "--output", "probabilities"
        process = start(run, tmp_path / "x.png", *words, **limit)
        _, error = process.communicate()
        assert process.returncode == 2
        assert error.count("\n") == 1, error
        assert "cannot be written: File too large" in error
        assert not (out / "x.tif").exists()
        assert not (out / "x.ome.zarr").exists()
    assert call(run, tmp_path / "x.png", *words, "--resume", precision="auto") == 0


def test_results_are_kept_or_replaced(run, tmp_path, capsys):
    for name in ("a", "b"):
        Image.fromarray(pixels(40, 40)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    assert call(run, tmp_path, "--out", out) == 0
    assert "--resume keeps them" in complaint(capsys, run, tmp_path, "--out", out)
    kept = (out / "a.png").stat().st_ino
    (out / "b.png").unlink()
    assert call(run, tmp_path, "--out", out, "--resume") == 0
    assert (out / "a.png").stat().st_ino == kept
    assert (out / "b.png").exists()
    assert call(run, tmp_path, "--out", out, "--overwrite") == 0
    assert (out / "a.png").stat().st_ino != kept
    assert "out must not be the folder of the input" in complaint(
        capsys, run, tmp_path, "--out", tmp_path, "--overwrite"
    )
    assert not (tmp_path / "overlays").exists()
    Path(tmp_path / "a.tif").write_bytes(b"")
    assert "names must be unique" in complaint(capsys, run, tmp_path, "--out", out)


def test_several_images_one_of_them_broken(run, tmp_path, capsys, monkeypatch):
    """Files, a folder and a pattern; what is broken is skipped, the rest is predicted."""
    monkeypatch.chdir(tmp_path)
    places = "a.tif", "more/b.png", "more/broken.png", "last/c.png", "last/d.jpg"
    for name in places:
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(40, 40)).save(name)
    Path("more/broken.png").write_bytes(b"not a picture")
    capsys.readouterr()
    words = run, "a.tif", "more", "last/*.png", "--out", "out"
    assert call(*words) == 1
    told = capsys.readouterr()
    first, second = told.err.splitlines()[-2:]
    assert first == "unet-fast: 1 image skipped:"
    assert second.startswith("more/broken.png: cannot be read as an image: ")
    assert told.out.startswith("3 images, ")
    assert sorted(p.name for p in Path("out").glob("*.*")) == ["a.png", "b.png", "c.png"]
    Image.fromarray(pixels(40, 40)).save("more/broken.png")
    assert call(*words, "a.tif", "--resume") == 0  # twice is once
    assert "4 images, " in (said := capsys.readouterr().out)
    assert "(3 already there, objects not counted)" in said
    for words, message in (
        (("a.tif", "none/*.png"), "images must match a file or a folder, got none for none/*.png"),
        (("a.tif", "none.png"), "none.png: no such file or folder"),
    ):
        assert message in complaint(capsys, run, *words, "--out", "out", "--overwrite")
    Image.fromarray(pixels(40, 40)).save("last/b.png")
    text = complaint(capsys, run, "more", "last/b.png", "--out", "out", "--overwrite")
    assert "names that differ without suffix, as results have them, got more/b.png and last" in text
    for name in ("more/b.png", "more/broken.png"):
        Path(name).write_bytes(b"not a picture")
    assert call(run, "more", "--out", "none", "--table") == 1
    assert capsys.readouterr().out == "0 images, 0 objects: none\n"
    assert not list(Path("none").iterdir())


def test_nested_folders(run, tmp_path, capsys):
    """Results, overlays and tables keep the paths; those of an earlier call are no images."""
    images, out = tmp_path / "images", tmp_path / "images" / "out"
    for name in ("one/a", "two/a"):
        (images / name).parent.mkdir(parents=True)
        Image.fromarray(pixels(40, 40)).save(images / f"{name}.png")
    zarr_in(images / "three" / "b.zarr", pixels(40, 40))
    text = complaint(capsys, run, images, "--out", out)
    assert "there are images in nested folders, which --recursive takes" in text
    words = run, images, "--out", out, "--recursive", "--table"
    for more in ((), ("--resume",), ("--overwrite",)):
        assert call(*words, "--format", "tiff", *more) == 0
        assert capsys.readouterr().out.startswith("3 images, ")
    names = [f"{folder}/{name}" for folder, name in (("one", "a"), ("three", "b"), ("two", "a"))]
    written = [*(f"{n}.tif" for n in names), *(f"overlays/{n}.png" for n in names)]
    written += [f"tables/{n}.csv" for n in names]
    found = [p.relative_to(out).as_posix() for p in out.rglob("*.*") if p.name[0] != "."]
    assert sorted(found) == sorted(written)
    assert "\none/a,,1," in (out / "tables" / "one" / "a.csv").read_text()
    (images / "overlays").mkdir()
    (images / "one" / "a.png").rename(images / "overlays" / "a.png")
    assert "must not be in folders that results have" in complaint(capsys, *words, "--overwrite")


@pytest.mark.parametrize("output", ["instances", "labels"])
def test_results_of_a_call_have_one_dtype(run, tmp_path, monkeypatch, output):
    """16 bits, whatever the number of objects; only more than 65,535 of them need 32, and TIFF."""
    few, many = pixels(30, 30), pixels(300, 300)
    Image.fromarray(few).save(tmp_path / "few.png")
    Image.fromarray(many).save(tmp_path / "many.png")
    tifffile.imwrite(tmp_path / "stack.tif", pixels(2, 30, 30), metadata={"axes": "ZYX"})
    assert call(run, tmp_path, "--out", tmp_path / "out", "--output", output) == 0
    paths = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert [open_source(path, 1).array.dtype for path in paths] == [np.uint16] * 3
    found = np.full((30, 30), 70_000, np.int32)
    monkeypatch.setattr("unet_fast.prediction.files._in_memory", lambda *_: (found, 70_000))
    assert call(run, tmp_path / "few.png", "--out", tmp_path / "wide", "--output", output) == 0
    wide = tifffile.imread(tmp_path / "wide" / "few.tif")
    assert wide.dtype == np.uint32
    assert np.array_equal(wide, found)
    assert call(run, tmp_path / "few.png", "--out", tmp_path / "wide", "--output", output) == 2


@pytest.mark.filterwarnings("default:.*taken for")
def test_says_what_it_takes_an_axis_for(run, tmp_path, capsys):
    """Of which the file says nothing."""
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, pixels(5, 30, 31))
    assert call(run, file, "--out", tmp_path / "out") == 0
    said = "taken for 5 planes, each an image; --axes says otherwise (CYX: channels)"
    assert capsys.readouterr().err.splitlines()[0] == f"unet-fast: warning: {file}: {said}"
    assert call(run, file, "--out", tmp_path / "out", "--axes", "ZYX", "--overwrite") == 0
    assert "taken" not in capsys.readouterr().err


def test_refuses_stacks_that_are_cut_off(run, tmp_path, capsys):
    """What is left of the file would be a plane."""
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, pixels(6, 64, 70), compression="zlib")
    content = file.read_bytes()
    for share in (0.3, 0.55, 0.97):
        file.write_bytes(content[: int(share * len(content))])
        complaint(capsys, run, file, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.*"))


@pytest.mark.parametrize("size", [1e-4, 0.0, -1.0, float("nan"), 1e-30, 1e30])
def test_odd_pixel_sizes_do_no_harm(run, tmp_path, size):
    """An angstrom is the size of electron microscopes; PNG cannot say it. Others are left out."""
    image = pixels(40, 40)
    sizes = {"X": size, "Y": size}
    options = {"name": "x", "shape": image.shape, "axes": "YX", "chunks": (40, 40), "labels": False}
    create(tmp_path / "x.ome.zarr", dtype="uint8", pixel_size=sizes, **options)[...] = image
    for format, name in (("png", "x.png"), ("tiff", "x.tif"), ("ome-zarr", "x.ome.zarr")):
        out = tmp_path / "out"
        words = run, tmp_path / "x.ome.zarr", "--out", out, "--format", format
        assert call(*words) == 0
        found = open_source(out / name, 1).pixel_size
        assert found == ({} if size != 1e-4 or format == "png" else pytest.approx(sizes, rel=1e-6))


def test_overlays_do_not_replace_images(run, tmp_path, capsys):
    (tmp_path / "overlays").mkdir()
    Image.fromarray(pixels(40, 40)).save(tmp_path / "overlays" / "x.png")
    before = (tmp_path / "overlays" / "x.png").read_bytes()
    text = complaint(capsys, run, tmp_path / "overlays", "--out", tmp_path, "--overwrite")
    assert "out must not be the folder of the input" in text
    assert (tmp_path / "overlays" / "x.png").read_bytes() == before


@pytest.mark.thorough
def test_workers_that_outlive_a_run_take_the_new_model(run, tmp_path):
    other = model_in(tmp_path / "other", base_channels=2, depth=1)
    source = open_source(zarr_in(tmp_path / "x.ome.zarr", pixels(200, 200)), 1)
    options = Options("scores", tile=64, tta=(0.0, 90.0))
    with cluster(1, None) as client:
        for model in (run, other):
            out = tmp_path / "out.ome.zarr"
            predict_blocks(model, source, out, options, client=client, overwrite=True)
            found = zarr.open_array(out / "0", mode="r")[...]
            expected = predicted(model, pixels(200, 200), "scores", tta=(0.0, 90.0))
            assert np.array_equal(found, expected)


def test_goes_on_only_with_the_same_and_from_any_point(run, tmp_path, monkeypatch):
    """Cut off at a block, while an earlier try is removed, and between the last steps."""
    image = zarr_in(tmp_path / "x.ome.zarr", pixels(600, 600))
    source, out = open_source(image, 1), tmp_path / "out.ome.zarr"
    options = Options("labels", tile=64, tta=(0.0, 90.0))
    part = tmp_path / "out.ome.zarr.part"

    def cut_off(*_):
        raise KeyboardInterrupt

    def fails(**changes):
        with pytest.raises(KeyboardInterrupt, match="is kept, --resume goes on"):
            predict_blocks(run, source, out, options, **changes)

    with monkeypatch.context() as patch:
        patch.setattr("unet_fast.prediction.out_of_core._flush", cut_off)  # of the first chunk
        fails()
    assert is_begun(out)
    assert not list((part / "blocks").iterdir())
    (part / "image" / "0" / "c" / "0" / "0.123.partial").write_bytes(b"cut off")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", cut_off)
        fails(overwrite=True)
    assert not is_begun(out)  # the folder is there, the job no more
    with monkeypatch.context() as patch:
        patch.setattr("unet_fast.prediction.out_of_core._finish", cut_off)
        fails()
    (part / "image" / "0" / "c" / "0" / "0.123.partial").write_bytes(b"cut off")
    predict_blocks(run, source, out, options, resume=True)
    found = zarr.open_array(out / "0", mode="r")[...]
    assert np.array_equal(found, predicted(run, pixels(600, 600), "labels", tta=(0.0, 90.0)))
    assert not list(out.rglob("*.partial"))
    assert not part.exists()
    with monkeypatch.context() as patch:  # the old result stays until the new one is complete
        patch.setattr("unet_fast.prediction.out_of_core._finish", cut_off)
        fails(overwrite=True)
    assert np.array_equal(zarr.open_array(out / "0", mode="r")[...], found)
    other = model_in(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="with the settings it was begun with, model was"):
        predict_blocks(other, source, out, options, resume=True)


def test_a_kill_while_an_earlier_result_is_replaced(run, tmp_path, monkeypatch):
    """Before the new one has its name: the one on disk then is whole, and the rest goes away."""
    image = pixels(60, 60)
    source, out = open_source(zarr_in(tmp_path / "x.ome.zarr", image), 1), tmp_path / "out.ome.zarr"
    part = tmp_path / "out.ome.zarr.part"
    predict_blocks(run, source, out, Options("labels"))
    rename, made = Path.rename, part / "image"

    def cut_off(path, to):
        if path == made:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut_off)
        with pytest.raises(KeyboardInterrupt, match="is kept"):
            predict_blocks(run, source, out, Options("labels", tile=40), overwrite=True)
    assert not out.exists()
    assert (part / "replaced").exists()
    remove_rest(out)  # which keeps what can be resumed
    assert is_begun(out)
    predict_blocks(run, source, out, Options("labels", tile=40), resume=True)
    found = zarr.open_array(out / "0", mode="r")
    assert found.chunks == (60, 60)
    assert np.array_equal(found[...], predicted(run, image, "labels", tile=40))
    assert not part.exists()
    part.mkdir()  # left by a kill after the job was done
    remove_rest(out)
    assert not part.exists()


def test_blocks_refuse_what_is_there(run, tmp_path, monkeypatch):
    path, out = zarr_in(tmp_path / "x.ome.zarr", pixels(40, 40)), tmp_path / "out.ome.zarr"
    source = open_source(path, 1)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            predict_blocks(run, source, out, Options("labels"))

    out.write_bytes(b"")
    refused("out.ome.zarr: must be a folder or not exist, got a link or a file")
    out.unlink()
    out.symlink_to(tmp_path)
    refused("out.ome.zarr: must be a folder or not exist, got a link or a file")
    out.unlink()
    out.mkdir()
    refused("out.ome.zarr: must not exist, or go with --overwrite")
    out.rmdir()

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("unet_fast.prediction.out_of_core._finish", cut_off)
    with pytest.raises(KeyboardInterrupt, match="is kept"):
        predict_blocks(run, source, out, Options("labels"))
    refused("out.ome.zarr.part: was begun; --resume goes on, --overwrite starts again")
    os.utime(path / "zarr.json", (0, 0))
    with pytest.raises(
        ValueError, match="image and model must stay as they were when it was begun"
    ):
        Worker(tmp_path / "out.ome.zarr.part", "cpu")


@pytest.mark.parametrize("format", ["tiff", "ome-zarr"])
def test_values_of_classes_and_pixels_as_they_are(tmp_path, format):
    """Labels have the values of the training labels; without a range nothing is normalised."""
    run, image = model_in(tmp_path / "run", num_classes=3), pixels(60, 60)
    net = load_model(run)
    net.normalisation, net.class_values = None, [0, 7, 300]
    net.head.bias.data[2] += 0.1
    save_model(net, run)
    zarr_in(tmp_path / "x.ome.zarr", image)
    words = "--output", "labels", "--tile", 64, "--no-overlay", "--format", format
    assert call(run, tmp_path / "x.ome.zarr", "--out", tmp_path / "out", *words) == 0
    (result,) = (tmp_path / "out").iterdir()  # no folder of overlays
    found = open_source(result, 1).array
    assert found.dtype == np.uint16
    expected = np.array([0, 7, 300])[predict(net, image, output="labels", tile=64)]
    assert np.array_equal(found, expected)
    assert len(np.unique(expected)) > 1


def test_a_kill_between_a_result_and_its_picture(run, tmp_path, capsys):
    zarr_in(tmp_path / "x.ome.zarr", pixels(40, 40))
    words = run, tmp_path / "x.ome.zarr", "--out", tmp_path / "out"
    assert call(*words, "--no-overlay") == 0
    assert "overlays" not in capsys.readouterr().out
    picture = tmp_path / "out" / "overlays" / "x.png"
    assert not picture.exists()
    assert call(*words, "--resume") == 0
    assert "(1 already there, objects not counted)" in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert drawn.size == (40, 40)


@pytest.mark.parametrize("output", ["labels", "instances"])
def test_background_has_chunks_too(tmp_path, output):
    """All zero, and still written: a chunk that is not there is one that is missing."""
    run = model_in(tmp_path / "run")
    net = load_model(run)
    net.head.bias.data += torch.tensor([1000.0, 0.0])
    save_model(net, run)
    image, out = zarr_in(tmp_path / "x.ome.zarr", pixels(600, 600)), tmp_path / "out"
    assert call(run, image, "--out", out, "--output", output, "--tile", 64) == 0
    result = zarr.open_array(out / "x.ome.zarr" / "0", mode="r")
    assert result.nchunks_initialized == result.nchunks == 4
    assert not result[...].any()
    assert call(run, out / "x.ome.zarr", "--out", tmp_path / "again") == 0


def test_broken_metadata(run, tmp_path, capsys):
    out = tmp_path / "out"
    array = {"datasets": [{"path": "0"}]}
    for i, image in enumerate(
        (
            {},
            {"datasets": []},
            array,
            {**array, "axes": 3},
            {**array, "axes": [{"name": 1}] * 2},
            {**array, "axes": ["y"]},
            {**array, "axes": ["y", "x", "z"]},
            {**array, "axes": ["y", "y"]},
        )
    ):
        path = zarr_in(tmp_path / f"{i}.ome.zarr", pixels(20, 20))
        zarr.open_group(path).attrs["ome"] = {"version": "0.5", "multiscales": [image]}
        assert f"{path}: " in complaint(capsys, run, path, "--out", out)
    file = tmp_path / "x.ome.tif"
    tifffile.imwrite(file, pixels(20, 20), description='<OME><Pixels PhysicalSizeX="0,65"/></OME>')
    assert call(run, file, "--out", out) == 0  # the size is lost, the image is not
