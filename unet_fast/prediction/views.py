"""Test-time augmentation: scores of rotated and flipped views of the plane are averaged.

docs/prediction.md explains why tiles agree with the whole image here, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..unet import UNet
from .tiling import Tiling

Region = tuple[int, int, int, int]
"""First row, first column, rows, columns of a part of the plane."""


class View(Protocol):
    """A view of the plane. What it gives for a tile does not depend on how tiles are cut."""

    def region(self, tiling: Tiling, origin: tuple[int, int]) -> Region:
        """Returns the part of the plane that the view needs for a tile."""

    def enter(self, part: Tensor, tiling: Tiling, origin: tuple[int, int]) -> Tensor:
        """Turns a part of the plane, (C, h, w), into the network's input, (C, H, W)."""

    def leave(self, scores: Tensor, tiling: Tiling, origin: tuple[int, int]) -> Tensor:
        """Turns the network's output, (K, H', W'), into that of the tile, (K, rows, columns)."""


@dataclass(frozen=True)
class Symmetry:
    """A flip of the columns or none, then quarter turns.

    The network's input and output are concentric, so the tile's own input, turned, gives the tile's
    scores, turned. Sides of the input are equal modulo 2^depth, so the poolings of neighbouring
    tiles still fall on one grid.
    """

    flip: bool = False
    turns: int = 0

    def region(self, tiling: Tiling, origin: tuple[int, int]) -> Region:
        """See :class:`View`."""
        return origin[0] - tiling.border, origin[1] - tiling.border, *tiling.input

    def enter(self, part: Tensor, tiling: Tiling, origin: tuple[int, int]) -> Tensor:
        """See :class:`View`."""
        return torch.rot90(part.flip(-1) if self.flip else part, self.turns, (-2, -1))

    def leave(self, scores: Tensor, tiling: Tiling, origin: tuple[int, int]) -> Tensor:
        """See :class:`View`."""
        scores = torch.rot90(scores, -self.turns, (-2, -1))
        scores = scores.flip(-1) if self.flip else scores
        for axis, size in zip((-2, -1), tiling.tile, strict=True):
            scores = scores.narrow(axis, tiling.halo, size)
        return scores


class Rotation:
    """A rotation about pixel (0, 0) by any angle, counter-clockwise, with bilinear interpolation.

    Positions are computed in float64 from those in the plane, so that tiles agree.
    """

    def __init__(self, model: UNet, degrees: float) -> None:
        self.model = model
        self.sine, self.cosine = (f(math.radians(degrees)) for f in (math.sin, math.cos))

    def region(self, tiling: Tiling, origin: tuple[int, int]) -> Region:
        """See :class:`View`."""
        start, size = self._turned(tiling, origin)
        shape = self._input(tiling, size)
        firsts = [s - tiling.border for s in start]
        ends = [(s, s + n - 1) for s, n in zip(firsts, shape, strict=True)]
        rows, columns = self._back(*_corners(ends))
        first = [math.floor(x.min()) for x in (rows, columns)]
        last = [math.floor(x.max()) + 1 for x in (rows, columns)]
        return first[0], first[1], last[0] - first[0] + 1, last[1] - first[1] + 1

    def enter(self, part: Tensor, tiling: Tiling, origin: tuple[int, int]) -> Tensor:
        """See :class:`View`."""
        start, size = self._turned(tiling, origin)
        axes = [
            torch.arange(s - tiling.border, s - tiling.border + n, device=part.device).double()
            for s, n in zip(start, self._input(tiling, size), strict=True)
        ]
        first = self.region(tiling, origin)[:2]
        return _sampled(part, self._back(axes[0][:, None], axes[1]), first)

    def leave(self, scores: Tensor, tiling: Tiling, origin: tuple[int, int]) -> Tensor:
        """See :class:`View`."""
        start, _ = self._turned(tiling, origin)
        axes = [
            torch.arange(o, o + n, device=scores.device).double()
            for o, n in zip(origin, tiling.tile, strict=True)
        ]
        first = start[0] - tiling.halo, start[1] - tiling.halo
        return _sampled(scores, self._forth(axes[0][:, None], axes[1]), first)

    def _back(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Maps positions in the turned plane to the plane."""
        return self.cosine * row + self.sine * column, self.cosine * column - self.sine * row

    def _forth(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        return self.cosine * row - self.sine * column, self.cosine * column + self.sine * row

    def _turned(self, tiling: Tiling, origin: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Returns start and size of the box around a turned tile; the size is that of all tiles."""
        step = 2**self.model.depth
        ends = [(o, o + n - 1) for o, n in zip(origin, tiling.tile, strict=True)]
        start = [math.floor(x.min()) // step * step for x in self._forth(*_corners(ends))]
        # One more pixel at the end, to interpolate; up to step - 1 more at the start.
        high, wide = (n - 1 for n in tiling.tile)
        sine, cosine = abs(self.sine), abs(self.cosine)
        spans = cosine * high + sine * wide, cosine * wide + sine * high
        return start, [-(-(math.floor(span) + 2 + step) // step) * step for span in spans]

    def _input(self, tiling: Tiling, size: list[int]) -> tuple[int, ...]:
        return self.model.input_shape([n + 2 * tiling.halo for n in size])


GROUPS: dict[str, list[View]] = {
    "flips": [Symmetry(flip, turns) for flip in (False, True) for turns in (0, 2)],
    "rotations": [Symmetry(False, turns) for turns in range(4)],
    "square": [Symmetry(flip, turns) for flip in (False, True) for turns in range(4)],
}
"""Groups of views, by name."""


def views_of(model: UNet, tta: str | Sequence[float] | None) -> list[View]:
    """Returns the views to average.

    Args:
        model: The network.
        tta: None; ``"flips"``, the four of rows and columns; ``"rotations"``, by 0, 90, 180 and
            270 degrees; ``"square"``, these with and without a flip; or angles in degrees.

    Raises:
        ValueError: If `tta` is something else, or an angle is not finite.
    """
    if tta is None:
        return [Symmetry()]
    if isinstance(tta, str):
        if tta not in GROUPS:
            raise ValueError(
                f"predict: tta must be flips, rotations, square or a list of angles, got {tta!r}"
            )
        return GROUPS[tta]
    if not tta or not all(math.isfinite(angle) for angle in tta):
        raise ValueError(f"predict: tta must hold at least one angle, all finite, got {list(tta)}")
    return [
        Symmetry(False, round(angle / 90) % 4) if angle % 90 == 0 else Rotation(model, angle)
        for angle in tta
    ]


def _corners(ends: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.tensor(pair, dtype=torch.float64) for pair in ends)
    return rows[:, None], columns


def _sampled(part: Tensor, at: tuple[Tensor, Tensor], first: tuple[int, int]) -> Tensor:
    """Reads `part`, (C, h, w), whose first pixel lies at `first`, bilinearly at positions `at`."""
    width = part.shape[-1]
    floors = [x.floor() for x in at]
    down, right = ((x - f).to(part.dtype) for x, f in zip(at, floors, strict=True))
    row, column = (f.long() - start for f, start in zip(floors, first, strict=True))
    flat = part.flatten(-2)
    index = row * width + column

    def along_row(index: Tensor) -> Tensor:
        left = flat[..., index]
        return left + right * (flat[..., index + 1] - left)

    above = along_row(index)
    return above + down * (along_row(index + width) - above)
