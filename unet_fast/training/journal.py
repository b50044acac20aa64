"""Reports of a run: log, bar or lines, TensorBoard."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from .._progress import bar
from .checkpoint import LOG
from .previews import Scalars


class Journal(ExitStack):
    """Records a row for each step, in a `with` statement.

    Args:
        out: Folder of the run.
        step: Steps done before.
        last: Last step of the run.
        first: Whether this process writes; the others say nothing.
        tensorboard: Whether to write for TensorBoard, too.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        last: int,
        first: bool,
        tensorboard: bool,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self.path, self.first, self.clock = out / LOG, first, clock
        self.scalars = Scalars(out, step) if first and tensorboard else None
        if self.scalars is not None:
            self.callback(self.scalars.close)
        shown = bar(last, "train", "step", initial=step, hidden=not first, clock=clock)
        self.shown = self.enter_context(shown)
        path = self.path if first else Path(os.devnull)
        self.log: FileIO = self.enter_context(path.open("ab" if step else "wb", buffering=0))
        self.begun, self.images = clock(), 0

    def add(self, row: dict[str, Any], said: str, images: int) -> None:
        """Adds a row to the log, and shows it.

        Args:
            row: What the log says of a step.
            said: What the bar says of the last evaluation.
            images: Number of tiles of the step.

        Raises:
            ValueError: If the log cannot be written.
        """
        if self.first:
            try:
                self.log.write((json.dumps(row, allow_nan=False) + "\n").encode())
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self.scalars is not None:
            self.scalars.add(row)
        self.images += images
        speed = self.images / max(self.clock() - self.begun, 1e-9)
        text = f"loss {row['loss']:.3f}{said}, {speed:.3g} images/s"
        self.shown.set_postfix_str(text, refresh=False)
        self.shown.update()
