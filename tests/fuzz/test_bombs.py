"""Small files and small words that ask for all memory, or for ever: refused in one line."""

import contextlib
import json
import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from runs import discs_in
from safetensors.torch import load, save

from unet_fast import UNet, load_model, save_model
from unet_fast.cli import main
from unet_fast.images.files import read_image
from unet_fast.images.source import open_source

SECONDS, MEGABYTES = 60, 1000
"""Most that an input of less than 1 MB may take until it is refused."""


def peak(function):
    """Megabytes of memory that a call takes at most, beyond those before it, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def resident(name):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) / 1000

    before, begun = resident("VmRSS"), time.monotonic()
    function()
    return resident("VmHWM") - before, time.monotonic() - begun


def refused(capfd, words, said):
    """Runs a command; it must end soon, with little memory and one line that says why."""
    codes = []
    megabytes, seconds = peak(lambda: codes.append(main([str(word) for word in words])))
    printed = "".join(capfd.readouterr())
    assert codes == [2]
    told = [line for line in printed.splitlines() if re.search(said, line)]
    assert len(told) == 1
    assert "Traceback" not in printed
    assert megabytes < MEGABYTES
    assert seconds < SECONDS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(UNet(base_channels=2, depth=1), path)
    return path


def png(path, width, height, bits, kind):
    """A PNG whose header promises more pixels than its data hold."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    content = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in content))


def tiff(path, side, compression):
    """A TIFF of 122 bytes whose one strip is empty."""
    tags = [(256, side), (257, side), (258, 8), (259, compression), (262, 1), (273, 122)]
    tags += [(277, 1), (278, side), (279, 0)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4))


def jpeg(path, side):
    Image.new("L", (16, 16)).save(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc0") + 5  # height and width, in the header of the frame
    content[at : at + 4] = struct.pack(">HH", side, side)
    path.write_bytes(content)


def bmp(path, side):
    Image.new("L", (16, 16)).save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", side, side)
    path.write_bytes(content)


def ring(path, sides):
    """A TIFF whose last page is followed by itself, for ever."""
    with tifffile.TiffWriter(path) as file:
        for side in sides:
            file.write(np.zeros((side, side), np.uint8), compression="zlib", metadata=None)
    content = bytearray(path.read_bytes())
    at = 4  # of the place of a page
    while page := struct.unpack("<I", content[at : at + 4])[0]:
        last, at = page, page + 2 + 12 * struct.unpack("<H", content[page : page + 2])[0]
    content[at : at + 4] = struct.pack("<I", last)
    path.write_bytes(content)


PICTURES = {
    "a.png": lambda path: png(path, 40_000, 40_000, 8, 0),
    "b.png": lambda path: png(path, 2**31 - 1, 2**31 - 1, 1, 0),
    "c.png": lambda path: png(path, 40_000, 40_000, 16, 6),
    "a.tif": lambda path: tiff(path, 60_000, 8),
    "b.tif": lambda path: tiff(path, 60_000, 1),
    "c.tif": lambda path: tiff(path, 2**32 - 1, 5),
    "a.jpg": lambda path: jpeg(path, 65_500),
    "a.bmp": lambda path: bmp(path, 60_000),
    "pipe.png": os.mkfifo,
    "pipe.tif": os.mkfifo,
    "zero.png": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("command", ["check", "predict"])
def test_pictures(capfd, tmp_path, model, name, command):
    folder = tmp_path / "images"
    folder.mkdir()
    PICTURES[name](folder / name)
    if command == "predict":
        words = ["predict", model, "--out", tmp_path / "out", folder]
    else:
        labels = tmp_path / "labels"
        labels.mkdir()
        Image.new("L", (16, 16)).save(labels / f"{Path(name).stem}.png")
        words = ["check", folder, labels, "--out", tmp_path / "out"]
    refused(capfd, words, f"{name}: cannot be read as an image: ")


def test_more_pixels_are_allowed_by_option(capfd, tmp_path, model):
    """A blank picture has few bytes: it takes the option, and no more pixels than the option."""
    file = tmp_path / "blank.png"
    Image.new("L", (9000, 8000)).save(file)
    words = ["predict", model, "--out", tmp_path / "out", "--output", "labels", file]
    refused(capfd, words, "72000000 pixels.*allow more by --max-pixels")
    refused(capfd, [*words, "--max-pixels", 10**7], "72000000 pixels.*and may to 10000000:")
    refused(capfd, [*words, "--max-pixels", 0], "--max-pixels must be >= 1, got 0")
    os.environ["UNET_FAST_MAX_PIXELS"] = str(72 * 10**6)
    try:
        assert open_source(file, 1).size == (8000, 9000)
    finally:
        del os.environ["UNET_FAST_MAX_PIXELS"]


@pytest.mark.parametrize("sides", [(8, 8, 8), (8, 9)])
def test_a_ring_of_pages(tmp_path, sides):
    file = tmp_path / "ring.tif"
    ring(file, sides)

    def read():
        with contextlib.suppress(ValueError):
            open_source(file, 1).pixels((3,))(slice(8), slice(8))

    megabytes, seconds = peak(read)
    assert megabytes < MEGABYTES
    assert seconds < SECONDS


def test_a_tiff_of_tiny_pages(capfd, tmp_path, model):
    file, tags = tmp_path / "a.tif", [(256, 1), (257, 1), (273, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    page = struct.pack("<H", len(tags)) + entries
    ends = [8 + (i + 1) * (len(page) + 4) for i in range(20_000)]
    pages = b"".join(page + struct.pack("<I", end) for end in [*ends[:-1], 0])
    file.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + pages)
    words = ["predict", model, "--out", tmp_path / "out", file]
    refused(capfd, words, "must have 128 bytes a page, got 20000 in 840008 bytes")


def test_a_tiff_without_its_strips(tmp_path):
    """Many rows, of which few have data: neither zeros nor millions of chunks."""
    file = tmp_path / "a.tif"
    pixels = np.ones((8, 4), "f8")
    tifffile.imwrite(file, pixels, compression="zlib", rowsperstrip=4, photometric="minisblack")
    content = file.read_bytes()
    for count in (2**22, 12):
        length = struct.pack("<HHII", 257, 4, 1, 8)
        assert content.count(length) == 1
        longer = struct.pack("<HHII", 257, 4, 1, count)
        file.write_bytes(content.replace(length, longer))
        for read in (read_image, lambda path: open_source(path, 1)):
            with pytest.raises(ValueError, match=f"must have {count // 4} strips or tiles, got 2"):
                read(file)


ARRAYS = {
    "one pixel a chunk": ((2**31, 2**31), (1, 1), "pixels, got 4611686018427387904"),
    "many chunks": ((2**20, 2**20), (1, 1), "must have all its chunks, 1099511627776, got 0"),
    "one chunk": ((60_000, 60_000), (60_000, 60_000), "3600000000 pixels"),
    "many planes": ((2**31, 1, 1), (2**31, 1, 1), "at most 1048576 planes, got 2147483648"),
}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(capfd, tmp_path, model, name, missing):
    shape, chunks, said = ARRAYS[name]
    if missing and name == "many chunks":
        pytest.skip("an image of a square metre, which takes a week: as large as asked for")
    folder = tmp_path / "a.zarr"
    zarr.create_array(folder, shape=shape, chunks=chunks, dtype="u1")
    words = ["predict", model, "--out", tmp_path / "out", folder]
    refused(capfd, [*words, *["--missing-chunks"] * missing], f"a.zarr: .*{said}")


@pytest.mark.parametrize("path", ["../secret", "/", "0/../../secret"])
def test_a_path_out_of_the_folder(capfd, tmp_path, model, path):
    zarr.create_array(tmp_path / "secret", shape=(8, 8), chunks=(8, 8), dtype="u1")[:] = 1
    folder = tmp_path / "a.zarr"
    axes = [{"name": "y"}, {"name": "x"}]
    image = {"axes": axes, "datasets": [{"path": path}]}
    zarr.create_group(folder, attributes={"ome": {"multiscales": [image]}})
    words = ["predict", model, "--out", tmp_path / "out", folder]
    refused(capfd, words, "a.zarr: .*a path inside the folder")


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_fill_value_that_does_not_fit(capfd, tmp_path, model):
    folder = tmp_path / "a.zarr"
    zarr.create_array(folder, shape=(8, 8), chunks=(8, 8), dtype="f4", zarr_format=2)[:] = 1
    described = json.loads((folder / ".zarray").read_text()) | {"fill_value": 1e308}
    (folder / ".zarray").write_text(json.dumps(described))
    words = ["predict", model, "--out", tmp_path / "out", folder]
    refused(capfd, words, "a.zarr: .*overflow")


DEEP = "[" * 10**5


def models(good):
    """Damaged model files, by what is said of them."""
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    tensors = load(good)
    description = json.loads(header["__metadata__"]["unet_fast"])
    wide = description | {"network": description["network"] | {"base_channels": 65536, "depth": 12}}

    def of(description):
        return save(tensors, {"unet_fast": json.dumps(description)})

    return {
        "header must have at most": struct.pack("<Q", 2**60) + good[8:],
        "header must have at most 1048576": struct.pack("<Q", 2 * 10**6) + b"{" * 2 * 10**6,
        "nested too deeply": save(tensors, {"unet_fast": DEEP}),
        "depth must be": of(description | {"network": {"depth": 10**9}}),
        "it cannot be read: ": of(wide),
        "class_values must be": of(description | {"class_values": {"0": 1}}),
        "normalisation must be": of(description | {"normalisation": 5}),
        "grow must be": of(description | {"ridge_width": 10**9}),
    }


@pytest.mark.parametrize("number", range(8))
def test_models(tmp_path, model, number):
    said, content = list(models(model.read_bytes()).items())[number]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)

    def read():
        with pytest.raises(ValueError, match=f"bad.safetensors: .*{said}") as caught:
            load_model(file)
        assert "\n" not in str(caught.value)

    megabytes, seconds = peak(read)
    assert megabytes < MEGABYTES
    assert seconds < SECONDS


def test_a_model_takes_twice_its_file(tmp_path):
    """And a tenth for its largest tensor, whose values are looked at."""
    file = tmp_path / "model.safetensors"
    save_model(UNet(base_channels=48), file)
    size = file.stat().st_size / 1e6
    load_model(file)
    megabytes, _ = peak(lambda: load_model(file))
    assert size > 60
    assert megabytes < 2.1 * size


WORDS = {
    "split": (["--split", "/dev/zero"], "/dev/zero: .*must be a regular file"),
    "config": (["--config", "/dev/zero"], "/dev/zero: .*must be a regular file"),
    "batch": (["--batch-size", 10**13], "batch_size must be in .1, 65536., got 10000000000000"),
    "steps": (["--steps", 10**30, "--base-channels", 10**6], "base_channels must be in"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words(capfd, tmp_path, name):
    more, said = WORDS[name]
    images, labels = discs_in(tmp_path / "discs")
    refused(capfd, ["train", images, labels, "--out", tmp_path / "run", *more], said)


@pytest.mark.parametrize("content", [DEEP, f"steps = {DEEP}", "[a" + ".a" * 10**4 + "]"])
@pytest.mark.parametrize("name", ["split", "config"])
def test_deep_files(capfd, tmp_path, name, content):
    images, labels = discs_in(tmp_path / "discs")
    file = tmp_path / "file"
    file.write_text(content)
    words = ["train", images, labels, "--out", tmp_path / "run", f"--{name}", file]
    refused(capfd, words, f"{file}: .*must be ")


@pytest.mark.parametrize("what", ["model", "config"])
def test_pipes_nobody_writes_to(capfd, tmp_path, what):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    images, labels = discs_in(tmp_path / "discs")
    if what == "model":
        words = ["predict", pipe, images, "--out", tmp_path / "out"]
        refused(capfd, words, "pipe: must hold a model")
    else:
        words = ["train", images, labels, "--out", tmp_path / "run", "--config", pipe]
        refused(capfd, words, "pipe: .*must be a regular file")
