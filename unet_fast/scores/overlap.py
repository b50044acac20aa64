"""Overlaps of the objects of two label maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Images = ArrayLike | Tensor | Sequence[ArrayLike | Tensor]


def as_pair(
    op: str, truth: NDArray[Any], probability: NDArray[Any], name: str
) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
    """Checks a map and probabilities."""
    as_maps(op, truth, truth)
    if probability.shape != truth.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of truth, {truth.shape}, got {probability.shape}"
        )
    if not ((probability >= 0) & (probability <= 1)).all():
        wrong = probability[~((probability >= 0) & (probability <= 1))][0]
        raise ValueError(f"{op}: {name} must be in [0, 1], got {wrong}")
    return truth, probability


class Overlap:
    """Overlaps of objects in pixels, by a few passes whatever the number of objects.

    Objects are counted from 0 in the order of their ids. `op` names the caller in messages.
    """

    row: NDArray[np.integer]
    """Reference object of each pair that shares pixels."""
    column: NDArray[np.integer]
    """Predicted object of each pair."""
    common: NDArray[np.integer]
    """Pixels that each pair shares."""
    sizes: NDArray[np.integer]
    """Pixels of each reference object."""
    other_sizes: NDArray[np.integer]
    """Pixels of each predicted object."""

    def __init__(self, op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> None:
        r, s = (x.ravel() for x in as_maps(op, truth, prediction))
        # Objects are wide: a run of pixels in the same two objects is counted at once.
        first = np.ones(r.shape, bool)
        np.not_equal(r[1:], r[:-1], out=first[1:])
        first[1:] |= s[1:] != s[:-1]
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=r.size)
        r, s = r[starts], s[starts]
        room = 4 * first.size + 1000
        if _highest(r) * _highest(s) > room:
            r, s = _numbered(r), _numbered(s)
        step = _highest(s)
        pair = r.astype(np.int64) * step + s.astype(np.int64)
        if _highest(r) * step <= room:
            table = np.bincount(pair, lengths)
            pairs = np.flatnonzero(table)
            pixels = table[pairs].astype(np.int64)
        else:  # nearly as many objects as pixels
            pairs, index = np.unique(pair, return_inverse=True)
            pixels = np.bincount(index, lengths, len(pairs)).astype(np.int64)
        r, self.sizes = _sizes(pairs // step, pixels)
        s, self.other_sizes = _sizes(pairs % step, pixels)
        inside = (r >= 0) & (s >= 0)
        self.row, self.column, self.common = r[inside], s[inside], pixels[inside]

    @property
    def iou(self) -> NDArray[np.float64]:
        """`|R and S| / |R or S|` of each pair that shares pixels."""
        together = self.sizes[self.row] + self.other_sizes[self.column] - self.common
        ratio: NDArray[np.float64] = self.common / together
        return ratio


def matched(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Marks predicted objects that have an IoU above 0.5 with a reference object.

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Predicted instance map of the same shape.
    """
    table = Overlap("matched", truth, prediction)
    ids = np.unique(prediction[prediction > 0])
    return np.isin(prediction, ids[table.column[table.iou > 0.5]])


def _highest(ids: NDArray[np.integer]) -> int:
    """Returns one more than the greatest id."""
    return int(ids.max(initial=0)) + 1


def _numbered(ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Numbers objects from 1 without gaps; 0 stays."""
    present, index = np.unique(ids, return_inverse=True)
    number: NDArray[np.int64] = index + int(present.size > 0 and present[0] != 0)
    return number


def _sizes(
    ids: NDArray[np.integer], pixels: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Returns each entry's object, from 0 (-1: background), and the pixels of each object."""
    present, index = np.unique(ids, return_inverse=True)
    sizes = np.zeros(len(present), np.int64)
    np.add.at(sizes, index, pixels)
    background = int(present.size > 0 and present[0] == 0)
    return index - background, sizes[background:]


def as_array(value: ArrayLike | Tensor) -> NDArray[Any]:
    """Converts a tensor or what NumPy takes to an array."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def as_images(op: str, truth: Any, prediction: Any) -> list[tuple[Any, Any]]:
    """Pairs the images of two lists, or two single images."""
    lists = [
        isinstance(x, list | tuple) and all(isinstance(y, Tensor) or np.ndim(y) > 1 for y in x)
        for x in (truth, prediction)
    ]
    if not any(lists):
        return [(truth, prediction)]
    one, other = (len(x) if many else 1 for x, many in zip((truth, prediction), lists, strict=True))
    if not all(lists) or one != other:
        raise ValueError(f"{op}: prediction must hold as many images as truth, {one}, got {other}")
    if not one:
        raise ValueError(f"{op}: truth must hold at least one image, got none")
    return list(zip(truth, prediction, strict=True))


def as_maps(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Converts two label maps to arrays, and checks them: integers >= 0 of one shape."""
    arrays = []
    for name, value in (("truth", truth), ("prediction", prediction)):
        array = as_array(value)
        if array.dtype.kind not in "bui":
            raise TypeError(f"{op}: {name} must hold integers or bools, got {array.dtype}")
        if array.size and array.min() < 0:
            raise ValueError(f"{op}: {name} must hold no negative ids, got {array.min()}")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(
            f"{op}: prediction must have the shape of truth, {arrays[0].shape}, "
            f"got {arrays[1].shape}"
        )
    return arrays[0], arrays[1]


def object_errors(
    truth: NDArray[np.integer], found: NDArray[np.integer], part: Any = ...
) -> NDArray[np.uint8]:
    """Tells correct from wrong pixels, object by object; pairs have an IoU above 0.5.

    Args:
        truth: Instance map, 0 background, any shape.
        found: Predicted instance map of the same shape.
        part: Index of the part that is returned; pairs are those of the whole maps.

    Returns:
        For each pixel of the part: 0 background; 1 in both objects of a pair; 2 in a reference
        object without partner, 3 in a predicted one, 4 in one of each; 5 only in the reference
        object of a pair, 6 only in its predicted one.
    """
    # Objects numbered without gaps, in the order of their ids, as in the table of overlaps.
    one, other = (np.searchsorted(np.unique(np.append(x, 0)), x[part]) for x in (truth, found))
    table = Overlap("object_errors", truth, found)
    pairs = table.iou > 0.5
    partner = np.zeros(len(table.sizes) + 1, np.int64)  # of reference objects; 0: none
    partner[table.row[pairs] + 1] = table.column[pairs] + 1
    paired = np.isin(np.arange(len(table.other_sizes) + 1), partner[partner > 0])
    missed, excess = (one > 0) & (partner[one] == 0), (other > 0) & ~paired[other]
    cases = [
        (missed & excess, 4),
        (missed, 2),
        (excess, 3),
        ((one > 0) & (partner[one] == other), 1),
        (one > 0, 5),
        (other > 0, 6),
    ]
    codes: NDArray[np.uint8] = np.select(*zip(*cases, strict=True)).astype(np.uint8)
    return codes
