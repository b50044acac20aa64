"""ONNX: a network for any runtime, and beside it what no runtime knows."""

import copy
import hashlib
import importlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .._files import new_folder
from .._library import build_info
from ..images.intensity import HIGH, LOW
from ..model_file import rule_of
from ..prediction.tiling import halo_of, not_tileable
from ..unet import UNet

FORMAT = 1
"""Version of the description."""
OPSETS = range(18, 24)
"""Versions of ONNX's operators; torch writes no older ones by itself."""
NETWORK, DESCRIPTION = "model.onnx", "model.json"
"""The files."""


def export_onnx(
    model: UNet,
    folder: Path | str,
    *,
    opset: int = 18,
    spacing: Sequence[float] | None = None,
) -> None:
    """Writes a network as ONNX, with softmax inside, and its description as JSON.

    The graph takes normalised images or volumes, float32, `(N, C, *S)` of any size that the network
    takes, and returns probabilities. docs/export.md lists what the description says.

    Args:
        model: The network.
        folder: Folder for `model.onnx` and `model.json`; there must be none.
        opset: Version of ONNX's operators, in [18, 23].
        spacing: Size of the pixels of training along each axis, in micrometres, if known.

    Raises:
        ValueError: If an argument breaks its rule, or a package is missing.
    """
    with new_folder(Path(folder)) as part:
        described = describe(model, spacing)
        content = onnx_bytes(model, opset)
        described["sha256"] = hashlib.sha256(content).hexdigest()
        (part / NETWORK).write_bytes(content)
        (part / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def describe(model: UNet, spacing: Sequence[float] | None = None) -> dict[str, Any]:
    """Returns what no runtime knows of a network: how to normalise, tile and make objects."""
    listed = spacing if isinstance(spacing, list | tuple) else []
    sizes = [x for x in listed if isinstance(x, int | float) and 0 < x < math.inf]
    if spacing is not None and not len(sizes) == len(listed) == model.dims:
        got = [*listed] or spacing
        raise ValueError(f"export: spacing must be {model.dims} sizes > 0, got {got!r}")
    halo, classes = halo_of(model), model.class_values or [*range(model.config["num_classes"])]
    return {
        "format": FORMAT,
        "unet_fast": build_info()["version"],
        "channels": model.config["in_channels"],
        "classes": classes,
        "percentiles": [LOW, HIGH] if model.normalisation == "percentile" else None,
        "alignment": model.alignment,
        "smallest_input": model.input_shape((1,) * model.dims),
        "halo": halo,
        "border": [h + less // 2 for h, less in zip(halo, model.shrinkage, strict=True)],
        "tiles": not_tileable(model) is None,
        "objects": asdict(rule_of(model)),
        "spacing": spacing,
    }


def onnx_bytes(model: UNet, opset: int) -> bytes:
    """Returns the network, with softmax behind it, as ONNX."""
    if opset not in OPSETS:
        raise ValueError(f"export: opset must be in [{OPSETS[0]}, {OPSETS[-1]}], got {opset}")
    package("onnx", "onnx")
    package("onnxscript", "onnx")
    network, example = with_softmax(model)
    sides = dict.fromkeys(range(2, 2 + model.dims), Dim.DYNAMIC)
    with quiet():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: Dim.DYNAMIC, **sides},),
            input_names=["image"],
            output_names=["probabilities"],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    written = program.model_proto
    for part in (written, written.graph, *written.graph.node, *written.graph.value_info):
        part.ClearField("metadata_props")  # traces of the call, with paths of this machine
    content: bytes = written.SerializeToString(deterministic=True)
    return content


def with_softmax(model: UNet) -> tuple[nn.Module, Tensor]:
    """Returns a copy that gives probabilities, in evaluation mode, on the CPU, and an input."""
    network = nn.Sequential(copy.deepcopy(model), nn.Softmax(1)).cpu().float().eval()
    # Not the smallest one: a side of one pixel, at the bottom, would be taken for the only one.
    sides = model.input_shape([2 * step for step in model.alignment])
    return network, torch.zeros((2, model.config["in_channels"], *sides))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what exporters say about themselves from the reader."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.utils._sympy")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def package(name: str, extra: str) -> Any:
    """Imports a package of an extra; raises ValueError, one line, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"export: package {name} must be installed (pip install 'unet_fast[{extra}]')"
        ) from None
