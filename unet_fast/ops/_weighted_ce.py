"""Fused per-pixel weighted softmax cross-entropy."""

from typing import Any

import torch
from torch import Tensor

from .._library import bad_value, require_kernels
from ..contracts.types import takes_arrays
from ..contracts.weighted_ce import (
    NONE,
    REDUCTIONS,
    WEIGHTED_MEAN,
    check_inputs,
    check_reduction,
)
from ._call import (
    call,
    call_in_backward,
    function_of,
    or_reference,
    refuse_forward_mode,
    register_vmap,
)

_LOSS = torch.ops.unet_fast.weighted_ce.default
_GRADIENT = torch.ops.unet_fast.weighted_ce_backward.default


@takes_arrays("logits", "target", "weight")
@or_reference
def weighted_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "weighted_mean",
) -> Tensor:
    r"""Softmax cross-entropy with a weight per pixel.

    .. math:: ce(x) = \log \sum_k \exp a_k(x) - a_{t(x)}(x)

    Args:
        logits: Scores a, (N, C, \*spatial) with 0 to 3 spatial axes, C >= 1; float16, bfloat16,
            float32 or float64. Contiguous and channels-last tensors are read in place. -inf marks
            an impossible class; NaN and +inf make the loss and the gradient of their pixel NaN.
        target: Classes t, (N, \*spatial) or (N, 1, \*spatial), in [0, C - 1] or `ignore_index`;
            uint8, int16, int32 or int64.
        weight: Weights w, of the shape of `target` (an axis of one channel may be there or not),
            floating point, or None for 1 everywhere. A pixel of weight 0 does not count, whatever
            its logits.
        ignore_index: Target value of pixels that are left out.
        reduction: ``"weighted_mean"``, sum(w ce) / sum(w); ``"mean"``, sum(w ce) / number of pixels
            not ignored; ``"sum"``, the paper's formula; ``"none"``, w ce of each pixel.

    Returns:
        A scalar, or the shape of `target` for ``"none"``; float32, or float64 for float64 logits,
        finite wherever the exact loss fits. Sums are taken in a fixed order, so results repeat bit
        for bit. 0 with gradient 0 where the divisor is 0. Twice differentiable in `logits` and in
        `weight`, also by `torch.func`, but not in forward mode. NumPy arrays in the place of
        tensors give NumPy.

    Raises:
        TypeError: If a dtype is none of the above.
        ValueError: If shapes or devices do not match, `reduction` is unknown, or (on the CPU) a
            target is out of range; under `torch.compile` the last is a RuntimeError, on CUDA a
            device-side assertion, as in torch's own cross-entropy.
        RuntimeError: If the build has no kernels for the device.
        NotImplementedError: In forward-mode differentiation.

    Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, equation 1 (whose printed
    form lacks the minus sign).
    """
    shape = getattr(target, "shape", ())
    target, weight = check_inputs(logits, target, weight, ignore_index, reduction)
    require_kernels("weighted_ce", logits)
    if weight is not None:
        weight = weight.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    inputs = logits, target, weight, REDUCTIONS[reduction], ignore_index
    if torch.compiler.is_compiling():
        loss: Tensor = _LOSS(*inputs)[0]
    else:
        try:
            if logits.requires_grad or (weight is not None and weight.requires_grad):
                loss = _Loss.apply(*inputs)[0]
            else:
                refuse_forward_mode("weighted_ce", logits, weight)
                loss = call(_LOSS, *inputs, differentiated=False)[0]
        except RuntimeError as error:
            raise bad_value("weighted_ce", error, "target") or error from None
    return loss.reshape(shape) if reduction == "none" else loss


class WeightedCELoss(torch.nn.Module):
    """:func:`weighted_ce` as a module: `loss = WeightedCELoss()(logits, target, weight)`."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "weighted_mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """See :func:`weighted_ce`."""
        return weighted_ce(
            logits, target, weight, ignore_index=self.ignore_index, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Returns the settings."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


@torch.library.register_fake("unet_fast::weighted_ce")
def _(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = target.shape if reduction == NONE else ()
    return logits.new_empty(shape, dtype=dtype), logits.new_empty((), dtype=torch.float64)


@torch.library.register_fake("unet_fast::weighted_ce_backward")
def _(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normaliser: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    return torch.empty_like(logits)


# Derivatives. The normaliser T is an output like the loss, so that its own dependence on the weight
# (T = sum(w)) is differentiated by the ordinary rules, in every order.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, ctx.reduction, ctx.ignore_index = inputs
    loss, normaliser = output
    kept = loss if ctx.reduction == WEIGHTED_MEAN else None  # for "none" it is a whole map
    ctx.save_for_backward(logits, target, weight, kept, normaliser)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, grad_normaliser: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, target, weight, loss, normaliser = ctx.saved_tensors
    grad_logits = grad_weight = None
    if ctx.needs_input_grad[0] and grad is not None:
        inputs = grad, logits, target, weight, normaliser, ctx.reduction, ctx.ignore_index
        grad_logits = call_in_backward(_Gradient, _GRADIENT, *inputs)
    if ctx.needs_input_grad[2]:
        grad_weight = torch.zeros_like(weight)
        slope = torch.zeros_like(normaliser)  # d loss / d T
        if grad is not None:
            ce, _ = call(_LOSS, logits, target, None, NONE, ctx.ignore_index)
            upstream = _upstream(grad, normaliser, ctx.reduction)
            ce = ce.to(upstream.dtype)
            # ce and loss may be infinite.
            grad_weight = torch.where(upstream == 0, 0, upstream * ce)
            if ctx.reduction == WEIGHTED_MEAN:
                slope = torch.where(upstream == 0, 0, -upstream * loss)
        if ctx.reduction == WEIGHTED_MEAN:  # d T / d w = 1
            slope = slope if grad_normaliser is None else slope + grad_normaliser
            counted = target.long() != ctx.ignore_index
            grad_weight = grad_weight + slope * counted
        grad_weight = grad_weight.to(weight.dtype)
    return grad_logits, None, grad_weight, None, None


def _upstream(grad: Tensor, normaliser: Tensor, reduction: int) -> Tensor:
    """Returns the derivative of the loss with respect to a pixel's w ce; 0 if the normaliser is 0.

    After a division it is float64, because one over a tiny normaliser exceeds float32.
    """
    return grad if reduction == NONE else _normalised(grad, normaliser)


def _normalised(x: Tensor, normaliser: Tensor) -> Tensor:
    """Divides by the normaliser; where that is 0, the result and its derivatives are 0."""
    empty = normaliser == 0
    return torch.where(empty, 0, x / torch.where(empty, 1, normaliser))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, logits, target, weight, normaliser, ctx.reduction, ctx.ignore_index = inputs
    ctx.save_for_backward(grad, logits, target, weight, normaliser)


def _double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """Derivatives of y_c = u w (p_c - [c = t]), in plain torch: second order is rare."""
    grad, logits, target, weight, normaliser = ctx.saved_tensors
    target = target.long()
    counted = target != ctx.ignore_index
    w = counted.to(grad.dtype) if weight is None else torch.where(counted, weight, 0)
    if weight is not None:  # a pixel of weight 0 does not count, whatever its logits
        logits = torch.where((w == 0).unsqueeze(1), 0, logits)
    p = torch.softmax(logits.to(grad.dtype), dim=1)
    v = v.to(grad.dtype)
    index = torch.where(counted, target, 0).unsqueeze(1)
    u = _upstream(grad, normaliser, ctx.reduction)
    mean_v = (v * p).sum(1)
    slope = (mean_v - v.gather(1, index).squeeze(1)).to(u.dtype)  # sum_c v_c (p_c - [c = t])
    per_pixel = w * slope
    scale = (u * w.to(u.dtype)).to(p.dtype).unsqueeze(1)
    grad_logits = (scale * p * (v - mean_v.unsqueeze(1))).to(logits.dtype)
    grad_weight = None if weight is None else torch.where(counted, u * slope, 0).to(weight.dtype)
    if ctx.reduction == NONE:
        return per_pixel, grad_logits, None, grad_weight, None, None, None
    total = _normalised(per_pixel.sum(), normaliser)
    grad_normaliser = -_normalised(grad * total, normaliser)
    return total.to(grad.dtype), grad_logits, None, grad_weight, grad_normaliser, None, None


register_vmap("weighted_ce", "weighted_ce_backward")
torch.library.register_autograd("unet_fast::weighted_ce", _backward, setup_context=_setup)
torch.library.register_autograd(
    "unet_fast::weighted_ce_backward", _double_backward, setup_context=_setup_backward
)

_Loss = function_of(_LOSS, _setup, _backward)
_Gradient = function_of(_GRADIENT, _setup_backward, _double_backward)
