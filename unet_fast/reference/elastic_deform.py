"""Reference of the elastic deformation."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOUNDARIES = ("mirror", "constant", "nearest", "wrap")
GRIDS = ("interpolating", "approximating", "keys")
EXTENTS = ("output", "input")
ORDERS = (0, 1, 3)
FARTHEST = 2.0**30
"""Positions beyond are taken like those that are not finite; in pixels."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEYS = -0.75  # the slope parameter of torch's bicubic interpolation


def elastic_deform(
    image: Tensor,
    displacement: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    affine: Tensor | None = None,
    gray_curve: Tensor | None = None,
    order: int | Sequence[int] = 1,
    grid: str = "interpolating",
    grid_extent: str = "output",
    grid_spacing: float | Sequence[float] | None = None,
    boundary: str = "mirror",
    cval: float = 0.0,
    output_shape: Sequence[int] | None = None,
    label_shape: Sequence[int] | None = None,
    offset: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Deforms images, and their labels alike, by a coarse grid of displacements and an affine map.

    Output pixel x is read at the input position

    .. math:: A x + u(x) + o,\quad \text{or}\quad A (x + u(x)) + o

    the second for the approximating grid, u between the displacements of the grid. Pixel centres
    have integer coordinates. A position that is not finite, or farther than 2^30 pixels, gives NaN
    (integer images and labels: 0).

    Args:
        image: (N, C, H, W), float16, bfloat16, float32, float64, uint8 or uint16.
        displacement: (N, 2, P, Q), floating point, in pixels along rows and columns; None for 0.
        labels: (N, H, W), integer, read at the nearest pixel of the same positions.
        affine: A, (N, 2, 3), floating point: from output (row, column, 1) to input (row, column);
            None for identity.
        gray_curve: (N, C, K) or (N, 1, K), K >= 2, floating point: new grey values at K evenly
            spaced old ones from 0 to 1, linear between them and beyond; applied after
            interpolation. Of integer images 1 stands for the greatest value of the type. None for
            no change. Gain a and offset b: (b, a + b); gamma: K values of x^gamma.
        order: Interpolation of the image: 0, the nearest pixel; 1, linear; 3, cubic B-spline
            through the pixels. Of all channels, or a sequence with one for each.
        grid: What u is between the displacements. ``"interpolating"``: the cubic B-spline through
            them, mirrored at the ends (as the package elasticdeform). ``"approximating"``: cubic
            B-splines with the displacements as coefficients, so that u varies less than they do (as
            the authors' code); P, Q >= 4, displacement 1 belongs to pixel 0. ``"keys"``: cubic
            convolution (as torch's bicubic upsampling with align_corners).
        grid_extent: What the grid spans. ``"output"``: the output. ``"input"``: the input, of which
            the output is a window at o, so that u(x + o) stands for u(x) (as elasticdeform's crop).
            Beyond the grid, u is that of its border.
        grid_spacing: Distance of the knots of an approximating grid, in pixels, or one for each
            axis; None for (n - 1) / (P - 3), n pixels being spanned. The corner displacements of
            the other grids lie on the corner pixels.
        boundary: What lies outside the input: ``"mirror"`` without repeating the edge (period
            2 n - 2), ``"constant"`` (`cval` for every position outside [0, n - 1]), ``"nearest"``
            or ``"wrap"`` (period n - 1).
        cval: The constant, for the image, before the grey curve; labels take 0.
        output_shape: Spatial shape of the output; None for that of the image.
        label_shape: Spatial shape of the label output, which is centred in the output; None for
            `output_shape`. The difference must be even.
        offset: o, (N, 2), floating point: input position of output pixel (0, 0), in pixels; None
            for 0.
        source: (N,), integer: which image, in [0, M - 1], each of N outputs reads of M images and
            labels, (M, C, H, W) and (M, H, W); None: each its own.

    Returns:
        The image, (N, C, \*output_shape), or (image, labels) if labels are given; dtypes as given,
        integers rounded and clamped.

    Raises:
        TypeError: If a kind or dtype is none of the above.
        ValueError: If a shape or value breaks a rule above.

    Source: the augmentation of O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, section
    3.1; docs/elastic_deform.md compares the grids.
    """
    kinds = [facts(x) for x in (displacement, labels, affine, gray_curve, offset, source)]
    of_image = Facts(image.shape, image.dtype, image.device)
    check_dtypes(of_image, *kinds)
    check_shapes(of_image, *kinds)
    orders = check_choices(
        image.shape[1], whole_numbers("order", order), grid, grid_extent, boundary
    )
    shape, inner = check_windows(
        image.shape[2:],
        whole_numbers("output_shape", output_shape),
        whole_numbers("label_shape", label_shape),
    )
    grid_spacing, cval = numbers("grid_spacing", grid_spacing), number("cval", cval)
    spanned = shape if grid_extent == "output" else tuple(image.shape[2:])
    scales = check_grid(kinds[0], grid, grid_spacing, spanned)

    if source is not None:
        source = source.long()
        wrong = source[(source < 0) | (source >= len(image))]
        if wrong.numel():
            raise ValueError(
                f"elastic_deform: source must be of images from 0 to {len(image) - 1}, "
                f"got {wrong[0].item()}"
            )
        image, labels = image[source], None if labels is None else labels[source]
    positions = _positions(image, displacement, affine, offset, shape, grid, grid_extent, scales)
    deformed = torch.stack(
        [
            torch.stack([_sample(c, p, o, boundary, cval) for c, o in zip(x, orders, strict=True)])
            if orders
            else p.new_empty(0, *shape)
            for x, p in zip(image, positions, strict=True)
        ]
        or [positions.new_empty(image.shape[1], *shape)]
    )[: len(image)]
    if gray_curve is not None:
        deformed = _apply_curve(deformed, gray_curve, gray_range(image.dtype))
    deformed = _as_type(deformed, image.dtype)
    if labels is None:
        return deformed

    for axis, (outer_size, inner_size) in enumerate(zip(shape, inner, strict=True)):
        positions = positions.narrow(2 + axis, (outer_size - inner_size) // 2, inner_size)
    moved = labels.new_empty(len(labels), *inner)
    for ids, p, y in zip(labels, positions, moved, strict=True):
        index, inside = _nearest(p.detach(), ids.shape, boundary)
        # As bytes: torch indexes no tensors of uint16, uint32 or uint64.
        taken = ids.contiguous().view(torch.uint8).view(*ids.shape, -1)[index]
        y.copy_(torch.where(inside[..., None], taken, 0).view(y.dtype).view(inner))
    return deformed, moved


def _positions(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    grid: str,
    grid_extent: str,
    scales: Sequence[float],
) -> Tensor:
    """Input position of every output pixel, (N, 2, *shape), float64."""
    n, device = image.shape[0], image.device
    o = torch.zeros(n, 2, device=device) if offset is None else offset
    o = o.double()[:, :, None]
    axes = [torch.arange(size, dtype=torch.float64, device=device) for size in shape]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(n, 2, *shape)
    u = torch.zeros_like(x)
    if displacement is not None:
        start = o if grid_extent == "input" else torch.zeros_like(o)
        matrices = [
            _grid_matrix(axis + start[:, i], displacement.shape[2 + i], scales[i], grid)
            for i, axis in enumerate(axes)
        ]
        u = torch.einsum("nhp,nipq,nwq->nihw", matrices[0], displacement.double(), matrices[1])
    if grid == "approximating":
        x, u = x + u, 0 * u
    if affine is not None:
        a = affine.double()
        x = torch.einsum("nij,njhw->nihw", a[:, :, :2], x) + a[:, :, 2, None, None]
    return x + u + o[..., None]


def _grid_matrix(q: Tensor, points: int, scale: float, grid: str) -> Tensor:
    """Weights of the displacements along one axis at pixels q, (N, n, points)."""
    cells = points - 3 if grid == "approximating" else max(points - 1, 1)
    g = (q * scale).clamp(0, cells)
    if grid == "approximating":  # displacement 1 at g = 0
        return _cubic_matrix(g, _bspline(g - _cell(g, cells)), range(points))
    if grid == "keys":
        clamped = [min(max(k, 0), points - 1) for k in range(-1, cells + 2)]
        return _cubic_matrix(g, _keys(g - _cell(g, cells)), clamped)
    to_coefficients: Tensor = torch.linalg.inv(_spline_matrix(_knots(g, points), points))
    return _spline_matrix(g, points) @ to_coefficients


def _spline_matrix(g: Tensor, points: int) -> Tensor:
    """Cubic B-splines around each point, mirrored at the ends, at coordinates g."""
    cells = max(points - 1, 1)
    mirrored = [_mirror(k, points) for k in range(-1, cells + 2)]
    return _cubic_matrix(g, _bspline(g - _cell(g, cells)), mirrored)


def _cubic_matrix(g: Tensor, weights: list[Tensor], taps: Sequence[int]) -> Tensor:
    """(*g.shape, points): in cell e, weight k is that of the point taps[e + k]."""
    units = torch.eye(max(taps) + 1, dtype=torch.float64, device=g.device)[list(taps)]
    first = _cell(g, len(taps) - 3).long()
    return torch.stack([w[..., None] * units[first + k] for k, w in enumerate(weights)]).sum(0)


def _cell(g: Tensor, cells: int) -> Tensor:
    return g.floor().clamp(0, cells - 1)


def _knots(like: Tensor, points: int) -> Tensor:
    return torch.arange(points, dtype=torch.float64, device=like.device)


def _bspline(t: Tensor) -> list[Tensor]:
    return [
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    ]


def _keys(t: Tensor) -> list[Tensor]:
    def near(d: Tensor) -> Tensor:
        return (_KEYS + 2) * d**3 - (_KEYS + 3) * d**2 + 1

    def far(d: Tensor) -> Tensor:
        return _KEYS * d**3 - 5 * _KEYS * d**2 + 8 * _KEYS * d - 4 * _KEYS

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


def _mirror(k: int, n: int) -> int:
    if n == 1:
        return 0
    k %= 2 * (n - 1)
    return min(k, 2 * (n - 1) - k)


def _fold(position: Tensor, n: int, boundary: str) -> Tensor:
    """The position inside [0, n - 1] that stands for one outside."""
    last = n - 1
    if last == 0:
        return 0 * position
    if boundary == "mirror":
        position = position.remainder(2 * last)
        return torch.minimum(position, 2 * last - position)
    if boundary == "wrap":
        return torch.where((position < 0) | (position > last), position.remainder(last), position)
    return position.clamp(0, last)


def _inside(positions: Tensor, shape: Sequence[int], boundary: str) -> tuple[Tensor, Tensor]:
    """(which positions can be used, which are read: the others take the constant)."""
    usable = (positions.abs() < FARTHEST).all(0)
    read = usable
    if boundary == "constant":
        for position, n in zip(positions, shape, strict=True):
            read = read & (position >= 0) & (position <= n - 1)
    return usable, read


def _nearest(
    positions: Tensor, shape: Sequence[int], boundary: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The indices of the nearest pixels, and which of them are read."""
    _, read = _inside(positions, shape, boundary)
    folded = [
        _fold(torch.where(read, p, 0), n, boundary) for p, n in zip(positions, shape, strict=True)
    ]
    return tuple((p + 0.5).floor().long() for p in folded), read


def _sample(image: Tensor, positions: Tensor, order: int, boundary: str, cval: float) -> Tensor:
    """Reads an image (H, W) at positions (2, h, w); float64."""
    usable, read = _inside(positions.detach(), image.shape, boundary)
    image = image.double()
    if order == 0:
        result = image[_nearest(positions, image.shape, boundary)[0]]
    else:
        folded = [
            _fold(torch.where(read, p, 0), n, boundary)
            for p, n in zip(positions, image.shape, strict=True)
        ]
        if order == 3:
            # The coefficients of the spline through the pixels.
            rows, columns = (_spline_matrix(_knots(image, n), n) for n in image.shape)
            image = torch.linalg.solve(columns, torch.linalg.solve(rows, image).T).T
        result = torch.zeros_like(folded[0])
        y_taps, x_taps = (_taps(p, n, order) for p, n in zip(folded, image.shape, strict=True))
        for row, y in y_taps:
            for column, x in x_taps:
                result = result + y * x * image[row, column]
    result = torch.where(read, result, cval)
    return torch.where(usable, result, torch.nan)


def _taps(position: Tensor, n: int, order: int) -> list[tuple[Tensor, Tensor]]:
    """The pixels read along an axis and their weights."""
    first = position.detach().floor().clamp(0, max(n - 2, 0))
    t = position - first
    weights = [1 - t, t] if order == 1 else _bspline(t)
    indices = [first + k - order // 2 for k in range(len(weights))]
    return [(_fold(i, n, "mirror").long(), w) for i, w in zip(indices, weights, strict=True)]


def gray_range(dtype: torch.dtype) -> float:
    """The grey value that 1 stands for."""
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def _apply_curve(image: Tensor, curve: Tensor, unit: float) -> Tensor:
    """Maps grey values through the piecewise linear curve of each sample and channel."""
    n, channels = image.shape[:2]
    intervals = curve.shape[2] - 1
    table = curve.double().expand(n, channels, -1)
    x = image.flatten(2) * (intervals / unit)
    index = x.detach().nan_to_num().floor().clamp(0, intervals - 1).long()
    low, high = table.gather(2, index), table.gather(2, index + 1)
    return (low + (x - index) * (high - low)).view_as(image) * unit


def _as_type(image: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return image.to(dtype)
    rounded = (image.nan_to_num(0) + 0.5).floor().clamp(0, gray_range(dtype))
    return rounded.to(torch.int64).to(dtype)


class Facts(NamedTuple):
    """What the checks ask of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.device.type == "cuda"


def facts(x: Tensor | None) -> Facts | None:
    """Those of a tensor."""
    return None if x is None else Facts(x.shape, x.dtype, x.device)


def check_dtypes(
    image: Facts,
    displacement: Facts | None,
    labels: Facts | None,
    affine: Facts | None,
    gray_curve: Facts | None,
    offset: Facts | None,
    source: Facts | None,
) -> None:
    """Raises TypeError, for the reference and the operator."""
    if image.dtype not in (*_FLOATS, torch.uint8, torch.uint16):
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
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"elastic_deform: {name} must be floating point, got {tensor.dtype}")


def check_shapes(
    image: Facts,
    displacement: Facts | None,
    labels: Facts | None,
    affine: Facts | None,
    gray_curve: Facts | None,
    offset: Facts | None,
    source: Facts | None,
) -> None:
    """Raises ValueError if a tensor does not fit the image."""
    if len(image.shape) != 4 or 0 in image.shape[2:]:
        raise ValueError(
            f"elastic_deform: image must be (N, C, H, W) with H, W >= 1, got {tuple(image.shape)}"
        )
    m, channels, height, width = image.shape
    n = m
    if source is not None:
        if len(source.shape) != 1:
            raise ValueError(
                f"elastic_deform: source must have shape (N,), got {tuple(source.shape)}"
            )
        n = source.shape[0]
    for name, tensor, rule in (
        ("source", source, (n,)),
        ("displacement", displacement, (n, 2, "P >= 1", "Q >= 1")),
        ("labels", labels, (m, height, width)),
        ("affine", affine, (n, 2, 3)),
        ("offset", offset, (n, 2)),
        ("gray_curve", gray_curve, (n, 1 if channels == 1 else f"1 or {channels}", "K >= 1")),
    ):
        if tensor is None:
            continue
        fits = len(tensor.shape) == len(rule) and tensor.shape[0] == rule[0]
        if not fits or (tensor.shape != rule and not _fits(tensor.shape, rule, channels)):
            wanted = f"({', '.join(map(str, rule))})"
            raise ValueError(
                f"elastic_deform: {name} must have shape {wanted}, got {tuple(tensor.shape)}"
            )
        if tensor.device != image.device:
            raise ValueError(
                f"elastic_deform: {name} must be on {image.device}, got {tensor.device}"
            )
    if gray_curve is not None and gray_curve.shape[2] < 2:
        raise ValueError(
            f"elastic_deform: gray_curve must have at least 2 points, got {gray_curve.shape[2]}"
        )


def _fits(shape: Sequence[int], rule: Sequence[int | str], channels: int) -> bool:
    """Whether a shape is one of those that the rule describes."""
    return all(
        size == side
        or (isinstance(side, str) and (size >= 1 if ">=" in side else size in (1, channels)))
        for size, side in zip(shape, rule, strict=True)
    )


def whole_numbers(name: str, value: object) -> Any:
    """An int, a tuple of ints, or None. Raises TypeError if a value is none of them."""
    return _converted(name, value, operator.index, "an integer")


def numbers(name: str, value: object) -> Any:
    """A float, a tuple of floats, or None. Raises TypeError if a value is none of them."""
    return _converted(name, value, float, "a number")


def number(name: str, value: object) -> float:
    """A float. Raises TypeError if it is none."""
    result = numbers(name, value)
    if not isinstance(result, float):
        raise TypeError(f"elastic_deform: {name} must be a number, got {value!r}")
    return result


def _converted(name: str, value: Any, convert: Callable[[Any], Any], kind: str) -> Any:
    if value is None:
        return None
    try:
        if isinstance(value, str):
            raise TypeError  # which float would read
        return tuple(map(convert, value)) if isinstance(value, Iterable) else convert(value)
    except TypeError:
        raise TypeError(
            f"elastic_deform: {name} must be {kind} or a sequence of them, got {value!r}"
        ) from None


def check_choices(
    channels: int, order: int | Sequence[int], grid: str, grid_extent: str, boundary: str
) -> tuple[int, ...]:
    """The order of every channel. Raises ValueError if a choice is none."""
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


def check_windows(
    input_shape: Sequence[int],
    output_shape: Sequence[int] | None,
    label_shape: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spatial shapes of the output and of its labels. Raises ValueError if there are none such."""
    output = _as_shape(input_shape if output_shape is None else output_shape)
    label = output if label_shape is None else _as_shape(label_shape)
    for name, shape in (("output_shape", output), ("label_shape", label)):
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"elastic_deform: {name} must be two sizes >= 1, got {shape}")
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
    """Grid cells per pixel along each axis. Raises ValueError if the grid cannot span so much."""
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
        cells = (n - 1) / s * (1 - 1e-12)  # the quotient is rounded
        if cells > p - 3:
            raise ValueError(
                f"elastic_deform: displacement must have at least {math.ceil(cells) + 3} points to "
                f"span {n} pixels at grid_spacing {s:g}, got {p}"
            )
    return tuple(1 / s for s in given)
