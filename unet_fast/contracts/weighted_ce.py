"""Constants and argument checks of the weighted cross-entropy."""

import torch
from torch import Tensor

from .types import check_tensors, unbatched

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "weighted_mean": 3}
NONE, WEIGHTED_MEAN = REDUCTIONS["none"], REDUCTIONS["weighted_mean"]
_LOGITS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TARGETS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def check_reduction(reduction: object) -> None:
    """Raises ValueError if the reduction is unknown."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"weighted_ce: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )


def without_channel(logits: Tensor, x: Tensor) -> Tensor:
    """Takes the axis of one channel from a map that may have one."""
    return x.squeeze(1) if x.dim() == logits.dim() and x.shape[1] == 1 else x


def check_inputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """Returns target and weight without an axis of channels.

    Raises:
        TypeError: If an argument of :func:`unet_fast.weighted_ce` is of a wrong type.
        ValueError: If one is wrong.
    """
    check_tensors("weighted_ce", logits=logits, target=target)
    if weight is not None:
        check_tensors("weighted_ce", weight=weight)
    if not isinstance(ignore_index, int):
        raise TypeError(f"weighted_ce: ignore_index must be an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"weighted_ce: ignore_index must be in [-2^63, 2^63 - 1], got {ignore_index}"
        )
    if logits.dtype not in _LOGITS:
        raise TypeError(f"weighted_ce: logits must be floating point, got {logits.dtype}")
    if target.dtype not in _TARGETS:
        raise TypeError(
            "weighted_ce: target must be uint8, int16, int32 or int64 (target.long() converts), "
            f"got {target.dtype}"
        )
    if weight is not None and not weight.dtype.is_floating_point:
        raise TypeError(f"weighted_ce: weight must be floating point, got {weight.dtype}")
    check_reduction(reduction)
    if logits.dim() < 2 or logits.shape[1] == 0:
        raise ValueError(
            "weighted_ce: logits must be (N, C, *spatial) with C >= 1, got "
            f"{tuple(logits.shape)}{unbatched('logits', logits.shape, 1)}"
        )
    expected = logits.shape[:1] + logits.shape[2:]
    maps = [None if x is None else without_channel(logits, x) for x in (target, weight)]
    for name, given, tensor in zip(("target", "weight"), (target, weight), maps, strict=True):
        if given is None or tensor is None:
            continue
        if tensor.shape != expected:
            # Of one image, (C, *spatial), C was taken for N.
            alone = given.shape == logits.shape[1:]
            hint = f" (logits[None] and {name}[None] add the axis of the batch)" if alone else ""
            raise ValueError(
                f"weighted_ce: {name} must have shape {tuple(expected)}, got {tuple(given.shape)}"
                f"{hint}"
            )
        if tensor.device != logits.device:
            raise ValueError(f"weighted_ce: {name} must be on {logits.device}, got {tensor.device}")
    return maps[0], maps[1]  # type: ignore[return-value]
