"""What a run draws while it goes on: tiles, curves, predictions; TensorBoard if asked for."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from .components import Objects
from .dataset import Dataset
from .imageio import make_folder
from .plots import draw_curves, draw_previews, draw_tiles
from .validation import Look


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


def draw_run(
    out: Path,
    rows: list[dict[str, Any]],
    data: Dataset,
    looks: Sequence[Look],
    rule: Objects | None,
    step: int,
    title: str,
) -> None:
    """Draws `curves.png`, and what a network says of images: `previews/step_....png`.

    Args:
        out: The run.
        rows: Its log.
        data: The images.
        looks: What the network says of some of them.
        rule: How it becomes objects; None: their classes are shown.
        step: Steps done.
        title: Title of the page of predictions.
    """
    draw_curves(out / "curves.png", rows)
    panels = []
    for one in looks:
        image, _ = data.sample(one.index)
        panels.append(
            (
                data.names[one.index],
                image.mean(0).cpu().numpy(),
                one.truth,
                one.share.numpy(),
                *one.errors(rule),
            )
        )
    if panels:
        file = make_folder(out / "previews") / f"step_{step:06d}.png"
        draw_previews(file, panels, title, "wrong class" if rule is None else "no partner")


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
        scalars |= {f"validation/{k}": v for k, v in row.get("validation", {}).items()}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
