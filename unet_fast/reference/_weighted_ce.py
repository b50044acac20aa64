"""Reference of :func:`unet_fast.weighted_ce`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "weighted_mean",
) -> Tensor:
    """See :func:`unet_fast.weighted_ce`."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    target = target.long()  # a comparison in uint8 would wrap ignore_index
    ce = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
    valid = target != ignore_index
    w = torch.ones_like(ce) if weight is None else weight.to(ce.dtype)
    w = torch.where(valid, w, 0).double()  # products of float32 neither overflow nor vanish
    loss = w * torch.where((w == 0) & ~ce.isfinite(), 0, ce)  # weight 0 counts nothing
    if reduction == "none":
        return loss.to(ce.dtype)
    total = loss.sum()
    if reduction != "sum":
        divisor = valid.sum() if reduction == "mean" else w.sum()
        total = torch.where(divisor == 0, 0 * total, total / divisor)
    return total.to(ce.dtype)
