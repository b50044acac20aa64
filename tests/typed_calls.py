"""Calls whose types mypy checks, as a trainer of one's own makes them; `test_types` runs them.

A call that mypy must refuse has a `type: ignore`, and mypy refuses one that it does not need.
"""

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_fast import UNet, elastic_deform, predict

IMAGE, LABELS = torch.zeros(1, 1, 8, 9), torch.zeros(1, 8, 9, dtype=torch.int32)
ARRAY, IDS = np.zeros((1, 1, 8, 9), np.float32), np.zeros((1, 8, 9), np.int32)
NET = UNet(base_channels=1, depth=1)
Arrays = tuple[NDArray[Any], NDArray[Any]]


def results() -> list[tuple[object, object]]:
    """Results of calls, each with one of the type that it must have."""
    return [
        (assert_type(elastic_deform(IMAGE, order=0), Tensor), IMAGE),
        (assert_type(elastic_deform(IMAGE, labels=LABELS)[1], Tensor), LABELS),
        (assert_type(elastic_deform(None, labels=LABELS), Tensor), LABELS),
        (assert_type(elastic_deform(ARRAY, boundary="constant", cval=1), NDArray[Any]), ARRAY),
        (assert_type(elastic_deform(ARRAY, labels=IDS), Arrays), (ARRAY, IDS)),
        (assert_type(elastic_deform(None, labels=IDS), NDArray[Any]), IDS),
        (assert_type(predict(NET, IMAGE[0]), Tensor), IMAGE),
        (assert_type(predict(NET, ARRAY.reshape(8, 9)), NDArray[Any]), ARRAY),
    ]


def unknown_setting() -> None:
    """Names a setting that there is not."""
    elastic_deform(IMAGE, boundry="mirror")  # type: ignore[call-overload]


def wrong_setting() -> None:
    """Gives a setting of another type."""
    elastic_deform(IMAGE, grid_spacing=["a"])  # type: ignore[list-item]
