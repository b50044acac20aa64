"""Reference of the elastic deformation."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contracts.elastic_deform import (
    FARTHEST,
    check,
    gray_range,
    kinds_of,
    number,
    numbers,
    whole_numbers,
    without_image,
)
from ..contracts.types import takes_arrays

_KEYS = -0.75  # the slope parameter of torch's bicubic interpolation


@takes_arrays("image", "labels", "displacement", "affine", "gray_curve", "offset", "source")
def elastic_deform(
    image: Tensor | None,
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
    r"""Deforms images and their labels by a coarse grid of displacements and an affine map.

    Output pixel x is read at the input position

    .. math:: A x + u(x) + o,\quad \text{or}\quad A (x + u(x)) + o

    where u(x) is the field between the displacements of the grid, and the second form is that of
    the approximating grid. Pixel centres have integer coordinates. A position that is not finite,
    or farther than 2^30 pixels, gives NaN (integer images and labels: 0).

    An image of five axes is a volume: wherever a shape below has H, W, it then has D, H, W, and
    P, Q, R for P, Q. There are three displacements along depth, rows and columns for two along
    rows and columns, A is (N, 3, 4), and o is (N, 3).

    Args:
        image: (N, C, H, W) or (N, C, D, H, W), float16, bfloat16, float32, float64, uint8 or
            uint16; None to deform labels alone.
        displacement: (N, 2, P, Q), floating point, in pixels along rows and columns; None for 0.
        labels: (N, H, W), or (N, K, H, W) for K maps, integer, read at the nearest pixel of the
            same positions. Without an image, four axes are K maps of planes, and five of volumes.
        affine: A, (N, 2, 3), floating point: from output (row, column, 1) to input (row, column);
            None for identity.
        gray_curve: (N, C, K) or (N, 1, K), K >= 2, floating point: new grey values at K evenly
            spaced old ones from 0 to 1, linear between them and beyond; applied after
            interpolation. In integer images, 1 stands for the greatest value of the type. None for
            no change. Gain a and offset b: (b, a + b); gamma: K values of x^gamma.
        order: Interpolation of the image: 0, the nearest pixel; 1, linear; 3, cubic B-spline
            through the pixels. One for all channels, or a sequence of one for each.
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
        cval: Constant for the image, before the grey curve; labels take 0.
        output_shape: Spatial shape of the output; None for that of the image.
        label_shape: Spatial shape of the label output, which is centred in the output; None for
            `output_shape`. The difference must be even.
        offset: o, (N, 2), floating point: input position of output pixel (0, 0), in pixels; None
            for 0.
        source: (N,), integer, in [0, M - 1]: the image and labels, of M, that each of N outputs
            reads; `image` is then (M, C, H, W) and `labels` (M, H, W). None: each its own.

    Returns:
        The image, (N, C, \*output_shape), or (image, labels) if labels are given, or the labels
        without an image; dtypes as given, integers rounded and clamped. NumPy arrays give NumPy.

    Raises:
        TypeError: If an argument is of another type or dtype than above.
        ValueError: If a shape or value breaks a rule above.

    Source: the augmentation of O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, section
    3.1; docs/elastic_deform.md compares the grids.
    """
    alone = image is None
    if image is None:
        image = without_image(labels)
    orders, _, _, scales, _, shape, inner = check(
        kinds_of(image, displacement, labels, affine, gray_curve, offset, source),
        whole_numbers("order", order),
        grid,
        grid_extent,
        numbers("grid_spacing", grid_spacing),
        boundary,
        whole_numbers("output_shape", output_shape),
        whole_numbers("label_shape", label_shape),
    )
    cval = number("cval", cval)
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
    axes = len(inner)
    moved = labels.new_empty(*labels.shape[:-axes], *inner)
    maps = labels.flatten(0, -axes - 1).unbind(), moved.flatten(0, -axes - 1).unbind()
    of_each = positions.repeat_interleave(len(maps[0]) // max(1, len(labels)), 0)
    for ids, p, y in zip(maps[0], of_each, maps[1], strict=True):
        index, inside = _nearest(p.detach(), ids.shape, boundary)
        # Indexed as bytes, because torch cannot index tensors of uint16, uint32 or uint64.
        taken = ids.contiguous()[..., None].view(torch.uint8)[index]
        y.copy_(torch.where(inside[..., None], taken, 0).view(y.dtype).view(inner))
    return moved if alone else (deformed, moved)


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
    """Returns the input position of every output pixel, (N, axes, *shape), float64."""
    n, axes, device = image.shape[0], len(shape), image.device
    o = torch.zeros(n, axes, device=device) if offset is None else offset
    o = o.double()[:, :, None]
    places = [torch.arange(size, dtype=torch.float64, device=device) for size in shape]
    x = torch.stack(torch.meshgrid(*places, indexing="ij")).expand(n, axes, *shape)
    u = torch.zeros_like(x)
    if displacement is not None:
        start = o if grid_extent == "input" else torch.zeros_like(o)
        u = displacement.double()
        for i, place in enumerate(places):
            matrix = _grid_matrix(place + start[:, i], u.shape[2 + i], scales[i], grid)
            u = torch.einsum("nqp,n...p->n...q", matrix, u.movedim(2 + i, -1)).movedim(-1, 2 + i)
    if grid == "approximating":
        x, u = x + u, 0 * u
    if affine is not None:
        a = affine.double()
        x = torch.einsum("nij,nj...->ni...", a[:, :, :-1], x)
        x = x + a[:, :, -1].view(n, axes, *(1,) * axes)
    return x + u + o.view(n, axes, *(1,) * axes)


def _grid_matrix(q: Tensor, points: int, scale: float, grid: str) -> Tensor:
    """Returns weights of the displacements along one axis at pixels q, (N, n, points)."""
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
    """Returns cubic B-splines around each point, mirrored at the ends, at coordinates g."""
    cells = max(points - 1, 1)
    mirrored = [_mirror(k, points) for k in range(-1, cells + 2)]
    return _cubic_matrix(g, _bspline(g - _cell(g, cells)), mirrored)


def _cubic_matrix(g: Tensor, weights: list[Tensor], taps: Sequence[int]) -> Tensor:
    """Returns (*g.shape, points): in cell e, weight k is that of the point taps[e + k]."""
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
    """Folds positions into [0, n - 1]."""
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
    """Returns which positions can be used, and which of them are read; others take the constant."""
    usable = (positions.abs() < FARTHEST).all(0)
    read = usable
    if boundary == "constant":
        for position, n in zip(positions, shape, strict=True):
            read = read & (position >= 0) & (position <= n - 1)
    return usable, read


def _nearest(
    positions: Tensor, shape: Sequence[int], boundary: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the indices of the nearest pixels, and which of them are read."""
    _, read = _inside(positions, shape, boundary)
    folded = [
        _fold(torch.where(read, p, 0), n, boundary) for p, n in zip(positions, shape, strict=True)
    ]
    return tuple((p + 0.5).floor().long() for p in folded), read


def _sample(image: Tensor, positions: Tensor, order: int, boundary: str, cval: float) -> Tensor:
    """Reads an image, (H, W) or (D, H, W), at positions (axes, ...); float64."""
    usable, read = _inside(positions.detach(), image.shape, boundary)
    image = image.double()
    if order == 0:
        result = image[_nearest(positions, image.shape, boundary)[0]]
    else:
        folded = [
            _fold(torch.where(read, p, 0), n, boundary)
            for p, n in zip(positions, image.shape, strict=True)
        ]
        if order == 3:  # the coefficients of the spline through the pixels
            for axis, n in enumerate(image.shape):
                lines = image.movedim(axis, 0)
                lines = torch.linalg.solve(_spline_matrix(_knots(image, n), n), lines.flatten(1))
                image = lines.view(image.movedim(axis, 0).shape).movedim(0, axis)
        result = torch.zeros_like(folded[0])
        taps = [_taps(p, n, order) for p, n in zip(folded, image.shape, strict=True)]
        for corner in itertools.product(*taps):
            pixel, weights = zip(*corner, strict=True)
            result = result + math.prod(weights) * image[pixel]
    result = torch.where(read, result, cval)
    return torch.where(usable, result, torch.nan)


def _taps(position: Tensor, n: int, order: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the pixels that are read along an axis, and their weights."""
    first = position.detach().floor().clamp(0, max(n - 2, 0))
    t = position - first
    weights = [1 - t, t] if order == 1 else _bspline(t)
    indices = [first + k - order // 2 for k in range(len(weights))]
    return [(_fold(i, n, "mirror").long(), w) for i, w in zip(indices, weights, strict=True)]


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
