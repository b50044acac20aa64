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


@dataclass(frozen=True)
class Objects:
    """How a predicted mask becomes objects.

    Raises ValueError if a value is out of range.
    """

    min_area: int = 0
    """Pixels that a connected part has at least, or is left out; counted before it grows."""
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

    def of(self, mask: NDArray[np.generic]) -> NDArray[np.int32]:
        """The objects of a mask, (H, W): parts connected along the axes, numbered from 1."""
        parts, _ = ndimage.label(mask != 0)
        sizes = np.bincount(parts.ravel(), minlength=1)
        return self.grown(_numbers(sizes >= self.min_area)[parts])

    def grown(self, labels: NDArray[np.integer]) -> NDArray[np.int32]:
        """Gives the pixels of narrow gaps between objects to the nearest, (H, W).

        A background pixel goes to the nearest object, at a distance d1 <= `grow`, if another one
        is not farther than 2 `grow` + 1 - d1: where two objects face each other at most 2 `grow`
        pixels apart. Towards open background nothing grows, but beyond 1 the mouths of gaps are
        rounded off. Distances are steps along the axes; of
        objects at the same distance the one of the smaller number counts as the nearer.
        """
        result = labels.astype(np.int32)
        if not self.grow:
            return result
        reach = 2 * self.grow
        padded = np.pad(result, reach)
        own, distance = padded.copy(), np.zeros(padded.shape, np.int32)
        for d in range(1, self.grow + 1):
            near = np.full(own.shape, _NO_ID)
            for axis in (0, 1):
                for shift in (-1, 1):  # what wraps around is padding
                    other = np.roll(own, shift, axis)
                    np.minimum(near, np.where(other > 0, other, _NO_ID), out=near)
            new = (own == 0) & (near < _NO_ID)
            own[new], distance[new] = near[new], d
        inside = np.zeros(padded.shape, bool)
        inside[reach:-reach, reach:-reach] = True
        places = np.flatnonzero((distance > 0) & inside)
        owner, room = own.ravel()[places], reach + 1 - distance.ravel()[places]
        faces = np.zeros(len(places), bool)
        flat, width = padded.ravel(), padded.shape[1]
        for row in range(-reach, reach + 1):
            for column in range(abs(row) - reach, reach - abs(row) + 1):
                other = flat[places + row * width + column]
                steps = abs(row) + abs(column)
                faces |= (other > 0) & (other != owner) & (steps <= room)
        flat[places[faces]] = owner[faces]
        return padded[reach:-reach, reach:-reach]


_NO_ID = np.iinfo(np.int32).max


def _numbers(kept: NDArray[np.bool_]) -> NDArray[np.int32]:
    """New numbers, without gaps, of the parts that are kept; part 0 is background."""
    kept = kept.copy()
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)


def label_in_blocks(
    size: tuple[int, int],
    block: tuple[int, int],
    objects: Objects,
    mask: Region,
    parts: Region,
    write_parts: Write,
    write: Write,
) -> None:
    """Makes the objects of a mask a block at a time, the same as :meth:`Objects.of`.

    The parts of each block are numbered by themselves; parts that meet where blocks meet are one.
    Objects are numbered in the order of their first pixels, row by row.

    Args:
        size: Of the mask, (H, W).
        block: Sides of a block.
        objects: What counts as an object.
        mask: Reads rows and columns of the mask; what is not 0 is foreground.
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
            found, number = ndimage.label(mask(row, column))
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
    margin = 2 * objects.grow
    for row in rows:
        for column in columns:
            wide = [
                slice(max(0, s.start - margin), min(n, s.stop + margin))
                for s, n in zip((row, column), size, strict=True)
            ]
            grown = objects.grown(final[parts(*wide)])
            inner = [
                slice(s.start - w.start, s.stop - w.start)
                for s, w in zip((row, column), wide, strict=True)
            ]
            write(row, column, grown[tuple(inner)])
