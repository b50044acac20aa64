"""References of the distance transform, the border weight map and the ridge between objects."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..contracts.border_weight_map import (
    IGNORED,
    ClassWeight,
    check_ids,
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


@takes_arrays("labels")
def two_nearest(
    labels: Tensor, *, spacing: Sequence[float] | None = None, dims: int | None = None
) -> tuple[Tensor, Tensor]:
    """Distances of every pixel to its nearest and second nearest object.

    The distance to an object is the Euclidean distance between pixel centres to its nearest pixel,
    so it is 0 inside. An object is all pixels of one id, also in several parts.

    Args:
        labels: Instance maps, integer, ids 1 to 2^31 - 1, 0 background; (H, W), (N, H, W),
            (N, 1, H, W), (N, D, H, W) or (N, 1, D, H, W).
        spacing: Size of a pixel along each spatial axis, 1e-12 to 1e12, in the unit of the
            distances; None for 1.
        dims: Number of spatial axes, see :func:`unet_fast.two_nearest`.

    Returns:
        first, second: float32, of the shape and device of `labels`; infinite where there is no
        object, or no second one.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If `labels` has another number of axes or an id out of range, or `spacing`
            another length or a value out of range.
    """
    maps = label_maps("two_nearest", labels, dims, spacing)
    check_ids("two_nearest", labels)
    check_spacing("two_nearest", maps, spacing)
    batch = maps.cpu().numpy()
    first = np.full(batch.shape, np.inf)
    second = np.full(batch.shape, np.inf)
    for image, d1, d2 in zip(batch, first, second, strict=True):
        for label in np.unique(image[image != 0]):
            distance = ndimage.distance_transform_edt(image != label, sampling=spacing)
            np.minimum(d2, np.maximum(d1, distance), out=d2)
            np.minimum(d1, distance, out=d1)
    d1, d2 = (torch.from_numpy(d).float().reshape(labels.shape) for d in (first, second))
    return d1.to(labels.device), d2.to(labels.device)


@takes_arrays("labels")
def separate_touching(
    labels: Tensor, mode: str = "two_sided", *, dims: int | None = None
) -> Tensor:
    """Turns the pixels along which different objects touch into background.

    Args:
        labels: Instance maps, as in :func:`two_nearest`.
        mode: ``"two_sided"``: a pixel with a neighbour of another object along an axis; the ridge
            is two pixels wide and turns with the image. ``"one_sided"``: a pixel with a neighbour
            of another object among the neighbours (diagonals too) that come before it in scan
            order; one pixel wide, as in the code of Falk et al. 2019. ``"none"``: no change.
        dims: As in :func:`two_nearest`.

    Returns:
        New labels, of the shape, dtype and device of `labels`.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If `labels` has another number of axes or an id out of range, or `mode` is
            unknown.
    """
    maps = label_maps("separate_touching", labels, dims)
    check_ridge("separate_touching", "mode", mode)
    check_ids("separate_touching", labels)
    axes = spatial_axes(maps)
    neighbourhood = list(itertools.product((-1, 0, 1), repeat=axes))
    if mode == "two_sided":
        offsets = [o for o in neighbourhood if sum(map(abs, o)) == 1]
    elif mode == "one_sided":
        offsets = [o for o in neighbourhood if o < (0,) * axes]
    else:
        offsets = []
    ids = maps.to(torch.int64)
    ridge = torch.zeros_like(ids, dtype=torch.bool)
    for offset in offsets:
        neighbour = _shifted(ids, offset)
        ridge |= (ids != 0) & (neighbour != 0) & (neighbour != ids)
    return torch.where(ridge, 0, ids).reshape(labels.shape).to(labels.dtype)


@takes_arrays("labels", "foreground")
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
    r"""The weight map that makes a network learn the gaps between objects.

    .. math:: w = w_c + w_0 \exp(-(d_1 + d_2)^2 / (2 \sigma^2))

    with the distances d1, d2 of :func:`two_nearest`. With fewer than two objects the border term is
    0.

    Args:
        labels: Instance maps, as in :func:`two_nearest`. Distances are measured to these objects,
            so give them unseparated.
        w0: Height of the border term, >= 0.
        sigma: Width of the border term, > 0, in pixels or the unit of `spacing`.
        class_weight: w_c: None for 1; weights >= 0 of background and foreground, as numbers or as
            a tensor (on CUDA the values of a tensor are not checked); or ``"balanced"``,
            pixels / (classes present x pixels of the class), counted in each image by itself.
        where: ``"background"``, the border term on background only, or ``"everywhere"``.
        foreground: Foreground pixels, bool, of the shape of `labels`; None for `labels` > 0. Give
            separated labels > 0 here to weight the ridge as background.
        halo: None, or (v, s): adds (1 - v) exp(-d1^2 / (2 s^2)) on background (Falk et al. 2019).
        spacing: Size of a pixel along each spatial axis, 1e-12 to 1e12; None for 1.
        dims: As in :func:`two_nearest`.

    Returns:
        float32 weights of the shape and device of `labels`.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If a shape or value breaks a rule above.

    Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, equation 2; w0 = 10 and
    sigma = 5 are the paper's.
    """
    op = "border_weight_map"
    maps = label_maps(op, labels, dims, spacing)
    check_terms(op, maps, w0, sigma, halo, spacing)
    check_map(labels, where, foreground)
    table = class_table(op, class_weight, 2, labels.device)
    cells = labels.to(torch.int64) != 0 if foreground is None else foreground
    target, everywhere = cells.reshape(maps.shape).to(torch.uint8), where == "everywhere"
    weights = _weights(target, [maps], w0, sigma, table, 2, everywhere, halo, spacing)
    return weights.reshape(labels.shape)


@takes_arrays("labels", "classes")
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
    """Computes targets and weights of instances, of one class or of several.

    Distances and ridge are computed for each class by itself; the terms of all classes are added
    up, on background.

    Args:
        labels: Instance maps, as in :func:`border_weight_map`.
        classes: The class of every pixel, uint8 or another integer type, of the shape of `labels`:
            0 background, 1... classes, 255 ignored; or the class of every id, as a mapping or a
            vector that ids index; None for one class. A pixel with a class but no
            object (label 0) keeps its class, and does not affect distances.
        num_classes: Number of classes, background included, 2 to 254; None: 2 or, with `classes`,
            one more than the greatest (read from the device: on CUDA the host waits).
        ridge: As in :func:`separate_touching`; the ridge is background.
        ignore_label: Label of pixels that are ignored, and are no object; or None.
        w0: As in :func:`border_weight_map`.
        sigma: As in :func:`border_weight_map`.
        class_weight: As in :func:`border_weight_map`, a weight for each class; counts of
            ``"balanced"`` leave out ignored pixels.
        halo: As in :func:`border_weight_map`.
        spacing: As in :func:`border_weight_map`.
        dims: As in :func:`two_nearest`.

    Returns:
        target: uint8, 0 background, 1... classes, 255 ignored.
        weights: float32, 0 where ignored.

    Raises:
        TypeError: If `labels` or `classes` is not an integer tensor.
        ValueError: If a shape or value breaks a rule above.

    Source: T. Falk et al., "U-Net: deep learning for cell counting, detection, and morphometry",
    Nature Methods 2019, and its code.
    """
    op = "border_weights"
    maps = label_maps(op, labels, dims, spacing)
    check_terms(op, maps, w0, sigma, halo, spacing)
    kinds = class_map(labels, classes, ridge)
    count = class_count(kinds, num_classes)
    table = class_table(op, class_weight, count, labels.device)
    ids = maps.to(torch.int64)
    ignored = (
        torch.zeros_like(ids, dtype=torch.bool) if ignore_label is None else ids == ignore_label
    )
    ids = torch.where(ignored, 0, ids)
    target = (ids != 0).long() if kinds is None else kinds.to(torch.int64).reshape(maps.shape)
    objects = [torch.where(target == c, ids, 0) for c in range(1, count)]
    for of_class in objects:
        separated = separate_touching(of_class, ridge, dims=spatial_axes(maps))
        target = torch.where(separated == of_class, target, 0)
    target = torch.where(ignored, IGNORED, target).to(torch.uint8)
    weights = _weights(target, objects, w0, sigma, table, count, False, halo, spacing)
    return target.reshape(labels.shape), weights.reshape(labels.shape)


def _weights(
    target: Tensor,
    objects: list[Tensor],
    w0: float,
    sigma: float,
    table: Tensor | None,
    num_classes: int,
    everywhere: bool,
    halo: tuple[float, float] | None,
    spacing: Sequence[float] | None,
) -> Tensor:
    """Returns class weights plus the terms of all maps of objects."""
    of_class = torch.stack([target == c for c in range(num_classes)])
    axes = spatial_axes(target)
    spatial = tuple(range(-axes, 0))
    if table is None:  # balanced
        count = of_class.sum(spatial, keepdim=True)
        present = (count > 0).sum(0)
        weight = torch.where(count > 0, count.sum(0) / (present * count.double()), 0)
    else:
        weight = table.double().to(target.device).reshape(-1, *[1] * target.dim())
    weights = (of_class * weight).sum(0)
    for labels in objects:
        first, second = (d.double() for d in two_nearest(labels, spacing=spacing, dims=axes))
        border = w0 * torch.exp(-((first + second) ** 2) / (2 * sigma**2))
        weights += torch.where(target != IGNORED if everywhere else target == 0, border, 0)
        if halo is not None:
            v, s = halo
            weights += torch.where(target == 0, (1 - v) * torch.exp(-(first**2) / (2 * s**2)), 0)
    return weights.float()


def _shifted(labels: Tensor, offset: tuple[int, ...]) -> Tensor:
    """Returns the neighbour of every pixel at `offset`; 0 outside the image."""
    padded = F.pad(labels, [1, 1] * len(offset))
    for axis, step in enumerate(offset):
        dim = labels.dim() - len(offset) + axis
        padded = padded.narrow(dim, 1 + step, labels.shape[dim])
    return padded
