"""Pictures, drawn without a display."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ._files import replace_file
from ._progress import counted
from .contracts.border_weight_map import IGNORED
from .images.intensity import Range, as_float32, range_of
from .images.sections import composed
from .images.signs import outlines

Gray = NDArray[np.floating]
Labels = NDArray[np.integer]

HIT, FALSE_POSITIVE, MISSED = (0.85, 0.85, 0.85), (0.95, 0.25, 0.2), (0.2, 0.45, 1.0)
"""Colours of :func:`error_colours`."""
_SCORES = {
    "loss": ("validation", "C1"),
    "iou": ("pixel IoU", "C0"),
    "mean_iou": ("with background", "C3"),
    "seg": ("SEG", "C2"),
    "pq": ("PQ", "C4"),
    "v_rand": ("V_rand", "C5"),
}
"""Names and colours of the scores of an evaluation."""
ENLARGED = 768
"""Longest side of an overlay of a small volume in pixels, about."""
CONFUSED = (0.9, 0.75, 0.1)
"""Colour of foreground that is predicted as another class."""
_ERRORS = (
    ((0.0, 0.0, 0.0), "background"),
    (HIT, "found"),
    (MISSED, "missed object"),
    (FALSE_POSITIVE, "object in excess"),
    ((0.7, 0.3, 0.9), "missed and in excess: joined, torn or a poor fit"),
    ((0.6, 0.76, 1.0), "found object: pixels missed"),
    ((1.0, 0.65, 0.6), "found object: pixels in excess"),
)
"""Colours and names of :func:`object_errors`."""


def instance_colours(labels: Labels) -> NDArray[np.floating]:
    """Colours objects, (H, W, 3) in [0, 1], on black; colours of close ids differ clearly."""
    ids, index = np.unique(labels, return_inverse=True)
    hue = (ids * 0.618034) % 1  # golden ratio: successive hues lie far apart
    value = np.where(ids > 0, 1.0, 0.0)
    table = hsv_to_rgb(np.stack([hue, np.full(hue.shape, 0.65), value], -1)).astype(np.float32)
    rgb: NDArray[np.floating] = table[index.reshape(labels.shape)]
    return rgb


def error_colours(truth: Labels, prediction: Labels) -> NDArray[np.floating]:
    """Colours foreground that is found grey, in excess red, missed blue; (H, W, 3) in [0, 1]."""
    picture = np.zeros((*truth.shape, 3))
    picture[(truth > 0) & (prediction > 0)] = HIT
    picture[(truth == 0) & (prediction > 0)] = FALSE_POSITIVE
    picture[(truth > 0) & (prediction == 0)] = MISSED
    return picture


def draw_overlay(path: Path, *sections: tuple[NDArray[np.generic], Labels]) -> None:
    """Draws objects over their image, pixel by pixel: tinted, with bright outlines.

    Args:
        path: The PNG to write.
        sections: Image, (C, H, W), any values, of which three channels are shown as colours and
            others as their mean; and labels, (H, W), 0 background. Or three such sections of a
            volume: the second, (D, W), is drawn below the first, the third, (H, D), at its right;
            all enlarged by a whole number if they are small.
    """
    values = range_of(lambda: (image[:, r] for image, _ in sections for r in _strips(image[0])))
    picture, *beside = (_overlaid(image, labels, values) for image, labels in sections)
    if beside:
        picture = composed(picture, *beside)
        times = max(1, ENLARGED // max(picture.shape))
        picture = picture.repeat(times, 0).repeat(times, 1)
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "png")
    replace_file(path, png.getvalue())


def _strips(plane: NDArray[np.generic]) -> list[slice]:
    """Returns rows that are drawn at once, to save memory."""
    return [slice(row, row + 256) for row in range(0, len(plane), 256)]


def _overlaid(image: NDArray[np.generic], labels: Labels, values: Range) -> NDArray[np.uint8]:
    """Returns objects over their image, (H, W, 3); see :func:`draw_overlay`."""
    edges = outlines(labels)
    picture = np.empty((*labels.shape, 3), np.uint8)
    for rows in _strips(labels):
        ground = values.apply(as_float32(image[:, rows])).clip(0, 1)
        ground = ground if len(ground) == 3 else ground.mean(0, keepdims=True).repeat(3, 0)
        share = np.where(edges[rows], 1.0, np.where(labels[rows] > 0, 0.2, 0.0))[..., None]
        mixed = np.moveaxis(ground, 0, -1) * (1 - share) + instance_colours(labels[rows]) * share
        picture[rows] = 255 * mixed + 0.5
    return picture


def draw_summary(
    path: Path,
    *,
    image: Gray,
    labels: Labels,
    weights: Gray,
    deformed_image: Gray,
    deformed_labels: Labels,
    losses: Sequence[float],
    unseen_image: Gray,
    unseen_labels: Labels,
    probability: Gray,
    prediction: Labels,
    paired: NDArray[np.bool_],
    title: str,
) -> None:
    """Draws the recipe on one page: data, weights, augmentation, training, prediction, errors.

    Args:
        path: The PNG to write.
        image: Training image, (H, W), in about [0, 1].
        labels: Instances of the training image, (H, W).
        weights: Weight map of the training image, (H, W).
        deformed_image: A deformed training tile, (h, w).
        deformed_labels: Instances of the deformed tile, (h, w).
        losses: Loss of every step.
        unseen_image: An image that was not trained on, (H', W').
        unseen_labels: True instances of the unseen image, (H', W').
        probability: Predicted foreground probability of the unseen image, (H', W').
        prediction: Predicted instances of the unseen image, (H', W').
        paired: Where predicted instances have a true one as partner, (H', W').
        title: Title of the page.
    """
    figure = Figure(figsize=(16, 8.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 4).ravel()
    _show(axes[0], _brightened(image), "training image", cmap="gray")
    _show(axes[1], instance_colours(labels), f"its {_count(labels)}")
    _show(axes[2], weights, "border weight map")
    figure.colorbar(axes[2].images[0], ax=axes[2], shrink=0.8)
    _show(axes[3], _with_outlines(deformed_image, deformed_labels), "deformed image and labels")
    _draw_losses(axes[4], losses)
    _show(axes[5], _with_outlines(unseen_image, unseen_labels), "unseen image, true outlines")
    _show(axes[6], probability, "predicted probability", vmin=0, vmax=1)
    figure.colorbar(axes[6].images[0], ax=axes[6], shrink=0.8)
    errors = error_colours(unseen_labels, prediction)
    errors[(unseen_labels > 0) & (prediction > 0) & ~paired] = CONFUSED
    _show(axes[7], errors, "errors")
    _draw_legend(axes[7], "no partner")
    _save(figure, path)


def draw_weights(path: Path, *, labels: Labels, target: Labels, weights: Gray, title: str) -> None:
    """Draws a weight map beside the objects it comes from.

    Args:
        path: The PNG to write.
        labels: The instances, (H, W).
        target: Target classes, (H, W): 0 background, 255 ignored.
        weights: The weights, (H, W).
        title: Title of the page.
    """
    height, width = labels.shape
    side = 6.0 / max(height, width)
    size = (2 * max(side * width, 2.5) + 1.6, max(side * height, 1.5) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _show(
        left,
        _object_colours(labels, target),
        f"{_count(labels)}, the ridge between them white",
    )
    _show(right, weights, "weights", cmap="magma", vmin=0)
    figure.colorbar(right.images[0], ax=right, shrink=0.8)
    for axes in (left, right):
        _draw_scale_bar(axes, width, height)
    _save(figure, path, min(max(100, int(2 / side)), 400))


def draw_augmentation(
    path: Path, *, samples: Sequence[tuple[Gray, Labels, Gray]], title: str
) -> None:
    """Draws a contact sheet of an image and deformed versions of it, with a grid over each.

    Args:
        path: The PNG to write.
        samples: For the image as it is and for each version: image, (H, W), in about [0, 1],
            instances, (H, W), and share of a grid line in each pixel, (H, W), in [0, 1].
        title: Title of the page.
    """
    height, width = samples[0][0].shape
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    side = 3.4 / max(height, width)
    size = (columns * max(side * width, 1.2) + 0.3, rows * (max(side * height, 0.8) + 0.3) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axes in enumerate(panels):
        if i >= len(samples):
            axes.axis("off")
            continue
        image, labels, lines = samples[i]
        picture = _with_outlines(image, labels)
        share = 0.55 * lines[..., None]
        picture = picture * (1 - share) + share * np.array([0.25, 0.75, 1.0])
        _show(axes, picture.clip(0, 1), f"{i}" if i else "as it is")
    _save(figure, path, min(max(100, int(1 / side)), 300))


def draw_tiles(path: Path, panels: Sequence[tuple[Gray, Labels, Gray]]) -> None:
    """Draws training tiles as the network gets them: image with outlines, weights.

    Args:
        path: The PNG to write.
        panels: For each tile: image, (H, W), in about [0, 1], labels of its centre, (h, w), and
            their weights, (h, w).
    """
    figure = Figure(figsize=(7.4, 3.4 * len(panels) + 0.5), layout="constrained")
    figure.suptitle("tiles of the first step: outlines of the labels, their weights")
    for row, (image, labels, weights) in zip(
        figure.subplots(len(panels), 2, squeeze=False), panels, strict=True
    ):
        _show(row[0], _with_outlines(image, labels), _count(labels))
        _show(row[1], weights, "weights", cmap="magma", vmin=0)
        figure.colorbar(row[1].images[0], ax=row[1], shrink=0.8)
    _save(figure, path)


def draw_samples(path: Path, panels: Sequence[tuple[str, Gray, Labels, Labels, Gray]]) -> None:
    """Draws annotated images as training would use them.

    Args:
        path: The PNG to write.
        panels: For each image: name, pixels, (H, W), in about [0, 1], instances, (H, W), target
            classes, (H, W), and weights, (H, W).
    """
    figure = Figure(figsize=(11, 3.5 * len(panels) + 0.5), layout="constrained")
    figure.suptitle("image and outlines; objects, the ridge between them white; weights")
    for row, (name, image, labels, target, weights) in zip(
        figure.subplots(len(panels), 3, squeeze=False), panels, strict=True
    ):
        _show(row[0], _with_outlines(image, labels), name)
        _show(row[1], _object_colours(labels, target), _count(labels))
        _show(row[2], weights, "weights", cmap="magma", vmin=0)
        figure.colorbar(row[2].images[0], ax=row[2], shrink=0.8)
    _save(figure, path)


def draw_previews(
    path: Path,
    panels: Sequence[tuple[str, Gray, Labels, Gray, Labels, Labels]],
    title: str,
    confused: str = "wrong class",
) -> None:
    """Draws predictions of images: truth, probability, errors.

    Args:
        path: The PNG to write.
        panels: For each image: name, pixels, (H, W), in about [0, 1], instances, (H, W), predicted
            probability of not being background, true and predicted classes.
        title: Title of the page.
        confused: Name of foreground that is predicted as another class.
    """
    figure = Figure(figsize=(10.4, 3.4 * len(panels) + 0.6), layout="constrained")
    figure.suptitle(title)
    for row, (name, image, labels, probability, truth, found) in zip(
        figure.subplots(len(panels), 3, squeeze=False), panels, strict=True
    ):
        _show(row[0], _with_outlines(image, labels), name)
        _show(row[1], probability, "probability of foreground", vmin=0, vmax=1)
        errors = error_colours(truth, found)
        errors[(truth > 0) & (found > 0) & (truth != found)] = CONFUSED
        _show(row[2], errors, "errors")
        several = max(truth.max(initial=0), found.max(initial=0)) > 1
        _draw_legend(row[2], confused if several else None)
    _save(figure, path)


@dataclass(frozen=True)
class Example:
    """An image, its labels, and the errors of a prediction."""

    title: str
    image: Gray | None
    """(H, W), in about [0, 1]; None: the labels are drawn instead."""
    labels: Labels
    """The reference objects, (H, W)."""
    result: str
    """Scores and counts, as text."""
    errors: NDArray[np.uint8]
    """Error codes of :func:`object_errors`, (H, W)."""


def draw_evaluation(path: Path, examples: Sequence[Example]) -> None:
    """Draws images with true outlines beside the errors of predictions, object by object.

    Args:
        path: The PNG to write.
        examples: One row each.
    """
    width = 5.2
    shapes = [example.labels.shape for example in examples]
    heights = [min(max(width * h / w, 1.0), 2 * width) for h, w in shapes]
    figure = Figure(
        figsize=(2 * width, sum(heights) + 0.4 * len(shapes) + 0.6), layout="constrained"
    )
    rows = figure.subplots(len(examples), 2, squeeze=False, height_ratios=heights)
    table = np.array([colour for colour, _ in _ERRORS])
    for row, example in zip(rows, examples, strict=True):
        labels = example.labels
        if example.image is None:
            picture = _object_colours(labels, np.sign(labels))
        else:
            picture = _with_outlines(example.image, labels)
        _show(row[0], picture, example.title)
        _show(row[1], table[example.errors], example.result)
    for colour, name in _ERRORS[1:]:
        row[1].plot([], [], "s", color=colour, label=name)
    figure.legend(
        loc="outside lower center", ncols=3, fontsize="small", facecolor="0.25", labelcolor="white"
    )
    pixels = max(
        max(shape) / max(height, width) for shape, height in zip(shapes, heights, strict=True)
    )
    _save(figure, path, min(max(100, int(pixels)), 300))


def draw_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws a training log: loss, learning rate, scores of the evaluations.

    Args:
        path: The PNG to write.
        rows: The lines of log.jsonl.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [row["step"] for row in rows]
    _draw_losses(left, [row["loss"] for row in rows])
    evaluated = [row for row in rows if "validation" in row]
    for axes, names in ((left, ("loss",)), (middle, ("pq", "v_rand", "seg", "iou", "mean_iou"))):
        for name in names:
            points = [(r["step"], r["validation"].get(name)) for r in evaluated]
            points = [(s, v) for s, v in points if v is not None]
            if points:
                label = _SCORES[name][0]
                axes.plot(*zip(*points, strict=True), ".-", label=label, color=_SCORES[name][1])
    left.legend(fontsize="small")
    middle.set(title="validation", xlabel="step", ylim=(0, 1))
    if middle.lines:
        middle.legend(fontsize="small")
    right.plot(steps, [row["learning_rate"] for row in rows], color="tab:green")
    right.set(title="learning rate", xlabel="step")
    _save(figure, path)


def _save(figure: Figure, path: Path, dpi: int = 75) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    replace_file(path, png.getvalue())


def _draw_scale_bar(axes: Axes, width: int, height: int) -> None:
    """Draws a scale bar, a round number of pixels and about a fifth of the width, at lower left."""
    power = 10 ** int(np.log10(max(1.0, width / 5)))
    length = max(step * power for step in (1, 2, 5) if step * power <= max(1.0, width / 5))
    y = height - 0.06 * height
    ends = np.array([0.04 * width, 0.04 * width + length]) - 0.5
    axes.plot(ends, [y, y], color="white", linewidth=3, solid_capstyle="butt")
    axes.text(
        ends.mean(), y - 0.02 * height, f"{length} px", color="white", ha="center", va="bottom"
    )


def _object_colours(labels: Labels, target: Labels) -> NDArray[np.floating]:
    """Colours objects with bright outlines, the ridge between them white, ignored pixels grey."""
    objects = 0.6 * instance_colours(labels)
    objects[outlines(labels)] = instance_colours(labels)[outlines(labels)]
    objects[(labels > 0) & (target == 0)] = 1.0
    objects[target == IGNORED] = 0.4
    return objects


def _draw_legend(axes: Axes, confused: str | None = None) -> None:
    """Draws what the colours of :func:`error_colours` mean."""
    kinds = [(HIT, "found"), (FALSE_POSITIVE, "in excess"), (MISSED, "missed")]
    for colour, text in kinds + ([(CONFUSED, confused)] if confused else []):
        axes.plot([], [], "s", color=colour, label=text)
    axes.legend(loc="upper right", fontsize="small", facecolor="0.25", labelcolor="white")


def _draw_losses(axes: Axes, losses: Sequence[float]) -> None:
    axes.plot(np.arange(1, len(losses) + 1), losses, color="0.75", label="each step")
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.full(window, 1 / window), "valid")
    axes.plot(np.arange(window, len(losses) + 1), mean, color="C0", label=f"mean of {window}")
    axes.set(xlabel="step", title="loss", ylim=(0, None))
    axes.legend(fontsize="small")


def _show(axes: Axes, picture: Gray, title: str, **options: object) -> None:
    axes.imshow(picture, interpolation="nearest", **options)  # type: ignore[arg-type]
    axes.set(title=title, xticks=[], yticks=[])


def _brightened(image: Gray) -> Gray:
    """Takes the square root of the intensity, so that dim objects show, too."""
    result: Gray = np.sqrt(np.clip(image, 0, 1))
    return result


def _with_outlines(image: Gray, labels: Labels) -> NDArray[np.floating]:
    """Draws yellow outlines of labels, which lie in the centre of the image, on the grey image."""
    picture = np.repeat(_brightened(image)[..., None], 3, -1)
    top, left = ((a - b) // 2 for a, b in zip(image.shape, labels.shape, strict=True))
    inner = picture[top : top + labels.shape[0], left : left + labels.shape[1]]
    inner[outlines(labels)] = (1.0, 0.85, 0.1)
    if inner.shape != picture.shape:
        picture[[top - 1, top + labels.shape[0]], left - 1 : left + labels.shape[1] + 1] = 0.5
        picture[top - 1 : top + labels.shape[0] + 1, [left - 1, left + labels.shape[1]]] = 0.5
    return picture


def _count(labels: Labels) -> str:
    return counted(len(np.unique(labels[labels > 0])), "object")
