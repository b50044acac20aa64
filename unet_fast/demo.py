"""The demo: the whole recipe on real nuclei, in a few minutes on a laptop."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from . import metrics
from ._files import make_folder
from .images.intensity import normalise
from .model_file import BEST, LAST
from .plots import draw_summary
from .prediction.predictor import predict
from .training.checkpoint import LOG, STATE, read_log
from .training.config import CONFIG, TrainConfig
from .training.loop import train
from .training.samples import NumberedLabels, Sample, load_samples
from .training.tiles import Dataset

SAMPLE = Path(__file__).parent / "sample"
"""36 images of the Data Science Bowl 2018; README.md beside them tells which, and the split."""
STEPS = 1000
BASE_CHANNELS = 16
TILE = 196


@dataclass(frozen=True)
class Score:
    """How well the network did on one unseen image, or on all of them together."""

    name: str
    iou: float
    seg: float
    pq: float
    """Panoptic quality at an IoU of 0.5."""
    predicted: int
    true: int
    """Numbers of objects."""


def score(name: str, truth: list[NDArray[np.int32]], found: list[NDArray[np.int32]]) -> Score:
    """Scores of some images."""
    pairs = list(zip(truth, found, strict=True))
    pooled = metrics.pooled([metrics.detection(*pair) for pair in pairs])
    iou = sum(metrics.iou(*pair) for pair in pairs) / len(pairs)
    counts = pooled.found + pooled.excess, pooled.found + pooled.missed
    return Score(name, iou, metrics.seg(truth, found), pooled.panoptic_quality, *counts)


def run(out: Path) -> tuple[list[Score], Path]:
    """Trains a narrow network on the bundled nuclei and predicts images it has not seen.

    Args:
        out: Folder for the model (`model/`), the log and the picture `demo.png`; made if missing.
            What an earlier demo left there is replaced.

    Returns:
        The scores of the unseen images, the last those of all together (the mean IoU of the
        images), and the path of the picture.

    Raises:
        ValueError: If the folder cannot be written, or holds a model that is not a demo's.
    """
    run, picture = make_folder(make_folder(out) / "model"), out / "demo.png"
    names = (LAST, BEST, STATE, LOG, CONFIG)
    earlier = [run / name for name in names if (run / name).exists()]
    if earlier and not picture.exists():
        raise ValueError(f"demo: out must not hold a model of yours, got {earlier[0]}")
    for file in earlier:
        file.unlink()
    config = TrainConfig(
        images=SAMPLE / "train" / "images",
        labels=SAMPLE / "train" / "labels",
        out=run,
        steps=STEPS,
        base_channels=BASE_CHANNELS,
        tile=TILE,
        validation=0,  # all 27 images for training: the unseen ones lie in a folder of their own
    )
    model = train(config)
    unseen = load_samples(SAMPLE / "test" / "images", SAMPLE / "test" / "labels")
    predictions = [predict(model, sample.image, output="instances").numpy() for sample in unseen]
    truth = [sample.labels for sample in unseen]
    one_by_one = zip(unseen, truth, predictions, strict=True)
    scores = [score(sample.name, [t], [p]) for sample, t, p in one_by_one]
    together = score("all", truth, predictions)

    # The picture shows the unseen image of median IoU, neither the best nor the worst.
    chosen = sorted(range(len(scores)), key=lambda i: scores[i].iou)[len(scores) // 2]
    shown = unseen[chosen]
    seen = load_samples(config.images, config.labels)
    sample = _densest(seen)
    border_weights = config.weights.balanced(torch.from_numpy(s.labels) for s in seen)
    _, weights = border_weights(torch.from_numpy(sample.labels))
    objects = NumberedLabels([sample.labels], None, None)
    one = Dataset([sample], objects, border_weights, torch.device("cpu"), math.inf)
    input_shape = model.input_shape((TILE, TILE))
    shapes = input_shape, model.output_shape(input_shape)
    drawn = one.draw(config.augmentation, 1, *shapes, seed=config.seed, step=1)
    tile, tile_labels = one.cut(config.augmentation, drawn, *shapes)
    draw_summary(
        picture,
        image=normalise(sample.image)[0],
        labels=sample.labels,
        weights=weights.numpy(),
        deformed_image=tile[0, 0].numpy(),
        deformed_labels=tile_labels[0].numpy(),
        losses=[row["loss"] for row in read_log(run)],
        unseen_image=normalise(shown.image)[0],
        unseen_labels=shown.labels,
        probability=predict(model, shown.image)[1].numpy(),
        prediction=predictions[chosen],
        title=f"unet_fast demo: {STEPS} steps; {len(scores)} unseen images: PQ {together.pq:.3f}, "
        f"{together.predicted} objects of {together.true}, pixel IoU {together.iou:.3f} "
        f"(shown: PQ {scores[chosen].pq:.3f}, pixel IoU {scores[chosen].iou:.3f})",
    )
    return [*scores, together], picture


def _densest(samples: list[Sample]) -> Sample:
    """The small image with the largest share of foreground: it shows the borders best."""
    small = [s for s in samples if max(s.labels.shape) <= 360]
    return max(small, key=lambda s: float((s.labels > 0).mean()))
