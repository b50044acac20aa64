"""Annotated images: pairing and reading of files, numbering of objects, split for validation."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .._device import torchrun_number
from .._files import TEXT, parsed_json, read_file, reason_of
from ..contracts.border_weight_map import IGNORED
from ..images.annotations import Tell, silent
from ..images.files import as_image, fit_channels
from ..images.pairing import UNKNOWN, Pair, Reading, find_pairs, match
from ..images.source import (
    Source,
    Stored,
    check_alike,
    open_labels,
    open_source,
    planes_of,
    same_plane,
)

STORED = 2**30
"""Most bytes in float32 of a volume that is kept in memory; others are read tile by tile."""


@dataclass(frozen=True)
class Sample:
    """One annotated image."""

    name: str
    image: Any
    """Pixels, (C, H, W) or (C, D, H, W), float32 with the values of the file: an array, or
    :class:`Stored`."""
    labels: NDArray[np.int32]
    """Labels, (H, W) or (D, H, W), 0 background."""
    classes: NDArray[np.int32] | None = None
    """The class of every pixel, of the shape of labels, with the values of its file; or None."""
    file: str = ""
    """Name of the file, if this is a plane of a stack or was read."""
    spacing: tuple[float, ...] | None = None
    """Size of a pixel along each axis in micrometres, if that is known."""


def load_samples(
    images: Path, labels: Path, classes: Path | None = None, reading: Reading | None = None
) -> list[Sample]:
    """Reads and checks all pairs of two folders, with the class maps of a third.

    Warns of what is left out, and of what names and contents of files are taken to mean.

    Raises:
        ValueError: One line that names the file: see :func:`find_pairs`, `read_image` and
            `read_labels`; also if an image and its labels differ in size, or images in channels.
    """
    reading = reading or Reading()
    found = find_pairs(images, labels, reading)
    told = [*found.notes, *found.left_out]
    maps: dict[str, Path] = {}
    if classes is not None:
        of_classes = match(images, classes, replace(reading, label_suffix=None))
        if of_classes.strays:
            raise ValueError(f"{images}: must hold a partner of {of_classes.strays[0]}, got none")
        maps = {pair.name: pair.labels for pair in of_classes.pairs}
    samples: list[Sample] = []
    for pair in found.pairs:
        planes = read_pair(pair, reading, told.append)
        if classes is not None:
            if pair.name not in maps:
                raise ValueError(f"{classes}: must hold a partner of {pair.image}, got none")
            planes = add_classes(planes, replace(pair, labels=maps[pair.name]), reading)
        samples += planes
    if torchrun_number("RANK", 0) == 0:
        for text in dict.fromkeys(told):
            warnings.warn(text, stacklevel=2)
    return fit_all_channels(samples)


def read_pair(pair: Pair, reading: Reading, tell: Tell = silent) -> list[Sample]:
    """Reads an image and its labels: one sample, or one for each plane or volume of a stack.

    Raises:
        ValueError: One line, if they cannot be read, or differ in size or planes.
    """
    image = _open(pair.image, reading)
    planes = [*planes_of(image)]
    if len(planes) > 1 and reading.dims == 2:
        tell(
            "stacks, of which each plane counts as an image (--axes CYX: as channels; --dims 3: as "
            "volumes)"
        )
    whole = reading.dims == 2 or 4 * image.channels * math.prod(image.size) <= STORED
    pixels = [as_image(x.path, x.pixels()) if whole else Stored(x) for x in planes]
    maps = _label_planes(image, pair.labels, reading, tell)
    spacing = reading.voxel_size or image.spacing
    return [
        Sample(pair.name + plane.place, picture, ids, file=pair.name, spacing=spacing)
        for plane, picture, ids in zip(planes, pixels, maps, strict=True)
    ]


def _open(image: Path, reading: Reading) -> Source:
    return open_source(image, None, axes=reading.axes, dims=reading.dims)


def add_classes(samples: Sequence[Sample], pair: Pair, reading: Reading) -> list[Sample]:
    """Adds class maps, the labels of a pair, to the samples of its image."""
    maps = read_labels_of(pair, replace(reading, background_label=None, ignore_label=None))
    if reading.background_label:  # that of objects: classes have 0, and what is ignored
        for kinds in maps if reading.ignore_label else ():
            kinds[kinds == reading.ignore_label] = UNKNOWN
    return [replace(s, classes=kinds) for s, kinds in zip(samples, maps, strict=True)]


def counts(sample: Sample, ignored: int | None) -> bool:
    """Whether a pixel of a sample counts."""
    maps = [sample.labels] if sample.classes is None else [sample.labels, sample.classes]
    return ignored is None or bool(np.all([x != ignored for x in maps], axis=0).any())


def read_labels_of(pair: Pair, reading: Reading) -> list[NDArray[np.int32]]:
    """Reads the labels of a pair alone: those of each plane, (H, W), or volume, (D, H, W)."""
    return _label_planes(_open(pair.image, reading), pair.labels, reading, silent)


def _label_planes(
    image: Source, path: Path, reading: Reading, tell: Tell
) -> list[NDArray[np.int32]]:
    """Reads the labels of all planes of an image."""
    labels = open_labels(path, image, tell)
    try:
        check_alike(image, labels)
    except ValueError as error:
        hint = " (--axes says what axes of images are: ZYX planes, CYX channels)"
        raise ValueError(f"{error}{hint if image.size == labels.size else ''}") from None
    planes = (same_plane(plane, labels) for plane in planes_of(image))
    return [reading.marked(plane.path, plane.labels(tell)) for plane in planes]


def fit_all_channels(samples: list[Sample]) -> list[Sample]:
    """Gives all images the same number of channels, where grey images were saved as colour.

    Raises:
        ValueError: If they still differ in channels.
    """

    def fitted(image: Any, channels: int) -> Any:
        return image if isinstance(image, Stored) else fit_channels(image, channels)

    grey = all(len(fitted(s.image, 1)) == 1 for s in samples)
    channels = 1 if grey else max(len(s.image) for s in samples)
    samples = [replace(s, image=fitted(s.image, channels)) for s in samples]
    for sample in samples:
        if len(sample.image) != channels:
            raise ValueError(
                f"images must have the same channels, got {channels} and, in {sample.name}, "
                f"{len(sample.image)}"
            )
    return samples


@dataclass(frozen=True)
class NumberedLabels:
    """Labels whose numbers tell the class, so that only one map must be deformed."""

    labels: list[NDArray[np.int32]]
    """Label maps, (H, W) or (D, H, W) each; 0 background."""
    table: NDArray[np.uint8] | None
    """The class of each number, 255 ignored; None where every number is one object of class 1."""
    class_values: list[int] | None
    """Values of the classes in the files; None for 0 and 1."""

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return 2 if self.class_values is None else len(self.class_values)


def number_objects(
    samples: Sequence[Sample], label_type: str, ignore_label: int | None
) -> NumberedLabels:
    """Numbers the objects of label files of any type.

    Args:
        samples: Images with labels; either all or none with class maps.
        label_type: "instances", or "semantic": the values are classes, the smallest one background,
            and the components of a class that are connected along the axes are its objects.
        ignore_label: Value of pixels that do not count, in labels and class maps; or None.

    Raises:
        ValueError: If there is no object, or fewer than 2 or more than 254 classes.
    """
    empty = not samples or all(
        not set(np.unique(s.labels).tolist()) - {0, ignore_label} for s in samples
    )
    if empty:
        raise ValueError(
            "labels must hold an object, got none in any file (0 is background, objects are 1, 2, "
            "...; ignore_label must not be theirs)"
        )
    if label_type == "instances" and samples[0].classes is None:
        return NumberedLabels([s.labels for s in samples], None, None)
    maps = [s.labels if s.classes is None else s.classes for s in samples]
    values = sorted({v for x in maps for v in np.unique(x).tolist()} - {ignore_label})
    if samples[0].classes is not None and values and values[0] != 0:
        values.insert(0, 0)
    if not 2 <= len(values) <= IGNORED - 1:
        got = f"{len(values)}" + (f" ({values[0]} only)" if len(values) == 1 else "")
        raise ValueError(
            f"labels must have from 2 to {IGNORED - 1} classes, background included, got {got}"
        )
    numbered: list[NDArray[np.int32]] = []
    table = [np.zeros(1, np.uint8)]
    first = 1
    for sample, class_map in zip(samples, maps, strict=True):
        kinds = np.searchsorted(values, class_map).astype(np.int64)
        outside = np.zeros(class_map.shape, bool)
        if ignore_label is not None:
            outside = (class_map == ignore_label) | (sample.labels == ignore_label)
        kinds[outside] = IGNORED
        if sample.classes is None:
            instances = np.zeros(class_map.shape, np.int64)
            for kind in range(1, len(values)):
                parts = ndimage.label(kinds == kind)[0]
                instances[parts > 0] = parts[parts > 0] + instances.max()
        else:
            instances = sample.labels.astype(np.int64)
            kinds[(instances == 0) & ~outside] = 0
        instances[(kinds == 0) | outside] = 0
        pairs, index = np.unique(instances * (IGNORED + 1) + kinds, return_inverse=True)
        ids = first + np.arange(len(pairs))
        ids[pairs == 0] = 0
        table.append((pairs % (IGNORED + 1)).astype(np.uint8))
        first += len(pairs)
        numbered.append(ids[index].reshape(class_map.shape).astype(np.int32))
    plain = len(values) == 2 and ignore_label is None
    return NumberedLabels(numbered, None if plain else np.concatenate(table), values)


def split_names(
    names: Sequence[str],
    share: float,
    seed: int,
    file: Path | None,
    files: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Splits names into those for training and those for validation.

    Args:
        names: All names.
        share: Share of the names for validation, drawn at random; each side gets at least one name
            if there are two and the share is not 0.
        seed: Seed of the draw.
        file: JSON file to read the split from; None: draw it. It may name files for all of their
            planes.
        files: The file of each name: a draw keeps what is of one file together, unless there is
            only one file. None: all differ.

    Raises:
        ValueError: If the file cannot be read, lists an unknown name, or one on both sides.
    """
    planes: dict[str, list[str]] = {}
    for name, whole in zip(names, names if files is None else files, strict=True):
        planes.setdefault(whole, []).append(name)
    if file is None:
        units = [*planes.values()] if len(planes) > 1 else [[name] for name in names]
        count = min(max(round(share * len(units)), share > 0), len(units) - 1)
        order = np.random.default_rng(seed).permutation(len(units)).tolist()
        kept = {name for i in order[:count] for name in units[i]}
        return [n for n in names if n not in kept], [n for n in names if n in kept]
    try:
        content = parsed_json(read_file(file, TEXT))
        parts = [content["train"], content.get("validation", [])]
        if not all(isinstance(p, list) and all(isinstance(n, str) for n in p) for p in parts):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such lists"
        reason = reason_of(error) if type(error) is ValueError else reason
        raise ValueError(
            f'{file}: must be JSON {{"train": [names], "validation": [names]}}: {reason}'
        ) from None
    parts = [[name for word in part for name in planes.get(word, [word])] for part in parts]
    listed = [name for part in parts for name in part]
    for name in listed:
        if name not in names:
            raise ValueError(
                f"{file}: must list files that are there, got {name} (names are without suffix, as "
                f"{names[0]})"
            )
        if listed.count(name) > 1:
            raise ValueError(
                f"{file}: must list a file once, got {name} twice (take it out of train or "
                "validation)"
            )
    if not parts[0]:
        raise ValueError(
            f"{file}: must list files for training, got none (move names from validation to train)"
        )
    return parts[0], parts[1]
