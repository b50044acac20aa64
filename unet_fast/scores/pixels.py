"""Scores of masks, pixel by pixel."""

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from .overlap import as_maps


def iou(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Pixel IoU (Jaccard index) of the foreground: `|A and B| / |A or B|`.

    Args:
        truth: Labels or mask, integer or bool, any shape; everything not 0 is foreground.
        prediction: The same, of the same shape.

    Returns:
        A value in [0, 1]; 1 where both have no foreground.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ.
    """
    a, b = as_maps("iou", truth, prediction)
    union = np.count_nonzero((a != 0) | (b != 0))
    both = np.count_nonzero((a != 0) & (b != 0))
    return float(both / union) if union else 1.0


def dice(truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor) -> float:
    """Dice coefficient of the foreground, its F-score: `2 |A and B| / (|A| + |B|)`.

    Args:
        truth: Labels or mask, integer or bool, any shape; everything not 0 is foreground.
        prediction: The same, of the same shape.

    Returns:
        A value in [0, 1]; 1 where both have no foreground.

    Raises:
        TypeError: If a map holds floats.
        ValueError: If shapes differ.
    """
    a, b = as_maps("dice", truth, prediction)
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero((a != 0) & (b != 0)) / total) if total else 1.0


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
    a, b = as_maps("pixel_error", truth, prediction)
    if a.size == 0:
        raise ValueError("pixel_error: truth must hold at least one pixel, got none")
    return float(np.count_nonzero((a != 0) != (b != 0)) / a.size)
