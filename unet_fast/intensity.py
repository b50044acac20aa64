"""Grey values: brought to a common range, from percentiles that are exact whatever the size."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 1.0, 99.8
"""Percentiles of an image that are mapped to 0 and 1."""


@dataclass(frozen=True)
class Range:
    """What is mapped to 0 and 1 in each channel, linearly beyond: (value - low) / width."""

    low: tuple[float, ...]
    width: tuple[float, ...]

    def apply(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """The image, or a part of it, (C, H, W), with values in about [0, 1]."""
        low, width = (np.array(x, np.float32)[:, None, None] for x in (self.low, self.width))
        result: NDArray[np.float32] = (image - low) / width
        return result


def range_of(parts: Callable[[], Iterable[NDArray[np.generic]]]) -> Range:
    """The range of an image that is read in parts, twice: the percentiles :data:`LOW` and `HIGH`.

    Where the percentiles are equal (a few bright pixels on black), smallest and largest value take
    their place; a channel of one value becomes 0.

    Args:
        parts: Starts a reading: parts (C, h, w), real, in any order, that together are the
            image.

    Raises:
        ValueError: If a value is not finite in float32.
    """
    # Order statistics by counting. The 32 bits of a float, the sign's turned, sort like the floats:
    # the upper 16 say which of 65,536 bins a value falls into, the lower 16 where in its bin.
    upper: list[NDArray[np.int64]] = []
    for part in parts():
        keys = [_keys(channel) for channel in part]
        upper = upper or [np.zeros(2**16, np.int64) for _ in keys]
        for count, key in zip(upper, keys, strict=True):
            count += np.bincount(key >> 16, minlength=2**16)
    total = int(upper[0].sum())
    last = total - 1
    places = [last * percentile / 100 for percentile in (LOW, HIGH)]
    wanted = sorted({0, last, *(k for p in places for k in (int(p), min(int(p) + 1, last)))})
    ends = [np.cumsum(count) for count in upper]
    bins = [np.searchsorted(end, wanted, side="right") for end in ends]
    lower = [{int(b): np.zeros(2**16, np.int64) for b in of_channel} for of_channel in bins]
    for part in parts():
        for counts, channel in zip(lower, part, strict=True):
            keys_of_channel = _keys(channel)
            for b, count in counts.items():
                inside = keys_of_channel[keys_of_channel >> 16 == b] & 0xFFFF
                count += np.bincount(inside, minlength=2**16)
    ranges = []
    for end, of_channel, counts in zip(ends, bins, lower, strict=True):
        values = {}
        for k, b in zip(wanted, of_channel, strict=True):
            before = int(end[b] - counts[int(b)].sum())
            low_bits = int(np.searchsorted(np.cumsum(counts[int(b)]), k - before, side="right"))
            values[k] = _value((int(b) << 16) | low_bits)
        low, high = (_between(values, place, last) for place in places)
        if low == high:
            low, high = values[0], values[last]
        ranges.append((low, high - low if high > low else 1.0))
    low_all, width_all = zip(*ranges, strict=True)
    return Range(low_all, width_all)


def normalise(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps the 1st percentile of each channel to 0 and the 99.8th to 1: see :func:`range_of`.

    Args:
        image: (C, H, W).

    Raises:
        ValueError: If a value is not finite.
    """
    return range_of(lambda: [image]).apply(image)


def as_float32(image: NDArray[np.generic]) -> NDArray[np.float32]:
    """An image, or a part of it, in float32.

    Raises:
        ValueError: If a value is not finite there.
    """
    with np.errstate(over="ignore"):
        result = image.astype(np.float32)
    if image.dtype.kind not in "bui" and not np.isfinite(result).all():
        value = image[~np.isfinite(result)].flat[0]
        raise ValueError(f"image must be finite in float32, got {value}")
    return result


def _keys(values: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Integers that sort like the values as float32."""
    bits = (as_float32(np.ravel(values)) + np.float32(0)).view(np.uint32)  # no -0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _value(key: int) -> float:
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _between(values: dict[int, float], place: float, last: int) -> float:
    """Linear interpolation between neighbouring order statistics."""
    k = int(place)
    below, above = values[k], values[min(k + 1, last)]
    return below + (above - below) * (place - k)
