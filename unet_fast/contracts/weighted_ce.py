"""Constants and argument checks of the weighted cross-entropy."""

import torch
from torch import Tensor

from .types import check_tensors

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


def check_inputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> None:
    """Raises TypeError or ValueError if an argument of :func:`unet_fast.weighted_ce` is wrong."""
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
            f"weighted_ce: target must be uint8, int16, int32 or int64, got {target.dtype}"
        )
    if weight is not None and not weight.dtype.is_floating_point:
        raise TypeError(f"weighted_ce: weight must be floating point, got {weight.dtype}")
    check_reduction(reduction)
    if logits.dim() < 2 or logits.shape[1] == 0:
        raise ValueError(
            f"weighted_ce: logits must be (N, C, *spatial) with C >= 1, got {tuple(logits.shape)}"
        )
    expected = logits.shape[:1] + logits.shape[2:]
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(
                f"weighted_ce: {name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != logits.device:
            raise ValueError(f"weighted_ce: {name} must be on {logits.device}, got {tensor.device}")
