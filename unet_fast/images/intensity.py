"""Normalises grey values by percentiles, which are exact for images of any size."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 1.0, 99.8
"""Percentiles of an image that are mapped to 0 and 1."""


@dataclass(frozen=True)
class Range:
    """Linear map that normalises each channel: (value - low) / width."""

    low: tuple[float, ...]
    width: tuple[float, ...]

    def apply(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalises an image or volume, or a part of it, (C, ...), to values in about [0, 1]."""
        shape = -1, *[1] * (image.ndim - 1)
        low, width = (np.array(x, np.float32).reshape(shape) for x in (self.low, self.width))
        result: NDArray[np.float32] = (image - low) / width
        return result


def range_of(parts: Callable[[], Iterable[NDArray[np.generic]]]) -> Range:
    """Finds the range of an image read in parts: its exact percentiles :data:`LOW` and `HIGH`.

    Integers of up to 16 bits are read once, other values twice.

    Where the percentiles are equal (a few bright pixels on black), the smallest and the largest
    value take their place; a channel of one value becomes 0.

    Args:
        parts: Starts a pass over the image: yields parts (C, ...), real, in any order, that make up
            the whole.

    Raises:
        ValueError: If a value is not finite in float32.
    """
    counts: list[NDArray[np.int64]] = []  # counts of each value, or of its upper half
    offset: int | None = None
    for part in parts():
        offset = _offset(part.dtype)
        channels = [_bins(channel) for channel in part]
        counts = counts or [np.zeros(2**16, np.int64) for _ in channels]
        for count, values in zip(counts, channels, strict=True):
            count += np.bincount(values, minlength=2**16)
    last = int(counts[0].sum()) - 1
    places = [last * percentile / 100 for percentile in (LOW, HIGH)]
    wanted = sorted({0, last, *(k for p in places for k in (int(p), min(int(p) + 1, last)))})
    if offset is None:
        found = _lower_halves(parts, counts, wanted)
    else:
        ends = [np.cumsum(count) for count in counts]
        found = [
            {k: float(np.searchsorted(end, k, side="right") - offset) for k in wanted}
            for end in ends
        ]
    ranges = []
    for known in found:
        low, high = (_between(known, place, last) for place in places)
        if low == high:
            low, high = known[0], known[last]
        ranges.append((low, high - low if high > low else 1.0))
    low_all, width_all = zip(*ranges, strict=True)
    return Range(low_all, width_all)


def _lower_halves(
    parts: Callable[[], Iterable[NDArray[np.generic]]],
    counts: list[NDArray[np.int64]],
    wanted: list[int],
) -> list[dict[int, float]]:
    """Returns order statistics of each channel, given the counts of the upper halves of its values.

    The 32 bits of floats, as :func:`_keys` maps them, sort like the floats: the upper 16 say which
    of 65,536 bins a value falls into, the lower 16 where in its bin. A second pass counts these.
    """
    ends = [np.cumsum(count) for count in counts]
    bins = [np.searchsorted(end, wanted, side="right").tolist() for end in ends]
    lower = [{b: np.zeros(2**16, np.int64) for b in of_channel} for of_channel in bins]
    for part in parts():
        for of_channel, channel in zip(lower, part, strict=True):
            keys = _keys(channel)
            for b, count in of_channel.items():
                count += np.bincount(keys[keys >> 16 == b] & 0xFFFF, minlength=2**16)
    found = []
    for end, of_channel, halves in zip(ends, bins, lower, strict=True):
        values = {}
        for k, b in zip(wanted, of_channel, strict=True):
            before = int(end[b] - halves[b].sum())
            low = int(np.searchsorted(np.cumsum(halves[b]), k - before, side="right"))
            values[k] = _value((b << 16) | low)
        found.append(values)
    return found


def normalise(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps the 1st percentile of each channel to 0 and the 99.8th to 1: see :func:`range_of`.

    Args:
        image: (C, H, W) or (C, D, H, W).

    Raises:
        ValueError: If a value is not finite.
    """
    return range_of(lambda: [image]).apply(image)


def as_float32(image: NDArray[np.generic]) -> NDArray[np.float32]:
    """Converts an image, or a part of it, to float32.

    Raises:
        ValueError: If a value is not finite in float32.
    """
    with np.errstate(over="ignore"):
        result = image.astype(np.float32)
    if image.dtype.kind not in "bui" and not np.isfinite(result).all():
        value = image[~np.isfinite(result)].flat[0]
        raise ValueError(
            f"image must be finite in float32, got {value} (numpy.nan_to_num replaces it)"
        )
    return result


def _offset(dtype: np.dtype[Any]) -> int | None:
    """Returns what makes integers of up to 16 bits start at 0; None for other types."""
    if dtype.kind not in "ui" or dtype.itemsize > 2:
        return None
    return 2 ** (8 * dtype.itemsize - 1) if dtype.kind == "i" else 0


def _bins(values: NDArray[np.generic]) -> NDArray[np.integer]:
    """Maps values to numbers below 2^16 that sort like them."""
    offset = _offset(values.dtype)
    return _keys(values) >> 16 if offset is None else np.ravel(values).astype(np.int64) + offset


def _keys(values: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Maps values to integers that sort like the values in float32."""
    bits = (as_float32(np.ravel(values)) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _value(key: int) -> float:
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _between(values: dict[int, float], place: float, last: int) -> float:
    """Interpolates linearly between neighbouring order statistics."""
    k = int(place)
    below, above = values[k], values[min(k + 1, last)]
    return below + (above - below) * (place - k)
