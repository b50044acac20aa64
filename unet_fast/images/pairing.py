"""Pairs images with their labels by name."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .._progress import counted
from .annotations import OUTLINES, Tell, is_outlines, silent
from .folders import SUFFIXES, contents, find_files, left_out, name_of, outside, unique, unpaired

_LABELS = re.compile(
    r"[ _.-]?(cp[ _-]?)?(masks?|labels?|seg|segmentations?|instances?|objects?|annotations?|"
    r"ground[ _-]?truth|gt|class(es)?|rois?|roi[ _-]?set)$",
    re.IGNORECASE,
)
_IMAGES = re.compile(r"[ _.-](images?|img|im|raw|original|orig)$", re.IGNORECASE)
"""What programs add to a name, for labels and for the image."""


UNKNOWN = 2**31 - 1
"""Value of pixels that do not count, in labels whose background is not 0."""


def check_axes(axes: str | None) -> None:
    """Raises ValueError if axes that were given for images are no such letters."""
    if axes is None:
        return
    letters = set(axes)
    if not set("YX") <= letters <= set("TZCYX") or len(letters) < len(axes):
        raise ValueError(
            f"axes must be letters of TZCYX, each once, Y and X among them, got {axes!r}"
        )
    if axes.index("X") < axes.index("Y"):
        raise ValueError(f"axes must have Y (rows) before X (columns), got {axes!r}")


def ratio_of(name: Path | str, size: tuple[float, ...] | None) -> tuple[float, ...]:
    """Returns sizes of a voxel along each axis in units of that along X, to three digits.

    Raises:
        ValueError: If the sizes are not known; one line that names the file.
    """
    if size is None:
        raise ValueError(
            f"{name}: the size of its voxels must be known, got none in the file (--voxel-size Z Y "
            "X in micrometres; 1 1 1 if voxels are as deep as wide)"
        )
    return tuple(float(f"{x / size[-1]:.3g}") for x in size)


@dataclass(frozen=True)
class Reading:
    """How images and labels are found and read; settings of the same names as in training."""

    label_suffix: str | None = None
    """What names of labels have behind the name of the image, as _mask in a_mask.png; else found.
    """
    recursive: bool = False
    """Take files of nested folders, too; names are then paths below the folder."""
    skip_unlabelled: bool = False
    """Leave out images without labels."""
    axes: str | None = None
    """Axes of images whose files do not say, as ZYX (planes, or depth) or CYX (channels)."""
    dims: Literal[2, 3] = 2
    """2: each plane is an image, also of a stack; 3: stacks along Z are volumes."""
    voxel_size: tuple[float, ...] | None = None
    """Micrometres along Z, Y and X, for volumes whose files do not say; 1 1 1: as deep as wide."""
    ignore_label: int | None = None
    """Label of pixels that do not count, as those that nobody looked at."""
    background_label: int | None = None
    """Label of the background, if that is not 0; ignore_label may be 0 then."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_axes(self.axes)
        if self.dims not in (2, 3):
            raise ValueError(f"dims must be 2 or 3, got {self.dims}")
        size = self.voxel_size
        if size is not None and (len(size) != 3 or not all(0 < x < math.inf for x in size)):
            raise ValueError(f"voxel_size must be three sizes > 0, along Z, Y and X, got {size}")
        if size is not None and self.dims == 2:
            raise ValueError(f"voxel_size must go with dims 3, got {size} with dims 2")
        marked = {"ignore_label": self.ignore_label, "background_label": self.background_label}
        for name, value in marked.items():
            if value is not None and not 0 <= value < UNKNOWN:
                raise ValueError(f"{name} must be in [0, {UNKNOWN - 1}], got {value}")
        if self.ignore_label == (self.background_label or 0):
            raise ValueError(
                f"ignore_label must not be that of the background, got {self.ignore_label} "
                "(background_label says which value is background)"
            )

    @property
    def ignored(self) -> int | None:
        """The value of pixels that do not count, in labels as :meth:`marked` returns them."""
        if self.ignore_label is None or not self.background_label:
            return self.ignore_label
        return UNKNOWN

    def marked(self, file: Path, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Returns labels in which background is 0, and pixels that do not count are `ignored`.

        Raises:
            ValueError: If 0 is neither background nor ignored; one line that names the file.
        """
        if not self.background_label:
            return labels
        if self.ignore_label != 0 and (labels == 0).any():
            raise ValueError(
                f"{file}: labels must hold no 0 with background_label {self.background_label} "
                "(--ignore-label 0 says that such pixels do not count)"
            )
        result = np.where(labels == self.background_label, np.int32(0), labels)
        result[labels == self.ignore_label] = UNKNOWN
        return result


@dataclass(frozen=True)
class Pair:
    """An image and its labels."""

    name: str
    """Path of the image below its folder, without suffixes."""
    image: Path
    labels: Path


@dataclass(frozen=True)
class Pairs:
    """The files of two folders."""

    pairs: list[Pair]
    """By name."""
    unlabelled: list[Path]
    """Images without labels, unless these are left out."""
    strays: list[Path]
    """Labels without an image."""
    notes: list[str]
    """What names told, a line each."""
    left_out: list[str]
    """What is not read, and what to do about it, a line for each format."""
    hint: str
    """How to pair files without a partner: with --label-suffix, and its value if one is clear."""


def match(images: Path, labels: Path, reading: Reading | None = None) -> Pairs:
    """Pairs the files of two folders by name, whatever their suffixes.

    Names of labels may add something to the name of the image, as a_mask.png to a.tif: what most
    of them add is found. Where they do, images and labels may be in one folder.

    Args:
        images: Folder of images.
        labels: Folder of labels.
        reading: How to find them; None: as by default.

    Raises:
        ValueError: If a folder is missing or empty, two names differ in suffix only, or no label
            has the suffix that was asked for.
    """
    reading = reading or Reading()
    nested, suffix = reading.recursive, reading.label_suffix
    image_files = find_files(images, recursive=nested)
    label_files = find_files(labels, SUFFIXES + OUTLINES, recursive=nested)
    same = images.samefile(labels)
    label_files = labels_among(labels, label_files, same)
    if not same:  # one folder may lie within the other
        image_files = outside(image_files, labels, of=images)
        label_files = outside(label_files, images, of=labels)
    same = same and not any(map(is_outlines, label_files))
    named, drawn = unique(images, image_files), unique(labels, label_files)
    check_suffix(labels, drawn, suffix)
    image_end, label_end = common_ends(named, drawn, suffix, same)
    if same:
        drawn = {n: file for n, file in drawn.items() if label_end and n.endswith(label_end)}
        named = {n: file for n, file in named.items() if n not in drawn}
    of_images, other_images = by_base(named, image_end)
    of_labels, other_labels = by_base(drawn, label_end)
    unlabelled = sorted([*unpaired(of_images, of_labels), *other_images])
    strays = [*unpaired(of_labels, of_images), *(other_labels if suffix is None else ())]
    strays = sorted(f for f in strays if f.suffix.lower() not in (".zip", ".json"))  # may be others
    notes = []
    if suffix is None and (image_end or label_end):
        notes.append(taken_to_be(image_end, label_end))
    if reading.skip_unlabelled and unlabelled:
        notes.append(f"images without labels, left out: {len(unlabelled)} of {len(named)}")
        unlabelled = []
    both = sorted(of_images.keys() & of_labels.keys())
    pairs = [Pair(name_of(images, of_images[x]), of_images[x], of_labels[x]) for x in both]
    skipped = [
        text
        for folder in dict.fromkeys((images, labels))
        for text in left_out(folder, contents(folder, recursive=nested))
    ]
    hint = SUFFIX_HINT
    if suffix is None and (strays or len(pairs) < len(named)):
        hint = suffix_hint(named, named if same else drawn, len(pairs))
    return Pairs(pairs, unlabelled, strays, notes, skipped, hint)


def labels_among(folder: Path, files: Sequence[Path], same: bool) -> list[Path]:
    """Returns those files of a folder that are labels, as far as their suffixes tell.

    Args:
        folder: The folder.
        files: Its pictures and outlines.
        same: Whether it holds the images, too: outlines of such names are their labels.
    """
    pictures = {name_of(folder, f) for f in files if not is_outlines(f)}
    if not same:  # other programs store JSON beside a picture
        return [
            f for f in files if f.suffix.lower() != ".json" or name_of(folder, f) not in pictures
        ]
    drawings = [
        f
        for f in files
        if is_outlines(f)
        and f.suffix.lower() != ".json"
        and any(base in pictures for base, _ in _splits(name_of(folder, f), _LABELS))
    ]
    return drawings or [f for f in files if not is_outlines(f)]


def find_labels(
    labels: Path, images: Path | None, reading: Reading, tell: Tell = silent
) -> dict[str, tuple[Path, Path | None]]:
    """Finds labels, and their images if these are given or in the same folder.

    Args:
        labels: Folder of labels, or one file.
        images: Folder of images, or one file; None: only outlines need them.
        reading: How to find and pair them.
        tell: Gets a line for what names told, and for what is left out.

    Returns:
        The files of labels and image by the name of the labels, which is a path below their folder.

    Raises:
        ValueError: As :func:`find_pairs`.
    """
    if labels.is_file() and (images is None or images.is_file()):
        return {name_of(labels, labels): (labels, images)}
    files = find_files(labels, SUFFIXES + OUTLINES, recursive=reading.recursive)
    files = labels_among(labels, files, same=False)
    pictures = [f for f in files if not is_outlines(f)]
    if images is None and pictures and labels_among(labels, files, same=True) != pictures:
        images = labels
    if images is not None:
        pairs = find_pairs(images, labels, reading)
        for text in [*pairs.notes, *pairs.left_out]:
            tell(text)
        return {name_of(labels, x.labels): (x.labels, x.image) for x in pairs.pairs}
    named = unique(labels, files)
    check_suffix(labels, named, reading.label_suffix)
    end = reading.label_suffix or end_among_images(named)
    for text in [
        *([taken_to_be("", end)] if end and not reading.label_suffix else []),
        *left_out(labels, contents(labels, recursive=reading.recursive)),
    ]:
        tell(text)
    return {name: (file, None) for name, file in named.items() if name.endswith(end)}


def end_among_images(names: Iterable[str]) -> str:
    """Finds what names of labels have behind those of images in the same folder.

    It is "" where less than half of the names have it: these are labels of other images.
    """
    names = [*names]
    end = common_ends(names, names, same=True)[1]
    return end if 2 * sum(name.endswith(end) for name in names) >= len(names) else ""


def taken_to_be(image_end: str, label_end: str) -> str:
    """Says what was found that names have."""
    return (
        f"labels of NAME{image_end} are taken to be NAME{label_end}: --label-suffix says otherwise"
    )


def check_suffix(folder: Path, names: Iterable[str], suffix: str | None) -> None:
    """Raises ValueError if no name of labels has the suffix that was asked for."""
    names = [*names]
    if suffix is not None and not any(name.endswith(suffix) for name in names):
        raise ValueError(
            f"{folder}: names of labels must end in {suffix!r}, the label suffix, before .png or "
            f".tif, got {', '.join(names[:3])}"
        )


def find_pairs(images: Path, labels: Path, reading: Reading | None = None) -> Pairs:
    """Pairs the files of two folders as :func:`match`, all of them.

    Raises:
        ValueError: As there; or if a file has no partner; one line that names it.
    """
    found = match(images, labels, reading)
    for missing, folder, hint in (
        (found.unlabelled, labels, "--skip-unlabelled leaves such images out, "),
        (found.strays, images, ""),
    ):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{folder}: must hold a partner of {missing[0]}{more}, got none of that name "
                f"({hint}{found.hint})"
            )
    if not found.pairs:
        raise ValueError(
            f"{labels}: must hold labels of the images in {images}, got none ({found.hint})"
        )
    return found


def common_ends(
    images: Iterable[str], labels: Iterable[str], suffix: str | None = None, same: bool = False
) -> tuple[str, str]:
    """Finds what most names of images, and of their labels, have behind a common name.

    Args:
        images: Names of images.
        labels: Names of labels.
        suffix: What names of labels have; None: it is to be found.
        same: Whether labels are among the images.
    """
    ends_of: dict[str, list[str]] = {}
    for name in images:
        for base, end in _splits(name, _IMAGES):
            ends_of.setdefault(base, []).append(end)
    counts = Counter({("", suffix or ""): 0})  # this one, if no other pairs more
    for name in labels:
        splits = _splits(name, _LABELS)
        if suffix is not None:
            splits = [(name.removesuffix(suffix), suffix)] if name.endswith(suffix) else []
        for base, end in splits:
            counts.update((other, end) for other in ends_of.get(base, ()) if not same or end)
    # Beside as many names with a mark, those without are images in the folder of the labels.
    return max(counts, key=lambda ends: (counts[ends], bool(ends[1])))


SUFFIX_HINT = "--label-suffix says how names of labels end"


def suffix_hint(images: Iterable[str], labels: Iterable[str], paired: int = 0) -> str:
    """Says which label suffix pairs at least half of the images, or that there is such an option.

    Args:
        images: Names of images, and of labels where both are in one folder.
        labels: Names of labels.
        paired: Number of images that are paired without it.
    """
    known = {*images}
    if any(name.rpartition("/")[0] in known for name in labels):
        return "a folder of masks for each image: number their objects in one label image"
    counts = Counter(
        name[i:]
        for name in labels
        for i in range(1, len(name))
        if name[:i] in known and not name[i:].lstrip(" _.-").isdecimal()  # 1_0 is no label of 1
    )
    for end, count in counts.most_common(1):
        others = known - {name + end for name in known}  # labels may be in the same folder
        if count > paired and 2 * count >= len(others):
            return f"--label-suffix {shlex.quote(end)} pairs {counted(count, 'image')}"
    return SUFFIX_HINT


def _splits(name: str, mark: re.Pattern[str]) -> list[tuple[str, str]]:
    """Splits a name into what may be common, and its end."""
    found = mark.search(name)
    return [(name, "")] + ([(name[: found.start()], found.group())] if found else [])


def by_base(named: dict[str, Path], end: str) -> tuple[dict[str, Path], list[Path]]:
    """Returns the files whose names have an end, by what is before it, and the others."""
    fitting = {n.removesuffix(end): file for n, file in named.items() if n.endswith(end)}
    return fitting, [file for n, file in named.items() if not n.endswith(end)]
