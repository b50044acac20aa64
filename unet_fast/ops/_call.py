"""How operators with derivatives are called."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Registered derivatives are called through layers of Python, also where nothing is differentiated:
# 10 of the 15 microseconds of a small call. Eager calls go past them.
below_autograd: Callable[[], Any] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError in forward mode, whose derivative would come out as 0."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # not inside dual_level()
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode differentiation is not available; use reverse mode"
            )
