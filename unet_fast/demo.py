"""The demo: the whole recipe on real nuclei, in a few minutes on a laptop."""

import math
from pathlib import Path

import torch

from ._files import make_folder
from ._progress import counted, say
from .images.intensity import normalise
from .model_file import BEST, LAST
from .plots import draw_summary
from .prediction.predictor import predict
from .scores.evaluate import object_scores
from .scores.report import Row
from .training.checkpoint import LOG, STATE, read_log
from .training.config import CONFIG, TrainConfig, read_toml
from .training.loop import train
from .training.samples import NumberedLabels, Sample, load_samples
from .training.tiles import Dataset

SAMPLE = Path(__file__).parent / "sample"
"""36 images of the Data Science Bowl 2018; README.md in the folder lists them and the split."""
STEPS = 1000
BASE_CHANNELS = 16
TILE = 196


def run(out: Path) -> tuple[dict[str, Row], Path]:
    """Trains a narrow network on the bundled nuclei and predicts images it has not seen.

    Args:
        out: Folder for the model (`model/`), the log and the picture `demo.png`; made if missing.
            A demo that was stopped there goes on; what a whole one left is replaced.

    Returns:
        The scores of the unseen images by name, with the keys of :mod:`unet_fast.scores.evaluate`,
        and those of all together as "all"; and the path of the picture.

    Raises:
        ValueError: If the folder cannot be written, or holds a model that is not a demo's.
    """
    run, picture = make_folder(make_folder(out) / "model"), out / "demo.png"
    images = SAMPLE / "train" / "images"
    names = (LAST, BEST, STATE, LOG, CONFIG)
    earlier = [run / name for name in names if (run / name).exists()]
    if earlier and not _is_demo(run / CONFIG, images):
        raise ValueError(f"demo: out must not hold a model of yours, got {earlier[0]}")
    if picture.exists():  # the earlier demo was not stopped
        for file in (picture, *earlier):
            file.unlink()
    elif (run / STATE).exists():
        say(f"demo: goes on where it was stopped, in {run}")
    config = TrainConfig(
        images=images,
        labels=SAMPLE / "train" / "labels",
        out=run,
        steps=STEPS,
        base_channels=BASE_CHANNELS,
        tile=TILE,
        validation=0,  # all 27 images for training: the unseen ones lie in a folder of their own
        resume=True,
    )
    try:
        model = train(config)
    except KeyboardInterrupt as error:
        hint = str(error).replace("--resume goes on", "the same command goes on")
        raise KeyboardInterrupt(hint) from None
    unseen = load_samples(SAMPLE / "test" / "images", SAMPLE / "test" / "labels")
    predictions = [predict(model, sample.image, output="instances") for sample in unseen]
    truth = [sample.labels for sample in unseen]
    scores, together = object_scores(truth, predictions, [0] * len(truth))

    # The picture shows the unseen image of median IoU, neither the best nor the worst.
    chosen = sorted(range(len(scores)), key=lambda i: scores[i]["iou"] or 0)[len(scores) // 2]
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
        probability=predict(model, shown.image)[1],
        prediction=predictions[chosen],
        title=f"unet_fast demo: {STEPS} steps; {len(scores)} unseen images: "
        f"PQ {together['pq_50']:.3f}, {counted(together['predicted_objects'], 'object')} of "
        f"{together['reference_objects']}, pixel IoU {together['iou']:.3f} "
        f"(shown: PQ {scores[chosen]['pq_50']:.3f}, pixel IoU {scores[chosen]['iou']:.3f})",
    )
    by_name = dict(zip((sample.name for sample in unseen), scores, strict=True))
    return by_name | {"all": together}, picture


def _is_demo(settings: Path, images: Path) -> bool:
    """Whether settings are those of a demo: of this installation, or of another one."""
    try:
        name = Path(str(read_toml(settings)["images"]))
    except (ValueError, KeyError):
        return False
    return name.parts[-4:] == images.parts[-4:]


def _densest(samples: list[Sample]) -> Sample:
    """Returns the small image with the largest share of foreground, which shows borders best."""
    small = [s for s in samples if max(s.labels.shape) <= 360]
    return max(small, key=lambda s: float((s.labels > 0).mean()))
