"""What volumes add to training: settings from the size of voxels, and parts cut for tiles."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .._device import torchrun_number
from .._progress import counted
from ..augment import Augmentation, AugmentationParameters
from ..images.pairing import ratio_of
from .config import TrainConfig
from .samples import Sample

ALIKE = 0.05
"""Relative difference up to which voxel sizes count as equal."""


def with_voxels(config: TrainConfig, samples: Sequence[Sample]) -> TrainConfig:
    """Returns settings of volumes with what follows from the size of their voxels.

    Lengths are in pixels along X then, for weights and deformation alike. What was set before is
    left as it is.

    Raises:
        ValueError: If a file does not tell its voxel size, and no setting does.
    """
    if config.dims == 2 or not samples:
        return config
    ratio, *_ = (ratio_of(sample.name, sample.spacing) for sample in samples)
    sizes = {sample.spacing: sample.name for sample in samples if sample.spacing is not None}
    (size, _), *others = sizes.items()
    for other, name in others:
        if not np.allclose(size, other, rtol=ALIKE) and torchrun_number("RANK", 0) == 0:
            warnings.warn(
                f"volumes differ in the size of their voxels: {_text(other)} in {name}, taken as "
                f"{_text(size)}; scale them alike",
                stacklevel=2,
            )
    flat = config.flat_levels
    if flat is None:
        depth = math.log2(max(1.0, size[0] / min(size[1:])) * (1 + ALIKE))
        flat = min(int(depth), config.depth)
    weights, augmentation = config.weights, config.augmentation
    if weights.spacing is None and set(ratio) != {1.0}:
        weights = replace(weights, spacing=ratio)
    if augmentation.voxel_size is None and set(ratio) != {1.0}:
        augmentation = _in_voxels(augmentation, ratio)
    return replace(config, flat_levels=flat, weights=weights, augmentation=augmentation)


def said_of_volumes(config: TrainConfig, samples: Sequence[Sample]) -> str:
    """Describes what settings of :func:`with_voxels` make of volumes."""
    size, flat = samples[0].spacing or (), config.flat_levels or 0
    levels = f"the upper {counted(flat, 'level')} of the network in the plane only"
    shapes = {sample.labels.shape: None for sample in samples}
    last = any(2 * shape[2] < min(shape[:2]) for shape in shapes)
    hint = " (if Z is the last axis of the files: --axes YXZ)" if last else ""
    return (
        f"volumes of {', '.join(map(_text, shapes))}{hint}, voxels of {_text(size)} um (Z, Y, X): "
        f"{levels if flat else 'all levels of the network in three axes'}; tiles of "
        f"{_text(config.output_tile)}"
    )


def _in_voxels(augmentation: Augmentation, ratio: tuple[float, ...]) -> Augmentation:
    """Returns a deformation whose single numbers, pixels along X, became voxels of each axis."""

    def along(length: Any, least: float) -> Any:
        if not isinstance(length, int | float):
            return length
        return tuple(max(least, float(f"{length / x:.3g}")) for x in ratio)

    return replace(
        augmentation,
        voxel_size=ratio,
        sigma=along(augmentation.sigma, 0.0),
        spacing=along(augmentation.spacing, 1.0),
    )


def _text(size: Sequence[float]) -> str:
    return " x ".join(f"{x:g}" for x in size)


def box_of(
    grid: str,
    tile: AugmentationParameters,
    offset: Tensor,
    shape: Sequence[int],
    sides: Sequence[int],
) -> tuple[slice, ...]:
    """Returns the part of a volume that one deformed tile may read, which is mirrored at its edges.

    Edges of the part are edges of the volume, or beyond the reach of the tile, so that what lies
    outside is continued alike.

    Args:
        grid: The grid of the deformation; see :class:`Augmentation`.
        tile: Parameters of the tile, of one sample.
        offset: Position of the tile in the volume, (3,).
        shape: Size of the tile.
        sides: Size of the volume.
    """
    affine = tile.affine[0].double().numpy()
    ends = product(*((0, side - 1) for side in shape))
    corners = np.array([affine[:, :-1] @ end + affine[:, -1] for end in ends])
    # The field is a mean of its spline coefficients, so it lies between the least and the greatest.
    field = tile.displacement[0].double().numpy()
    if grid == "interpolating":
        field = np.stack([ndimage.spline_filter(x, mode="mirror") for x in field])
    low, high = field.reshape(len(field), -1).min(1), field.reshape(len(field), -1).max(1)
    if grid == "keys":  # whose weights are partly negative: sum of their sizes up to 1.25 an axis
        beyond = (1.25 ** len(shape) - 1) / 2 * (high - low)
        low, high = low - beyond, high + beyond
    place = offset.double().numpy()
    firsts = np.floor(corners.min(0) + low + place).astype(int) - 1
    lasts = np.ceil(corners.max(0) + high + place).astype(int) + 1
    box = []
    for first, last, side in zip(firsts.tolist(), lasts.tolist(), sides, strict=True):
        edge = side - 1
        if first < -edge or last > 2 * edge:  # mirrored more than once
            box.append(slice(0, side))
            continue
        start, end = max(first, 0), min(last, edge)
        if first < 0:
            start, end = 0, max(end, -first)
        if last > edge:
            start, end = min(start, 2 * edge - last), edge
        box.append(slice(start, end + 1))
    return tuple(box)


def box_around(known: NDArray[np.bool_], most: int) -> tuple[slice, ...]:
    """Returns a box of at most that many voxels, about the planes that hold the most known ones.

    Of a volume that is no larger it is the whole.
    """
    share = min(1.0, (most / known.size) ** (1 / known.ndim))
    box = []
    for axis, side in enumerate(known.shape):
        length = max(1, int(side * share))
        others = tuple(a for a in range(known.ndim) if a != axis)
        # Of plateaus the middle: of a volume that is known everywhere, that is its centre.
        counts = known.sum(others)
        best = np.flatnonzero(counts == counts.max())
        first = int(best[len(best) // 2]) - length // 2
        first = min(max(first, 0), side - length)
        box.append(slice(first, first + length))
        known = known[(*[slice(None)] * axis, box[-1])]  # what counts for the next axes
    return tuple(box)
