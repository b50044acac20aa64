"""OME-Zarr: images in chunks that are read and written one by one. Needs zarr (extra [zarr])."""

import importlib
from pathlib import Path
from typing import Any

_LENGTHS = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "meter": 1e6, "angstrom": 1e-4}
"""Micrometres."""


def zarr_library() -> Any:
    """The package zarr, or None where it is not installed."""
    try:
        return importlib.import_module("zarr")
    except ImportError:
        return None


def need_zarr() -> Any:
    """The package zarr.

    Raises:
        ValueError: If it is not installed.
    """
    zarr = zarr_library()
    if zarr is None or int(zarr.__version__.split(".")[0]) < 3:
        raise ValueError("Zarr needs the package zarr 3: pip install 'unet_fast[zarr]'")
    return zarr


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def open_zarr(path: Path, channels: int, missing_chunks: bool) -> tuple[Any, str, dict[str, float]]:
    """Array, axes and pixel size of an OME-Zarr image (0.4, 0.5) or a plain array.

    A plain array is (..., H, W); a third axis from behind is one of channels if the network wants
    as many.

    Raises:
        ValueError: If it is neither, or chunks are missing.
    """
    zarr = need_zarr()
    node = zarr.open(path, mode="r")
    sizes: dict[str, float] = {}
    if isinstance(node, zarr.Array):
        array, axes = node, "TZ"[: max(0, node.ndim - 2)] + "YX"
        if node.ndim == 3:
            axes = ("C" if node.shape[0] == channels and channels > 1 else "Z") + "YX"
        if len(axes) != node.ndim:
            raise ValueError(f"must have from 2 to 4 axes, got {node.ndim}")
    else:
        attributes = node.attrs.asdict()
        images = attributes.get("ome", attributes).get("multiscales")
        if not images:
            raise ValueError("must be an OME-Zarr image, got a group without multiscales")
        image = images[0]
        array = node[image["datasets"][0]["path"]]
        named = [axis if isinstance(axis, dict) else {"name": axis} for axis in image["axes"]]
        axes = "".join(axis["name"].upper() for axis in named)
        steps = [image, image["datasets"][0]]  # scales of the image apply to each of its levels
        scale = [1.0] * len(named)
        for step in steps:
            for change in step.get("coordinateTransformations", []):
                if change["type"] == "scale":
                    scale = [a * b for a, b in zip(scale, change["scale"], strict=True)]
        for axis, factor in zip(named, scale, strict=True):
            if axis["name"].upper() in "XYZ" and axis.get("unit") in _LENGTHS:
                sizes[axis["name"].upper()] = factor * _LENGTHS[axis["unit"]]
    if len(axes) != array.ndim:
        raise ValueError(f"axes must be as many as the array has, {array.ndim}, got {axes}")
    there, needed = array.nchunks_initialized, array.nchunks
    if there < needed and not missing_chunks:
        raise ValueError(
            f"must have all its {needed} chunks, got {there} (missing ones are taken as "
            f"{array.fill_value} with --missing-chunks)"
        )
    return array, axes, sizes


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
    """Makes an OME-Zarr image (0.5) of one resolution, array `0`, all zero.

    Args:
        path: Folder, which is made.
        name: Of the image.
        shape: Of the array.
        axes: A letter for each axis, of T, C, Z, Y and X, in this order.
        chunks: Of the array.
        dtype: Of the array.
        pixel_size: Micrometres along X, Y and Z, as far as known.
        labels: Whether the values are classes or numbers of objects.

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
    return group.create_array(
        "0",
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=0,
        dimension_names=[axis.lower() for axis in axes],
        config={"write_empty_chunks": True},  # a chunk that is not there is one that is missing
    )
