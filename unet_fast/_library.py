"""Loads the native libraries; the only module that knows their file names."""

import ctypes
import os
import re
from pathlib import Path
from typing import Protocol

import torch

try:
    from . import _build
except ImportError as error:
    raise ImportError("unet_fast: the compiled part is missing; run `pip install .`") from error

_DIRECTORY = Path(_build.__file__).parent
_LIBRARY = _DIRECTORY / "libunet_fast.so"
_CUDA_LIBRARY = _DIRECTORY / "libunet_fast_cuda.so"
_LEVELS = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
"""Names of the SIMD levels, by those in the files of their libraries."""


def check_clone(project: Path, built: str) -> None:
    """Raises ImportError if Python started in sources of another version than the libraries'."""
    text = project.read_text() if project.exists() else ""
    found = re.search(r'^name = "unet_fast"\nversion = "(.*)"$', text, re.MULTILINE)
    if found is not None and found[1] != built:
        raise ImportError(
            f"unet_fast: the sources in {project.parent} are of version {found[1]}, the installed "
            f"libraries of {built}: run `pip install .` there, or start Python elsewhere"
        )


def simd_levels() -> list[str]:
    """Returns the SIMD levels that were built and that this processor has, the best one last."""
    best: int = ctypes.CDLL(str(_LIBRARY)).unet_fast_best_level()
    return [name for file, name in [*_LEVELS.items()][: best + 1] if file in _build.LEVELS]


def _simd_level() -> str:
    """Returns the best SIMD level of this processor, or the one in UNET_FAST_SIMD."""
    levels = simd_levels()
    asked = os.environ.get("UNET_FAST_SIMD", levels[-1])
    if asked not in levels:
        raise ImportError(
            f"unet_fast: UNET_FAST_SIMD must be one of {', '.join(levels)} here, got {asked}"
        )
    return asked


check_clone(Path(__file__).parent.parent / "pyproject.toml", _build.VERSION)
_LEVEL = _simd_level()
torch.ops.load_library(_LIBRARY)
torch.ops.load_library(_DIRECTORY / f"libunet_fast_{_LEVEL.lower().replace('-', '')}.so")

HAS_CUDA: bool = torch.version.cuda is not None and _CUDA_LIBRARY.exists()
"""Whether the operators accept CUDA tensors."""

if HAS_CUDA:
    torch.ops.load_library(_CUDA_LIBRARY)


class _OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def is_cuda(self) -> bool: ...


def require_kernels(op: str, x: _OnDevice) -> None:
    """Raises RuntimeError if the operators have no kernels for the device of a tensor `x`."""
    if x.device.type == "cpu" or (x.is_cuda and HAS_CUDA):
        return
    if x.is_cuda:
        raise RuntimeError(
            f"{op}: unet_fast was built without CUDA kernels; rebuild it with UNET_FAST_CUDA=ON, "
            "or use unet_fast.reference"
        )
    raise RuntimeError(
        f"{op}: there are kernels for cpu and cuda only, got a tensor on {x.device}; "
        "use unet_fast.reference"
    )


def build_info() -> dict[str, str]:
    """Returns how the native libraries were built.

    Returns:
        `version`, `compiler`, `built_with_torch`, `min_torch` (the oldest PyTorch the libraries
        run on), `cuda_architectures` (comma-separated; empty: no CUDA kernels) and `simd` (the
        instructions of the CPU kernels, "baseline", "AVX2" or "AVX-512": the best the processor
        has, or those that the environment variable UNET_FAST_SIMD asks for).
    """
    return {
        "version": _build.VERSION,
        "compiler": _build.COMPILER,
        "built_with_torch": _build.BUILT_WITH_TORCH,
        "min_torch": _build.MIN_TORCH,
        "cuda_architectures": _build.CUDA_ARCHITECTURES,
        "simd": _LEVEL,
    }


def bad_value(op: str, error: RuntimeError, argument: str) -> ValueError | None:
    """Returns the ValueError for a kernel's RuntimeError about values of `argument`, or None.

    Kernels can raise RuntimeError only.
    """
    start = str(error).find(f"{argument} must be")
    return None if start < 0 else ValueError(f"{op}: {str(error)[start:].splitlines()[0]}")
