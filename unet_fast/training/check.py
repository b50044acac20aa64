"""Checks images and labels before training, and reports what is wrong with them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from .._device import find_device
from ..images.files import is_lossy, is_palette, read_image, read_labels
from ..images.folders import check_size, find_pairs, label_type_of, list_images, unpaired
from ..plots import draw_samples, outlines
from ..unet import UNet
from ..weights import BorderWeights
from .config import STEPS, TrainConfig
from .samples import NumberedLabels, Sample, fit_all_channels, number_objects
from .tiles import Dataset

Level = Literal["error", "warning", "note"]
_Ids = NDArray[np.int32]


@dataclass
class Report:
    """The findings of :func:`check_data`."""

    findings: list[tuple[Level, str]] = field(default_factory=list)
    """Errors, which training would refuse; warnings, which it would not; notes."""
    suggestion: TrainConfig | None = None
    """Settings that fit; None where there are errors."""

    def add(self, level: Level, text: str, files: Iterable[Path | str] = ()) -> None:
        """Adds a finding, with the names of its files."""
        names = [f.name if isinstance(f, Path) else f for f in files]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        self.findings.append((level, text + (": " + ", ".join(names[:5]) + more if names else "")))

    def exit_code(self, strict: bool) -> int:
        """Returns 0: fine; 1: warnings, if `strict`; 2: training would refuse."""
        levels = {level for level, _ in self.findings}
        return 2 if "error" in levels else int(strict and "warning" in levels)


def check_data(
    images: Path,
    labels: Path,
    *,
    out: Path,
    classes: Path | None = None,
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    ignore_label: int | None = None,
    picture: Path | None = None,
) -> Report:
    """Checks for anything that makes training fail or end in a useless network.

    Looks at pairing of files, sizes, masks of 0 and 255, palettes, colours, floats, interpolated or
    empty labels, class maps taken for instances, touching objects in a mask, objects in several
    parts, class balance, intensities, small images, copies of an image.

    Args:
        images: Folder of images.
        labels: Folder of labels of the same names.
        out: Folder that the suggested settings name for the run.
        classes: Folder of class maps, or None.
        label_type: As in :class:`TrainConfig`.
        ignore_label: Value of pixels that do not count, or None.
        picture: PNG to draw samples, outlines and weights into, if there are no errors; or None.

    Raises:
        ValueError: If a folder is missing or holds no images.
    """
    report = Report()
    files = _pairs(images, labels, report)
    samples = _read(files, report)
    if classes is not None:
        samples = _add_classes(samples, list_images(images), classes, report)
    samples = _fit_channels(samples, report)
    _look_at_images(samples, report)
    if not samples:
        report.add("error", "no pair of image and labels is left to train on")
        return report
    maps = [s.labels for s in samples]
    chosen = label_type
    if chosen == "auto":
        chosen = label_type_of([] if classes else maps, ignore_label)
    _look_at_labels(samples, chosen, label_type == "auto", ignore_label, report)
    try:
        objects = number_objects(samples, chosen, ignore_label)
    except ValueError as error:
        report.add("error", str(error))
        return report
    _look_at_balance(samples, objects, ignore_label, report)
    if report.exit_code(strict=False):
        return report
    weights = replace(BorderWeights.paper_2015(), ignore_label=ignore_label)
    config = TrainConfig(
        images, labels, out=out, steps=STEPS, classes=classes, label_type=chosen, weights=weights
    )
    shapes = [s.labels.shape for s in samples]
    report.suggestion = replace(config, **_fitting(shapes, config.device))
    _look_at_sizes(samples, report)
    if picture is not None:
        _draw(picture, samples, objects, weights)
    return report


def _pairs(images: Path, labels: Path, report: Report) -> list[tuple[Path, Path]]:
    of_images, of_labels = ({f.stem: f for f in list_images(d)} for d in (images, labels))
    for one, other, kind in ((of_images, of_labels, "labels"), (of_labels, of_images, "an image")):
        report_files = unpaired(one, other)
        if report_files:
            report.add("error", f"{len(report_files)} files without {kind}", report_files)
    return [(of_images[s], of_labels[s]) for s in sorted(of_images.keys() & of_labels.keys())]


def _read(files: Sequence[tuple[Path, Path]], report: Report) -> list[Sample]:
    """Reads what can be read, and reports the rest."""
    samples: list[Sample] = []
    for image_path, label_path in files:
        try:
            image, ids = read_image(image_path), read_labels(label_path)
            check_size(image_path, image.shape[1:], label_path, ids.shape)
        except ValueError as error:
            report.add("error", str(error))
            continue
        samples.append(Sample(image_path.stem, image, ids))
    paths = [label for _, label in files]
    palettes = [f for f in paths if is_palette(f)]
    if palettes:
        report.add("warning", "palette labels, read as the numbers of the palette", palettes)
    lossy = [f for f in paths if is_lossy(f)]
    if lossy:
        report.add("warning", "labels in JPEG, which changes their values", lossy)
    return samples


def _add_classes(
    samples: list[Sample], images: list[Path], classes: Path, report: Report
) -> list[Sample]:
    maps = {f.stem: f for f in list_images(classes)}
    missing = [s.name for s in samples if s.name not in maps]
    if missing:
        report.add("error", f"{len(missing)} images without a class map", missing)
    alone = sorted(maps.keys() - {file.stem for file in images})
    if alone:
        report.add("error", f"{len(alone)} class maps without an image", alone)
    result = []
    for sample in samples:
        if sample.name in maps:
            try:
                class_map = read_labels(maps[sample.name])
                check_size(
                    Path(sample.name), sample.labels.shape, maps[sample.name], class_map.shape
                )
            except ValueError as error:
                report.add("error", str(error))
                continue
            result.append(replace(sample, classes=class_map))
            odd = np.mean((class_map > 0) != (sample.labels > 0))
            if odd > 0.001:
                report.add(
                    "warning",
                    f"{100 * odd:.1f} % of the pixels have a class but no object, or the reverse; "
                    "they count as background",
                    [sample.name],
                )
    return result


def _fit_channels(samples: list[Sample], report: Report) -> list[Sample]:
    try:
        return fit_all_channels(samples)
    except ValueError as error:
        report.add("error", str(error))
        return samples


def _look_at_images(samples: list[Sample], report: Report) -> None:
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
        f"{mids.max():g}, {len(samples[0].image)} channel(s); each image is scaled by its "
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


def _look_at_labels(
    samples: list[Sample], kind: str, automatic: bool, ignore_label: int | None, report: Report
) -> None:
    empty = [s.name for s in samples if not _ids_of(s.labels, ignore_label).size]
    if len(empty) == len(samples):  # number_objects refuses them
        return
    if empty:
        report.add("warning", f"{len(empty)} label files are empty", empty)
    blurred = [s.name for s in samples if interpolated(s.labels)]
    if blurred:
        report.add(
            "warning",
            "labels look interpolated: values in between lie along the edges; resize labels by "
            "nearest neighbour and save them without loss",
            blurred,
        )
    if kind == "semantic":
        _look_at_mask(samples, automatic, ignore_label, report)
    elif samples[0].classes is None:
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
            f"{sum(merged.values())} parts of masks look like several objects that touch; as one "
            "object no weight map can part them: draw a gap, or number the objects "
            "(unet_fast.label_components numbers those that do not touch)",
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


def _look_at_balance(
    samples: list[Sample], objects: NumberedLabels, ignore_label: int | None, report: Report
) -> None:
    counts = np.zeros(256, np.int64)
    sizes: list[int] = []
    for ids in objects.labels:
        if objects.table is None:
            kinds = (ids > 0).astype(np.uint8)
            if ignore_label is not None:
                kinds[ids == ignore_label] = 255
        else:
            kinds = objects.table[ids]
        counts += np.bincount(kinds.ravel(), minlength=256)
        _, areas = np.unique(ids[(kinds > 0) & (kinds < 255)], return_counts=True)
        sizes += areas.tolist()
    shares = counts[: objects.num_classes] / max(1, counts[:255].sum())
    names = objects.class_values or [0, 1]
    text = ", ".join(f"{v}: {100 * s:.1f} %" for v, s in zip(names, shares, strict=True))
    diameter = np.sqrt(np.median(sizes) * 4 / np.pi) if sizes else 0
    report.add(
        "note",
        f"{len(samples)} images, {len(sizes)} objects, median diameter {diameter:.0f} px; "
        f"pixels by class: {text}",
    )
    if counts[255]:
        report.add("note", f"{100 * counts[255] / counts.sum():.1f} % of the pixels are ignored")
    for value, share in zip(names, shares, strict=True):
        if share < 0.01:
            report.add("warning", f"class {value} has only {100 * share:.2f} % of the pixels")
    if diameter > 188:
        report.add(
            "warning",
            f"half of the objects are wider than {diameter:.0f} px, more than a network of depth 4 "
            "sees around a pixel (188 px): scale the images down",
        )


def _look_at_sizes(samples: list[Sample], report: Report) -> None:
    smallest = UNet(base_channels=1).input_shape((1,))[0]
    small = [s.name for s in samples if min(s.labels.shape) < smallest]
    if small:
        report.add(
            "warning",
            f"{len(small)} images are smaller than {smallest} px, the smallest tile of a network "
            "of depth 4: most of what it sees is mirrored; a smaller depth needs less",
            small,
        )


def suggested_settings(config: TrainConfig) -> dict[str, Any]:
    """Suggests settings that fit the sizes of the images, and the device.

    Args:
        config: Settings that name images, labels and device.

    Raises:
        ValueError: One line, if files cannot be paired or labels not be read.
    """
    pairs = find_pairs(config.images, config.labels)
    return _fitting([read_labels(label).shape for _, label in pairs], config.device)


def _fitting(shapes: Sequence[tuple[int, ...]], device: str) -> dict[str, Any]:
    gpu = find_device(device).type == "cuda"
    net = UNet(base_channels=1)
    side = int(np.median([min(shape) for shape in shapes]))
    largest = 388 if gpu else 196
    tile = min(largest, max(36, net.output_shape(net.input_shape((side,)))[0]))
    if tile > side:
        tile = max(20, tile - 16)
    # Adam ended better than the paper's SGD in short runs: docs/training.md.
    return {"tile": tile, "base_channels": 64 if gpu else 16, "optimizer": "adam"}


def _draw(
    picture: Path, samples: list[Sample], objects: NumberedLabels, weights: BorderWeights
) -> None:
    count = min(4, len(samples))
    chosen = [round(i * (len(samples) - 1) / max(1, count - 1)) for i in range(count)]
    data = Dataset(samples, objects, weights, torch.device("cpu"), float("inf"))
    data.balanced()
    panels = []
    for i in chosen:
        image, ids = data.sample(i)
        target, weight_map = data.targets(ids[None])
        kinds = data.classes(ids)
        shown = torch.where((kinds > 0) & (kinds < 255), ids, 0)
        panels.append(
            (
                data.names[i],
                image.mean(0).numpy(),
                shown.numpy(),
                target[0].numpy(),
                weight_map[0].numpy(),
            )
        )
    draw_samples(picture, panels)


def parts_of(labels: _Ids, ignore_label: int | None = None) -> dict[int, int]:
    """Returns the number of connected components (8 neighbours) of each object."""
    parts: dict[int, int] = {}
    for value, box in _boxes(labels, ignore_label):
        parts[value] = int(ndimage.label(labels[box] == value, np.ones((3, 3)))[1])
    return parts


def interpolated(labels: _Ids) -> bool:
    """Whether labels seem resized with interpolation: values in between lie along the edges.

    Such a pixel has no neighbour of its own value, but a smaller one on one side and a larger one
    on the other. A map of objects has few such pixels.
    """
    middle = labels[1:-1, 1:-1]
    if middle.size == 0:
        return False
    around = labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:]
    alone = np.all([middle != x for x in around], axis=0)
    between = [
        (np.minimum(a, b) < middle) & (middle < np.maximum(a, b))
        for a, b in (around[:2], around[2:])
    ]
    count = np.count_nonzero(alone & (between[0] | between[1]) & (middle > 0))
    return bool(count > max(10, 0.05 * np.count_nonzero(outlines(labels))))


def merged_parts(mask: NDArray[np.bool_]) -> int:
    """Counts the connected components of a mask with several thick places and thin ones between."""
    parts, count = ndimage.label(mask)
    if count == 0:
        return 0
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    most = ndimage.maximum(depth, parts, np.arange(count + 1))
    most[0] = 0
    cores, cores_count = ndimage.label(mask & (depth > 0.6 * most[parts]) & (most[parts] >= 3))
    if cores_count == 0:
        return 0
    owner = ndimage.maximum(parts, cores, np.arange(1, cores_count + 1)).astype(int)
    return int(np.count_nonzero(np.bincount(owner) > 1))


def _ids_of(labels: _Ids, ignore_label: int | None) -> NDArray[np.int32]:
    values = np.unique(labels)
    kept: NDArray[np.int32] = values[(values != 0) & (values != ignore_label)]
    return kept


def _boxes(labels: _Ids, ignore_label: int | None) -> list[tuple[int, tuple[slice, ...]]]:
    """Returns each object's value and bounding box."""
    values, dense = np.unique(labels, return_inverse=True)
    boxes = ndimage.find_objects(dense.reshape(labels.shape) + 1)
    pairs = zip(values.tolist(), boxes, strict=True)
    return [(v, box) for v, box in pairs if v not in (0, ignore_label)]
