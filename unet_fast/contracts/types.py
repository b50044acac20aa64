"""Whether arguments are of the types that are asked for."""

import functools
from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_NAMES = {float: "a number", int: "an integer", bool: "true or false", str: "a string"}


def check_tensors(op: str, **tensors: object) -> None:
    """Raises TypeError if an argument of an operator is not a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


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
