"""Objects: the connected parts of a mask, of a whole one or of one seen block by block."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, sparse
from torch import Tensor

from .reference.border_weight_map import spatial_axes


def label_components(mask: Tensor, connectivity: int = 1) -> Tensor:
    """Numbers the connected parts of a mask, from 1; touching objects become one.

    Args:
        mask: (H, W), (N, H, W) or (N, D, H, W), bool or integer; everything not 0 is foreground.
            Each image is numbered by itself.
        connectivity: How many axes a step between connected pixels may take at once: 1 along the
            axes only (4 neighbours in 2D, 6 in 3D), 2 diagonally too, up to the number of axes.

    Returns:
        int32 labels, of the shape and device of `mask`.

    Raises:
        ValueError: If `mask` has another number of axes or `connectivity` is out of range.
    """
    if mask.dim() not in (2, 3, 4):
        raise ValueError(
            "label_components: mask must be (H, W), (N, H, W) or (N, D, H, W), "
            f"got {tuple(mask.shape)}"
        )
    axes = spatial_axes(mask)
    if not 1 <= connectivity <= axes:
        raise ValueError(
            f"label_components: connectivity must be in [1, {axes}], got {connectivity}"
        )
    structure = ndimage.generate_binary_structure(axes, connectivity)
    images = mask.reshape(-1, *mask.shape[-axes:]).cpu().numpy() != 0
    labels = [ndimage.label(image, structure)[0] for image in images]
    numbered = np.stack(labels) if labels else images
    result = torch.from_numpy(numbered.astype(np.int32)).reshape(mask.shape)
    return result.to(mask.device)


Region = Callable[[slice, slice], NDArray[np.integer]]
Write = Callable[[slice, slice, NDArray[np.integer]], None]


FOREGROUND, SEED = 1, 2
"""Of a predicted pixel: it belongs to an object if one reaches it; it makes one."""
REACH = 16
"""Steps that an object grows at most into foreground that is no seed."""


@dataclass(frozen=True)
class Objects:
    """How predicted pixels become objects.

    Raises TypeError or ValueError if a value breaks its rule.
    """

    min_area: int = 0
    """Pixels that a connected part of the seeds has at least, or is left out."""
    grow: int = 0
    """Pixels that objects grow back into the ridge that parts them, at most; see :meth:`grown`."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("min_area", "grow"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if self.min_area < 0:
            raise ValueError(f"min_area must be >= 0, got {self.min_area}")
        if not 0 <= self.grow <= 16:
            raise ValueError(f"grow must be in [0, 16], got {self.grow}")

    @property
    def margin(self) -> int:
        """How many pixels away from a pixel there is something that matters to it."""
        return REACH + 2 * self.grow

    def of(self, states: NDArray[np.integer]) -> NDArray[np.int32]:
        """The objects of pixels, (H, W), that are background (0), :data:`FOREGROUND`, :data:`SEED`.

        Parts of the seeds that are connected along the axes, numbered from 1, and grown.
        """
        parts, _ = ndimage.label(states == SEED)
        sizes = np.bincount(parts.ravel(), minlength=1)
        return self.grown(_numbers(sizes >= self.min_area)[parts], states)

    def of_mask(self, mask: NDArray[np.generic]) -> NDArray[np.int32]:
        """The objects of a mask, (H, W): all that is not 0 is a seed."""
        return self.of(np.where(mask != 0, SEED, 0))

    def grown(self, labels: NDArray[np.integer], states: NDArray[np.integer]) -> NDArray[np.int32]:
        """Grows objects, (H, W), into the foreground around them and over the ridge between them.

        First into pixels that are foreground and no seed, step by step along the axes,
        :data:`REACH` steps at most. Then the pixels of narrow gaps between objects go to the
        nearest: a background pixel to one at a distance d1 <= `grow`, if another one is not farther
        than 2 `grow` + 1 - d1, so where two objects face each other at most 2 `grow` pixels apart.
        Towards open background nothing grows, but beyond 1 the mouths of gaps are rounded off.
        Distances are steps along the axes; where two objects arrive at once, the one of the smaller
        number is first.
        """
        reach = max(1, 2 * self.grow)
        padded = np.pad(labels.astype(np.int32), reach)
        width = padded.shape[1]
        flat = padded.ravel()
        _spread(flat, _inner((states == FOREGROUND) & (labels == 0), reach), width, REACH)
        if self.grow:
            own = flat.copy()
            free = _inner(padded[reach:-reach, reach:-reach] == 0, reach)
            places, distance = _spread(own, free, width, self.grow)
            owner, room = own[places], 2 * self.grow + 1 - distance
            faces = np.zeros(len(places), bool)
            for row in range(-reach, reach + 1):
                for column in range(abs(row) - reach, reach - abs(row) + 1):
                    other = flat[places + row * width + column]
                    steps = abs(row) + abs(column)
                    faces |= (other > 0) & (other != owner) & (steps <= room)
            flat[places[faces]] = owner[faces]
        return padded[reach:-reach, reach:-reach]


_NO_ID = np.iinfo(np.int32).max


def _inner(mask: NDArray[np.bool_], margin: int) -> NDArray[np.int64]:
    """Where a mask is, in the flat array that is that much wider on each side."""
    rows, columns = np.nonzero(mask)
    width = mask.shape[1] + 2 * margin
    places: NDArray[np.int64] = (rows + margin) * width + columns + margin
    return places


def _spread(
    ids: NDArray[np.int32], free: NDArray[np.int64], width: int, steps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spreads ids over free places, a step along the axes at a time.

    Returns:
        The places that were reached, and after how many steps.
    """
    places, distances = [], []
    for step in range(1, steps + 1):
        near = np.full(len(free), _NO_ID, np.int32)
        for move in (-width, -1, 1, width):
            other = ids[free + move]
            np.minimum(near, np.where(other > 0, other, _NO_ID), out=near)
        reached = near < _NO_ID
        if not reached.any():
            break
        places.append(free[reached])
        distances.append(np.full(len(places[-1]), step))
        ids[places[-1]] = near[reached]
        free = free[~reached]
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(places), np.concatenate(distances)


def _numbers(kept: NDArray[np.bool_]) -> NDArray[np.int32]:
    """New numbers, without gaps, of the parts that are kept; part 0 is background."""
    kept = kept.copy()
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)


def label_in_blocks(
    size: tuple[int, int],
    block: tuple[int, int],
    objects: Objects,
    states: Region,
    parts: Region,
    write_parts: Write,
    write: Write,
) -> None:
    """Makes objects a block at a time, the same as :meth:`Objects.of`.

    The parts of each block are numbered by themselves; parts that meet where blocks meet are one.
    Objects are numbered in the order of their first pixels, row by row.

    Args:
        size: Of the image, (H, W).
        block: Sides of a block.
        objects: What counts as an object.
        states: Reads rows and columns of the pixels: 0, :data:`FOREGROUND` or :data:`SEED`.
        parts: Reads what was written of the parts.
        write_parts: Writes rows and columns of the parts, int32; each block once.
        write: Writes rows and columns of the result, int32; each block once.
    """
    rows, columns = (
        [slice(start, min(start + side, n)) for start in range(0, n, side)]
        for n, side in zip(size, block, strict=True)
    )
    first = [np.zeros(1, np.int64)]  # of each part, its first pixel; of the background any
    areas = [np.zeros(1, np.int64)]
    pairs: list[NDArray[np.int64]] = []
    count = 0
    above = np.zeros(size[1], np.int64)
    for row in rows:
        left = np.zeros(row.stop - row.start, np.int64)
        for column in columns:
            found, number = ndimage.label(states(row, column) == SEED)
            values, at, area = np.unique(found, return_index=True, return_counts=True)
            pixel = np.unravel_index(at[values > 0], found.shape)
            first.append((pixel[0] + row.start) * size[1] + pixel[1] + column.start)
            areas.append(area[values > 0])
            ids = np.where(found > 0, found.astype(np.int64) + count, 0)
            count += number
            write_parts(row, column, ids.astype(np.int32))
            for mine, others in ((ids[0], above[column]), (ids[:, 0], left)):
                met = (mine > 0) & (others > 0)
                pairs.append(np.unique(np.stack([mine[met], others[met]]), axis=1))
            left, above[column] = ids[:, -1], ids[-1]
    one, other = np.concatenate(pairs, axis=1)
    links = sparse.coo_array((np.ones(len(one)), (one, other)), (count + 1, count + 1))
    _, group = sparse.csgraph.connected_components(links, directed=False)
    groups = int(group.max()) + 1
    start = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(start, group, np.concatenate(first))
    start[group[0]] = -1  # background comes first
    total = np.bincount(group, np.concatenate(areas), groups)
    order = np.argsort(start)
    number_of = np.zeros(groups, np.int32)
    number_of[order] = _numbers(total[order] >= objects.min_area)
    final = number_of[group]
    margin = objects.margin
    for row in rows:
        for column in columns:
            wide = [
                slice(max(0, s.start - margin), min(n, s.stop + margin))
                for s, n in zip((row, column), size, strict=True)
            ]
            grown = objects.grown(final[parts(*wide)], states(*wide))
            inner = [
                slice(s.start - w.start, s.stop - w.start)
                for s, w in zip((row, column), wide, strict=True)
            ]
            write(row, column, grown[tuple(inner)])
