"""Settings of a prediction, in Python and on the command line."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..contracts.types import check_fields

OVERLAYS = "overlays"
"""Folder of the overlays, inside the folder of the results."""


@dataclass(frozen=True)
class Options:
    """What to predict, and how: the settings of :func:`unet_fast.predict`.

    Raises ValueError if a type or a text breaks its rule; :class:`Predictor` checks the rest.
    """

    output: Literal["instances", "labels", "probabilities", "scores"] = "probabilities"
    """instances (objects, numbered), labels (classes), probabilities or scores before softmax."""
    min_area: int | None = None
    """Minimum pixels of a connected component of seeds, for instances. Default: as trained."""
    grow: int | None = None
    """Pixels that instances grow into gaps between them, in [0, 16]. Default: as trained."""
    seed_threshold: float | None = None
    """Pixels with a higher foreground probability are seeds of instances; in [0, 1); 0: all
    foreground. Default: as trained."""
    foreground_threshold: float | None = None
    """Pixels with a higher foreground probability belong to instances; in [0, 1). Default: as
    trained."""
    holes: int | None = None
    """Holes in an instance of up to this many pixels, in [0, 1024], are filled. Default: as
    trained."""
    tta: str | Sequence[float] | None = None
    """Average over views: flips (4, of volumes 8), rotations (4), square (8), or angles in degrees:
    0,30,60. Of volumes each plane is rotated."""
    average: Literal["scores", "probabilities"] | None = None
    """What is averaged. Default: scores."""
    tile: int | Sequence[int] | str | None = None
    """Side of a tile in pixels, >= 1, or one for each axis: 32,128,128; the result does not depend
    on it. Default: chosen."""
    memory_budget: int | str | None = None
    """Memory for the tiles being processed, in bytes or like 500MB or 2GiB."""
    batch_size: int | None = None
    """Tiles in a batch, >= 1."""
    precision: str | torch.dtype | None = None
    """Precision of the convolutions: bfloat16 or float16 (autocast). Default: as the weights."""
    compile: bool = False
    """Compile the network with torch.compile: worth it for many tiles."""

    def __post_init__(self) -> None:
        """Checks types, and parses options that are given as text."""
        check_fields("predict", self)
        if isinstance(self.precision, torch.dtype):
            self._set("precision", str(self.precision).removeprefix("torch."))
        if isinstance(self.memory_budget, str):
            self._set("memory_budget", _bytes_in(self.memory_budget))
        if isinstance(self.tile, str):
            self._set("tile", _sides_in(self.tile))
        if isinstance(self.tta, str):
            with contextlib.suppress(ValueError):  # the name of a group of views
                self._set("tta", tuple(float(word) for word in self.tta.split(",")))

    @property
    def sides(self) -> int | Sequence[int] | None:
        """The side or sides of a tile."""
        assert not isinstance(self.tile, str)
        return self.tile

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        assert not isinstance(self.memory_budget, str)
        return self.memory_budget

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def rule(self) -> dict[str, float]:
        """Settings of the object rule that are given; the model has the others."""
        names = ("min_area", "grow", "seed_threshold", "foreground_threshold", "holes")
        return {k: v for k in names if (v := getattr(self, k)) is not None}


def _sides_in(text: str) -> int | tuple[int, ...]:
    """Parses sides like 512 or 32,128,128."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"predict: tile must be like 512 or 32,128,128, got {text}")
    sides = tuple(map(int, words))
    return sides if len(sides) > 1 else sides[0]


def _bytes_in(text: str) -> int:
    """Parses a size like 500MB or 2GiB. Returns bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", text.strip())
    if found is None:
        raise ValueError(f"memory-budget must be like 500MB or 2GiB, got {text}")
    number, prefix, binary = found.groups()
    power: int = (1024 if binary else 1000) ** " kMGT".index(prefix or " ")
    return int(float(number) * power)
