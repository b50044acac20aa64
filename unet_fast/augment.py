"""Random augmentation. All of its random numbers are drawn here, from a generator on the CPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Generator, Tensor

from .contracts.types import check_fields, check_tensors
from .ops import elastic_deform

_CURVE_POINTS = 65
"""Points of a grey curve: enough to follow its smoothed corners within 1e-4."""


@dataclass(frozen=True)
class AugmentationParameters:
    """Parameters drawn by :meth:`Augmentation.draw` for n samples, for :func:`elastic_deform`."""

    displacement: Tensor
    """Displacements of the grid, (n, 2, P, Q), in pixels."""
    affine: Tensor
    """Affine maps, (n, 2, 3), from output to input coordinates."""
    gray_curve: Tensor | None
    """Grey curves, (n, C, K) or (n, 1, K); None: grey values stay."""

    def __len__(self) -> int:
        return len(self.affine)

    def __getitem__(self, samples: slice | list[int]) -> "AugmentationParameters":
        """Selects the parameters of some of the samples."""
        curve = self.gray_curve
        return AugmentationParameters(
            self.displacement[samples],
            self.affine[samples],
            None if curve is None else curve[samples],
        )


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random deformation of images and their labels.

    Raises ValueError if a value is out of range.
    """

    sigma: float = 10.0
    """Standard deviation of the displacements of the grid, >= 0, in pixels."""
    points: tuple[int, int] = (3, 3)
    """Number of displacements along rows and columns, each >= 1; not used with spacing."""
    grid: Literal["interpolating", "approximating", "keys"] = "interpolating"
    """interpolating: a B-spline through the displacements; approximating: a B-spline with them as
    coefficients; keys: cubic convolution."""
    spacing: float | None = None
    """Knot distance of an approximating grid in pixels, instead of points; None: use points."""
    rotation: float = 180.0
    """Angles are uniform in +-rotation about the centre, in degrees."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Magnification is uniform between the two factors, > 0."""
    shift: float = 0.0
    """Shifts are uniform in +-shift along both axes, in pixels."""
    flip: bool = False
    """Mirror half of the samples."""
    gray_black: tuple[float, float] = (-0.05, 0.05)
    """Range of the new grey value of black (0), drawn uniformly."""
    gray_white: tuple[float, float] = (0.95, 1.05)
    """Range of the new grey value of white (1), drawn uniformly as far as the slopes allow."""
    gray_slope: tuple[float, float] = (0.8, 1.2)
    """Least and greatest slope of the random, monotone grey curve, >= 0."""
    gray_points: Literal[2, 3, 5, 9] = 5
    """Control points of the grey curve, which is smoothed between them."""

    def __post_init__(self) -> None:
        """Checks the values. Raises ValueError if one is out of range."""
        check_fields("Augmentation", self)
        low, high = self.gray_slope
        reach = self.gray_white[0] - self.gray_black[0], self.gray_white[1] - self.gray_black[1]
        approximating = self.grid == "approximating"
        rules = (
            ("sigma", 0 <= self.sigma < math.inf, "be >= 0"),
            ("points", len(self.points) == 2 and min(self.points) >= 1, "be two counts >= 1"),
            (
                "grid",
                self.grid in ("interpolating", "approximating", "keys"),
                "be interpolating, approximating or keys",
            ),
            (
                "spacing",
                self.spacing is None or (approximating and 1 <= self.spacing < math.inf),
                "be None, or >= 1 with an approximating grid",
            ),
            (
                "points",
                self.spacing is not None or not approximating or min(self.points) >= 4,
                "be at least 4 along each axis for an approximating grid",
            ),
            ("rotation", 0 <= self.rotation < math.inf, "be >= 0"),
            ("shift", 0 <= self.shift < math.inf, "be >= 0"),
            (
                "scale",
                0 < self.scale[0] <= self.scale[1] < math.inf,
                "be two ascending factors > 0",
            ),
            ("gray_black", -math.inf < self.gray_black[0] <= self.gray_black[1], "be ascending"),
            (
                "gray_white",
                self.gray_white[0] <= self.gray_white[1] < math.inf,
                "be ascending",
            ),
            ("gray_slope", 0 <= low <= high < math.inf, "be ascending and >= 0"),
            (
                "gray_slope",
                low <= reach[1] and high >= reach[0],
                "allow a white for every black between them",
            ),
            ("gray_points", self.gray_points in (2, 3, 5, 9), "be 2, 3, 5 or 9"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"Augmentation: {name} must {rule}, got {getattr(self, name)}")

    @classmethod
    def paper_2015(cls) -> "Augmentation":
        """Returns the paper's recipe: 10 px displacements, 3 x 3 points, any rotation, grey values.

        The paper gives no ranges of rotation and grey values; these are from the authors' later
        code. Shifts come from the random positions of training tiles.
        """
        return cls()

    @classmethod
    def falk_2019(cls) -> "Augmentation":
        """Returns the recipe of Falk et al. 2019 in 2D: spline coefficients 150 px apart.

        Their standard deviation of 10 px is that of the coefficients; that of displacements is 4.8
        px. Rotation is about the centre of the tile, in their code about a point half a pixel off.
        """
        return cls(grid="approximating", spacing=150.0)

    def draw(
        self, n: int, shape: Sequence[int], *, generator: Generator | None = None
    ) -> AugmentationParameters:
        """Draws the parameters of n samples.

        Args:
            n: Number of samples, in [0, 2^31 - 1].
            shape: Shape of a sample's output, (H, W) or (C, H, W); with channels, each has a grey
                curve of its own.
            generator: Source of random numbers, on the CPU; None for torch's global one. The same
                state gives the same parameters for every device.
        """
        if (
            isinstance(n, bool)
            or not isinstance(n, Integral)
            or not isinstance(generator, Generator | None)
        ):
            raise TypeError(
                "Augmentation.draw: n must be an integer, generator a torch.Generator, got "
                f"{n!r} and {type(generator).__name__}"
            )
        if not 0 <= n < 2**31 or len(shape) not in (2, 3):
            raise ValueError(
                "Augmentation.draw: n must be in [0, 2^31 - 1] and shape (H, W) or (C, H, W), got "
                f"{n} and {tuple(shape)}"
            )
        *channels, height, width = shape

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *size, generator=generator)

        points = self.points
        if self.spacing is not None:
            points = int(height // self.spacing) + 4, int(width // self.spacing) + 4
        displacement = self.sigma * torch.randn(n, 2, *points, generator=generator)
        angle = torch.deg2rad(uniform(-self.rotation, self.rotation)).double()
        scale = uniform(*self.scale).double()
        shift = uniform(-self.shift, self.shift, 2).double()
        mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.5 * self.flip).double()

        # About the centre c: input = R (output - c) / scale + c - shift.
        cos, sin = angle.cos() / scale, angle.sin() / scale
        linear = torch.stack([cos, sin * mirror, -sin, cos * mirror], 1).reshape(n, 2, 2)
        centre = torch.tensor([(height - 1) / 2, (width - 1) / 2], dtype=torch.float64)
        translation = centre - linear @ centre - shift
        affine = torch.cat([linear, translation[:, :, None]], 2)

        curves = channels[0] if channels else 1
        gray_curve = self._draw_curves(n, curves, generator)
        return AugmentationParameters(displacement, affine, gray_curve)

    def _draw_curves(self, n: int, curves: int, generator: Generator | None) -> Tensor | None:
        """Draws monotone grey curves, (n, curves, _CURVE_POINTS); None if they change nothing.

        As in the authors' code, points are inserted at random between neighbours, such that all
        slopes stay within their limits, until there are enough. The lines between points, extended
        beyond the ends, are smoothed by a Gaussian whose sigma is a quarter of the distance of
        points.
        """
        if (self.gray_black, self.gray_white, self.gray_slope) == ((0, 0), (1, 1), (1, 1)):
            return None
        low, high = self.gray_slope

        def between(least: Tensor, most: Tensor) -> Tensor:
            share = torch.rand(n, curves, least.shape[2], generator=generator, dtype=torch.float64)
            return least + (most - least) * share

        def limit(value: float) -> Tensor:
            return torch.full((n, curves, 1), value, dtype=torch.float64)

        black = between(limit(self.gray_black[0]), limit(self.gray_black[1]))
        white = between(
            (black + low).clamp(min=self.gray_white[0]),
            (black + high).clamp(max=self.gray_white[1]),
        )
        points = torch.cat([black, white], 2)
        while points.shape[2] < self.gray_points:
            left, right = points[:, :, :-1], points[:, :, 1:]
            half = 0.5 / left.shape[2]
            middle = between(
                torch.maximum(left + low * half, right - high * half),
                torch.minimum(left + high * half, right - low * half),
            )
            pairs = torch.stack([left, middle], 3).flatten(2)
            points = torch.cat([pairs, right[:, :, -1:]], 2)

        # A Gaussian turns a corner max(x - k, 0) into s (z Phi(z) + phi(z)), z = (x - k) / s.
        intervals = points.shape[2] - 1
        slopes = points.diff(dim=2) * intervals
        x = torch.linspace(0, 1, _CURVE_POINTS, dtype=torch.float64)
        s = 0.25 / intervals
        knots = torch.arange(1, intervals, dtype=torch.float64)[:, None] / intervals
        z = (x - knots) / s
        corners = s * (z * torch.special.ndtr(z) + torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi))
        curve: Tensor = points[:, :, :1] + slopes[:, :, :1] * x + slopes.diff(dim=2) @ corners
        return curve

    def apply(
        self,
        image: Tensor,
        labels: Tensor | None,
        parameters: AugmentationParameters,
        *,
        output_shape: Sequence[int] | None = None,
        label_shape: Sequence[int] | None = None,
        offset: Tensor | None = None,
        order: int | Sequence[int] = 1,
        boundary: str = "mirror",
        riders: int = 0,
        source: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Deforms images and labels by drawn parameters, in one pass.

        Args:
            image: (N, C, H, W), floating point, grey values about [0, 1], or uint8 or uint16; with
                `source`, any number of images.
            labels: (N, H, W), integer, or None; as many as images.
            parameters: From :meth:`draw`, for N samples of `output_shape`.
            output_shape: Spatial shape of the output; see :func:`elastic_deform`.
            label_shape: Spatial shape of the label output.
            offset: (N, 2), position of a tile in its image.
            order: Interpolation of the image; see :func:`elastic_deform`.
            boundary: What lies outside the image; see :func:`elastic_deform`.
            riders: Number of channels at the end, of weight maps for instance, that keep their
                values; `parameters` has no grey curves for them.
            source: (N,), integer: the image that each sample is made of; None: each its own.

        Returns:
            (image, labels); labels None if none were given.
        """
        check_tensors("Augmentation.apply", image=image)
        for name, x in (("offset", offset), ("source", source)):
            if x is not None:
                check_tensors("Augmentation.apply", **{name: x})
        if not isinstance(parameters, AugmentationParameters):
            raise TypeError(
                "Augmentation.apply: parameters must be AugmentationParameters, got "
                f"{type(parameters).__name__}"
            )
        channels = image.shape[1] if image.dim() == 4 else 0
        if isinstance(riders, bool) or not isinstance(riders, int) or not 0 <= riders <= channels:
            raise ValueError(
                f"Augmentation.apply: riders must be in [0, {channels}], got {riders!r}"
            )
        device, curve = image.device, parameters.gray_curve
        if curve is not None and riders > 0:
            n, _, points = curve.shape
            straight = torch.linspace(0, 1, points, dtype=curve.dtype, device=curve.device)
            curves = curve.expand(n, image.shape[1] - riders, points)
            curve = torch.cat([curves, straight.expand(n, riders, points)], 1)
        result = elastic_deform(
            image,
            parameters.displacement.to(device),
            labels=labels,
            affine=parameters.affine.to(device),
            gray_curve=None if curve is None else curve.to(device),
            grid=self.grid,
            grid_spacing=self.spacing,
            output_shape=output_shape,
            label_shape=label_shape,
            offset=None if offset is None else offset.to(device),
            order=order,
            boundary=boundary,
            source=None if source is None else source.to(device),
        )
        return result if isinstance(result, tuple) else (result, None)

    def with_grid(
        self, image: Tensor, labels: Tensor, parameters: AugmentationParameters
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Deforms like :meth:`apply`, together with a grid of straight lines to look at.

        Args:
            image: (N, C, H, W), floating point.
            labels: (N, H, W), integer.
            parameters: From :meth:`draw`, for N samples of (H, W).

        Returns:
            Image, labels, and the share of a line in each pixel, (N, H, W). The lines are an eighth
            of the shorter side apart.
        """
        n, _, height, width = image.shape
        step = max(2, min(height, width) // 8)
        thickness = max(1.0, min(height, width) / 256)
        distance = [
            ((torch.arange(side) + step // 2) % step - step // 2).abs().to(image.device)
            for side in (height, width)
        ]
        nearest = torch.minimum(distance[0][:, None], distance[1])
        lines = (0.5 * thickness + 0.5 - nearest).clamp(0, 1).to(image.dtype)
        channels = torch.cat([image, lines.expand(n, 1, height, width)], 1)
        moved, ids = self.apply(channels, labels, parameters, riders=1)
        assert ids is not None  # labels were given
        return moved[:, :-1], ids, moved[:, -1]

    def __call__(
        self, image: Tensor, labels: Tensor | None = None, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draws parameters and applies them: `image, labels = aug(image, labels)`; shapes stay."""
        parameters = self.draw(len(image), image.shape[1:], generator=generator)
        return self.apply(image, labels, parameters)
