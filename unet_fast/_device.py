"""Devices of the networks, and their precision."""

import functools
import os
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from ._library import DEVICES
from ._progress import counted


def find_device(name: str) -> torch.device:
    """Returns the device of a name: auto (CUDA if there is a GPU, else the CPU), cpu, cuda, cuda:N.

    The name of another accelerator that this PyTorch has, such as mps or xpu, is taken too. Where
    the operators have no kernels, it warns of that; see :func:`data_device`.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        module = None if name == "cpu" else torch.get_device_module(device)
        count = module.device_count() if module is not None and module.is_available() else 0
    except (RuntimeError, AttributeError):
        raise ValueError(
            f"device must be auto, cpu, cuda, cuda:N or what this PyTorch has besides, got {name!r}"
        ) from None
    if device.type == "cpu":
        return device
    if (device.index or 0) >= count:
        way_out = "auto takes what is there"
        if device.type == "cuda" and torch.version.cuda is None:
            way_out += "; this PyTorch has no CUDA"
        kind = device.type.upper()
        raise ValueError(
            f"device must be present, got {name!r} with {counted(count, f'{kind} device')} "
            f"({way_out})"
        )
    if device.type not in DEVICES:
        _tell_of(device.type)
    return device


@functools.cache
def _tell_of(kind: str) -> None:
    """Warns, once, that there are no kernels for a kind of device."""
    warnings.warn(
        f"there are no kernels for {kind}: it computes the network, and the loss by the slow "
        "reference; labels, tiles and weights are made on the CPU",
        stacklevel=3,
    )


def data_device(device: torch.device) -> torch.device:
    """Returns where labels, tiles and weights are made for a network on a device.

    That is the same one, or the CPU if the operators have no kernels for it.
    """
    return device if device.type in DEVICES else torch.device("cpu")


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
        fast = device.type == "cpu" and bool(
            capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        )
    return torch.bfloat16 if fast else torch.float32


def training_layout(device: torch.device, dims: int = 2) -> torch.memory_format:
    """Returns the memory layout in which convolutions of images or volumes are trained fastest.

    That is channels-last, but on a CPU without AVX-512, where their derivatives are slower in it,
    and on accelerators other than CUDA, where nothing is known.
    """
    wide = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not wide and device.type != "cuda":
        return torch.contiguous_format
    return torch.channels_last if dims == 2 else torch.channels_last_3d
