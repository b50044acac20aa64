"""Progress of a command: a bar on a terminal, else a line from time to time."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm import tqdm

EVERY = 10.0
"""Seconds between two lines, at least; a line comes only when a unit is done."""


def counted(number: int, name: str) -> str:
    """Formats a number of things, as in 1 image or 2,000 images."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Formats names, as in a, b, c, d, e and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Bar(AbstractContextManager[Any], Protocol):
    """The part of tqdm's interface that :func:`bar` provides."""

    total: Any
    n: Any
    initial: Any

    def update(self, n: int = 1) -> Any:
        """Advances by `n` units."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Sets the text behind the counts."""

    def reset(self, total: float | None = None) -> None:
        """Starts again, with another total."""

    def refresh(self) -> Any:
        """Shows the current state at once."""


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
    """Shows on standard error how far a task is, and how long it will take.

    Args:
        total: Number of units; None: not known yet.
        name: Name of the task.
        unit: What is counted, in the singular.
        initial: Units done before.
        leave: Whether a finished bar stays.
        hidden: Whether to show nothing.
        clock: Returns the time in seconds.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, initial=initial, leave=leave, disable=hidden)
    return _Lines(total, name, unit, initial, clock)


def say(text: str) -> None:
    """Prints a line to standard error, before a bar is shown."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class _Lines(AbstractContextManager["_Lines"]):
    """Prints a line every :data:`EVERY` seconds, for logs."""

    def __init__(
        self, total: int | None, name: str, unit: str, initial: int, clock: Callable[[], float]
    ) -> None:
        self.name, self.unit, self.clock = name, unit, clock
        self.initial, self.more = initial, ""
        self.told = clock()
        self.reset(total)

    def __exit__(self, *_: object) -> None:
        """Does nothing: all lines are written already."""

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
