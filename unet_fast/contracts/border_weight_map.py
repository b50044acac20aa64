"""Constants and argument checks of border weights, ridges and distances."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .types import check_number, check_tensors

ClassWeight = Sequence[float] | Tensor | str | None


RIDGES = ("none", "one_sided", "two_sided")


IGNORED = 255
"""Target value of ignored pixels."""


MAX_CLASSES = 254
"""Largest number of classes, background included; 254 marks a class that is out of range."""


INTEGERS = (
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


MAX_ID = 2**31 - 1


def spatial_axes(maps: Tensor) -> int:
    """Returns the number of spatial axes of the result of :func:`label_maps`."""
    return maps.dim() - 1


def label_maps(
    op: str, labels: Tensor, dims: int | None, spacing: Sequence[float] | None = None
) -> Tensor:
    """Returns labels as (N, H, W) or (N, D, H, W); see :func:`as_maps`.

    Without `dims` there are as many spatial axes as `spacing` has values.

    Raises TypeError if `labels` is not an integer tensor.
    """
    check_tensors(op, labels=labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(
            f"{op}: labels must be an integer tensor, got {labels.dtype} (labels.int() "
            "converts; label_components numbers the parts of a mask)"
        )
    sizes = len(spacing) if dims is None and isinstance(spacing, Sequence) else 0
    return as_maps(op, "labels", labels, sizes if sizes in (2, 3) else dims)


def as_maps(op: str, name: str, x: Tensor, dims: int | None) -> Tensor:
    """Returns a map for each image or volume, as (N, H, W) or (N, D, H, W).

    Args:
        op: Name of the operator.
        name: Name of the argument.
        x: Maps of any shape that has one reading.
        dims: Number of spatial axes, 2 or 3; None: 3 if there are 4 axes and no axis of one
            channel, or 5; else 2.

    Raises:
        ValueError: If it has another number of axes, or `dims` is wrong.

    Warns:
        UserWarning: If neighbouring images of a batch share their objects as slices do.
    """
    if dims not in (None, 2, 3):
        raise ValueError(f"{op}: dims must be 2, 3 or None, got {dims!r}")
    n = x.dim()
    channel = n > 3 and x.shape[1] == 1
    if n in (3, 4) and x.shape[-1] == 1 and min(x.shape[-3:-1]) >= 8:
        warnings.warn(
            f"{op}: the last axis of {name} {tuple(x.shape)} is 1 pixel: if it is one of channels, "
            f"{name}[..., 0] leaves it out",
            stacklevel=5,
        )
    axes = dims or (3 if n == 5 or (n == 4 and not channel) else 2)
    if n == axes:
        return x.unsqueeze(0)
    if n == axes + 1:
        if dims is None and n == 3 and _looks_like_a_volume(x):
            warnings.warn(
                f"{op}: neighbouring images of {name} {tuple(x.shape)} share their objects, as "
                "slices do: dims=3 takes a volume (D, H, W), dims=2 images (N, H, W)",
                stacklevel=5,
            )
        return x
    if n == axes + 2 and channel:
        return x.squeeze(1)
    shapes = "(H, W), (N, H, W) or (N, 1, H, W)", "(D, H, W), (N, D, H, W) or (N, 1, D, H, W)"
    rule = shapes[axes - 2] if dims else "(H, W), (N, H, W), (N, 1, H, W) or (N, D, H, W)"
    raise ValueError(f"{op}: {name} must be {rule}, got {tuple(x.shape)}")


def _looks_like_a_volume(labels: Tensor) -> bool:
    """Whether most objects of two images in the middle lie at the same place in both.

    Images that are equal or tiny do not count, nor masks of one or two values.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or len(labels) < 3:
        return False
    middle = len(labels) // 2
    a, b = labels[middle - 1 : middle + 1, ::4].to(torch.int64)
    try:
        both = (a > 0) & (b > 0)
        same = both & (a == b)
        count = int(same.sum())
        if count < 50 or 2 * count <= int(both.sum()) or torch.equal(a, b):
            return False
        return len(a[same].unique()) > 2
    except RuntimeError:  # without values, as under vmap
        return False


def check_ids(op: str, labels: Tensor) -> None:
    """Raises ValueError if an id is out of range."""
    ids = labels.to(torch.int64)
    wrong = ids[(ids < 0) | (ids > MAX_ID)]
    if wrong.numel() > 0:
        raise ValueError(f"{op}: labels must be in [0, {MAX_ID}], got {int(wrong[0])}")


def check_spacing(op: str, labels: Tensor, spacing: Sequence[float] | None) -> None:
    """Raises ValueError unless each axis has one size, whose square float32 can hold."""
    if spacing is None:
        return
    axes = spatial_axes(labels)
    if isinstance(spacing, str) or not hasattr(spacing, "__len__"):
        raise TypeError(f"{op}: spacing must be a sequence of numbers, got {spacing!r}")
    for size in spacing:
        check_number(op, "spacing", size)
    if len(spacing) != axes or not all(1e-12 <= s <= 1e12 for s in spacing):
        raise ValueError(
            f"{op}: spacing must be {axes} values in [1e-12, 1e12], got {tuple(spacing)}"
        )


def check_ridge(op: str, name: str, ridge: str) -> None:
    """Raises ValueError if the mode is unknown."""
    if ridge not in RIDGES:
        raise ValueError(f"{op}: {name} must be two_sided, one_sided or none, got {ridge!r}")


def check_terms(
    op: str,
    labels: Tensor,
    w0: float,
    sigma: float,
    halo: tuple[float, float] | None,
    spacing: Sequence[float] | None,
) -> None:
    """Raises ValueError if a setting of the terms is out of range."""
    check_spacing(op, labels, spacing)
    for name, value in (("w0", w0), ("sigma", sigma)):
        check_number(op, name, value)
    if halo is not None and not hasattr(halo, "__len__"):
        raise TypeError(f"{op}: halo must be (v, s), got {halo!r}")
    if not 0 <= w0 <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: w0 must be >= 0 and finite in float32, got {w0}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"{op}: sigma must be > 0 and finite, got {sigma}")
    if halo is not None and not (
        len(halo) == 2 and 0 <= halo[0] <= 1 and 0 < halo[1] < float("inf")
    ):
        raise ValueError(f"{op}: halo must be (v, s) with 0 <= v <= 1 and s > 0, got {halo}")


def check_map(labels: Tensor, where: str, foreground: Tensor | None) -> None:
    """Raises ValueError if an argument of border_weight_map alone is wrong."""
    if where not in ("background", "everywhere"):
        raise ValueError(
            f"border_weight_map: where must be background or everywhere, got {where!r}"
        )
    if foreground is not None:
        check_tensors("border_weight_map", foreground=foreground)
        _check_like(
            "border_weight_map", "foreground", foreground, labels, foreground.dtype == torch.bool
        )


def class_map(
    labels: Tensor, classes: Tensor | Mapping[int, int] | None, ridge: str
) -> Tensor | None:
    """Returns the class of every pixel, in the shape of `labels`, or None.

    Args:
        labels: Instance maps.
        classes: A map; or the class of each id, as a mapping or as a vector that the ids index.
        ridge: The ridge, which is checked, too.

    Raises:
        TypeError: If an argument of border_weights alone is of a wrong type.
        ValueError: If one is wrong, or an id has no class.
    """
    check_ridge("border_weights", "ridge", ridge)
    if classes is None:
        return None
    if isinstance(classes, Mapping):
        return _from_mapping(labels, classes)
    check_tensors("border_weights", classes=classes)
    if classes.dtype not in INTEGERS:
        raise TypeError(f"border_weights: classes must be an integer tensor, got {classes.dtype}")
    if classes.dim() == 1:
        ids = labels.to(torch.int64)
        if not torch.compiler.is_compiling() and not ids.is_cuda and ids.numel():
            high = int(ids.max())
            if high >= len(classes):
                raise ValueError(
                    f"border_weights: classes must have a class for each id up to {high}, got "
                    f"{len(classes)} of them"
                )
        return classes.to(ids.device, torch.int64)[ids.clamp(min=0)]
    _check_like("border_weights", "classes", classes, labels, True)
    return classes


def _from_mapping(labels: Tensor, classes: Mapping[int, int]) -> Tensor:
    ids, places = torch.unique(labels.to(torch.int64), return_inverse=True)
    missing = [i for i in ids.tolist() if i > 0 and i not in classes]
    if missing:
        raise ValueError(f"border_weights: classes must have a class for id {missing[0]}, got none")
    table = [int(classes.get(i, 0)) for i in ids.tolist()]
    return torch.tensor(table, dtype=torch.int64, device=labels.device)[places]


def _check_like(op: str, name: str, x: Tensor, labels: Tensor, right_dtype: bool) -> None:
    if x.shape != labels.shape or not right_dtype:
        rule = f"be {'bool ' if name == 'foreground' else ''}of shape {tuple(labels.shape)}"
        raise ValueError(f"{op}: {name} must {rule}, got {x.dtype} {tuple(x.shape)}")
    if x.device != labels.device:
        raise ValueError(f"{op}: {name} must be on {labels.device}, got {x.device}")


def class_count(classes: Tensor | None, num_classes: int | None) -> int:
    """Returns the number of classes, background included: as given, or read from the class map.

    Raises ValueError if the number or a class is out of range.
    """
    if num_classes is not None and not 2 <= num_classes <= MAX_CLASSES:
        raise ValueError(
            f"border_weights: num_classes must be in [2, {MAX_CLASSES}], got {num_classes}"
        )
    if classes is None:
        if num_classes not in (None, 2):
            raise ValueError(
                f"border_weights: num_classes must be 2 without a map of classes, got {num_classes}"
            )
        return 2
    # Reading values from another device makes the host wait.
    if num_classes is not None and (classes.is_cuda or torch.compiler.is_compiling()):
        return num_classes
    values = classes.to(torch.int64) if classes.dtype in (torch.uint16, torch.uint32) else classes
    least, greatest = (0, 0) if values.numel() == 0 else values.aminmax()
    low, high = int(least), int(greatest)
    if high == IGNORED:
        high = int(values.masked_fill(values == IGNORED, 0).max())
    most = (num_classes or MAX_CLASSES) - 1
    if low < 0 or high > most:
        raise ValueError(
            f"border_weights: classes must be in [0, {most}] or 255 (ignored), "
            f"got {low if low < 0 else high}"
        )
    return num_classes or max(2, high + 1)


def class_table(
    op: str, class_weight: ClassWeight, num_classes: int, device: torch.device
) -> Tensor | None:
    """Returns the weight of each class, float32, or None for balanced weights."""
    if class_weight is None:
        return torch.ones(num_classes, device="cpu")
    if isinstance(class_weight, str):
        if class_weight == "balanced":
            return None
        raise ValueError(
            f"{op}: class_weight must be None, {num_classes} weights or 'balanced', "
            f"got {class_weight!r}"
        )
    place = None if isinstance(class_weight, Tensor) else torch.device("cpu")
    table = torch.as_tensor(class_weight, dtype=torch.float32, device=place).detach()
    if table.device.type != "cpu" and table.device != device:
        raise ValueError(f"{op}: class_weight must be on {device} or cpu, got {table.device}")
    # Reading values from another device would make the host wait.
    looks = table.device.type == "cpu" and not torch.compiler.is_compiling()
    if table.shape != (num_classes,) or (
        looks and not bool(((table >= 0) & table.isfinite()).all())
    ):
        values = table.tolist() if looks else tuple(table.shape)
        raise ValueError(
            f"{op}: class_weight must be {num_classes} weights >= 0 (background first), "
            f"got {values}"
        )
    return table
