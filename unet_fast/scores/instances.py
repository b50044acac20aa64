"""Scores of instance maps, object by object."""

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike
from torch import Tensor

from .overlap import (
    Images,
    Overlap,
    as_images,
)


def seg(truth: Images, prediction: Images) -> float:
    """SEG of the Cell Tracking Challenge: mean Jaccard index over the reference objects.

    A reference object R is matched by the predicted object S with `|R and S| > |R| / 2`, and scores
    `|R and S| / |R or S|`; without a match it scores 0. Predicted objects without partner cost
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
    scores = [seg_sum(one, other) for one, other in as_images("seg", truth, prediction)]
    total, objects = (sum(column) for column in zip(*scores, strict=True))
    if not objects:
        raise ValueError("seg: truth must hold at least one object, got none")
    return float(total / objects)


def seg_sum(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> tuple[float, int]:
    """Returns the sum of :func:`seg` over an image's reference objects, and their number."""
    table = Overlap("seg", truth, prediction)
    match = 2 * table.common > table.sizes[table.row]
    return float(table.iou[match].sum()), table.sizes.size


@dataclass(frozen=True)
class Detection:
    """Objects found, missed and in excess at a threshold of IoU."""

    found: int
    """Reference objects with a partner of their own (true positives)."""
    missed: int
    """Reference objects without a partner (false negatives)."""
    excess: int
    """Predicted objects without a partner (false positives)."""
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
    """Runs :func:`detection` at several thresholds."""
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
    """Adds up the objects of several images."""
    found = sum(x.found for x in images)
    quality = sum(x.found * x.quality for x in images) / found if found else 0.0
    return Detection(found, sum(x.missed for x in images), sum(x.excess for x in images), quality)


def average_precision(
    truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor, threshold: float = 0.5
) -> float:
    """Average precision, pairs / (pairs + objects without partner); see :func:`detection`."""
    return _detections("average_precision", truth, prediction, [threshold])[0].average_precision
