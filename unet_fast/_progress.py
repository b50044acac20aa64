"""How far a command is: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm import tqdm

EVERY = 10.0
"""Seconds from one line to the next; what takes longer is told once it is done."""


class Bar(AbstractContextManager[Any], Protocol):
    """What :func:`bar` gives: tqdm's interface, as much of it as is used."""

    total: Any
    n: Any
    initial: Any

    def update(self, n: int = 1) -> Any:
        """Moves on."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Says more."""

    def reset(self, total: float | None = None) -> None:
        """Starts again."""

    def refresh(self) -> Any:
        """Shows it now."""


def bar(
    total: int | None,
    name: str,
    unit: str,
    *,
    initial: int = 0,
    leave: bool = True,
    hidden: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Bar:
    """Tells on standard error how far something is, and how long it will take.

    Args:
        total: How many there are; None: not known yet.
        name: What is done.
        unit: Of what, in the singular.
        initial: How many were done before.
        leave: Whether a bar stays when it is done.
        hidden: Tell nothing.
        clock: Tells the time in seconds.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, initial=initial, leave=leave, disable=hidden)
    return _Lines(total, name, unit, initial, clock)


class _Lines(AbstractContextManager["_Lines"]):
    """A line every :data:`EVERY` seconds, for logs."""

    def __init__(
        self, total: int | None, name: str, unit: str, initial: int, clock: Callable[[], float]
    ) -> None:
        self.name, self.unit, self.clock = name, unit, clock
        self.initial, self.more = initial, ""
        self.told = clock()
        self.reset(total)

    def __exit__(self, *_: object) -> None:
        """Nothing is left to be done."""

    def reset(self, total: float | None = None) -> None:
        self.total, self.n = total, self.initial
        self.start = self.clock()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self.more = s

    def update(self, n: int = 1) -> None:
        self.n += n
        if self.clock() - self.told >= EVERY:
            self.refresh()

    def refresh(self) -> None:
        self.told = self.clock()
        done = self.n - self.initial
        parts = [f"{self.name}: {self.unit} {self.n}"]
        if self.more:
            parts.append(self.more)
        if self.total is not None:
            parts[0] += f" of {self.total}"
            if done:
                left = (self.total - self.n) * (self.told - self.start) / done
                parts.append(f"{tqdm.format_interval(left)} left")
        sys.stderr.write(", ".join(parts) + "\n")
        sys.stderr.flush()
