"""The demo: the whole recipe on real nuclei, in a few minutes on a laptop."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ._files import make_folder
from ._progress import counted, say
from .images.intensity import normalise
from .images.pairing import Reading
from .model_file import BEST, LAST
from .plots import draw_summary
from .prediction.predictor import predict
from .scores.evaluate import object_scores
from .scores.overlap import matched
from .scores.report import Row
from .training.checkpoint import LOG, STATE, read_log
from .training.config import CONFIG, TrainConfig, read_toml
from .training.loop import train
from .training.previews import tile_panels
from .training.samples import load_samples
from .training.suggest import fitting
from .training.tiles import Dataset, load_sets

SAMPLE = Path(__file__).parent / "sample"
"""36 images of the Data Science Bowl 2018; README.md in the folder lists them and the split."""
SAMPLES = {2: SAMPLE, 3: Path(__file__).parent / "sample_volume"}
"""What the demo trains on, by axes; the volume is of a plant ovule."""
SETTINGS: dict[int, dict[str, Any]] = {
    2: {"steps": 1000, "base_channels": 16, "tile": 196},
    3: {
        "dims": 3,
        "ignore_label": 0,
        "background_label": 255,  # there is none
        **fitting([(32, 76, 85)], 0.0, "cpu"),
        "steps": 800,
    },
}
"""What the demo sets, by axes."""


def run(out: Path, dims: Literal[2, 3] = 2) -> tuple[dict[str, Row], Path]:
    """Trains a narrow network on the bundled images and predicts others that it has not seen.

    Args:
        out: Folder for the model (`model/`), the log and the picture `demo.png`; made if missing.
            A demo that was stopped there goes on; what a whole one left is replaced.
        dims: 2: nuclei; 3: a volume of cells, some planes of which are annotated.

    Returns:
        The scores of the unseen images by name, with the keys of :mod:`unet_fast.scores.evaluate`,
        and those of all together as "all"; and the path of the picture.

    Raises:
        ValueError: If the folder cannot be written, or holds a model that is not a demo's.
    """
    run, picture = make_folder(make_folder(out) / "model"), out / "demo.png"
    sample = SAMPLES[dims]
    images = sample / "train" / "images"
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
        labels=sample / "train" / "labels",
        out=run,
        validation=0,  # all images are for training: the unseen ones lie in a folder of their own
        resume=True,
        **SETTINGS[dims],
    )
    try:
        model = train(config)
    except KeyboardInterrupt as error:
        hint = str(error).replace("--resume goes on", "the same command goes on")
        raise KeyboardInterrupt(hint) from None
    whole = Reading(dims=dims)
    unseen = load_samples(sample / "test" / "images", sample / "test" / "labels", reading=whole)
    predictions = [predict(model, one.image, output="instances") for one in unseen]
    truth = [one.labels for one in unseen]
    scores, together = object_scores(truth, predictions, [0] * len(truth))

    # The picture shows the unseen image of median IoU, neither the best nor the worst.
    chosen = sorted(range(len(scores)), key=lambda i: scores[i]["iou"] or 0)[len(scores) // 2]
    shown = unseen[chosen]
    config, data, _ = load_sets(replace(config, resume=False), True, torch.device("cpu"))
    best = _densest(data)
    pixels, labels = data.sample(best)
    seen = data.truth(best)[1]
    cut, cut_shown = data.cut_of(seen), data.cut_of(shown.labels)
    input_shape = model.input_shape(config.output_tile)
    shapes = input_shape, model.output_shape(input_shape)
    drawn = data.draw(config.augmentation, 1, *shapes, seed=config.seed, step=1)
    ((tile, tile_labels, _),) = tile_panels(data, *data.cut(config.augmentation, drawn, *shapes))
    count = counted(len(scores), "unseen image" if dims == 2 else "unseen volume")
    draw_summary(
        picture,
        image=cut(pixels[0].numpy()),
        labels=cut(seen),
        weights=cut(data.targets(labels[None])[1][0].numpy()),
        deformed_image=tile,
        deformed_labels=tile_labels,
        losses=[row["loss"] for row in read_log(run)],
        unseen_image=cut_shown(normalise(shown.image)[0]),
        unseen_labels=cut_shown(shown.labels),
        probability=cut_shown(predict(model, shown.image)[1]),
        prediction=cut_shown(predictions[chosen]),
        paired=cut_shown(matched(shown.labels, predictions[chosen])),
        title=f"unet_fast demo: {counted(config.length, 'step')}; {count}: "
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


def _densest(data: Dataset) -> int:
    """Returns the small image with the largest share of foreground, which shows borders best."""
    small = [i for i, shape in enumerate(data.shapes) if max(shape) <= 360]
    return max(small, key=lambda i: float((data.truth(i)[1] > 0).mean()))
