import logging
import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_fast.images import files, formats
from unet_fast.images.files import read_image, read_labels
from unet_fast.images.limits import MOST_PIXELS, check_pixels

GRAY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def save(path, array, mode=None):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def test_grey_images(tmp_path):
    for name in ("a.png", "a.tif", "a.bmp"):
        image = read_image(save(tmp_path / name, GRAY))
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image[0], GRAY)
    sixteen = GRAY.astype(np.uint16) * 250
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", sixteen))[0], sixteen)
    tifffile.imwrite(tmp_path / "c.tif", GRAY.astype(np.float32) / 7)
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif")[0], GRAY.astype(np.float32) / 7)


def test_colour_images(tmp_path):
    colour = np.stack([GRAY, GRAY[::-1], GRAY // 2], -1)
    expected = np.moveaxis(colour, -1, 0)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", colour)), expected)
    alpha = np.dstack([colour, np.full_like(GRAY, 255)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", alpha)), expected)
    grey = read_image(save(tmp_path / "c.png", np.dstack([GRAY] * 3)))
    assert len(grey) == 3
    np.testing.assert_array_equal(files.fit_channels(grey, 1), GRAY[None])
    np.testing.assert_array_equal(files.fit_channels(GRAY[None], 3), grey)
    assert len(files.fit_channels(expected, 1)) == 3
    tifffile.imwrite(tmp_path / "d.tif", colour, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "d.tif"), expected)
    tifffile.imwrite(
        tmp_path / "e.tif", expected, metadata={"axes": "CYX"}, ome=True, photometric="minisblack"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "e.tif"), expected)


def test_microscope_tiffs(tmp_path):
    """ImageJ, OME, channels, alpha, compression, one pixel wide."""
    path = tmp_path / "a.tif"
    sixteen = GRAY.astype(np.uint16)
    tifffile.imwrite(path, sixteen, imagej=True)
    np.testing.assert_array_equal(read_image(path), sixteen[None])
    tifffile.imwrite(path, sixteen, ome=True)
    np.testing.assert_array_equal(read_image(path), sixteen[None])
    for channels in (2, 3, 4):
        stack = np.stack([sixteen + c for c in range(channels)])
        tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "CYX"})
        np.testing.assert_array_equal(read_image(path), stack)
    rgba = np.dstack([GRAY, GRAY[::-1], GRAY // 2, GRAY * 0 + 255])
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(path), np.moveaxis(rgba, -1, 0)[:3])
    Image.fromarray(sixteen).save(path, compression="tiff_lzw")
    np.testing.assert_array_equal(read_image(path), sixteen[None])
    for shape in ((1, 5), (5, 1), (1, 1)):
        tifffile.imwrite(path, np.ones(shape, np.uint8))
        assert read_image(path).shape == (1, *shape)
    probabilities = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    files.write_tiff(path, probabilities)
    np.testing.assert_array_equal(read_image(path), probabilities)


def test_labels(tmp_path):
    np.testing.assert_array_equal(read_labels(save(tmp_path / "a.png", GRAY)), GRAY)
    mask = save(tmp_path / "mask.png", (GRAY > 60) * np.uint8(255), "1")
    assert set(np.unique(read_labels(mask))) == {0, 1}
    big = GRAY.astype(np.uint32) * 9_000_000
    tifffile.imwrite(tmp_path / "b.tif", big)
    np.testing.assert_array_equal(read_labels(tmp_path / "b.tif"), big)
    palette = Image.new("P", (4, 3))
    palette.putdata((GRAY // 20).ravel().tolist())
    palette.putpalette(list(range(255, 255 - 36, -1)))
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "p.png"), GRAY // 20)
    for high in (255, 65535):
        labels = np.array([[0, high]], dtype=np.int32)
        files.write_labels(tmp_path / "w.png", labels)
        np.testing.assert_array_equal(read_labels(tmp_path / "w.png"), labels)


def check_message(function, path, message):
    with pytest.raises(ValueError, match=message) as caught:
        function(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    whole = save(tmp_path / "whole.png", noise)
    for name in ("cut.png", "cut.tif"):
        cut = tmp_path / name
        cut.write_bytes(whole.read_bytes()[:2000])
        check_message(read_image, cut, "cannot be read as an image")
    tifffile.imwrite(tmp_path / "whole.tif", noise)
    cut.write_bytes((tmp_path / "whole.tif").read_bytes()[:2000])
    check_message(read_image, cut, "cannot be read as an image")
    (tmp_path / "text.png").write_text("no picture")
    check_message(read_image, tmp_path / "text.png", "cannot be read as an image")
    check_message(read_image, tmp_path / "missing.png", "no such file")
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 8, 9), np.uint8))
    check_message(read_image, tmp_path / "stack.tif", r"one 2D image, got axes .* \(5, 8, 9\)")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((3, 3), np.nan, np.float32))
    check_message(read_image, tmp_path / "nan.tif", r"finite .*numpy.nan_to_num replaces them\)")
    tifffile.imwrite(tmp_path / "huge.tif", np.full((3, 3), 1e300))
    check_message(read_image, tmp_path / "huge.tif", "pixels must be finite in float32")
    tifffile.imwrite(tmp_path / "complex.tif", GRAY.astype(np.complex64))
    check_message(read_image, tmp_path / "complex.tif", "must be real numbers, got complex64")
    frames = {"save_all": True, "append_images": [Image.fromarray(GRAY + 1)]}
    Image.fromarray(GRAY).save(tmp_path / "frames.png", **frames)
    check_message(read_image, tmp_path / "frames.png", "must be one image, got 2")


@pytest.mark.filterwarnings("ignore:.*writing zero-size array")
def test_files_without_a_pixel(tmp_path):
    path = tmp_path / "none.tif"
    tifffile.imwrite(path, np.zeros((0, 5), np.uint8))
    path.write_bytes(path.read_bytes() + bytes(99))  # else it is taken to be cut off
    for read in (read_image, read_labels):
        check_message(read, path, r"must have at least one pixel, got shape \(0, 5\)")


def test_complaints_of_decoders(monkeypatch, caplog):
    """Kept from the log, and few of them, while a file is read; at other times they are logged."""
    log = logging.getLogger("tifffile")
    monkeypatch.setattr(formats, "_MOST_COMPLAINTS", 2)
    with formats._complaining() as told:
        log.warning("one")
        log.warning("two")
        with pytest.raises(ValueError, match=r"^one$"):
            log.warning("three")
        assert told == ["one", "two", "three"]
    assert not caplog.records
    log.warning("four")
    assert caplog.messages == ["four"]


def test_what_may_be_a_palette(tmp_path):
    """A pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("P", (4, 3)).save(tmp_path / "p.png")
    names = "pipe.png", "none.png", "text.png", "p.png"
    assert [files.is_palette(tmp_path / name) for name in names] == [False, False, False, True]


def test_how_many_pixels_a_file_may_unpack_to(monkeypatch):
    """64 a byte, or 2^26; else what is said."""
    shape, dtype = (2**14, 2**13), np.dtype(np.uint8)
    check_pixels(shape, dtype, lambda: 2**21)
    with pytest.raises(ValueError, match=r"its 2097151 bytes unpack to 134217728 pixels, 0.134 GB"):
        check_pixels(shape, dtype, lambda: 2**21 - 1)
    for said in ("many", "-1", "1.5", "²"):
        monkeypatch.setenv(MOST_PIXELS, said)
        with pytest.raises(ValueError, match=f"{MOST_PIXELS} must be a number .*, got '{said}'"):
            check_pixels((1,), dtype, lambda: 1)


def test_bad_labels(tmp_path):
    two = np.stack([GRAY, GRAY[::-1]])
    tifffile.imwrite(tmp_path / "c.tif", two, metadata={"axes": "CYX"})
    check_message(read_labels, tmp_path / "c.tif", "one number per pixel, or one colour .* 2 chann")
    tifffile.imwrite(tmp_path / "f.tif", GRAY.astype(np.float32))
    assert (read_labels(tmp_path / "f.tif") == GRAY).all()  # whole numbers all of them
    for value in (0.5, np.nan, np.inf):
        tifffile.imwrite(tmp_path / "f.tif", np.where(GRAY == 0, value, GRAY).astype(np.float32))
        check_message(read_labels, tmp_path / "f.tif", "labels must be integers, got float32")
    tifffile.imwrite(tmp_path / "n.tif", GRAY.astype(np.int16) - 1)
    check_message(
        read_labels,
        tmp_path / "n.tif",
        r"be in \[0, 2147483647\], got -1 \(0 is background; .*ignore_label",
    )
    labels = np.array([[70_000]])
    with pytest.raises(ValueError, match="holds labels up to 65535, got 70000"):
        files.write_labels(tmp_path / "w.png", labels)
