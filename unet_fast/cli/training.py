"""Commands that train a network, and prepare for it."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..augment import PER_AXIS, Augmentation
from ..training.config import FITTED, TrainConfig
from ..weights import BorderWeights
from .entry import AS_FOUND, SEVERAL, SUFFIX, ReadingOptions, app, parse_as

if TYPE_CHECKING:
    from ..unet import UNet

SUGGESTED = """# Settings that fit the images, for `unet-fast train --config THIS_FILE`;
# `unet-fast train --help` explains each. More base_channels and steps take longer and train better.
"""

for _name in ("class_weight", "spacing"):
    parse_as(BorderWeights, _name, SEVERAL)
for _name in PER_AXIS:
    parse_as(Augmentation, _name, SEVERAL)
parse_as(TrainConfig, "label_suffix", SUFFIX)
for _name in ("tile", "voxel_size"):
    parse_as(TrainConfig, _name, SEVERAL)
parse_as(TrainConfig, "ignore_label", Parameter(alias="--unlabelled"))

# Help shows what `train` takes, not the default of TrainConfig.
for _name in FITTED:
    _field = TrainConfig.__dataclass_fields__[_name]
    _field.type = Annotated[_field.type, Parameter(show_default=lambda _: "suggested")]
    TrainConfig.__annotations__[_name] = _field.type


@app.command
def demo(*, out: Path | None = None, dims: Literal[2, 3] = 2) -> None:
    """Train on bundled images of nuclei, predict unseen ones, draw what happened.

    ```
    unet-fast demo
    ```

    With --dims 3 it is a volume of plant cells, ten planes of which are annotated.

    Takes a few minutes without a GPU. After Ctrl-C the same command goes on.

    Parameters
    ----------
    out:
        Folder for the model and the picture, made if it is missing; unet_fast_demo, or
        unet_fast_demo_3d.
    dims:
        2: images; 3: a volume.
    """
    from ..demo import run as run_demo

    scores, picture = run_demo(out or Path(f"unet_fast_demo{'' if dims == 2 else '_3d'}"), dims)
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
    reading: ReadingOptions = AS_FOUND,
    strict: bool = False,
    overwrite: bool = False,
) -> int:
    """Look at images and labels before training: what is wrong, what would fit.

    ```
    unet-fast check images labels
    ```

    Writes a picture of samples with outlines and weight map (check.png), and settings that
    `unet-fast train --config` takes (suggested.toml). Exit code 0: fine; 1: warnings, with
    --strict; 2: errors, which training would refuse or learn nonsense from.

    Parameters
    ----------
    images:
        Folder of images.
    labels:
        Folder of labels of the same names, or names such as a_mask.png.
    out:
        Folder for the two files, made if it is missing.
    classes:
        Folder of class maps, for instance labels of several classes.
    label_type:
        As for train.
    strict:
        Exit code 1 on warnings.
    overwrite:
        Replace the two files in the output folder.
    """
    from .._files import check_apart, make_folder, replace_file
    from ..training.check import check_data
    from ..training.config import as_toml

    picture, suggested = out / "check.png", out / "suggested.toml"
    taken = [path for path in (suggested, picture) if path.exists()]
    if taken and not overwrite:
        raise ValueError(f"out must not hold a check, got {taken[0]} (--overwrite replaces)")
    check_apart(make_folder(out), images, labels, classes)
    for path in taken:  # they are of other data; with errors there are no new ones
        path.unlink()
    report = check_data(
        images,
        labels,
        out=Path("run"),
        classes=classes,
        label_type=label_type,
        reading=reading,
        picture=picture,
    )
    for level, text in sorted(report.findings, key=lambda f: f[0] != "error"):
        print(f"{level:<8} {text}")
    if report.suggestion is not None:
        replace_file(suggested, as_toml(report.suggestion, SUGGESTED).encode())
        print(f"picture: {picture}")
        print(f"settings: {suggested} (unet-fast train --config {suggested})")
        _tell_cost(report.suggestion)
    return report.exit_code(strict)


def _tell_cost(suggestion: TrainConfig) -> None:
    """Prints the time that a run takes, by its first steps, and the memory."""
    from .._files import reason_of
    from .._memory import gigabytes
    from ..training.loop import cost_of

    steps = f"{suggestion.length} steps, as suggested"
    try:
        with warnings.catch_warnings(action="ignore"):  # the report has said it all
            seconds, memory = cost_of(suggestion)
    except (RuntimeError, MemoryError, ValueError) as error:  # too large for this machine
        print(f"time: {steps}, cannot be timed: {reason_of(error)}")
        return
    print(
        f"time: about {_minutes(seconds)}, memory: about {gigabytes(memory)} "
        f"({steps}, on this machine; --minutes M takes what fits)"
    )


def _minutes(seconds: float) -> str:
    """Formats a time: "40 min", "3.2 h"."""
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


@app.command
def train(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    file: Annotated[
        Path | None, Parameter(name="--config", parse=False, show=True)
    ] = None,  # `entry` has read it
    preset: Literal["suggested", "paper-2015"] = "suggested",
) -> None:
    """Train a network on a folder of images and a folder of labels.

    ```
    unet-fast train images labels --out run
    ```

    An image and its labels have the same file name. Ctrl-C saves and stops; --resume goes on.
    Settings that you do not give are those that `check` suggests for these images.

    Parameters
    ----------
    file:
        TOML file of settings, such as suggested.toml of `check` or config.toml of another run;
        typed options override it.
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
    from .._progress import counted
    from ..training.checkpoint import read_log
    from ..training.validation import NAMES, described, said_of

    row: dict[str, Any] = next(reversed(read_log(config.out)), {})
    best = row.get("best")
    if best is not None:
        kind = "validation" if "validation" in row else "training"
        scores = [f"{name} {best[k]:.3f}" for k, name in NAMES.items() if best.get(k) is not None]
        files = row[kind]["files"]
        images = counted(files, f"{kind} image")
        print(f"step {best['step']}, {images}: {', '.join(scores)}")
        if model.objects is not None:
            print(f"objects: {described(model.objects)}: {said_of(best, best['by'])}")
    print(f"model: {config.out}")
