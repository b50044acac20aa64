"""Whether arguments are of the types that are asked for."""

import functools
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_P = ParamSpec("_P")
_R_co = TypeVar("_R_co", covariant=True)

_NAMES = {float: "a number", int: "an integer", bool: "true or false", str: "a string"}


def check_tensors(op: str, **tensors: object) -> None:
    """Raises TypeError if an argument of an operator is not a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            kind = type(x).__name__
            raise TypeError(f"{op}: {name} must be a tensor or a NumPy array, got {kind}")


def unbatched(name: str, shape: Sequence[int], axes: int) -> str:
    """Returns how to add the axis of the batch, for messages, if just that one is missing.

    Args:
        name: Name of the argument.
        shape: Its shape.
        axes: Number of axes without a batch.
    """
    return f" ({name}[None] adds the axis of the batch)" if len(shape) == axes else ""


class TakesArrays(Protocol[_P, _R_co]):
    """A function of tensors that takes NumPy arrays in their place, too."""

    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...
    @overload
    def __call__(self, array: NDArray[Any], /, *args: Any, **kwargs: Any) -> Any: ...


def takes_arrays(*names: str) -> Callable[[Callable[_P, _R_co]], TakesArrays[_P, _R_co]]:
    """Lets a function of tensors take NumPy arrays for the parameters of these names.

    Arrays are converted to tensors that share their memory as far as they can. The result comes
    back as NumPy if the first of the names that is given is an array.
    """

    def decorate(function: Callable[_P, _R_co]) -> TakesArrays[_P, _R_co]:
        op = function.__qualname__.removesuffix(".__call__")
        places = {n: i for i, n in enumerate(inspect.signature(function).parameters) if n in names}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(x, np.ndarray) for x in (*args, *kwargs.values())):
                return function(*args, **kwargs)
            given = list(args)
            first: Any = None
            for name in names:
                x = given[places[name]] if places[name] < len(given) else kwargs.get(name)
                first = x if first is None else first
                if not isinstance(x, np.ndarray):
                    continue
                if places[name] < len(given):
                    given[places[name]] = _tensor(op, name, x)
                else:
                    kwargs[name] = _tensor(op, name, x)
            result = function(*given, **kwargs)
            return _array(result) if isinstance(first, np.ndarray) else result

        return call

    return decorate


def _tensor(op: str, name: str, x: NDArray[Any]) -> Tensor:
    x = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
    if not x.flags.writeable or min(x.strides, default=0) < 0:  # torch has neither
        x = x.copy()
    try:
        return torch.from_numpy(x)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an array of numbers, got {x.dtype}") from None


def _array(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_array, result))
    return result.detach().cpu().numpy()[()] if isinstance(result, Tensor) else result


def check_number(op: str, name: str, value: object) -> None:
    """Raises TypeError if an argument of an operator is not a number."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")


def check_fields(owner: str, instance: Any) -> None:
    """Raises ValueError if a field of a dataclass is not of the type it is annotated with."""
    if torch.compiler.is_compiling():  # types as such cannot be traced
        return
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        value = getattr(instance, name)
        if not _fits(value, hint):
            raise ValueError(f"{owner}: {name} must be {_text(hint)}, got {value!r}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    names = kind.__dataclass_fields__
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, x) for x in inner)
    if origin is Literal:
        return isinstance(value, type(inner[0]))  # which one, is a rule of its own
    if origin is tuple and inner[1:] == (...,):
        origin = Sequence
    if origin is tuple:
        return (
            isinstance(value, tuple | list)
            and len(value) >= len(inner)  # too many: a rule of its own
            and all(_fits(x, y) for x, y in zip(value, inner, strict=False))
        )
    if origin is Sequence:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(_fits(x, inner[0]) for x in value)  # type: ignore[attr-defined]
    kinds = {float: Real, int: Integral}
    if hint in kinds:
        return isinstance(value, kinds[hint]) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _text(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_text(x) for x in inner if x is not NoneType))
    if origin is Literal:
        return _text(type(inner[0]))
    if origin is tuple and inner[1:] != (...,):
        return f"{len(inner)} values"
    if origin in (tuple, Sequence):
        return "a sequence"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
