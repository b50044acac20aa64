"""Estimates how much memory a training run takes, and refuses one that cannot fit."""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._device import precision_of, torchrun_number
from .._memory import PROGRAM, check_memory
from ..prediction.tiling import plan, tile_bytes
from ..unet import UNet
from .config import TrainConfig
from .step import network_of
from .tiles import Dataset

IN_FLIGHT = 3
"""Tensors as large as the largest activation that the backward pass holds besides what was kept."""
SHRINKABLE = ("tile", "batch_size", "base_channels")
"""Settings that a refusal suggests to make smaller."""


def bytes_of_run(config: TrainConfig, sets: Sequence[Dataset], device: torch.device) -> float:
    """Estimates the greatest memory that a process of a run takes, in bytes.

    That is program, data, weights with gradients and moments, and the larger one of a step, an
    evaluation and the writing of a checkpoint. What a step keeps for its backward pass is counted
    by running the network on tensors without memory.

    Args:
        config: The settings.
        sets: The images for training and those for validation.
        device: Device of the network.

    Returns:
        Bytes on the device of the network; infinity if they cannot be counted in 64 bits.
    """
    precision = precision_of(config.precision, device)
    try:
        with torch.device("meta"):
            model = network_of(config, sets[0])
        weights = 4 * sum(p.numel() for p in model.parameters())
        step = config.batch_size * _bytes_of_tile(model.to(precision), config.output_tile)
    except RuntimeError:  # the numbers overflow
        return math.inf
    moments = (config.momentum > 0 if config.optimizer == "sgd" else 2) + (config.ema is not None)
    if precision != torch.float32:
        step += weights / 2
    shapes = [shape for data in sets for shape in data.evaluated]
    largest = max(shapes, key=math.prod)
    tiles = plan(model, largest, device=device.type, value_bytes=precision.itemsize)
    evaluation = tiles.batch * tile_bytes(model, tiles, precision.itemsize)
    checkpoint = 2 * (1 + moments) * weights if device.type == "cpu" else 0
    resident = sum(data.size for data in sets if data.resident)
    lasting = PROGRAM[device.type] + resident + (2 + moments) * weights
    return float(lasting + max(step, evaluation, checkpoint))


def _bytes_of_tile(model: UNet, sides: Sequence[int]) -> float:
    """Returns what a step takes for each tile: image, labels, weights, activations, gradients."""
    channels, classes = model.config["in_channels"], model.config["num_classes"]
    image = next(model.parameters()).new_empty(1, channels, *model.input_shape(sides))
    own = {id(p.untyped_storage()) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[id(storage)] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scores = model(image)
    sizes = [storage.nbytes() for key, storage in kept.items() if key not in own]
    pixels = math.prod(scores.shape[2:])
    tile = 8 * image.numel() + pixels * (4 + 1 + 4 + 3 * 4 * classes)
    return float(sum(sizes) + IN_FLIGHT * max(sizes) + tile)


def check_fits(config: TrainConfig, sets: Sequence[Dataset], device: torch.device) -> None:
    """Refuses a run that cannot fit into memory, before its first step.

    Raises:
        ValueError: One line, that names settings that would fit.
    """
    config = replace(config, tile=config.output_tile)

    def changed(name: str, value: int) -> TrainConfig:
        """Returns settings with a smaller value; of a tile, the last side."""
        sides = config.output_tile
        if name != "tile":
            return replace(config, **{name: value})  # type: ignore[arg-type]
        return replace(config, tile=tuple(max(1, side * value // sides[-1]) for side in sides))

    def way_out(there: float) -> str:
        """Names the largest value of each setting that fits if the others stay."""
        fitting = []
        for name in SHRINKABLE:

            def needed(value: int, name: str = name) -> float:
                return bytes_of_run(changed(name, value), sets, device)

            now = config.output_tile[-1] if name == "tile" else getattr(config, name)
            largest = bisect(range(1, now + 1), there, key=needed)
            if largest:
                fitting.append(_said(name, changed(name, largest)))
        return f"{' or '.join(fitting)} fits" if fitting else "make several of them smaller"

    tile, batch, base = (_said(name, config) for name in SHRINKABLE)
    # Processes on GPUs have a memory each.
    sharing = torchrun_number("LOCAL_WORLD_SIZE", 1) if device.type == "cpu" else 1
    needed = bytes_of_run(config, sets, device)
    check_memory(needed, device, f"train: {tile} with {batch} and {base}", way_out, sharing)


def _said(name: str, config: TrainConfig) -> str:
    sides = config.output_tile if config.dims == 3 else config.output_tile[:1]
    value = " ".join(map(str, sides)) if name == "tile" else getattr(config, name)
    return f"{name} {value}"
