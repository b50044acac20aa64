"""Where networks compute, and in which precision."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from ._library import HAS_CUDA


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


def device_scope(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def local_device(device: torch.device) -> torch.device:
    """With torchrun and CUDA, the GPU of this process; else the device as it is."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """Precision of the convolutions; auto: bfloat16 where the device need not emulate it."""
    if name != "auto":
        precision: torch.dtype = getattr(torch, name)
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32
