"""References of the distance transform, the border weight map and the ridge between instances."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

_INTEGERS = (torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64)


def two_nearest(labels: Tensor, *, spacing: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Distances of every pixel to its nearest and second nearest object.

    The distance to an object is the Euclidean distance between pixel centres to its nearest pixel,
    so it is 0 inside. An object is all pixels of one id, also in several parts.

    Args:
        labels: Instance maps, integer, 0 background; (H, W), (N, H, W) or (N, D, H, W).
        spacing: Size of a pixel along each spatial axis, > 0, in the unit of the distances; None
            for 1.

    Returns:
        first, second: float32, of the shape and device of `labels`; infinite where there is no
        object, or no second one.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If `labels` has another number of axes, or `spacing` another length or a value
            that is not > 0.
    """
    check_labels("two_nearest", labels)
    check_spacing("two_nearest", labels, spacing)
    array = labels.cpu().numpy()
    batch = array[None] if labels.dim() == 2 else array
    first = np.full(batch.shape, np.inf)
    second = np.full(batch.shape, np.inf)
    for image, d1, d2 in zip(batch, first, second, strict=True):
        for label in np.unique(image[image != 0]):
            distance = ndimage.distance_transform_edt(image != label, sampling=spacing)
            np.minimum(d2, np.maximum(d1, distance), out=d2)
            np.minimum(d1, distance, out=d1)
    d1, d2 = (torch.from_numpy(d.reshape(array.shape)).float() for d in (first, second))
    return d1.to(labels.device), d2.to(labels.device)


def separate_touching(labels: Tensor, mode: str = "two_sided") -> Tensor:
    """Makes background of the pixels along which different objects touch.

    Args:
        labels: Instance maps, integer, 0 background; (H, W), (N, H, W) or (N, D, H, W).
        mode: ``"two_sided"``: a pixel with a neighbour of another object along an axis; the ridge
            is two pixels wide and turns with the image. ``"one_sided"``: a pixel with a neighbour
            of another object among the neighbours (diagonals too) that come before it in scan
            order; one pixel wide, as in the code of Falk et al. 2019. ``"none"``: no change.

    Returns:
        New labels, of the shape, dtype and device of `labels`.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If `labels` has another number of axes, or `mode` is unknown.
    """
    check_labels("separate_touching", labels)
    if mode not in ("two_sided", "one_sided", "none"):
        raise ValueError(
            f"separate_touching: mode must be two_sided, one_sided or none, got {mode!r}"
        )
    axes = spatial_axes(labels)
    neighbourhood = list(itertools.product((-1, 0, 1), repeat=axes))
    if mode == "two_sided":
        offsets = [o for o in neighbourhood if sum(map(abs, o)) == 1]
    elif mode == "one_sided":
        offsets = [o for o in neighbourhood if o < (0,) * axes]
    else:
        offsets = []
    ids = labels.to(torch.int64)
    ridge = torch.zeros_like(ids, dtype=torch.bool)
    for offset in offsets:
        neighbour = _shifted(ids, offset)
        ridge |= (ids != 0) & (neighbour != 0) & (neighbour != ids)
    return torch.where(ridge, 0, ids).to(labels.dtype)


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
    r"""The weight map that makes a network learn the gaps between objects.

    .. math:: w = w_c + w_0 \exp(-(d_1 + d_2)^2 / (2 \sigma^2))

    with the distances d1, d2 of :func:`two_nearest`. With fewer than two objects the border term is
    0.

    Args:
        labels: Instance maps, integer, 0 background; (H, W), (N, H, W) or (N, D, H, W). Distances
            are measured to these objects, so give them before carving.
        w0: Height of the border term, >= 0.
        sigma: Its width, > 0, in pixels or the unit of `spacing`.
        class_weight: w_c: None for 1; a pair (background, foreground); or ``"balanced"``,
            pixels / (classes present x pixels of the class), counted in each image by itself.
        where: ``"background"``, the border term on background only, or ``"everywhere"``.
        foreground: Which pixels are cells, bool, of the shape of `labels`; None for `labels` > 0.
            Give the carved labels here to weight the ridge as background.
        halo: None, or (v, s): adds (1 - v) exp(-d1^2 / (2 s^2)) on background (Falk et al. 2019).
        spacing: Size of a pixel along each spatial axis, > 0; None for 1.

    Returns:
        float32 weights of the shape and device of `labels`.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If a shape or value breaks a rule above.

    Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, equation 2; w0 = 10 and
    sigma = 5 are the paper's.
    """
    check_labels("border_weight_map", labels)
    check_spacing("border_weight_map", labels, spacing)
    check_weights(labels, w0, sigma, where, foreground, halo)
    distances = two_nearest(labels, spacing=spacing)
    return weights_from_distances(
        labels, distances, w0, sigma, class_weight, where, foreground, halo
    )


def weights_from_distances(
    labels: Tensor,
    distances: tuple[Tensor, Tensor],
    w0: float,
    sigma: float,
    class_weight: tuple[float, float] | Tensor | str | None,
    where: str,
    foreground: Tensor | None,
    halo: tuple[float, float] | None,
) -> Tensor:
    """The formula of :func:`border_weight_map`, given the distances; arguments as there."""
    first, second = (d.double() for d in distances)
    cells = labels.to(torch.int64) != 0 if foreground is None else foreground
    border = w0 * torch.exp(-((first + second) ** 2) / (2 * sigma**2))
    if where == "background":
        border = torch.where(cells, 0, border)
    weights = _class_weights(cells, class_weight) + border
    if halo is not None:
        v, s = halo
        glow = (1 - v) * torch.exp(-(first**2) / (2 * s**2))
        weights = weights + torch.where(cells, 0, glow)
    return weights.float()


def _class_weights(
    cells: Tensor, class_weight: tuple[float, float] | Tensor | str | None
) -> Tensor:
    if class_weight is None:
        return torch.ones_like(cells, dtype=torch.float64)
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(
                "border_weight_map: class_weight must be None, a pair (background, foreground) or "
                f"'balanced', got {class_weight!r}"
            )
        spatial = tuple(range(cells.dim() - spatial_axes(cells), cells.dim()))
        count = torch.stack([(~cells).sum(spatial), cells.sum(spatial)])
        present = (count > 0).sum(0)
        background, foreground = (count.sum(0) / (present * count.double())).reshape(
            2, -1, *[1] * len(spatial)
        )
        return torch.where(cells, foreground, background).reshape(cells.shape)
    pair = torch.as_tensor(class_weight, dtype=torch.float64, device=cells.device)
    if pair.shape != (2,) or not bool((pair >= 0).all()):
        raise ValueError(
            "border_weight_map: class_weight must be two weights >= 0 (background, foreground), "
            f"got {class_weight}"
        )
    return pair[cells.long()]


def spatial_axes(labels: Tensor) -> int:
    """How many axes of a label map are not the batch."""
    return 2 if labels.dim() == 2 else labels.dim() - 1


def _shifted(labels: Tensor, offset: tuple[int, ...]) -> Tensor:
    """The neighbour of every pixel at `offset`; 0 outside the image."""
    padded = F.pad(labels, [1, 1] * len(offset))
    for axis, step in enumerate(offset):
        dim = labels.dim() - len(offset) + axis
        padded = padded.narrow(dim, 1 + step, labels.shape[dim])
    return padded


def check_labels(op: str, labels: Tensor) -> None:
    """Raises TypeError or ValueError for what is no label map."""
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{op}: labels must be an integer tensor, got {labels.dtype}")
    if labels.dim() not in (2, 3, 4):
        raise ValueError(
            f"{op}: labels must be (H, W), (N, H, W) or (N, D, H, W), got {tuple(labels.shape)}"
        )


def check_spacing(op: str, labels: Tensor, spacing: Sequence[float] | None) -> None:
    """Raises ValueError unless there is a size > 0 for each spatial axis."""
    if spacing is None:
        return
    axes = spatial_axes(labels)
    if len(spacing) != axes or not all(0 < s < float("inf") for s in spacing):
        raise ValueError(f"{op}: spacing must be {axes} values > 0, got {tuple(spacing)}")


def check_weights(
    labels: Tensor,
    w0: float,
    sigma: float,
    where: str,
    foreground: Tensor | None,
    halo: tuple[float, float] | None,
) -> None:
    """Raises ValueError if a setting of border_weight_map is out of range."""
    shape = tuple(labels.shape)
    if not 0 <= w0 < float("inf"):
        raise ValueError(f"border_weight_map: w0 must be >= 0, got {w0}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"border_weight_map: sigma must be > 0, got {sigma}")
    if where not in ("background", "everywhere"):
        raise ValueError(
            f"border_weight_map: where must be background or everywhere, got {where!r}"
        )
    if foreground is not None and (foreground.dtype, foreground.shape) != (torch.bool, shape):
        raise ValueError(
            f"border_weight_map: foreground must be bool of shape {shape}, "
            f"got {foreground.dtype} {tuple(foreground.shape)}"
        )
    if halo is not None and not (len(halo) == 2 and 0 <= halo[0] <= 1 and halo[1] > 0):
        raise ValueError(
            f"border_weight_map: halo must be (v, s) with 0 <= v <= 1 and s > 0, got {halo}"
        )
