"""Opens image files: pixels, axes, pixel size. Large files are opened without being read."""

import logging
import math
import threading
import warnings
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from .folders import way_out
from .limits import check_pixels
from .zarr import zarr_library

_PNG = b"\x89PNG\r\n\x1a\n"
_PLUGINS: dict[bytes, Any] = {
    _PNG: PngImagePlugin.PngImageFile,
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"II": TiffImagePlugin.TiffImageFile,
    b"MM": TiffImagePlugin.TiffImageFile,
}
"""Pillow's readers, by the first bytes of a file. `Image.open` would refuse large images, and the
limit is one of the whole process."""

LARGE_BYTES = 2**28
"""Bytes beyond which a compressed TIFF is decoded tile by tile, not at once."""

_ORIENTATION = 0x0112
"""The tag of EXIF (JEITA CP-3451) that says how to turn a picture; 1: not at all."""

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
    """An opened image file."""

    array: Any
    """ndarray, memory map or zarr array, used by its shape, dtype and slices only."""
    axes: str
    """A letter for each axis: Y and X, C or S for channels; others are stacks."""
    pixel_size: dict[str, float] = field(default_factory=dict)
    """Micrometres along X, Y and Z, as far as the file says."""
    alpha: int = 0
    """Number of channels at the end that are not colours."""


def open_file(path: Path, *, palette_as_colour: bool) -> Opened:
    """Opens a PNG, JPEG, BMP or TIFF; raises whatever its decoder stumbles over."""
    if path.exists() and not path.is_file():
        raise ValueError("it must be a regular file")  # a pipe may never end
    if path.suffix.lower() in (".tif", ".tiff"):
        return _open_tiff(path)
    return _open_picture(path, palette_as_colour)


def plausible(sizes: dict[str, float]) -> dict[str, float]:
    """Returns the pixel sizes, in micrometres, that may be true, and drops the others."""
    return {axis: size for axis, size in sizes.items() if 1e-5 < size < 1e6}


def _open_picture(path: Path, palette_as_colour: bool) -> Opened:
    """A PNG, JPEG or BMP, or a TIFF of a compression that tifffile lacks."""
    with path.open("rb") as file:
        head = file.read(26)
    plugin = next((x for first, x in _PLUGINS.items() if head.startswith(first)), None)
    if plugin is None:
        raise ValueError(f"it {way_out(path) or 'is no PNG, JPEG, BMP or TIFF'}")
    grey_bits = 0
    if head.startswith(_PNG) and len(head) == 26:
        bits, kind = head[24], head[25]  # PNG specification, 11.2.1
        if bits == 16 and kind != 0:
            width, height = (int.from_bytes(head[i : i + 4]) for i in (16, 20))
            check_pixels((height, width, 4), np.dtype(np.uint16), lambda: path.stat().st_size)
            return _open_deep_png(path)
        grey_bits = bits if kind == 0 else 0
    modes = {"LA": "L", "RGBA": "RGB", "PA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
    if palette_as_colour:
        modes["P"] = "RGB"
    with plugin(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"must be one image, got {picture.n_frames}")
        shape = (*picture.size, len(picture.getbands()))
        check_pixels(shape, np.dtype(np.uint8), lambda: path.stat().st_size)
        if picture.getexif().get(_ORIENTATION, 1) > 1:
            raise ValueError(
                "it must be stored upright, got one that EXIF turns, which some programs do and "
                "others do not: open it and save it as PNG"
            )
        picture.info.pop("transparency", None)  # which `convert` would warn of
        array = np.asarray(picture.convert(modes.get(picture.mode, picture.mode)))
    if grey_bits in (2, 4):
        array = array // (255 // (2**grey_bits - 1))  # Pillow spreads them to 0 to 255
    return Opened(array, "YXS"[: array.ndim])


def _open_deep_png(path: Path) -> Opened:
    """A PNG of 16 bits in colour or with alpha, which Pillow would cut to 8 bits."""
    try:
        import imagecodecs
    except ImportError:
        raise ValueError(
            "a PNG of 16 bits in colour or with transparency needs the package imagecodecs "
            "(`pip install imagecodecs`)"
        ) from None
    with _complaining():  # it raises, too
        array = imagecodecs.png_decode(path.read_bytes())
    return Opened(array, "YXS", alpha=1 - array.shape[2] % 2)


_MOST_COMPLAINTS = 1000
"""Of one file, with which some broken ones go on for ever."""


_PAGE_BYTES = 128
"""Least of a TIFF page, whose tags alone take more: with many, tifffile takes minutes."""


class _Complaints(threading.local):
    """What decoders complain of in this thread while they read a file; kept from the log."""

    told: list[str] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if self.told is None:
            return True
        self.told.append(record.getMessage())
        if len(self.told) > _MOST_COMPLAINTS:
            raise ValueError(self.told[0])
        return False


_complaints = _Complaints()
for _name in ("tifffile", "imagecodecs"):
    logging.getLogger(_name).addFilter(_complaints.filter)


@contextmanager
def _complaining() -> Iterator[list[str]]:
    """Yields a list that gets what decoders complain of within the `with` statement."""
    _complaints.told = []
    try:
        yield _complaints.told
    finally:
        _complaints.told = None


def _open_tiff(path: Path) -> Opened:
    with _complaining() as told, tifffile.TiffFile(path) as tiff:
        # Counted first: page by page, tifffile follows a circle of pages for ever.
        pages, there = len(tiff.pages), path.stat().st_size
        if _PAGE_BYTES * (pages - 1) > there:
            raise ValueError(f"must have {_PAGE_BYTES} bytes a page, got {pages} in {there} bytes")
        series = tiff.series[0]
        if any("invalid page offset" in line for line in told):
            raise ValueError(f"it is cut off: only {len(tiff.pages)} pages are whole")
        array: Any
        if series.dataoffset is not None and series.keyframe.is_memmappable:
            array = _mapped(path, series, series.dataoffset)
            return Opened(array, series.axes, *_described(tiff, series))
        check_pixels(series.shape, series.dtype, lambda: path.stat().st_size)
        wanted = math.prod(series.keyframe.chunked)
        for page in series.pages:  # None: a plane that an OME-TIFF leaves out
            if page is not None and len(page.dataoffsets) != wanted:
                raise ValueError(f"must have {wanted} strips or tiles, got {len(page.dataoffsets)}")
        if series.size * series.dtype.itemsize > LARGE_BYTES and zarr_library() is not None:
            array = _decoded(path)
        else:
            try:
                array = series.asarray()
            except ValueError as error:
                if "imagecodecs" not in str(error):
                    raise
                return _open_picture(path, palette_as_colour=False)  # decodes LZW, JPEG
        return Opened(array, series.axes, *_described(tiff, series))


def _described(
    tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries
) -> tuple[dict[str, float], int]:
    """Returns the pixel size, as far as it is known, and the number of channels of alpha."""
    alpha = len(series.keyframe.extrasamples) if "S" in series.axes else 0
    try:
        return plausible(_tiff_pixel_size(tiff)), alpha
    except (ValueError, LookupError, TypeError, ArithmeticError, SyntaxError):
        return {}, alpha  # broken metadata do not make pixels unreadable; SyntaxError is XML's


def _mapped(path: Path, series: tifffile.TiffPageSeries, offset: int) -> NDArray[np.generic]:
    needed = offset + series.size * series.dtype.itemsize
    there = path.stat().st_size
    if there < needed:
        raise ValueError(f"must have {needed} bytes, got {there}: it is cut off")
    dtype: Any = series.dtype.newbyteorder(series.keyframe.parent.byteorder)
    mapped: NDArray[np.generic] = np.memmap(path, dtype, "r", offset, series.shape)
    return mapped


_one_at_a_time = threading.Lock()
"""Warnings are caught for the whole process: threads would restore those of one another."""


def _decoded(path: Path) -> Any:
    """Opens a compressed TIFF as an array whose tiles are decoded when they are read."""
    zarr = zarr_library()
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = tifffile.imread(path, aszarr=True)
        opened = zarr.open(store, mode="r")
    if isinstance(opened, zarr.Group):  # a pyramid; "0" has the full resolution
        opened = opened["0"]
    weakref.finalize(opened, store.close)
    return opened


def _tiff_pixel_size(tiff: tifffile.TiffFile) -> dict[str, float]:
    """Returns micrometres along X, Y and Z, by OME, ImageJ or resolution tags in centimetres."""
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
        if tag is not None and min(tag.value) > 0:  # a fraction: pixels per unit
            sizes[axis] = tag.value[1] / tag.value[0] * unit
    return sizes
