"""The inverse of a deformation: puts what is made of a deformed image back in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .augment import Augmentation, AugmentationParameters
from .contracts.elastic_deform import FLOATS
from .ops import elastic_deform

INTERPOLATED = (*FLOATS, torch.uint8, torch.uint16)
"""Types of images; all others are read at the nearest pixel."""
_STEPS = 10  # of Newton's method; five are enough for most fields


@torch.no_grad()
def undo(
    x: Tensor,
    augmentation: Augmentation,
    parameters: AugmentationParameters,
    *,
    nearest: bool = False,
) -> Tensor:
    """Undoes the deformation of images, of labels, or of what a network made of them.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W), of any type, in the shape of the deformed samples.
        augmentation: What deformed them.
        parameters: Those that it drew for them; grey values stay.
        nearest: Whether to take the nearest pixel of floating-point, uint8 and uint16 values, as of
            others, instead of linear interpolation.

    Returns:
        `x` in the place of the samples before the deformation, of the same shape and type; 0 where
        the deformed samples do not show them.

    Raises:
        ValueError: If the deformation folds, so that a pixel is in several places.
    """
    at = _places(augmentation, parameters, x.shape[2:], x.device)
    if x.dtype in INTERPOLATED:
        return _read(at, x, order=0 if nearest else 1, boundary="constant")
    labels = x.byte() if x.dtype == torch.bool else x
    return _read(at, None, labels=labels, boundary="constant").to(x.dtype)


def _places(
    augmentation: Augmentation,
    parameters: AugmentationParameters,
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Returns where each pixel is in the deformed samples, (N, axes, *shape), float32.

    Their pixel x was read at A (x + v(x)) + c. That of pixel y solves x + v(x) = A^-1 (y - c).
    """
    affine = parameters.affine.to(device).double()
    back: Tensor = torch.linalg.inv(affine[:, :, :-1])
    straight = back @ (_pixels(shape, affine).flatten(1) - affine[:, :, -1:])
    target: Tensor = straight.unflatten(2, tuple(shape)).float()
    field = _field(augmentation, parameters.displacement.to(device).double(), back, shape)

    axes = len(shape)
    slopes = [
        torch.gradient(field, dim=2 + i)[0] if side > 1 else torch.zeros_like(field)
        for i, side in enumerate(shape)
    ]
    unit = torch.eye(axes, dtype=field.dtype, device=device)
    matrix = torch.stack(slopes, -1).movedim(1, -2) + unit  # (N, *shape, axes, axes)
    folds = (torch.linalg.det(matrix) <= 0).double().mean().item()
    at, rest = target, target
    if folds == 0:
        inverse = torch.linalg.inv(matrix).flatten(-2).movedim(-1, 1)
        known = torch.cat([field, inverse], 1).float()
        for _ in range(_STEPS):  # of Newton's method
            here = _read(at, known, boundary="nearest")
            rest = target - at - here[:, :axes]
            step = here[:, axes:].unflatten(1, (axes, axes))
            at = at + torch.einsum("nij...,nj...->ni...", step, rest)
    if folds > 0 or (rest.abs() > 0.01).any():
        raise ValueError(
            "undo: the deformation must not fold, got one that "
            + (f"folds in {100 * folds:.2g} % of the pixels" if folds else "nearly folds")
            + "; smaller sigmas or fewer points fold less"
        )
    return at


def _field(
    augmentation: Augmentation, displacement: Tensor, back: Tensor, shape: Sequence[int]
) -> Tensor:
    """Returns v, (N, axes, *shape), float64: an image whose values are its positions is read.

    Args:
        augmentation: Says what the grid is.
        displacement: (N, axes, P, Q) or (N, axes, P, Q, R), float64.
        back: A^-1, (N, axes, axes), float64.
        shape: Spatial shape of the samples.
    """
    n, axes = back.shape[:2]
    tiny = 2.0**-20  # all positions are between two pixels
    if augmentation.grid != "approximating":  # u is added to A x there, and x + u taken to A here
        points = displacement.shape[2:]
        displacement = tiny * (back @ displacement.flatten(2)).unflatten(2, points)
    unit = torch.eye(axes, axes + 1, dtype=back.dtype, device=back.device)
    read: Tensor = elastic_deform(
        _pixels((2,) * axes, back).expand(n, *(axes, *(2,) * axes)),
        displacement,
        affine=(tiny * unit).expand(n, -1, -1),
        grid=augmentation.grid,
        grid_spacing=augmentation.spacing,
        offset=back.new_full((n, axes), 0.5),
        output_shape=tuple(shape),
    )
    return (read - 0.5) / tiny - _pixels(shape, back)


def _read(at: Tensor, image: Any, **settings: Any) -> Tensor:
    """Reads an image or labels at positions: by a displacement in each pixel, which is exact."""
    by = at - _pixels(at.shape[2:], at)
    result: Tensor = elastic_deform(image, by, grid="keys", **settings)
    return result


def _pixels(shape: Sequence[int], like: Tensor) -> Tensor:
    places = [torch.arange(side, dtype=like.dtype, device=like.device) for side in shape]
    return torch.stack(torch.meshgrid(*places, indexing="ij"))
