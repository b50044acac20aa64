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


if sys.argv and Path(sys.argv[0]).name == "unet-fast":
    sys.excepthook = _interrupted
