"""Tiles of an image such that their predictions agree with that of the whole image.

Think of the image as continued by mirroring into an infinite plane, and of the network as running
over all of it, its poolings aligned to multiples of 2^depth. The prediction is the part of its
output inside the image. A part of the plane gives the same numbers on two conditions: its origin is
a multiple of 2^depth, because the network commutes with those shifts only; and it reaches beyond
the pixels that are kept as far as the network's receptive field. docs/prediction.md has the proof.
"""

import math
import warnings
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .._progress import counted
from ..unet import UNet

LARGEST = {"cpu": 1024, "cuda": 2048}
"""Longest side of a tile that is chosen here. Larger ones are slower on a CPU, because they need
memory that is not in its caches, and gain little on a GPU."""
BUDGET = {"cpu": 2**30, "cuda": 2**32}
"""Default memory for the tiles being processed, in bytes. Constant rather than what is free at the
moment, so that the same call gives the same bits."""
_WORKSPACE = 1.25
"""Factor for the memory of convolutions beside their results; measured on CPUs."""


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image for a network: equal, side by side from pixel (0, 0) on."""

    image: tuple[int, int]
    tile: tuple[int, int]
    """Sides of the part of the output that is kept: multiples of 2^depth, or the image's side if
    that is less. The last tiles may reach beyond the image."""
    halo: int
    """Pixels of the output that are dropped on each side of the tile."""
    border: int
    """Pixels from the first pixel of the network's input to that of the tile, along each axis."""
    input: tuple[int, int]
    """Spatial shape of the network's input."""
    batch: int
    """Tiles in a batch."""

    @property
    def origins(self) -> list[tuple[int, int]]:
        """First pixel of each tile, row by row."""
        rows, columns = (range(0, n, t) for n, t in zip(self.image, self.tile, strict=True))
        return [(row, column) for row in rows for column in columns]

    @property
    def is_whole(self) -> bool:
        """Whether one tile covers the image."""
        return len(self.origins) == 1


def plan(
    model: UNet,
    image: tuple[int, int],
    *,
    device: str = "cpu",
    value_bytes: int = 4,
    tile: int | Sequence[int] | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> Tiling:
    """Chooses the tiles of an image.

    Args:
        model: The network.
        image: Size of the image in pixels, (H, W).
        device: "cpu" or "cuda".
        value_bytes: Bytes of one activation of the network.
        tile: Side or sides of a tile, >= 1, rounded up to multiples of 2^depth; None: the largest
            that the budget holds, up to :data:`LARGEST`.
        memory_budget: Bytes for the tiles being processed, besides the network, the image and the
            result. None: :data:`BUDGET`, or what a given tile takes.
        batch_size: Tiles in a batch, >= 1; None: as many as have the pixels of the largest tile, if
            the budget holds them.

    Raises:
        ValueError: If an argument breaks its rule, the budget holds no tile, or the network cannot
            be tiled and the image is larger than a tile.
    """
    for name, count in (("memory_budget", memory_budget), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise ValueError(f"predict: {name} must be >= 1, got {count}")
    sizes = {*model.kernels}, {*model.poolings}
    if sizes != ({(3, 3)}, {(2, 2)}):
        raise ValueError(
            "predict: model must have two axes, kernels of 3 x 3 and poolings of 2 x 2, got "
            f"kernels {model.kernels} and poolings {model.poolings}"
        )
    sides = (tile, tile) if isinstance(tile, int) else tile
    if sides is not None and (len(sides) != 2 or any(side < 1 for side in sides)):
        raise ValueError(f"predict: tile must be one or two sides >= 1, got {tile}")
    step = 2**model.depth
    if sides is not None and min(sides) < step:  # not for every rounding: the result is the same
        warnings.warn(
            f"predict: tile {min(sides)} becomes {step} where the image is larger: 2^{model.depth} "
            f"is the smallest for depth {model.depth}",
            stacklevel=2,
        )
    reason = not_tileable(model)
    budget = BUDGET[device] if memory_budget is None else memory_budget
    if sides is None and reason is None:
        made = _fitting(model, image, LARGEST[device], budget, value_bytes)
    else:
        made = _tiling(model, image, sides or image)
    if reason and not made.is_whole:
        raise ValueError(f"predict: tile must cover the image, for {reason}, got {tile}")
    needed = tile_bytes(model, made, value_bytes) * (batch_size or 1)
    if memory_budget is not None and needed > memory_budget:
        tiles = " x ".join(map(str, made.tile))
        raise ValueError(
            f"predict: memory_budget must hold {counted(batch_size or 1, 'tile')} of {tiles} pixels"
            f"{f', for {reason}' if reason else ''}: {needed} bytes, got {memory_budget}"
        )
    if batch_size is None:  # small tiles are bundled until they are as much work as a large one
        pixels = made.tile[0] * made.tile[1]
        batch_size = max(1, min(budget // needed, LARGEST[device] ** 2 // pixels))
    return replace(made, batch=min(batch_size, len(made.origins)))


def _fitting(
    model: UNet, image: tuple[int, int], largest: int, budget: int, value_bytes: int
) -> Tiling:
    """Returns the largest tiles of about equal sides that the budget allows."""

    def tiles(side: int) -> Tiling:
        # Equal parts leave no narrow rest, whose halo would cost more than its pixels.
        parts = [-(-n // side) for n in image]
        return _tiling(model, image, [-(-n // p) for n, p in zip(image, parts, strict=True)])

    step = 2**model.depth
    sides = range(step, max(largest, step) + 1, step)
    fitting = bisect(sides, budget, key=lambda side: tile_bytes(model, tiles(side), value_bytes))
    return tiles(sides[max(fitting - 1, 0)])


def _tiling(model: UNet, image: tuple[int, int], tile: Sequence[int]) -> Tiling:
    step = 2**model.depth
    rows, columns = (min(-(-t // step) * step, n) for t, n in zip(tile, image, strict=True))
    halo = halo_of(model)
    height, width = model.input_shape((rows + 2 * halo, columns + 2 * halo))
    border = halo + model.shrink // 2
    return Tiling(image, (rows, columns), halo, border, (height, width), 1)


def halo_of(model: UNet) -> int:
    """Returns the halo: output pixels on each side that depend on where the input ends.

    Rounded up to a multiple of 2^depth. Zero for the unpadded network of the paper, which drops
    such pixels itself. Padded convolutions put zeros behind the last pixel, bilinear interpolation
    repeats it. What a layer gets wrong there counts in pixels of its own level.
    """
    step = 1 << model.depth
    padded = 2 if model.padding == "same" else 0  # two convolutions of 3x3
    bilinear = int(model.config["upsampling"] == "bilinear")
    wrong, of_skips = 0, []
    for _ in range(model.depth):
        wrong += padded
        of_skips.append(wrong)
        wrong = -(-wrong // 2)
    wrong += padded
    for of_skip in reversed(of_skips):
        wrong = max(2 * wrong + bilinear, of_skip) + padded
    return -(-wrong // step) * step


def not_tileable(model: UNet) -> str | None:
    """Returns why tiles would differ from the whole image in evaluation mode, or None."""
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, nn.InstanceNorm2d | nn.GroupNorm):
            return f"{name} takes its statistics from all pixels it sees"
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
            return f"{name} without running mean takes its statistics from the batch"
    return None


def tile_bytes(model: UNet, tiling: Tiling, value_bytes: int) -> int:
    """Returns about how many bytes a tile takes while it is predicted."""
    return round(_WORKSPACE * value_bytes * _values(model.config, tiling.input))


def _values(config: dict[str, Any], input: tuple[int, int]) -> int:
    """Returns the largest number of values that a forward pass on one image holds at once.

    Held are the input, by the caller, the skips so far, and what a layer reads and writes.
    Normalisation and dropout are taken to work in place.
    """
    rim = 2 if config["padding"] == "valid" else 0
    early = config["widening"] == "before_pooling"
    first = [config["base_channels"] * 2**level for level in range(config["depth"] + 1)]
    widths = [width << early for width in first]
    image = x = config["in_channels"], *input
    skips: list[tuple[int, int, int]] = []
    most = 0

    def holds(*tensors: tuple[int, int, int]) -> tuple[int, int, int]:
        """Counts tensors, (channels, height, width), that are needed at the same time."""
        nonlocal most
        alive = {id(x): math.prod(x) for x in (image, *skips, *tensors)}
        most = max(most, sum(alive.values()))
        return tensors[-1]

    def block(x: tuple[int, int, int], between: int, channels: int) -> tuple[int, int, int]:
        one = holds(x, (between, x[1] - rim, x[2] - rim))
        return holds(x, one, (channels, one[1] - rim, one[2] - rim))

    for between, width in zip(first[:-1], widths[:-1], strict=True):
        skips.append(block(x, between, width))
        x = holds((width, skips[-1][1] // 2, skips[-1][2] // 2))
    x = block(x, first[-1], widths[-1])
    for level in reversed(range(config["depth"])):
        width, shape = widths[level], (2 * x[1], 2 * x[2])
        raised = widths[level + 1] if early else width
        if config["upsampling"] == "release_2015" and level == 0:
            raised = widths[1]
        if config["upsampling"] == "transpose":
            above = holds(x, (raised, *shape))
        else:  # two layers
            between = x[0] if config["upsampling"] == "bilinear" else raised
            above = holds(x, (between, *shape), (raised, *shape))
        skip = skips.pop()
        if skip[1:] != shape:
            skip = holds(above, skip, (width, *shape))
        x = block(holds(above, skip, (raised + width, *shape)), width, width)
    holds(x, (config["num_classes"], *x[1:]))
    return most


def mirrored(start: int, length: int, n: int) -> NDArray[np.intp]:
    """Returns pixels start, start + 1, ... of an axis of n pixels that is continued by mirroring.

    The edge pixel is not repeated: the period is 2 n - 2, at any distance.
    """
    position = np.arange(start, start + length)
    if n == 1:
        return np.zeros_like(position)
    position %= 2 * (n - 1)
    return np.minimum(position, 2 * (n - 1) - position)
