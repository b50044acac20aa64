"""Reference of the elastic deformation."""

from collections.abc import Sequence

import torch
from torch import Tensor

_BOUNDARIES = ("mirror", "constant", "nearest", "wrap")


def elastic_deform(
    image: Tensor,
    displacement: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    affine: Tensor | None = None,
    gray_curve: Tensor | None = None,
    order: int = 1,
    boundary: str = "mirror",
    cval: float = 0.0,
    output_shape: Sequence[int] | None = None,
    label_shape: Sequence[int] | None = None,
    offset: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Deforms images, and their labels alike, by a coarse grid of displacements and an affine map.

    Output pixel x is read at the input position

    .. math:: A x + o + u(x)

    where u is the cubic B-spline through the displacements, whose grid spans the output: its corner
    values lie on the centres of the corner pixels. Pixel centres have integer coordinates.

    Args:
        image: (N, C, H, W), float16, bfloat16, float32 or float64.
        displacement: (N, 2, P, Q), in pixels along rows and columns; None for 0. An axis of length
            1 has one displacement.
        labels: (N, H, W), integer, read at the nearest pixel of the same positions.
        affine: A, (N, 2, 3): from output (row, column, 1) to input (row, column); None for
            identity.
        gray_curve: (N, C, K) or (N, 1, K), K >= 2: new grey values at K evenly spaced old ones from
            0 to 1, linear between them and beyond; applied after interpolation. None for no change.
        order: 0, the nearest pixel, or 1, linear interpolation, of the image.
        boundary: What lies outside the input: ``"mirror"`` without repeating the edge (period
            2 n - 2), ``"constant"`` (`cval` for every position outside [0, n - 1]), ``"nearest"``
            or ``"wrap"`` (period n - 1).
        cval: The constant, for the image; labels take 0.
        output_shape: Spatial shape of the output; None for that of the image.
        label_shape: Spatial shape of the label output, which is centred in the output; None for
            `output_shape`. The difference must be even.
        offset: o, (N, 2): input position of output pixel (0, 0), in pixels; None for 0.

    Returns:
        The image, (N, C, \*output_shape), or (image, labels) if labels are given; dtypes as given.

    Raises:
        TypeError: If `image` is not floating point or `labels` not integer.
        ValueError: If a shape or value breaks a rule above.

    Source: the augmentation of O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, section
    3.1, on the grid convention of the package elasticdeform.
    """
    _check(image, displacement, labels, affine, gray_curve, order, boundary, offset)
    out_shape = tuple(image.shape[2:] if output_shape is None else output_shape)
    inner = tuple(out_shape if label_shape is None else label_shape)
    _check_shapes(out_shape, inner)
    positions = _positions(out_shape, image, displacement, affine, offset)
    deformed = image.new_empty(*image.shape[:2], *out_shape, dtype=torch.float64)
    for x, p, y in zip(image, positions, deformed, strict=True):
        y.copy_(_sample(x, p, order, boundary, cval))
    if gray_curve is not None:
        deformed = _apply_curve(deformed, gray_curve)
    deformed = deformed.to(image.dtype)
    if labels is None:
        return deformed

    for axis, (outer_size, inner_size) in enumerate(zip(out_shape, inner, strict=True)):
        positions = positions.narrow(2 + axis, (outer_size - inner_size) // 2, inner_size)
    moved = labels.new_empty(len(labels), *inner)
    for ids, p, y in zip(labels, positions, moved, strict=True):
        y.copy_(_sample(ids[None], p, 0, boundary, 0)[0])
    return deformed, moved


def _positions(
    shape: tuple[int, ...],
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """Input position of every output pixel, (N, 2, *shape), float64."""
    n, device = image.shape[0], image.device
    axes = [torch.arange(size, dtype=torch.float64, device=device) for size in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (2, H, W)
    if affine is None:
        positions = grid.expand(n, *grid.shape)
    else:
        a = affine.double()
        positions = torch.einsum("nij,jhw->nihw", a[:, :, :2], grid) + a[:, :, 2, None, None]
    if offset is not None:
        positions = positions + offset.double()[:, :, None, None]
    if displacement is not None:
        rows = _interpolation_matrix(shape[0], displacement.shape[2]).to(device)
        columns = _interpolation_matrix(shape[1], displacement.shape[3]).to(device)
        positions = positions + rows @ displacement.double() @ columns.T
    return positions


def _interpolation_matrix(n: int, knots: int) -> Tensor:
    """The matrix (n, knots) that interpolates knot values at n evenly spaced points by a spline."""
    at_points = torch.arange(n, dtype=torch.float64) * ((knots - 1) / max(n - 1, 1))
    at_knots = torch.arange(knots, dtype=torch.float64)
    # Coefficients c of the spline through the values d solve B(knots) c = d.
    solve = torch.linalg.inv(_spline_matrix(at_knots, knots))
    matrix: Tensor = _spline_matrix(at_points, knots) @ solve
    return matrix


def _spline_matrix(g: Tensor, knots: int) -> Tensor:
    """Cubic B-splines around each knot at coordinates g, (len(g), knots), mirrored at the ends."""
    first = g.floor()
    t = g - first
    weights = [
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    ]
    matrix = torch.zeros(len(g), knots, dtype=torch.float64)
    for k, weight in enumerate(weights):
        index = _fold(first + (k - 1), knots, "mirror").long()
        matrix.scatter_add_(1, index[:, None], weight[:, None])
    return matrix


def _fold(position: Tensor, n: int, boundary: str) -> Tensor:
    """The position inside [0, n - 1] that stands for one outside."""
    last = n - 1
    if last == 0:
        return torch.zeros_like(position)
    if boundary == "mirror":
        position = position.remainder(2 * last)
        return torch.minimum(position, 2 * last - position)
    if boundary == "wrap":
        return torch.where((position < 0) | (position > last), position.remainder(last), position)
    return position.clamp(0, last)


def _sample(image: Tensor, positions: Tensor, order: int, boundary: str, cval: float) -> Tensor:
    """Reads an image (C, H, W) at positions (2, h, w)."""
    height, width = image.shape[1:]
    row = _fold(positions[0], height, boundary)
    column = _fold(positions[1], width, boundary)
    if order == 0:
        result = image[:, (row + 0.5).floor().long(), (column + 0.5).floor().long()]
    else:
        top, left = row.floor().long(), column.floor().long()
        bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        y, x = row - top, column - left
        image = image.double()
        upper = (1 - x) * image[:, top, left] + x * image[:, top, right]
        lower = (1 - x) * image[:, bottom, left] + x * image[:, bottom, right]
        result = (1 - y) * upper + y * lower
    if boundary == "constant":
        inside = (positions[0] >= 0) & (positions[0] <= height - 1)
        inside &= (positions[1] >= 0) & (positions[1] <= width - 1)
        result = torch.where(inside, result, cval)
    return result


def _apply_curve(image: Tensor, curve: Tensor) -> Tensor:
    """Maps grey values through the piecewise linear curve of each sample and channel."""
    n, channels = image.shape[:2]
    intervals = curve.shape[2] - 1
    table = curve.double().expand(n, channels, -1)
    x = image.double().flatten(2) * intervals
    index = x.floor().clamp(0, intervals - 1).long()
    low, high = table.gather(2, index), table.gather(2, index + 1)
    return (low + (x - index) * (high - low)).view_as(image)


def _check_shapes(output: tuple[int, ...], label: tuple[int, ...]) -> None:
    for name, shape in (("output_shape", output), ("label_shape", label)):
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"elastic_deform: {name} must be two sizes >= 1, got {shape}")
    if any(o < i or (o - i) % 2 for o, i in zip(output, label, strict=True)):
        raise ValueError(
            "elastic_deform: label_shape must be smaller than output_shape by an even number, got "
            f"{label} in {output}"
        )


def _check(
    image: Tensor,
    displacement: Tensor | None,
    labels: Tensor | None,
    affine: Tensor | None,
    gray_curve: Tensor | None,
    order: int,
    boundary: str,
    offset: Tensor | None,
) -> None:
    if not image.dtype.is_floating_point:
        raise TypeError(f"elastic_deform: image must be floating point, got {image.dtype}")
    if image.dim() != 4 or 0 in image.shape[2:]:
        raise ValueError(
            f"elastic_deform: image must be (N, C, H, W) with H, W >= 1, got {tuple(image.shape)}"
        )
    if labels is not None and (labels.dtype.is_floating_point or labels.dtype == torch.bool):
        raise TypeError(f"elastic_deform: labels must be integer, got {labels.dtype}")
    n, channels, height, width = image.shape
    # Shapes to choose from; None: any length >= 1.
    expected: list[tuple[str, Tensor | None, list[tuple[int | None, ...]]]] = [
        ("displacement", displacement, [(n, 2, None, None)]),
        ("labels", labels, [(n, height, width)]),
        ("affine", affine, [(n, 2, 3)]),
        ("offset", offset, [(n, 2)]),
        ("gray_curve", gray_curve, [(n, channels, None), (n, 1, None)]),
    ]
    for name, tensor, shapes in expected:
        if tensor is None:
            continue
        got = tuple(tensor.shape)
        if not any(
            len(got) == len(shape)
            and all(g == s or (s is None and g >= 1) for g, s in zip(got, shape, strict=True))
            for shape in shapes
        ):
            wanted = " or ".join(str(shape).replace("None", "any") for shape in shapes)
            raise ValueError(f"elastic_deform: {name} must have shape {wanted}, got {got}")
    if gray_curve is not None and gray_curve.shape[2] < 2:
        raise ValueError(
            f"elastic_deform: gray_curve must have at least 2 points, got {gray_curve.shape[2]}"
        )
    if order not in (0, 1):
        raise ValueError(f"elastic_deform: order must be 0 or 1, got {order}")
    if boundary not in _BOUNDARIES:
        raise ValueError(
            f"elastic_deform: boundary must be one of {', '.join(_BOUNDARIES)}, got {boundary!r}"
        )
