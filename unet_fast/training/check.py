"""Checks images and labels before training, and reports what is wrong with them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .._progress import counted
from ..images.files import is_lossy, is_palette
from ..images.folders import label_type_of
from ..images.pairing import SUFFIX_HINT, Pair, Reading, match
from ..plots import draw_samples
from ..weights import BorderWeights
from .config import STEPS, TrainConfig
from .findings import Report
from .looks import (
    look_at_background,
    look_at_balance,
    look_at_edges,
    look_at_images,
    look_at_labels,
    look_at_number,
    look_at_objects,
    look_at_order,
    look_at_places,
    look_at_planes,
    look_at_scale,
    look_at_sizes,
    planar,
)
from .samples import (
    NumberedLabels,
    Sample,
    add_classes,
    fit_all_channels,
    number_objects,
    read_pair,
)
from .suggest import fitting, width_of
from .tiles import Dataset
from .volumes import said_of_volumes, with_voxels


def check_data(
    images: Path,
    labels: Path,
    *,
    out: Path,
    classes: Path | None = None,
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    reading: Reading | None = None,
    picture: Path | None = None,
) -> Report:
    """Checks for anything that makes training fail or end in a useless network.

    Looks at pairing of files, sizes, masks of 0 and 255, inverted ones, palettes, colours, floats,
    interpolated or empty labels, class maps taken for instances, touching objects in a mask,
    objects in several parts, swapped folders, objects without label, outlines, objects cut by
    edges, class balance, intensities, small images, copies of an image.

    Args:
        images: Folder of images.
        labels: Folder of labels of the same names.
        out: Folder that the suggested settings name for the run.
        classes: Folder of class maps, or None.
        label_type: As in :class:`TrainConfig`.
        reading: How files are found, paired and read; None: as by default.
        picture: PNG to draw samples, outlines and weights into, if there are no errors; or None.

    Raises:
        ValueError: If a folder is missing or holds no images.
    """
    report = Report()
    reading = reading or Reading()
    ignore_label = reading.ignored
    files = _pairs(images, labels, reading, report)
    samples = _read(files, reading, report)
    if classes is not None:
        samples = _add_classes(samples, images, classes, reading, report)
    samples = _fit_channels(samples, report)
    planes = planar(samples, ignore_label)
    look_at_images(planes, report)
    if not samples:
        report.add("error", "no pair of image and labels is left to train on")
        return report
    look_at_number(samples, report)
    if look_at_order(planes, report):
        return report
    maps = [s.labels for s in samples]
    chosen = label_type
    if chosen == "auto":
        chosen = label_type_of([] if classes else maps, ignore_label)
    look_at_edges(planes, report)
    look_at_background(samples, ignore_label, report)
    look_at_planes(samples, ignore_label, report)
    look_at_places(planes, report)
    look_at_labels(samples, chosen, label_type == "auto", ignore_label, report)
    try:
        objects = number_objects(samples, chosen, ignore_label)
    except ValueError as error:
        report.add("error", str(error))
        return report
    look_at_balance(samples, objects, ignore_label, report)
    numbered = [
        replace(sample, labels=ids) for sample, ids in zip(samples, objects.labels, strict=True)
    ]
    planes = planar(numbered, ignore_label)
    sections = replace(objects, labels=[s.labels for s in planes])
    look_at_objects(planes, sections, ignore_label, report)
    if report.exit_code(strict=False):
        return report
    config = TrainConfig(
        images,
        labels,
        out=out,
        steps=STEPS,
        classes=classes,
        label_type=chosen,
        **vars(reading),
    )
    shapes = [s.labels.shape for s in samples]
    width = width_of([s.labels for s in planes], chosen, ignore_label)
    try:
        config = with_voxels(replace(config, **fitting(shapes, width, config.device)), samples)
    except ValueError as error:
        report.add("error", str(error))
        return report
    report.suggestion = config
    if reading.dims == 2:
        look_at_sizes(planes, width, config.output_tile[-1], report)
    else:
        report.add("note", said_of_volumes(config, samples))
        look_at_scale(samples, width, config.output_tile, report)
    if picture is not None:
        weights = replace(config.weights, ignore_label=ignore_label)
        _draw(picture, samples, objects, weights)
    return report


def _pairs(images: Path, labels: Path, reading: Reading, report: Report) -> list[Pair]:
    found = match(images, labels, reading)
    if found.unlabelled:
        text = f"{counted(len(found.unlabelled), 'file')} without labels"
        hint = "--skip-unlabelled leaves such images out"
        hint += f", {found.hint}" if found.hint != SUFFIX_HINT else ""
        report.add("error", f"{text} ({hint})", found.unlabelled)
    if found.strays:
        report.add("error", f"{counted(len(found.strays), 'file')} without an image", found.strays)
    for text in found.notes:
        report.add("note", text)
    for text in found.left_out:
        report.add("warning", text)
    return found.pairs


def _read(pairs: Sequence[Pair], reading: Reading, report: Report) -> list[Sample]:
    """Reads what can be read, and reports the rest."""
    lossy = [pair.labels for pair in pairs if is_lossy(pair.labels)]
    if lossy:
        report.add(
            "error",
            "labels in JPEG, which changes their values: export them anew as PNG or TIFF (files "
            "converted from JPEG keep the errors)",
            lossy,
        )
    pairs = [pair for pair in pairs if pair.labels not in lossy]
    samples: list[Sample] = []
    told: dict[str, list[Path]] = {}
    for pair in pairs:
        said: list[str] = []
        try:
            planes = read_pair(pair, reading, said.append)
        except ValueError as error:
            report.add("error", str(error))
            continue
        for text in dict.fromkeys(said):
            told.setdefault(text, []).append(pair.labels)
        samples += planes
    for text, files in told.items():
        report.add("note", text, files)
    palettes = [pair.labels for pair in pairs if is_palette(pair.labels)]
    if palettes:
        report.add("warning", "palette labels, read as the numbers of the palette", palettes)
    return samples


def _add_classes(
    samples: list[Sample], images: Path, classes: Path, reading: Reading, report: Report
) -> list[Sample]:
    found = match(images, classes, replace(reading, label_suffix=None))
    pairs = {pair.name: pair for pair in found.pairs}
    of_files: dict[str, list[Sample]] = {}
    for sample in samples:
        of_files.setdefault(sample.file, []).append(sample)
    missing = [name for name in of_files if name not in pairs]
    if missing:
        report.add("error", f"{counted(len(missing), 'image')} without a class map", missing)
    if found.strays:
        report.add(
            "error", f"{counted(len(found.strays), 'class map')} without an image", found.strays
        )
    result: list[Sample] = []
    for name, planes in of_files.items():
        if name in missing:
            continue
        try:
            planes = add_classes(planes, pairs[name], reading)
        except ValueError as error:
            report.add("error", str(error))
            continue
        result += planes
        for sample in planes:
            assert sample.classes is not None
            odd = np.mean((sample.classes > 0) != (sample.labels > 0))
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


def _draw(
    picture: Path, samples: list[Sample], objects: NumberedLabels, weights: BorderWeights
) -> None:
    count = min(4, len(samples))
    chosen = [round(i * (len(samples) - 1) / max(1, count - 1)) for i in range(count)]
    data = Dataset(samples, objects, weights, torch.device("cpu"), float("inf"))
    data.balanced()
    panels: list[Any] = []
    for i in chosen:
        image, ids = data.sample(i)
        target, weight_map = data.targets(ids[None])
        shown = data.truth(i)[1]
        cut = data.cut_of(shown)
        pictures = image.mean(0).numpy(), shown, target[0].numpy(), weight_map[0].numpy()
        panels.append((data.names[i], *map(cut, pictures)))
    draw_samples(picture, panels)
