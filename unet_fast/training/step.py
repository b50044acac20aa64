"""A training step: tiles, targets, network, loss, backward, optimiser."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.profiler import record_function

from .._device import data_device, precision_of, training_layout
from ..contracts.border_weight_map import IGNORED
from ..ops import weighted_ce
from ..unet import UNet
from .config import TrainConfig
from .processes import Processes
from .runtime import as_cuda_graph
from .tiles import Dataset, Part, Tiles, seed_of

SPAN = "unet_fast:"
"""Prefix of the names of a step's parts in profiles of torch.profiler."""


class Step:
    """A network, and all that is needed for a training step.

    Args:
        config: The settings.
        model: The network.
        data: The images for training.
        processes: The processes that share the tiles of a step.
        device: Where this process computes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: UNet,
        data: Dataset,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.processes, self.device = processes, device
        self.input_shape = model.input_shape(config.output_tile)
        self.label_shape = model.output_shape(self.input_shape)
        self.layout = training_layout(device, model.dims)
        model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.parameters = list(model.parameters())
        rate = torch.tensor(config.peak_rate, device=device) if config.cuda_graph else 0.0
        self.optimizer = _optimizer(config, self.parameters, rate)
        self.precision = precision_of(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.average = None if config.ema is None else deepcopy(model)
        self.averaged = False
        """Whether the average holds a step already."""
        network: nn.Module = model
        if processes.count > 1:
            ids = [device.index] if device.type == "cuda" else None
            network = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.network = torch.compile(network) if config.compile else network
        self.weighted_ce: Callable[..., Tensor] = weighted_ce
        if data_device(device) != device:
            from ..reference import weighted_ce as plain  # here, as it loads SciPy

            self.weighted_ce = plain
        self.count = config.batch_size * processes.count
        """Tiles per step, over all processes."""
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[Part]]] | None = None
        """A step, and the parts of volumes for it, if volumes are read as tiles are drawn."""
        self.compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self.compute_eagerly
        """:meth:`compute_eagerly`, or a CUDA graph of it."""

    def record(self) -> None:
        """Prepares the first step: wraps it as a CUDA graph if that is asked for."""
        if self.config.cuda_graph:
            self.compute = as_cuda_graph(self.compute_eagerly, self.device)

    def __call__(self, step: int) -> tuple[Tiles, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Makes step number `step`, counted from 1.

        Returns:
            The tiles of all processes, this one's share of the loss, the norm of the gradient, and
            this process's tiles with their labels.
        """
        config, shapes = self.config, (self.input_shape, self.label_shape)
        _set_rate(self.optimizer, config.rate(step))
        drawn, mine = self._draw(step)
        with record_function(f"{SPAN} tiles"):
            parts = None
            if any(self.data.readers):
                parts = self._parts(step, mine)
            tiles = self.data.cut(config.augmentation, mine, *shapes, parts)
        # For dropout:
        torch.manual_seed(seed_of(config.seed, 2, step, self.processes.rank))
        self.model.train()
        loss, norm = self.compute(*tiles)
        return drawn, loss, norm, tiles

    def _draw(self, step: int) -> tuple[Tiles, Tiles]:
        """Draws the tiles of a step: those of all processes, and of this one."""
        config, shapes = self.config, (self.input_shape, self.label_shape)
        drawn = self.data.draw(
            config.augmentation, self.count, *shapes, seed=config.seed, step=step
        )
        first = self.processes.rank * config.batch_size
        return drawn, drawn[first : first + config.batch_size]

    def _parts(self, step: int, mine: Tiles) -> list[Part]:
        """Returns the parts of volumes for a step, and begins to read those of the next one."""

        def read(tiles: Tiles) -> list[Part]:
            return self.data.read(self.config.augmentation, tiles, self.input_shape)

        number, parts = self._ahead if self._ahead is not None else (0, None)
        found = parts.result() if parts is not None and number == step else read(mine)
        if step < self.config.length:
            self._ahead = step + 1, self._reader.submit(lambda: read(self._draw(step + 1)[1]))
        return found

    def compute_eagerly(self, tiles: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Updates the weights by tiles and their labels.

        Returns:
            This process's share of the loss of all, and the norm of the gradient.
        """
        config, processes = self.config, self.processes
        with record_function(f"{SPAN} weights"):
            target, weights = (x.to(self.device) for x in self.data.targets(labels))
        self.optimizer.zero_grad(set_to_none=True)
        with record_function(f"{SPAN} network"), self.autocast():
            scores = self.network(tiles.to(self.device).contiguous(memory_format=self.layout))
        with record_function(f"{SPAN} loss"):
            ce = self.weighted_ce(scores, target, weights, ignore_index=IGNORED, reduction="sum")
            # Divided by the sum over all processes; a mean of their means would be different.
            loss = ce / _divisor(config.loss_reduction, target, weights, processes)
        with record_function(f"{SPAN} backward"):  # DDP averages gradients
            self.scaler.scale(loss * processes.count).backward()
        with record_function(f"{SPAN} optimizer"):
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if config.clip_gradient is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, config.clip_gradient, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._update_average()
        return loss.detach(), norm

    def _update_average(self) -> None:
        """Updates the running mean of weights and statistics; the first step is copied."""
        if self.average is None or self.config.ema is None:
            return
        share = 1 - self.config.ema if self.averaged else 1.0
        pairs = zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        )
        for mean, now in pairs:
            if mean.is_floating_point():
                mean.lerp_(now, share)
            else:
                mean.copy_(now)
        self.averaged = True

    def autocast(self) -> torch.autocast:
        """Returns the context that sets the precision of convolutions."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    @property
    def saved_model(self) -> UNet:
        """The network that is evaluated and saved."""
        return self.model if self.average is None else self.average

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Everything that holds tensors, for the training state."""
        modules: dict[str, nn.Module] = {"model": self.model}
        if self.average is not None:
            modules["average"] = self.average
        return modules


def network_of(config: TrainConfig, data: Dataset) -> UNet:
    """Returns the network of the settings, for the channels and classes of the data."""
    return UNet(
        data.channels,
        data.num_classes,
        base_channels=config.base_channels,
        depth=config.depth,
        padding=config.padding,
        norm=None if config.norm == "none" else config.norm,
        dropout=config.dropout,
        **_of_volumes(config) if config.dims == 3 else {},
    )


def _of_volumes(config: TrainConfig) -> dict[str, Any]:
    """Returns what a network of volumes has besides, as in the paper of 2016."""
    flat = config.flat_levels or 0
    kernels = [(1, 3, 3) if level < flat else (3, 3, 3) for level in range(config.depth + 1)]
    poolings = [(1, 2, 2) if level < flat else (2, 2, 2) for level in range(config.depth)]
    return {
        "dims": 3,
        "widening": "before_pooling",
        "up_bias": False,
        "kernels": kernels if flat else None,
        "poolings": poolings if flat else None,
    }


def _optimizer(
    config: TrainConfig, parameters: list[nn.Parameter], rate: Tensor | float
) -> Optimizer:
    options: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer != "sgd":
        options["capturable"] = config.cuda_graph
        return (Adam if config.optimizer == "adam" else AdamW)(parameters, **options)
    optimizer = SGD(parameters, momentum=config.momentum, **options)
    if config.momentum > 0:
        # Made here, because a first step that the gradient scaler skips would leave them unset.
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _divisor(
    reduction: str, target: Tensor, weights: Tensor, processes: Processes
) -> Tensor | float:
    """Returns the divisor of the loss, over all processes; never 0."""
    if reduction == "sum":
        return 1.0
    if reduction == "mean":
        return processes.add((target != IGNORED).sum().to(weights.dtype)).clamp_min(1)
    return processes.add(weights.sum()).clamp_min(torch.finfo(weights.dtype).tiny)
