"""Prediction of files: what comes in decides how, and what is written."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .blocks import predict_blocks
from .device import find_device
from .imageio import make_folder, write_labels, write_tiff
from .intensity import normalise, range_of
from .omezarr import is_zarr, need_zarr, zarr_library
from .plots import draw_overlay
from .predict import Predictor
from .source import Source, list_sources, open_source, stem_of
from .unet import load_model

SUFFIXES = {"png": ".png", "tiff": ".tif", "ome-tiff": ".ome.tif", "ome-zarr": ".ome.zarr"}
"""Of the formats of results."""
LARGE = 2**27
"""Pixels of a plane from which on results go into an OME-Zarr, if nothing else is asked for."""
OVERLAY = 4096
"""Longest side of an overlay; of larger images every second, third... pixel is drawn."""


def predict_files(
    run: Path,
    images: Path,
    out: Path,
    *,
    output: str,
    format: str = "auto",
    overlay: bool = True,
    tile: int | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    tta: str | list[float] | None = None,
    average: str | None = None,
    precision: torch.dtype = torch.float32,
    compile: bool = False,
    device: str = "auto",
    missing_chunks: bool = False,
    client: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Predicts an image, or the images of a folder.

    Args:
        run: A model, as for :func:`load_model`.
        images: An image (PNG, JPEG, BMP, TIFF, Zarr) or a folder of such; stacks are predicted
            plane by plane.
        out: Folder for the results, named like the images; made if it is missing.
        output: As for :func:`predict`; "labels" are written with the values of the training labels.
        format: "png" (labels and instances of single planes), "tiff", "ome-tiff", "ome-zarr"; or
            "auto": PNG where it can be, else TIFF; OME-Zarr for Zarr and for planes of
            :data:`LARGE` pixels.
        overlay: Whether `overlays/NAME.png` shows the objects over the image (of a stack the
            middle plane).
        tile: As for :func:`predict`.
        memory_budget: As for :func:`predict`.
        batch_size: As for :func:`predict`.
        tta: As for :func:`predict`.
        average: As for :func:`predict`.
        precision: Of the convolutions.
        compile: As for :func:`predict`.
        device: auto, cpu, cuda or cuda:N.
        missing_chunks: As for :func:`open_source`.
        client: As for :func:`predict_blocks`; all results are OME-Zarr then.
        resume: Keep results that are there, and go on with those that were begun.
        overwrite: Replace results.

    Returns:
        The results.

    Raises:
        ValueError: One line, if something is wrong with an argument or a file; results that are
            complete stay.
    """
    if client is not None and format not in ("auto", "ome-zarr"):
        raise ValueError(f"format must be ome-zarr with several workers, got {format}")
    if format == "png" and output in ("scores", "probabilities"):
        raise ValueError(f"format must not be png for output {output}")
    if format == "ome-zarr" or client is not None:
        need_zarr()
        format = "ome-zarr"
    model = load_model(run, device=find_device(device))
    predictor = Predictor(
        model, output=output, tta=tta, average=average, precision=precision, compile=compile
    )
    files = list_sources(images)
    _check_results(make_folder(out), files, format, resume=resume, overwrite=overwrite)
    results = []
    with _bar(len(files), "predict", "image", leave=True) as advance:
        for file in files:
            there = [p for p in _candidates(out, file, format) if p.exists()]
            if resume and there:
                results.append(there[0])
                advance()
                continue
            source = open_source(file, model.config["in_channels"], missing_chunks=missing_chunks)
            chosen = _format(source, output) if format == "auto" else format
            path = out / (stem_of(file) + SUFFIXES[chosen])
            tiling = {"tile": tile, "memory_budget": memory_budget, "batch_size": batch_size}
            try:
                if chosen == "ome-zarr":
                    with _bar(None, stem_of(file), "block") as show:
                        predict_blocks(
                            run,
                            source,
                            path,
                            output=output,
                            tta=tta,
                            average=average,
                            precision=precision,
                            compile=compile,
                            missing_chunks=missing_chunks,
                            device=device,
                            resume=resume,
                            overwrite=overwrite,
                            client=client,
                            progress=show,
                            **tiling,
                        )
                    read: Any = need_zarr().open_array(path / "0", mode="r")
                else:
                    read = _in_memory(predictor, source, tiling)
                    _write(path, chosen, read, source, predictor)
                if overlay:
                    _draw(out, source, read, predictor)
            except ValueError as error:
                text = str(error).removeprefix("predict: ")
                known = text.startswith((str(file), str(path)))
                raise ValueError(text if known else f"{file}: {text}") from None
            results.append(path)
            advance()
    return results


def _in_memory(predictor: Predictor, source: Source, wishes: dict[str, Any]) -> NDArray[Any]:
    """The prediction of all planes."""
    tiling = predictor.plan(source.size, **wishes)
    _, shape = source.layout(predictor.shape(()))
    dtype = np.dtype(str(predictor.dtype).removeprefix("torch."))
    result = np.empty(shape, np.int32 if predictor.output == "instances" else dtype)
    with _bar(len(tiling.origins) * len(source.planes), stem_of(source.path), "tile") as advance:
        for plane in source.planes:
            values = None
            if predictor.model.normalisation == "percentile":
                values = range_of(functools.partial(source.parts, plane))
            found = predictor.image(tiling, source.pixels(plane), values, advance).numpy()
            result[source.place(result, plane, slice(None), slice(None))] = found
    values_of = predictor.model.class_values
    if predictor.output == "labels" and values_of is not None:
        result = np.asarray(values_of)[result]  # as in the training labels
    return result


def _write(
    path: Path, format: str, result: NDArray[Any], source: Source, predictor: Predictor
) -> None:
    if format == "png":
        if source.stack:
            raise ValueError("a stack must go into tiff, ome-tiff or ome-zarr, got png")
        write_labels(path, result, source.pixel_size)
        return
    axes, _ = source.layout(predictor.shape(()))
    write_tiff(path, result, axes, source.pixel_size, ome=format == "ome-tiff")


def _draw(out: Path, source: Source, result: Any, predictor: Predictor) -> None:
    """Draws the middle plane."""
    plane = tuple(n // 2 for n in source.stack.values())
    every = slice(0, None, -(-max(source.size) // OVERLAY))
    labels = np.asarray(result[source.place(result, plane, every, every)])
    labels = labels.argmax(0) if predictor.shape(()) else labels
    image = source.pixels(plane)(every, every).astype(np.float32)
    folder = make_folder(out / "overlays")
    draw_overlay(folder / f"{stem_of(source.path)}.png", image=normalise(image), labels=labels)


def _format(source: Source, output: str) -> str:
    """Of the result, if nothing is asked for."""
    large = source.size[0] * source.size[1] >= LARGE
    if is_zarr(source.path) or (large and zarr_library() is not None):
        return "ome-zarr"
    return "png" if output in ("labels", "instances") and not source.stack else "tiff"


def _candidates(out: Path, file: Path, format: str) -> list[Path]:
    """What the result of a file may be called."""
    suffixes = (".png", ".tif", ".ome.zarr") if format == "auto" else (SUFFIXES[format],)
    return [out / (stem_of(file) + suffix) for suffix in suffixes]


def _check_results(
    out: Path, files: list[Path], format: str, *, resume: bool, overwrite: bool
) -> None:
    """Raises ValueError if results are there and neither to be kept nor to be replaced."""
    for file in files:
        for path in _candidates(out, file, format):
            if not path.exists():
                continue
            if any(path.samefile(other) for other in files):
                raise ValueError(f"out must not be the folder of the input, got {out}")
            if not (resume or overwrite):
                raise ValueError(
                    f"out must not hold files of the results' names, got {path} "
                    "(--overwrite replaces, --resume keeps them)"
                )


@contextmanager
def _bar(
    total: int | None, name: str, unit: str, leave: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left, on a terminal. Yields what moves it on, by one or to."""
    with tqdm(total=total, desc=name, unit=unit, leave=leave, disable=None) as bar:

        def advance(done: int | None = None, of: int | None = None) -> None:
            if of is not None and bar.total != of:
                bar.reset(of)  # time starts anew: what a resumed run has done took none
                bar.initial = bar.n = done or 0
                bar.refresh()
            else:
                bar.update(1)

        yield advance
