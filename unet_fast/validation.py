"""How well a network does on images that it is not trained on."""

import math

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .components import Objects
from .dataset import Dataset
from .ops.weighted_ce import weighted_ce
from .predict import scores_of
from .processes import Processes
from .reference.border_weight_map import IGNORED
from .unet import UNet


def evaluate(
    model: UNet, data: Dataset, reduction: str, processes: Processes
) -> dict[str, float | None]:
    """Scores of a network on whole images, which the processes share among them.

    Args:
        model: The network.
        data: The images.
        reduction: Of the loss, as in training; "sum" is that of a mean image.
        processes: Who takes which image.

    Returns:
        loss: The weighted cross-entropy, over all pixels of all images; None if it is not finite.
        iou: Pixel IoU of all images together, mean over the classes beside background; 1 where
            there is no such pixel.
        mean_iou: The same over all classes, background too, so that a network that says one class
            everywhere does badly whatever the class.
        seg: SEG over all reference objects (two classes only); None without one.
    """
    rows = torch.zeros(len(data), 4 + 2 * data.num_classes, dtype=torch.float64)
    for i in range(processes.rank, len(data), processes.count):
        rows[i] = _row(model, data, i, reduction)
    rows = processes.add(rows.to(data.device)).cpu()
    loss, total, seg, objects = rows[:, :4].sum(0).tolist()
    both, either = rows[:, 4:].sum(0).reshape(2, data.num_classes)
    loss /= max(total, 1e-30)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "iou": _mean_ratio(both[1:], either[1:]),
        "mean_iou": _mean_ratio(both, either),
        "seg": seg / objects if data.num_classes == 2 and objects else None,
    }


def _mean_ratio(both: Tensor, either: Tensor) -> float:
    present = either > 0
    return float((both[present] / either[present]).mean()) if present.any() else 1.0


def _row(model: UNet, data: Dataset, i: int, reduction: str) -> Tensor:
    """Of an image: sums of loss, of its divisor, of SEG, of objects; of classes, two each."""
    image, labels = data.sample(i)
    scores = scores_of(model, image, data.device)
    target, weights = (x.cpu() for x in data.targets(labels[None]))
    loss = weighted_ce(scores[None], target, weights, ignore_index=IGNORED, reduction="sum")
    if reduction == "weighted_mean":
        total = float(weights.sum(dtype=torch.float64))
    else:
        total = float((target != IGNORED).sum()) if reduction == "mean" else 1.0

    truth, labels = data.classes(labels).cpu(), labels.cpu()
    found = scores.argmax(0)
    counts = truth != IGNORED
    hits = [
        (((truth == k) & (found == k)).sum(), (((truth == k) | (found == k)) & counts).sum())
        for k in range(data.num_classes)
    ]
    seg, objects = 0.0, 0
    if data.num_classes == 2:
        reference = torch.where(counts & (truth > 0), labels, 0).numpy()
        objects = len(np.unique(reference[reference > 0]))
        if objects:
            predicted = Objects(grow=model.ridge_width).of_mask((found > 0).numpy())
            seg = objects * metrics.seg(reference, np.where(counts, predicted, 0))
    both, either = zip(*hits, strict=True)
    return torch.tensor([float(loss), total, seg, objects, *both, *either], dtype=torch.float64)
