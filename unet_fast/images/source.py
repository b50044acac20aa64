"""Images read region by region, even if larger than memory: pictures, TIFF, OME-Zarr."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import reason_of
from .._progress import counted
from .annotations import Tell, draw_outlines, is_outlines, silent
from .files import as_image, as_labels
from .folders import SUFFIXES, check_size, contents, find_files, left_out, stem_of, unique
from .formats import Opened, open_file, plausible
from .zarr import is_zarr, open_zarr

Pixels = Callable[..., NDArray[np.generic]]
"""Reads a part of an image, given a slice along each spatial axis: (C, rows, columns), or (C,
planes, rows, columns) of a volume; real values of any dtype."""

SPATIAL = {2: "YX", 3: "ZYX"}
"""Spatial axes of an image and of a volume."""
_PART = 2**22
"""Pixels that are read at once, if no more are stored together."""


@dataclass(frozen=True)
class Source:
    """An image file or folder: a plane of pixels or a volume, or a stack of such."""

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
    dims: int = 2
    """2: each plane is an image; 3: Z is an axis of volumes."""

    @property
    def spatial(self) -> str:
        """The spatial axes, YX or ZYX."""
        return SPATIAL[self.dims]

    @property
    def size(self) -> tuple[int, ...]:
        """Size of a plane, (H, W), or of a volume, (D, H, W)."""
        return tuple(self.array.shape[self.axes.index(axis)] for axis in self.spatial)

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Micrometres along each spatial axis; None: the file does not say all of them."""
        if not {*self.spatial} <= self.pixel_size.keys():
            return None
        return tuple(self.pixel_size[axis] for axis in self.spatial)

    @property
    def stack(self) -> dict[str, int]:
        """Axes of the stack, with their lengths; empty for a single plane or volume."""
        pairs = zip(self.axes, self.array.shape, strict=True)
        return {axis: n for axis, n in pairs if axis not in "CS" + self.spatial and n > 1}

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
        """The indices of all planes, or volumes."""
        return list(np.ndindex(*self.stack.values()))

    def layout(self, channels: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Returns axes, out of TCZYX, and shape of a result with these channels, (K,) or ().

        Raises:
            ValueError: If there is no place for the axes of the stack.
        """
        lengths = self.in_result(tuple(self.stack.values()))
        lengths |= dict(zip(self.spatial, self.size, strict=True))
        lengths |= dict(zip("C", channels, strict=False))
        axes = "".join(axis for axis in "TCZYX" if axis in lengths)
        return axes, tuple(lengths[axis] for axis in axes)

    def place(self, result: Any, plane: tuple[int, ...], *part: slice) -> Any:
        """Returns the index of a part of a plane or volume in a result of that :meth:`layout`."""
        place: dict[str, Any] = self.in_result(plane) | dict(zip(self.spatial, part, strict=True))
        if result.ndim > len(place):
            place["C"] = slice(None)
        return tuple(place[axis] for axis in "TCZYX" if axis in place)

    def in_result(self, plane: tuple[int, ...]) -> dict[str, int]:
        """Returns the index of a plane along T and Z, the axes of the stack in a result.

        Raises:
            ValueError: If the stack has other axes; a single one, as a row of pages, counts as Z.
        """
        stack, outer = "".join(self.stack), "TZ" if self.dims == 2 else "T"
        if len(stack) > 1 and set(stack) != {*outer}:
            raise ValueError(
                f"{self.path}: stacks must have axes {' and '.join(outer)}, got {stack}"
            )
        names = stack if len(stack) != 1 or stack == "T" else outer[-1]
        return dict(zip(names, plane, strict=True))

    def name_of(self, plane: tuple[int, ...]) -> str:
        """Returns the name of a plane: 3, or t0 z3 in time and depth; "" of a single one."""
        axes = [axis.lower() for axis in self.stack]
        axes = axes if len(axes) > 1 else [""]
        return " ".join(f"{axis}{i}" for axis, i in zip(axes, plane, strict=False))

    def pixels(self, plane: tuple[int, ...] = ()) -> Pixels:
        """Returns a reader of parts of a plane or volume."""
        place = dict(zip(self.stack, plane, strict=True))
        channel = self._channel_axis
        given: dict[str, Any] = {axis: place.get(axis, 0) for axis in self.axes}
        if channel is not None:
            given[channel] = slice(None)

        def read(*part: slice) -> NDArray[np.generic]:
            index = tuple((given | dict(zip(self.spatial, part, strict=True))).values())
            try:
                values = _read(self.array, index)
            except Exception as error:  # decoders of broken files raise whatever they stumble over
                raise ValueError(f"{self.path}: cannot be read: {reason_of(error)}") from None
            left = [axis for axis in self.axes if axis in (*self.spatial, channel)]
            order = [left.index(axis) for axis in self.spatial]
            if channel is None:
                return self._fitted(values.transpose(order)[None])
            values = values.transpose([left.index(channel), *order])
            return self._fitted(values[: self.found])

        return read

    def parts(self, plane: tuple[int, ...]) -> Iterator[NDArray[np.generic]]:
        """Yields a plane or volume once, in parts of whole chunks."""
        read = self.pixels(plane)
        stored = getattr(self.array, "chunks", None) or (1,) * self.array.ndim
        chunk = [stored[self.axes.index(axis)] for axis in self.spatial]
        sides = [*chunk]
        for axis in reversed(range(self.dims)):
            times = _PART // math.prod(sides)
            sides[axis] = min(chunk[axis] * max(1, times), self.size[axis])
        ranges = (range(0, n, side) for n, side in zip(self.size, sides, strict=True))
        for first in itertools.product(*ranges):
            yield read(*(slice(i, i + side) for i, side in zip(first, sides, strict=True)))

    def _fitted(self, part: NDArray[np.generic]) -> NDArray[np.generic]:
        if len(part) == self.channels:
            return part
        if len(part) == 1:
            return np.repeat(part, self.channels, axis=0)
        if not (part == part[:1]).all():
            raise ValueError(
                f"{self.path}: must have 1 channel as the model, got colours (convert to "
                "grey, e.g. in Fiji: Image > Type > 8-bit; or train on colours)"
            )
        return part[:1]


@dataclass(frozen=True)
class Plane:
    """A plane of a file, or a volume of a file that is read so; it is read on demand."""

    source: Source
    index: tuple[int, ...] = ()
    """Index of the plane in its stack; empty for a single one."""

    @property
    def name(self) -> str:
        """Name of the file, in a stack with the plane, as in cells[3] or cells[t0 z3]."""
        return stem_of(self.source.path) + self.place

    @property
    def path(self) -> Path:
        """Path of the file, in a stack with the plane, for messages."""
        return Path(f"{self.source.path}{self.place}")

    @property
    def place(self) -> str:
        """The plane in a stack, as [3] or [t0 z3]; nothing for a single plane."""
        name = self.source.name_of(self.index)
        return f"[{name}]" if name else ""

    def pixels(self, step: int = 1) -> NDArray[np.generic]:
        """Every `step`-th pixel, (C, H, W) or (C, D, H, W), with the values of the file."""
        return self.source.pixels(self.index)(*[slice(None, None, step)] * self.source.dims)

    def labels(self, tell: Tell = silent) -> NDArray[np.int32]:
        """Reads the pixels as an instance map, (H, W) or (D, H, W); see :func:`as_labels`."""
        return as_labels(self.path, self.pixels(), tell, coloured="S" in self.source.axes)


@dataclass(frozen=True)
class Stored:
    """Pixels of a volume that stay in their file, (C, D, H, W); what is indexed is read.

    Raises ValueError where pixels are not real and finite.
    """

    plane: Plane

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, with channels."""
        return self.plane.source.channels, *self.plane.source.size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[np.float32]:
        """Reads a part: a slice of channels, then slices or numbers; all that is left is whole."""
        channels, *part = index
        part += [slice(None)] * (self.plane.source.dims - len(part))
        spans = [slice(i, i + 1) if isinstance(i, int) else i for i in part]
        pixels = self.plane.source.pixels(self.plane.index)(*spans)
        kept = (channels, *(0 if isinstance(i, int) else slice(None) for i in part))
        return as_image(self.plane.path, pixels[kept])

    def parts(self) -> Iterator[NDArray[np.generic]]:
        """Yields all pixels once, part by part, as they are stored."""
        return self.plane.source.parts(self.plane.index)


def planes_of(source: Source) -> Iterator[Plane]:
    """Yields all planes of a file."""
    return (Plane(source, index) for index in source.planes)


def same_plane(plane: Plane, other: Source) -> Plane:
    """Returns the same plane of another file, by the names of the axes if they are the same."""
    place = dict(zip(plane.source.stack, plane.index, strict=True))
    if place.keys() == other.stack.keys():
        return Plane(other, tuple(place[axis] for axis in other.stack))
    return Plane(other, plane.index)


def check_alike(one: Source, other: Source) -> None:
    """Raises ValueError if files that belong together differ in size or planes."""
    check_size(one.path, one.size, other.path, other.size)
    if one.stack != other.stack and [*one.stack.values()] != [*other.stack.values()]:
        raise ValueError(
            f"{other.path}: must have the {_KINDS[one.dims]}s of {one.path}, {_planes_in(one)}, "
            f"got {_planes_in(other)}"
        )


_KINDS = {2: "plane", 3: "volume"}


def _planes_in(source: Source) -> str:
    *outer, inner = [*source.stack.values()] or [1]
    return "".join(f"{n} x " for n in outer) + counted(inner, _KINDS[source.dims])


def find_sources(
    path: Path, suffixes: tuple[str, ...] = SUFFIXES, *, recursive: bool = False
) -> list[Path]:
    """Finds the images of a folder, Zarr folders included, sorted; or the one image.

    Warns of images that it leaves out.

    Args:
        path: The folder or image.
        suffixes: Suffixes of files, in lower case.
        recursive: Whether files of nested folders count, and folders NAME.zarr.

    Raises:
        ValueError: If there is none.
    """
    if is_zarr(path) or path.is_file():
        return [path.resolve() if path.name == "" else path]
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    seen = contents(path, recursive=recursive) if path.is_dir() else []
    arrays = [p for p in seen if p.is_dir() and is_zarr(p)]
    files = [p for p in seen if p.suffix.lower() in suffixes and not (p.is_dir() and is_zarr(p))]
    if not arrays and not files:
        find_files(path, suffixes, recursive=recursive)  # says why
    for text in left_out(path, set(seen) - set(arrays)):
        warnings.warn(text, stacklevel=2)
    return sorted([*arrays, *files])


def list_sources(path: Path, *, recursive: bool = False) -> list[Path]:
    """Lists the images of a folder as :func:`find_sources`, none of which share a name.

    Raises:
        ValueError: As there; or if two differ in suffix only.
    """
    found = find_sources(path, recursive=recursive)
    return [*unique(path, found).values()] if path.is_dir() and not is_zarr(path) else found


def open_labels(
    path: Path,
    image: Source | None,
    tell: Tell = silent,
    *,
    missing_chunks: bool = False,
    dims: int = 2,
) -> Source:
    """Opens labels: pixels, or outlines, which are filled.

    Args:
        path: As for :func:`open_source`; or outlines, as for :func:`draw_outlines`.
        image: The image that they belong to, or one of its size: outlines need it.
        tell: Gets a line for each thing that is left out of outlines.
        missing_chunks: As for :func:`open_source`.
        dims: As for :func:`open_source`, where there is no image.

    Raises:
        ValueError: One line, if they cannot be read, or outlines have no image of one plane.
    """
    dims = dims if image is None else image.dims
    if not is_outlines(path):
        options: dict[str, Any] = {"missing_chunks": missing_chunks, "dims": dims}
        return open_source(path, None, palette_as_colour=False, **options)
    if image is None:
        raise ValueError(
            f"{path}: outlines must go with an image, whose size they need, got none "
            "(--images FOLDER)"
        )
    if image.stack or dims == 3:
        raise ValueError(
            f"{path}: outlines must go with an image of one plane, got the stack {image.path}: "
            "save labels as a stack of label images"
        )
    height, width = image.size
    return Source(path, draw_outlines(path, (height, width), tell), "YX", 1, 0, {})


def open_source(
    path: Path,
    channels: int | None,
    *,
    missing_chunks: bool = False,
    palette_as_colour: bool = True,
    axes: str | None = None,
    dims: int = 2,
) -> Source:
    """Opens an image, or a volume.

    Args:
        path: PNG, JPEG, BMP; TIFF (also OME and ImageJ), mapped into memory or decoded tile by tile
            where it is large; a Zarr array or an OME-Zarr image (0.4 or 0.5, its full resolution).
        channels: Number of channels that the network takes; None: as many as the image has.
        missing_chunks: Whether chunks that a Zarr array lacks are read as its fill value.
        palette_as_colour: Whether pixels that index a palette are read as colours, as in images, or
            as indices, as in labels.
        axes: A letter for each axis, of TZCYX, for files of as many axes, RGB aside, whatever they
            say themselves; None: as they say.
        dims: 2: each plane is an image; 3: each stack along Z, or along its one axis without a
            name, is a volume.

    Raises:
        ValueError: One line, if it cannot be read, is no volume, or has another number of channels.
    """
    try:
        if is_zarr(path):
            with np.errstate(over="raise"):  # of the fill value
                array, named, sizes = open_zarr(path, channels or 1, missing_chunks)
            opened = Opened(array, named, plausible(sizes))
        else:
            opened = open_file(path, palette_as_colour=palette_as_colour)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise ValueError(f"{path}: cannot be read as an image: {reason_of(error)}") from None
    array = opened.array
    if axes is None or len(axes) != array.ndim or "S" in opened.axes:
        axes = opened.axes
    if "Y" not in axes or "X" not in axes or len(set(axes)) != len(axes):
        raise ValueError(
            f"{path}: must have axes Y and X, each axis once, got {axes!r} of shape {array.shape} "
            f"(--axes names them, as {'TCZYX'[-min(array.ndim, 4) :]})"
        )
    if 0 in array.shape:
        raise ValueError(f"{path}: must have at least one pixel, got shape {array.shape}")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path}: pixels must be real numbers, got {array.dtype}")
    if dims == 3:
        axes = _with_depth(path, axes, array.shape)
    source = Source(path, array, axes, channels or 0, opened.alpha, opened.pixel_size, dims)
    if sum(axis in "CS" and n > 1 for axis, n in zip(axes, array.shape, strict=True)) > 1:
        raise ValueError(f"{path}: must have one axis of channels, got axes {axes}")
    if channels is None:
        return replace(source, channels=source.found)
    if source.found != channels and {source.found, channels} != {1, 3}:
        hint = " (--axes CYX if its planes are channels)" if source.stack else ""
        hint = " (--axes CZYX or ZYX says which axis is which)" if dims == 3 else hint
        raise ValueError(
            f"{path}: must have {counted(channels, 'channel')} as the model, got "
            f"{source.found}{hint}"
        )
    return source


def _with_depth(path: Path, axes: str, shape: tuple[int, ...]) -> str:
    """Returns the axes of a volume, in which the one axis without a name is called Z.

    Raises:
        ValueError: If there is no such axis.
    """
    if "Z" in axes:
        return axes
    pairs = zip(axes, shape, strict=True)
    unnamed = [axis for axis, n in pairs if axis not in "TCSYX" and n > 1]
    if not unnamed:
        raise ValueError(
            f"{path}: must be a volume, got a plane of shape {shape} (labels of some planes are "
            "volumes of the size of the image, too; --dims 2 is for planes)"
        )
    if len(unnamed) != 1:
        raise ValueError(
            f"{path}: must be a volume with an axis Z, got axes {axes} of shape {shape} (--axes "
            "ZYX says that the first one is Z; planes are for networks of images, --dims 2)"
        )
    return axes.replace(unnamed[0], "Z")


def _read(array: Any, index: tuple[Any, ...]) -> NDArray[np.generic]:
    """Reads a part of an array into memory of its own."""
    if isinstance(array, np.memmap):  # mapped anew, else pages of earlier parts add up
        array = np.memmap(str(array.filename), array.dtype, "r", array.offset, array.shape)
        return np.array(array[index])
    return np.asarray(array[index])
