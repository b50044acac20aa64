"""Ends the program `unet-fast` in one line if Ctrl-C comes before its `main` could run."""

import os
import sys
from pathlib import Path
from types import TracebackType


def _interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("unet-fast: interrupted\n")
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


def _is_program() -> bool:
    """Whether the package is loaded for `unet-fast`, or for a module of it that Python runs."""
    if sys.argv[:1] == ["-m"]:  # Python still looks for the module
        return not {"unet_fast", "unet_fast.cli"}.isdisjoint(sys.orig_argv)
    return bool(sys.argv) and Path(sys.argv[0]).name == "unet-fast"


if _is_program():
    sys.excepthook = _interrupted
