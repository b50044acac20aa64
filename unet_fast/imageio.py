"""Images and labels in and out of files: PNG, JPEG and TIFF."""

import tempfile
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


def read_image(path: Path) -> NDArray[np.float32]:
    """Reads an image as (C, H, W), float32, with the values of the file.

    Grey images have one channel, colour images three; an alpha channel is dropped, and colour
    images whose channels are all equal are grey.

    Raises:
        ValueError: If the file cannot be read as one two-dimensional image; one line that names it.
    """
    array = _channels_first(path, _read(path, palette_as_colour=True))
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path}: pixels must be numbers, got {array.dtype}")
    result = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(f"{path}: pixels must be finite, got NaN or infinity")
    return result


def read_labels(path: Path) -> NDArray[np.int32]:
    """Reads an instance map as (H, W), int32; 0 is background.

    A palette image is read as its indices.

    Raises:
        ValueError: If the file cannot be read as one two-dimensional map of integers in
            [0, 2^31 - 1]; one line that names it.
    """
    array = _channels_first(path, _read(path, palette_as_colour=False))
    if array.shape[0] != 1:
        raise ValueError(
            f"{path}: labels must be one number per pixel, got a colour image with "
            f"{array.shape[0]} channels"
        )
    if array.dtype.kind not in "bui":
        raise ValueError(f"{path}: labels must be integers, got {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 2**31 - 1:
        value = low if low < 0 else high
        raise ValueError(f"{path}: labels must be in [0, 2147483647], got {value}")
    result: NDArray[np.int32] = array[0].astype(np.int32)
    return result


def write_labels(path: Path, labels: NDArray[np.integer]) -> None:
    """Writes an instance or class map as PNG, 8 bit or, for larger ids, 16 bit.

    Raises:
        ValueError: If an id is over 65535.
    """
    high = int(labels.max(initial=0))
    if high > 65535:
        raise ValueError(f"{path}: a PNG holds labels up to 65535, got {high}")
    Image.fromarray(labels.astype(np.uint8 if high < 256 else np.uint16)).save(path)


def write_tiff(path: Path, array: NDArray[np.float32]) -> None:
    """Writes float values, (C, H, W) or (H, W), as TIFF."""
    axes = "CYX"[-array.ndim :]
    tifffile.imwrite(
        path, array, photometric="minisblack", compression="zlib", metadata={"axes": axes}
    )


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, by name.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing there"
        raise ValueError(f"{folder}: must be a folder of images, got {kind}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    if not files:
        raise ValueError(f"{folder}: must hold images ({', '.join(SUFFIXES)}), got none")
    return files


def make_folder(folder: Path) -> Path:
    """Makes a folder if it is missing, and makes sure that files can be written there.

    Raises:
        ValueError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{folder}: must be a folder that can be written: {reason}") from None
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)


def _read(path: Path, *, palette_as_colour: bool) -> NDArray[np.generic]:
    """The pixels of a file, (H, W) or (H, W, C)."""
    axes = ""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with tifffile.TiffFile(path) as tiff:
                array, axes = tiff.series[0].asarray(squeeze=False), tiff.series[0].axes
        else:
            with Image.open(path) as picture:
                colour = picture.mode == "P" and palette_as_colour
                array = np.asarray(picture.convert("RGB") if colour else picture)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from None
    return _plane(path, array, axes) if axes else array


def _plane(path: Path, array: NDArray[np.generic], axes: str) -> NDArray[np.generic]:
    """The one plane of a TIFF, (H, W) or (H, W, C); other axes must have length 1."""
    kept = [i for i, axis in enumerate(axes) if array.shape[i] > 1 or axis in "YX"]
    order = "".join(axes[i] for i in kept)
    array = array.reshape([array.shape[i] for i in kept])
    if order in ("YX", "YXS"):
        return array
    if order in ("CYX", "SYX"):
        return np.moveaxis(array, 0, -1)
    raise ValueError(f"{path}: must be one 2D image, got axes {order} of shape {array.shape}")


def _channels_first(path: Path, array: NDArray[np.generic]) -> NDArray[np.generic]:
    """(C, H, W) without alpha; equal channels become one."""
    if 0 in array.shape:
        raise ValueError(f"{path}: must have at least one pixel, got shape {array.shape}")
    if array.ndim == 2:
        return array[None]
    array = np.moveaxis(array, -1, 0)
    if array.shape[0] in (2, 4):
        array = array[:-1]
    if (array == array[:1]).all():
        return array[:1]
    return np.ascontiguousarray(array)
