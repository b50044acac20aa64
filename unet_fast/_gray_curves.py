"""Random, monotone grey curves."""

import math
from typing import Any

import torch
from torch import Generator, Tensor

_CURVE_POINTS = 65
"""Points of a grey curve: enough to follow its smoothed corners within 1e-4."""


def draw_gray_curves(
    n: int,
    curves: int,
    *,
    black: tuple[float, float],
    white: tuple[float, float],
    slope: tuple[float, float],
    points: int,
    generator: Generator | None,
) -> Tensor:
    """Draws monotone grey curves, (n, curves, K), at K equal steps of the grey value from 0 to 1.

    As in the authors' code, points are inserted at random between neighbours, such that all slopes
    stay within their limits, until there are enough. The lines between points, extended beyond the
    ends, are smoothed by a Gaussian whose sigma is a quarter of the distance of points.

    Args:
        n: Number of samples.
        curves: Curves of each sample: its channels.
        black: Range of the value of 0.
        white: Range of the value of 1.
        slope: Least and greatest slope.
        points: Control points, 2^k + 1.
        generator: Source of random numbers, on the CPU; None for torch's global one.
    """
    low, high = slope

    def between(least: Tensor, most: Tensor) -> Tensor:
        size = n, curves, least.shape[2]
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        return least + (most - least) * torch.rand(size, generator=generator, **options)

    def limit(value: float) -> Tensor:
        return torch.full((n, curves, 1), value, dtype=torch.float64, device="cpu")

    first = between(limit(black[0]), limit(black[1]))
    last = between((first + low).clamp(min=white[0]), (first + high).clamp(max=white[1]))
    values = torch.cat([first, last], 2)
    while values.shape[2] < points:
        left, right = values[:, :, :-1], values[:, :, 1:]
        half = 0.5 / left.shape[2]
        middle = between(
            torch.maximum(left + low * half, right - high * half),
            torch.minimum(left + high * half, right - low * half),
        )
        pairs = torch.stack([left, middle], 3).flatten(2)
        values = torch.cat([pairs, right[:, :, -1:]], 2)

    # A Gaussian turns a corner max(x - k, 0) into s (z Phi(z) + phi(z)), z = (x - k) / s.
    intervals = values.shape[2] - 1
    slopes = values.diff(dim=2) * intervals
    x = torch.linspace(0, 1, _CURVE_POINTS, dtype=torch.float64, device="cpu")
    s = 0.25 / intervals
    knots = torch.arange(1, intervals, dtype=torch.float64, device="cpu")[:, None] / intervals
    z = (x - knots) / s
    corners = s * (z * torch.special.ndtr(z) + torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi))
    curve: Tensor = values[:, :, :1] + slopes[:, :, :1] * x + slopes.diff(dim=2) @ corners
    return curve
