"""Distances to the two nearest objects, and the border weight map."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import bad_value
from ..reference import two_nearest as _reference_two_nearest
from ..reference.border_weight_map import (
    check_labels,
    check_spacing,
    check_weights,
    spatial_axes,
    weights_from_distances,
)

_TWO_NEAREST = torch.ops.unet_fast.two_nearest.default
_INT32_MAX = 2**31 - 1


def two_nearest(labels: Tensor, *, spacing: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Distances of every pixel to its nearest and second nearest object.

    The distance to an object is the Euclidean distance between pixel centres to its nearest pixel,
    so it is 0 inside. An object is all pixels of one id, also in several parts. Exact, by one pass
    along each axis, whatever the number of objects. CUDA tensors are computed on the CPU so far, by
    the reference.

    Args:
        labels: Instance maps, integer, ids 1 to 2^31 - 1, 0 background; (H, W), (N, H, W) or
            (N, D, H, W).
        spacing: Size of a pixel along each spatial axis, > 0, in the unit of the distances; None
            for 1.

    Returns:
        first, second: float32, of the shape and device of `labels`; infinite where there is no
        object, or no second one.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If `labels` has another number of axes, an id is negative or above 2^31 - 1, or
            `spacing` has another length or a value that is not > 0.
    """
    check_labels("two_nearest", labels)
    check_spacing("two_nearest", labels, spacing)
    return _two_nearest("two_nearest", labels, spacing, math.inf)


def _two_nearest(
    op: str, labels: Tensor, spacing: Sequence[float] | None, reach: float
) -> tuple[Tensor, Tensor]:
    """Exact up to a distance of `reach`, beyond it possibly too large."""
    if labels.device.type != "cpu":
        return _reference_two_nearest(labels, spacing=spacing)
    if labels.dtype == torch.int64 and labels.numel() > 0 and int(labels.max()) > _INT32_MAX:
        raise ValueError(f"{op}: labels must be <= {_INT32_MAX}, got {int(labels.max())}")
    if labels.dtype == torch.int64 and labels.numel() > 0 and int(labels.min()) < 0:
        raise ValueError(f"{op}: labels must be >= 0, got {int(labels.min())}")
    axes = spatial_axes(labels)
    sides = tuple(labels.shape[-axes:])
    batch = 1 if labels.dim() == 2 else labels.shape[0]
    volumes = labels.to(torch.int32).reshape(batch, *[1] * (3 - axes), *sides)
    sizes = [1.0] * (3 - axes) + [float(s) for s in spacing or [1.0] * axes]
    try:
        first, second = _TWO_NEAREST(volumes, *sizes, reach)
    except RuntimeError as error:
        raise bad_value(op, error, "labels") or error from None
    return first.reshape(labels.shape), second.reshape(labels.shape)


def border_weight_map(
    labels: Tensor,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: tuple[float, float] | Tensor | str | None = None,
    where: str = "background",
    foreground: Tensor | None = None,
    halo: tuple[float, float] | None = None,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """The weight map of the paper, from the distances of :func:`two_nearest`.

    Arguments, result, errors and source as in :func:`unet_fast.reference.border_weight_map`.
    """
    check_labels("border_weight_map", labels)
    check_spacing("border_weight_map", labels, spacing)
    check_weights(labels, w0, sigma, where, foreground, halo)
    # Terms of farther objects are below 1e-7 of their height, the resolution of float32.
    widest = max(sigma, halo[1] if halo is not None else 0.0)
    reach = widest * math.sqrt(2 * math.log(1e7))
    distances = _two_nearest("border_weight_map", labels, spacing, reach)
    return weights_from_distances(
        labels, distances, w0, sigma, class_weight, where, foreground, halo
    )


@torch.library.register_fake("unet_fast::two_nearest")
def _(
    labels: Tensor, depth: float, height: float, width: float, reach: float
) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape, dtype=torch.float32), labels.new_empty(
        labels.shape, dtype=torch.float32
    )
