"""Loads the native libraries; the only module that knows their file names."""

import ctypes
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"unet_fast: must have torch 2.10 or newer, got {torch.__version__}")

_LEVELS = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
"""Names of the SIMD levels, by those in the files of their libraries."""
_OPERATORS = (
    *("weighted_ce", "weighted_ce_backward", "two_nearest", "separate_touching"),
    *("border_weights", "elastic_deform", "elastic_deform_backward"),
)
"""Operators that csrc/registration.cpp defines."""


class NoKernelsError(RuntimeError):
    """There are no kernels for the device of a tensor."""


def check_clone(project: Path, built: str) -> None:
    """Raises ImportError if Python started in sources of another version than the libraries'."""
    text = project.read_text() if project.exists() else ""
    found = re.search(r'^name = "unet_fast"\nversion = "(.*)"$', text, re.MULTILINE)
    if found is not None and found[1] != built:
        raise ImportError(
            f"unet_fast: the sources in {project.parent} are of version {found[1]}, the installed "
            f"libraries of {built}: run `pip install .` there, or start Python elsewhere"
        )


def _file(folder: Path, name: str) -> Path:
    """Returns the file of a library, as CMakeLists.txt names it on this system."""
    suffix = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
    return folder / f"lib{name}.{suffix}"


def simd_levels() -> list[str]:
    """Returns the SIMD levels that were built and that this processor has, the best one last."""
    from ._build import LEVELS, __file__

    library = ctypes.CDLL(str(_file(Path(__file__).parent, "unet_fast")))
    best: int = library.unet_fast_best_level()
    return [name for file, name in [*_LEVELS.items()][: best + 1] if file in LEVELS]


def _simd_level() -> str:
    """Returns the best SIMD level of this processor, or the one in UNET_FAST_SIMD."""
    levels = simd_levels()
    asked = os.environ.get("UNET_FAST_SIMD", levels[-1])
    if asked not in levels:
        raise ImportError(
            f"unet_fast: UNET_FAST_SIMD must be one of {', '.join(levels)} here, got {asked}"
        )
    return asked


def _load() -> dict[str, str]:
    """Loads the libraries. Returns how they were built.

    Raises:
        ModuleNotFoundError: If they were never built.
        OSError: If they are of another system, or ask for what is not there.
    """
    global NO_CUDA
    from ._build import FACTS
    from ._build import __file__ as place

    check_clone(Path(__file__).parent.parent / "pyproject.toml", FACTS["version"])
    folder, level = Path(place).parent, _simd_level()
    torch.ops.load_library(_file(folder, "unet_fast"))
    torch.ops.load_library(_file(folder, f"unet_fast_{level.lower().replace('-', '')}"))
    DEVICES.add("cpu")
    cuda = _file(folder, "unet_fast_cuda")
    if torch.version.cuda is not None and cuda.exists():
        torch.ops.load_library(cuda)
        NO_CUDA = _refused_by_driver(FACTS["cuda"], _cuda_of_driver())
        if not NO_CUDA:
            DEVICES.add("cuda")
    return FACTS | {"simd": level}


def _cuda_of_driver() -> int | None:
    """Returns the major version of CUDA that the driver is for; None: there is no driver."""
    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return number.value // 1000 or None


def _refused_by_driver(built: str, driver: int | None) -> str:
    """Says why a driver does not run the kernels of a version of CUDA; empty: it does."""
    if driver is None or driver >= int(built.split(".")[0]):
        return ""
    return f"the kernels need a driver for CUDA {built}, got one for CUDA {driver}"


DEVICES: set[str] = set()
"""Types of the devices that the operators have kernels for."""
NO_CUDA = "unet_fast was built without CUDA kernels; rebuild it with UNET_FAST_CUDA=ON"
"""Why CUDA is not one of them, if it is not."""
try:
    _FACTS, MISSING = _load(), ""
except ModuleNotFoundError:
    _FACTS, MISSING = {}, "the compiled part is missing: run `pip install .`"
except OSError as error:
    _FACTS, MISSING = {}, f"the compiled part does not load: {str(error).splitlines()[0]}"
HAS_CUDA: bool = "cuda" in DEVICES
"""Whether the operators accept CUDA tensors."""
_nameless = torch.library.Library("unet_fast", "FRAGMENT")
for _name in _OPERATORS:  # names for what is not there, which nothing calls
    if not hasattr(torch.ops.unet_fast, _name):
        _nameless.define(f"{_name}() -> Tensor")


class _OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def is_cuda(self) -> bool: ...


def require_kernels(op: str, x: _OnDevice) -> None:
    """Raises NoKernelsError if the operators have none for the device of a tensor `x`."""
    if x.device.type in DEVICES:
        return
    way_out = "unet_fast.use_reference() runs the slow reference there"
    if MISSING:
        raise NoKernelsError(f"{op}: {MISSING} ({way_out})")
    if x.is_cuda:
        raise NoKernelsError(f"{op}: {NO_CUDA} ({way_out})")
    raise NoKernelsError(
        f"{op}: there are kernels for cpu and cuda only, got a tensor on {x.device} ({way_out})"
    )


def use_reference(on: bool = True) -> None:
    """Lets operators run their plain reference on devices that they have no kernels for.

    The results are the same within rounding, and take 10 to 1,000 times as long. Without it such a
    tensor is refused. The environment variable `UNET_FAST_REFERENCE=1` asks for it, too.

    Args:
        on: Whether they do.
    """
    global _reference
    _reference = bool(on)


def reference_wanted() -> bool:
    """Whether :func:`use_reference` was asked for."""
    return _reference


_reference = os.environ.get("UNET_FAST_REFERENCE") == "1"


def build_info() -> dict[str, str]:
    """Returns how the native libraries were built.

    Returns:
        `version`, `compiler`, `built_with_torch`, `min_torch` (the oldest PyTorch the libraries
        run on), `cuda` (version of the CUDA compiler), `cuda_architectures` (comma-separated;
        empty: no CUDA kernels) and `simd` (the instructions of the CPU kernels, "baseline", "AVX2"
        or "AVX-512": the best the processor has, or those that the environment variable
        UNET_FAST_SIMD asks for). Without the libraries `version` and `missing`, which says why.
    """
    if not MISSING:
        return dict(_FACTS)
    try:
        found = version("unet_fast")
    except PackageNotFoundError:
        found = "unknown"
    return {"version": found, "missing": MISSING}


def bad_value(op: str, error: RuntimeError, argument: str) -> ValueError | None:
    """Returns the ValueError for a kernel's RuntimeError about values of `argument`, or None.

    Kernels can raise RuntimeError only.
    """
    start = str(error).find(f"{argument} must be")
    return None if start < 0 else ValueError(f"{op}: {str(error)[start:].splitlines()[0]}")
