"""Labels that other programs draw: ImageJ ROIs, GeoJSON of QuPath, a colour for each object."""

import importlib
import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import parsed_json, read_file, reason_of

OUTLINES = (".zip", ".roi", ".geojson", ".json")
"""Suffixes of files that hold outlines of objects, not pixels."""

Polygon = Sequence[NDArray[np.float64]]
"""Closed outlines, (N, 2), as x and y in pixels; the second one within another is a hole."""
Tell = Callable[[str], object]
"""Gets a line about what was decided while a file was read."""

_MOST_BYTES, _MOST_ROIS, _MOST_ROI_BYTES = 2**25, 2**16, 2**22
"""Most bytes of a file, ROIs in a zip, and bytes of a ROI."""
_MOST_CROSSINGS, _MOST_FILLED = 2**26, 1000
"""Most crossings of an outline with rows; most pixels of all boxes of objects, in images."""
_MOST_COLOURS = 2**16
_SPECK, _FEW = 4, 20
"""Colours of fewer pixels are specks; so many of them may be objects."""


def silent(_: str) -> None:
    """Tells nobody."""


def is_outlines(path: Path) -> bool:
    """Whether a file holds outlines of objects, by its name."""
    return path.suffix.lower() in OUTLINES


def draw_outlines(path: Path, size: tuple[int, int], tell: Tell) -> NDArray[np.int32]:
    """Reads outlines of objects and fills them, numbered from 1 in the order of the file.

    A pixel belongs to an object if its centre is within the outline. Where objects overlap, the
    later one wins.

    Args:
        path: ImageJ's NAME.zip (of the ROI manager) or NAME.roi, or GeoJSON: NAME.geojson or
            NAME.json.
        size: Height and width of the image, in pixels.
        tell: Gets a line for each thing that is left out or lost.

    Returns:
        Labels, (H, W), 0 background.

    Raises:
        ValueError: If the file cannot be read, or asks for too much; one line that names it.
    """
    rois = path.suffix.lower() in (".zip", ".roi")
    try:
        content = read_file(path, _MOST_BYTES)
        objects = _rois(path, content) if rois else _features(parsed_json(content))
        with np.errstate(invalid="ignore"):  # signalling NaN, which is refused
            return _filled(objects, size, tell)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # readers of broken files raise whatever they stumble over
        what = "ROIs of ImageJ" if rois else "GeoJSON"
        raise ValueError(f"{path}: cannot be read as {what}: {reason_of(error)}") from None


def _filled(
    objects: Iterator[list[Polygon]], size: tuple[int, int], tell: Tell
) -> NDArray[np.int32]:
    labels = np.zeros(size, np.int32)
    said: set[str] = set()
    left = _MOST_FILLED * max(labels.size, 2**16)
    for number, polygons in enumerate(objects, 1):
        if not polygons:
            said.add("points, lines and texts are left out")
        filled = [part for polygon in polygons if (part := fill(polygon, size)) is not None]
        if polygons and not filled:
            said.add("outlines beyond the image, or of no pixel, are left out: of another image?")
        for corner, inside in filled:
            left -= inside.size
            if left < 0:
                raise ValueError(f"its objects must cover the image at most {_MOST_FILLED} times")
            place = tuple(slice(a, a + n) for a, n in zip(corner, inside.shape, strict=True))
            before = labels[place][inside]
            if ((before != 0) & (before != number)).any():
                said.add("outlines overlap: where they do, the later one wins")
            labels[place][inside] = number
    for text in sorted(said):
        tell(text)
    return labels


def fill(
    polygon: Polygon, size: tuple[int, int]
) -> tuple[tuple[int, int], NDArray[np.bool_]] | None:
    """Finds the pixels whose centres are within a polygon, by the even-odd rule.

    Each edge flips all pixels right of it, row by row.

    Args:
        polygon: Outlines, as x and y from the upper left corner of the image, in pixels.
        size: Height and width of the image.

    Returns:
        Row and column of the upper left pixel of a box, and a mask of that box; None if no pixel
        of the image is in the polygon.

    Raises:
        ValueError: If points are not finite, or edges cross too many rows.
    """
    height, width = size
    from_ = np.concatenate(polygon)
    to = np.concatenate([np.roll(ring, -1, axis=0) for ring in polygon])
    if not (np.abs(from_) < 1e9).all():
        raise ValueError("its outlines must have finite points, below 1e9 pixels")
    ends = np.sort(np.stack([from_[:, 1], to[:, 1]]), axis=0)
    first, end = np.clip(np.ceil(ends - 0.5), 0, height).astype(np.int64)
    counts = end - first
    total = int(counts.sum())
    if total > _MOST_CROSSINGS:
        raise ValueError(f"an outline must cross at most {_MOST_CROSSINGS} rows, got {total}")
    if total == 0:
        return None
    (x0, y0), (x1, y1) = (np.repeat(points, counts, axis=0).T for points in (from_, to))
    rows = np.arange(total) + np.repeat(first - np.cumsum(counts) + counts, counts)
    x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    top, left = int(rows.min()), int(columns.min())
    flips = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), np.uint8)
    np.add.at(flips, (rows - top, columns - left), 1)
    inside = np.bitwise_xor.accumulate(flips & 1, axis=1)[:, :-1].astype(bool)
    return ((top, left), inside) if inside.any() else None


def _rois(path: Path, content: bytes) -> Iterator[list[Polygon]]:
    """Yields the outlines of each ROI; none of a point, a line or a text."""
    try:
        roifile = importlib.import_module("roifile")
    except ImportError:
        raise ValueError("it needs the package roifile: pip install 'unet_fast[rois]'") from None
    for data in [content] if path.suffix.lower() == ".roi" else _members(content):
        with _quiet(logging.getLogger("roifile")):
            roi = roifile.ImagejRoi.frombytes(data)
        kind = roi.roitype.name
        if kind not in ("POLYGON", "RECT", "OVAL", "FREEHAND", "TRACED"):
            yield []
            continue
        rings = roi.coordinates(multi=True)
        if kind in ("RECT", "OVAL") and roi.multi_coordinates is None:
            box = roi.left, roi.top, roi.right - roi.left, roi.bottom - roi.top
            if roi.subpixelrect:
                box = roi.xd, roi.yd, roi.widthd, roi.heightd
            rings = [np.array(box[:2]) + np.array(box[2:]) * _UNIT[kind]]
        yield [[np.asarray(ring, np.float64) for ring in rings if len(ring) > 2]]


_angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
_UNIT = {
    "RECT": np.array([[0, 0], [1, 0], [1, 1], [0, 1]]),
    "OVAL": 0.5 + 0.5 * np.stack([np.cos(_angles), np.sin(_angles)], axis=1),
}
"""Outlines in a box of side 1."""


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keeps what a library complains of out of the log: messages of one line say what matters."""

    def hide(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(hide)
    try:
        yield
    finally:
        logger.removeFilter(hide)


def _members(content: bytes) -> Iterator[bytes]:
    entries = content.count(b"PK\x01\x02")  # at most; before each becomes a Python object
    if entries > _MOST_ROIS:
        raise ValueError(f"a zip must hold at most {_MOST_ROIS} files, got {entries}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = [info for info in archive.infolist() if info.filename.lower().endswith(".roi")]
        if not infos:
            raise ValueError("a zip must hold .roi files, as ImageJ's ROI Manager saves them")
        for info in infos:
            with archive.open(info) as member:
                data = member.read(_MOST_ROI_BYTES + 1)  # whatever the zip says of its size
            if len(data) > _MOST_ROI_BYTES:
                raise ValueError(f"{info.filename} must have at most {_MOST_ROI_BYTES} bytes")
            yield data


def _features(node: Any) -> Iterator[list[Polygon]]:
    """Yields the polygons of each feature; none of a point or a line."""
    if isinstance(node, list):
        for inner in node:
            yield from _features(inner)
    elif isinstance(node, dict) and node.get("type") == "FeatureCollection":
        yield from _features(node["features"])
    elif isinstance(node, dict) and "type" in node:
        yield _polygons(node["geometry"] if node["type"] == "Feature" else node)
    else:
        raise ValueError(
            "it must hold features, as QuPath exports them (File > Export objects as GeoJSON)"
        )


def _polygons(geometry: Any) -> list[Polygon]:
    kind = geometry and geometry["type"]
    if kind == "GeometryCollection":
        return [polygon for inner in geometry["geometries"] for polygon in _polygons(inner)]
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    parts = geometry["coordinates"]
    return [
        [np.array([point[:2] for point in ring], np.float64).reshape(-1, 2) for ring in polygon]
        for polygon in ([parts] if kind == "Polygon" else parts)
    ]


def objects_of_colours(path: Path, colours: NDArray[np.generic], tell: Tell) -> NDArray[np.int32]:
    """Numbers the colours of a picture in which each object has a colour of its own.

    The background is black or white, whichever more pixels along the border have; without either,
    the most frequent colour there.

    Args:
        path: The file, for messages.
        colours: Its pixels, (3, H, W).
        tell: Gets a line that says what is background.

    Returns:
        Labels, (H, W): 65536 R + 256 G + B, so that a colour has one number in all files; 0
        background.

    Raises:
        ValueError: If it is no such picture.
    """
    rule = f"{path}: labels must be one number per pixel, or one colour for each object"
    if len(colours) != 3 or colours.dtype != np.uint8:
        raise ValueError(f"{rule} (RGB of 8 bits), got {len(colours)} channels of {colours.dtype}")
    red, green, blue = colours.astype(np.int32)
    ids: NDArray[np.int32] = red << 16 | green << 8 | blue
    values, counts = np.unique(ids, return_counts=True)
    specks = int((counts < _SPECK).sum())
    smooth = specks > _FEW and 2 * specks > len(values)
    restless = ids.shape[1] > 1 and (ids[:, 1:] != ids[:, :-1]).mean() > 0.5
    grey = np.isin(values, np.arange(1, 255) * 0x10101).sum() > len(values) / 2  # drawn upon
    if len(values) > _MOST_COLOURS or smooth or restless or grey:
        raise ValueError(
            f"{rule}, got {len(values)} colours, {specks} of them of fewer than {_SPECK} pixels: "
            "is it a photograph, or was it saved with smooth edges or as JPEG?"
        )
    border = np.concatenate([ids[0], ids[-1], ids[1:-1, 0], ids[1:-1, -1]])
    black, white = (int((border == value).sum()) for value in (0, 0xFFFFFF))
    if black or white:
        ground = 0 if black >= white else 0xFFFFFF
    else:
        kinds, times = np.unique(border, return_counts=True)
        ground = int(kinds[times.argmax()])
    tell(f"each colour is taken as an object, and #{ground:06x} as background")
    if ground != 0:  # black is then an object, too
        ids[ids == 0] = 1 << 24
        ids[ids == ground] = 0
    return ids
