"""What files of images hold: pixels, axes, pixel size. Large ones are not read but opened."""

import logging
import warnings
import weakref
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from .zarr import zarr_library

LARGE_BYTES = 2**28
"""Bytes beyond which a compressed TIFF is decoded tile by tile, not at once."""

_MICROMETRES = {
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer", "\\u00B5m"), 1.0),
    **dict.fromkeys(("nm", "nanometer"), 1e-3),
    **dict.fromkeys(("mm", "millimeter"), 1e3),
    **dict.fromkeys(("cm", "centimeter"), 1e4),
    **dict.fromkeys(("m", "meter"), 1e6),
    **dict.fromkeys(("Å", "angstrom"), 1e-4),
}


@dataclass(frozen=True)
class Opened:
    """An image of a file."""

    array: Any
    """ndarray, memory map or zarr array: all that is asked of it is a shape, a dtype and slices."""
    axes: str
    """What its axes are, a letter each: Y and X, C or S for channels; others are stacks."""
    pixel_size: dict[str, float] = field(default_factory=dict)
    """Micrometres along X, Y and Z, as far as the file says."""
    alpha: int = 0
    """How many of the last channels are not colours."""


def open_file(path: Path, *, palette_as_colour: bool) -> Opened:
    """Opens a PNG, JPEG, BMP or TIFF; raises whatever its decoder stumbles over."""
    if path.suffix.lower() in (".tif", ".tiff"):
        return _open_tiff(path)
    return _open_picture(path, palette_as_colour)


def plausible(sizes: dict[str, float]) -> dict[str, float]:
    """Pixel sizes that may be true, in micrometres; what others there are, is left out."""
    return {axis: size for axis, size in sizes.items() if 1e-5 < size < 1e6}


def _open_picture(path: Path, palette_as_colour: bool) -> Opened:
    """What Pillow reads."""
    modes = {"LA": "L", "RGBA": "RGB", "PA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
    if palette_as_colour:
        modes["P"] = "RGB"
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # images are large here
    try:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"must be one image, got {picture.n_frames}")  # type: ignore[attr-defined]
            array = np.asarray(picture.convert(modes.get(picture.mode, picture.mode)))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return Opened(array, "YXS"[: array.ndim])


def _open_tiff(path: Path) -> Opened:
    logger = logging.getLogger("tifffile")  # tells of broken files on standard error
    told: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            if any("invalid page offset" in line for line in told):
                raise ValueError(f"it is cut off: only {len(tiff.pages)} pages are whole")
            array: Any
            if series.dataoffset is not None and series.keyframe.is_memmappable:
                array = _mapped(path, series, series.dataoffset)
            elif series.size * series.dtype.itemsize > LARGE_BYTES and zarr_library() is not None:
                array = _decoded(path)
            else:
                try:
                    array = series.asarray()
                except ValueError as error:
                    if "imagecodecs" not in str(error):
                        raise
                    return _open_picture(path, palette_as_colour=False)  # has LZW and JPEG
            alpha = len(series.keyframe.extrasamples) if "S" in series.axes else 0
            try:
                sizes = _tiff_pixel_size(tiff)
            except (ValueError, LookupError, TypeError, ArithmeticError, SyntaxError):
                sizes = {}  # broken metadata do not make pixels unreadable; SyntaxError is XML's
            return Opened(array, series.axes, plausible(sizes), alpha)
    finally:
        logger.removeFilter(keep)


def _mapped(path: Path, series: tifffile.TiffPageSeries, offset: int) -> NDArray[np.generic]:
    needed = offset + series.size * series.dtype.itemsize
    there = path.stat().st_size
    if there < needed:
        raise ValueError(f"must have {needed} bytes, got {there}: it is cut off")
    dtype: Any = series.dtype.newbyteorder(series.keyframe.parent.byteorder)
    mapped: NDArray[np.generic] = np.memmap(path, dtype, "r", offset, series.shape)
    return mapped


def _decoded(path: Path) -> Any:
    """A compressed TIFF as an array whose tiles are decoded when they are read."""
    zarr = zarr_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = tifffile.imread(path, aszarr=True)
        opened = zarr.open(store, mode="r")
    if isinstance(opened, zarr.Group):  # with levels of lower resolution
        opened = opened["0"]
    weakref.finalize(opened, store.close)
    return opened


def _tiff_pixel_size(tiff: tifffile.TiffFile) -> dict[str, float]:
    """Micrometres along X, Y and Z: of OME, of ImageJ, or of the tags if in centimetres."""
    if tiff.is_ome and tiff.ome_metadata:
        pixels = ET.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
        attributes = {} if pixels is None else pixels.attrib
        found = {}
        for axis in "XYZ":
            value = float(attributes.get(f"PhysicalSize{axis}", 0))
            micrometres = _MICROMETRES.get(attributes.get(f"PhysicalSize{axis}Unit", "µm"))
            if value > 0 and micrometres is not None:
                found[axis] = value * micrometres
        return found
    tags = tiff.pages.first.tags
    imagej = tiff.imagej_metadata or {}
    unit = _MICROMETRES.get(str(imagej.get("unit", "")))
    if not tiff.is_imagej and "ResolutionUnit" in tags and int(tags["ResolutionUnit"].value) == 3:
        unit = _MICROMETRES["cm"]
    if unit is None:
        return {}
    sizes = {"Z": abs(float(imagej["spacing"])) * unit} if "spacing" in imagej else {}
    for axis in "XY":
        tag = tags.get(f"{axis}Resolution")
        if tag is not None and min(tag.value) > 0:  # a fraction: pixels in a unit
            sizes[axis] = tag.value[1] / tag.value[0] * unit
    return sizes
