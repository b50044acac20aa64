"""Scores of predictions against labels: a row for each image, and a summary."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ..images.files import as_image
from ..images.folders import label_type_of
from ..images.intensity import normalise
from ..images.pairing import SUFFIX_HINT, Reading
from ..images.signs import LABELS_HINT, Background, Doubts
from ..images.source import Plane, planes_of
from ..objects import ObjectRule
from ..ops import separate_touching
from ..plots import Example
from .challenges import ISBI2012, best_of, isbi2012_scores
from .instances import Detection, detection, detections, pooled, seg_sum
from .overlap import object_errors
from .pairs import Files, Trio, find_files
from .partitions import info_split_merge, rand_split_merge
from .report import Evaluation, Kind, Row, short

Place = tuple[Files, int]
"""Files, and the number of one of their planes."""
Maps = tuple[NDArray[np.integer], NDArray[np.integer]]
"""Reference and predicted objects, (H, W) or (D, H, W)."""

IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""IoU thresholds of detection."""
LONGEST = 2048
"""Longest side of an image in the picture, in pixels; larger ones are subsampled."""

_RANKED_BY = {
    "objects": ("pq_50", "PQ"),
    "masks": ("v_rand", "V_rand"),
    "probabilities": ("v_rand", "V_rand"),
}
"""The score that ranks images from worst to best, and its name."""


def evaluate_files(
    predictions: Path,
    labels: Path,
    *,
    images: Path | None = None,
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    objects: ObjectRule | None = None,
    missing_chunks: bool = False,
    only_predicted: bool = False,
    reading: Reading | None = None,
) -> Evaluation:
    """Scores predictions against labels of the same names, plane by plane or volume by volume.

    Args:
        predictions: Label images, or one; or, for the scores of the ISBI 2012 challenge, TIFF or
            Zarr of floats in [0, 1]: probabilities of foreground, or of all classes, background
            first. Formats: PNG, JPEG, BMP, TIFF (also OME and ImageJ), OME-Zarr; each plane of a
            stack counts as an image, or each volume if `reading` says so.
        labels: Label images or outlines of the same names, sizes and planes, or one; those without
            a prediction are scored as if nothing had been found, and counted in the summary.
        images: The images that were predicted, of the same names, on which examples are drawn;
            None: the labels are drawn instead. Outlines without a prediction need their image.
        label_type: What the labels hold: "instances", or "semantic", where the connected components
            of what is not 0 are the objects; "auto": semantic if all files together have one value
            beside 0.
        objects: The rule that makes objects of predicted masks, classes or probabilities; None:
            predictions hold objects, or their probabilities are scored.
        missing_chunks: Whether chunks that a prediction in Zarr lacks are read as its fill value.
        only_predicted: Whether labels without a prediction are left out instead.
        reading: How files are found, paired and read, as in training; None: as by default. Pixels
            that its `ignore_label` marks do not count.

    Returns:
        Scores by pixels, by pairs of pixels and by objects. In the summary SEG is over all
        reference objects, IoU, Dice and pixel error over all pixels, AP, F1 and PQ over all
        objects of all images; V_rand and V_info are means over the images that have objects (at
        least two for V_info).

    Raises:
        ValueError: One line that names the file or the argument.
    """
    reading = reading or Reading()
    files = find_files(predictions, labels, images, missing_chunks, reading)
    missing = [x.name for x in files if x.found is None]
    if only_predicted:
        files = [x for x in files if x.found is not None]
        if not files:
            raise ValueError(
                f"{predictions}: must hold a result that has labels, got none ({SUFFIX_HINT})"
            )
    if label_type == "auto":
        maps = (_labels(plane, reading) for x in files for plane in planes_of(x.open_truth()))
        label_type = label_type_of(maps, reading.ignored)
    probable = next((x.found for x in files if _holds_probabilities(x)), None)
    doubts = Doubts("evaluate: labels", LABELS_HINT, background=Background(reading.ignored))
    reader = _Reader(label_type == "semantic", objects, reading, probable is not None, doubts)
    told = "masks: connected parts are the objects" if reader.semantic else "numbered objects"
    if probable is None or objects is not None:
        return replace(_of_objects(files, reader, len(missing)), unpredicted=missing, labels=told)
    options = ("--dims 3", reading.dims == 3), ("--ignore-label", reading.ignored is not None)
    for option, given in options:
        if given:
            raise ValueError(
                f"evaluate: predictions must be label images with {option}, got probabilities in "
                f"{probable} (--instances makes objects of them)"
            )
    return replace(_of_probabilities(files, reader, len(missing)), unpredicted=missing, labels=told)


@dataclass(frozen=True)
class _Reader:
    """Turns the pixels of files into what is scored."""

    semantic: bool
    objects: ObjectRule | None
    reading: Reading
    probable: bool
    """Whether predictions are probabilities."""

    doubts: Doubts
    """Looks at the reference labels."""

    def truth(self, plane: Plane) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Returns reference objects and a mask of ignored pixels."""
        labels = _labels(plane, self.reading)
        _look(self.doubts, plane.name, labels, masks=self.semantic)
        hole = np.zeros(labels.shape, bool)
        if self.reading.ignored is not None:
            hole = labels == self.reading.ignored
            labels[hole] = 0
        if self.semantic:
            labels = ndimage.label(labels)[0].astype(np.int32)
        return labels, hole

    def maps(self, trio: Trio) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """Returns reference and predicted objects, and the number of ignored pixels."""
        truth, hole = self.truth(trio.truth)
        # Objects are made before pixels are ignored, which thus neither tears nor joins them.
        if trio.found is None:
            found = np.zeros_like(truth)
        elif self.objects is None:
            found = trio.found.labels()
        elif self.probable:
            share = torch.from_numpy(_probability(trio.found))
            found = self.objects.of(self.objects.states(share, share > 0.5).numpy())
        else:
            found = self.objects.of_mask(trio.found.labels())
        found[hole] = 0
        return truth, found, int(hole.sum())

    def probability(self, trio: Trio) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Returns reference objects, separated where they touch, and probabilities, (H, W)."""
        truth, _ = self.truth(trio.truth)
        probability = np.zeros(truth.shape, np.float32)
        if trio.found is not None:
            probability = _probability(trio.found)
        if not truth.any():
            raise ValueError(f"{trio.truth.path}: must hold foreground, got none")
        return separate_touching(torch.from_numpy(truth)).numpy(), probability


def _labels(plane: Plane, reading: Reading) -> NDArray[np.int32]:
    """Reads labels, in which background is 0."""
    return reading.marked(plane.path, plane.labels())


def _look(doubts: Doubts, name: str, ids: NDArray[np.int32], masks: bool = False) -> None:
    """Looks at a map, at a volume section by section: the signs are those of images."""
    if ids.ndim == 2:
        doubts.look(name, ids, masks)
    else:
        for z, section in enumerate(ids):
            doubts.look(f"{name} z{z}", section, masks)


def _of_objects(files: Sequence[Files], reader: _Reader, missing: int) -> Evaluation:
    names: list[str] = []
    tallies: list[Tally] = []
    places: list[Place] = []
    values: set[int] = set()
    parts = predicted = 0
    of_results = Doubts("evaluate: predictions", "is it the folder of the overlays, or the images?")
    for place, trio in _planes(files):
        truth, found, ignored = reader.maps(trio)
        names.append(trio.name)
        tallies.append(tally(truth, found, ignored))
        places.append(place)
        if trio.found is not None:
            predicted += 1
            if reader.objects is None:
                _look(of_results, trio.name, found)
        if reader.objects is None and len(values) < 2:
            values.update(np.unique(found[found > 0]).tolist())
            parts += ndimage.label(found)[1]
    reader.doubts.tell(refuse=True)
    of_results.tell(refuse=False)  # those of a bad network are shreds, too
    if len(values) == 1 and parts > predicted:
        raise ValueError(
            "evaluate: predictions must number their objects, or go with --instances, got masks: "
            f"one value, {parts} connected parts"
        )
    rows = [{"image": name} | scores([x]) for name, x in zip(names, tallies, strict=True)]
    summary = {"images": len(rows), "labels_without_prediction": missing} | scores(tallies)
    # Several objects on more than half of the pixels: the borders between them are thin.
    inside, pixels = sum(x.truth for x in tallies), sum(x.pixels for x in tallies)
    several = summary["reference_objects"] >= 2 * len(rows)
    masks = reader.semantic and several and 2 * inside > pixels
    kind: Kind = "masks" if masks else "objects"

    def read(trio: Trio, _: Row) -> Maps:
        return reader.maps(trio)[:2]

    return Evaluation(rows, summary, kind, _examples(places, rows, kind, read))


def _planes(files: Sequence[Files]) -> Iterator[tuple[Place, Trio]]:
    """Yields all planes and their places; one file of each kind is open at a time."""
    return (((x, i), trio) for x in files for i, trio in enumerate(x.planes()))


def object_scores(
    truth: Sequence[NDArray[np.integer]],
    found: Sequence[NDArray[np.integer]],
    ignored: Sequence[int],
) -> tuple[list[Row], Row]:
    """Computes the scores of each image and of all together; see :func:`evaluate_files`.

    Args:
        truth: Instance maps, (H, W) or (D, H, W) each.
        found: Predicted instance maps of the same shapes; both are 0 where pixels are ignored.
        ignored: Number of ignored pixels of each image.
    """
    tallies = [tally(*image) for image in zip(truth, found, ignored, strict=True)]
    return [scores([x]) for x in tallies], scores(tallies)


@dataclass(frozen=True)
class Tally:
    """The sums from which the scores of an image, or of several together, are computed."""

    pixels: int
    """Pixels that count."""
    truth: int
    """Foreground pixels of the reference."""
    found: int
    """Foreground pixels of the prediction."""
    both: int
    """Pixels that are foreground in both."""
    seg: float
    """Sum of SEG over the reference objects."""
    detections: list[Detection]
    """Detections at each of :data:`IOUS`."""
    partition: Row


def tally(truth: NDArray[np.integer], found: NDArray[np.integer], ignored: int) -> Tally:
    """Computes the sums of one image; arguments as for :func:`object_scores`."""
    return Tally(
        pixels=truth.size - ignored,
        truth=int(np.count_nonzero(truth)),
        found=int(np.count_nonzero(found)),
        both=int(np.count_nonzero((truth != 0) & (found != 0))),
        seg=seg_sum(truth, found)[0],
        detections=detections(truth, found, IOUS),
        partition=_partition(truth, found),
    )


def scores(tallies: Sequence[Tally]) -> Row:
    """Computes the scores of images together."""
    pixels, truth, found, both = (
        sum(getattr(x, name) for x in tallies) for name in ("pixels", "truth", "found", "both")
    )
    by_iou = [pooled(x) for x in zip(*(x.detections for x in tallies), strict=True)]
    half = by_iou[IOUS.index(0.5)]
    objects = half.found + half.missed
    either = truth + found - both
    row: Row = {
        "reference_objects": objects,
        "predicted_objects": half.found + half.excess,
        "iou": both / either if either else 1.0,
        "dice": 2 * both / (truth + found) if either else 1.0,
        "pixel_error": (either - both) / max(pixels, 1),
        "seg": sum(x.seg for x in tallies) / objects if objects else None,
        "ap_50": half.average_precision,
        "ap_75": by_iou[IOUS.index(0.75)].average_precision,
        "ap_50_95": float(np.mean([x.average_precision for x in by_iou])),
        "f1_50": half.f1,
        "pq_50": half.panoptic_quality,
    }
    for name in tallies[0].partition:
        values = [x.partition[name] for x in tallies if x.partition[name] is not None]
        row[name] = float(np.mean(values)) if values else None
    return row


def _partition(truth: NDArray[np.integer], found: NDArray[np.integer]) -> Row:
    """Computes V_rand and V_info; None without a reference object, V_info also with only one."""
    row: Row = {}
    count = len(np.unique(truth[truth > 0]))
    both = ("v_rand", rand_split_merge, 1), ("v_info", info_split_merge, 2)
    for name, metric, least in both:
        score = metric(truth, found) if count >= least else None
        for part in ("score", "split", "merge"):
            key = name if part == "score" else f"{name}_{part}"
            row[key] = None if score is None else getattr(score, part)
    return row


def _holds_probabilities(files: Files) -> bool:
    """Whether a prediction holds probabilities; whole numbers stored as floats are labels."""
    if files.found is None:
        return False
    if files.found.suffix.lower() not in (".tif", ".tiff") and files.found.is_file():
        return False  # other pictures hold integers
    source = files.open_found()
    return source.array.dtype.kind == "f" and (
        source.found > 1 or any((x != np.floor(x)).any() for x in map(_floats, planes_of(source)))
    )


def _floats(plane: Plane) -> NDArray[np.float32]:
    return as_image(plane.path, plane.pixels())


def _probability(plane: Plane) -> NDArray[np.float32]:
    """Reads the probability of foreground."""
    if plane.source.array.dtype.kind != "f":
        raise ValueError(f"{plane.path}: must hold probabilities as the other files, got integers")
    values = _floats(plane)
    if len(values) > 1:
        off = float(np.abs(values.sum(0) - 1).max())
        if off > 1e-3:
            raise ValueError(
                f"{plane.path}: probabilities of all classes must add up to 1, got a sum off by "
                f"{off:g}"
            )
    foreground: NDArray[np.float32] = values[0] if len(values) == 1 else 1 - values[0]
    if foreground.min() < -1e-6 or foreground.max() > 1 + 1e-6:
        raise ValueError(
            f"{plane.path}: probabilities must be in [0, 1], got {foreground.min():g} to "
            f"{foreground.max():g}"
        )
    return foreground.clip(0, 1)


def _of_probabilities(files: Sequence[Files], reader: _Reader, missing: int) -> Evaluation:
    rows, slices, places = [], [], []
    for place, trio in _planes(files):
        places.append(place)
        slices.append(isbi2012_scores(*reader.probability(trio)))
        rows.append({"image": trio.name} | flat(best_of(slices[-1:])))
    summary = {"images": len(rows), "labels_without_prediction": missing}
    summary |= flat(best_of(slices))

    def read(trio: Trio, row: Row) -> Maps:
        truth, probability = reader.probability(trio)
        return ndimage.label(truth)[0], ndimage.label(probability > row["v_rand_threshold"])[0]

    examples = _examples(places, rows, "probabilities", read)
    return Evaluation(rows, summary, "probabilities", examples)


def _examples(
    places: Sequence[Place],
    rows: Sequence[Row],
    kind: Kind,
    read: Callable[[Trio, Row], Maps],
) -> list[Example]:
    """Returns the best, the median and the worst image, which are read once more."""
    key, name = _RANKED_BY[kind]
    scored = [(row[key], i) for i, row in enumerate(rows) if row[key] is not None]
    order = [i for _, i in sorted(scored)]  # some: masks and probabilities hold objects
    chosen: dict[int, str] = {}
    for rank, at in (("best", -1), ("worst", 0), ("median", len(order) // 2)):
        chosen.setdefault(order[at], f"{rank}: " if len(order) > 1 else "")
    examples = []
    for i in sorted(chosen, key=order.index, reverse=True):
        files, plane = places[i]
        trio = files.planes()[plane]
        truth, found = read(trio, rows[i])
        pairs = detection(truth, found)
        part = _drawn(truth)
        title = chosen[i] + trio.name + (f", section z{part[0].start}" if part[2:] else "")
        size = truth[part].shape[-2:]
        image = None
        if trio.image is not None:
            pixels = trio.image.source.pixels(trio.image.index)(*part)
            image = normalise(as_image(trio.image.path, pixels)).mean(0).reshape(size)
        examples.append(
            Example(
                title=title,
                image=image,
                labels=truth[part].reshape(size).copy(),  # a copy: a view would keep all
                errors=object_errors(truth, found, part).reshape(size),
                result=f"{name} {short(rows[i][key])}: {pairs.found} found, "
                f"{pairs.missed} missed, {pairs.excess} in excess",
            )
        )
    return examples


def _drawn(truth: NDArray[np.integer]) -> tuple[slice, ...]:
    """Returns the part of an image that is drawn: all of it, but of a large one fewer pixels.

    Of a volume it is the section that most reference objects lie in, the middle one of several.
    """
    plane = (slice(None, None, -(-max(truth.shape[-2:]) // LONGEST)),) * 2
    if truth.ndim == 2:
        return plane
    counts = [len(np.unique(section[section > 0])) for section in truth]
    most = np.flatnonzero(np.equal(counts, max(counts)))
    z = int(most[len(most) // 2])
    return slice(z, z + 1), *plane


def flat(scores: ISBI2012) -> Row:
    """Flattens the scores to one name each."""
    row: Row = {}
    for name, value in asdict(scores).items():
        if name == "thresholds":
            row |= {f"{key}_threshold": threshold for key, threshold in value.items()}
        elif isinstance(value, dict):
            row |= {name if k == "score" else f"{name}_{k}": v for k, v in value.items()}
        else:
            row[name] = value
    return row
