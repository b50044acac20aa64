"""Looks at samples that were read, for what makes a network learn something else than was meant."""

import hashlib
import warnings
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .._progress import counted
from ..images.signs import (
    INTERPOLATED,
    Background,
    cut_by_edges,
    flatness,
    hollow,
    ids_of,
    interpolated,
    merged_parts,
    misplaced,
    parts_of,
    restarted,
    thin,
    unlabelled,
)
from ..unet import UNet
from .findings import Report
from .samples import NumberedLabels, Sample

NEIGHBOURS = 4
"""Images before and behind one, in the order of names, whose labels may be taken for its own."""


def planar(samples: list[Sample], ignore_label: int | None) -> list[Sample]:
    """Returns samples of one plane: of a volume, the one across Z that holds the most objects."""
    planes = []
    for sample in samples:
        if sample.labels.ndim == 3:
            inside = (sample.labels != 0) & (sample.labels != ignore_label)
            z = int(inside.sum((1, 2)).argmax())
            kinds = None if sample.classes is None else sample.classes[z]
            image, labels = sample.image[:, z], sample.labels[z]
            sample = replace(sample, image=image, labels=labels, classes=kinds)
        planes.append(sample)
    return planes


def warn_of(
    samples: list[Sample], *, validated: bool, label_type: str, ignore_label: int | None
) -> None:
    """Warns before training of what makes it useless; `check` looks at much more.

    Args:
        samples: The samples.
        validated: Whether some are to be kept for validation.
        label_type: "instances" or "semantic".
        ignore_label: Value of pixels that do not count, or None.

    Raises:
        ValueError: If images and labels seem to be swapped.
    """
    report = Report()
    if validated:
        look_at_number(samples, report)
    look_at_background(samples, ignore_label, report)
    look_at_planes(samples, ignore_label, report)
    instances = label_type == "instances" and samples[0].classes is None
    if instances:
        look_at_numbers(samples, ignore_label, report)
    samples = planar(samples, ignore_label)
    if look_at_order(samples, report):
        raise ValueError(report.findings[-1][1])
    look_at_edges(samples, report)
    look_at_places(samples, report)
    if instances:
        look_at_mixture(samples, ignore_label, report)
    for _, text in report.findings:
        warnings.warn(text, stacklevel=2)


def look_at_number(samples: list[Sample], report: Report) -> None:
    """Reports that an image is alone."""
    if len(samples) == 1:
        report.add(
            "warning",
            "one image only: none is left for validation, so no model is chosen as the best; "
            "annotate a second one, or say --validation 0",
        )


def look_at_order(samples: list[Sample], report: Report) -> bool:
    """Reports images and labels that are swapped; returns whether they are."""
    # Photographs change from pixel to pixel.
    of_images = np.median([flatness(s.image[0]) for s in samples])
    of_labels = np.median([flatness(s.labels) for s in samples])
    swapped = bool(of_images > 0.9 and of_labels < of_images - 0.1)
    if swapped:
        report.add(
            "error",
            "the labels look like photographs and the images like labels: did you swap the two "
            "folders?",
        )
    return swapped


def look_at_images(samples: list[Sample], report: Report) -> None:
    """Reports images without contrast, saturated ones and copies, and the intensities."""
    if not samples:
        return
    flat = [s.name for s in samples if any(np.ptp(channel) == 0 for channel in s.image)]
    if flat:
        report.add("warning", "images with a channel of one value only", flat)
    lows, mids, highs = np.array(
        [np.percentile(s.image, [0, 50, 100]) for s in samples], dtype=np.float64
    ).T
    report.add(
        "note",
        f"intensities from {lows.min():g} to {highs.max():g}, medians from {mids.min():g} to "
        f"{mids.max():g}, {counted(len(samples[0].image), 'channel')}; each image is scaled by its "
        "percentiles",
    )
    top = highs.max()
    cut = [s.name for s in samples if top in (255, 4095, 65535) and (s.image == top).mean() > 0.05]
    if cut:
        report.add("warning", "images in which over 5 % of the pixels are saturated", cut)
    seen: dict[bytes, str] = {}
    for sample in samples:
        digest = hashlib.sha256(np.ascontiguousarray(sample.image).tobytes()).digest()
        if digest in seen:
            report.add("warning", "copies of one image", [seen[digest], sample.name])
        seen.setdefault(digest, sample.name)


def look_at_edges(samples: list[Sample], report: Report) -> None:
    """Reports labels that were resized as photographs are, or once saved as JPEG."""
    blurred = [s.name for s in samples if interpolated(s.labels)]
    if blurred:
        report.add("warning", f"labels {INTERPOLATED}", blurred)


def look_at_background(samples: list[Sample], ignore_label: int | None, report: Report) -> None:
    """Reports labels in which something else than 0 looks like the background."""
    background = Background(ignore_label)
    for sample in samples:
        background.look(sample.labels)
    for text in background.doubts():
        report.add("warning", text)


def look_at_planes(samples: list[Sample], ignore_label: int | None, report: Report) -> None:
    """Reports volumes most planes of which hold no object, as if nobody had looked at them."""
    empty: list[str] = []
    for sample in samples if ignore_label is None else ():
        planes = (sample.labels != 0).any((1, 2)) if sample.labels.ndim == 3 else np.ones(1, bool)
        if planes.any() and 2 * planes.sum() < len(planes):
            empty.append(f"{sample.name} ({len(planes) - planes.sum()} of {len(planes)})")
    if empty:
        report.add(
            "warning",
            "most planes hold no object and count as background; if nobody looked at them: "
            "--ignore-label 0, and --background-label V with a value for the background of the "
            "others (docs/volumes.md)",
            empty,
        )


def look_at_numbers(samples: list[Sample], ignore_label: int | None, report: Report) -> None:
    """Reports volumes whose objects have another number in each plane."""
    volumes = (s for s in samples if s.labels.ndim == 3)
    found = [s.name for s in volumes if restarted(s.labels, ignore_label)]
    if found:
        report.add(
            "warning",
            "objects seem to be numbered anew in each plane; one needs the same number in all of "
            "its planes (if each plane is an image of its own: --dims 2)",
            found,
        )


def look_at_places(samples: list[Sample], report: Report) -> None:
    """Reports labels that lie where the objects of another image are, or are flipped."""
    wrong = []
    for i, sample in enumerate(samples):
        others = [s.labels for s in samples[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1]]
        if misplaced(sample.image.mean(0), sample.labels, others):
            wrong.append(sample.name)
    if wrong:
        report.add(
            "warning",
            "labels lie beside the objects; those of another image, or flipped ones, fit better",
            wrong,
        )


def look_at_mixture(samples: list[Sample], ignore_label: int | None, report: Report) -> None:
    """Reports masks among files of numbered objects."""
    alone = [s for s in samples if len(ids_of(s.labels, ignore_label)) == 1]
    masks = [s.name for s in alone if max(parts_of(s.labels, ignore_label).values()) > 1]
    if masks and len(alone) < len(samples):
        report.add(
            "warning",
            "masks among files that number their objects: all of a mask would count as a single "
            "object; number them (unet_fast.label_components)",
            masks,
        )


def look_at_labels(
    samples: list[Sample], kind: str, automatic: bool, ignore_label: int | None, report: Report
) -> None:
    """Reports labels that are empty, merged, in parts or no objects."""
    empty = [s.name for s in samples if not ids_of(s.labels, ignore_label).size]
    if len(empty) == len(samples):  # number_objects refuses them
        return
    if empty:
        report.add("warning", f"{counted(len(empty), 'label file')} without objects", empty)
    if kind == "semantic":
        _look_at_mask(samples, automatic, ignore_label, report)
    elif samples[0].classes is None:
        look_at_mixture(samples, ignore_label, report)
        look_at_numbers(samples, ignore_label, report)
        # Of a volume only some planes may be labelled, which part its objects.
        if ignore_label is None or samples[0].labels.ndim == 2:
            _look_at_instances(samples, ignore_label, report)


def _look_at_mask(
    samples: list[Sample], automatic: bool, ignore_label: int | None, report: Report
) -> None:
    values = sorted({v for s in samples for v in np.unique(s.labels).tolist()} - {ignore_label})
    if automatic:
        report.add(
            "note",
            f"masks: {values} are the only values; connected parts are taken as objects "
            "(label_type semantic)",
        )
    merged = {s.name: sum(merged_parts(s.labels == v) for v in values[1:]) for s in samples}
    several = [f"{name} ({count})" for name, count in merged.items() if count]
    if several:
        report.add(
            "warning",
            "parts of masks that look like several objects that touch, "
            f"{sum(merged.values())} in all; as one object no weight map can part them: draw a "
            "gap, or number the objects (unet_fast.label_components numbers those that do not "
            "touch)",
            several,
        )


def _look_at_instances(samples: list[Sample], ignore_label: int | None, report: Report) -> None:
    parted: list[str] = []
    ids_in: dict[int, int] = {}
    recurring = 0
    for sample in samples:
        parts = parts_of(sample.labels, ignore_label)
        count = sum(n > 1 for n in parts.values())
        if count:
            parted.append(f"{sample.name} ({count})")
        recurring += sum(n > 2 for n in parts.values())
        for value in parts:
            ids_in[value] = ids_in.get(value, 0) + 1
    total = sum(ids_in.values())
    if len(ids_in) <= 20 and recurring > 0.5 * total:
        report.add(
            "warning",
            f"values {sorted(ids_in)} recur, each in many parts: if they are classes, not objects, "
            "use label_type semantic, which takes connected parts as objects",
        )
    elif parted:
        report.add("warning", "objects in several parts (how many of them)", parted)


def look_at_balance(
    samples: list[Sample], objects: NumberedLabels, ignore_label: int | None, report: Report
) -> None:
    """Reports the share of each class, and the diameter of the objects."""
    counts = np.zeros(256, np.int64)
    widths: list[float] = []
    unknown: list[str] = []
    axes = samples[0].labels.ndim
    for sample, ids in zip(samples, objects.labels, strict=True):
        kinds = _kinds(ids, objects, ignore_label)
        of_kinds = np.bincount(kinds.ravel(), minlength=256)
        counts += of_kinds
        if of_kinds[255] == kinds.size:
            unknown.append(sample.name)
        _, sizes = np.unique(ids[(kinds > 0) & (kinds < 255)], return_counts=True)
        ball = np.pi / (4 if axes == 2 else 6)
        widths += ((sizes / ball) ** (1 / axes)).tolist()
    shares = counts[: objects.num_classes] / max(1, counts[:255].sum())
    names = objects.class_values or [0, 1]
    text = ", ".join(f"{v}: {100 * s:.1f} %" for v, s in zip(names, shares, strict=True))
    diameter = float(np.median(widths)) if widths else 0.0
    across = f", median diameter {diameter:.0f} px"
    if axes == 3 and counts[255]:  # of objects only some planes are known
        across = ""
    kind = "image" if axes == 2 else "volume"
    report.add(
        "note",
        f"{counted(len(samples), kind)}, {counted(len(widths), 'object')}{across}; pixels by "
        f"class: {text}",
    )
    if counts[255]:
        known = int(counts.sum() - counts[255])
        report.add(
            "note",
            f"{100 * counts[255] / counts.sum():.1f} % of the pixels are ignored, {known:,} count",
        )
    if unknown:
        report.add("warning", f"{kind}s without a pixel that counts", unknown)
    for value, share in zip(names, shares, strict=True):
        if share < 0.01:
            report.add("warning", f"class {value} has only {100 * share:.2f} % of the pixels")
    if diameter > 188:
        report.add(
            "warning",
            f"half of the objects are wider than {diameter:.0f} px, more than a network of depth 4 "
            "sees around a pixel (188 px): scale the images down",
        )


def _kinds(
    ids: NDArray[np.int32], objects: NumberedLabels, ignore_label: int | None
) -> NDArray[np.uint8]:
    """Returns the class of every pixel, 255 where it is ignored."""
    if objects.table is not None:
        return objects.table[ids]
    kinds = (ids > 0).astype(np.uint8)
    if ignore_label is not None:
        kinds[ids == ignore_label] = 255
    return kinds


def look_at_objects(
    samples: list[Sample], objects: NumberedLabels, ignore_label: int | None, report: Report
) -> None:
    """Reports objects without label, outlines, and objects that edges cut."""
    missing: dict[str, int] = {}
    cut, outlined, total = 0, 0, 0
    for sample, ids in zip(samples, objects.labels, strict=True):
        kinds = _kinds(ids, objects, ignore_label)
        labels = np.where((kinds > 0) & (kinds < 255), ids, 0)
        at_edge, count = cut_by_edges(labels)
        cut, total = cut + at_edge, total + count
        outlined += max(hollow(labels)[0], thin(labels))
        found = unlabelled(sample.image, labels, kinds == 255)
        if found:
            missing[sample.name] = found
    if sum(missing.values()) > total / 3:
        report.add(
            "warning",
            f"{counted(sum(missing.values()), 'place')} as bright or dark as the "
            f"{counted(total, 'object')}, but without label, which would be learned as background: "
            "label all objects of an image, or give what you did not look at a value of its own, "
            "and name it by --ignore-label",
            [f"{name} ({count})" for name, count in missing.items()],
        )
    if outlined > total / 2:
        report.add(
            "warning",
            f"{outlined} of {counted(total, 'object')} are thin outlines: fill them, if the inside "
            "belongs to the objects (Fiji: Process, Binary, Fill Holes)",
        )
    if cut > total * 2 / 3:
        report.add(
            "warning",
            f"{cut} of {counted(total, 'object')} are cut by the edges of the images: sizes and "
            "scores count their parts as objects; annotate larger images",
        )


def look_at_sizes(samples: list[Sample], width: float, tile: int, report: Report) -> None:
    """Reports objects that are wider than a tile, and images that are too small."""
    if width > tile:
        report.add(
            "warning",
            f"a tenth of the objects are wider than {width:.0f} px, more than a tile shows "
            f"({tile} px): scale the images down",
        )
    smallest = UNet(base_channels=1).input_shape((1, 1))[0]
    small = [s.name for s in samples if min(s.labels.shape) < smallest]
    if small:
        report.add(
            "warning",
            f"{counted(len(small), 'image')} smaller than {smallest} px, the smallest tile of a "
            "network of depth 4: most of what it sees is mirrored; a smaller depth needs less",
            small,
        )


def look_at_scale(
    samples: list[Sample], width: float, tile: tuple[int, ...], report: Report
) -> None:
    """Reports objects that are wider in a plane than a tile of a volume, and voxels that fit."""
    times = width / min(tile[1:])
    if times > 1:
        depth, *across = samples[0].spacing or (1.0, 1.0, 1.0)
        fit = [x * times for x in across]
        sizes = " x ".join(f"{x:.2g}" for x in (max(depth, *fit), *fit))
        report.add(
            "warning",
            f"objects are about {width:.0f} px wide in a plane, more than a tile: scale the "
            f"volumes down, to voxels of about {sizes} um (Z, Y, X)",
        )
