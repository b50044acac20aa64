"""Commands that use a network, or score what it predicts."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..prediction.options import Options
from .entry import app


@dataclass(frozen=True)
class _Typed(Options):
    """Options of the command line, whose defaults differ from those in Python."""

    output: Literal["instances", "labels", "probabilities", "scores"] = "instances"
    """instances (numbered objects), labels (with the values of training), probabilities, scores."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the convolutions; auto is bfloat16 where the device supports it natively."""


@app.command
def predict(
    run: Path,
    images: Path,
    /,
    *,
    out: Path,
    options: Annotated[_Typed, Parameter(name="*")] = _Typed(),
    instances: Annotated[bool, Parameter(negative="")] = False,
    format: Literal["auto", "png", "tiff", "ome-tiff", "ome-zarr"] = "auto",
    overlay: Annotated[bool, Parameter(negative="--no-overlay")] = True,
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
    instances:
        The same as --output instances, which is the default; will be removed.
    format:
        auto writes instances and labels as PNG, all else and stacks as TIFF, and results of
        OME-Zarr and of very large images as OME-Zarr.
    overlay:
        Draw the objects over each image: overlays/NAME.png.
    device:
        auto (CUDA if there is one), cpu, cuda or cuda:N.
    workers:
        Processes on this machine that share the blocks of each image (needs dask; OME-Zarr).
    scheduler:
        Address of a Dask scheduler whose workers share the blocks (needs dask; OME-Zarr).
    missing_chunks:
        Read chunks that an OME-Zarr lacks as its fill value.
    resume:
        Keep results that are finished; go on with an OME-Zarr that is not.
    overwrite:
        Replace files of the same names in the output folder.
    """
    from .._device import find_device, precision_of
    from ..prediction.cluster import cluster
    from ..prediction.files import OVERLAYS, predict_files
    from ..prediction.views import GROUPS

    if instances:
        if options.output != "instances":
            raise ValueError(f"output must be instances with --instances, got {options.output}")
        warnings.warn("--instances is the default of predict, and will be removed", stacklevel=1)
    if isinstance(options.tta, str) and options.tta not in GROUPS:
        raise ValueError(
            f"tta must be flips, rotations, square or angles like 0,30,60, got {options.tta}"
        )
    precision = precision_of(options.precision, find_device(device))
    settings = Options(**{**vars(options), "precision": precision})
    with cluster(workers, scheduler) as client:
        results = predict_files(
            run,
            images,
            out,
            settings,
            format=format,
            overlay=overlay,
            device=device,
            client=client,
            missing_chunks=missing_chunks,
            resume=resume,
            overwrite=overwrite,
        )
    text = f"{len(results.files)} images"
    if options.output == "instances":
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

    Prints the scores over all images that fit the data, and what they mean: AP, PQ, F1, SEG and
    pixel IoU of objects; V_rand and V_info of membrane masks; the scores of the ISBI 2012 challenge
    of probabilities (TIFF or Zarr of floats). Stacks are scored plane by plane.

    Parameters
    ----------
    predictions:
        Folder of label images (PNG, TIFF, OME-Zarr) or of probabilities; or one of them.
    labels:
        Folder of labels of the same names and planes; or one of them.
    out:
        Folder for a table with a row for each image (evaluation.csv), all scores in one file
        (evaluation.json) and a picture of the best, the median and the worst image with the errors
        in colour (evaluation.png); without it nothing is written.
    images:
        Folder of the images of the same names, which the picture shows; or one of them. Without it
        the picture shows the labels.
    instances:
        Predictions are masks, classes or probabilities: score the objects that they make.
    model:
        With --instances: a training run, whose model has the rule that makes objects of
        probabilities.
    min_area:
        With --instances: connected components (of seeds) of fewer pixels are left out.
    grow:
        With --instances: pixels that objects grow into gaps between them, 0 to 16.
    label_type:
        instances: the labels number the objects; semantic: the connected components of what is not
        0 are the objects; auto: by the values.
    ignore_label:
        Label of pixels that do not count.
    missing_chunks:
        Read chunks that predictions in OME-Zarr lack as its fill value.
    overwrite:
        Replace the three files in the output folder.
    """
    from .._files import make_folder
    from ..model_file import load_model, rule_of
    from ..objects import ObjectRule
    from ..scores.evaluate import evaluate_files
    from ..scores.report import CSV, JSON, PICTURE

    typed = {"model": model, "min_area": min_area, "grow": grow}
    typed = {name: value for name, value in typed.items() if value is not None}
    if typed and not instances:
        raise ValueError(
            f"{', '.join(typed)} must go with --instances, got "
            f"{', '.join(map(str, typed.values()))} without"
        )
    rule = ObjectRule() if model is None else rule_of(load_model(model))
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
