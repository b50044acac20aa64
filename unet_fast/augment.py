"""Random augmentation. All its random numbers are drawn here, from a generator on the CPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .reference import elastic_deform


@dataclass(frozen=True)
class AugmentationParameters:
    """What :meth:`Augmentation.draw` drew for n samples; arguments of :func:`elastic_deform`."""

    displacement: Tensor
    """(n, 2, P, Q), in pixels."""
    affine: Tensor
    """(n, 2, 3), from output to input coordinates."""
    gray_curve: Tensor
    """(n, C, K) or (n, 1, K)."""

    def __len__(self) -> int:
        return len(self.affine)


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random deformation of images and their labels.

    Raises ValueError if a value is out of range.
    """

    grid: tuple[int, int] = (3, 3)
    """Points of the displacement grid along rows and columns, each >= 1."""
    sigma: float = 10.0
    """Standard deviation of the displacements at the grid points, >= 0, in pixels."""
    rotation: float = 180.0
    """Angles are uniform in +-rotation about the centre, in degrees."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Magnification is uniform between the two factors, > 0."""
    shift: float = 0.0
    """Shifts are uniform in +-shift along both axes, in pixels."""
    flip: bool = False
    """Mirror half of the samples."""
    gray_slope: tuple[float, float] = (0.8, 1.2)
    """Slopes of the random monotone grey curve are uniform between the two, >= 0."""
    gray_offset: float = 0.05
    """The curve at 0 is uniform in +-gray_offset, where 1 is the intensity range."""
    gray_points: int = 5
    """Control points of the curve, >= 2."""

    def __post_init__(self) -> None:
        """Checks the values; one wrong raises ValueError."""
        rules = (
            ("grid", len(self.grid) == 2 and min(self.grid) >= 1, "be two counts >= 1"),
            ("sigma", 0 <= self.sigma < math.inf, "be >= 0"),
            ("rotation", 0 <= self.rotation < math.inf, "be >= 0"),
            ("shift", 0 <= self.shift < math.inf, "be >= 0"),
            ("gray_offset", 0 <= self.gray_offset < math.inf, "be >= 0"),
            (
                "scale",
                0 < self.scale[0] <= self.scale[1] < math.inf,
                "be two ascending factors > 0",
            ),
            (
                "gray_slope",
                0 <= self.gray_slope[0] <= self.gray_slope[1] < math.inf,
                "be ascending and >= 0",
            ),
            ("gray_points", self.gray_points >= 2, "be >= 2"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"Augmentation: {name} must {rule}, got {getattr(self, name)}")

    @classmethod
    def paper_2015(cls) -> "Augmentation":
        """The paper's: displacements of 10 px on a 3 x 3 grid, any rotation, grey values.

        The paper gives no range for rotation and grey values; the grey curve's are those of the
        authors' later code. Shifts come from the random position of a training tile.
        """
        return cls()

    def draw(
        self, n: int, shape: Sequence[int], *, generator: Generator | None = None
    ) -> AugmentationParameters:
        """Draws the parameters of n samples.

        Args:
            n: Number of samples, >= 0.
            shape: Shape of a sample's output, (H, W) or (C, H, W); with channels, each has a grey
                curve of its own.
            generator: Source of random numbers, on the CPU; None for torch's global one. The same
                state gives the same parameters for every device.
        """
        *channels, height, width = shape

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *size, generator=generator)

        displacement = self.sigma * torch.randn(n, 2, *self.grid, generator=generator)
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
        black = uniform(-self.gray_offset, self.gray_offset, curves, 1)
        slopes = uniform(*self.gray_slope, curves, self.gray_points - 1)
        rise = slopes.cumsum(2) / (self.gray_points - 1)
        gray_curve = torch.cat([black, black + rise], 2)
        return AugmentationParameters(displacement, affine, gray_curve)

    def apply(
        self,
        image: Tensor,
        labels: Tensor | None,
        parameters: AugmentationParameters,
        *,
        output_shape: Sequence[int] | None = None,
        label_shape: Sequence[int] | None = None,
        offset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Deforms images and labels by drawn parameters, in one pass.

        Args:
            image: (N, C, H, W), floating point, grey values about [0, 1].
            labels: (N, H, W), integer, or None.
            parameters: From :meth:`draw`, for N samples of `output_shape`.
            output_shape: See :func:`elastic_deform`; so are `label_shape` and `offset`.
            label_shape: Spatial shape of the label output.
            offset: (N, 2), position of a tile in its image.

        Returns:
            (image, labels); labels None if none were given.
        """
        device = image.device
        result = elastic_deform(
            image,
            parameters.displacement.to(device),
            labels=labels,
            affine=parameters.affine.to(device),
            gray_curve=parameters.gray_curve.to(device),
            output_shape=output_shape,
            label_shape=label_shape,
            offset=None if offset is None else offset.to(device),
        )
        return result if isinstance(result, tuple) else (result, None)

    def __call__(
        self, image: Tensor, labels: Tensor | None = None, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draws and applies: `image, labels = aug(image, labels)`; shapes stay."""
        parameters = self.draw(len(image), image.shape[1:], generator=generator)
        return self.apply(image, labels, parameters)
