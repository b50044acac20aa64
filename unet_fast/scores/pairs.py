"""Predictions, labels and images of the same names, opened file by file, read plane by plane."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..images.files import as_labels
from ..images.folders import check_size, stem_of, unpaired
from ..images.source import Source, list_sources, open_source
from ..images.zarr import is_zarr


@dataclass(frozen=True)
class Plane:
    """A plane of a file, which is read on demand."""

    source: Source
    index: tuple[int, ...] = ()
    """Index of the plane in its stack; empty for a single plane."""

    @property
    def name(self) -> str:
        """Name of the file, in a stack with the plane, as in cells[3] or cells[t0 z3]."""
        return stem_of(self.source.path) + self._place

    @property
    def path(self) -> Path:
        """Path of the file, in a stack with the plane, for messages."""
        return Path(f"{self.source.path}{self._place}")

    @property
    def _place(self) -> str:
        axes = [axis.lower() for axis in self.source.stack]
        axes = axes if len(axes) > 1 else [""]
        names = [f"{axis}{i}" for axis, i in zip(axes, self.index, strict=False)]
        return f"[{' '.join(names)}]" if names else ""

    def pixels(self, step: int = 1) -> NDArray[np.generic]:
        """Every `step`-th pixel, (C, H, W), with the values of the file."""
        return self.source.pixels(self.index)(slice(None, None, step), slice(None, None, step))

    def labels(self) -> NDArray[np.int32]:
        """Reads the pixels as an instance map, (H, W); see :func:`as_labels`."""
        return as_labels(self.path, self.pixels())


def planes_of(source: Source) -> Iterator[Plane]:
    """Yields all planes of a file."""
    return (Plane(source, index) for index in source.planes)


@dataclass(frozen=True)
class Trio:
    """Planes that belong together, of one size."""

    found: Plane
    truth: Plane
    image: Plane | None


@dataclass(frozen=True)
class Files:
    """Files, or Zarr folders, that belong together."""

    found: Path
    truth: Path
    image: Path | None
    missing_chunks: bool
    """Whether chunks that a prediction in Zarr lacks count as its fill value."""

    def open_found(self) -> Source:
        """Opens the prediction."""
        return open_source(
            self.found, None, missing_chunks=self.missing_chunks, palette_as_colour=False
        )

    def open_truth(self) -> Source:
        """Opens the labels; chunks may be missing, as Zarr need not store those of background."""
        return open_source(self.truth, None, missing_chunks=True, palette_as_colour=False)

    def planes(self) -> list[Trio]:
        """Returns all planes, none of which is read yet.

        Raises:
            ValueError: If sizes or stacks differ; one line that names two files.
        """
        truth, found = self.open_truth(), self.open_found()
        image = None
        if self.image is not None:
            image = open_source(self.image, None, missing_chunks=True)
        for other in (found, image):
            if other is not None:
                _check_alike(truth, other)
        return [
            Trio(plane, _same(plane, truth), None if image is None else _same(plane, image))
            for plane in planes_of(found)
        ]


def find_files(
    predictions: Path, labels: Path, images: Path | None, missing_chunks: bool
) -> tuple[list[Files], int]:
    """Pairs predictions with labels and images by name, whatever their suffixes.

    Args:
        predictions: A folder, or one file or Zarr folder.
        labels: A folder, or one file or Zarr folder.
        images: A folder, or one file or Zarr folder; or None.
        missing_chunks: See :class:`Files`.

    Returns:
        The files that belong together, by name, and the number of labels without a prediction.

    Raises:
        ValueError: If a prediction has no partner; one line that names it.
    """
    places = {"predictions": predictions, "labels": labels}
    places |= {} if images is None else {"images": images}
    if all(path.is_file() or is_zarr(path) for path in places.values()):
        return [Files(predictions, labels, images, missing_chunks)], 0
    known = {what: {stem_of(f): f for f in list_sources(path)} for what, path in places.items()}
    found = known["predictions"]
    for what, path in places.items():
        strange = unpaired(found, known[what])
        if strange:
            raise ValueError(f"{path}: must hold {what} of {strange[0]}, got none of that name")
    pairs = [
        Files(found[stem], known["labels"][stem], known.get("images", {}).get(stem), missing_chunks)
        for stem in sorted(found)
    ]
    return pairs, len(known["labels"]) - len(found)


def _same(plane: Plane, other: Source) -> Plane:
    """Returns the same plane of another file, by the names of the axes if they are the same."""
    place = dict(zip(plane.source.stack, plane.index, strict=True))
    if place.keys() == other.stack.keys():
        return Plane(other, tuple(place[axis] for axis in other.stack))
    return Plane(other, plane.index)


def _check_alike(one: Source, other: Source) -> None:
    check_size(one.path, one.size, other.path, other.size)
    if one.stack != other.stack and [*one.stack.values()] != [*other.stack.values()]:
        raise ValueError(
            f"{other.path}: must have the planes of {one.path}, {_planes(one)}, "
            f"got {_planes(other)}"
        )


def _planes(source: Source) -> str:
    return " x ".join(f"{n} along {axis}" for axis, n in source.stack.items()) or "one"
