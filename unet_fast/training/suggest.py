"""Suggests settings that fit the images, their objects and the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .._device import find_device
from ..images.folders import label_type_of
from ..images.pairing import find_pairs
from ..unet import UNet
from .config import TrainConfig
from .samples import read_labels_of

TILE = {"cpu": 196, "cuda": 388}
"""Side of a tile, if objects are no wider."""
LARGEST = 388
"""Side of the largest tile that is suggested: the paper's."""


def suggested_settings(config: TrainConfig) -> dict[str, Any]:
    """Suggests settings that fit the sizes of images and objects, and the device.

    Args:
        config: Settings that name images, labels and device.

    Raises:
        ValueError: One line, if files cannot be paired or labels not be read.
    """
    pairs = find_pairs(config.images, config.labels, config.reading).pairs
    maps = [x for pair in pairs for x in read_labels_of(pair, config.reading)]
    kind, ignored = config.label_type, config.reading.ignored
    if kind == "auto":
        kind = label_type_of([] if config.classes else maps, ignored)
    width = 0.0 if config.dims == 3 else width_of(maps, kind, ignored)
    return fitting([x.shape for x in maps], width, config.device)


VOLUMES: dict[str, Any] = {"depth": 3, "padding": "same", "norm": "batch", "dropout": 0.0}
"""Settings for volumes, of which CPUs are fast enough for a narrow network only."""
SIDES = (32, 64, 64)
"""Sides of a tile of a volume, if it is that large."""


def fitting(shapes: Sequence[tuple[int, ...]], width: float, device: str) -> dict[str, Any]:
    """Returns settings for images of these sizes, (H, W), with objects `width` pixels wide.

    Those of volumes, (D, H, W), do not depend on the width.
    """
    kind = "cuda" if find_device(device).type == "cuda" else "cpu"
    if len(shapes[0]) == 3:
        sides = np.median(shapes, axis=0).astype(int).tolist()
        fits = [min(most, -(-side // 8) * 8) for most, side in zip(SIDES, sides, strict=True)]
        return VOLUMES | {
            "tile": fits,
            "base_channels": 32 if kind == "cuda" else 8,
            "optimizer": "adam",
        }
    net = UNet(base_channels=1)
    side = int(np.median([min(shape) for shape in shapes]))
    largest = min(LARGEST, max(TILE[kind], int(np.ceil(width))))  # a tile shows a whole object
    tile = min(largest, max(36, net.output_shape(net.input_shape((side, side)))[0]))
    if tile > side:
        tile = max(20, tile - 16)
    # Adam ended better than the paper's SGD in short runs: docs/training.md.
    return {"tile": tile, "base_channels": 64 if kind == "cuda" else 16, "optimizer": "adam"}


def width_of(maps: Sequence[NDArray[np.int32]], kind: str, ignore_label: int | None) -> float:
    """Returns the diameter of discs as large as an object, which nine in ten do not exceed.

    Args:
        maps: Labels, (H, W) each.
        kind: "instances", or "semantic": connected parts above the smallest value are objects.
        ignore_label: Value of pixels that do not count, or None.
    """
    low = min(int(x.min()) for x in maps) if kind == "semantic" else 0
    areas: list[int] = []
    for labels in maps:
        inside = (labels > low) & (labels != ignore_label)
        ids = ndimage.label(inside)[0] if kind == "semantic" else labels
        areas += np.unique(ids[inside], return_counts=True)[1].tolist()
    return float(np.sqrt(np.percentile(areas, 90) * 4 / np.pi)) if areas else 0.0
