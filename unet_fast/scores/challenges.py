"""Scores of segmentation challenges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from .overlap import as_array, as_pair
from .partitions import SplitMerge, info_of, rand_of, shares_of
from .pixels import dice
from .topology import left_over, warp


@dataclass(frozen=True)
class ISBI2012:
    """Scores of the ISBI 2012 challenge: each is the best mean over slices among the thresholds.

    V_rand and V_info are the scores of the challenge since its workshop; "thinned" ones are taken
    after predicted borders were thinned to one pixel. The three errors ranked the challenge of
    2012.
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
    """Splits and mergers left after :func:`warping`, divided by the number of pixels. Thresholds 0
    and 1 are left out: where all or nothing is predicted, little can be split or merged."""
    thresholds: dict[str, float]
    """Threshold at which each score is best."""


THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))
"""Thresholds of the ISBI 2012 challenge."""


def isbi2012(truth: ArrayLike | Tensor, probability: ArrayLike | Tensor) -> ISBI2012:
    """Computes the scores of the ISBI 2012 challenge (segmentation of neuronal structures in EM).

    At each threshold 0, 0.1, ... 1, pixels of greater probability are foreground, and its
    components connected along the axes are the objects, likewise in the truth. Borders are thinned
    by flooding them from the objects, nearest first, until floods meet. A volume is scored slice by
    slice, as in the challenge: no object continues in the next one.

    Args:
        truth: Integer or bool, (H, W) or (N, H, W), N slices; 0 membrane, else inside of a cell.
        probability: Probability of not being membrane, floats in [0, 1], of the same shape.

    Raises:
        TypeError: If `truth` holds floats or `probability` does not.
        ValueError: If shapes differ, a slice of `truth` has no foreground, or a value is out of
            range.

    Source: I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms
    for connectomics", Frontiers in Neuroanatomy 9, 2015.
    """
    mask, values = as_array(truth), as_array(probability)
    if values.dtype.kind != "f":
        raise TypeError(f"isbi2012: probability must hold floats, got {values.dtype}")
    if mask.ndim not in (2, 3):
        raise ValueError(f"isbi2012: truth must be (H, W) or (N, H, W), got {mask.shape}")
    mask, values = as_pair("isbi2012", mask, values, "probability")
    pairs = [(mask, values)] if mask.ndim == 2 else list(zip(mask, values, strict=True))
    if not pairs:
        raise ValueError("isbi2012: truth must hold at least one slice, got none")
    return best_of([isbi2012_scores(m, p) for m, p in pairs])


def best_of(slices: Sequence[NDArray[np.float64]]) -> ISBI2012:
    """Returns the best means over slices, given their scores by :func:`isbi2012_scores`."""
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
    """Returns all scores of one slice, (thresholds, scores); arguments as for :func:`isbi2012`.

    Raises:
        ValueError: If the slice is not (H, W), has no foreground, or shapes differ.
    """
    if truth.ndim != 2 or truth.shape != probability.shape:
        raise ValueError(
            f"isbi2012_scores: truth and probability must be a slice, (H, W), got {truth.shape} "
            f"and {probability.shape}"
        )
    cells = truth != 0
    objects = ndimage.label(cells)[0]
    rows = []
    for threshold in THRESHOLDS:
        mask = probability > threshold
        found = ndimage.label(mask)[0]
        row: list[float] = []
        shares = [shares_of("isbi2012", objects, x) for x in (found, thinned(found))]
        for score in (*(rand_of(x) for x in shares), *(info_of(x) for x in shares)):
            row += [score.score, score.split, score.merge]
        row.append(dice(cells, mask))
        error = 1.0  # left out at thresholds 0 and 1
        if 0 < threshold < 1:
            left = left_over(warp(cells, mask, np.abs(probability - threshold)), mask)
            error = (left.splits + left.mergers) / truth.size
        row.append(error)
        rows.append(row)
    return np.array(rows)


def thinned(objects: NDArray[np.integer]) -> NDArray[np.integer]:
    """Grows objects until the background between them is one pixel wide, as in ISBI 2012.

    Args:
        objects: Instance map, integer, 0 background, any shape.
    """
    if not objects.any():
        return objects
    # Floods that rise step by step along the axes give each pixel the object nearest in steps.
    nearest = ndimage.distance_transform_cdt(
        objects == 0, "taxicab", return_distances=False, return_indices=True
    )
    grown: NDArray[np.integer] = objects[tuple(nearest)]
    for axis in range(objects.ndim):
        ids, old = grown.swapaxes(0, axis), objects.swapaxes(0, axis)
        one, other = ids[:-1], ids[1:]
        meets = (one != other) & (one > 0) & (other > 0)
        # Where two meet, at least one pixel was background: the border runs there.
        other[meets & (old[1:] == 0)] = 0
        one[meets & (old[1:] > 0)] = 0
    return grown
