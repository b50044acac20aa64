"""Segmentation metrics of label maps, taken as they are: of pixels, objects and partitions."""

from .scores.challenges import ISBI2012, THRESHOLDS, best_of, isbi2012, isbi2012_scores, thinned
from .scores.instances import (
    Detection,
    average_precision,
    detection,
    detections,
    pooled,
    seg,
    seg_sum,
)
from .scores.overlap import Overlap, matched
from .scores.partitions import (
    SplitMerge,
    info_split_merge,
    rand_error,
    rand_split_merge,
    v_info,
    v_rand,
)
from .scores.pixels import dice, iou, pixel_error
from .scores.topology import Warping, warping, warping_error

__all__ = [
    "ISBI2012",
    "THRESHOLDS",
    "Detection",
    "Overlap",
    "SplitMerge",
    "Warping",
    "average_precision",
    "best_of",
    "detection",
    "detections",
    "dice",
    "info_split_merge",
    "iou",
    "isbi2012",
    "isbi2012_scores",
    "matched",
    "pixel_error",
    "pooled",
    "rand_error",
    "rand_split_merge",
    "seg",
    "seg_sum",
    "thinned",
    "v_info",
    "v_rand",
    "warping",
    "warping_error",
]
