"""Folders of images and labels: pairing, checking, normalising."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .imageio import fit_channels, list_images, read_image, read_labels

LOW, HIGH = 1.0, 99.8
"""Percentiles of an image that :func:`normalise` maps to 0 and 1."""


@dataclass(frozen=True)
class Sample:
    """One annotated image."""

    name: str
    image: NDArray[np.float32]
    """(C, H, W), the values of the file."""
    labels: NDArray[np.int32]
    """(H, W), 0 background."""


def find_pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Pairs the files of two folders by name, whatever their suffixes.

    Raises:
        ValueError: If a folder is missing or empty, or a file has no partner or two.
    """
    of_images, of_labels = ({f.stem: f for f in list_images(d)} for d in (images, labels))
    for one, other, folder in ((of_images, of_labels, labels), (of_labels, of_images, images)):
        missing = sorted(one.keys() - other.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{folder}: must hold a partner of {one[missing[0]]}{more}, got none of that name"
            )
    return [(of_images[stem], of_labels[stem]) for stem in sorted(of_images)]


def load_samples(images: Path, labels: Path) -> list[Sample]:
    """Reads and checks all pairs of two folders.

    Raises:
        ValueError: One line that names the file: see :func:`find_pairs`, `read_image` and
            `read_labels`; also if an image and its labels differ in size, or images in channels.
    """
    samples: list[Sample] = []
    for image_path, label_path in find_pairs(images, labels):
        image, label = read_image(image_path), read_labels(label_path)
        if image.shape[1:] != label.shape:
            raise ValueError(
                f"{label_path}: must have the size of {image_path}, {_size(image.shape[1:])}, "
                f"got {_size(label.shape)}"
            )
        samples.append(Sample(image_path.stem, image, label))
    grey = all(len(fit_channels(s.image, 1)) == 1 for s in samples)
    channels = 1 if grey else max(len(s.image) for s in samples)
    samples = [replace(s, image=fit_channels(s.image, channels)) for s in samples]
    for sample in samples:
        if len(sample.image) != channels:
            raise ValueError(
                f"{images}: images must have the same channels, got {channels} and, in "
                f"{sample.name}, {len(sample.image)}"
            )
    return samples


def normalise(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps the 1st percentile of each channel to 0 and the 99.8th to 1, linearly beyond.

    Args:
        image: (C, H, W). Where the percentiles are equal (a few bright pixels on black), smallest
            and largest value take their place; a channel of one value becomes 0.
    """
    low, high = np.percentile(image, [LOW, HIGH], axis=(1, 2), keepdims=True)
    flat = low == high
    low = np.where(flat, image.min((1, 2), keepdims=True), low)
    high = np.where(flat, image.max((1, 2), keepdims=True), high)
    scale = np.where(high > low, high - low, 1)
    result: NDArray[np.float32] = ((image - low) / scale).astype(np.float32)
    return result


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"
