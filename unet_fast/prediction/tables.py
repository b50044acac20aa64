"""Objects of a result as a table, as ImageJ ROIs and as GeoJSON."""

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .._files import replace_file
from ..images.source import Source

TABLES, ROIS = "tables", "rois"
"""Folders of these files, inside the folder of the results."""
Ring = NDArray[np.int64]
"""Corners of an outline, (n, 2): x and y, in pixels from the upper left corner of the image."""


def need_libraries(*, table: bool, rois: bool, dims: int = 2) -> None:
    """Raises ValueError if what is asked for cannot be made.

    That is if a library of the extra `rois` is not installed, or outlines of volumes are asked for.
    """
    if rois and dims == 3:
        raise ValueError(
            "--rois must go with images of one plane, got volumes (--table measures their objects)"
        )
    for option, name in (("table", "skimage"),) * table + (("rois", "roifile"),) * rois:
        try:
            import_module(name)
        except ModuleNotFoundError:
            raise ValueError(
                f"--{option} must have {name} installed, got none: pip install '.[rois]' in a clone"
            ) from None


def table_of(name: str, source: Source, result: NDArray[np.integer]) -> bytes:
    """Measures the objects of a result.

    Args:
        name: Name of the image.
        source: The image that was predicted.
        result: Its objects, in the layout of the source.

    Returns:
        CSV with a row for each object: image, plane ("" for a single one), id, number of pixels,
        area, x and y of the centroid, axes of the ellipse of the same moments, mean of each channel
        in the values of the file. Of volumes: number of voxels, volume, x, y and z of the centroid,
        first and last plane, means. Columns end in `_um` (`_um2`, `_um3`) where the pixel size is
        known, else in `_px`. The first pixel's centre is at 0.
    """
    from skimage.measure import regionprops_table

    volumes = source.dims == 3
    unit = "px" if source.spacing is None else "um"
    power = "" if source.spacing is None else source.dims
    names = {
        "label": "id",
        "num_pixels": "voxels" if volumes else "pixels",
        "area": f"{'volume' if volumes else 'area'}_{unit}{power}",
    }
    for i in reversed(range(source.dims)):
        names[f"centroid-{i}"] = f"{source.spatial[i].lower()}_{unit}"
    if volumes:
        names |= {"bbox-0": "z_first", "bbox-3": "z_last"}
    else:
        names["axis_major_length"] = f"major_axis_{unit}"
        names["axis_minor_length"] = f"minor_axis_{unit}"
    names |= {f"intensity_mean-{i}": f"mean_{i + 1}" for i in range(source.channels)}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "plane", *names.values()])
    for plane, labels in _planes(source, result):
        pixels = source.pixels(plane)(*[slice(None)] * source.dims)
        measured = regionprops_table(
            labels,
            np.moveaxis(pixels, 0, -1).astype(np.float64),
            properties=tuple(dict.fromkeys(name.split("-")[0] for name in names)),
            spacing=source.spacing or (1.0,) * source.dims,
        )
        if volumes:
            measured["bbox-3"] -= 1  # of the plane behind the last
        for values in zip(*(measured[name].tolist() for name in names), strict=True):
            cells = [f"{x:.6g}" if isinstance(x, float) else x for x in values]
            rows.writerow([name, source.name_of(plane), *cells])
    return text.getvalue().encode()


def rois_of(source: Source, result: NDArray[np.integer]) -> bytes:
    """Returns the outlines of the objects as a zip of ROIs for the ROI manager of ImageJ.

    Each part of an object is a ROI, named by plane and id; holes are filled.
    """
    from roifile import ImagejRoi

    content = io.BytesIO()
    lengths = tuple(source.stack.values())
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for plane, labels in _planes(source, result):
            place = source.in_result(plane)
            position = place.get("T", 0) * source.in_result(lengths).get("Z", 1) + place.get("Z", 0)
            before = "".join(f"{axis.lower()}{i}-" for axis, i in place.items())
            for number, rings in outlines_of(labels):
                for part, (outer, *_) in enumerate(rings):
                    name = f"{before}{number}{f'-{part + 1}' if part else ''}"
                    roi = ImagejRoi.frompoints(
                        outer, name=name, position=position if place else None
                    )
                    # A fixed time, so that the same objects give the same bytes.
                    archive.writestr(zipfile.ZipInfo(f"{name}.roi"), roi.tobytes())
    return content.getvalue()


def geojson_of(source: Source, result: NDArray[np.integer]) -> bytes:
    """Returns the outlines of the objects, with their holes, as GeoJSON for QuPath."""
    features = []
    for plane, labels in _planes(source, result):
        place = source.in_result(plane)
        for number, rings in outlines_of(labels):
            parts = [[[*ring.tolist(), ring[0].tolist()] for ring in part] for part in rings]
            several = len(parts) > 1
            geometry: dict[str, Any] = {
                "type": "MultiPolygon" if several else "Polygon",
                "coordinates": parts if several else parts[0],
            }
            if place:
                geometry["plane"] = {"c": -1, "z": place.get("Z", 0), "t": place.get("T", 0)}
            properties = {"objectType": "detection", "name": str(number)}
            features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def outlines_of(labels: NDArray[np.integer]) -> Iterator[tuple[int, list[list[Ring]]]]:
    """Yields the id and the outlines of each object: of each connected part the outer and holes.

    Outlines run along the edges of pixels, so they enclose exactly the pixels of the object.
    """
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        if place is None:
            continue
        corner = np.array([place[1].start, place[0].start])
        parts, count = ndimage.label(labels[place] == number)
        rings = [_rings(parts == part) for part in range(1, count + 1)]
        yield number, [[ring + corner for ring in part] for part in rings]


def _rings(mask: NDArray[np.bool_]) -> list[Ring]:
    """Traces the outlines of a part that is connected along the axes, the outer one first."""
    padded = np.pad(mask, 1)
    edges: dict[tuple[int, int, int, int], None] = {}
    for row, column, x, y, dx, dy in (
        (
            -1,
            0,
            0,
            0,
            1,
            0,
        ),  # upper edges of pixels run to the right, so the part is on their right
        (0, 1, 1, 0, 0, 1),
        (1, 0, 1, 1, -1, 0),
        (0, -1, 0, 1, 0, -1),
    ):
        outside = ~np.roll(padded, (-row, -column), (0, 1))
        for r, c in (np.argwhere(padded & outside) - 1).tolist():
            edges[c + x, r + y, dx, dy] = None
    left, rings = dict(edges), []
    while left:  # at first with an upper edge of the first row
        x, y, dx, dy = next(iter(left))
        ring = []
        while (x, y, dx, dy) in left:
            del left[x, y, dx, dy]
            x, y = x + dx, y + dy
            # Where two pixels share a corner only, the first way stays with the same pixel.
            ways = ((-dy, dx), (dx, dy), (dy, -dx))
            way = next(way for way in ways if (x, y, *way) in edges)
            if way != (dx, dy):
                ring.append((x, y))
            dx, dy = way
        rings.append(np.array(ring))
    return rings


def write_objects(
    out: Path, name: str, source: Source, result: NDArray[np.integer], *, table: bool, rois: bool
) -> None:
    """Writes the files of :func:`files_of`."""
    need_libraries(table=table, rois=rois, dims=source.dims)
    contents = [partial(table_of, name)] * table + [rois_of, geojson_of] * rois
    names = files_of(out, name, table=table, rois=rois)
    for path, content in zip(names, contents, strict=True):
        replace_file(path, content(source, result))


def files_of(out: Path, name: str, *, table: bool, rois: bool) -> list[Path]:
    """Returns the files of an image: tables/NAME.csv, rois/NAME_rois.zip, rois/NAME.geojson."""
    names = [out / TABLES / f"{name}.csv"] * table
    return names + [out / ROIS / f"{name}{end}" for end in ("_rois.zip", ".geojson")] * rois


def _planes(
    source: Source, result: NDArray[np.integer]
) -> Iterator[tuple[tuple[int, ...], NDArray[np.int32]]]:
    """Yields the index and the objects of each plane or volume."""
    for plane in source.planes:
        part = result[source.place(result, plane, *[slice(None)] * source.dims)]
        yield plane, np.ascontiguousarray(part, np.int32)
