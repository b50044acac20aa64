"""Commands that train a network, and prepare for it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..training.config import TrainConfig
from ..weights import BorderWeights
from .entry import app

if TYPE_CHECKING:
    from ..unet import UNet

SUGGESTED = """# Settings that fit the images, for `unet-fast train --config THIS_FILE`;
# `unet-fast train --help` explains each. More base_channels and steps take longer and train better.
"""

# An option of several values takes all words up to the next option.
for _name in ("class_weight", "spacing"):
    _field = BorderWeights.__dataclass_fields__[_name]
    _field.type = Annotated[_field.type, Parameter(n_tokens=-1, consume_multiple=True)]
    BorderWeights.__annotations__[_name] = _field.type


@app.command
def demo(*, out: Path = Path("unet_fast_demo")) -> None:
    """Train on bundled images of nuclei, predict unseen ones, draw what happened.

    Takes a few minutes without a GPU.

    Parameters
    ----------
    out:
        Folder for the model and the picture; made if it is missing.
    """
    from ..demo import run as run_demo

    scores, picture = run_demo(out)
    print(f"{'unseen image':<20}  pixel IoU    SEG     PQ  objects: predicted, true")
    for name, row in scores.items():
        seg = math.nan if row["seg"] is None else row["seg"]
        print(
            f"{name:<20}  {row['iou']:9.3f}  {seg:5.3f}  {row['pq_50']:5.3f}"
            f"  {row['predicted_objects']:18}  {row['reference_objects']:4}"
        )
    print(f"picture: {picture}")


@app.command
def check(
    images: Path,
    labels: Path,
    /,
    *,
    out: Path = Path("unet_fast_check"),
    classes: Path | None = None,
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    ignore_label: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> int:
    """Look at images and labels before training: what is wrong, what would fit.

    Writes a picture of samples with outlines and weight map (check.png), and settings that
    `unet-fast train --config` takes (suggested.toml). Exit code 0: fine; 1: warnings, with
    --strict; 2: training would refuse.

    Parameters
    ----------
    images:
        Folder of images.
    labels:
        Folder of labels of the same names.
    out:
        Folder for the two files, made if it is missing.
    classes:
        Folder of class maps, for instance labels of several classes.
    label_type:
        As for train.
    ignore_label:
        Label of pixels that do not count.
    strict:
        Exit code 1 on warnings.
    overwrite:
        Replace the two files in the output folder; without it they stay as they are.
    """
    from .._files import make_folder, replace_file
    from ..training.check import check_data
    from ..training.config import as_toml

    picture, suggested = make_folder(out) / "check.png", out / "suggested.toml"
    new = overwrite or not (picture.exists() or suggested.exists())
    report = check_data(
        images,
        labels,
        out=Path("run"),
        classes=classes,
        label_type=label_type,
        ignore_label=ignore_label,
        picture=picture if new else None,
    )
    for level, text in sorted(report.findings, key=lambda f: f[0] != "error"):
        print(f"{level:<8} {text}")
    if report.suggestion is not None and new:
        replace_file(suggested, as_toml(report.suggestion, SUGGESTED).encode())
        print(f"picture: {picture}")
        print(f"settings: {suggested} (unet-fast train --config {suggested})")
    elif not new:
        print(f"kept as they were, without --overwrite: {picture}, {suggested}")
    if report.suggestion is not None:
        _tell_time(report.suggestion)
    return report.exit_code(strict)


def _tell_time(suggestion: TrainConfig) -> None:
    """Times the first steps, and prints how long a run takes."""
    from .._files import reason_of
    from ..training.loop import seconds_of

    try:
        minutes = f"take about {seconds_of(suggestion) / 60:.2g} minutes on this machine"
    except (RuntimeError, MemoryError) as error:  # too large for this machine
        minutes = f"cannot be timed: {reason_of(error)}"
    print(f"time: {suggestion.length} steps, as suggested, {minutes}; --minutes M takes what fits")


@app.command
def train(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    preset: Literal["suggested", "paper-2015"] = "suggested",
) -> None:
    """Train a network on a folder of images and a folder of labels.

    An image and its labels have the same file name. Ctrl-C saves and stops; --resume goes on.
    Settings also come from a TOML file, one that `check` suggests or config.toml of another run:
    `unet-fast train --config FILE`; typed options override it. All other settings are those that
    `check` suggests for these images.

    Parameters
    ----------
    preset:
        Defaults of settings that are not given: suggested, or paper-2015, the paper's recipe as it
        is (64 channels, SGD with momentum 0.99, tiles of 388), for which a GPU is advisable.
    """
    from .._device import torchrun_number
    from ..training.loop import train as run_training

    first = torchrun_number("RANK", 0) == 0
    model = run_training(config)
    if first:
        _tell_of(config, model)


def _tell_of(config: TrainConfig, model: "UNet") -> None:
    """Prints the scores of the best model of a run, and its folder."""
    from ..training.checkpoint import read_log
    from ..training.validation import NAMES, described, said_of

    row: dict[str, Any] = next(reversed(read_log(config.out)), {})
    best = row.get("best")
    if best is not None:
        kind = "validation" if "validation" in row else "training"
        scores = [f"{name} {best[k]:.3f}" for k, name in NAMES.items() if best.get(k) is not None]
        files = row[kind]["files"]
        images = f"{files} {kind} image{'' if files == 1 else 's'}"
        print(f"step {best['step']}, {images}: {', '.join(scores)}")
        if model.objects is not None:
            print(f"objects: {described(model.objects)}: {said_of(best, best['by'])}")
    print(f"model: {config.out}")
