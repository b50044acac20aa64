"""What a run draws while it goes on: tiles, curves, predictions; TensorBoard if asked for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import read_log
from .dataset import Dataset
from .imageio import make_folder
from .plots import draw_curves, draw_previews, draw_tiles
from .predict import scores_of
from .reference.border_weight_map import IGNORED
from .unet import UNet


def draw_first_tiles(out: Path, data: Dataset, tiles: Tensor, labels: Tensor) -> None:
    """Draws tiles of a step as the network gets them, up to four: `previews/tiles.png`.

    Args:
        out: The run.
        data: Where they come from.
        tiles: (N, C, H, W).
        labels: Of their centres, (N, h, w).
    """
    _, weights = data.targets(labels)
    panels = [
        (tile.mean(0).cpu().numpy(), ids.cpu().numpy(), w.cpu().numpy())
        for tile, ids, w in zip(tiles[:4], labels, weights, strict=False)
    ]
    draw_tiles(make_folder(out / "previews") / "tiles.png", panels)


def draw_run(out: Path, model: UNet, data: Dataset, count: int, step: int, title: str) -> None:
    """Draws `curves.png`, and predictions of the first images: `previews/step_....png`.

    Args:
        out: The run.
        model: The network.
        data: The images.
        count: How many of them, >= 0.
        step: Steps done.
        title: Title of the page of predictions.
    """
    draw_curves(out / "curves.png", read_log(out))
    panels = []
    for i in range(min(count, len(data))):
        image, labels = data.sample(i)
        scores = scores_of(model, image, data.device)
        truth = data.classes(labels).cpu()
        found = scores.argmax(0).masked_fill(truth == IGNORED, 0)
        truth = truth.masked_fill(truth == IGNORED, 0)
        panels.append(
            (
                data.names[i],
                image.mean(0).cpu().numpy(),
                torch.where(truth > 0, labels.cpu(), 0).numpy(),
                1 - scores.softmax(0)[0].numpy(),
                truth.numpy(),
                found.numpy(),
            )
        )
    if panels:
        draw_previews(make_folder(out / "previews") / f"step_{step:06d}.png", panels, title)


class Scalars:
    """Writes rows of the log for TensorBoard.

    Args:
        out: The run.
        step: Steps done; what was written of later ones no longer counts.

    Raises:
        ValueError: If TensorBoard is not installed.
    """

    def __init__(self, out: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "train: tensorboard must be installed (pip install 'unet_fast[tensorboard]'), "
                f"got: {error}"
            ) from None
        self._writer: Any = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        scalars = {k: row[k] for k in ("loss", "learning_rate", "gradient_norm")}
        scalars |= {f"validation/{k}": v for k, v in row.get("validation", {}).items()}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
