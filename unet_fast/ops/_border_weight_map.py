"""Distances to the two nearest objects, the border weight map and the ridge between objects."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import bad_value, require_kernels
from ..contracts.border_weight_map import (
    IGNORED,
    MAX_CLASSES,
    RIDGES,
    ClassWeight,
    check_map,
    check_ridge,
    check_spacing,
    check_terms,
    class_count,
    class_map,
    class_table,
    label_maps,
    spatial_axes,
)
from ..contracts.types import takes_arrays
from ._call import or_reference, register_vmap

_TWO_NEAREST = torch.ops.unet_fast.two_nearest.default
_SEPARATE = torch.ops.unet_fast.separate_touching.default
_WEIGHTS = torch.ops.unet_fast.border_weights.default
_CUDA_PIXELS = 2**31 - 1


@takes_arrays("labels")
@or_reference
def two_nearest(
    labels: Tensor, *, spacing: Sequence[float] | None = None, dims: int | None = None
) -> tuple[Tensor, Tensor]:
    """Distances of every pixel to its nearest and second nearest object.

    The distance to an object is the Euclidean distance between pixel centres to its nearest pixel,
    so it is 0 inside. An object is all pixels of one id, also in several parts. Exact, by one pass
    along each axis, whatever the number of objects; docs/border_weight_map.md has the proof.

    Args:
        labels: Instance maps, integer, ids 1 to 2^31 - 1, 0 background; (H, W), (N, H, W),
            (N, 1, H, W), (N, D, H, W) or (N, 1, D, H, W).
        spacing: Size of a pixel along each spatial axis, 1e-12 to 1e12, in the unit of the
            distances; None for 1.
        dims: Number of spatial axes: 3 takes (D, H, W) as a volume. None: as many as `spacing` has
            sizes, else those of the shapes above; a batch (N, H, W) whose images share their
            objects, as slices of a volume do, gets a warning.

    Returns:
        first, second: float32, of the shape and device of `labels`; infinite where there is no
        object, or no second one. A NumPy array gives NumPy arrays.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If `labels` has another number of axes, more than 2^31 - 1 pixels on CUDA, or
            (on the CPU) an id out of range; or if `spacing` has another length or a value out of
            range. An id out of range is a RuntimeError under `torch.compile`, and a device-side
            assertion on CUDA.
        RuntimeError: If the build has no kernels for the device.
    """
    maps = _maps("two_nearest", labels, dims, spacing)
    check_spacing("two_nearest", maps, spacing)
    first, second = _call("two_nearest", _TWO_NEAREST, _volumes(maps), _sizes(maps, spacing))
    return first.reshape(labels.shape), second.reshape(labels.shape)


@takes_arrays("labels")
@or_reference
def separate_touching(
    labels: Tensor, mode: str = "two_sided", *, dims: int | None = None
) -> Tensor:
    """Turns the pixels along which different objects touch into background.

    Arguments and result as in :func:`unet_fast.reference.separate_touching`; ids and errors as in
    :func:`two_nearest`.
    """
    maps = _maps("separate_touching", labels, dims)
    check_ridge("separate_touching", "mode", mode)
    separated = _call("separate_touching", _SEPARATE, _volumes(maps), RIDGES.index(mode))
    return separated.reshape(labels.shape).to(labels.dtype)  # type: ignore[no-any-return]


@takes_arrays("labels", "foreground")
@or_reference
def border_weight_map(
    labels: Tensor,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: ClassWeight = None,
    where: str = "background",
    foreground: Tensor | None = None,
    halo: tuple[float, float] | None = None,
    spacing: Sequence[float] | None = None,
    dims: int | None = None,
) -> Tensor:
    """Computes the paper's weight map, in one pass from labels to weights.

    Arguments, result and source as in :func:`unet_fast.reference.border_weight_map`; ids and errors
    as in :func:`two_nearest`. Terms below 2^-28 are taken as 0.
    """
    op = "border_weight_map"
    maps = _maps(op, labels, dims, spacing)
    check_terms(op, maps, w0, sigma, halo, spacing)
    check_map(labels, where, foreground)
    everywhere = where == "everywhere"
    table = class_table(op, class_weight, 2, labels.device)
    cells = None if foreground is None else _volumes(foreground.reshape(maps.shape))
    inputs = None, cells, table, 2, RIDGES.index("none"), None, w0, sigma, everywhere
    return _weights(op, maps, inputs, halo, spacing)[1].reshape(labels.shape)


@takes_arrays("labels", "classes")
@or_reference
def border_weights(
    labels: Tensor,
    classes: Tensor | Mapping[int, int] | None = None,
    *,
    num_classes: int | None = None,
    ridge: str = "two_sided",
    ignore_label: int | None = None,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: ClassWeight = None,
    halo: tuple[float, float] | None = None,
    spacing: Sequence[float] | None = None,
    dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes targets and weights in one pass, for :class:`unet_fast.BorderWeights`.

    Arguments and results as in :func:`unet_fast.reference.border_weights`; ids and errors as in
    :func:`two_nearest`, with classes out of range treated like ids.
    """
    op = "border_weights"
    maps = _maps(op, labels, dims, spacing)
    check_terms(op, maps, w0, sigma, halo, spacing)
    kinds = class_map(labels, classes, ridge)
    count = class_count(kinds, num_classes)
    table = class_table(op, class_weight, count, labels.device)
    kinds = None if kinds is None else _volumes(_as_bytes(kinds).reshape(maps.shape))
    inputs = kinds, None, table, count, RIDGES.index(ridge), ignore_label, w0, sigma, False
    target, weights = _weights(op, maps, inputs, halo, spacing)
    return target.reshape(labels.shape), weights.reshape(labels.shape)


def _weights(
    op: str,
    maps: Tensor,
    inputs: tuple[Any, ...],
    halo: tuple[float, float] | None,
    spacing: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    v, s = halo if halo is not None else (1.0, 1.0)
    sizes = _sizes(maps, spacing)
    return _call(op, _WEIGHTS, _volumes(maps), *inputs, 1.0 - v, s, sizes)  # type: ignore[no-any-return]


def _maps(
    op: str, labels: Tensor, dims: int | None, spacing: Sequence[float] | None = None
) -> Tensor:
    """Returns labels as (N, H, W) or (N, D, H, W), in a type that the kernels read."""
    maps = label_maps(op, labels, dims, spacing)
    if labels.is_cuda and labels.numel() > _CUDA_PIXELS:
        raise ValueError(
            f"{op}: labels must have at most {_CUDA_PIXELS} pixels on CUDA, got {labels.numel()}"
        )
    require_kernels(op, labels)
    return maps.to(torch.int64) if maps.dtype == torch.uint32 else maps


def _call(op: str, kernel: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a kernel; an error about values becomes a ValueError."""
    if torch.compiler.is_compiling():
        return kernel(*inputs)
    try:
        return kernel(*inputs)
    except RuntimeError as error:
        wrong = bad_value(op, error, "labels") or bad_value(op, error, "classes")
        raise wrong or error from None


def _as_bytes(classes: Tensor) -> Tensor:
    """Converts classes to uint8; values out of range become a class that the kernels reject."""
    if classes.dtype == torch.uint8:
        return classes
    values = classes.to(torch.int64)
    return torch.where((values < 0) | (values > IGNORED), MAX_CLASSES, values).to(torch.uint8)


def _volumes(maps: Tensor) -> Tensor:
    """Returns maps as (N, D, H, W), the shape that the kernels take."""
    return maps if maps.dim() == 4 else maps.unsqueeze(1)


def _sizes(maps: Tensor, spacing: Sequence[float] | None) -> list[float]:
    """Returns the size of a pixel along depth, height and width."""
    sizes = [1.0] * spatial_axes(maps) if spacing is None else [float(size) for size in spacing]
    return [1.0] * (3 - len(sizes)) + sizes


def _float(labels: Tensor) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.float32)


@torch.library.register_fake("unet_fast::two_nearest")
def _(labels: Tensor, spacing: list[float]) -> tuple[Tensor, Tensor]:
    return _float(labels), _float(labels)


@torch.library.register_fake("unet_fast::separate_touching")
def _(labels: Tensor, ridge: int) -> Tensor:
    return labels.new_empty(labels.shape)


@torch.library.register_fake("unet_fast::border_weights")
def _(labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape, dtype=torch.uint8), _float(labels)


register_vmap("two_nearest", "separate_touching", "border_weights")
