"""The command line."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import torch
from cyclopts import Parameter

from . import demo as demonstration
from ._library import HAS_CUDA, build_info
from .augment import Augmentation
from .check import check as check_data
from .check import suggested_settings
from .checkpoint import read_log
from .cluster import cluster
from .components import Objects
from .config import TrainConfig, as_toml, read_toml
from .data import find_pairs, load_samples
from .device import find_device, precision_of
from .evaluate import CSV, JSON, PICTURE, evaluate_files
from .imageio import (
    list_images,
    make_folder,
    read_labels,
    replace_file,
    write_tiff,
)
from .intensity import normalise
from .plots import draw_augmentation, draw_weights
from .predict import Options
from .predict_files import OVERLAYS, predict_files
from .progress import bar
from .train import CONFIG, seconds_of
from .train import train as run_training
from .unet import UNet, load_model
from .validation import NAMES, described, said_of
from .weights import BorderWeights

SUGGESTED = """# Settings that fit the images, for `unet-fast train --config THIS_FILE`;
# `unet-fast train --help` explains each. More base_channels and steps take longer and train better.
"""

app = cyclopts.App(
    name="unet-fast",
    version=build_info()["version"],
    help="The U-Net recipe of 2015: train on annotated images, predict others.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # main() says what was saved
    default_parameter=Parameter(negative_iterable=()),
)


@app.command
def demo(*, out: Path = Path("unet_fast_demo")) -> None:
    """Train on bundled images of nuclei, predict unseen ones, draw what happened.

    Takes a few minutes without a GPU.

    Parameters
    ----------
    out:
        Folder for the model and the picture; made if it is missing.
    """
    scores, picture = demonstration.demo(out)
    print(f"{'unseen image':<20}  pixel IoU    SEG     PQ  objects: predicted, true")
    for score in scores:
        print(
            f"{score.name:<20}  {score.iou:9.3f}  {score.seg:5.3f}  {score.pq:5.3f}"
            f"  {score.predicted:18}  {score.true:4}"
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
    """Prints how long a run takes, by its first steps."""
    try:
        minutes = f"take about {seconds_of(suggestion) / 60:.2g} minutes on this machine"
    except (RuntimeError, MemoryError) as error:  # too large for it
        minutes = f"cannot be timed: {(str(error) or type(error).__name__).splitlines()[0]}"
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
    `unet-fast train --config FILE`; those typed beside it count more. What neither says is what
    `check` suggests for these images.

    Parameters
    ----------
    preset:
        What is taken where nothing is said: suggested, or paper-2015, the paper's recipe as it is
        (64 channels, SGD with momentum 0.99, tiles of 388), which wants a GPU.
    """
    model = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        _tell_of(config, model)


def _tell_of(config: TrainConfig, model: UNet) -> None:
    """Prints what a run ended with."""
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


@app.command
def predict(
    run: Path,
    images: Path,
    /,
    *,
    out: Path,
    output: Literal["instances", "labels", "probabilities", "scores"] = "instances",
    instances: Annotated[bool, Parameter(negative="")] = False,
    min_area: int | None = None,
    grow: int | None = None,
    seed_threshold: float | None = None,
    foreground_threshold: float | None = None,
    holes: int | None = None,
    format: Literal["auto", "png", "tiff", "ome-tiff", "ome-zarr"] = "auto",
    overlay: Annotated[bool, Parameter(negative="--no-overlay")] = True,
    tta: str | None = None,
    average: Literal["scores", "probabilities"] | None = None,
    tile: int | None = None,
    memory_budget: str | None = None,
    batch_size: int | None = None,
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    compile: bool = False,
    device: str = "auto",
    workers: int = 0,
    scheduler: str | None = None,
    missing_chunks: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Predict images of any size with a trained network.

    Parameters
    ----------
    run:
        Folder of a training run.
    images:
        An image (PNG, JPEG, BMP, TIFF, OME-Zarr), or a folder of images. Stacks are predicted plane
        by plane.
    out:
        Folder for the predictions, which are named like the images; made if it is missing.
    output:
        instances (objects, numbered), labels (classes, with the values of the training labels),
        probabilities or scores.
    instances:
        The same as --output instances.
    min_area:
        Of instances: seeds of fewer pixels are left out. This and the next four are as training
        found them to be best, if nothing is said.
    grow:
        Of instances: pixels that objects grow into gaps between them, 0 to 16.
    seed_threshold:
        Of instances: seeds are pixels whose foreground is more probable; each connected part makes
        an object, which grows into the rest of the foreground. 0: all foreground is seed.
    foreground_threshold:
        Of instances: foreground is more probable than that.
    holes:
        Of instances: holes in an object of up to so many pixels are filled, 0 to 1024.
    format:
        auto writes instances and labels as PNG, all else and stacks as TIFF, and results of
        OME-Zarr and of very large images as OME-Zarr.
    overlay:
        Draw the objects over each image: overlays/NAME.png.
    tta:
        Average over views: flips (4), rotations (4), square (8), or angles in degrees: 0,30,60.
    average:
        What is averaged; scores, if nothing is said.
    tile:
        Side of a tile in pixels; chosen, if nothing is said. The result is the same.
    memory_budget:
        Memory for the tiles in work, like 500MB or 2GiB.
    batch_size:
        Tiles at once.
    precision:
        Of the convolutions; auto is bfloat16 where the device has units for it.
    compile:
        Let torch.compile make the network faster: for many tiles.
    device:
        auto (CUDA if there is one), cpu, cuda or cuda:N.
    workers:
        Processes on this machine that share the blocks of each image (needs dask; OME-Zarr).
    scheduler:
        Address of a Dask scheduler whose workers share them (needs dask; OME-Zarr).
    missing_chunks:
        Take chunks that an OME-Zarr lacks as its fill value.
    resume:
        Keep results that are there; go on with an OME-Zarr that was begun.
    overwrite:
        Replace files of the same names in the output folder.
    """
    if instances and output != "instances":
        raise ValueError(f"output must be instances with --instances, got {output}")
    options = Options(
        output=output,
        min_area=min_area,
        grow=grow,
        seed_threshold=seed_threshold,
        foreground_threshold=foreground_threshold,
        holes=holes,
        tta=_views_in(tta),
        average=average,
        precision=str(precision_of(precision, find_device(device))).removeprefix("torch."),
        compile=compile,
        tile=tile,
        memory_budget=None if memory_budget is None else _bytes_in(memory_budget),
        batch_size=batch_size,
    )
    with cluster(workers, scheduler) as client:
        results = predict_files(
            run,
            images,
            out,
            options,
            format=format,
            overlay=overlay,
            device=device,
            client=client,
            missing_chunks=missing_chunks,
            resume=resume,
            overwrite=overwrite,
        )
    text = f"{len(results.files)} images"
    if output == "instances":
        text += f", {results.objects:,} objects"
    if results.kept:
        text += f" ({results.kept} images were there and are not counted)"
    print(f"{text}: {out}")
    if overlay:
        print(f"overlays: {out / OVERLAYS}")


@app.command
def evaluate(
    predictions: Path,
    labels: Path,
    /,
    *,
    out: Path | None = None,
    images: Path | None = None,
    instances: bool = False,
    model: Path | None = None,
    min_area: int | None = None,
    grow: int | None = None,
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    ignore_label: int | None = None,
    missing_chunks: bool = False,
    overwrite: bool = False,
) -> None:
    """Score predictions against labels.

    Prints the scores of all images that fit, with what they mean: of objects AP, PQ, F1, SEG and
    pixel IoU; of masks of membranes V_rand and V_info; of probabilities (TIFF or Zarr of floats)
    the scores of the ISBI 2012 challenge. Stacks are scored plane by plane.

    Parameters
    ----------
    predictions:
        Folder of label images (PNG, TIFF, OME-Zarr) or of probabilities; or one of them.
    labels:
        Folder of labels of the same names and planes; or one of them.
    out:
        Folder for a table with a row for each image (evaluation.csv), all scores in one file
        (evaluation.json) and a picture of the best, the median and the worst image with the errors
        in colour (evaluation.png); nothing is written, if nothing is said.
    images:
        Folder of the images of the same names, which the picture shows; or one of them. Without it
        the picture shows the labels.
    instances:
        Predictions are masks, classes or probabilities: score the objects that they make.
    model:
        With --instances: a training run, whose model says how probabilities make objects.
    min_area:
        With --instances: connected parts (of seeds) of fewer pixels are left out.
    grow:
        With --instances: pixels that objects grow into gaps between them, 0 to 16.
    label_type:
        instances: the labels number the objects; semantic: the connected parts of what is not 0 are
        the objects; auto: by the values.
    ignore_label:
        Label of pixels that do not count.
    missing_chunks:
        Take chunks that predictions in OME-Zarr lack as their fill value.
    overwrite:
        Replace the three files in the output folder.
    """
    typed = {"model": model, "min_area": min_area, "grow": grow}
    typed = {name: value for name, value in typed.items() if value is not None}
    if typed and not instances:
        raise ValueError(
            f"{', '.join(typed)} must go with --instances, got "
            f"{', '.join(map(str, typed.values()))} without"
        )
    rule = Objects() if model is None else load_model(model).rule
    typed.pop("model", None)
    if out is None and images is not None:
        raise ValueError(f"images must go with --out, for the picture, got {images} without")
    written = [] if out is None else [out / name for name in (CSV, JSON, PICTURE)]
    taken = [path for path in written if path.exists()]
    if taken and not overwrite:
        raise ValueError(f"out must not hold an evaluation, got {taken[0]} (--overwrite replaces)")
    if out is not None:
        make_folder(out)
    result = evaluate_files(
        predictions,
        labels,
        images=images,
        label_type=label_type,
        objects=replace(rule, **typed) if instances else None,  # type: ignore[arg-type]
        ignore_label=ignore_label,
        missing_chunks=missing_chunks,
    )
    print(result.text())
    if out is not None:
        result.write(out)
        print(f"all scores: {written[0]}, {written[1]}")
        print(f"picture: {written[2]}")


@app.command
def weights(
    labels: Path,
    /,
    *,
    out: Path,
    preset: Literal["paper-2015", "falk-2019"] = "paper-2015",
    ignore_label: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weight maps of instance labels, and pictures of them.

    For NAME.png the map is NAME.tif (float32), the picture NAME.png. Balanced class weights
    (paper-2015) are counted over all files, as in training.

    Parameters
    ----------
    labels:
        An instance map, or a folder of instance maps.
    out:
        Folder for the results, made if it is missing; another one than that of the labels.
    preset:
        paper-2015 (w0 10, sigma 5) or falk-2019 (w0 50, sigma 6, halo).
    ignore_label:
        Label of pixels that do not count.
    overwrite:
        Replace files of the same names in the output folder.
    """
    presets = {"paper-2015": BorderWeights.paper_2015(), "falk-2019": BorderWeights.falk_2019()}
    files = _files(labels)
    maps = [torch.from_numpy(read_labels(file)) for file in files]
    results = _results(out, files, (".tif", ".png"), overwrite)
    weigh = replace(presets[preset], ignore_label=ignore_label).balanced(maps)
    with bar(len(files), "weights", "image") as shown:
        for file, image, (tiff, png) in zip(files, maps, results, strict=True):
            target, weight_map = (x.numpy() for x in weigh(image))
            write_tiff(tiff, weight_map)
            draw_weights(
                png,
                labels=image.numpy(),
                target=target,
                weights=weight_map,
                title=f"{file.stem}, {preset}",
            )
            shown.update()
    print(f"{len(files)} weight maps: {out}")


@app.command
def augment(
    images: Path,
    labels: Path,
    /,
    *,
    out: Path,
    preset: Literal["paper-2015", "falk-2019"] = "paper-2015",
    samples: int = 7,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Draw what random deformation does to images and their labels.

    For NAME.png the contact sheet NAME.png shows the image as it is and deformed versions, with the
    outlines of its objects and a grid that was straight.

    Parameters
    ----------
    images:
        Folder of images.
    labels:
        Folder of instance labels of the same names.
    out:
        Folder for the pictures, made if it is missing; another one than those of the input.
    preset:
        paper-2015 (displacements of 10 px on a 3 x 3 grid) or falk-2019 (spline coefficients 150 px
        apart).
    samples:
        Deformed versions of each image, 1 to 100.
    seed:
        Seed of the random numbers.
    overwrite:
        Replace files of the same names in the output folder.
    """
    if not 1 <= samples <= 100:
        raise ValueError(f"samples must be from 1 to 100, got {samples}")
    aug = {"paper-2015": Augmentation.paper_2015(), "falk-2019": Augmentation.falk_2019()}[preset]
    still = Augmentation(
        sigma=0, rotation=0, gray_black=(0, 0), gray_white=(1, 1), gray_slope=(1, 1)
    )
    files = [file for pair in find_pairs(images, labels) for file in pair]
    results = _results(out, files, (".png",), overwrite)[::2]
    generator = torch.Generator().manual_seed(seed)
    loaded = load_samples(images, labels)
    for sample, (path,) in zip(loaded, results, strict=True):
        gray = torch.from_numpy(normalise(sample.image)).mean(0, keepdim=True)
        ids = torch.from_numpy(sample.labels)
        panels = []
        for change, count in ((still, 1), (aug, samples)):
            drawn = change.draw(count, gray.shape, generator=generator)
            many = gray.expand(count, -1, -1, -1), ids.expand(count, -1, -1)
            moved = zip(*change.with_grid(*many, drawn), strict=True)
            panels += [(m[0].numpy(), i.numpy(), lines.numpy()) for m, i, lines in moved]
        title = f"{sample.name}, {preset}, seed {seed}"
        draw_augmentation(path, samples=panels, title=title)
    print(f"{len(loaded)} contact sheets: {out}")


@app.command
def info() -> None:
    """Show versions, and what the kernels were built for."""
    facts = build_info()
    facts["torch"] = torch.__version__
    facts["cuda_kernels"] = "loaded" if HAS_CUDA else "not loaded"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["cuda_devices"] = ", ".join(devices) or "none"
    for name, value in facts.items():
        print(f"{name:<20} {value}")


def _bytes_in(text: str) -> int:
    """The number that 500MB or 2GiB stands for."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", text.strip())
    if found is None:
        raise ValueError(f"memory-budget must be like 500MB or 2GiB, got {text}")
    number, prefix, binary = found.groups()
    power: int = (1024 if binary else 1000) ** " kMGT".index(prefix or " ")
    return int(float(number) * power)


def _views_in(text: str | None) -> str | list[float] | None:
    """The angles of a list, or the name of a group of views."""
    if text is None or text in ("flips", "rotations", "square"):
        return text
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"tta must be flips, rotations, square or angles like 0,30,60, got {text}"
        ) from None


def _files(path: Path) -> list[Path]:
    """The images of a folder, or the one image."""
    return list_images(path) if path.is_dir() or not path.exists() else [path]


def _results(
    out: Path, files: list[Path], suffixes: tuple[str, ...], overwrite: bool
) -> list[list[Path]]:
    """The files to write for each input, in a folder that can be written; never an input."""
    results = [[make_folder(out) / (file.stem + suffix) for suffix in suffixes] for file in files]
    taken = [path for paths in results for path in paths if path.exists()]
    for path in taken:
        if any(path.samefile(file) for file in files if file.exists()):
            raise ValueError(f"out must not be the folder of the input, got {out}")
    if taken and not overwrite:
        raise ValueError(f"out must not hold files of the results' names, got {taken[0]}")
    return results


app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _with_settings(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> int | None:
    """Reads settings from a file first.

    Parameters
    ----------
    config:
        TOML file of settings, for `train`.
    """
    app.config = []
    if words[:1] == ("train",):
        app.config = _sources(words, config)
    elif config is not None:
        raise ValueError(f"--config must go with train, got {' '.join(words[:1]) or 'nothing'}")
    code: int | None = app(
        words, exit_on_error=False, print_error=False, result_action="return_value"
    )
    return code


def _sources(words: Sequence[str], file: Path | None) -> list[cyclopts.config.Dict]:
    """Where `train` finds what is not typed: the file, the run that goes on, the suggestion."""
    said = {word.split("=")[0].removeprefix("--") for word in words}
    sources = []

    def add(settings: dict[str, Any], name: str) -> None:
        for one, other in (("minutes", "steps"), ("steps", "minutes")):
            if one in said:
                settings.pop(other, None)
        said.update(settings)
        # Below the command's name: settings that are called like another command count, too.
        sources.append(cyclopts.config.Dict({"train": settings}, source=name))

    def so_far() -> dict[str, Any]:
        app.config = sources
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        return bound.arguments

    if file is not None:
        add(read_toml(file), str(file))
    known = so_far()
    config = known.get("config")
    if config is None:  # --help
        return sources
    begun = config.out / CONFIG
    if config.resume and begun.exists():
        places = ("images", "labels", "out")  # as they are now
        add({k: v for k, v in read_toml(begun).items() if k not in places}, str(begun))
        config = so_far()["config"]
    # A file of a whole run says all: what it lacks is as this class has it.
    whole = {"base_channels", "optimizer"} <= said
    if known.get("preset") != "paper-2015" and not whole:
        add(suggested_settings(config), "suggested")
    return sources


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: the command's, or 2 after one line on wrong input."""
    logging.getLogger("asyncio").disabled = True  # zarr's other tasks tell of an error once more
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _main(arguments)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"unet-fast: warning: {message}", file=sys.stderr)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        code: int | None = app.meta(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except cyclopts.CycloptsError as error:
        message = " ".join(str(error).split())
    except (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]  # torch's run on
        if "can't allocate memory" in message:
            message = f"not enough memory{message[message.rindex(':') :]}"
    except KeyboardInterrupt as error:
        print(f"unet-fast: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    else:
        return code or 0
    print(f"unet-fast: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
