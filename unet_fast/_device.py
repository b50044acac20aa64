"""Devices of the networks, and their precision."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from ._library import HAS_CUDA
from ._progress import counted


def find_device(name: str) -> torch.device:
    """Returns the device of a name: auto (CUDA if GPU and kernels are there), cpu, cuda or cuda:N.

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
        way_out = "auto takes what is there"
        if torch.version.cuda is None:
            way_out += "; this PyTorch is one for CPUs only"
        raise ValueError(
            f"device must be present, got {name!r} with {counted(count, 'CUDA device')} ({way_out})"
        )
    if not HAS_CUDA:
        raise ValueError(
            f"device must have kernels, got {name!r} with a build without CUDA (auto takes the "
            "CPU; UNET_FAST_CUDA=ON builds them)"
        )
    return device


def device_scope(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one within a `with` block; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def torchrun_number(name: str, default: int) -> int:
    """Returns a number that torchrun puts into the environment, or the default without torchrun.

    Raises:
        ValueError: If it is not a number >= 0.
    """
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name} must be a number >= 0, as torchrun sets it, got {value!r}")
    return int(value)


def local_device(device: torch.device) -> torch.device:
    """Returns the GPU of this process under torchrun with CUDA, else the device unchanged."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", torchrun_number("LOCAL_RANK", 0))
    return device


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """Returns the precision of the convolutions; auto: bfloat16 unless the device emulates it."""
    if name != "auto":
        precision: torch.dtype = getattr(torch, name)
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def training_layout(device: torch.device, dims: int = 2) -> torch.memory_format:
    """Returns the memory layout in which convolutions of images or volumes are trained fastest.

    That is channels-last, but on a CPU without AVX-512, where their derivatives are slower in it.
    """
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    if slow:
        return torch.contiguous_format
    return torch.channels_last if dims == 2 else torch.channels_last_3d
