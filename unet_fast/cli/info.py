"""The command that says what an installation contains, and whether it works."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from .. import ops
from .._library import HAS_CUDA, build_info
from .entry import app

EXTRAS = {
    "zarr": ("zarr", "imagecodecs"),
    "rois": ("roifile", "skimage"),
    "dask": ("distributed", "cryptography"),
    "tensorboard": ("tensorboard",),
    "monai": ("monai",),
    "nnunet": ("nnunetv2",),
    "torchvision": ("torchvision",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "bioimageio": ("bioimageio",),
}
"""Modules that the extras of the package install."""
CLOSE = 1e-3
"""Difference, relative to 1 or more, up to which an operator agrees with its reference."""


@app.command
def info() -> int:
    """Show versions, what the kernels were built for, and whether they compute what they should.

    ```
    unet-fast info
    ```

    Each operator runs on small inputs on each device, beside the plain reference. The exit code is
    1 if one fails.
    """
    facts = build_info()
    facts["torch"] = torch.__version__
    facts["cuda_kernels"] = "loaded" if HAS_CUDA else "not loaded"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["cuda_devices"] = ", ".join(gpus) or "none"
    for name, modules in EXTRAS.items():
        there = all(find_spec(module) for module in modules)
        facts[name] = "installed" if there else f"missing: pip install 'unet_fast[{name}]'"
    for name, value in facts.items():
        print(f"{name:<20} {value}", flush=True)
    failures = 0
    for device in ["cpu", *(f"cuda:{i}" for i in range(len(gpus) if HAS_CUDA else 0))]:
        for op, inputs in _calls(torch.device(device)):
            text = _compared(op, inputs)
            failures += text != "as the reference"
            print(f"{op:<20} {text}, on {device}", flush=True)
    return int(failures > 0)


def _calls(device: torch.device) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yields small inputs of the operators."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 48, 50, generator=generator)
    target = torch.randint(3, (1, 48, 50), generator=generator)
    labels = torch.zeros(1, 48, 50, dtype=torch.int32)
    for number, (y, x) in enumerate([(3, 4), (3, 20), (22, 8), (30, 30)], 1):
        labels[0, y : y + 12, x : x + 14] = number
    field = 3 * torch.randn(1, 2, 3, 3, generator=generator)
    calls = [
        ("weighted_ce", [logits, target, torch.rand(1, 48, 50, generator=generator)]),
        ("border_weight_map", [labels]),
        ("elastic_deform", [torch.rand(1, 1, 48, 50, generator=generator), field]),
    ]
    for op, inputs in calls:
        yield op, [x.to(device) for x in inputs]


def _compared(op: str, inputs: list[torch.Tensor]) -> str:
    """Says whether an operator gives what its reference gives."""
    from .. import reference  # here, as it loads SciPy, which other commands start without

    run: Callable[..., Any] = getattr(ops, op)
    plain: Callable[..., Any] = getattr(reference, op)
    try:
        difference = (run(*inputs) - plain(*inputs)).abs().max().item()
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    return "as the reference" if difference < CLOSE else f"differs by {difference:.2g}"
