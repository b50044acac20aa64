"""Every kind of PNG and TIFF reads as the values that are in it, or is refused in one line."""

import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_fast.images.files import read_image, read_labels

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a colour type; PNG specification, table 11.1
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
KINDS = [(kind, bits) for kind, depths in DEPTHS.items() for bits in depths]


def png(values, kind, bits):
    """A PNG of (H, W, C), without any library that reads it."""
    height, width, _ = values.shape
    lines = values.reshape(height, -1)
    if bits == 16:
        rows = [line.astype(">u2").tobytes() for line in lines]
    else:
        places = (lines[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [np.packbits(line.reshape(-1)).tobytes() for line in places]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    if kind == 3:
        parts.append((b"PLTE", bytes(range(256))[: 3 * 2**bits].ljust(3 * 2**bits, b"\7")))
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def values_of(rng, kind, bits, shape=(5, 7)):
    return rng.integers(0, 2**bits, (*shape, CHANNELS[kind]))


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_png(tmp_path, rng, kind, bits):
    values = values_of(rng, kind, bits)
    (tmp_path / "a.png").write_bytes(png(values, kind, bits))
    colours = values[..., :-1] if kind in (4, 6) else values
    if kind != 3:
        image = read_image(tmp_path / "a.png")
        np.testing.assert_array_equal(image, np.moveaxis(colours, -1, 0))
    if kind in (0, 3, 4):
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), colours[..., 0])


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_deep_png_without_its_reader(tmp_path, rng, kind, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(values_of(rng, kind, 16), kind, 16))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ValueError, match=r"a.png: cannot .* needs the package imagecodecs"):
        read_labels(tmp_path / "a.png")


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_alpha_of_tiff(tmp_path, rng, planar, dtype):
    values = rng.integers(0, 200, (5, 7, 4)).astype(dtype)
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="rgb",
        planarconfig=planar,
        extrasamples=["unassalpha"],
    )
    expected = np.moveaxis(values[..., :3], -1, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


def test_threads_see_what_is_wrong_with_their_own_file(tmp_path, rng):
    """Half of the files are cut off; each is told of by the thread that reads it."""
    for i in range(40):
        path = tmp_path / f"{i}.tif"
        pages = rng.integers(0, 9, (3, 20, 20)).astype(np.uint8)
        tifffile.imwrite(path, pages, photometric="minisblack", compression="zlib", metadata=None)
        if i % 2:
            path.write_bytes(path.read_bytes()[:-150])

    def cut_off(i):
        try:
            read_image(tmp_path / f"{i % 40}.tif")
        except ValueError as error:
            return "cut off" in str(error) or "cannot be read" in str(error)
        return False

    alone = [cut_off(i) for i in range(40)]
    assert sum(alone[1::2]) == 20
    limit = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cut_off, range(400))) == alone * 10
    assert limit == Image.MAX_IMAGE_PIXELS
