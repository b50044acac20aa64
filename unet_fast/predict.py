"""Prediction on images of any size."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import normalise
from .unet import UNet
from .weights import label_components

_OUTPUTS = ("scores", "probabilities", "labels", "instances")


def predict(
    model: UNet,
    image: Tensor | NDArray[np.generic],
    *,
    output: str = "probabilities",
    device: torch.device | str | None = None,
) -> Tensor:
    """Predicts a whole image, whose outside is mirrored to give every pixel its full context.

    Args:
        model: The network; it runs in evaluation mode and is left as it was. A bare
            `UNet` sees the values as given; one from :func:`load_model` gets them normalised as in
            training.
        image: (H, W) or (C, H, W), any size from 1 x 1, any real dtype; computed in the dtype of
            the model's weights.
        output: ``"scores"``, (K, H, W) before softmax; ``"probabilities"``, (K, H, W);
            ``"labels"``, the most probable class, (H, W), uint8 (int64 over 256 classes);
            ``"instances"``, connected parts of what is not class 0, (H, W), int32.
        device: Where to compute; None for where the model is.

    Returns:
        The prediction, on the CPU.

    Raises:
        ValueError: If the image has another shape or number of channels, or `output` is unknown.
    """
    if output not in _OUTPUTS:
        raise ValueError(f"predict: output must be one of {', '.join(_OUTPUTS)}, got {output!r}")
    channels = model.config["in_channels"]
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu().float().numpy()
    else:
        pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] != channels or pixels.size == 0:
        raise ValueError(
            f"predict: image must be (H, W) or (C, H, W) with C = {channels}, "
            f"got {tuple(np.shape(image))}"
        )
    values = pixels.astype(np.float32)
    if model.normalisation == "percentile":
        values = normalise(values)
    home = next(model.parameters()).device
    scores = scores_of(model, torch.from_numpy(values), torch.device(device or home))
    if output == "scores":
        return scores
    if output == "probabilities":
        return scores.softmax(0)
    labels = scores.argmax(0)
    if output == "instances":
        return label_components(labels)
    return labels.to(torch.uint8) if scores.shape[0] <= 256 else labels


def scores_of(model: UNet, image: Tensor, device: torch.device) -> Tensor:
    """Scores of an image (C, H, W) that is normalised, (K, H, W), on the CPU."""
    height, width = image.shape[1:]
    rows, columns = model.input_shape((height, width))
    margin = model.shrink // 2
    padded = image[:, _mirrored(rows, margin, height)][:, :, _mirrored(columns, margin, width)]
    weight = next(model.parameters())
    home, training = weight.device, [m for m in model.modules() if m.training]
    try:
        model.to(device).eval()
        with torch.inference_mode():
            scores: Tensor = model(padded[None].to(device, weight.dtype))[0, :, :height, :width]
    finally:
        model.to(home)
        for module in training:
            module.training = True
    return scores.float().cpu().clone()


def _mirrored(length: int, margin: int, n: int) -> Tensor:
    """Indices of an axis of n pixels continued by mirroring, without repeating the edge pixel."""
    position = torch.arange(-margin, length - margin)
    if n == 1:
        return torch.zeros_like(position)
    position = position.remainder(2 * (n - 1))
    return torch.minimum(position, 2 * (n - 1) - position)
