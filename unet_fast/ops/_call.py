"""Calls of operators that have derivatives."""

import contextlib
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._library import NoKernelsError, reference_wanted

_P = ParamSpec("_P")
_R = TypeVar("_R")

_below_autograd: Callable[[], Any] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)


def or_reference(operator: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets an operator run its reference where it has no kernels, if that was asked for."""

    @functools.wraps(operator)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return operator(*args, **kwargs)
        except NoKernelsError:
            if not reference_wanted():
                raise
        plain = getattr(import_module("unet_fast.reference"), operator.__name__)
        result: _R = plain(*args, **kwargs)
        return result

    return run


def call(op: Any, *inputs: Any, differentiated: bool = True) -> Any:
    """Calls an operator, bypassing its registered derivative if nothing is differentiated.

    Registered derivatives are called through layers of Python. Without the bypass and `_Loss`,
    calls on 16 x 16 pixels take 1.4 times (weighted_ce, forward and backward, 0.2 ms) to 1.5 times
    as long (both operators, forward only, 0.04 to 0.08 ms); a training step does not notice. The
    guard used here belongs to torch but is not public: where it is missing, calls are slower but
    correct.

    Args:
        op: The operator.
        *inputs: Its arguments.
        differentiated: Whether an argument requires a gradient.
    """
    if differentiated and torch.is_grad_enabled():
        return op(*inputs)
    with _below_autograd():
        return op(*inputs)


def function_of(op: Any, setup: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """Returns an autograd function of an operator and its registered derivative.

    It has less Python around it than the operator, see :func:`call`, and `torch.func` takes it.
    """

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return call(op, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            setup(ctx, inputs, output)

    Function.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Function


def call_in_backward(function: Any, op: Any, *inputs: Any) -> Any:
    """Calls the operator of a derivative; as `function` if it may be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return function.apply(*inputs)
    return call(op, *inputs)


def register_vmap(*names: str) -> None:
    """Registers batching rules: each operator is called once for each element of the batch."""
    for name in names:
        op = getattr(torch.ops.unet_fast, name).default

        def rule(info: Any, in_dims: Any, *inputs: Any, op: Any = op) -> tuple[Any, Any]:
            results = [
                op(*(x.select(d, i) if isinstance(d, int) else x for x, d in pairs))
                for i in range(info.batch_size)
                for pairs in [zip(inputs, in_dims, strict=True)]
            ]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)

        torch.library.register_vmap(f"unet_fast::{name}", rule)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError in forward-mode differentiation, which would silently give 0."""
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode differentiation is not available; use reverse mode"
            )
