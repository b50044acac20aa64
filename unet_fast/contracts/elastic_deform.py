"""Constants and argument checks of the elastic deformation."""

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .types import check_tensors, unbatched

BOUNDARIES = ("mirror", "constant", "nearest", "wrap")
GRIDS = ("interpolating", "approximating", "keys")
EXTENTS = ("output", "input")
ORDERS = (0, 1, 3)
FARTHEST = 2.0**30
"""Positions farther than this, in pixels, are treated like those that are not finite."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gray_range(dtype: torch.dtype) -> float:
    """Returns the grey value that 1 stands for in a grey curve."""
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


class Facts(NamedTuple):
    """The properties of a tensor that the checks need."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.device.type == "cuda"


class Kinds(NamedTuple):
    """The properties of all tensors of a call; None for a tensor that is not given."""

    image: Facts
    displacement: Facts | None
    labels: Facts | None
    affine: Facts | None
    gray_curve: Facts | None
    offset: Facts | None
    source: Facts | None


def kinds_of(*tensors: Tensor | None) -> Kinds:
    """Returns the properties of tensors, which come in the order of :class:`Kinds`."""
    check_tensors("elastic_deform", image=tensors[0])
    for name, x in zip(Kinds._fields, tensors, strict=True):
        if x is not None:
            check_tensors("elastic_deform", **{name: x})
    facts = (None if x is None else Facts(x.shape, x.dtype, x.device) for x in tensors)
    return Kinds(*facts)  # type: ignore[arg-type]


class Checked(NamedTuple):
    """The checked settings of a call, choices as numbers."""

    orders: tuple[int, ...]
    """Order of interpolation of each channel."""
    grid: int
    """Index of the grid in :data:`GRIDS`."""
    spans_input: bool
    """Whether the grid spans the input, not the output."""
    scales: tuple[float, ...]
    """Grid cells per pixel along each axis."""
    boundary: int
    """Index of the boundary in :data:`BOUNDARIES`."""
    output_shape: tuple[int, ...]
    label_shape: tuple[int, ...]


def check(
    kinds: Kinds,
    order: int | Sequence[int],
    grid: str,
    grid_extent: str,
    grid_spacing: float | Sequence[float] | None,
    boundary: str,
    output_shape: Sequence[int] | None,
    label_shape: Sequence[int] | None,
) -> Checked:
    """Checks a call, except for tensor values. Raises TypeError or ValueError."""
    _check_dtypes(kinds)
    _check_shapes(kinds)
    image = kinds.image
    orders = _check_choices(image.shape[1], order, grid, grid_extent, boundary)
    shape, inner = _check_windows(image.shape[2:], output_shape, label_shape)
    spans_input = grid_extent == "input"
    spanned = tuple(image.shape[2:]) if spans_input else shape
    scales = check_grid(kinds.displacement, grid, grid_spacing, spanned)
    number = GRIDS.index(grid)
    return Checked(orders, number, spans_input, scales, BOUNDARIES.index(boundary), shape, inner)


def _check_dtypes(kinds: Kinds) -> None:
    image, displacement, labels, affine, gray_curve, offset, source = kinds
    if image.dtype not in (*FLOATS, torch.uint8, torch.uint16):
        raise TypeError(
            "elastic_deform: image must be float16, bfloat16, float32, float64, uint8 or uint16, "
            f"got {image.dtype}"
        )
    for name, tensor in (("labels", labels), ("source", source)):
        if tensor is not None and (
            tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool
        ):
            raise TypeError(f"elastic_deform: {name} must be integer, got {tensor.dtype}")
    for name, tensor in (
        ("displacement", displacement),
        ("affine", affine),
        ("gray_curve", gray_curve),
        ("offset", offset),
    ):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"elastic_deform: {name} must be floating point, got {tensor.dtype}")


def _check_shapes(kinds: Kinds) -> None:
    image, displacement, labels, affine, gray_curve, offset, source = kinds
    if len(image.shape) not in (4, 5) or 0 in image.shape[2:]:
        sides = {4: "H, W", 5: "D, H, W"}.get(len(image.shape))
        both = "(N, C, H, W) or (N, C, D, H, W)"
        wanted = f"(N, C, {sides}) with {sides} >= 1" if sides else both
        raise ValueError(
            f"elastic_deform: image must be {wanted}, got {tuple(image.shape)}"
            f"{unbatched('image', image.shape, 3)}"
        )
    m, channels, *sizes = image.shape
    if min(channels, sizes[-2]) >= 8 and sizes[-1] in (1, 3, 4):
        warnings.warn(
            f"elastic_deform: image {tuple(image.shape)} is {sizes[-1]} pixels wide: if the last "
            "axis is one of channels, image.movedim(-1, 1) puts it where it must be",
            stacklevel=5,
        )
    n, axes = m, len(sizes)
    points: tuple[int | str, ...] = ("P >= 1", "Q >= 1", "R >= 1")[:axes]
    if source is not None:
        if len(source.shape) != 1:
            raise ValueError(
                f"elastic_deform: source must have shape (N,), got {tuple(source.shape)}"
            )
        n = source.shape[0]
    for name, tensor, rule in (
        ("source", source, (n,)),
        ("displacement", displacement, (n, axes, *points)),
        ("labels", labels, _label_rule(labels, (m, *sizes))),
        ("affine", affine, (n, axes, axes + 1)),
        ("offset", offset, (n, axes)),
        ("gray_curve", gray_curve, (n, 1 if channels == 1 else f"1 or {channels}", "K >= 1")),
    ):
        if tensor is None:
            continue
        fits = len(tensor.shape) == len(rule) and tensor.shape[0] == rule[0]
        if not fits or (tensor.shape != rule and not _fits(tensor.shape, rule, channels)):
            wanted = f"({', '.join(map(str, rule))})"
            raise ValueError(
                f"elastic_deform: {name} must have shape {wanted}, got {tuple(tensor.shape)}"
                f"{unbatched(name, tensor.shape, len(rule) - 1)}"
            )
        if tensor.device != image.device:
            raise ValueError(
                f"elastic_deform: {name} must be on {image.device}, got {tensor.device}"
            )
    if gray_curve is not None and gray_curve.shape[2] < 2:
        raise ValueError(
            f"elastic_deform: gray_curve must have at least 2 points, got {gray_curve.shape[2]}"
        )


def _label_rule(labels: Facts | None, rule: tuple[int, ...]) -> tuple[int | str, ...]:
    """Returns the shape that labels must have: of one map, or of K maps for each image."""
    several = labels is not None and len(labels.shape) == len(rule) + 1
    return (rule[0], "K >= 1", *rule[1:]) if several else rule


def without_image(labels: Tensor | None) -> Tensor:
    """Returns an image without channels, for labels that are deformed alone."""
    if labels is None:
        raise TypeError("elastic_deform: image or labels must be given, got None")
    check_tensors("elastic_deform", labels=labels)
    if labels.dim() not in (3, 4, 5):
        raise ValueError(
            "elastic_deform: labels must be (N, H, W), (N, K, H, W) or (N, K, D, H, W), without an "
            f"image, got {tuple(labels.shape)}{unbatched('labels', labels.shape, 2)}"
        )
    shape = len(labels), 0, *labels.shape[-3 if labels.dim() == 5 else -2 :]
    return torch.empty(shape, device=labels.device, dtype=torch.float32)


def _fits(shape: Sequence[int], rule: Sequence[int | str], channels: int) -> bool:
    """Whether a shape is one of those that the rule describes."""
    return all(
        size == side
        or (isinstance(side, str) and (size >= 1 if ">=" in side else size in (1, channels)))
        for size, side in zip(shape, rule, strict=True)
    )


def whole_numbers(name: str, value: object) -> Any:
    """Returns an int, a tuple of ints, or None. Raises TypeError for any other value."""
    return _converted(name, value, operator.index, "an integer")


def numbers(name: str, value: object) -> Any:
    """Returns a float, a tuple of floats, or None. Raises TypeError for any other value."""
    return _converted(name, value, float, "a number")


def number(name: str, value: object) -> float:
    """Returns a float. Raises TypeError if `value` is not a number."""
    result = numbers(name, value)
    if not isinstance(result, float):
        raise TypeError(f"elastic_deform: {name} must be a number, got {value!r}")
    return result


def _converted(name: str, value: Any, convert: Callable[[Any], Any], kind: str) -> Any:
    if value is None:
        return None
    try:
        if isinstance(value, str):
            raise TypeError  # float would parse it
        return tuple(map(convert, value)) if isinstance(value, Iterable) else convert(value)
    except (TypeError, ValueError):  # the latter of text in a sequence
        raise TypeError(
            f"elastic_deform: {name} must be {kind} or a sequence of them, got {value!r}"
        ) from None


def _check_choices(
    channels: int, order: int | Sequence[int], grid: str, grid_extent: str, boundary: str
) -> tuple[int, ...]:
    """Returns the order of every channel. Raises ValueError if a choice is unknown."""
    orders = (order,) * channels if isinstance(order, int) else tuple(order)
    if len(orders) != channels or any(o not in ORDERS for o in orders):
        raise ValueError(
            f"elastic_deform: order must be 0, 1 or 3, or one of them for each of {channels} "
            f"channels, got {order}"
        )
    for name, choices, got in (
        ("grid", GRIDS, grid),
        ("grid_extent", EXTENTS, grid_extent),
        ("boundary", BOUNDARIES, boundary),
    ):
        if got not in choices:
            raise ValueError(
                f"elastic_deform: {name} must be one of {', '.join(choices)}, got {got!r}"
            )
    return orders


def _as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _check_windows(
    input_shape: Sequence[int],
    output_shape: Sequence[int] | None,
    label_shape: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the spatial shapes of output and labels. Raises ValueError if they do not fit."""
    output = _as_shape(input_shape if output_shape is None else output_shape)
    label = output if label_shape is None else _as_shape(label_shape)
    for name, shape in (("output_shape", output), ("label_shape", label)):
        if len(shape) != len(input_shape) or min(shape) < 1:
            count = {2: "two", 3: "three"}[len(input_shape)]
            raise ValueError(f"elastic_deform: {name} must be {count} sizes >= 1, got {shape}")
        if max(shape) >= 2**29:
            raise ValueError(f"elastic_deform: {name} must be below 2^29, got {shape}")
    if any(o < i or (o - i) % 2 for o, i in zip(output, label, strict=True)):
        raise ValueError(
            "elastic_deform: label_shape must be smaller than output_shape by an even number, got "
            f"{label} in {output}"
        )
    return output, label


def check_grid(
    displacement: Facts | None,
    grid: str,
    grid_spacing: float | Sequence[float] | None,
    spanned: Sequence[int],
) -> tuple[float, ...]:
    """Returns grid cells per pixel along each axis. Raises ValueError if the grid is too small."""
    axes = len(spanned)
    if grid_spacing is not None:
        if grid != "approximating":
            raise ValueError(
                f"elastic_deform: grid_spacing must be None with grid {grid!r}, got {grid_spacing}"
            )
        given = (
            (grid_spacing,) * axes if isinstance(grid_spacing, int | float) else tuple(grid_spacing)
        )
        if len(given) != axes or not all(1e-6 <= s <= FARTHEST for s in given):
            raise ValueError(
                "elastic_deform: grid_spacing must be a distance from 1e-6 to 2^30, or one for "
                f"each of {axes} axes, got {grid_spacing}"
            )
    if displacement is None:
        return (0.0,) * axes
    points = tuple(displacement.shape[2:])
    if grid != "approximating":
        return tuple((p - 1) / max(n - 1, 1) for p, n in zip(points, spanned, strict=True))
    if min(points) < 4:
        raise ValueError(
            "elastic_deform: displacement must have at least 4 points along each axis for an "
            f"approximating grid, got {points}"
        )
    if grid_spacing is None:
        return tuple((p - 3) / max(n - 1, 1) for p, n in zip(points, spanned, strict=True))
    for p, n, s in zip(points, spanned, given, strict=True):
        cells = (n - 1) / s * (1 - 1e-12)  # allows for rounding
        if cells > p - 3:
            raise ValueError(
                f"elastic_deform: displacement must have at least {math.ceil(cells) + 3} points to "
                f"span {n} pixels at grid_spacing {s:g}, got {p}"
            )
    return tuple(1 / s for s in given)
