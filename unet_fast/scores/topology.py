"""The warping error: what remains wrong once borders may move without changing the topology.

Foreground is connected along the axes, background diagonally too; beyond the frame is background.

Source: V. Jain et al., "Boundary Learning by Optimization with Topological Constraints", CVPR 2010.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from .overlap import as_array, as_maps, as_pair

Mask = NDArray[np.bool_]

_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
"""The eight neighbours in a circle, as bits 0 to 7 of a code; odd bits lie along the axes."""


def _is_simple(code: int) -> bool:
    """Whether a pixel with such foreground neighbours can change without changing the topology.

    It can if the connectivity number is 1: the sum over the neighbours x_k along the axes of
    x_k - x_k x_k+1 x_k+2. Source: S. Yokoi et al., "Topological properties in digitized binary
    pictures", Systems, Computers, Controls 4, 1973.
    """
    x = [code >> k & 1 for k in range(8)]
    return sum(x[k] - x[k] * x[(k + 1) % 8] * x[(k + 2) % 8] for k in (1, 3, 5, 7)) == 1


_SIMPLE = bytes(_is_simple(code) for code in range(256))


def warp(truth: Mask, wanted: Mask, urgency: NDArray[np.floating]) -> Mask:
    """Moves the borders of one mask towards those of another without changing its topology.

    Sweeps over the pixels that differ, the most urgent first (ties row by row), flipping each that
    is simple at that moment, until a sweep flips none.

    Args:
        truth: Mask to change, (H, W).
        wanted: Mask to approach, (H, W).
        urgency: Priority of each pixel, greater first, (H, W).
    """
    width = truth.shape[1] + 2
    pixels = bytearray(np.pad(truth, 1).astype(np.uint8).tobytes())
    different = np.pad(truth != wanted, 1).ravel()
    places = np.flatnonzero(different)
    places = places[np.argsort(-np.pad(urgency, 1).ravel()[places], kind="stable")]
    count = len(places)
    rank = np.full(different.size, -1)
    rank[places] = np.arange(count)
    ranks, order = rank.tolist(), places.tolist()
    ring = [row * width + column for row, column in _RING]
    around = tuple(enumerate(ring))
    # A pixel that was not simple can become so only after a neighbour has changed, so a sweep
    # visits no others. A turn is sweep * count + rank; the list of all first turns is already a
    # heap.
    turns = list(range(count))
    waiting = bytearray(different.astype(np.uint8).tobytes())
    while turns:
        turn = heapq.heappop(turns)
        sweep, position = divmod(turn, count)
        place = order[position]
        waiting[place] = 0
        code = 0
        for k, step in around:
            code |= pixels[place + step] << k
        if not _SIMPLE[code]:
            continue
        pixels[place] ^= 1
        ranks[place] = -1
        for step in ring:
            other = place + step
            other_rank = ranks[other]
            if other_rank >= 0 and not waiting[other]:
                waiting[other] = 1
                later = sweep if other_rank > position else sweep + 1
                heapq.heappush(turns, later * count + other_rank)
    result = np.frombuffer(pixels, np.uint8).reshape(-1, width)[1:-1, 1:-1]
    return result.astype(bool)


@dataclass(frozen=True)
class Warping:
    """The differences that :func:`warping` leaves."""

    pixels: int
    """Pixels that differ."""
    splits: int
    """Connected groups of missing pixels that tear an object apart."""
    mergers: int
    """Connected groups of excess pixels that join objects."""
    deletions: int
    """Connected groups of missing pixels that are a whole object."""
    additions: int
    """Connected groups of excess pixels that are an object by themselves."""


def left_over(warped: Mask, wanted: Mask) -> Warping:
    """Classifies the differences that :func:`warp` leaves, by how many objects each group touches.

    Groups that touch one object make or fill a hole of it, and count as pixels only.
    """
    objects = ndimage.label(warped)[0]
    excess, missing = wanted & ~warped, warped & ~wanted
    groups, number = ndimage.label(excess)
    joined = _neighbours(groups, number, objects)
    # A group of missing pixels is connected like background, diagonally too, but within its object.
    groups = ndimage.label(missing, np.ones((3, 3)))[0]
    _, index = np.unique(np.stack([groups[missing], objects[missing]]), axis=1, return_inverse=True)
    groups[missing] = index + 1
    torn = _neighbours(groups, int(groups.max(initial=0)), ndimage.label(warped & wanted)[0])
    return Warping(
        pixels=int(np.count_nonzero(warped != wanted)),
        splits=int(np.count_nonzero(torn > 1)),
        mergers=int(np.count_nonzero(joined > 1)),
        deletions=int(np.count_nonzero(torn == 0)),
        additions=int(np.count_nonzero(joined == 0)),
    )


def _neighbours(
    groups: NDArray[np.integer], number: int, objects: NDArray[np.integer]
) -> NDArray[np.integer]:
    """Returns how many objects each of the groups 1... touches along the axes."""
    pairs = []
    for a, b in ((groups, objects), (groups.T, objects.T)):
        pairs += [(a[1:].ravel(), b[:-1].ravel()), (a[:-1].ravel(), b[1:].ravel())]
    group, other = (np.concatenate(part) for part in zip(*pairs, strict=True))
    met = (group > 0) & (other > 0)
    unique = np.unique(np.stack([group[met], other[met]]), axis=1)[0]
    return np.bincount(unique, minlength=number + 1)[1:]


def warping_error(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> float:
    """Share of the pixels that stay wrong after :func:`warping`.

    Args:
        truth: Labels or mask, integer or bool, (H, W); everything not 0 is foreground.
        prediction: Labels or mask alike; or floats in [0, 1], the probability of foreground.
        threshold: In [0, 1]; above it a probability is foreground.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: If `truth` holds floats.
        ValueError: If shapes differ or are not (H, W), there is no pixel, or a value is out of
            range.
    """
    found = _warped("warping_error", truth, prediction, threshold)
    return found.pixels / as_array(truth).size


def warping(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> Warping:
    """Classifies what stays wrong after borders of the truth moved towards those of the prediction.

    Only simple points change, those whose change leaves the topology as it is (foreground is
    connected along the axes), and those of clearest prediction first.

    Args:
        truth: Labels or mask, integer or bool, (H, W); everything not 0 is foreground.
        prediction: Labels or mask alike; or floats in [0, 1], the probability of foreground.
        threshold: In [0, 1]; above it a probability is foreground. Ignored for masks.

    Raises:
        TypeError: If `truth` holds floats.
        ValueError: If shapes differ or are not (H, W), there is no pixel, or a value is out of
            range.

    Source: V. Jain et al., "Boundary Learning by Optimization with Topological Constraints", CVPR
    2010; the groups as in I. Arganda-Carreras et al. 2015.
    """
    return _warped("warping", truth, prediction, threshold)


def _warped(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float
) -> Warping:
    if not 0 <= threshold <= 1:
        raise ValueError(f"{op}: threshold must be in [0, 1], got {threshold}")
    values = as_array(prediction)
    if values.dtype.kind == "f":
        mask, values = as_pair(op, as_array(truth), values, "prediction")
        found, urgency = values > threshold, np.abs(values - threshold)
    else:
        mask, labels = as_maps(op, truth, prediction)
        found, urgency = labels != 0, np.zeros(labels.shape)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{op}: truth must be (H, W) with a pixel at least, got {mask.shape}")
    return left_over(warp(mask != 0, found, urgency), found)
