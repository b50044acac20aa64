"""How a training run computes: random numbers, algorithms, CUDA graph, signals."""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._device import torchrun_number
from .config import TrainConfig


@contextmanager
def reproducible(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Sets random numbers and algorithms for a run, and restores the caller's afterwards."""
    if config.cuda_graph and (device.type != "cuda" or torchrun_number("WORLD_SIZE", 1) > 1):
        raise ValueError(
            f"train: cuda_graph must be off but for one process on a GPU, got {device.type}"
        )
    strict = torch.are_deterministic_algorithms_enabled()
    search = torch.backends.cudnn.benchmark
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        try:
            if config.deterministic:
                if device.type == "cuda":  # cuBLAS needs it
                    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = not config.deterministic
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.backends.cudnn.benchmark = search


def as_cuda_graph(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns a step as a CUDA graph: three calls run it, the fourth records, later ones replay."""
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    calls = 0
    inputs: tuple[Tensor, Tensor]
    results: tuple[Tensor, Tensor]

    def call(tiles: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls, inputs, results
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an optimiser made for graphs runs without one
                outcome = compute(tiles, labels)
            torch.cuda.current_stream(device).wait_stream(stream)
            return outcome
        if calls == 4:
            inputs = tiles.clone(), labels.clone()
            with torch.cuda.graph(graph, stream=stream):
                results = compute(*inputs)
        for kept, new in zip(inputs, (tiles, labels), strict=True):
            kept.copy_(new)
        graph.replay()
        return results

    return call


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells of SIGINT or SIGTERM; a second signal ends the process."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that gets signals
        yield lambda: False
        return

    def note(number: int, _: Any) -> None:
        if came:
            raise KeyboardInterrupt("stopped at once; go on from the last checkpoint with resume")
        came.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
