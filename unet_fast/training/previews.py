"""What a run draws while it goes on: tiles, curves, predictions; TensorBoard if asked for."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from .._files import make_folder
from ..objects import ObjectRule
from ..plots import draw_curves, draw_previews
from .tiles import Dataset
from .validation import Look


def tiles_file(out: Path) -> Path:
    """Where the tiles of the first step are drawn."""
    return make_folder(out / "previews") / "tiles.png"


def tile_panels(
    data: Dataset, tiles: Tensor, labels: Tensor
) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Tiles of a step as the network gets them, up to four, for :func:`draw_tiles`.

    Args:
        data: Where they come from.
        tiles: (N, C, H, W).
        labels: Of their centres, (N, h, w).
    """
    _, weights = data.targets(labels)
    return [
        (tile.mean(0).cpu().numpy(), ids.cpu().numpy(), w.cpu().numpy())
        for tile, ids, w in zip(tiles[:4], labels, weights, strict=False)
    ]


def run_panels(data: Dataset, looks: Sequence[Look], rule: ObjectRule | None) -> list[Any]:
    """What a network says of images, for :func:`draw_previews`.

    Args:
        data: The images.
        looks: What the network says of some of them.
        rule: How it becomes objects; None: their classes are shown.
    """
    return [
        (
            data.names[one.index],
            data.sample(one.index)[0].mean(0).cpu().numpy(),
            one.truth,
            one.share.numpy(),
            *one.errors(rule),
        )
        for one in looks
    ]


def draw_run(
    out: Path, rows: list[dict[str, Any]], panels: list[Any], classes: bool, step: int, title: str
) -> None:
    """Draws `curves.png`, and what a network says of images: `previews/step_....png`.

    Args:
        out: The run.
        rows: Its log.
        panels: Of :func:`run_panels`.
        classes: Whether they show classes, not objects.
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
        """Draws a picture once the one before is done; what went wrong with that is raised."""
        self._wait()
        self._last = self._pool.submit(function, *args)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits for the last one."""
        self._pool.shutdown()
        if kind is None:
            self._wait()


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
        for kind in ("validation", "training"):
            scalars |= {f"{kind}/{k}": v for k, v in row.get(kind, {}).items()}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
