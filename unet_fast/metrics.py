"""Segmentation metrics, on label maps as given."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def iou(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Pixel IoU (Jaccard index) of the foreground: |A and B| / |A or B|.

    Args:
        truth: Labels or mask, integer or bool, any shape; everything not 0 is foreground.
        prediction: The same, of the same shape.

    Returns:
        A value in [0, 1]; 1 where both have no foreground.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ.
    """
    a, b = _maps("iou", truth, prediction)
    union = np.count_nonzero((a != 0) | (b != 0))
    both = np.count_nonzero((a != 0) & (b != 0))
    return float(both / union) if union else 1.0


def seg(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """SEG of the Cell Tracking Challenge: mean Jaccard index over the reference objects.

    A reference object R is matched by the predicted object S with |R and S| > |R| / 2, and scores
    |R and S| / |R or S|; without a match it scores 0. Predicted objects without partner cost
    nothing.

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Instance map of the same shape.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ, or `truth` holds no object.
    """
    table = _Overlap("seg", truth, prediction)
    if not table.sizes.size:
        raise ValueError("seg: truth must hold at least one object, got none")
    match = 2 * table.common > table.sizes[table.row]
    return float(table.iou[match].sum() / table.sizes.size)


def pixel_error(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Share of the pixels that are foreground in one map and background in the other.

    Args:
        truth: Labels or mask, integer or bool, any shape; everything not 0 is foreground.
        prediction: The same, of the same shape.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ, or there is no pixel.
    """
    a, b = _maps("pixel_error", truth, prediction)
    if a.size == 0:
        raise ValueError("pixel_error: truth must hold at least one pixel, got none")
    return float(np.count_nonzero((a != 0) != (b != 0)) / a.size)


@dataclass(frozen=True)
class SplitMerge:
    """How well two segmentations agree, and on which side they do not. All in [0, 1]."""

    score: float
    """The F-score of the other two."""
    split: float
    """Recall: less than 1 where objects are torn apart."""
    merge: float
    """Precision: less than 1 where objects are merged."""


def v_rand(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Foreground-restricted Rand F-score: see :func:`rand_split_merge`."""
    return rand_split_merge(truth, prediction).score


def v_info(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Foreground-restricted information F-score: see :func:`info_split_merge`."""
    return info_split_merge(truth, prediction).score


def rand_split_merge(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> SplitMerge:
    r"""Rand scores over the pixels of reference objects.

    With p_ij the share of these pixels in reference object i and predicted object j, a_i and b_j
    its sums: split = sum p_ij^2 / sum a_i^2, merge = sum p_ij^2 / sum b_j^2. A pixel that is
    predicted as background counts as a predicted object of its own.

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Instance map of the same shape.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ, or `truth` holds no object.

    Source: I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms
    for connectomics", Frontiers in Neuroanatomy 9, 2015.
    """
    n, objects, found, common, alone = _shares("rand_split_merge", truth, prediction)
    alone_squared = alone / n  # as many objects of 1 / n
    both = float(np.sum(common**2) + alone_squared)
    split = both / float(np.sum(objects**2))
    merge = both / float(np.sum(found**2) + alone_squared)
    return SplitMerge(2 * split * merge / (split + merge), split, merge)


def info_split_merge(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> SplitMerge:
    """Information scores over the pixels of reference objects.

    With T and S the objects that a pixel of :func:`rand_split_merge` lies in: split = I(T; S) /
    H(S), merge = I(T; S) / H(T). If both entropies are 0 (one reference object, found as one), all
    are 1; if one is, its ratio counts as 1 and the other is 0.

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Instance map of the same shape.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ, or `truth` holds no object.

    Source: as for :func:`rand_split_merge`.
    """
    n, objects, found, common, alone = _shares("info_split_merge", truth, prediction)
    of_alone = alone * math.log(n)  # the entropy of the pixels that are objects of their own
    truth_entropy = _entropy(objects)
    entropy = _entropy(found) + of_alone
    information = max(0.0, truth_entropy + entropy - _entropy(common) - of_alone)
    split = min(1.0, information / entropy) if entropy > 0 else 1.0
    merge = min(1.0, information / truth_entropy) if truth_entropy > 0 else 1.0
    total = truth_entropy + entropy
    return SplitMerge(min(1.0, 2 * information / total) if total > 0 else 1.0, split, merge)


@dataclass(frozen=True)
class Detection:
    """Objects found, at an IoU that counts as found."""

    found: int
    """Reference objects with a partner of their own (true positives)."""
    missed: int
    """Reference objects without (false negatives)."""
    excess: int
    """Predicted objects without (false positives)."""
    quality: float
    """Mean IoU of the pairs; 0 without a pair."""

    @property
    def average_precision(self) -> float:
        """Found / (found + missed + excess); 1 if there is no object at all."""
        total = self.found + self.missed + self.excess
        return self.found / total if total else 1.0

    @property
    def f1(self) -> float:
        """2 found / (2 found + missed + excess); 1 if there is no object at all."""
        total = 2 * self.found + self.missed + self.excess
        return 2 * self.found / total if total else 1.0

    @property
    def panoptic_quality(self) -> float:
        """F1 times the mean IoU of the pairs; 1 if there is no object at all."""
        return self.f1 * (self.quality if self.found or self.missed or self.excess else 1.0)


def detection(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> Detection:
    """Pairs reference objects with predicted ones whose IoU exceeds a threshold.

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Instance map of the same shape.
        threshold: In [0.5, 1): above a half each object has one possible partner.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ or the threshold is out of range.

    Source: A. Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4; average precision as
    in the 2018 Data Science Bowl.
    """
    if not 0.5 <= threshold < 1:
        raise ValueError(f"detection: threshold must be in [0.5, 1), got {threshold}")
    table = _Overlap("detection", truth, prediction)
    pairs = table.iou[table.iou > threshold]
    found = pairs.size
    quality = float(pairs.mean()) if found else 0.0
    return Detection(found, table.sizes.size - found, table.other_sizes.size - found, quality)


def average_precision(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> float:
    """Pairs with IoU above `threshold` / (pairs + objects without partner): :func:`detection`."""
    return detection(truth, prediction, threshold).average_precision


class _Overlap:
    """Which objects share how many pixels; a few passes over the pixels, whatever their number."""

    def __init__(self, op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> None:
        (r, count), (s, other_count) = (_numbered(x) for x in _maps(op, truth, prediction))
        places = (count + 1) * (other_count + 1)  # of pairs, 0 being background
        pair = r * (other_count + 1) + s
        if places <= 4 * pair.size:
            pixels = np.bincount(pair, minlength=places)
            pairs = np.flatnonzero(pixels)
            pixels = pixels[pairs]
        else:  # as many objects as pixels, nearly
            pairs, pixels = np.unique(pair, return_counts=True)
        row, column = np.divmod(pairs, other_count + 1)
        inside = (row > 0) & (column > 0)
        self.row, self.column = row[inside] - 1, column[inside] - 1
        self.common = pixels[inside]
        """Pixels that reference object `row` and predicted object `column` share, where any."""
        self.sizes = np.bincount(r, minlength=count + 1)[1:]
        """Pixels of each reference object."""
        self.other_sizes = np.bincount(s, minlength=other_count + 1)[1:]
        """Pixels of each predicted object."""

    @property
    def iou(self) -> NDArray[np.float64]:
        """|R and S| / |R or S| of each such pair."""
        together = self.sizes[self.row] + self.other_sizes[self.column] - self.common
        ratio: NDArray[np.float64] = self.common / together
        return ratio


def _numbered(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], int]:
    """Pixels with objects numbered from 1 without gaps, flat; and how many there are."""
    flat = labels.ravel()
    high = int(flat.max(initial=0))
    if high <= 4 * flat.size + 1000:
        index = flat.astype(np.int64)
        present = np.bincount(index, minlength=high + 1) > 0
        present[0] = False
        numbers = np.where(present, np.cumsum(present), 0)
        return numbers[index], int(present.sum())
    ids, index = np.unique(flat, return_inverse=True)
    background = int(ids[0] == 0)
    return index.astype(np.int64) + 1 - background, len(ids) - background


def _shares(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor
) -> tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """Of the pixels of reference objects: how many; shares.

    These are of each reference object, predicted object, overlap; of what is predicted background.
    """
    table = _Overlap(op, truth, prediction)
    n = int(table.sizes.sum())
    if n == 0:
        raise ValueError(f"{op}: truth must hold at least one object, got none")
    found = np.bincount(table.column, table.common, len(table.other_sizes))
    alone = 1 - float(table.common.sum()) / n
    return n, table.sizes / n, found / n, table.common / n, alone


def _entropy(shares: NDArray[np.float64]) -> float:
    shares = shares[shares > 0]
    return float(-np.sum(shares * np.log(shares)))


def _maps(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    arrays = []
    for name, value in (("truth", truth), ("prediction", prediction)):
        array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
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
