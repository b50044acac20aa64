"""Predictions, labels and images of the same names, opened file by file, read one by one."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.annotations import OUTLINES, is_outlines
from ..images.folders import SUFFIXES, name_of, stem_of, unique, unpaired
from ..images.pairing import (
    SUFFIX_HINT,
    Reading,
    by_base,
    check_suffix,
    common_ends,
    end_among_images,
    labels_among,
    suffix_hint,
    taken_to_be,
)
from ..images.source import (
    Plane,
    Source,
    check_alike,
    find_sources,
    open_labels,
    open_source,
    planes_of,
    same_plane,
)
from ..images.zarr import is_zarr
from ..prediction.options import OVERLAYS


@dataclass(frozen=True)
class Trio:
    """Planes, or volumes, that belong together, of one size."""

    name: str
    """Name of the prediction or, without one, of the labels."""
    found: Plane | None
    """None: nothing was predicted."""
    truth: Plane
    image: Plane | None


@dataclass(frozen=True)
class Files:
    """Files, or Zarr folders, that belong together."""

    name: str
    """Name of the prediction or, without one, of the labels."""
    found: Path | None
    """None: nothing was predicted."""
    truth: Path
    image: Path | None
    missing_chunks: bool
    """Whether chunks that a prediction in Zarr lacks count as its fill value."""
    reading: Reading
    """How they are read: planes or volumes."""

    def open_found(self) -> Source:
        """Opens the prediction, which there must be."""
        assert self.found is not None
        return open_source(
            self.found,
            None,
            missing_chunks=self.missing_chunks,
            palette_as_colour=False,
            dims=self.reading.dims,
        )

    def open_truth(self) -> Source:
        """Opens the labels; chunks may be missing, as Zarr need not store those of background."""
        like = None
        if is_outlines(self.truth):
            like = self.open_image() or (None if self.found is None else self.open_found())
        dims = self.reading.dims
        return open_labels(self.truth, like, self._tell, missing_chunks=True, dims=dims)

    def open_image(self) -> Source | None:
        """Opens the image, if there is one."""
        if self.image is None:
            return None
        axes, dims = self.reading.axes, self.reading.dims
        return open_source(self.image, None, missing_chunks=True, axes=axes, dims=dims)

    def _tell(self, text: str) -> None:
        warnings.warn(f"{self.truth}: {text}", stacklevel=2)

    def planes(self) -> list[Trio]:
        """Returns all planes or volumes, none of which is read yet.

        Raises:
            ValueError: If sizes or stacks differ; one line that names two files.
        """
        truth, found = self.open_truth(), None if self.found is None else self.open_found()
        image = self.open_image()
        for other in (found, image):
            if other is not None:
                check_alike(truth, other)
        first = truth if found is None else found

        def same(plane: Plane, other: Source | None) -> Plane | None:
            return None if other is None else same_plane(plane, other)

        return [
            Trio(
                self.name + plane.place,
                same(plane, found),
                same_plane(plane, truth),
                same(plane, image),
            )
            for plane in planes_of(first)
        ]


def find_files(
    predictions: Path,
    labels: Path,
    images: Path | None,
    missing_chunks: bool,
    reading: Reading | None = None,
) -> list[Files]:
    """Pairs predictions with labels and images by name, as training pairs images with labels.

    Args:
        predictions: A folder, or one file or Zarr folder.
        labels: A folder, or one file or Zarr folder; outlines, too.
        images: A folder, or one file or Zarr folder; or None.
        missing_chunks: See :class:`Files`.
        reading: How they are found and read, as in training; None: as by default.

    Returns:
        The files that belong together, by name; labels without a prediction, too.

    Raises:
        ValueError: If a prediction has no partner; one line that names it.
    """
    reading = reading or Reading()
    places = [predictions, labels] if images is None else [predictions, labels, images]
    options: dict[str, Any] = {"missing_chunks": missing_chunks, "reading": reading}
    if all(path.is_file() or is_zarr(path) for path in places):
        return [Files(stem_of(predictions), predictions, labels, images, **options)]
    nested, suffix = reading.recursive, reading.label_suffix
    found = _named(predictions, nested)
    found = {name: file for name, file in found.items() if not name.startswith(f"{OVERLAYS}/")}
    same = images is not None and images.exists() and images.samefile(labels)
    drawn = truth = _named(labels, nested, OUTLINES, same)
    shown = {} if images is None else _named(images, nested)
    check_suffix(labels, drawn, suffix)
    if suffix is None:
        of_labels = end_among_images(drawn)
        truth = {name: file for name, file in drawn.items() if name.endswith(of_labels)}
    end, label_end = common_ends(found, truth, suffix)
    if not all(name.endswith(end) for name in found):
        end, label_end = "", suffix or ""
    if suffix is None and (end or label_end):  # as of a.png and a_mask.png
        warnings.warn(taken_to_be(end, label_end), stacklevel=2)
    found, truth, shown = (
        by_base(named, x)[0] for named, x in ((found, end), (truth, label_end), (shown, end))
    )
    strange = unpaired(found, truth)
    if strange and not reading.skip_unlabelled:
        paired = len(found) - len(strange)
        hint = SUFFIX_HINT if suffix else suffix_hint(found, drawn, paired)
        raise ValueError(
            f"{labels}: must hold labels of {strange[0]}, got none of that name "
            f"(--skip-unlabelled leaves such results out, {hint})"
        )
    found = {name: file for name, file in found.items() if name in truth}
    strange = [] if images is None else unpaired(found, shown)
    if strange:
        raise ValueError(f"{images}: must hold images of {strange[0]}, got none of that name")
    return [
        Files(
            name_of(predictions, found[name]) if name in found else name_of(labels, file),
            found.get(name),
            file,
            shown.get(name),
            **options,
        )
        for name, file in sorted(truth.items())
    ]


def _named(
    path: Path, nested: bool, more: tuple[str, ...] = (), same: bool = False
) -> dict[str, Path]:
    """Returns the files of a folder, or the one file, by name; of `more` suffixes, too."""
    files = find_sources(path, SUFFIXES + more, recursive=nested)
    return unique(path, labels_among(path, files, same) if more else files)
