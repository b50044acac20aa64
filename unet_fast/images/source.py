"""Images read region by region, even if larger than memory: pictures, TIFF, OME-Zarr."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import reason_of
from .folders import SUFFIXES, list_images, unique
from .formats import Opened, open_file, plausible
from .zarr import is_zarr, open_zarr

Pixels = Callable[[slice, slice], NDArray[np.generic]]
"""Reads rows and columns of an image, (C, rows, columns), real values of any dtype."""


@dataclass(frozen=True)
class Source:
    """An image file or folder: a plane of pixels, or a stack of planes."""

    path: Path
    array: Any
    """ndarray, memory map or zarr array, used by its shape, dtype and slices only."""
    axes: str
    """A letter for each axis of the array: Y and X, C or S for channels; others are stacks."""
    channels: int
    """Number of channels to read: grey saved as colour is read as one, and the reverse."""
    alpha: int
    """Number of channels at the end that are not colours."""
    pixel_size: dict[str, float]
    """Micrometres along X, Y and Z, as far as the file says."""

    @property
    def size(self) -> tuple[int, int]:
        """Size of a plane, (H, W)."""
        return self.array.shape[self.axes.index("Y")], self.array.shape[self.axes.index("X")]

    @property
    def stack(self) -> dict[str, int]:
        """Axes of the stack, with their lengths; empty for a single plane."""
        pairs = zip(self.axes, self.array.shape, strict=True)
        return {axis: n for axis, n in pairs if axis not in "CSYX" and n > 1}

    @property
    def found(self) -> int:
        """Number of channels in the file, without alpha."""
        if self._channel_axis is None:
            return 1
        n: int = self.array.shape[self.axes.index(self._channel_axis)]
        return n - self.alpha if n > self.alpha else n

    @property
    def _channel_axis(self) -> str | None:
        pairs = zip(self.axes, self.array.shape, strict=True)
        return next((axis for axis, n in pairs if axis in "CS" and n > 1), None)

    @property
    def planes(self) -> list[tuple[int, ...]]:
        """The indices of all planes."""
        return list(np.ndindex(*self.stack.values()))

    def layout(self, channels: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Returns axes, out of TCZYX, and shape of a result with these channels, (K,) or ().

        Raises:
            ValueError: If there is no place for the axes of the stack.
        """
        lengths = dict(zip(self._result_stack, self.stack.values(), strict=True))
        lengths |= dict(zip("YX", self.size, strict=True)) | dict(zip("C", channels, strict=False))
        axes = "".join(axis for axis in "TCZYX" if axis in lengths)
        return axes, tuple(lengths[axis] for axis in axes)

    def place(self, result: Any, plane: tuple[int, ...], rows: slice, columns: slice) -> Any:
        """Returns the index of a part of a plane in a result of that :meth:`layout`."""
        place: dict[str, Any] = dict(zip(self._result_stack, plane, strict=True))
        if result.ndim > len(place) + 2:
            place["C"] = slice(None)
        return (*(place[axis] for axis in "TCZ" if axis in place), rows, columns)

    @property
    def _result_stack(self) -> str:
        stack = "".join(self.stack)
        if len(stack) > 1 and set(stack) != {"T", "Z"}:
            raise ValueError(f"{self.path}: stacks must have axes T and Z, got {stack}")
        return stack if len(stack) != 1 or stack == "T" else "Z"  # e.g. a row of pages

    def pixels(self, plane: tuple[int, ...] = ()) -> Pixels:
        """Returns a reader of regions of a plane: rows and columns to (C, rows, columns)."""
        place = dict(zip(self.stack, plane, strict=True))
        channel = self._channel_axis
        given: dict[str, Any] = {axis: place.get(axis, 0) for axis in self.axes}
        if channel is not None:
            given[channel] = slice(None)

        def read(rows: slice, columns: slice) -> NDArray[np.generic]:
            index = tuple((given | {"Y": rows, "X": columns}).values())
            try:
                part = _read(self.array, index)
            except Exception as error:  # decoders of broken files raise whatever they stumble over
                raise ValueError(f"{self.path}: cannot be read: {reason_of(error)}") from None
            left = [axis for axis in self.axes if axis in ("Y", "X", channel)]
            order = [left.index(axis) for axis in "YX"]
            if channel is None:
                return self._fitted(part.transpose(order)[None])
            part = part.transpose([left.index(channel), *order])
            return self._fitted(part[: self.found])

        return read

    def parts(self, plane: tuple[int, ...], side: int = 2048) -> Iterator[NDArray[np.generic]]:
        """Yields a plane once, in regions of at most `side` pixels along each axis."""
        read = self.pixels(plane)
        height, width = self.size
        for row in range(0, height, side):
            for column in range(0, width, side):
                yield read(slice(row, row + side), slice(column, column + side))

    def _fitted(self, part: NDArray[np.generic]) -> NDArray[np.generic]:
        if len(part) == self.channels:
            return part
        if len(part) == 1:
            return np.repeat(part, self.channels, axis=0)
        if not (part == part[:1]).all():
            raise ValueError(
                f"{self.path}: must have {self.channels} channel as the model, got colours"
            )
        return part[:1]


def list_sources(path: Path) -> list[Path]:
    """Lists the images of a folder by name, Zarr folders included; or the one image.

    Raises:
        ValueError: If there is none, or two that differ in suffix only.
    """
    if is_zarr(path) or path.is_file():
        return [path.resolve() if path.name == "" else path]
    if path.is_dir():
        seen = [p for p in path.iterdir() if p.name[0] != "."]
        arrays = [p for p in seen if p.is_dir() and is_zarr(p)]
        if arrays:
            pictures = [p for p in seen if p.is_file() and p.suffix.lower() in SUFFIXES]
            return unique(path, sorted([*arrays, *pictures]))
    return list_images(path)


def open_source(
    path: Path,
    channels: int | None,
    *,
    missing_chunks: bool = False,
    palette_as_colour: bool = True,
) -> Source:
    """Opens an image.

    Args:
        path: PNG, JPEG, BMP; TIFF (also OME and ImageJ), mapped into memory or decoded tile by tile
            where it is large; a Zarr array or an OME-Zarr image (0.4 or 0.5, its full resolution).
        channels: Number of channels that the network takes; None: as many as the image has.
        missing_chunks: Whether chunks that a Zarr array lacks are read as its fill value.
        palette_as_colour: Whether pixels that index a palette are read as colours, as in images, or
            as indices, as in labels.

    Raises:
        ValueError: One line, if it cannot be read, or has another number of channels.
    """
    try:
        if is_zarr(path):
            array, axes, sizes = open_zarr(path, channels or 1, missing_chunks)
            opened = Opened(array, axes, plausible(sizes))
        else:
            opened = open_file(path, palette_as_colour=palette_as_colour)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise ValueError(f"{path}: cannot be read as an image: {reason_of(error)}") from None
    array, axes = opened.array, opened.axes
    if "Y" not in axes or "X" not in axes or len(set(axes)) != len(axes):
        raise ValueError(f"{path}: must have axes Y and X, each axis once, got {axes!r}")
    if 0 in array.shape:
        raise ValueError(f"{path}: must have at least one pixel, got shape {array.shape}")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path}: pixels must be real numbers, got {array.dtype}")
    source = Source(path, array, axes, channels or 0, opened.alpha, opened.pixel_size)
    if sum(axis in "CS" and n > 1 for axis, n in zip(axes, array.shape, strict=True)) > 1:
        raise ValueError(f"{path}: must have one axis of channels, got axes {axes}")
    if channels is None:
        return replace(source, channels=source.found)
    if source.found != channels and {source.found, channels} != {1, 3}:
        raise ValueError(f"{path}: must have {channels} channels as the model, got {source.found}")
    return source


def _read(array: Any, index: tuple[Any, ...]) -> NDArray[np.generic]:
    """Reads a part of an array into memory of its own."""
    if isinstance(array, np.memmap):  # mapped anew, else pages of earlier parts add up
        array = np.memmap(str(array.filename), array.dtype, "r", array.offset, array.shape)
        return np.array(array[index])
    return np.asarray(array[index])
