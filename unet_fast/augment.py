"""Random augmentation. All of its random numbers are drawn here, from a generator on the CPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from numbers import Integral
from typing import Any, Literal, overload

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ._gray_curves import draw_gray_curves
from .contracts.elastic_deform import GRIDS
from .contracts.types import check_fields, check_tensors, takes_arrays
from .ops import elastic_deform

PER_AXIS = ("sigma", "points", "spacing", "rotation", "flip", "voxel_size")
"""Settings that may have a number for each axis."""


@dataclass(frozen=True)
class AugmentationParameters:
    """Parameters drawn by :meth:`Augmentation.draw` for n samples, for :func:`elastic_deform`."""

    displacement: Tensor
    """Displacements of the grid, (n, 2, P, Q) or (n, 3, P, Q, R), in pixels."""
    affine: Tensor
    """Affine maps, (n, 2, 3) or (n, 3, 4), from output to input coordinates."""
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
    """Ranges of a random deformation of images, or of volumes, and their labels.

    A setting that takes one number for each axis takes a single one for all of them, too.

    Raises ValueError if a value is out of range.
    """

    sigma: float | tuple[float, ...] = 10.0
    """Standard deviation of the displacements of the grid, >= 0, in pixels, along each axis."""
    points: int | tuple[int, ...] = 3
    """Number of displacements along each axis, each in [1, 65536]; not used with spacing."""
    grid: Literal["interpolating", "approximating", "keys"] = "interpolating"
    """interpolating: a B-spline through the displacements; approximating: a B-spline with them as
    coefficients; keys: cubic convolution."""
    spacing: float | tuple[float, ...] | None = None
    """Knot distance of an approximating grid in pixels along each axis, instead of points; None:
    use points."""
    rotation: float | tuple[float, ...] = 180.0
    """Angles are uniform in +-rotation about the centre, in degrees. Of volumes: about each axis,
    the depth first; (180, 0, 0) turns the planes in themselves, as flat voxels need."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Magnification is uniform between the two factors, > 0."""
    shift: float = 0.0
    """Shifts are uniform in +-shift along all axes, in pixels."""
    flip: bool | tuple[bool, ...] = False
    """Mirror half of the samples: images along the last axis, volumes along each axis by itself;
    or along each axis that is marked."""
    voxel_size: tuple[float, ...] | None = None
    """Size of a pixel along each axis, such that rotations are those of the object: in micrometres,
    for instance. None: pixels are as long as wide."""
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
        for name in PER_AXIS:
            value = getattr(self, name)
            if len(_listed(value)) not in (1, 2, 3):
                raise ValueError(f"Augmentation: {name} must be of 1 to 3 axes, got {value}")
        low, high = self.gray_slope
        reach = self.gray_white[0] - self.gray_black[0], self.gray_white[1] - self.gray_black[1]
        approximating = self.grid == "approximating"
        points, spacing = _listed(self.points), _listed(self.spacing or 1)
        rules = (
            ("sigma", all(0 <= s < math.inf for s in _listed(self.sigma)), "be >= 0"),
            ("points", all(1 <= count <= 65536 for count in points), "be counts in [1, 65536]"),
            ("grid", self.grid in GRIDS, "be interpolating, approximating or keys"),
            (
                "spacing",
                self.spacing is None
                or (approximating and all(1 <= distance < math.inf for distance in spacing)),
                "be None, or >= 1 with an approximating grid",
            ),
            (
                "points",
                self.spacing is not None or not approximating or min(points) >= 4,
                "be at least 4 along each axis for an approximating grid",
            ),
            ("rotation", all(0 <= r < math.inf for r in _listed(self.rotation)), "be >= 0"),
            ("shift", 0 <= self.shift < math.inf, "be >= 0"),
            (
                "scale",
                0 < self.scale[0] <= self.scale[1] < math.inf,
                "be two ascending factors > 0",
            ),
            ("gray_black", -math.inf < self.gray_black[0] <= self.gray_black[1], "be ascending"),
            ("gray_white", self.gray_white[0] <= self.gray_white[1] < math.inf, "be ascending"),
            ("gray_slope", 0 <= low <= high < math.inf, "be ascending and >= 0"),
            (
                "gray_slope",
                low <= reach[1] and high >= reach[0],
                "allow a white for every black between them",
            ),
            ("voxel_size", all(0 < x < math.inf for x in self.voxel_size or ()), "be sizes > 0"),
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

    @classmethod
    def cicek_2016(cls) -> "Augmentation":
        """Returns the recipe of the 3D U-Net: spline coefficients of 4 voxels, 32 voxels apart.

        The paper rotates, scales and changes grey values, too, but gives no ranges. In the authors'
        code angles are within 5 degrees; grey values are those of :meth:`paper_2015` here.
        """
        return cls(grid="approximating", spacing=32.0, sigma=4.0, rotation=5.0)

    @classmethod
    def volumes(cls) -> "Augmentation":
        """Returns what training on volumes takes: that of 2016, any turn about Z, mirror images.

        Microscopes look along Z, and across it most objects may lie in any direction. With few
        annotated planes that is worth more than all else: docs/volumes.md.
        """
        return replace(cls.cicek_2016(), rotation=(180.0, 5.0, 5.0), flip=True)

    def draw(
        self, n: int, shape: Sequence[int], *, generator: Generator | None = None
    ) -> AugmentationParameters:
        """Draws the parameters of n samples.

        Args:
            n: Number of samples, in [0, 2^31 - 1].
            shape: Shape of a sample's output, (H, W), (C, H, W) or, of a volume, (C, D, H, W); with
                channels, each has a grey curve of its own.
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
        if not 0 <= n < 2**31 or len(shape) not in (2, 3, 4):
            raise ValueError(
                "Augmentation.draw: n must be in [0, 2^31 - 1] and shape (H, W), (C, H, W) or (C, "
                f"D, H, W), got {n} and {tuple(shape)}"
            )
        axes = 3 if len(shape) == 4 else 2
        channels, sides = shape[:-axes], shape[-axes:]
        for name in PER_AXIS:
            value = getattr(self, name)
            count = axes * (axes - 1) // 2 if name == "rotation" else axes
            if isinstance(value, tuple | list) and len(value) != count:
                raise ValueError(
                    f"Augmentation: {name} must be one value, or {count} for samples of {axes} "
                    f"axes, got {value}"
                )

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *size, generator=generator, device="cpu")

        points = _for_each(self.points, axes)
        if self.spacing is not None:
            distances = _for_each(self.spacing, axes)
            points = tuple(
                int(side // distance) + 4 for side, distance in zip(sides, distances, strict=True)
            )
        displacement = torch.randn(n, axes, *points, generator=generator, device="cpu")
        sigma = torch.tensor(_for_each(self.sigma, axes), device="cpu")
        displacement *= sigma.view(-1, *[1] * axes)
        planes = [*combinations(range(axes), 2)][::-1]  # turned by the rotation about each axis
        ranges = _for_each(self.rotation, len(planes))
        angles = [torch.deg2rad(uniform(-most, most)).double() for most in ranges]
        scale = uniform(*self.scale).double()
        shift = uniform(-self.shift, self.shift, axes).double()
        mirror = torch.ones(n, axes, dtype=torch.float64, device="cpu")
        flips = self.flip if isinstance(self.flip, tuple | list) else (self.flip,) * len(planes)
        for axis, flip in zip(reversed(range(axes)), reversed(flips), strict=False):
            chance = torch.rand(n, generator=generator, device="cpu")
            mirror[:, axis] -= 2 * (chance < 0.5 * flip).double()

        # About the centre c: input = R (output - c) / scale + c - shift.
        turn = _turn(angles[0], planes[0], axes)
        for angle, plane in zip(angles[1:], planes[1:], strict=True):
            turn = turn @ _turn(angle, plane, axes)
        linear = turn / scale[:, None, None] * mirror[:, None]
        if self.voxel_size is not None:
            size = torch.tensor(self.voxel_size, dtype=torch.float64, device="cpu")
            linear = linear * size / size[:, None]
        middle = [(side - 1) / 2 for side in sides]
        centre = torch.tensor(middle, dtype=torch.float64, device="cpu")
        translation = centre - linear @ centre - shift
        affine = torch.cat([linear, translation[:, :, None]], 2)

        curves = channels[0] if channels else 1
        gray_curve = None
        if (self.gray_black, self.gray_white, self.gray_slope) != ((0, 0), (1, 1), (1, 1)):
            gray_curve = draw_gray_curves(
                n,
                curves,
                black=self.gray_black,
                white=self.gray_white,
                slope=self.gray_slope,
                points=self.gray_points,
                generator=generator,
            )
        return AugmentationParameters(displacement, affine, gray_curve)

    @overload
    def apply(
        self,
        image: Tensor,
        labels: Tensor,
        parameters: AugmentationParameters,
        **settings: Any,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def apply(
        self, image: Tensor, labels: None, parameters: AugmentationParameters, **settings: Any
    ) -> tuple[Tensor, None]: ...
    @overload
    def apply(
        self, image: Any, labels: Any, parameters: AugmentationParameters, **settings: Any
    ) -> tuple[Any, Any]: ...
    @takes_arrays("image", "labels", "offset", "source")
    def apply(
        self,
        image: Any,
        labels: Any,
        parameters: AugmentationParameters,
        *,
        output_shape: Sequence[int] | None = None,
        label_shape: Sequence[int] | None = None,
        offset: Tensor | None = None,
        order: int | Sequence[int] = 1,
        boundary: str = "mirror",
        riders: int = 0,
        source: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Deforms images and labels by drawn parameters, in one pass.

        Args:
            image: (N, C, H, W) or (N, C, D, H, W), floating point, grey values about [0, 1], or
                uint8 or uint16; with `source`, any number of images. One sample: (C, H, W) or (H,
                W). A tensor or a NumPy array. None: labels alone.
            labels: (N, H, W) or (N, 1, H, W), integer, as many as images; (N, K, H, W) for K maps
                of each; of volumes with D before H; without N for one sample; or None.
            parameters: From :meth:`draw`, for N samples of `output_shape`.
            output_shape: Spatial shape of the output; see :func:`elastic_deform`.
            label_shape: Spatial shape of the label output.
            offset: (N, 2) or (N, 3), position of a tile in its image.
            order: Interpolation of the image; see :func:`elastic_deform`.
            boundary: What lies outside the image; see :func:`elastic_deform`.
            riders: Number of channels at the end, of weight maps for instance, that keep their
                values; `parameters` has no grey curves for them.
            source: (N,), integer: the image that each sample is made of; None: each its own.

        Returns:
            (image, labels), in the shapes as given; None for what was not given.
        """
        if isinstance(image, Tensor) and image.dim() in (2, 3):  # one sample
            whole = image if image.dim() == 3 else image[None]
            ids = labels[None] if isinstance(labels, Tensor) else labels
            moved, ids = self.apply(
                whole[None],
                ids,
                parameters,
                output_shape=output_shape,
                label_shape=label_shape,
                offset=offset,
                order=order,
                boundary=boundary,
                riders=riders,
                source=source,
            )
            moved = moved[0] if image.dim() == 3 else moved[0, 0]
            return moved, None if ids is None else ids[0]
        if image is not None:
            check_tensors("Augmentation.apply", image=image)
        for name, x in (("offset", offset), ("source", source)):
            if x is not None:
                check_tensors("Augmentation.apply", **{name: x})
        if not isinstance(parameters, AugmentationParameters):
            raise TypeError(
                "Augmentation.apply: parameters must be AugmentationParameters, got "
                f"{type(parameters).__name__}"
            )
        channels = 0 if image is None or image.dim() not in (4, 5) else image.shape[1]
        if isinstance(riders, bool) or not isinstance(riders, int) or not 0 <= riders <= channels:
            raise ValueError(
                f"Augmentation.apply: riders must be in [0, {channels}], got {riders!r}"
            )
        device = getattr(labels if image is None else image, "device", torch.device("cpu"))
        curve = None if image is None else parameters.gray_curve
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
        if image is None:
            return None, result
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
        return moved[:, :-1], ids, moved[:, -1]

    @overload
    def __call__(
        self, image: Tensor, labels: Tensor, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, image: Tensor, labels: None = None, *, generator: Generator | None = None
    ) -> tuple[Tensor, None]: ...
    @overload
    def __call__(
        self, image: NDArray[Any], labels: Any = None, *, generator: Generator | None = None
    ) -> tuple[NDArray[Any], Any]: ...
    def __call__(
        self, image: Any, labels: Any = None, *, generator: Generator | None = None
    ) -> tuple[Any, Any]:
        """Draws parameters and applies them: `image, labels = aug(image, labels)`; shapes stay.

        Takes a batch or one sample, tensors or NumPy arrays; see :meth:`apply`.
        """
        axes = getattr(image, "ndim", 0)
        if axes not in (2, 3, 4, 5):
            raise ValueError(
                "Augmentation: image must be (N, C, H, W) or (N, C, D, H, W), or one sample (C, H, "
                "W) or (H, W), got "
                f"{tuple(getattr(image, 'shape', ())) or type(image).__name__}"
            )
        n, shape = (len(image), image.shape[1:]) if axes > 3 else (1, image.shape)
        return self.apply(image, labels, self.draw(n, shape, generator=generator))


def _listed(value: Any) -> Any:
    """Returns what is given once for all axes, or for each, as a sequence."""
    return value if isinstance(value, tuple | list) else (value,)


def _for_each(value: Any, count: int) -> Any:
    return value if isinstance(value, tuple | list) else (value,) * count


def _turn(angle: Tensor, plane: tuple[int, int], axes: int) -> Tensor:
    """Returns rotations by angles, (n,), in the plane of two axes: (n, axes, axes)."""
    i, j = plane
    matrix = torch.eye(axes, dtype=angle.dtype, device="cpu").repeat(len(angle), 1, 1)
    matrix[:, i, i] = matrix[:, j, j] = angle.cos()
    matrix[:, i, j] = angle.sin()
    matrix[:, j, i] = -angle.sin()
    return matrix


torch.serialization.add_safe_globals(  # in checkpoints of other trainers
    [Augmentation, AugmentationParameters]
)
