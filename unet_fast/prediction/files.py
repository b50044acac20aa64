"""Prediction of image files: which format is read, how it is predicted, what is written."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._device import find_device
from .._files import locked, make_folder
from .._progress import Bar, bar
from ..images.files import write_labels, write_tiff
from ..images.folders import stem_of
from ..images.intensity import range_of
from ..images.source import Source, list_sources, open_source
from ..images.zarr import is_zarr, need_zarr, open_level, zarr_library
from ..model_file import load_model
from ..plots import draw_overlay
from .options import Options
from .out_of_core import is_begun, predict_blocks, remove_rest
from .predictor import Predictor

SUFFIXES = {"png": ".png", "tiff": ".tif", "ome-tiff": ".ome.tif", "ome-zarr": ".ome.zarr"}
"""Suffixes of the formats of results."""
LARGE_PIXELS = 2**27
"""Images of at least this many pixels give an OME-Zarr, unless another format is asked for."""
OVERLAYS = "overlays"
"""Folder of the overlays, inside the folder of the results."""
OVERLAY = 4096
"""Longest side of an overlay in pixels; larger images are subsampled."""


@dataclass
class Predicted:
    """The result of :func:`predict_files`."""

    files: list[Path]
    """Files of the results."""
    kept: int = 0
    """Number of results that were there before, and are kept."""
    objects: int = 0
    """Number of objects in the other results, all planes together; 0 unless instances were asked
    for."""


def predict_files(
    run: Path,
    images: Path,
    out: Path,
    options: Options,
    *,
    format: str = "auto",
    overlay: bool = True,
    device: str = "auto",
    missing_chunks: bool = False,
    client: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Predicted:
    """Predicts an image, or the images of a folder.

    Args:
        run: A model, as for :func:`load_model`.
        images: An image (PNG, JPEG, BMP, TIFF, Zarr) or a folder of such; stacks are predicted
            plane by plane.
        out: Folder for the results, named like the images; made if it is missing.
        options: What to predict, and how; "labels" are written with the values of the training
            labels.
        format: "png" (labels and instances of single planes), "tiff", "ome-tiff", "ome-zarr"; or
            "auto": PNG where possible, else TIFF; OME-Zarr for Zarr and for images of at least
            :data:`LARGE_PIXELS` pixels.
        overlay: Whether `overlays/NAME.png` shows the objects over the image (of a stack the
            middle plane).
        device: auto, cpu, cuda or cuda:N.
        missing_chunks: As for :func:`open_source`.
        client: As for :func:`predict_blocks`; all results are OME-Zarr then.
        resume: Keep results that are finished, and go on with those that are not.
        overwrite: Replace results.

    Raises:
        ValueError: One line, if something is wrong with an argument or a file; finished results are
            kept.
    """
    if client is not None and format not in ("auto", "ome-zarr"):
        raise ValueError(f"format must be ome-zarr with several workers, got {format}")
    if format == "png" and options.output in ("scores", "probabilities"):
        raise ValueError(f"format must not be png for output {options.output}")
    if format == "ome-zarr" or client is not None:
        need_zarr()
        format = "ome-zarr"
    predictor = Predictor(load_model(run, device=find_device(device)), options)
    files = list_sources(images)
    for folder in (out, out / OVERLAYS)[: 2 if overlay else 1]:
        make_folder(folder)
    results = [out / _name(file, format, options.output) for file in files]

    def is_there(path: Path) -> bool:
        """Whether a result exists and is to be kept."""
        for written in (path, _overlay_of(path)):
            if written.exists() and any(written.samefile(file) for file in files):
                raise ValueError(f"out must not be the folder of the input, got {out}")
        if path.exists() and not (resume or overwrite):
            raise ValueError(
                f"out must not hold files of the results' names, got {path} "
                "(--overwrite replaces, --resume keeps them)"
            )
        return resume and path.exists() and not is_begun(path)

    kept = [is_there(path) for path in results]  # checked for all before the first is made
    channels = predictor.model.config["in_channels"]
    objects = 0
    with bar(len(files), "predict", "image") as shown:
        for i, file in enumerate(files):
            if not kept[i]:
                source = open_source(file, channels, missing_chunks=missing_chunks)
                chosen = _format(source, options.output) if format == "auto" else format
                results[i] = out / (stem_of(file) + SUFFIXES[chosen])  # e.g. TIFF for a stack
                kept[i] = is_there(results[i])
            if kept[i]:
                remove_rest(results[i])
                if overlay and is_zarr(results[i]) and not _overlay_of(results[i]).exists():
                    # The process was killed between the result and its picture.
                    source = open_source(file, channels, missing_chunks=missing_chunks)
                    _draw(_overlay_of(results[i]), source, open_level(results[i] / "0"), predictor)
                shown.update()
                continue
            if chosen == "png" and source.stack:
                raise ValueError(f"{file}: a stack must go into tiff or ome-tiff, got png")
            try:
                if chosen == "ome-zarr":
                    with bar(None, stem_of(file), "block", leave=False) as blocks:

                        def show(done: int, total: int, blocks: Bar = blocks) -> None:
                            if blocks.total != total:
                                blocks.reset(total)  # blocks done before took no time
                                blocks.initial = blocks.n = done
                            else:
                                blocks.update()

                        objects += predict_blocks(
                            run,
                            source,
                            results[i],
                            options,
                            device=device,
                            missing_chunks=missing_chunks,
                            resume=resume,
                            overwrite=overwrite,
                            client=client,
                            progress=show,
                        )
                    if overlay:
                        found: Any = open_level(results[i] / "0")
                        _draw(_overlay_of(results[i]), source, found, predictor)
                else:
                    with locked(results[i]):
                        found, count = _in_memory(predictor, source)
                        objects += count
                        if chosen == "png" and format == "auto" and found.max() > 65535:
                            chosen, results[i] = "tiff", results[i].with_suffix(".tif")
                        if overlay:  # before the result, which says that all is done
                            _draw(_overlay_of(results[i]), source, found, predictor)
                        _write(results[i], chosen, found, source, predictor)
            except ValueError as error:
                text = str(error).removeprefix("predict: ")
                known = text.startswith((str(file), str(results[i])))
                raise ValueError(text if known else f"{file}: {text}") from None
            shown.update()
    return Predicted(results, sum(kept), objects)


def _in_memory(predictor: Predictor, source: Source) -> tuple[NDArray[Any], int]:
    """Predicts all planes. Returns the result and its number of objects."""
    objects = 0
    tiling = predictor.plan(source.size)
    _, shape = source.layout(predictor.shape(()))
    dtype = np.dtype(str(predictor.dtype).removeprefix("torch."))
    result = np.empty(shape, np.int32 if predictor.output == "instances" else dtype)
    tiles = len(tiling.origins) * len(source.planes)
    with bar(tiles, stem_of(source.path), "tile", leave=False) as shown:
        for plane in source.planes:
            values = None
            if predictor.model.normalisation == "percentile":
                values = range_of(functools.partial(source.parts, plane))
            found = predictor.image(tiling, source.pixels(plane), values, shown.update).numpy()
            if predictor.output == "instances":
                objects += int(found.max())
            result[source.place(result, plane, slice(None), slice(None))] = found
    values_of = predictor.model.class_values
    if predictor.output == "labels" and values_of is not None:
        result = np.asarray(values_of)[result]  # as in the training labels
    return result, objects


def _write(
    path: Path, format: str, result: NDArray[Any], source: Source, predictor: Predictor
) -> None:
    if format == "png":
        write_labels(path, result, source.pixel_size)
        return
    axes, _ = source.layout(predictor.shape(()))
    write_tiff(path, result, axes, source.pixel_size, ome=format == "ome-tiff")


def _overlay_of(result: Path) -> Path:
    return result.parent / OVERLAYS / f"{stem_of(result)}.png"


def _draw(path: Path, source: Source, result: Any, predictor: Predictor) -> None:
    """Draws the overlay of the middle plane."""
    plane = tuple(n // 2 for n in source.stack.values())
    every = slice(0, None, -(-max(source.size) // OVERLAY))
    labels = np.asarray(result[source.place(result, plane, every, every)])
    labels = labels.argmax(0) if predictor.shape(()) else labels
    draw_overlay(path, image=source.pixels(plane)(every, every), labels=labels)


def _format(source: Source, output: str) -> str:
    """Returns the format of a result if none is asked for."""
    large = len(source.planes) * source.size[0] * source.size[1] >= LARGE_PIXELS
    if is_zarr(source.path) or (large and zarr_library() is not None):
        return "ome-zarr"
    return "png" if output in ("labels", "instances") and not source.stack else "tiff"


def _name(file: Path, format: str, output: str) -> str:
    """Guesses the name of the result from the name of a file."""
    if format == "auto":
        picture = output in ("labels", "instances")
        format = "ome-zarr" if is_zarr(file) else "png" if picture else "tiff"
    return stem_of(file) + SUFFIXES[format]
