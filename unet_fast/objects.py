"""Objects, the connected components of a mask, whole or block by block."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, sparse
from torch import Tensor

from .contracts.border_weight_map import as_maps, spatial_axes
from .contracts.types import check_tensors, takes_arrays


@takes_arrays("mask")
def label_components(mask: Tensor, connectivity: int = 1, *, dims: int | None = None) -> Tensor:
    """Labels the connected components of a mask from 1; touching objects become one.

    Args:
        mask: (H, W), (N, H, W), (N, 1, H, W) or (N, D, H, W), bool or integer; everything not 0 is
            foreground. Each image is numbered by itself.
        connectivity: How many axes a step between connected pixels may take at once: 1 along the
            axes only (4 neighbours in 2D, 6 in 3D), 2 diagonally too, up to the number of axes.
        dims: Number of spatial axes; 3 takes (D, H, W) as a volume; see
            :func:`unet_fast.two_nearest`.

    Returns:
        int32 labels, of the shape and device of `mask`.

    Raises:
        TypeError: If `mask` is not a tensor, or of floats: which of them are foreground?
        ValueError: If `mask` has another number of axes or `connectivity` is out of range.
    """
    check_tensors("label_components", mask=mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"label_components: mask must be bool or integer, got {mask.dtype} (x > 0.5 makes one "
            "of probabilities)"
        )
    maps = as_maps("label_components", "mask", mask, dims)
    axes = spatial_axes(maps)
    if not 1 <= connectivity <= axes:
        raise ValueError(
            f"label_components: connectivity must be in [1, {axes}], got {connectivity}"
        )
    structure = ndimage.generate_binary_structure(axes, connectivity)
    if mask.numel() == 0:
        return torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    images = maps.cpu().numpy() != 0
    labels = [ndimage.label(image, structure)[0] for image in images]
    result = torch.from_numpy(np.stack(labels).astype(np.int32)).reshape(mask.shape)
    return result.to(mask.device)


Part = tuple[slice, ...]
"""A part of an image or volume: a slice along each axis."""
Reader = Callable[[Part], NDArray[Any]]
Writer = Callable[[Part, NDArray[np.integer]], None]
Stage = Callable[[NDArray[np.int32], NDArray[np.integer]], NDArray[np.int32]]
"""Makes new labels of labels and states."""


_Item = TypeVar("_Item", bound=np.generic)
REACH = 16
"""Largest number of steps that an object grows into the foreground of each level."""
_NO_ID = np.iinfo(np.int32).max


@dataclass(frozen=True)
class ObjectRule:
    """The rule that turns predicted probabilities of foreground into objects.

    It holds for images, (H, W), and for volumes, (D, H, W), whose voxels are called pixels here.
    Each connected component (along the axes) of the seeds, the pixels of clear foreground, makes an
    object. Small ones are left out; the others grow into the rest of the foreground, from high to
    low probability, and back over the ridge that training carved between touching objects.

    Raises TypeError or ValueError if a value breaks its rule.
    """

    min_area: int = 0
    """Minimum pixels of a connected component of seeds; smaller ones are left out."""
    grow: int = 0
    """Pixels that objects grow back into the ridge between them, at most; see :meth:`grown`."""
    seed_threshold: float = 0.0
    """In [0, 1): pixels of higher probability are seeds; 0: all foreground."""
    foreground_threshold: float | None = None
    """In [0, 1): pixels of higher probability are foreground; None: those where background is not
    the most probable class."""
    levels: int = 1
    """Number of probability levels, in [1, 8], by which objects grow from seeds into the
    foreground."""
    holes: int = 0
    """Holes in an object of up to this many pixels, in [0, 1024], are filled."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("min_area", "grow", "levels", "holes"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if self.min_area < 0:
            raise ValueError(f"min_area must be >= 0, got {self.min_area}")
        for name, low, high in (("grow", 0, 16), ("levels", 1, 8), ("holes", 0, 1024)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {getattr(self, name)}")
        for name in ("seed_threshold", "foreground_threshold"):
            value = getattr(self, name)
            if value is None and name == "foreground_threshold":
                continue
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")

    @property
    def seed(self) -> int:
        """The state of seed pixels; see :meth:`states`."""
        return self.levels + 1

    def states(self, share: Tensor, mask: Tensor) -> Tensor:
        """Returns the state of each pixel, uint8.

        They are 0 for background, 1, 2, ... for the levels of the foreground, from the faintest on,
        and :attr:`seed`.

        Args:
            share: Probability of foreground, any shape.
            mask: Where background is not the most probable class, of the same shape.
        """
        low = 0.5 if self.foreground_threshold is None else self.foreground_threshold
        foreground = mask if self.foreground_threshold is None else share > low
        if self.seed_threshold <= low:
            return (foreground & (share > self.seed_threshold)).to(torch.uint8) * self.seed
        states = foreground.to(torch.uint8)
        step = (self.seed_threshold - low) / self.levels
        for level in range(1, self.levels):
            states += foreground & (share > low + step * level)
        return states.masked_fill_(foreground & (share > self.seed_threshold), self.seed)

    def of(self, states: NDArray[np.integer]) -> NDArray[np.int32]:
        """Returns the objects of pixels in given :meth:`states`, in the order of first pixels."""
        parts, _ = ndimage.label(states == self.seed)
        sizes = np.bincount(parts.ravel(), minlength=1)
        return self.grown(_numbers(sizes >= self.min_area)[parts], states)

    def of_mask(self, mask: NDArray[np.generic]) -> NDArray[np.int32]:
        """Returns the objects of a mask, all of whose nonzero pixels are seeds."""
        return self.of(np.where(mask != 0, self.seed, 0))

    def grown(self, labels: NDArray[np.integer], states: NDArray[np.integer]) -> NDArray[np.int32]:
        """Grows objects into the foreground around them and over the ridge between them.

        First they grow into the rest of the foreground, which includes seeds that were left out:
        into pixels of the highest level, step by step along the axes, at most :data:`REACH` steps,
        then also into those of the next level, and so on. This follows the watershed of the
        probability, but depends on nothing far away. Next, holes are filled.

        Then the pixels of narrow gaps go to the nearest object: a background pixel at a distance d1
        <= `grow` does if another object is within 2 `grow` + 1 - d1, that is, where two objects
        face each other at most 2 `grow` pixels apart. Nothing grows towards open background, except
        that for `grow` > 1 the mouths of gaps are rounded off. Distances are steps along the axes;
        if two objects arrive at once, the smaller number wins.
        """
        result = labels.astype(np.int32)
        for _, stage in self.stages():
            result = stage(result, states)
        return result

    def stages(self) -> list[tuple[int, Stage]]:
        """The stages of :meth:`grown`, each with the distance beyond which nothing affects it."""
        stages: list[tuple[int, Stage]] = [
            (REACH, functools.partial(_grow_into, level)) for level in range(self.levels, 0, -1)
        ]
        if self.holes:
            stages.append((self.holes, functools.partial(_fill, self.holes)))
        if self.grow:
            stages.append((2 * self.grow, functools.partial(_close_gaps, self.grow)))
        return stages


def _grow_into(
    level: int, labels: NDArray[np.int32], states: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Grows objects into the pixels of a level and those above it, at most REACH steps."""
    padded = _padded(labels, 1)
    free = _padded((states >= level) & (labels == 0), 1)
    _spread(padded, free, REACH)
    return padded[(slice(1, -1),) * labels.ndim]


def _close_gaps(grow: int, labels: NDArray[np.int32], _: object) -> NDArray[np.int32]:
    """Grows objects over the gaps between them, from each side by `grow` pixels at most."""
    own = _padded(labels, 1)
    places, distance = _spread(own, _padded(labels == 0, 1), grow)
    room = np.zeros(own.shape, np.int8)
    room.ravel()[places] = 2 * grow + 1 - distance
    inner = (slice(1, -1),) * labels.ndim
    own, room = own[inner], room[inner]
    # The least and the largest number within so many steps: another object's if there is any.
    least, most = np.where(labels > 0, labels, _NO_ID), labels
    faces = np.zeros(labels.shape, bool)
    for steps in range(1, 2 * grow + 1):
        least, most = _over_neighbours(np.minimum, least), _over_neighbours(np.maximum, most)
        if steps > grow:
            faces |= (room == steps) & ((least != own) | (most != own))
    return np.where(faces, own, labels)


def _over_neighbours(pick: np.ufunc, array: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns what `pick` makes of each pixel and its neighbours along the axes."""
    result = array.copy()
    for axis in range(array.ndim):
        old, new = array.swapaxes(0, axis), result.swapaxes(0, axis)
        pick(new[1:], old[:-1], out=new[1:])
        pick(new[:-1], old[1:], out=new[:-1])
    return result


def _fill(largest: int, labels: NDArray[np.int32], _: object) -> NDArray[np.int32]:
    """Fills holes, of up to `largest` background pixels and within one object."""
    holes, count = ndimage.label(labels == 0)
    sizes = np.bincount(holes.ravel(), minlength=1)
    small = sizes <= largest
    small[0] = False
    least, most = np.full(count + 1, _NO_ID, np.int32), np.zeros(count + 1, np.int32)
    along = [(labels.swapaxes(0, k), holes.swapaxes(0, k)) for k in range(labels.ndim)]
    for _, parts in along:
        small[parts[[0, -1]]] = False  # it may continue outside
    for ids, parts in along:
        for own, other in ((ids[1:], parts[:-1]), (ids[:-1], parts[1:])):
            met = (own > 0) & small[other]
            np.minimum.at(least, other[met], own[met])
            np.maximum.at(most, other[met], own[met])
    owner = np.where(small & (least == most), most, 0)
    return np.where(holes > 0, owner[holes], labels)


def _padded(array: NDArray[_Item], width: int) -> NDArray[_Item]:
    """Returns an array with zeros around it, in whose memory rows follow each other."""
    return np.pad(np.ascontiguousarray(array), width)


def _strides(array: NDArray[np.generic]) -> list[int]:
    """Returns how many places apart neighbours along each axis are."""
    return [stride // array.itemsize for stride in array.strides]


def _spread(
    labels: NDArray[np.int32], free: NDArray[np.bool_], steps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spreads labels over free places, in place, one step along the axes at a time.

    Places are counted row by row. None along the outer border may be free.

    Returns:
        The places that were reached, and the number of steps to each.
    """
    ids, open_ = labels.ravel(), free.ravel()
    moves = [move for stride in _strides(labels) for move in (-stride, stride)]
    beside = np.flatnonzero(open_)
    places, distances = [], []
    for step in range(1, steps + 1):
        near = np.full(len(beside), _NO_ID, np.int32)
        for move in moves:
            other = ids[beside + move]
            np.minimum(near, np.where(other > 0, other, _NO_ID), out=near)
        reached = near < _NO_ID
        if not reached.any():
            break
        front = beside[reached]
        places.append(front)
        distances.append(np.full(len(front), step))
        ids[front] = near[reached]
        open_[front] = False
        # Only neighbours of the front can be reached next.
        beside = np.concatenate([front + move for move in moves])
        beside = np.unique(beside[open_[beside]])
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(places), np.concatenate(distances)


def _numbers(kept: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Numbers the components that are kept from 1, without gaps; component 0 is background."""
    kept = kept.copy()
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)


def label_in_blocks(
    size: tuple[int, ...],
    block: tuple[int, ...],
    objects: ObjectRule,
    states: Reader,
    stores: Sequence[tuple[Reader, Writer]],
) -> int:
    """Makes objects one block at a time, with the same result as :meth:`ObjectRule.of`.

    Components are numbered block by block, and joined where they meet at the border of blocks, of
    which only the pixels along borders are kept. Objects are numbered in the order of their first
    pixels, row by row. They grow in all blocks by one stage after another: each then needs a narrow
    margin only, of what the one before has made.

    Args:
        size: Size of the image or volume, (H, W) or (D, H, W).
        block: Sides of a block.
        objects: What counts as an object.
        states: Reads a part of the states of the pixels; see :meth:`ObjectRule.states`.
        stores: Two stores of the size of the image, int32, which read and write parts. Either is
            written as a whole, from the other one, before it is read. The result is in the first.

    Returns:
        The number of objects.
    """
    blocks: list[Part] = list(
        itertools.product(
            *(
                [slice(start, min(start + side, n)) for start in range(0, n, side)]
                for n, side in zip(size, block, strict=True)
            )
        )
    )
    axes = range(len(size))
    first = [np.zeros(1, np.int64)]  # first pixel of each component
    areas = [np.zeros(1, np.int64)]
    pairs: list[NDArray[np.integer]] = []
    count = 0
    stages = objects.stages()
    write_parts = stores[len(stages) % 2][1]
    # For each axis the components along the last borders across it.
    borders = [np.zeros(size[:axis] + size[axis + 1 :], np.int32) for axis in axes]
    for at in blocks:
        found, number = ndimage.label(states(at) == objects.seed)
        values, index, area = np.unique(found, return_index=True, return_counts=True)
        pixel = np.unravel_index(index[values > 0], found.shape)
        start = [i + part.start for i, part in zip(pixel, at, strict=True)]
        first.append(np.ravel_multi_index(start, size))
        areas.append(area[values > 0])
        ids = np.where(found > 0, found + count, 0)
        count += number
        write_parts(at, ids)
        for axis, border in enumerate(borders):
            before = border[at[:axis] + at[axis + 1 :]]
            mine = ids.take(0, axis)
            met = (mine > 0) & (before > 0)
            pairs.append(np.unique(np.stack([mine[met], before[met]]), axis=1))
            before[...] = ids.take(-1, axis)
    one, other = np.concatenate(pairs, axis=1)
    links = sparse.coo_array((np.ones(len(one)), (one, other)), (count + 1, count + 1))
    _, group = sparse.csgraph.connected_components(links, directed=False)
    groups = int(group.max()) + 1
    start_of = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(start_of, group, np.concatenate(first))
    start_of[group[0]] = -1  # background comes first
    total = np.bincount(group, np.concatenate(areas), groups)
    order = np.argsort(start_of)
    number_of = np.zeros(groups, np.int32)
    number_of[order] = _numbers(total[order] >= objects.min_area)
    final = number_of[group]
    for left, (margin, stage) in zip(range(len(stages), 0, -1), stages, strict=True):
        (read, _), (_, write) = stores[left % 2], stores[(left - 1) % 2]
        for at in blocks:
            wide = tuple(
                slice(max(0, part.start - margin), min(n, part.stop + margin))
                for part, n in zip(at, size, strict=True)
            )
            labels = final[read(wide)] if left == len(stages) else read(wide)
            spans = zip(at, wide, strict=True)
            inner = (slice(s.start - w.start, s.stop - w.start) for s, w in spans)
            write(at, stage(labels, states(wide))[tuple(inner)])
    return int(number_of.max())
