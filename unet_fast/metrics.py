"""Segmentation metrics, on label maps as given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from .warping import Warping, left_over, warp

Images = ArrayLike | Tensor | Sequence[ArrayLike | Tensor]

_Shares = tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]


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


def dice(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Dice coefficient of the foreground, its F-score: 2 |A and B| / (|A| + |B|).

    Args:
        truth: Labels or mask, integer or bool, any shape; everything not 0 is foreground.
        prediction: The same, of the same shape.

    Returns:
        A value in [0, 1]; 1 where both have no foreground.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ.
    """
    a, b = _maps("dice", truth, prediction)
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero((a != 0) & (b != 0)) / total) if total else 1.0


def seg(truth: Images, prediction: Images) -> float:
    """SEG of the Cell Tracking Challenge: mean Jaccard index over the reference objects.

    A reference object R is matched by the predicted object S with |R and S| > |R| / 2, and scores
    |R and S| / |R or S|; without a match it scores 0. Predicted objects without partner cost
    nothing.

    Args:
        truth: Instance map, integer, 0 background, any shape (a stack is one volume: equal ids
            are one object); or a list of the maps of several images, whose objects all count
            alike.
        prediction: Instance map of the same shape; or a list of as many.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes or numbers of images differ, or `truth` holds no object.

    Source: M. Maska et al., "A benchmark for comparison of cell tracking algorithms",
    Bioinformatics 30, 2014.
    """
    scores = [seg_sum(one, other) for one, other in _images("seg", truth, prediction)]
    total, objects = (sum(column) for column in zip(*scores, strict=True))
    if not objects:
        raise ValueError("seg: truth must hold at least one object, got none")
    return float(total / objects)


def seg_sum(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> tuple[float, int]:
    """The sum of :func:`seg` over the reference objects of an image, and how many there are."""
    table = Overlap("seg", truth, prediction)
    match = 2 * table.common > table.sizes[table.row]
    return float(table.iou[match].sum()), table.sizes.size


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


def rand_error(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """1 - V_rand: the Rand error of the ISBI 2012 challenge. See :func:`rand_split_merge`."""
    return 1 - _rand(_shares("rand_error", truth, prediction)).score


def warping_error(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> float:
    """Share of the pixels that stay wrong after :func:`warping`.

    Args:
        truth: As there.
        prediction: As there.
        threshold: As there.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: As there.
        ValueError: As there.
    """
    found = _warped("warping_error", truth, prediction, threshold)
    return found.pixels / _array(truth).size


def warping(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> Warping:
    """What stays wrong once the borders of the truth have moved towards those of the prediction.

    Only simple points change, pixels whose change leaves the topology as it is (foreground is
    connected along the axes), the ones of clearest prediction first.

    Args:
        truth: Labels or mask, integer or bool, (H, W); everything not 0 is foreground.
        prediction: Labels or mask alike; or floats in [0, 1], the probability of foreground.
        threshold: In [0, 1]; above it a probability is foreground. Of no matter for masks.

    Raises:
        TypeError: If `truth` holds floats.
        ValueError: If shapes differ or are not (H, W), there is no pixel, or a value is out of
            range.

    Source: V. Jain et al., "Boundary Learning by Optimization with Topological Constraints", CVPR
    2010; the groups as in I. Arganda-Carreras et al. 2015.
    """
    return _warped("warping", truth, prediction, threshold)


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
    return _rand(_shares("v_rand", truth, prediction)).score


def v_info(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Foreground-restricted information F-score: see :func:`info_split_merge`."""
    return _info(_shares("v_info", truth, prediction)).score


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
    return _rand(_shares("rand_split_merge", truth, prediction))


def info_split_merge(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> SplitMerge:
    """Information scores over the pixels of reference objects.

    With T and S the objects that a pixel of :func:`rand_split_merge` lies in: split = I(T; S) /
    H(S), merge = I(T; S) / H(T). If both entropies are 0 (one reference object, found as one), all
    are 1. If one is, the score is 0: a single reference object that is torn has split 0 and merge
    1, several found as one have split 1 and merge 0 (the challenge's code has it the other way).

    Args:
        truth: Instance map, integer, 0 background, any shape.
        prediction: Instance map of the same shape.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ, or `truth` holds no object.

    Source: as for :func:`rand_split_merge`.
    """
    return _info(_shares("info_split_merge", truth, prediction))


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
    return _detections("detection", truth, prediction, [threshold])[0]


def detections(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, thresholds: Sequence[float]
) -> list[Detection]:
    """:func:`detection` at several thresholds."""
    return _detections("detections", truth, prediction, thresholds)


def _detections(
    op: str,
    truth: ArrayLike | Tensor,
    prediction: ArrayLike | Tensor,
    thresholds: Sequence[float],
) -> list[Detection]:
    for threshold in thresholds:
        if not 0.5 <= threshold < 1:
            raise ValueError(f"{op}: threshold must be in [0.5, 1), got {threshold}")
    table = Overlap(op, truth, prediction)
    result = []
    for threshold in thresholds:
        pairs = table.iou[table.iou > threshold]
        found = pairs.size
        quality = float(pairs.mean()) if found else 0.0
        missed, excess = table.sizes.size - found, table.other_sizes.size - found
        result.append(Detection(found, missed, excess, quality))
    return result


def pooled(images: Sequence[Detection]) -> Detection:
    """All objects of several images together."""
    found = sum(x.found for x in images)
    quality = sum(x.found * x.quality for x in images) / found if found else 0.0
    return Detection(found, sum(x.missed for x in images), sum(x.excess for x in images), quality)


def average_precision(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> float:
    """Pairs with IoU above `threshold` / (pairs + objects without partner): :func:`detection`."""
    return _detections("average_precision", truth, prediction, [threshold])[0].average_precision


@dataclass(frozen=True)
class ISBI2012:
    """Scores of the ISBI 2012 challenge: each the best over the thresholds of the mean of slices.

    V_rand and V_info are those of the challenge since its workshop, "thinned" after the predicted
    borders were thinned to one pixel; the last three are those of the ranking of 2012.
    """

    v_rand: SplitMerge
    v_rand_thinned: SplitMerge
    v_info: SplitMerge
    v_info_thinned: SplitMerge
    pixel_error: float
    """1 - F-score of the foreground pixels."""
    rand_error: float
    """1 - V_rand."""
    warping_error: float
    """Splits and mergers left after :func:`warping`, by the number of pixels; of the thresholds
    between 0 and 1, for where all or nothing is predicted, little is left to split or merge."""
    thresholds: dict[str, float]
    """Where each of them is best."""


THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))
"""Of the ISBI 2012 challenge."""


def isbi2012(truth: ArrayLike | Tensor, probability: ArrayLike | Tensor) -> ISBI2012:
    """The scores of the ISBI 2012 challenge (segmentation of neuronal structures in EM).

    At thresholds 0, 0.1, ... 1 pixels of greater probability are foreground; its parts that are
    connected along the axes are the objects, likewise in the truth. Borders are thinned by
    flooding them from the objects, nearest first, until floods meet.

    Args:
        truth: Integer or bool, (H, W) or (N, H, W), N slices; 0 membrane, else inside of a cell.
        probability: Of not being membrane, floats in [0, 1], of that shape.

    Raises:
        TypeError: If `truth` holds floats or `probability` does not.
        ValueError: If shapes differ, a slice of `truth` has no foreground, or a value is out of
            range.

    Source: I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms
    for connectomics", Frontiers in Neuroanatomy 9, 2015.
    """
    mask, values = _array(truth), _array(probability)
    if values.dtype.kind != "f":
        raise TypeError(f"isbi2012: probability must hold floats, got {values.dtype}")
    if mask.ndim not in (2, 3):
        raise ValueError(f"isbi2012: truth must be (H, W) or (N, H, W), got {mask.shape}")
    mask, values = _pair("isbi2012", mask, values, "probability")
    pairs = [(mask, values)] if mask.ndim == 2 else list(zip(mask, values, strict=True))
    if not pairs:
        raise ValueError("isbi2012: truth must hold at least one slice, got none")
    return best_of([isbi2012_scores(m, p) for m, p in pairs])


def best_of(slices: Sequence[NDArray[np.float64]]) -> ISBI2012:
    """The best means over slices, of which :func:`isbi2012_scores` gave the scores."""
    means = np.mean(slices, 0)
    best: dict[str, int] = {}
    for name in _SCORES:
        column = means[:, _SCORES[name]]
        if name == "warping_error":
            best[name] = 1 + int(column[1:-1].argmin())
        else:
            best[name] = int(column.argmax())

    def parts(name: str) -> SplitMerge:
        return SplitMerge(*means[best[name], _SCORES[name] : _SCORES[name] + 3].tolist())

    return ISBI2012(
        v_rand=parts("v_rand"),
        v_rand_thinned=parts("v_rand_thinned"),
        v_info=parts("v_info"),
        v_info_thinned=parts("v_info_thinned"),
        pixel_error=1 - float(means[best["pixel_error"], _SCORES["pixel_error"]]),
        rand_error=1 - float(means[best["v_rand"], _SCORES["v_rand"]]),
        warping_error=float(means[best["warping_error"], _SCORES["warping_error"]]),
        thresholds={name: THRESHOLDS[i] for name, i in best.items()},
    )


_SCORES = {
    **{"v_rand": 0, "v_rand_thinned": 3, "v_info": 6, "v_info_thinned": 9},
    **{"pixel_error": 12, "warping_error": 13},
}
"""Columns of :func:`isbi2012_scores`."""


def isbi2012_scores(
    truth: NDArray[np.integer], probability: NDArray[np.floating]
) -> NDArray[np.float64]:
    """All scores of one slice, (thresholds, scores); arguments as for :func:`isbi2012`."""
    cells = truth != 0
    objects = ndimage.label(cells)[0]
    rows = []
    for threshold in THRESHOLDS:
        mask = probability > threshold
        found = ndimage.label(mask)[0]
        row: list[float] = []
        shares = [_shares("isbi2012", objects, x) for x in (found, thinned(found))]
        for score in (*(_rand(x) for x in shares), *(_info(x) for x in shares)):
            row += [score.score, score.split, score.merge]
        row.append(dice(cells, mask))
        error = 1.0  # not looked at: see ISBI2012
        if 0 < threshold < 1:
            left = left_over(warp(cells, mask, np.abs(probability - threshold)), mask)
            error = (left.splits + left.mergers) / truth.size
        row.append(error)
        rows.append(row)
    return np.array(rows)


def thinned(objects: NDArray[np.integer]) -> NDArray[np.integer]:
    """Objects grown into the background between them until one pixel is left, as ISBI 2012 asks."""
    if not objects.any():
        return objects
    # Floods that rise step by step along the axes bring each pixel the object nearest in steps.
    nearest = ndimage.distance_transform_cdt(
        objects == 0, "taxicab", return_distances=False, return_indices=True
    )
    grown: NDArray[np.integer] = objects[tuple(nearest)]
    for ids, old in ((grown, objects), (grown.T, objects.T)):
        one, other = ids[:-1], ids[1:]
        meets = (one != other) & (one > 0) & (other > 0)
        # Of two that meet, one at least was background: the line runs there.
        other[meets & (old[1:] == 0)] = 0
        one[meets & (old[1:] > 0)] = 0
    return grown


def _warped(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float
) -> Warping:
    if not 0 <= threshold <= 1:
        raise ValueError(f"{op}: threshold must be in [0, 1], got {threshold}")
    values = _array(prediction)
    if values.dtype.kind == "f":
        mask, values = _pair(op, _array(truth), values, "prediction")
        found, urgency = values > threshold, np.abs(values - threshold)
    else:
        mask, labels = _maps(op, truth, prediction)
        found, urgency = labels != 0, np.zeros(labels.shape)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"{op}: truth must be (H, W) with a pixel at least, got {mask.shape}")
    return left_over(warp(mask != 0, found, urgency), found)


def _pair(
    op: str, truth: NDArray[Any], probability: NDArray[Any], name: str
) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
    """A map and probabilities, checked."""
    _maps(op, truth, truth)
    if probability.shape != truth.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of truth, {truth.shape}, got {probability.shape}"
        )
    if not ((probability >= 0) & (probability <= 1)).all():
        wrong = probability[~((probability >= 0) & (probability <= 1))][0]
        raise ValueError(f"{op}: {name} must be in [0, 1], got {wrong}")
    return truth, probability


class Overlap:
    """Which objects share how many pixels; a few passes over the pixels, whatever their number.

    Objects are counted from 0 in the order of their ids. `op` is who asks, for messages.
    """

    row: NDArray[np.integer]
    """Of each reference object and predicted object that share pixels, the former."""
    column: NDArray[np.integer]
    """The latter."""
    common: NDArray[np.integer]
    """How many they share."""
    sizes: NDArray[np.integer]
    """Pixels of each reference object."""
    other_sizes: NDArray[np.integer]
    """Pixels of each predicted object."""

    def __init__(self, op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> None:
        r, s = (x.ravel() for x in _maps(op, truth, prediction))
        # Objects are wide: of a run of pixels in the same two, only the first is looked at.
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
        else:  # as many objects as pixels, nearly
            pairs, index = np.unique(pair, return_inverse=True)
            pixels = np.bincount(index, lengths, len(pairs)).astype(np.int64)
        r, self.sizes = _sizes(pairs // step, pixels)
        s, self.other_sizes = _sizes(pairs % step, pixels)
        inside = (r >= 0) & (s >= 0)
        self.row, self.column, self.common = r[inside], s[inside], pixels[inside]

    @property
    def iou(self) -> NDArray[np.float64]:
        """|R and S| / |R or S| of each such pair."""
        together = self.sizes[self.row] + self.other_sizes[self.column] - self.common
        ratio: NDArray[np.float64] = self.common / together
        return ratio


def matched(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where predicted objects are that have an IoU above 0.5 with a reference object.

    Args:
        truth: Instance map, (H, W), 0 background.
        prediction: The predicted one.
    """
    table = Overlap("matched", truth, prediction)
    ids = np.unique(prediction[prediction > 0])
    return np.isin(prediction, ids[table.column[table.iou > 0.5]])


def _highest(ids: NDArray[np.integer]) -> int:
    """One more than the greatest."""
    return int(ids.max(initial=0)) + 1


def _numbered(ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Objects numbered from 1 without gaps; 0 stays."""
    present, index = np.unique(ids, return_inverse=True)
    number: NDArray[np.int64] = index + int(present.size > 0 and present[0] != 0)
    return number


def _sizes(
    ids: NDArray[np.integer], pixels: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Which object, from 0, each entry of a table belongs to, -1 background; pixels of each."""
    present, index = np.unique(ids, return_inverse=True)
    sizes = np.zeros(len(present), np.int64)
    np.add.at(sizes, index, pixels)
    background = int(present.size > 0 and present[0] == 0)
    return index - background, sizes[background:]


def _shares(op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> _Shares:
    """Of the pixels of reference objects: how many; shares.

    These are of each reference object, predicted object, overlap; of what is predicted background.
    """
    table = Overlap(op, truth, prediction)
    n = int(table.sizes.sum())
    if n == 0:
        raise ValueError(f"{op}: truth must hold at least one object, got none")
    found = np.bincount(table.column, table.common, len(table.other_sizes))
    alone = 1 - float(table.common.sum()) / n
    return n, table.sizes / n, found / n, table.common / n, alone


def _rand(shares: _Shares) -> SplitMerge:
    n, objects, found, common, alone = shares
    alone_squared = alone / n  # as many objects of 1 / n
    both = float(np.sum(common**2) + alone_squared)
    split = both / float(np.sum(objects**2))
    merge = both / float(np.sum(found**2) + alone_squared)
    return SplitMerge(2 * split * merge / (split + merge), split, merge)


def _info(shares: _Shares) -> SplitMerge:
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


def _array(value: ArrayLike | Tensor) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _images(op: str, truth: Any, prediction: Any) -> list[tuple[Any, Any]]:
    """The images of lists, or the one image."""
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


def _maps(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    arrays = []
    for name, value in (("truth", truth), ("prediction", prediction)):
        array = _array(value)
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
