"""Segmentation metrics, on label maps as given."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
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
    a, b = _maps("seg", truth, prediction)
    ids, r = np.unique(a, return_inverse=True)
    others, s = np.unique(b, return_inverse=True)
    if not (ids != 0).any():
        raise ValueError("seg: truth must hold at least one object, got none")
    overlap = sparse.coo_array(
        (np.ones(r.size, dtype=np.int64), (r.ravel(), s.ravel())), shape=(len(ids), len(others))
    )
    overlap.sum_duplicates()  # pixels that a reference and a predicted object share
    row, column, common = overlap.row, overlap.col, overlap.data
    size, other_size = overlap.sum(1), overlap.sum(0)
    match = (ids[row] != 0) & (others[column] != 0) & (2 * common > size[row])
    scores = common[match] / (size[row] + other_size[column] - common)[match]
    return float(scores.sum() / np.count_nonzero(ids))


def _maps(
    op: str, truth: ArrayLike | Tensor, prediction: ArrayLike | Tensor
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    arrays = []
    for name, value in (("truth", truth), ("prediction", prediction)):
        array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.kind not in "bui":
            raise TypeError(f"{op}: {name} must hold integers or bools, got {array.dtype}")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(
            f"{op}: prediction must have the shape of truth, {arrays[0].shape}, "
            f"got {arrays[1].shape}"
        )
    return arrays[0], arrays[1]
