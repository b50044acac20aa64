"""Scores of predictions against labels: a row for each image, and a summary."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from . import metrics
from .components import Objects
from .data import check_size, label_type_of, unpaired
from .imageio import (
    list_images,
    make_folder,
    read_floats,
    read_labels,
    replace_file,
    stem_of,
)
from .ops.border_weight_map import separate_touching

Row = dict[str, Any]

IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""Thresholds of detection."""
CSV, JSON = "evaluation.csv", "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_files` found."""

    rows: list[Row]
    """Of each image: its name and scores, None where there is no reference object."""
    summary: Row
    """Of all images."""

    def write(self, out: Path) -> None:
        """Writes rows as CSV and all as JSON into a folder, made if it is missing."""
        rows = [
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            for row in self.rows
        ]
        replace_file(make_folder(out) / CSV, as_csv(rows, list(rows[0])))
        content = {"summary": self.summary, "images": self.rows}
        replace_file(out / JSON, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def text(self) -> str:
        """The summary in lines."""
        return "\n".join(f"{name:<26} {_short(value)}" for name, value in self.summary.items())


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """The content of a file; what a row lacks is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def evaluate_files(
    predictions: Path,
    labels: Path,
    *,
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    objects: Objects | None = None,
    ignore_label: int | None = None,
) -> Evaluation:
    """Scores predictions against labels of the same names.

    Args:
        predictions: Label images, or one; or, for the scores of the ISBI 2012 challenge, TIFF of
            floats in [0, 1]: probabilities of foreground, or of all classes, background first.
            PNG, TIFF of one plane, JPEG, BMP.
        labels: Label images of the same names and sizes, or one; those without a prediction are
            left out, and counted in the summary.
        label_type: What the labels hold: "instances", or "semantic", where the connected parts of
            what is not 0 are the objects; "auto" takes the latter where all files together have one
            value beside 0.
        objects: How objects are made of predictions that hold masks or classes; None: they hold
            objects.
        ignore_label: Value of the labels where nothing counts, or None.

    Returns:
        Scores by pixels, by pairs of pixels and by objects. In the summary SEG is over all
        reference objects, IoU, Dice and pixel error over all pixels, AP, F1 and PQ over all
        objects of all images; V_rand and V_info are means over the images that have objects (at
        least two for V_info).

    Raises:
        ValueError: One line that names the file or the argument.
    """
    pairs, missing = _pairs(predictions, labels)
    truth = [read_labels(file) for _, file in pairs]
    kind = label_type_of(truth, ignore_label) if label_type == "auto" else label_type
    nothing = ignore_label is None
    ignored = [np.zeros(x.shape, bool) if nothing else x == ignore_label for x in truth]
    truth = [np.where(hole, np.int32(0), x) for x, hole in zip(truth, ignored, strict=True)]
    if kind == "semantic":
        truth = [ndimage.label(x)[0].astype(np.int32) for x in truth]
    counts = {"images": len(pairs), "labels_without_prediction": missing}
    floats = [_floats(file) for file, _ in pairs]
    for (file, _), x in zip(pairs, floats, strict=True):
        # Floats that are whole numbers are labels, as some programs write them.
        if x is not None and (len(x) > 1 or (x != np.floor(x)).any()):
            if ignore_label is not None or objects is not None:
                raise ValueError(
                    "evaluate: predictions must be label images with --instances and "
                    f"--ignore-label, got probabilities in {file}"
                )
            return _of_probabilities(pairs, truth, floats, counts)
    found = []
    values: set[int] = set()
    for (file, label_file), one, hole in zip(pairs, truth, ignored, strict=True):
        other = read_labels(file)
        check_size(label_file, one.shape, file, other.shape)
        values.update(np.unique(other).tolist())
        # Objects are those of the whole prediction: what is ignored neither tears nor joins them.
        other = other if objects is None else objects.of_mask(other)
        found.append(np.where(hole, np.int32(0), other))
    if objects is None and len(values - {0}) == 1:
        parts = sum(ndimage.label(x)[1] for x in found)
        if parts > len(found):
            raise ValueError(
                "evaluate: predictions must number their objects, or go with --instances, got "
                f"masks: one value, {parts} connected parts"
            )
    rows, summary = scores_of(truth, found, [int(hole.sum()) for hole in ignored])
    names = [{"image": stem_of(file)} for file, _ in pairs]
    return Evaluation([n | row for n, row in zip(names, rows, strict=True)], counts | summary)


def _pairs(predictions: Path, labels: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Predictions with their labels, and how many labels have none."""
    if predictions.is_file() and labels.is_file():
        return [(predictions, labels)], 0
    found, truth = ({stem_of(f): f for f in list_images(d)} for d in (predictions, labels))
    strange = unpaired(found, truth)
    if strange:
        raise ValueError(f"{labels}: must hold labels of {strange[0]}, got none of that name")
    return [(found[stem], truth[stem]) for stem in sorted(found)], len(truth) - len(found)


def scores_of(
    truth: Sequence[NDArray[np.integer]],
    found: Sequence[NDArray[np.integer]],
    ignored: Sequence[int],
) -> tuple[list[Row], Row]:
    """Scores of each image and of all together; see :func:`evaluate_files`.

    Args:
        truth: Instance maps, (H, W) each.
        found: The predicted ones; both are 0 where nothing counts.
        ignored: How many such pixels each has.
    """
    pairs = list(zip(truth, found, strict=True))
    tables = [metrics.detections(*pair, IOUS) for pair in pairs]
    parts = [_partition(*pair) for pair in pairs]
    rows = [
        _pixels(*pair, table[0], hidden) | _objects(*pair, table) | part
        for pair, table, part, hidden in zip(pairs, tables, parts, ignored, strict=True)
    ]
    pooled = [metrics.pooled(images) for images in zip(*tables, strict=True)]
    one, other = (np.concatenate([x.ravel() > 0 for x in maps]) for maps in (truth, found))
    summary = _pixels(one, other, pooled[0], sum(ignored)) | _objects(truth, found, pooled)
    for name in parts[0]:
        values = [part[name] for part in parts if part[name] is not None]
        summary[name] = float(np.mean(values)) if values else None
    return rows, summary


def _pixels(
    truth: NDArray[Any], found: NDArray[Any], objects: metrics.Detection, ignored: int
) -> Row:
    return {
        "reference_objects": objects.found + objects.missed,
        "predicted_objects": objects.found + objects.excess,
        "iou": metrics.iou(truth, found),
        "dice": metrics.dice(truth, found),
        "pixel_error": metrics.pixel_error(truth, found)
        * (truth.size / max(truth.size - ignored, 1)),
    }


def _partition(truth: NDArray[np.integer], found: NDArray[np.integer]) -> Row:
    """V_rand and V_info; None without a reference object, V_info without two to tell apart."""
    row: Row = {}
    count = len(np.unique(truth[truth > 0]))
    both = ("v_rand", metrics.rand_split_merge, 1), ("v_info", metrics.info_split_merge, 2)
    for name, metric, least in both:
        score = metric(truth, found) if count >= least else None
        for part in ("score", "split", "merge"):
            key = name if part == "score" else f"{name}_{part}"
            row[key] = None if score is None else getattr(score, part)
    return row


def _objects(truth: Any, found: Any, table: Sequence[metrics.Detection]) -> Row:
    """Of an image, or of several, whose detections are pooled in the table."""
    by_iou = dict(zip(IOUS, table, strict=True))
    some = by_iou[0.5].found + by_iou[0.5].missed > 0
    return {
        "seg": metrics.seg(truth, found) if some else None,
        "ap_50": by_iou[0.5].average_precision,
        "ap_75": by_iou[0.75].average_precision,
        "ap_50_95": float(np.mean([x.average_precision for x in table])),
        "f1_50": by_iou[0.5].f1,
        "pq_50": by_iou[0.5].panoptic_quality,
    }


def _floats(file: Path) -> NDArray[np.float32] | None:
    """What a file holds if it can be probabilities, (C, H, W)."""
    return read_floats(file) if file.suffix.lower() in (".tif", ".tiff") else None


def _probability(file: Path, values: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The probability of foreground, (H, W)."""
    if values is None:
        raise ValueError(f"{file}: must hold probabilities as the other files, got integers")
    if len(values) > 1:
        off = float(np.abs(values.sum(0) - 1).max())
        if off > 1e-3:
            raise ValueError(
                f"{file}: probabilities of all classes must add up to 1, got a sum off by {off:g}"
            )
    foreground: NDArray[np.float32] = values[0] if len(values) == 1 else 1 - values[0]
    if foreground.min() < -1e-6 or foreground.max() > 1 + 1e-6:
        raise ValueError(
            f"{file}: probabilities must be in [0, 1], got {foreground.min():g} to "
            f"{foreground.max():g}"
        )
    return foreground.clip(0, 1)


def _of_probabilities(
    pairs: Sequence[tuple[Path, Path]],
    truth: Sequence[NDArray[np.int32]],
    floats: Sequence[NDArray[np.float32] | None],
    counts: Row,
) -> Evaluation:
    rows, slices = [], []
    for (file, label_file), one, values in zip(pairs, truth, floats, strict=True):
        probability = _probability(file, values)
        check_size(label_file, one.shape, file, probability.shape)
        if not one.any():
            raise ValueError(f"{label_file}: must hold foreground, got none")
        parted = separate_touching(torch.from_numpy(one)).numpy()  # a border where there is none
        slices.append(metrics.isbi2012_scores(parted, probability))
        rows.append({"image": stem_of(file)} | flat(metrics.best_of(slices[-1:])))
    return Evaluation(rows, counts | flat(metrics.best_of(slices)))


def flat(scores: metrics.ISBI2012) -> Row:
    """The scores under one name each."""
    row: Row = {}
    for name, value in asdict(scores).items():
        if name == "thresholds":
            row |= {f"{key}_threshold": threshold for key, threshold in value.items()}
        elif isinstance(value, dict):
            row |= {name if k == "score" else f"{name}_{k}": v for k, v in value.items()}
        else:
            row[name] = value
    return row


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"
    return "none" if value is None else value
