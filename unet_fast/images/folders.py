"""Folders of images and labels: listing and pairing files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


def list_images(folder: Path) -> list[Path]:
    """Lists the image files of a folder, sorted by name.

    Raises:
        ValueError: If there is no such folder, no image in it, or two that differ in suffix only.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing there"
        raise ValueError(f"{folder}: must be a folder of images, got {kind}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    if not files:
        raise ValueError(f"{folder}: must hold images ({', '.join(SUFFIXES)}), got none")
    return unique(folder, files)


def stem_of(path: Path) -> str:
    """Returns a name without image suffixes: .png, .tif, .ome.tif, .zarr, .ome.zarr."""
    stem = path.name.removesuffix(".zarr") if path.is_dir() else path.stem
    return stem.removesuffix(".ome")


def unique(folder: Path, files: list[Path]) -> list[Path]:
    """Returns the files of a folder, after checking that no two differ in suffix only.

    Raises:
        ValueError: If two do, or a name is no text, as one that is not UTF-8.
    """
    stems: dict[str, Path] = {}
    for file in files:
        if not file.name.isprintable():
            raise ValueError(f"{folder}: names must be printable text, got {file.name!r}")
        other = stems.setdefault(stem_of(file), file)
        if other != file:
            raise ValueError(
                f"{folder}: names must be unique without suffix, got {other.name} and {file.name}"
            )
    return files


def find_pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Pairs the files of two folders by name, whatever their suffixes.

    Raises:
        ValueError: If a folder is missing or empty, or a file has no partner or two.
    """
    of_images, of_labels = ({f.stem: f for f in list_images(d)} for d in (images, labels))
    for one, other, folder in ((of_images, of_labels, labels), (of_labels, of_images, images)):
        missing = unpaired(one, other)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{folder}: must hold a partner of {missing[0]}{more}, got none of that name"
            )
    return [(of_images[stem], of_labels[stem]) for stem in sorted(of_images)]


def unpaired(one: dict[str, Path], other: dict[str, Path]) -> list[Path]:
    """Returns the files of one folder, given by stem, without a partner in the other."""
    return [one[stem] for stem in sorted(one.keys() - other.keys())]


def check_size(
    image: Path, shape: tuple[int, ...], other: Path, other_shape: tuple[int, ...]
) -> None:
    """Raises ValueError if a file that belongs to an image differs in size."""
    if shape != other_shape:
        raise ValueError(
            f"{other}: must have the size of {image}, {_size(shape)}, got {_size(other_shape)}"
        )


def label_type_of(
    labels: Iterable[NDArray[np.int32]], ignore_label: int | None
) -> Literal["instances", "semantic"]:
    """Guesses what label files hold: semantic if all together have one value beside 0."""
    values: set[int] = set()
    for image in labels:
        values.update(np.unique(image).tolist())
        if len(values - {0, ignore_label}) > 1:
            return "instances"  # the other maps need not be read
    return "semantic" if values - {0, ignore_label} else "instances"


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
