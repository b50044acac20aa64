"""OME-Zarr: images in chunks that are read and written one by one. Needs zarr (extra [zarr])."""

import importlib
import itertools
import math
from pathlib import Path
from typing import Any

from .limits import check_pixels

_MOST, _MOST_PLANES = 2**40, 2**20
"""Most pixels and planes of an array."""

_LENGTHS = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "meter": 1e6, "angstrom": 1e-4}
"""Micrometres in each unit of length."""


def zarr_library() -> Any:
    """Returns the package zarr, or None if it is not installed."""
    try:
        return importlib.import_module("zarr")
    except ImportError:
        return None


def need_zarr() -> Any:
    """Returns the package zarr.

    Raises:
        ValueError: If it is not installed, or older than 3.
    """
    zarr = zarr_library()
    if zarr is None or int(zarr.__version__.split(".")[0]) < 3:
        raise ValueError("Zarr needs the package zarr 3: pip install 'unet_fast[zarr]'")
    return zarr


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def open_zarr(path: Path, channels: int, missing_chunks: bool) -> tuple[Any, str, dict[str, float]]:
    """Opens an OME-Zarr image (0.4, 0.5) or a plain array. Returns array, axes and pixel size.

    A plain array is (..., H, W). Of three axes the first is that of channels if it has as many as
    `channels`, and more than one.

    Raises:
        ValueError: If it is neither, or chunks are missing.
    """
    zarr = need_zarr()
    node = zarr.open(path, mode="r")
    sizes: dict[str, float] = {}
    if isinstance(node, zarr.Array):
        array, axes = node, "TZ"[: max(0, node.ndim - 2)] + "YX"
        if node.ndim == 3:
            axes = ("C" if node.shape[0] == channels and channels > 1 else "Q") + "YX"
        if len(axes) != node.ndim:
            raise ValueError(f"must have from 2 to 4 axes, got {node.ndim}")
        folder = path
    else:
        attributes = node.attrs.asdict()
        images = attributes.get("ome", attributes).get("multiscales")
        if not images:
            raise ValueError("must be an OME-Zarr image, got a group without multiscales")
        try:
            folder = path / images[0]["datasets"][0]["path"]
            axes, sizes = _axes(images[0])
            if not folder.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"a path inside the folder, got {folder}")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"must be an OME-Zarr image, got multiscales without {error}"
            ) from None
        array = open_level(folder)
    if len(axes) != array.ndim:
        raise ValueError(f"axes must be as many as the array has, {array.ndim}, got {axes}")
    planes = math.prod(array.shape) // max(1, math.prod(array.shape[-2:]))
    for what, count, most in (
        ("pixels", math.prod(array.shape), _MOST),
        ("planes", planes, _MOST_PLANES),
    ):
        if count > most:
            raise ValueError(f"must have at most {most} {what}, got {count}")
    # A chunk is decoded at once.
    check_pixels(array.chunks, array.dtype, lambda: sum(f.stat().st_size for f in _files(folder)))
    if not missing_chunks:
        _check_chunks(array, {str(f.relative_to(folder)) for f in _files(folder)})
    return array, axes, sizes


def _axes(image: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Returns axes and pixel size of the full resolution of a multiscale image."""
    named = [axis if isinstance(axis, dict) else {"name": axis} for axis in image["axes"]]
    scale = [1.0] * len(named)
    for step in (image, image["datasets"][0]):  # scales of the image apply to all its levels
        for change in step.get("coordinateTransformations", []):
            if change["type"] == "scale":
                scale = [a * float(b) for a, b in zip(scale, change["scale"], strict=True)]
    names = [axis["name"].upper() for axis in named]
    sizes = {
        name: factor * _LENGTHS[axis["unit"]]
        for name, axis, factor in zip(names, named, scale, strict=True)
        if name in ("X", "Y", "Z") and axis.get("unit") in _LENGTHS
    }
    return "".join(names), sizes


def _files(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.is_file()]


def _check_chunks(array: Any, files: set[str]) -> None:
    """Raises ValueError if a chunk of an array, or a shard, is not among these files."""
    files = files - {"zarr.json", ".zarray", ".zattrs"}
    sides = zip(array.shape, array.shards or array.chunks, strict=True)
    chunks = [-(-n // side) for n, side in sides]
    count, there = math.prod(chunks), len(files)
    if count <= max(there, 10**6):  # else there are too few, and too many to look for each
        places = itertools.product(*(range(n) for n in chunks))
        there = sum(array.metadata.encode_chunk_key(place) in files for place in places)
    if there < count:
        raise ValueError(
            f"must have all its chunks, {count}, got {there} (missing ones are taken as "
            f"{array.fill_value} with --missing-chunks)"
        )


def labels_folder(image: Path) -> Path:
    """Returns the folder for the labels of an OME-Zarr image.

    Raises:
        ValueError: If it is no OME-Zarr image of version 0.5.
    """
    version = None
    if (image / "zarr.json").is_file():
        attributes = need_zarr().open(image, mode="r").attrs.asdict()
        version = attributes.get("ome", {}).get("version")
    if version is None or "multiscales" not in attributes["ome"]:
        raise ValueError(f"{image}: must be an OME-Zarr image of version 0.5 to take labels")
    return image / "labels"


def list_label(folder: Path) -> None:
    """Adds labels, IMAGE/labels/NAME, to those that the image lists.

    Source: OME-NGFF 0.5, section "labels".
    """
    group = need_zarr().open_group(folder.parent, mode="a", zarr_format=3)
    ome = dict(group.attrs.get("ome", {"version": "0.5"}))
    ome["labels"] = [*dict.fromkeys([*ome.get("labels", []), folder.name])]
    group.attrs["ome"] = ome


def open_level(path: Path, *, write: bool = False) -> Any:
    """Opens an array; with `write`, one that also writes chunks that are all zero."""
    zarr = need_zarr()
    if not write:
        return zarr.open_array(path, mode="r")
    # Set here because it is not stored with the array: a chunk without a file must be a missing
    # one.
    return zarr.open_array(path, mode="r+").with_config({"write_empty_chunks": True})


def create(
    path: Path,
    *,
    name: str,
    shape: tuple[int, ...],
    axes: str,
    chunks: tuple[int, ...],
    dtype: Any,
    pixel_size: dict[str, float],
    labels: bool,
) -> Any:
    """Makes an OME-Zarr image (0.5) of one resolution level, array `0`, filled with 0.

    Args:
        path: Folder to make.
        name: Name of the image.
        shape: Shape of the array.
        axes: A letter for each axis, of T, C, Z, Y and X, in this order.
        chunks: Shape of a chunk.
        dtype: Dtype of the array.
        pixel_size: Micrometres along X, Y and Z, as far as known.
        labels: Whether the values are classes or object ids.

    Source: OME-NGFF 0.5, ngff.openmicroscopy.org/0.5.
    """
    zarr = need_zarr()
    kinds = {"T": "time", "C": "channel"}
    described: list[dict[str, str]] = []
    for axis in axes:
        entry = {"name": axis.lower(), "type": kinds.get(axis, "space")}
        if axis in pixel_size:
            entry["unit"] = "micrometer"
        described.append(entry)
    scale = [pixel_size.get(axis, 1.0) for axis in axes]
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": described,
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [{"type": "scale", "scale": scale}],
                    }
                ],
            }
        ],
    }
    if labels:
        ome["image-label"] = {}
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": ome})
    group.create_array(
        "0",
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=0,
        dimension_names=[axis.lower() for axis in axes],
    )
    return open_level(path / "0", write=True)
