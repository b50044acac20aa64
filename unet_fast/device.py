"""Where and how a run computes: device, precision, determinism, CUDA graph."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ._library import HAS_CUDA
from .config import TrainConfig


def find_device(name: str) -> torch.device:
    """The device of a name: auto (CUDA if device and kernels are there), cpu, cuda or cuda:N.

    Raises:
        ValueError: If there is no such device, or no kernels for it.
    """
    if name == "auto":
        return torch.device("cuda" if HAS_CUDA and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= count:
        raise ValueError(f"device must be present, got {name!r} with {count} CUDA devices")
    if not HAS_CUDA:
        raise ValueError(f"device must have kernels, got {name!r} with a build without CUDA")
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def local_device(device: torch.device) -> torch.device:
    """With torchrun and CUDA, the GPU of this process; else the device as it is."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """Of the convolutions, by name; auto: bfloat16 where it is not emulated, which is slow."""
    if name != "auto":
        precision: torch.dtype = getattr(torch, name)
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def settled(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Random numbers and algorithms of a run; the caller's are back afterwards."""
    if config.cuda_graph and (device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise ValueError(
            f"train: cuda_graph must be off but for one process on a GPU, got {device.type}"
        )
    strict = torch.are_deterministic_algorithms_enabled()
    search = torch.backends.cudnn.benchmark
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        try:
            if config.deterministic:
                if device.type == "cuda":  # asked for by cuBLAS
                    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = not config.deterministic
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.backends.cudnn.benchmark = search


def recorded(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same step as a CUDA graph: three as they are, the fourth recorded, then replayed."""
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
