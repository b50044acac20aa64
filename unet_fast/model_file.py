"""Networks in files: one safetensors file each, with a description in its header."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ._files import make_folder, parsed_json, read_file, replace_file
from .objects import ObjectRule
from .unet import UNet

MODEL = "model.safetensors"
"""The file that :func:`save_model` writes into a folder."""


BEST, LAST = "best.safetensors", "last.safetensors"
"""The models of a training run: of the best evaluation, and of the last step."""


FORMAT = 1
"""Version of the description in the header."""


def save_model(model: UNet, path: Path | str) -> None:
    """Writes a network into one safetensors file, whose header describes it (JSON).

    The same network gives the same bytes: the header holds neither time nor path.

    Args:
        model: The network.
        path: A file `*.safetensors`, or a folder, which gets `model.safetensors`; folders are made
            if they are missing. A model there is replaced.

    Raises:
        TypeError: If it is another network.
        ValueError: If it cannot be written; an earlier model is still there.
    """
    if not isinstance(model, UNet):
        raise TypeError(f"save_model: model must be a UNet, got {type(model).__name__}")
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / MODEL
    make_folder(file.parent)
    description = {
        "format": FORMAT,
        "network": model.config,
        "normalisation": model.normalisation,
        "class_values": model.class_values,
        "ridge_width": model.ridge_width,
        "objects": None if model.objects is None else asdict(model.objects),
    }
    replace_file(file, pack(model.state_dict(), description))


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> UNet:
    """Reads a network that :func:`save_model` or a training run wrote.

    Args:
        path: The file, or a folder, in which the model of the best evaluation is preferred to that
            of the last step.
        device: Device to put the network on.

    Returns:
        The network, in evaluation mode. :func:`predict` normalises its images as in training.

    Raises:
        ValueError: If there is no model, or a damaged or foreign one.
    """
    file = find_model(Path(path))
    weights, description = unpack(file, "a model")
    try:
        with torch.device("meta"):  # takes no memory and draws no random numbers
            model = UNet(**description["network"])
        model.load_state_dict(weights, assign=True)
        wrong = [k for k, x in weights.items() if x.is_floating_point() and not x.isfinite().all()]
        if wrong:
            raise ValueError(f"weights must be finite, got NaN or infinity in {wrong[0]}")
        model.normalisation = description["normalisation"]
        if model.normalisation not in (None, "percentile"):
            raise ValueError(f"normalisation must be percentile, got {model.normalisation!r}")
        values = model.class_values = description["class_values"]
        listed = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**31 for v in values)
        if values is not None and not (listed and len(values) == model.config["num_classes"]):
            raise ValueError(f"class_values must be an integer for each class, got {values!r}")
        # Files of older versions have neither of these two.
        model.ridge_width = description.get("ridge_width", 0)
        rule = description.get("objects")
        ObjectRule(grow=model.ridge_width)  # raises if it is no width
        model.objects = None if rule is None else ObjectRule(**rule)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: must hold a model, but it cannot be read: {reason}") from None
    return model.to(device).eval()


def find_model(path: Path) -> Path:
    """Finds the file that :func:`load_model` reads.

    Raises:
        ValueError: If there is none.
    """
    if path.is_file():
        return path
    found = [path / name for name in (BEST, LAST, MODEL) if (path / name).is_file()]
    if not found:
        raise ValueError(f"{path}: must hold a model, but has no {BEST}, {LAST} or {MODEL}")
    return found[0]


_KEY = "unet_fast"  # one key only: several would be stored in random order
_HEADER = 2**20
"""Most bytes of a header; that of a state of the paper's network has 30,000."""


def pack(tensors: Mapping[str, Tensor], description: dict[str, Any]) -> bytes:
    """Returns the bytes of a safetensors file with a description in its header."""
    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return save(whole, {_KEY: json.dumps(description, sort_keys=True)})


def unpack(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the description of a file that :func:`pack` made.

    Raises:
        ValueError: One line, if the file is missing or damaged; `kind` names what it should hold.
    """
    wanted = f"{file}: must hold {kind}"
    try:
        content = read_file(file)  # not mapped: the file may change while the tensors live
        length = int.from_bytes(content[:8], "little")
        if length > _HEADER:  # parsed, it would take many times its size
            raise ValueError(f"its header must have at most {_HEADER} bytes, got {length}")
        tensors = load(content)
        text = parsed_json(content[8 : 8 + length]).get("__metadata__", {}).get(_KEY)
        description = parsed_json(text) if text else None
    except FileNotFoundError:
        raise ValueError(f"{wanted}, but there is no such file") from None
    except Exception as error:  # of broken files readers raise whatever they stumble over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{wanted}, but it cannot be read: {reason}") from None
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise ValueError(f"{wanted} of unet_fast, but has no description of one")
    if description["format"] != FORMAT:
        newer = ": it is of a newer unet_fast" if description["format"] > FORMAT else ""
        raise ValueError(f"{wanted} of format {FORMAT}, got {description['format']}{newer}")
    return tensors, description


def rule_of(model: UNet) -> ObjectRule:
    """Returns a network's object rule: as fitted, else all foreground, grown over the ridge."""
    return ObjectRule(grow=model.ridge_width) if model.objects is None else model.objects
