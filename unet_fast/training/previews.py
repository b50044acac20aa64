"""Pictures of a run: tiles, curves, predictions; and scalars for TensorBoard."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import make_folder
from ..contracts.border_weight_map import IGNORED
from ..objects import ObjectRule
from ..plots import draw_curves, draw_previews
from .tiles import Dataset
from .validation import Look


def tiles_file(out: Path) -> Path:
    """Returns the file for the picture of the first step's tiles."""
    return make_folder(out / "previews") / "tiles.png"


def tile_panels(data: Dataset, tiles: Tensor, labels: Tensor) -> list[Any]:
    """Returns up to four tiles of a step, as the network gets them, for :func:`draw_tiles`.

    Args:
        data: The images that the tiles come from.
        tiles: (N, C, *S).
        labels: Labels of the tiles' centres, (N, *s).
    """
    _, weights = data.targets(labels)
    panels = []
    for tile, ids, of_tile in zip(tiles[:4], labels, weights, strict=False):
        known = torch.where(data.classes(ids) == IGNORED, 0, ids)
        cut = data.cut_of(known.cpu().numpy())
        image = tile.mean(0)
        if data.dims == 3:  # only planes of the centre can be drawn beside those of the labels
            for axis, side in enumerate(ids.shape):
                image = image.narrow(axis, (image.shape[axis] - side) // 2, side)
        panels.append((*(cut(x.cpu().numpy()) for x in (image, ids, of_tile)),))
    return panels


def run_panels(data: Dataset, looks: Sequence[Look], rule: ObjectRule | None) -> list[Any]:
    """Returns predictions of images, for :func:`draw_previews`.

    Args:
        data: The images.
        looks: Predictions of some of the images.
        rule: Rule that makes objects of them; None: classes are shown.
    """
    panels = []
    for one in looks:
        cut = data.cut_of(one.truth)
        image = data.sample(one.index)[0].mean(0).cpu().numpy()
        shown = image, one.truth, one.share.numpy(), *one.errors(rule)
        panels.append((data.names[one.index], *map(cut, shown)))
    return panels


def draw_run(
    out: Path, rows: list[dict[str, Any]], panels: list[Any], classes: bool, step: int, title: str
) -> None:
    """Draws `curves.png`, and predictions of images, `previews/step_....png`.

    Args:
        out: Folder of the run.
        rows: Rows of the run's log.
        panels: Panels of :func:`run_panels`.
        classes: Whether the panels show classes, not objects.
        step: Steps done.
        title: Title of the page of predictions.
    """
    draw_curves(out / "curves.png", rows)
    if panels:
        file = make_folder(out / "previews") / f"step_{step:06d}.png"
        draw_previews(file, panels, title, "wrong class" if classes else "no partner")


class Artist(AbstractContextManager["Artist"]):
    """Draws in a thread, one picture after the other, while the run goes on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def draw(self, function: Callable[..., None], *args: Any) -> None:
        """Draws a picture once the one before is done; an error in that one is raised here."""
        self.wait()
        self._last = self._pool.submit(function, *args)

    def wait(self) -> None:
        """Waits for the last picture; an error in it is raised here."""
        if self._last is not None:
            self._last.result()

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits for the last picture."""
        self._pool.shutdown()
        if kind is None:
            self.wait()


class Scalars:
    """Writes rows of the log for TensorBoard.

    Args:
        out: Folder of the run.
        step: Steps done; rows of later steps, written before, no longer count.

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
        """Adds the scalars of a row."""
        scalars = {k: row[k] for k in ("loss", "learning_rate", "gradient_norm")}
        for kind in ("validation", "training"):
            scalars |= {f"{kind}/{k}": v for k, v in row.get(kind, {}).items()}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes the rest, and closes the file."""
        self._writer.close()
