"""Several processes that train one network, started by torchrun."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .._device import data_device, torchrun_number
from .._files import reason_of

TIMEOUT = timedelta(minutes=10)
"""Time after which a process that no longer answers ends the run."""


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and the number of processes of the run."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def add(self, x: Tensor) -> Tensor:
        """Adds up a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def broadcast(self, x: Tensor) -> None:
        """Gives all processes the tensor of the first, in place."""
        if self.count > 1:
            dist.broadcast(x, 0)

    def wait(self, device: torch.device) -> None:
        """Waits until all processes are here."""
        self.add(torch.zeros((), device=device))


@contextmanager
def joined_processes(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started; without torchrun, this process alone.

    Args:
        device: Where this process computes; with CUDA they talk through NCCL, else through gloo.
    """
    if dist.is_initialized():  # by the caller, who also ends it
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if torchrun_number("WORLD_SIZE", 1) == 1:
        yield Processes()
        return
    if data_device(device) != device:
        raise ValueError(f"train: a device without kernels must have one process, got {device}")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def lost(error: RuntimeError, processes: Processes, step: int) -> RuntimeError | None:
    """Returns what to raise if another process is lost; None for other errors."""
    reason = reason_of(error).split(". ")[0]
    talk = isinstance(error, torch.distributed.DistError) or "gloo" in reason
    if processes.count == 1 or not talk:
        return None
    return RuntimeError(
        f"train: process {processes.rank} lost contact with another at step {step}; go on from the "
        f"last checkpoint with resume ({reason})"
    )
