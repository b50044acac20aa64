"""Sections through volumes, for pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Cut = Callable[[NDArray[Any]], NDArray[Any]]
"""Makes a picture, (H, W), of an image or a volume."""

GAP = 3
"""Pixels between sections."""


def composed(picture: NDArray[Any], below: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """Puts three sections into one picture, (H, W) or (H, W, 3); between them is 0.

    Args:
        picture: Section across Z, (h, w).
        below: Section across Y, (d, w).
        right: Section across X, turned: (h, d).
    """
    height, width = picture.shape[:2]
    sides = height + GAP + len(below), width + GAP + right.shape[1]
    whole = np.zeros((*sides, *picture.shape[2:]), picture.dtype)
    whole[:height, :width] = picture
    whole[height + GAP :, :width] = below
    whole[:height, width + GAP :] = right
    return whole


def cut_of(labels: NDArray[Any], depth: float = 1.0) -> Cut:
    """Returns what draws arrays of the shape of labels: images as they are, volumes in sections.

    The three sections go through the planes across Z, Y and X that hold the most objects.

    Args:
        labels: (H, W) or (D, H, W), 0 where there is no object.
        depth: Size of a voxel along Z, in pixels of the picture.
    """
    if labels.ndim == 2:
        return lambda array: array
    inside = labels > 0
    z, y, x = (
        int(inside.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3)
    )
    count = max(1, round(labels.shape[0] * depth))
    rows = np.minimum((np.arange(count) / depth).astype(int), labels.shape[0] - 1)

    return lambda array: composed(array[z], array[rows, y], array[rows, :, x].T)
