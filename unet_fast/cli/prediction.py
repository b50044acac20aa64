"""Commands that use a network, or score what it predicts."""

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..prediction.options import Options
from .entry import AS_FOUND, ReadingOptions, app, example_of


@dataclass(frozen=True)
class _Typed(Options):
    """Options of the command line, whose defaults differ from those in Python."""

    output: Literal["instances", "labels", "probabilities", "scores"] = "instances"
    """instances (numbered objects), labels (with the values of training), probabilities, scores."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the convolutions; auto is bfloat16 where the device supports it natively."""


@app.command(usage="Usage: unet-fast predict RUN IMAGES... --out PATH [OPTIONS]")
def predict(
    run: Path,
    /,
    *images: Path,
    out: Path,
    options: Annotated[_Typed, Parameter(name="*")] = _Typed(),
    instances: Annotated[bool, Parameter(negative="")] = False,
    format: Literal["auto", "png", "tiff", "ome-tiff", "ome-zarr"] = "auto",
    overlay: Annotated[bool, Parameter(negative="--no-overlay")] = True,
    table: Annotated[bool, Parameter(negative="")] = False,
    rois: Annotated[bool, Parameter(negative="")] = False,
    device: str = "auto",
    workers: int = 0,
    scheduler: str | None = None,
    missing_chunks: bool = False,
    axes: str | None = None,
    recursive: bool = False,
    into_image: Annotated[bool, Parameter(negative="")] = False,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Predict images of any size with a trained network.

    ```
    unet-fast predict run new_images --out results
    ```

    An image that cannot be read is skipped and listed at the end; the exit code is 1 then.

    Parameters
    ----------
    run:
        Folder of a training run.
    images:
        Images (PNG, JPEG, BMP, TIFF, OME-Zarr), folders of images, or quoted patterns such as
        'more/*.png'. Stacks are predicted plane by plane, or as volumes if the network is of such.
    out:
        Folder for the predictions, which are named like the images; made if it is missing.
    instances:
        The same as --output instances, which is the default; will be removed.
    format:
        auto writes instances and labels as PNG, all else and stacks as TIFF, and results of
        OME-Zarr and of very large images as OME-Zarr. Instances and labels have 16 bits; a TIFF
        with numbers above 65535 has 32.
    overlay:
        Draw the objects over each image: overlays/NAME.png; of volumes three sections.
    table:
        Measure the objects, tables/NAME.csv: area, centroid, axes, mean intensity of each channel;
        in micrometres where the image says how large its pixels are.
    rois:
        Outline the objects: rois/NAME_rois.zip for Fiji, rois/NAME.geojson for QuPath.
    device:
        auto (CUDA if there is one), cpu, cuda, cuda:N or another accelerator, as mps.
    workers:
        Processes on this machine that share the blocks of each image (needs dask; OME-Zarr).
    scheduler:
        Address of a Dask scheduler whose workers share the blocks (needs dask; OME-Zarr).
    missing_chunks:
        Read chunks that an OME-Zarr lacks as its fill value.
    axes:
        Axes of images whose files do not say, as ZYX (planes or a volume) or CYX (channels).
    recursive:
        Take images of nested folders, too; results are in folders of the same names.
    into_image:
        Write results of OME-Zarr 0.5 into the images, where napari shows them over the pixels:
        IMAGE/labels/unet_fast_objects, of --output labels unet_fast_classes.
    resume:
        Keep results that are finished; go on with an OME-Zarr that is not.
    overwrite:
        Replace files of the same names in the output folder.
    """
    if not images:
        raise ValueError(f"predict: images must be given: {example_of('predict')}")
    from .._device import find_device, precision_of
    from .._progress import counted
    from ..prediction.cluster import cluster
    from ..prediction.files import predict_files
    from ..prediction.options import OVERLAYS
    from ..prediction.tables import ROIS, TABLES
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
            table=table,
            rois=rois,
            device=device,
            client=client,
            missing_chunks=missing_chunks,
            axes=axes,
            recursive=recursive,
            into_image=into_image,
            resume=resume,
            overwrite=overwrite,
        )
    text = counted(len(results.files), "image")
    if options.output == "instances":
        text += f", {counted(results.objects, 'object')}"
    if results.kept:
        text += f" ({results.kept} already there, objects not counted)"
    print(f"{text}: {out}")
    if options.output == "instances" and results.files and not (results.objects or results.kept):
        print("nothing found: train for more steps, or try --seed-threshold 0.5 --min-area 0")
    beside = (overlay, "overlays", OVERLAYS), (table, "tables", TABLES), (rois, "outlines", ROIS)
    for asked, what, folder in beside:
        if asked and results.files:
            print(f"{what}: {out / folder}")
    if not results.skipped:
        return 0
    print(f"unet-fast: {counted(len(results.skipped), 'image')} skipped:", file=sys.stderr)
    for line in results.skipped:
        print(line, file=sys.stderr)
    return 1


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
    missing_chunks: bool = False,
    only_predicted: Annotated[bool, Parameter(negative="")] = False,
    reading: ReadingOptions = AS_FOUND,
    strict: Annotated[bool, Parameter(negative="")] = False,
    overwrite: bool = False,
) -> int:
    """Score predictions against labels.

    ```
    unet-fast evaluate results labels --images images --out scores
    ```

    Prints the scores over all images that fit the data, and what they mean. Of objects: average
    precision (AP), panoptic quality (PQ), F-score (F1), segmentation accuracy (SEG) and the
    intersection over union (IoU) of the foreground. Of membrane masks: the F-scores of pairs of
    pixels (V_rand) and of information (V_info). Of probabilities (TIFF or Zarr of floats): the
    scores of the ISBI 2012 challenge. Stacks are scored plane by plane, or as volumes with
    --dims 3. All objects of an image without a result count as missed.

    Parameters
    ----------
    predictions:
        Folder of label images (PNG, TIFF, OME-Zarr) or of probabilities; or one of them.
    labels:
        Folder of labels of the same names, or names such as a_mask.png, and planes; or one of them.
    out:
        Folder for a table with a row for each image (evaluation.csv), all scores in one file
        (evaluation.json) and a picture of the best, the median and the worst image with the errors
        in colour (evaluation.png); without it nothing is written.
    images:
        Folder of the images of the same names, which the picture shows; or one of them. Without it
        the picture shows the labels. Outlines (ImageJ ROIs, GeoJSON) without a result need it.
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
    missing_chunks:
        Read chunks that predictions in OME-Zarr lack as its fill value.
    only_predicted:
        Leave out labels without a prediction, instead of counting their objects as missed.
    strict:
        Exit code 1 if labels have no prediction.
    overwrite:
        Replace the three files in the output folder.
    """
    from .._files import check_apart, make_folder
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
    written = [] if out is None else [out / name for name in (CSV, JSON, PICTURE)]
    taken = [path for path in written if path.exists()]
    if taken and not overwrite:
        raise ValueError(f"out must not hold an evaluation, got {taken[0]} (--overwrite replaces)")
    if out is not None:
        check_apart(make_folder(out), predictions, labels, images)
    result = evaluate_files(
        predictions,
        labels,
        images=images,
        label_type=label_type,
        objects=replace(rule, **typed) if instances else None,  # type: ignore[arg-type]
        missing_chunks=missing_chunks,
        only_predicted=only_predicted,
        reading=reading,
    )
    print(result.text())
    if out is not None:
        result.write(out)
        print(f"all scores: {written[0]}, {written[1]}")
        print(f"picture: {written[2]}")
    return 1 if strict and result.unpredicted else 0
