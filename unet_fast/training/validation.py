"""Evaluation of a network on whole images, and fitting of its object rule."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .._progress import counted
from ..contracts.border_weight_map import IGNORED
from ..objects import ObjectRule
from ..ops import weighted_ce
from ..prediction.predictor import logits_of
from ..prediction.tiling import halo_of
from ..scores.challenges import thinned
from ..scores.overlap import Overlap, matched
from ..scores.partitions import v_rand
from ..unet import UNet
from .config import TrainConfig
from .processes import Processes
from .tiles import Dataset

Scores = dict[str, float | None]

SHARE = 0.05
"""Share of the time of a run that evaluations take."""
EVALUATIONS = 10
"""Largest number of evaluations before the last one."""
COST = 6.0
"""Cost of evaluating a pixel, in passes of a pixel through the network."""
SEEDS = (0.0, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
FOREGROUND = (0.5, 0.6, 0.7, 0.8)
AREAS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""The grid of the object rule: thresholds of seeds and of foreground, and the smallest area of a
seed, as a share of the 1st percentile of the areas of training objects."""
LEVELS = 4
"""Number of probability levels in a fitted rule."""
LEAST = 4
"""Minimum median area of objects, in pixels, for which a rule is fitted."""
TIE = 0.002
"""Scores that differ by at most this much are taken as equal."""


@dataclass(frozen=True)
class Plan:
    """When a run is evaluated, on how many files, and at what cost."""

    every: int
    """Steps from one evaluation to the next."""
    files: int
    """Number of files, the first ones, that each evaluation but the last takes."""
    last: int
    """Number of files that the last evaluation takes, which decides."""
    cost: float
    """Cost of all evaluations, in training steps."""


def plan_of(
    steps: int,
    every: int | None,
    step_pixels: int,
    shapes: Sequence[tuple[int, ...]],
    model: UNet,
) -> Plan:
    """Plans evaluations that take about :data:`SHARE` of the time, half of it for the last one.

    Costs are counted in pixels, not in seconds, so that runs repeat.

    Args:
        steps: Steps of the run.
        every: Steps from one evaluation to the next, if that is given.
        step_pixels: Pixels that the network reads in a step.
        shapes: Sizes of the files, (H, W) each.
        model: The network.
    """
    margins = [a or 2 * b for a, b in zip(model.shrinkage, halo_of(model), strict=True)]
    inputs = ([n + m for n, m in zip(shape, margins, strict=True)] for shape in shapes)
    pixels = sum(map(math.prod, inputs)) / len(shapes)
    file = COST * pixels / (3 * step_pixels)  # forward and backward: three passes
    budget = SHARE * steps / file  # in files
    last = min(max(1, int(budget / 2)), len(shapes))
    before = max(0.0, budget - last)
    if every is None:
        every = math.ceil(steps / (1 + min(EVALUATIONS, int(before))))
    count = (steps - 1) // every
    files = min(max(1, int(before / max(count, 1))), last)
    return Plan(every, files, last, file * (count * files + last))


def has_objects(config: TrainConfig, data: Dataset) -> bool:
    """Whether labels hold objects: always with one class, else only if they are numbered."""
    return config.label_type == "instances" or data.num_classes == 2


def best_by_of(config: TrainConfig, data: Dataset) -> Any:
    """Returns the score to be best in; "auto" becomes the one that suits the labels."""
    classes = not has_objects(config, data)
    by = config.best_by
    if by == "auto" and classes:
        return "mean_iou"
    if by == "auto":
        masks = config.label_type == "semantic"
        return "v_rand" if masks and _parted_by_borders(data) else "pq"
    if classes and by in ("pq", "ap", "seg", "v_rand"):
        raise ValueError(
            f"train: best_by must be mean_iou, iou or loss for classes without objects, got {by}"
        )
    return by


def _parted_by_borders(data: Dataset) -> bool:
    """Whether most of the images is foreground, with thin lines of background in it.

    Thin lines: nine in ten background pixels lie within s / 4 of the foreground, where s^2 is the
        area of the median object.
    """
    areas = data.areas()
    if len(areas) < 2 * len(data):  # nothing is parted
        return False
    side = float(np.median(areas)) ** (1 / data.dims)
    inside = outside = near = 0
    for i in range(len(data)):
        classes, _ = data.truth(i)
        background = classes == 0
        inside += int(np.count_nonzero(~background & (classes != IGNORED)))
        outside += int(np.count_nonzero(background))
        distances = ndimage.distance_transform_edt(background | (classes == IGNORED))
        near += int(np.count_nonzero(background & (distances <= side / 4)))
    return inside > outside > 0 and near >= 0.9 * outside


@dataclass
class Look:
    """The prediction of an image, and its truth."""

    index: int
    """Index of the image in the data set."""
    sums: Tensor
    """The loss and its divisor; for each class, pixels in both truth and prediction; for each
    class, pixels in either."""
    target: NDArray[np.integer]
    """The true class of each pixel, (H, W), 0 where ignored."""
    classes: Tensor
    """The most probable class of each pixel, (H, W)."""
    share: Tensor
    """The probability of foreground of each pixel, (H, W)."""
    truth: NDArray[np.int32]
    """The true objects, (H, W), 0 where ignored."""
    counts: NDArray[np.bool_]
    """Pixels that are not ignored, (H, W)."""

    def objects(self, rule: ObjectRule) -> NDArray[np.int32]:
        """Returns the predicted objects, 0 where pixels are ignored."""
        found = rule.of(rule.states(self.share, self.classes != 0).numpy())
        found[~self.counts] = 0
        return found

    def errors(self, rule: ObjectRule | None) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """Returns true and predicted classes; with a rule, objects as 1, without a partner as 2."""
        if rule is None:
            return self.target, np.where(self.counts, self.classes.numpy(), 0)
        found = self.objects(rule)
        kinds = np.where(found > 0, np.where(matched(self.truth, found), 1, 2), 0)
        return (self.truth > 0).astype(np.uint8), kinds


def look(model: UNet, data: Dataset, i: int, reduction: str) -> Look:
    """Runs a network on a whole image.

    Args:
        model: The network.
        data: The images.
        i: Index of the image.
        reduction: Reduction of the loss, as in training; "sum" averages the sums of images.
    """
    image, labels = data.sample(i)
    scores = logits_of(model, image)
    target, weights = data.targets(labels[None])
    target, weights = target.cpu(), weights.cpu()
    loss = weighted_ce(scores[None], target, weights, ignore_index=IGNORED, reduction="sum")
    if reduction == "weighted_mean":
        total = float(weights.double().sum())
    else:
        total = float((target != IGNORED).sum()) if reduction == "mean" else 1.0
    truth, found = data.classes(labels).cpu(), scores.argmax(0)
    counts = truth != IGNORED
    both, either = [], []
    for k in range(data.num_classes):
        both.append(float(((truth == k) & (found == k)).sum()))
        either.append(float((((truth == k) | (found == k)) & counts).sum()))
    return Look(
        index=i,
        sums=torch.tensor([float(loss), total, *both, *either], dtype=torch.float64),
        target=truth.masked_fill(~counts, 0).numpy(),
        classes=found.to(torch.uint8 if data.num_classes <= 256 else torch.int64),
        share=1 - scores.softmax(0)[0],
        truth=torch.where(counts & (truth > 0), labels.cpu(), 0).numpy(),
        counts=counts.numpy(),
    )


class Judge:
    """Scores predictions of images, and fits the rule that makes objects of them.

    Args:
        by: Score to be best in.
        has_objects: Whether labels hold objects, not just classes.
        data: The images for training; their objects bound the rule.
        grow: Pixels that training carved off touching objects.
        processes: The processes that share the images.
    """

    def __init__(
        self, by: str, has_objects: bool, data: Dataset, grow: int, processes: Processes
    ) -> None:
        self.by, self.processes = by, processes
        self.by_objects = by if by in ("ap", "seg", "v_rand") else "pq"
        self.has_objects = self.fits = has_objects
        self.width = 2 + 2 * data.num_classes
        self.device = data.device
        self.plain = ObjectRule(grow=grow)
        # Predicted ridges of volumes are thicker than those carved, which have three axes to be so.
        self.grows = (grow, grow + 1, grow + 2) if data.dims == 3 and grow else (grow,)
        areas = data.areas() if has_objects else np.zeros(0)
        if has_objects and (len(areas) == 0 or np.median(areas) < LEAST):
            self.fits = False
            if processes.first:
                median = f"{np.median(areas):g} pixels" if len(areas) else "none"
                warnings.warn(
                    f"training objects must have {LEAST} pixels, half of them at least, for a rule "
                    f"to be fitted, got {median}: all foreground makes objects",
                    stacklevel=2,
                )
        self.smallest = float(np.percentile(areas, 1)) if self.fits else 0.0

    def __call__(
        self, looks: Sequence[Look], rule: ObjectRule | None = None
    ) -> tuple[Scores, ObjectRule | None]:
        """Fits the rule, and scores predictions by it; see :meth:`fit` and :meth:`scores`."""
        if not self.has_objects:
            return self.scores(looks, None), None
        known: dict[ObjectRule, Scores] = {}
        fitted = self.fit(looks, rule, known) if self.fits else self.plain
        return self.scores(looks, fitted, known), fitted

    def scores(
        self,
        looks: Sequence[Look],
        rule: ObjectRule | None,
        known: dict[ObjectRule, Scores] | None = None,
    ) -> Scores:
        """Returns the scores of images, of which each process has seen its share.

        Args:
            looks: Predictions of this process.
            rule: Rule that makes objects of them; None: objects are not scored.
            known: Scores of objects by rule, from :meth:`fit`.

        Returns:
            loss: The weighted cross-entropy, over all pixels of all images; None if not finite.
            iou: Pixel IoU of all images together, mean over the classes beside background; 1 where
                there is no such pixel.
            mean_iou: The same over all classes, background included, so that a network that
                predicts one class everywhere does badly, whichever class.
            pq, ap, seg: Panoptic quality and average precision at an IoU of 0.5, SEG, over all
                objects; None without a reference object.
            v_rand: Only if `by` is v_rand: mean of the images, borders thinned to a pixel.
            predicted, true: Numbers of objects.
        """
        sums = sum((x.sums for x in looks), torch.zeros(self.width, dtype=torch.float64))
        loss, divisor, *hits = self.processes.add(sums.to(self.device)).tolist()
        both, either = np.array(hits).reshape(2, -1)
        loss /= max(divisor, 1e-30)
        scores: Scores = {
            "loss": loss if math.isfinite(loss) else None,
            "iou": _mean_ratio(both[1:], either[1:]),
            "mean_iou": _mean_ratio(both, either),
        }
        if rule is None:
            return scores
        of_objects = (known or {}).get(rule)
        return scores | (self._of_objects(looks, rule) if of_objects is None else of_objects)

    def fit(
        self,
        looks: Sequence[Look],
        rule: ObjectRule | None = None,
        known: dict[ObjectRule, Scores] | None = None,
    ) -> ObjectRule:
        """Returns the best rule of a small grid, one setting at a time; of equals the gentlest.

        Args:
            looks: Predictions of this process.
            rule: Rule fitted before, of which only the seeds are adjusted; None: all settings are
                tried.
            known: Receives the scores of objects, by rule.
        """
        known = {} if known is None else known
        areas = [math.floor(share * self.smallest) for share in AREAS]
        first = replace(
            self.plain,
            min_area=areas[AREAS.index(0.5)],
            seed_threshold=0.9,
            foreground_threshold=0.6,
            levels=LEVELS,
        )
        if rule is None:
            rule, stages = (
                first,
                [
                    ("seed_threshold", SEEDS),
                    ("foreground_threshold", FOREGROUND),
                    ("min_area", areas),
                    ("holes", (0, min(1024, areas[-1] // 10))),
                    ("grow", self.grows),
                    ("seed_threshold", SEEDS),
                ],
            )
        else:
            at = SEEDS.index(rule.seed_threshold)
            stages = [("seed_threshold", SEEDS[max(0, at - 1) : at + 2])]

        def value(rule: ObjectRule) -> float:
            if rule not in known:
                known[rule] = self._of_objects(looks, rule)
            return known[rule][self.by_objects] or 0.0

        for name, values in stages:
            rules = [replace(rule, **{name: x}) for x in values]  # type: ignore[arg-type]
            found = np.array([value(x) for x in rules])
            # Smoothed over neighbours: a few images do not tell a peak from chance.
            near = np.pad(found, 1, "edge")
            found = (near[:-2] + 2 * found + near[2:]) / 4
            rule = rules[int(np.argmax(found >= found.max() - TIE))]
        if value(rule) == 0:
            rule = first
            if value(rule) == 0 and not known[rule]["true"] and self.processes.first:
                warnings.warn(
                    f"files that the rule of objects is fitted on must hold objects, got "
                    f"none: seeds are above {first.seed_threshold:g}",
                    stacklevel=2,
                )
        return rule

    def _of_objects(self, looks: Sequence[Look], rule: ObjectRule) -> Scores:
        """Returns the scores of objects by one rule, over all processes."""
        sums = torch.zeros(7, dtype=torch.float64)
        for one in looks:
            found = one.objects(rule)
            table = Overlap("evaluate", one.truth, found)
            pairs = table.iou[table.iou > 0.5]
            covers = 2 * table.common > table.sizes[table.row]
            rand, some = 0.0, table.sizes.size > 0
            if self.by == "v_rand" and some:
                rand = v_rand(one.truth, thinned(found))
            counts = (table.sizes.size, table.other_sizes.size, pairs.size)
            sums += torch.tensor([*counts, pairs.sum(), table.iou[covers].sum(), rand, some])
        numbers = self.processes.add(sums.to(self.device)).tolist()
        true, predicted, hits, quality, seg, rand, images = numbers
        scores: Scores = {"pq": None, "ap": None, "seg": None}
        if true:
            scores["pq"] = 2 * quality / (true + predicted)
            scores["ap"] = hits / (true + predicted - hits)
            scores["seg"] = seg / true
        if self.by == "v_rand":
            scores["v_rand"] = rand / images if images else None
        return scores | {"predicted": predicted, "true": true}


def said_of(scores: Scores, by: str) -> str:
    """Describes an evaluation: the score that decides, and the number of objects."""
    value = scores.get(by)
    text = f"{NAMES.get(by, by)} {'none' if value is None else f'{value:.3f}'}"
    if scores.get("true") is not None:
        found = counted(round(scores["predicted"] or 0), "object")
        text += f", {found} of {scores['true']:,.0f}"
    return text


NAMES = {
    **{"v_rand": "V_rand", "pq": "PQ", "ap": "AP at 0.5", "seg": "SEG", "iou": "pixel IoU"},
    **{"mean_iou": "with background", "loss": "loss"},
}
"""Names of the scores in texts."""


def described(rule: ObjectRule) -> str:
    """Describes a rule in words."""
    seeds = rule.seed_threshold
    low = 0.5 if rule.foreground_threshold is None else rule.foreground_threshold
    parts = [f"seeds above {seeds:g}" if seeds > low else "all foreground"]
    parts.append(f"foreground above {low:g}")
    if rule.min_area > 1:
        parts.append(f"seeds of at least {rule.min_area:,} px")
    if rule.holes:
        parts.append(f"holes of up to {rule.holes:,} px filled")
    return ", ".join(parts)


def _mean_ratio(both: NDArray[np.float64], either: NDArray[np.float64]) -> float:
    present = either > 0
    return float((both[present] / either[present]).mean()) if present.any() else 1.0
