"""Tiles of an image or volume such that their predictions agree with that of the whole.

Think of the image as continued by mirroring into an infinite plane, and of the network as running
over all of it. The prediction is the part of its output inside the image. A part of the plane gives
the same numbers on two conditions, along each axis by itself: its origin is a multiple of the
network's alignment, the product of all pooling factors, because the network commutes with those
shifts only; and it reaches beyond the pixels that are kept as far as the network's receptive field.
docs/prediction.md has the proof.
"""

import itertools
import math
import warnings
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .._progress import counted
from ..unet import UNet

LARGEST = {2: {"cpu": 1024, "cuda": 2048}, 3: {"cpu": 256, "cuda": 256}}
"""Longest side of a tile that is chosen here, by the number of axes. Larger ones of two axes are
slower on a CPU, because they need memory that is not in its caches, and gain little on a GPU. Those
of three axes would gain, because their halo is most of their work, but take too much memory."""
MARGINS = 16
"""How many times the pixels of a tile it may read before a budget is called small."""
BUDGET = {2: {"cpu": 2**30, "cuda": 2**32}, 3: {"cpu": 2**32, "cuda": 2**33}}
"""Default memory for the tiles being processed, in bytes. Constant rather than what is free at the
moment, so that the same call gives the same bits."""
_WORKSPACE = {2: 1.25, 3: 1.5}
"""Factor for the memory of convolutions beside their results; measured on CPUs."""


Shape = tuple[int, ...]
"""A number for each spatial axis."""


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image or volume for a network: equal, side by side from pixel (0, 0) on."""

    image: Shape
    tile: Shape
    """Sides of the part of the output that is kept: multiples of the network's alignment, or the
    image's side if that is less. The last tiles may reach beyond the image."""
    halo: Shape
    """Pixels of the output that are dropped on each side of the tile, along each axis."""
    border: Shape
    """Pixels from the first pixel of the network's input to that of the tile, along each axis."""
    input: Shape
    """Spatial shape of the network's input."""
    batch: int
    """Tiles in a batch."""

    @property
    def origins(self) -> list[Shape]:
        """First pixel of each tile, row by row."""
        ranges = (range(0, n, t) for n, t in zip(self.image, self.tile, strict=True))
        return [*itertools.product(*ranges)]

    @property
    def is_whole(self) -> bool:
        """Whether one tile covers the image."""
        return len(self.origins) == 1


def plan(
    model: UNet,
    image: Shape,
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
        image: Size of the image in pixels, (H, W), or of the volume, (D, H, W).
        device: "cpu", "cuda" or another type of device, which gets the tiles of a CPU.
        value_bytes: Bytes of one activation of the network.
        tile: Side or sides of a tile, >= 1, rounded up to multiples of the alignment; None: the
            largest that the budget holds, up to :data:`LARGEST`.
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
    sides = (tile,) * model.dims if isinstance(tile, int) else tile
    if sides is not None and (len(sides) != model.dims or any(side < 1 for side in sides)):
        most = {2: "two", 3: "three"}[model.dims]
        raise ValueError(f"predict: tile must be one or {most} sides >= 1, got {tile}")
    steps = model.alignment
    short = [(t, step) for t, step in zip(sides or steps, steps, strict=True) if t < step]
    if short:  # not for every rounding: the result is the same
        side, step = min(short)
        warnings.warn(
            f"predict: tile {side} becomes {step} where the image is larger: {step}, the product "
            f"of all {model.depth} poolings, is the smallest",
            stacklevel=2,
        )
    reason = not_tileable(model)
    kind = "cuda" if device == "cuda" else "cpu"
    largest = LARGEST[model.dims][kind]
    budget = BUDGET[model.dims][kind] if memory_budget is None else memory_budget
    if sides is None and reason is None:
        made = _fitting(model, image, largest, budget, value_bytes)
    else:
        made = _tiling(model, image, sides or image)
    if reason and not made.is_whole:
        raise ValueError(f"predict: tile must cover the image, for {reason}, got {tile}")
    tiles = " x ".join(map(str, made.tile))
    needed = tile_bytes(model, made, value_bytes) * (batch_size or 1)
    if memory_budget is not None and needed > memory_budget:
        raise ValueError(
            f"predict: memory_budget must hold {counted(batch_size or 1, 'tile')} of {tiles} pixels"
            f"{f', for {reason}' if reason else ''}: {needed} bytes, got {memory_budget}"
        )
    times = math.prod(made.input) / math.prod(made.tile)
    if memory_budget is not None and sides is None and not made.is_whole and times > MARGINS:
        warnings.warn(
            f"predict: memory_budget leaves tiles of {tiles}, each of which reads {times:.0f} "
            "times as many pixels: a larger one is faster",
            stacklevel=2,
        )
    if batch_size is None:  # small tiles are bundled until they are as much work as a large one
        bundle = largest**model.dims // math.prod(made.tile)
        batch_size = max(1, min(budget // needed, bundle))
    return replace(made, batch=min(batch_size, len(made.origins)))


def _fitting(model: UNet, image: Shape, largest: int, budget: int, value_bytes: int) -> Tiling:
    """Returns the largest tiles of about equal sides that the budget allows."""

    def tiles(side: int) -> Tiling:
        # Equal parts leave no narrow rest, whose halo would cost more than its pixels.
        parts = [-(-n // side) for n in image]
        return _tiling(model, image, [-(-n // p) for n, p in zip(image, parts, strict=True)])

    step = max(model.alignment)
    sides = range(step, max(largest, step) + 1, step)
    fitting = bisect(sides, budget, key=lambda side: tile_bytes(model, tiles(side), value_bytes))
    return tiles(sides[max(fitting - 1, 0)])


def _tiling(model: UNet, image: Shape, tile: Sequence[int]) -> Tiling:
    sides = zip(tile, model.alignment, image, strict=True)
    kept = tuple(min(-(-t // step) * step, n) for t, step, n in sides)
    halo = halo_of(model)
    input = model.input_shape([t + 2 * h for t, h in zip(kept, halo, strict=True)])
    border = tuple(h + less // 2 for h, less in zip(halo, model.shrinkage, strict=True))
    return Tiling(image, kept, halo, border, input, 1)


def halo_of(model: UNet) -> Shape:
    """Returns the halo: output pixels on each side that depend on where the input ends.

    Along each axis, rounded up to a multiple of the alignment. Zero for the unpadded networks of
    the papers, which drop such pixels themselves. Padded convolutions put zeros behind the last
    pixel, linear interpolation repeats it. What a layer gets wrong there counts in pixels of its
    own level.
    """
    levels = zip(*model.kernels, strict=True), zip(*model.poolings, strict=True)
    return tuple(
        -(-_wrong(model, kernels, factors) // step) * step
        for kernels, factors, step in zip(*levels, model.alignment, strict=True)
    )


def _wrong(model: UNet, kernels: Sequence[int], factors: Sequence[int]) -> int:
    """Returns the pixels at the end of an axis that a network gets wrong."""
    # Two convolutions in each level.
    *padded, at_bottom = [k - 1 if model.padding == "same" else 0 for k in kernels]
    linear = model.config["upsampling"] == "bilinear"
    wrong, of_skips = 0, []
    for more, factor in zip(padded, factors, strict=True):
        wrong += more
        of_skips.append(wrong)
        wrong = -(-wrong // factor)
    wrong += at_bottom
    for more, factor, of_skip in reversed([*zip(padded, factors, of_skips, strict=True)]):
        repeated = factor // 2 if linear else 0
        wrong = max(factor * wrong + repeated, of_skip) + more
    return wrong


def not_tileable(model: UNet) -> str | None:
    """Returns why tiles would differ from the whole image in evaluation mode, or None."""
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, nn.InstanceNorm2d | nn.InstanceNorm3d | nn.GroupNorm):
            return f"{name} takes its statistics from all pixels it sees"
        batch_norm = isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
        if batch_norm and module.running_mean is None:
            return f"{name} without running mean takes its statistics from the batch"
    return None


def tile_bytes(model: UNet, tiling: Tiling, value_bytes: int) -> int:
    """Returns about how many bytes a tile takes while it is predicted."""
    return round(_WORKSPACE[model.dims] * value_bytes * _values(model, tiling.input))


def _values(model: UNet, input: Shape) -> int:
    """Returns the largest number of values that a forward pass on one image holds at once.

    Held are the input, by the caller, the skips so far, and what a layer reads and writes.
    Normalisation and dropout are taken to work in place.
    """
    config = model.config
    early = config["widening"] == "before_pooling"
    first = [config["base_channels"] * 2**level for level in range(config["depth"] + 1)]
    widths = [width << early for width in first]
    image = x = config["in_channels"], *input
    skips: list[Shape] = []
    most = 0

    def holds(*tensors: Shape) -> Shape:
        """Counts tensors, (channels, *sides), that are needed at the same time."""
        nonlocal most
        alive = {id(x): math.prod(x) for x in (image, *skips, *tensors)}
        most = max(most, sum(alive.values()))
        return tensors[-1]

    def block(x: Shape, level: int, between: int) -> Shape:
        """Counts the two convolutions of a level."""
        valid = config["padding"] == "valid"
        rims = [k - 1 if valid else 0 for k in model.kernels[level]]
        one, two = ([n - k * rim for n, rim in zip(x[1:], rims, strict=True)] for k in (1, 2))
        return holds(x, holds(x, (between, *one)), (widths[level], *two))

    for level, factors in enumerate(model.poolings):
        skips.append(block(x, level, first[level]))
        pooled = (n // factor for n, factor in zip(skips[-1][1:], factors, strict=True))
        x = holds((widths[level], *pooled))
    x = block(x, config["depth"], first[-1])
    for level, factors in reversed([*enumerate(model.poolings)]):
        width, shape = widths[level], [f * n for f, n in zip(factors, x[1:], strict=True)]
        raised = widths[level + 1] if early else width
        if config["upsampling"] == "release_2015" and level == 0:
            raised = widths[1]
        if config["upsampling"] == "transpose":
            above = holds(x, (raised, *shape))
        else:  # two layers
            between = x[0] if config["upsampling"] == "bilinear" else raised
            above = holds(x, (between, *shape), (raised, *shape))
        skip = skips.pop()
        if skip[1:] != tuple(shape):
            skip = holds(above, skip, (width, *shape))
        x = block(holds(above, skip, (raised + width, *shape)), level, width)
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
