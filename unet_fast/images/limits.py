"""How many pixels a file may unpack to: a tiny one can ask for all memory there is."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

MOST_PIXELS = "UNET_FAST_MAX_PIXELS"
"""Environment variable, so that workers have it, too: most pixels that a file may unpack to."""
_USUAL, _PER_BYTE = 2**26, 64
"""Most of them without it: 2^26, or 64 a byte of the file. Real images stay far below."""


def check_pixels(shape: tuple[int, ...], dtype: np.dtype[Any], size: Callable[[], int]) -> None:
    """Raises ValueError before a small file unpacks to more than memory may hold.

    Args:
        shape: Shape of the pixels, with channels and planes.
        dtype: Their dtype.
        size: Returns the bytes of the file; called only if there are many pixels.
    """
    count, said = math.prod(shape), os.environ.get(MOST_PIXELS)
    if said is not None and not (said.isascii() and said.isdigit()):
        raise ValueError(f"{MOST_PIXELS} must be a number of pixels, got {said!r}")
    most = _USUAL if said is None else int(said)
    if count <= most:
        return
    there = size()
    most = max(most, _PER_BYTE * there) if said is None else most
    if count > most:
        raise ValueError(
            f"its {there} bytes unpack to {count} pixels, {count * dtype.itemsize / 1e9:.3g} GB, "
            f"and may to {most}: allow more by --max-pixels or {MOST_PIXELS}"
        )
