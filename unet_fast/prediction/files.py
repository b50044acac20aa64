"""Prediction of image files: which format is read, how it is predicted, what is written."""

import functools
import glob
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._device import find_device
from .._files import NotWritten, locked, make_folder
from .._progress import bar, counted
from ..images.files import write_labels, write_tiff
from ..images.folders import name_of, outside, stem_of
from ..images.intensity import range_of
from ..images.pairing import check_axes
from ..images.source import Source, list_sources, open_source
from ..images.zarr import (
    is_zarr,
    labels_folder,
    list_label,
    need_zarr,
    open_level,
    zarr_library,
)
from ..model_file import load_model
from ..plots import draw_overlay
from .options import OVERLAYS, Options
from .out_of_core import is_begun, predict_blocks, remove_rest
from .predictor import Predictor
from .tables import ROIS, TABLES, files_of, need_libraries, write_objects

SUFFIXES = {"png": ".png", "tiff": ".tif", "ome-tiff": ".ome.tif", "ome-zarr": ".ome.zarr"}
"""Suffixes of the formats of results."""
INTO = {"instances": "unet_fast_objects", "labels": "unet_fast_classes"}
"""Names of results in the labels of their images."""
LARGE_PIXELS = 2**27
"""Images of at least this many pixels give an OME-Zarr, unless another format is asked for."""
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
    """Number of objects in the other results, all planes or volumes together; 0 unless instances
    were asked for."""
    skipped: list[str] = field(default_factory=list)
    """Of each image that could not be predicted, a line that names it and says why."""


def predict_files(
    run: Path,
    images: Path | Sequence[Path],
    out: Path,
    options: Options,
    *,
    format: str = "auto",
    overlay: bool = True,
    table: bool = False,
    rois: bool = False,
    device: str = "auto",
    missing_chunks: bool = False,
    axes: str | None = None,
    recursive: bool = False,
    into_image: bool = False,
    client: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Predicted:
    """Predicts images; of several, one that cannot be predicted is skipped.

    Args:
        run: A model, as for :func:`load_model`.
        images: An image (PNG, JPEG, BMP, TIFF, Zarr), a folder of such, a pattern like
            `more/*.png`, or several of these; stacks are predicted plane by plane, or volume by
            volume if the model has three axes.
        out: Folder for the results, named like the images; made if it is missing.
        options: What to predict, and how; "labels" are written with the values of the training
            labels.
        format: "png" (labels and instances of single planes), "tiff", "ome-tiff", "ome-zarr"; or
            "auto": PNG where possible, else TIFF; OME-Zarr for Zarr and for images of at least
            :data:`LARGE_PIXELS` pixels. PNG and TIFF of labels and instances are uint16, TIFF of
            larger numbers uint32.
        overlay: Whether `overlays/NAME.png` shows the objects over the image (of a stack the
            middle plane, of a volume three sections through its middle).
        table: Whether `tables/NAME.csv` measures the objects; see :func:`table_of`.
        rois: Whether `rois/NAME_rois.zip` (ImageJ) and `rois/NAME.geojson` (QuPath) outline them.
        device: auto, cpu, cuda, cuda:N or another accelerator, as mps.
        missing_chunks: As for :func:`open_source`.
        axes: As for :func:`open_source`.
        recursive: Whether images of nested folders count; results are in folders of the same names.
        into_image: Whether results of instances or labels go into their images, all of which are
            OME-Zarr 0.5 then, as `IMAGE/labels/NAME` with the names of :data:`INTO`.
        client: As for :func:`predict_blocks`; all results are OME-Zarr then.
        resume: Keep results that are finished, and go on with those that are not.
        overwrite: Replace results.

    Raises:
        ValueError: One line, if an argument is wrong, or the only image; finished results are kept.
        NotWritten: If a file cannot be written; finished results are kept.
    """
    if client is not None and format not in ("auto", "ome-zarr"):
        raise ValueError(f"format must be ome-zarr with several workers, got {format}")
    if format == "png" and options.output in ("scores", "probabilities"):
        raise ValueError(f"format must not be png for output {options.output}")
    if into_image and (format not in ("auto", "ome-zarr") or options.output not in INTO):
        raise ValueError(
            f"into_image must go with ome-zarr and {' or '.join(INTO)}, got {format} and "
            f"{options.output}"
        )
    if format == "ome-zarr" or client is not None or into_image:
        need_zarr()
        format = "ome-zarr"
    asked = ["table"] * table + ["rois"] * rois
    if asked and options.output != "instances":
        raise ValueError(f"{asked[0]} must go with output instances, got {options.output}")
    if asked and format == "ome-zarr":
        raise ValueError(f"{asked[0]} must go with format png, tiff or ome-tiff, got {format}")
    check_axes(axes)
    predictor = Predictor(load_model(run, device=find_device(device)), options)
    need_libraries(table=table, rois=rois, dims=predictor.model.dims)
    files = _listed(images, out, recursive)
    call = _Call(
        run,
        out,
        predictor,
        [*files.values()],
        options=options,
        format=format,
        overlay=overlay,
        table=table,
        rois=rois,
        device=device,
        missing_chunks=missing_chunks,
        axes=axes,
        client=client,
        into=INTO[options.output] if into_image else None,
        resume=resume,
        overwrite=overwrite,
    )
    results = [call.result_of(name, x, _end(x, format, predictor)) for name, x in files.items()]
    # Checked for all before the first is made, or a folder.
    there = [call.is_there(name, x) for name, x in zip(files, results, strict=True)]
    make_folder(out)
    done = Predicted([])
    with bar(len(files), "predict", "image") as shown:
        for (name, file), result, kept in zip(files.items(), results, there, strict=True):
            try:
                path, objects = call.predict(name, file, result, kept)
            except NotWritten:
                raise
            except ValueError as error:
                if str(error).startswith(_OF_ALL):
                    raise
                text = str(error).removeprefix("predict: ")
                line = text if text.startswith((str(file), str(out))) else f"{file}: {text}"
                if len(files) == 1:
                    raise ValueError(line) from None
                done.skipped.append(line)
            else:
                done.files.append(path)
                done.kept += objects is None
                done.objects += objects or 0
            shown.update()
    return done


_OF_ALL = tuple(f"predict: {name}" for name in ("memory_budget", "tile ", "batch_size"))
"""What messages begin with that hold for all images."""


@dataclass(frozen=True)
class _Call:
    """What all images of a call share; see :func:`predict_files`."""

    run: Path
    out: Path
    predictor: Predictor
    files: list[Path]
    options: Options
    format: str
    overlay: bool
    table: bool
    rois: bool
    device: str
    missing_chunks: bool
    axes: str | None
    client: Any
    into: str | None
    resume: bool
    overwrite: bool
    folders: set[Path] = field(default_factory=set)
    """Folders that are there, and can be written."""

    def result_of(self, name: str, file: Path, suffix: str) -> Path:
        """Returns the path of the result of an image."""
        return self.out / (name + suffix) if self.into is None else labels_folder(file) / self.into

    def is_there(self, name: str, path: Path) -> bool:
        """Whether the result of that name exists and is to be kept."""
        for written in (path, self._overlay_of(name)):
            if written.exists() and any(written.samefile(file) for file in self.files):
                raise ValueError(f"out must not be the folder of the input, got {self.out}")
        if path.exists() and not (self.resume or self.overwrite):
            raise ValueError(
                f"out must not hold files of the results' names, got {path} "
                "(--overwrite replaces, --resume keeps them)"
            )
        return self.resume and path.exists() and not is_begun(path)

    def _in_blocks(self, name: str, source: Source, result: Path) -> int:
        """Predicts an image into an OME-Zarr. Returns the number of objects."""
        with bar(None, stem_of(source.path), "block", leave=False) as blocks:

            def show(done: int, total: int) -> None:
                if blocks.total != total:
                    blocks.reset(total)  # blocks done before took no time
                    blocks.initial = blocks.n = done
                else:
                    blocks.update()

            objects = predict_blocks(
                self.run,
                source,
                result,
                self.options,
                device=self.device,
                missing_chunks=self.missing_chunks,
                resume=self.resume,
                overwrite=self.overwrite,
                client=self.client,
                progress=show,
            )
        if self.into is not None:
            list_label(result)
        if self.overlay:
            self._draw(name, source, open_level(result / "0"))
        return objects

    def _at_once(self, name: str, source: Source, result: Path, chosen: str) -> tuple[Path, int]:
        """Predicts an image in memory. Returns the file of the result and the number of objects."""
        if chosen == "png" and (source.stack or source.dims == 3):
            kind = "volume" if source.dims == 3 else "stack"
            raise ValueError(f"a {kind} must go into tiff or ome-tiff, got png")
        with locked(result):
            found, objects = _in_memory(self.predictor, source)
            if chosen == "png" and self.format == "auto" and found.max() > 65535:
                chosen, result = "tiff", result.with_suffix(SUFFIXES["tiff"])
                self.is_there(name, result)
            if self.overlay:  # before the result, which says that all is done
                self._draw(name, source, found)
            write_objects(self.out, name, source, found, table=self.table, rois=self.rois)
            _write(result, chosen, found, source, self.predictor)
        return result, objects

    def predict(self, name: str, file: Path, result: Path, kept: bool) -> tuple[Path, int | None]:
        """Predicts a file. Returns its result and the number of objects, None if it was kept."""
        if not kept:
            source = self._open(file)
            chosen = _format(source, self.options.output) if self.format == "auto" else self.format
            result = self.result_of(name, file, SUFFIXES[chosen])  # e.g. TIFF for a stack
            kept = self.is_there(name, result)
            if chosen == "ome-zarr" and (self.table or self.rois):
                raise ValueError(
                    "--table and --rois must go with a result in memory, got OME-Zarr; "
                    "--format tiff keeps this one in memory"
                )
        asked = files_of(self.out, name, table=self.table, rois=self.rois)
        overlays = [self._overlay_of(name)] * self.overlay
        for folder in {path.parent for path in (result, *overlays, *asked)} - self.folders:
            self.folders.add(make_folder(folder))
        if not kept:
            if chosen == "ome-zarr":
                return result, self._in_blocks(name, source, result)
            return self._at_once(name, source, result, chosen)
        remove_rest(result)
        if self.into is not None:
            list_label(result)
        if self.overlay and is_zarr(result) and not self._overlay_of(name).exists():
            # The process was killed between the result and its picture.
            self._draw(name, self._open(file), open_level(result / "0"))
        if not all(path.exists() for path in asked):  # not asked for when the result was made
            found = open_source(result, 1, palette_as_colour=False).array
            if found.dtype.kind not in "iu":
                raise ValueError(f"{result}: must number objects for --table, got {found.dtype}")
            source, found = self._open(file), np.asarray(found)
            write_objects(self.out, name, source, found, table=self.table, rois=self.rois)
        return result, None

    def _overlay_of(self, name: str) -> Path:
        return self.out / OVERLAYS / f"{name}.png"

    def _draw(self, name: str, source: Source, result: Any) -> None:
        """Draws the overlay of the middle plane, or of the middle volume."""
        plane = tuple(n // 2 for n in source.stack.values())
        every = slice(0, None, -(-max(source.size) // OVERLAY))
        read = source.pixels(plane)

        def section(*part: slice) -> tuple[NDArray[Any], NDArray[Any]]:
            labels = np.asarray(result[source.place(result, plane, *part)])
            return read(*part), labels.argmax(0) if self.predictor.shape(()) else labels

        parts = [[every] * source.dims for _ in range(source.dims)]
        if source.dims == 2:
            draw_overlay(self._overlay_of(name), section(*parts[0]))
            return
        for axis, n in enumerate(source.size):
            parts[axis][axis] = slice(n // 2, n // 2 + 1)
        spacing = source.spacing or (1.0, 1.0, 1.0)
        cuts = (
            [_to_scale(x, axis, spacing) for x in section(*part)] for axis, part in enumerate(parts)
        )
        draw_overlay(self._overlay_of(name), *((image, labels) for image, labels in cuts))

    def _open(self, file: Path) -> Source:
        channels = self.predictor.model.config["in_channels"]
        options: Any = {"missing_chunks": self.missing_chunks, "axes": self.axes}
        source = open_source(file, channels, dims=self.predictor.model.dims, **options)
        if set(source.stack) - {*"TZ"}:  # letters for axes that the file does not name
            count = counted(len(source.planes), "plane")
            text = (
                f"{file}: taken for {count}, each an image; --axes says otherwise (CYX: channels)"
            )
            warnings.warn(text, stacklevel=2)
        if source.found == 1 < channels:
            text = f"grey images are repeated as the {channels} channels that the model takes"
            warnings.warn(text, stacklevel=2)
        return source


def _to_scale(
    section: NDArray[np.generic], across: int, spacing: tuple[float, ...]
) -> NDArray[Any]:
    """Returns a section across an axis of a volume, (..., D, H, W), as a plane to the scale of X.

    Z points down, or to the right in a section across X.
    """
    plane = section.squeeze(across - 3)
    for axis, size in zip((-2, -1), spacing[:across] + spacing[across + 1 :], strict=True):
        n = plane.shape[axis]
        length = min(max(1, round(n * size / spacing[2])), OVERLAY)
        plane = plane.take(np.arange(length) * n // length, axis)
    return plane.swapaxes(-2, -1) if across == 2 else plane


def _listed(images: Path | Sequence[Path], out: Path, recursive: bool) -> dict[str, Path]:
    """Lists the images of files, folders and patterns, each once, by the names of their results.

    Args:
        images: As for :func:`predict_files`.
        out: The folder of the results, which are not predicted where it lies within the images.
        recursive: As for :func:`predict_files`.

    Raises:
        ValueError: If there are none, or two of one name.
    """
    files: dict[Path, tuple[str, Path]] = {}
    for path in [images] if isinstance(images, Path) else images:
        found = [path]
        if not path.exists() and glob.has_magic(str(path)):
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207, it may be absolute
            found = [Path(name) for name in sorted(matches)]
            if not found:
                raise ValueError(f"images must match a file or a folder, got none for {path}")
        for one in found:
            inside = list_sources(one, recursive=recursive)
            for file in outside(inside, out, of=one) if recursive else inside:
                files[file.absolute()] = name_of(one, file), file
    names: dict[str, Path] = {}
    for name, file in files.values():
        other = names.setdefault(name, file)
        if other != file:
            raise ValueError(
                "images must have names that differ without suffix, as results have them, got "
                f"{other} and {file}"
            )
        if name.split("/")[0] in (OVERLAYS, TABLES, ROIS) and "/" in name:
            raise ValueError(
                f"images must not be in folders that results have ({OVERLAYS}, {TABLES}, {ROIS}), "
                f"got {file}"
            )
    return names


def _in_memory(predictor: Predictor, source: Source) -> tuple[NDArray[Any], int]:
    """Predicts all planes or volumes. Returns the result and its number of objects."""
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
            result[source.place(result, plane, *[slice(None)] * source.dims)] = found
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


def _format(source: Source, output: str) -> str:
    """Returns the format of a result if none is asked for."""
    large = len(source.planes) * math.prod(source.size) >= LARGE_PIXELS
    if is_zarr(source.path) or (large and zarr_library() is not None):
        return "ome-zarr"
    plane = not source.stack and source.dims == 2
    return "png" if output in ("labels", "instances") and plane else "tiff"


def _end(file: Path, format: str, predictor: Predictor) -> str:
    """Guesses the suffix of the result from the name of a file."""
    if format == "auto":
        picture = predictor.output in ("labels", "instances") and predictor.model.dims == 2
        format = "ome-zarr" if is_zarr(file) else "png" if picture else "tiff"
    return SUFFIXES[format]
