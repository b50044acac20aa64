"""Scores of partitions of an image: how pairs of pixels are split and merged."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .overlap import (
    Overlap,
)

_Shares = tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]


def rand_error(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Rand error of the ISBI 2012 challenge, 1 - V_rand; see :func:`rand_split_merge`."""
    return 1 - rand_of(shares_of("rand_error", truth, prediction)).score


@dataclass(frozen=True)
class SplitMerge:
    """Agreement of two segmentations: its F-score, and the two scores it is made of, in [0, 1]."""

    score: float
    """F-score of `split` and `merge`."""
    split: float
    """Recall: less than 1 where objects are torn apart."""
    merge: float
    """Precision: less than 1 where objects are merged."""


def v_rand(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Foreground-restricted Rand F-score: see :func:`rand_split_merge`."""
    return rand_of(shares_of("v_rand", truth, prediction)).score


def v_info(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Foreground-restricted information F-score: see :func:`info_split_merge`."""
    return info_of(shares_of("v_info", truth, prediction)).score


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
    return rand_of(shares_of("rand_split_merge", truth, prediction))


def info_split_merge(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> SplitMerge:
    """Information scores over the pixels of reference objects.

    With T and S the objects that a pixel of :func:`rand_split_merge` lies in: split = I(T; S) /
    H(S), merge = I(T; S) / H(T). If both entropies are 0 (one reference object, found as one), all
    scores are 1. If only one is 0, the score is 0: a single reference object that is torn has split
    0 and merge 1, several found as one have split 1 and merge 0 (reversed in the challenge's code).

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Instance map of the same shape.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ, or `truth` holds no object.

    Source: as for :func:`rand_split_merge`.
    """
    return info_of(shares_of("info_split_merge", truth, prediction))


def shares_of(op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> _Shares:
    """Counts the pixels of reference objects, and the shares of objects in them.

    Returns:
        The number of pixels; their shares in each reference object, in each predicted object, in
        each overlap of two, and in what is predicted background.
    """
    table = Overlap(op, truth, prediction)
    n = int(table.sizes.sum())
    if n == 0:
        raise ValueError(f"{op}: truth must hold at least one object, got none")
    found = np.bincount(table.column, table.common, len(table.other_sizes))
    alone = 1 - float(table.common.sum()) / n
    return n, table.sizes / n, found / n, table.common / n, alone


def rand_of(shares: _Shares) -> SplitMerge:
    """Computes the Rand scores of :func:`shares_of`."""
    n, objects, found, common, alone = shares
    alone_squared = alone / n  # each of these pixels has a share of 1 / n
    both = float(np.sum(common**2) + alone_squared)
    split = min(1.0, both / float(np.sum(objects**2)))
    merge = min(1.0, both / float(np.sum(found**2) + alone_squared))
    return SplitMerge(2 * split * merge / (split + merge), split, merge)


def info_of(shares: _Shares) -> SplitMerge:
    """Computes the information scores of :func:`shares_of`."""
    n, objects, found, common, alone = shares
    of_alone = alone * math.log(n)  # the entropy of the pixels that are objects of their own
    truth_entropy = _entropy(objects)
    entropy = _entropy(found) + of_alone
    information = max(0.0, truth_entropy + entropy - _entropy(common) - of_alone)
    total = truth_entropy + entropy
    split = min(1.0, information / entropy) if entropy > 0 else 1.0
    merge = min(1.0, information / truth_entropy) if truth_entropy > 0 else 1.0
    return SplitMerge(min(1.0, 2 * information / total) if total > 0 else 1.0, split, merge)


def _entropy(shares: NDArray[np.float64]) -> float:
    shares = shares[shares > 0]
    return float(-np.sum(shares * np.log(shares)))
