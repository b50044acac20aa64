"""Weights of milesial/Pytorch-UNet, the most used U-Net repository."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._files import reason_of
from ..unet import UNet

_DEPTH = 4


def load_pytorch_unet(weights: Path | str | Mapping[str, Any]) -> UNet:
    """Loads a checkpoint of github.com/milesial/Pytorch-UNet, of its transposed convolutions.

    The network takes what it took there: values divided by 255, images with sides that are
    multiples of 16; `predict` takes any size. One class becomes two: its score is that of
    foreground, beside a background of 0, so that softmax gives what sigmoid gave.

    Args:
        weights: A checkpoint, or its state dict. Files are read with `weights_only`: nothing is
            unpickled but tensors and plain values.

    Returns:
        The network, in evaluation mode; `mask_values` become its class values.

    Raises:
        ValueError: If it cannot be read, or is of another network.
    """
    if isinstance(weights, Mapping):
        where, state = "load_pytorch_unet: weights", dict(weights)
    else:
        where = str(weights)
        try:
            state = dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # of broken files torch raises whatever it stumbles over
            raise ValueError(
                f"{where}: must be a checkpoint of torch: {reason_of(error)}"
            ) from None
    values = state.pop("mask_values", None)
    if "up1.conv.double_conv.0.weight" in state and "up1.up.weight" not in state:
        raise ValueError(
            f"{where}: must have transposed convolutions, got bilinear upsampling with "
            "align_corners, which UNet does not have"
        )
    try:
        base, channels = state["inc.double_conv.0.weight"].shape[:2]
        one = len(state["outc.conv.weight"]) == 1
        model = UNet(
            channels,
            2 if one else len(state["outc.conv.weight"]),
            base_channels=base,
            depth=_DEPTH,
            padding="same",
            norm="batch",
            dropout=0.0,
        )
        renamed = {_name(name): x for name, x in state.items()}
        for level in range(_DEPTH):  # the skip comes first there
            name = f"merge.{level}.0.weight"
            renamed[name] = torch.cat(renamed[name].chunk(2, 1)[::-1], 1)
        if one:
            for name in ("head.weight", "head.bias"):
                renamed[name] = torch.cat([torch.zeros_like(renamed[name]), renamed[name]])
        biases = {
            k: torch.zeros_like(x) for k, x in model.state_dict().items() if k.endswith("bias")
        }
        model.load_state_dict(biases | renamed)  # convolutions before a norm have none there
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: must be of milesial/Pytorch-UNet, but differ: {reason_of(error)}"
        ) from None
    listed = isinstance(values, list) and all(type(value) is int for value in values)
    if listed and len(values) == model.config["num_classes"]:
        model.class_values = values
    return model.eval()


def _name(name: str) -> str:
    """Returns the name that a parameter of the other network has here."""
    name = re.sub(r"^outc\.conv", "head", name)
    name = re.sub(r"^inc\.", "down.0.", name)
    name = re.sub(r"^down(\d)\.maxpool_conv\.1\.", lambda m: f"down.{m[1]}.", name)
    name = re.sub(rf"^down\.{_DEPTH}\.", "bottom.", name)
    name = re.sub(r"^up(\d)\.conv\.", lambda m: f"merge.{_DEPTH - int(m[1])}.", name)
    name = re.sub(r"^up(\d)\.up\.", lambda m: f"up.{_DEPTH - int(m[1])}.", name)
    return name.replace("double_conv.", "")
