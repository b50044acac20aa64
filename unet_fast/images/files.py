"""Reads and writes images and labels: PNG, JPEG, BMP and TIFF."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from .._files import reason_of, replace_file
from .annotations import Tell, draw_outlines, is_outlines, objects_of_colours, silent
from .formats import open_file


def read_image(path: Path) -> NDArray[np.float32]:
    """Reads an image as (C, H, W), float32, with the values of the file.

    Grey images have one channel, colour images three; an alpha channel is dropped.

    Raises:
        ValueError: If the file cannot be read as one two-dimensional image of finite numbers; one
            line that names it.
    """
    return as_image(path, _read(path, palette_as_colour=True))


def as_image(path: Path, array: NDArray[np.generic]) -> NDArray[np.float32]:
    """Converts the pixels of a file, or some of them, to float32.

    Raises:
        ValueError: If they are not real and finite; one line that names the file.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path}: pixels must be real numbers, got {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # signalling NaN
        result = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{path}: pixels must be finite in float32, got NaN or infinity (numpy.nan_to_num "
            "replaces them)"
        )
    return result


def fit_channels(image: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """Keeps one of three equal channels for `channels` 1, repeats one for 3; else no change."""
    if channels == 1 and len(image) == 3 and (image == image[:1]).all():
        return image[:1]
    if channels == 3 and len(image) == 1:
        return np.repeat(image, 3, axis=0)
    return image


def read_labels(
    path: Path, size: tuple[int, ...] | None = None, tell: Tell = silent
) -> NDArray[np.int32]:
    """Reads an instance map as (H, W), int32; 0 is background.

    A palette image is read as its indices; floats are taken if all are whole numbers. In a picture
    in colour each colour is an object; files of outlines (ROIs of ImageJ, GeoJSON) are filled.

    Args:
        path: The file.
        size: Height and width of the image that the labels belong to, which outlines need.
        tell: Gets a line for each decision, as which colour is background.

    Raises:
        ValueError: If the file cannot be read as one two-dimensional map of integers in
            [0, 2^31 - 1]; one line that names it.
    """
    if not is_outlines(path):
        return as_labels(path, _read(path, palette_as_colour=False), tell)
    if size is None:
        raise ValueError(f"{path}: must be a label image, got outlines")
    return draw_outlines(path, (size[0], size[1]), tell)


def as_labels(
    path: Path, array: NDArray[np.generic], tell: Tell = silent, *, coloured: bool = True
) -> NDArray[np.int32]:
    """Converts the pixels of a file to an instance map; see :func:`read_labels`.

    Args:
        path: The file, for messages.
        array: (C, H, W).
        tell: As for :func:`read_labels`.
        coloured: Whether several channels are red, green and blue, not just any.
    """
    if is_lossy(path):
        raise ValueError(
            f"{path}: labels must be PNG or TIFF, got a JPEG, which changes values along edges: "
            "save them again from the program that drew them"
        )
    if len(array) != 1 and not (array == array[:1]).all():
        if not coloured:
            raise ValueError(
                f"{path}: labels must be one number per pixel, got {len(array)} channels: planes "
                "of a stack must be saved as such (in Fiji: Image > Hyperstacks > Re-order)"
            )
        return objects_of_colours(path, array, tell)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.rint(array)).all():
        array = np.rint(array).astype(np.int64)  # as some programs write label images
    if array.dtype.kind == "f":
        raise ValueError(
            f"{path}: labels must be integers, got {array.dtype} with fractions or NaN (scale "
            "labels by nearest neighbour; make objects of probabilities by a threshold)"
        )
    if array.dtype.kind not in "bui":
        raise ValueError(f"{path}: labels must be integers, got {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 2**31 - 1:
        value = low if low < 0 else high
        raise ValueError(
            f"{path}: labels must be in [0, 2147483647], got {value} (0 is background; pixels that "
            "do not count may have a number of their own: ignore_label)"
        )
    result: NDArray[np.int32] = array[0].astype(np.int32)
    return result


def is_palette(path: Path) -> bool:
    """Whether the pixels of a file are indices of colours in a palette."""
    if not path.is_file():  # a pipe may never end
        return False
    try:
        with Image.open(path) as picture:
            return picture.mode in ("P", "PA")
    except Exception:  # as in _read
        return False


def is_lossy(path: Path) -> bool:
    """Whether a file is in a format that does not keep pixel values."""
    return path.suffix.lower() in (".jpg", ".jpeg")


def write_labels(
    path: Path, labels: NDArray[np.integer], pixel_size: Mapping[str, float] | None = None
) -> None:
    """Writes an instance or class map as PNG of 16 bits, whatever its ids.

    Args:
        path: The file.
        labels: (H, W).
        pixel_size: Micrometres along X and Y, if known.

    Raises:
        ValueError: If an id is over 65535.
    """
    high = int(labels.max(initial=0))
    if high > 65535:
        raise ValueError(f"{path}: a PNG holds labels up to 65535, got {high}; TIFF holds more")
    png = io.BytesIO()
    options: dict[str, Any] = {}
    if pixel_size and {"X", "Y"} <= pixel_size.keys():
        dots = tuple(25400 / pixel_size[axis] for axis in "XY")
        if max(dots) < 1e8:  # PNG stores dots per metre, in 32 bits
            options["dpi"] = dots
    picture = Image.fromarray(labels.astype(np.uint16))
    picture.save(png, "png", **options)
    replace_file(path, png.getvalue())


def write_tiff(
    path: Path,
    array: NDArray[np.generic],
    axes: str | None = None,
    pixel_size: Mapping[str, float] | None = None,
    *,
    ome: bool = False,
) -> None:
    """Writes an array as TIFF, integers in uint16 or, where they exceed 65535, uint32.

    Args:
        path: The file.
        array: Any real values.
        axes: A letter for each axis, of T, Z, C, Y and X; None: (C, Y, X) or (Y, X).
        pixel_size: Micrometres along X, Y and Z, as far as known.
        ome: Whether it is an OME-TIFF.
    """
    axes = axes or "CYX"[-array.ndim :]
    sizes = dict(pixel_size or {})
    if array.dtype.kind in "iu":
        array = array.astype(np.uint16 if array.max(initial=0) <= 65535 else np.uint32)
    metadata: dict[str, Any] = {"axes": axes}
    options: dict[str, Any] = {}
    if {"X", "Y"} <= sizes.keys():
        options = {
            "resolution": tuple(1e4 / sizes[axis] for axis in "XY"),
            "resolutionunit": "CENTIMETER",
        }
    if ome:
        for axis, size in sizes.items():
            metadata[f"PhysicalSize{axis}"] = size
            metadata[f"PhysicalSize{axis}Unit"] = "µm"
    tiff = io.BytesIO()
    tifffile.imwrite(
        tiff,
        array,
        ome=ome,
        photometric="minisblack",
        compression="zlib",
        metadata=metadata,
        bigtiff=array.nbytes > 2**32 - 2**25,  # may be as large when compressed
        **options,
    )
    replace_file(path, tiff.getvalue())


def _read(path: Path, *, palette_as_colour: bool) -> NDArray[np.generic]:
    """Reads the pixels of a file, (C, H, W), without alpha."""
    try:
        opened = open_file(path, palette_as_colour=palette_as_colour)
        array = np.asarray(opened.array)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise ValueError(f"{path}: cannot be read as an image: {reason_of(error)}") from None
    if array.size == 0:
        raise ValueError(f"{path}: must have at least one pixel, got shape {array.shape}")
    kept = [i for i, axis in enumerate(opened.axes) if array.shape[i] > 1 or axis in "YX"]
    plane = array.reshape([array.shape[i] for i in kept])
    order = "".join(opened.axes[i] for i in kept)
    if order == "YX":
        return plane[None]
    if order == "YXS":
        colours = plane.shape[-1] - opened.alpha
        return np.moveaxis(plane[..., :colours] if colours else plane, -1, 0)
    if order in ("CYX", "SYX"):
        colours = len(plane) - opened.alpha
        return plane[:colours] if colours else plane
    raise ValueError(f"{path}: must be one 2D image, got axes {order} of shape {plane.shape}")
