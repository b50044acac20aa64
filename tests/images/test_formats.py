"""Every kind of PNG and TIFF reads as the values that are in it, or is refused in one line."""

import struct
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import tifffile
import zarr as library
from PIL import Image
from tifffile import _imagecodecs

from unet_fast.images import formats, zarr
from unet_fast.images.files import read_image, read_labels
from unet_fast.images.source import list_sources, open_source

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


def test_compressions_without_imagecodecs(tmp_path, rng, monkeypatch):
    """Pillow decodes what tifffile cannot then."""
    values = rng.integers(0, 256, (5, 7), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="lzw")
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", _imagecodecs)
    codecs = tifffile.tifffile.CompressionCodec(encode=False)
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", codecs)
    with pytest.raises(ValueError, match="requires the 'imagecodecs' package"):
        tifffile.imread(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), values[None])


def test_a_large_tiff_of_one_resolution(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(formats, "LARGE_BYTES", 0)
    values = rng.integers(0, 256, (50, 70), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="zlib", tile=(16, 16))
    opened = open_source(tmp_path / "a.tif", 1)
    assert isinstance(opened.array, library.Array)
    np.testing.assert_array_equal(opened.pixels()(slice(3, 40), slice(5, 70))[0], values[3:40, 5:])


@pytest.mark.parametrize(("resolution", "size"), [((0, 0.25), {"Y": 4}), ((0.5, 0), {"X": 2})])
def test_pixels_of_no_size_along_an_axis(tmp_path, resolution, size):
    options = {"resolution": resolution, "metadata": {"unit": "um"}}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 6), np.uint8), imagej=True, **options)
    assert open_source(tmp_path / "a.tif", 1).pixel_size == size


def refused(message, path):
    with pytest.raises(ValueError, match=message) as error:
        open_source(path, None).layout(())
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_axes_that_no_result_has(tmp_path):
    path = tmp_path / "a.tif"
    planes = np.zeros((2, 3, 5, 6), np.uint8)
    tifffile.imwrite(path, planes, ome=True, metadata={"axes": "QZYX"}, photometric="minisblack")
    refused("stacks must have axes T and Z, got QZ", path)
    colours = np.zeros((2, 5, 6, 3), np.uint8)
    tifffile.imwrite(path, colours, ome=True, metadata={"axes": "CYXS"}, photometric="rgb")
    refused("must have one axis of channels, got axes CYXS", path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2, 5, 6), np.uint8), "must have from 2 to 4 axes, got 5"),
        (np.zeros(6, np.uint8), "must have from 2 to 4 axes, got 1"),
        (np.zeros((0, 6), np.uint8), r"must have at least one pixel, got shape \(0, 6\)"),
        (np.ones((5, 6), np.complex64), "pixels must be real numbers, got complex64"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, message):
    library.create_array(tmp_path / "a.zarr", data=array, chunks=(6,) * array.ndim)
    refused(message, tmp_path / "a.zarr")


def test_an_image_at_a_place(tmp_path):
    """OME-Zarr says where an image lies by a translation, which does not change its pixels."""
    group = library.create_group(tmp_path / "a.zarr")
    values = np.arange(30, dtype=np.uint8).reshape(5, 6)
    group.create_array("0", data=values)
    changes = [
        {"type": "scale", "scale": [0.5, 0.25]},
        {"type": "translation", "translation": [9, 9]},
    ]
    axes = [{"name": name, "unit": "micrometer"} for name in "yx"]
    level = {"path": "0", "coordinateTransformations": changes}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    opened = open_source(tmp_path / "a.zarr", 1)
    assert opened.pixel_size == {"Y": 0.5, "X": 0.25}
    np.testing.assert_array_equal(opened.pixels()(slice(None), slice(None))[0], values)


@pytest.mark.parametrize("installed", [None, types.SimpleNamespace(__version__="2.18.7")])
def test_without_zarr(monkeypatch, installed):
    monkeypatch.setattr(zarr, "zarr_library", lambda: installed)
    with pytest.raises(ValueError, match=r"package zarr 3: pip install 'unet_fast\[zarr\]'"):
        zarr.need_zarr()


def test_what_lies_beside_arrays(tmp_path):
    """Files that are not read are told of, whether images are files or folders."""
    library.create_array(tmp_path / "a.zarr", data=np.zeros((5, 6), np.uint8))
    (tmp_path / "b.czi").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"found 1 \.czi file, which must be exported as TIFF"):
        assert list_sources(tmp_path) == [tmp_path / "a.zarr"]


def test_pictures_that_exif_turns_are_refused(tmp_path):
    exif = Image.Exif()
    for orientation, refused in ((1, False), (6, True)):
        exif[0x0112] = orientation
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
        with pytest.raises(ValueError, match=r"a\.jpg.*upright") if refused else nullcontext():
            assert read_image(tmp_path / "a.jpg").shape == (1, 8, 9)
