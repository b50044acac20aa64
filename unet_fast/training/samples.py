"""Annotated images: pairing and reading of files, numbering of objects, split for validation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .._files import TEXT, parsed_json, read_file, reason_of
from ..contracts.border_weight_map import IGNORED
from ..images.files import fit_channels, read_image, read_labels
from ..images.folders import check_size, find_pairs


@dataclass(frozen=True)
class Sample:
    """One annotated image."""

    name: str
    image: NDArray[np.float32]
    """Pixels, (C, H, W), with the values of the file."""
    labels: NDArray[np.int32]
    """Labels, (H, W), 0 background."""
    classes: NDArray[np.int32] | None = None
    """The class of every pixel, (H, W), with the values of its file; or None."""


def load_samples(images: Path, labels: Path, classes: Path | None = None) -> list[Sample]:
    """Reads and checks all pairs of two folders, with the class maps of a third.

    Raises:
        ValueError: One line that names the file: see :func:`find_pairs`, `read_image` and
            `read_labels`; also if an image and its labels differ in size, or images in channels.
    """
    samples: list[Sample] = []
    for image_path, label_path in find_pairs(images, labels):
        image, label = read_image(image_path), read_labels(label_path)
        check_size(image_path, image.shape[1:], label_path, label.shape)
        samples.append(Sample(image_path.stem, image, label))
    if classes is not None:
        for i, (image_path, class_path) in enumerate(find_pairs(images, classes)):
            class_map = read_labels(class_path)
            check_size(image_path, samples[i].labels.shape, class_path, class_map.shape)
            samples[i] = replace(samples[i], classes=class_map)
    return fit_all_channels(samples)


def fit_all_channels(samples: list[Sample]) -> list[Sample]:
    """Gives all images the same number of channels, where grey images were saved as colour.

    Raises:
        ValueError: If they still differ in channels.
    """
    grey = all(len(fit_channels(s.image, 1)) == 1 for s in samples)
    channels = 1 if grey else max(len(s.image) for s in samples)
    samples = [replace(s, image=fit_channels(s.image, channels)) for s in samples]
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
    """Label maps, (H, W) each; 0 background."""
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
    empty = all(not set(np.unique(s.labels).tolist()) - {0, ignore_label} for s in samples)
    if empty:
        raise ValueError("labels must hold an object, got none in any file")
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
    names: Sequence[str], share: float, seed: int, file: Path | None
) -> tuple[list[str], list[str]]:
    """Splits names into those for training and those for validation.

    Args:
        names: All names.
        share: Share of the names for validation, drawn at random; each side gets at least one name
            if there are two and the share is not 0.
        seed: Seed of the draw.
        file: JSON file to read the split from; None: draw it.

    Raises:
        ValueError: If the file cannot be read, lists an unknown name, or one on both sides.
    """
    if file is None:
        count = min(max(round(share * len(names)), share > 0), len(names) - 1)
        order = np.random.default_rng(seed).permutation(len(names)).tolist()
        kept = {names[i] for i in order[:count]}
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
    listed = [name for part in parts for name in part]
    for name in listed:
        if name not in names:
            raise ValueError(f"{file}: must list files that are there, got {name}")
        if listed.count(name) > 1:
            raise ValueError(f"{file}: must list a file once, got {name} twice")
    if not parts[0]:
        raise ValueError(f"{file}: must list files for training, got none")
    return parts[0], parts[1]
