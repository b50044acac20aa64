"""Test-time augmentation: scores of rotated and flipped views of the plane are averaged.

Of volumes the last two axes are rotated; each axis is flipped.

docs/prediction.md explains why tiles agree with the whole image here, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..unet import UNet
from .tiling import Shape, Tiling

Region = tuple[Shape, Shape]
"""First pixel and size of a part of the plane."""


class View(Protocol):
    """A view of the plane, or of the space that a volume continues into by mirroring.

    What it gives for a tile does not depend on how tiles are cut.
    """

    def region(self, tiling: Tiling, origin: Shape) -> Region:
        """Returns the part of the plane that the view needs for a tile."""

    def enter(self, part: Tensor, tiling: Tiling, origin: Shape) -> Tensor:
        """Turns a part of the plane, (C, *region), into the network's input, (C, *input)."""

    def leave(self, scores: Tensor, tiling: Tiling, origin: Shape) -> Tensor:
        """Turns the network's output, (K, *output), into that of the tile, (K, *tile)."""


@dataclass(frozen=True)
class Symmetry:
    """Flips of axes, counted from the last one, -1, then quarter turns of the last two axes.

    The network's input and output are concentric, so the tile's own input, turned, gives the tile's
    scores, turned. Sides of the input are equal modulo the alignment, so the poolings of
    neighbouring tiles still fall on one grid.
    """

    flips: tuple[int, ...] = ()
    turns: int = 0

    def region(self, tiling: Tiling, origin: Shape) -> Region:
        """See :class:`View`."""
        first = tuple(o - b for o, b in zip(origin, tiling.border, strict=True))
        return first, tiling.input

    def enter(self, part: Tensor, tiling: Tiling, origin: Shape) -> Tensor:
        """See :class:`View`."""
        return torch.rot90(self._flipped(part), self.turns, (-2, -1))

    def leave(self, scores: Tensor, tiling: Tiling, origin: Shape) -> Tensor:
        """See :class:`View`."""
        scores = self._flipped(torch.rot90(scores, -self.turns, (-2, -1)))
        kept = (slice(h, h + n) for h, n in zip(tiling.halo, tiling.tile, strict=True))
        return scores[:, *kept]

    def _flipped(self, x: Tensor) -> Tensor:
        return x.flip(self.flips) if self.flips else x


class Rotation:
    """A rotation about pixel (0, 0) by any angle, counter-clockwise, with bilinear interpolation.

    Positions are computed in float64 from those in the plane, so that tiles agree. Of a volume each
    plane is rotated by itself.
    """

    def __init__(self, model: UNet, degrees: float) -> None:
        self.model = model
        self.sine, self.cosine = (f(math.radians(degrees)) for f in (math.sin, math.cos))

    def region(self, tiling: Tiling, origin: Shape) -> Region:
        """See :class:`View`."""
        first, shape = self._box(tiling, origin)
        ends = [(s, s + n - 1) for s, n in zip(first[-2:], shape[-2:], strict=True)]
        positions = self._back(*_corners(ends))
        begin = tuple(math.floor(x.min()) for x in positions)
        last = (math.floor(x.max()) + 1 for x in positions)
        sides = tuple(b - a + 1 for a, b in zip(begin, last, strict=True))
        return first[:-2] + begin, shape[:-2] + sides

    def enter(self, part: Tensor, tiling: Tiling, origin: Shape) -> Tensor:
        """See :class:`View`."""
        rows, columns = _positions(*self._box(tiling, origin), part.device)
        return _sampled(part, self._back(rows, columns), self.region(tiling, origin)[0])

    def leave(self, scores: Tensor, tiling: Tiling, origin: Shape) -> Tensor:
        """See :class:`View`."""
        rows, columns = _positions(origin, tiling.tile, scores.device)
        start, _ = self._turned(tiling, origin)
        first = tuple(s - h for s, h in zip(start, tiling.halo, strict=True))
        depth = (slice(h, h + n) for h, n in zip(tiling.halo[:-2], tiling.tile[:-2], strict=True))
        return _sampled(scores[:, *depth], self._forth(rows, columns), first)

    def _back(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Maps positions in the turned plane to the plane."""
        return self.cosine * row + self.sine * column, self.cosine * column - self.sine * row

    def _forth(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        return self.cosine * row - self.sine * column, self.cosine * column + self.sine * row

    def _turned(self, tiling: Tiling, origin: Shape) -> tuple[Shape, Shape]:
        """Returns start and size of the box around a turned tile; the size is that of all tiles."""
        steps = self.model.alignment[-2:]
        ends = [(o, o + n - 1) for o, n in zip(origin[-2:], tiling.tile[-2:], strict=True)]
        corners = self._forth(*_corners(ends))
        start = (math.floor(x.min()) // step * step for x, step in zip(corners, steps, strict=True))
        # One more pixel at the end, to interpolate; up to step - 1 more at the start.
        high, wide = (n - 1 for n in tiling.tile[-2:])
        sine, cosine = abs(self.sine), abs(self.cosine)
        spans = cosine * high + sine * wide, cosine * wide + sine * high
        pairs = zip(spans, steps, strict=True)
        sides = (-(-(math.floor(span) + 2 + step) // step) * step for span, step in pairs)
        return (*origin[:-2], *start), (*tiling.tile[:-2], *sides)

    def _box(self, tiling: Tiling, origin: Shape) -> Region:
        """Returns first pixel and size of the network's input, in the turned plane."""
        start, size = self._turned(tiling, origin)
        first = tuple(s - b for s, b in zip(start, tiling.border, strict=True))
        wide = [n + 2 * h for n, h in zip(size, tiling.halo, strict=True)]
        return first, self.model.input_shape(wide)


GROUPS = {"flips": (0, 2), "rotations": range(4), "square": range(4)}
"""Groups of views, by name, and their quarter turns."""


def views_of(model: UNet, tta: str | Sequence[float] | None) -> list[View]:
    """Returns the views to average.

    Args:
        model: The network.
        tta: None; ``"flips"``, along each axis and all together: 4 of images, 8 of volumes;
            ``"rotations"``, by 0, 90, 180 and 270 degrees; ``"square"``, these with and without a
            flip; or angles in degrees. Of a volume each plane is rotated by itself.

    Raises:
        ValueError: If `tta` is something else, an angle is not finite, or quarter turns are asked
            for that the network does not take for its own.
    """
    views: list[View]
    if tta is None:
        return [Symmetry()]
    if isinstance(tta, str):
        if tta not in GROUPS:
            raise ValueError(
                f"predict: tta must be flips, rotations, square or a list of angles, got {tta!r}"
            )
        # A half turn flips rows and columns.
        depth = ((), (-3,)) if tta == "flips" and model.dims == 3 else ((),)
        columns = ((),) if tta == "rotations" else ((), (-1,))
        views = [Symmetry(d + c, k) for d in depth for c in columns for k in GROUPS[tta]]
    else:
        if not tta or not all(math.isfinite(angle) for angle in tta):
            raise ValueError(
                f"predict: tta must hold at least one angle, all finite, got {list(tta)}"
            )
        views = [
            Symmetry((), round(angle / 90) % 4) if angle % 90 == 0 else Rotation(model, angle)
            for angle in tta
        ]
    unlike = any(row[-2] != row[-1] for row in (*model.kernels, *model.poolings))
    if unlike and any(isinstance(view, Symmetry) and view.turns % 2 for view in views):
        raise ValueError(
            "predict: tta must be without quarter turns where kernels or poolings differ along Y "
            f"and X, got {tta}"
        )
    return views


def _corners(ends: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.tensor(pair, dtype=torch.float64) for pair in ends)
    return rows[:, None], columns


def _positions(first: Shape, size: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the rows, as a column, and the columns of a part of the plane."""
    rows, columns = (
        torch.arange(f, f + n, device=device).double()
        for f, n in zip(first[-2:], size[-2:], strict=True)
    )
    return rows[:, None], columns


def _sampled(part: Tensor, at: tuple[Tensor, Tensor], first: Shape) -> Tensor:
    """Reads planes, (..., h, w), whose first pixel is `first`, bilinearly at positions `at`."""
    width = part.shape[-1]
    floors = [x.floor() for x in at]
    down, right = ((x - f).to(part.dtype) for x, f in zip(at, floors, strict=True))
    row, column = (f.long() - start for f, start in zip(floors, first[-2:], strict=True))
    flat = part.flatten(-2)
    index = row * width + column

    def along_row(index: Tensor) -> Tensor:
        left = flat[..., index]
        return left + right * (flat[..., index + 1] - left)

    above = along_row(index)
    return above + down * (along_row(index + width) - above)
