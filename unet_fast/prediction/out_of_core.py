"""Prediction of one image or volume into an OME-Zarr, block by block, in one process or in many.

`OUT.part` holds all that is needed to resume a killed run: the job, the image so far, and an empty
file for each block that has reached the disk. At the end the image is renamed to OUT.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._device import find_device
from .._files import TEXT, NotWritten, locked, parsed_json, read_file, reason_of, replace_file
from ..images.folders import stem_of
from ..images.intensity import Range, range_of
from ..images.source import Source, open_source
from ..images.zarr import create, need_zarr, open_level
from ..model_file import find_model, load_model
from ..objects import ObjectRule, Part, label_in_blocks
from .cluster import distribute
from .options import Options
from .predictor import Predictor
from .tiling import Shape, Tiling

SIDE = {2: 512, 3: 128}
"""Side of a block up to which smaller tiles are combined, by the number of axes; longest side of
a chunk of a volume."""

Block = tuple[Shape, Shape]
"""Index of a plane or volume, and the first pixel of the block in it."""


@dataclass(frozen=True)
class Job:
    """All that a process needs to compute any block, as stored in `job.json`."""

    image: str
    model: str
    image_stamp: str
    """Text that changes when the image does; see :func:`_stamp`."""
    model_stamp: str
    missing_chunks: bool
    axes: str
    """Axes of the image, as it was opened."""
    options: Options
    """The options, with the tiles that were chosen."""
    ranges: list[Range] | None = None
    """Normalisation of every plane or volume; None: values as they are."""


def predict_blocks(
    run: Path,
    source: Source,
    out: Path,
    options: Options,
    *,
    device: str = "auto",
    missing_chunks: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    client: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Predicts an image, which need not fit into memory, into an OME-Zarr (0.5).

    Args:
        run: A model, as for :func:`load_model`.
        source: The image, a plane or a stack, or a volume or a stack of such, as the model takes.
        out: Folder to make, `NAME.ome.zarr`; each chunk is one channel of a block, or of a part of
            it. Objects are numbered as if predicted at once, each plane or volume by itself.
        options: What to predict, and how.
        device: auto, cpu, cuda, cuda:N or another accelerator; with `client`, that of the workers.
        missing_chunks: As for :func:`open_source`.
        resume: Go on where a killed run stopped; finished blocks are kept.
        overwrite: Replace an earlier result.
        client: A `distributed.Client`, whose workers compute the blocks, one per task, and must see
            the same files; None: this process computes them.
        progress: Called with the number of finished blocks and the number of all blocks.

    Returns:
        Number of objects, all planes or volumes together; 0 for outputs other than instances.

    Raises:
        ValueError: One line, if an argument breaks its rule, the image cannot be read, or a file
            cannot be written; what was computed is kept for `resume`.
    """
    need_zarr()
    part = _part(out)
    if out.is_symlink() or out.is_file():
        raise ValueError(f"{out}: must be a folder or not exist, got a link or a file")
    goes_on = resume and is_begun(out)
    if out.exists() and not (overwrite or goes_on):
        raise ValueError(f"{out}: must not exist, or go with --overwrite")
    if is_begun(out) and not (resume or overwrite):
        raise ValueError(f"{part}: was begun; --resume goes on, --overwrite starts again")
    file = find_model(run)
    model = load_model(file)
    predictor = Predictor(model, options)
    tiling = predictor.plan(source.size, find_device(device).type)
    if client is None:
        predictor.check_fits(tiling)
    source.layout(())  # checks that there is a place for every axis
    job = Job(
        image=str(source.path.resolve()),
        model=str(file.resolve()),
        image_stamp=_stamp(source.path),
        model_stamp=_digest(file),
        missing_chunks=missing_chunks,
        axes=source.axes,
        options=replace(options, tile=tiling.tile, memory_budget=None, batch_size=tiling.batch),
    )
    with locked(out):
        try:
            if goes_on:
                _same(part, read_job(part), job)
            else:
                _begin(part, source, predictor, tiling, job)
            worker = Worker(part, device)
            left = [block for block in worker.blocks if not worker.marker(block).exists()]
            count, total = len(worker.blocks) - len(left), len(worker.blocks)
            progress(count, total)

            def done(block: Block) -> None:
                nonlocal count
                count += 1
                progress(count, total)

            if client is None:
                worker.run(left, done)
            else:
                # Workers outlive this run: what they cache for the next block depends on the job.
                stamp = _digest(part / "job.json")
                task = functools.partial(_compute, str(part.resolve()), device, stamp)
                distribute(client, task, left, done)
            found = 0
            if options.output == "instances":
                found = _number(part, source, tiling, predictor.objects)
            _finish(part, out)
            return found
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{part} is kept, --resume goes on") from None
        except OSError as error:
            reason = error.strerror or error
            raise NotWritten(f"{part}: cannot be written: {reason}; --resume goes on") from None


def _finish(part: Path, out: Path) -> None:
    """Gives the result its name once it is on disk, and removes an earlier one of that name."""
    for rest in (part / "image").rglob("*.partial"):  # left by writes that a kill cut off
        rest.unlink()
    os.sync()
    old = part / "replaced"
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    (part / "image").rename(out)
    _flush(out.parent)
    (part / "job.json").unlink()
    shutil.rmtree(part)


def is_begun(out: Path) -> bool:
    """Whether there is an unfinished result to resume."""
    part = _part(out)
    folders = ("image", "classes")
    return (part / "job.json").exists() and any((part / name).exists() for name in folders)


def remove_rest(out: Path) -> None:
    """Removes what a process left beside its result if it was killed after it was finished."""
    with contextlib.suppress(ValueError), locked(out):  # else another process is at it
        if not is_begun(out):
            shutil.rmtree(_part(out), ignore_errors=True)


def _part(out: Path) -> Path:
    return out.with_name(out.name + ".part")


class Worker:
    """Computes the blocks of a job.

    Args:
        part: Folder of the job.
        device: Device to compute on.
    """

    def __init__(self, part: Path, device: str) -> None:
        job = read_job(part)
        model = load_model(job.model, device=find_device(device))
        stamps = _stamp(Path(job.image)), _digest(Path(job.model))
        if stamps != (job.image_stamp, job.model_stamp):
            raise ValueError(f"{part}: image and model must stay as they were when it was begun")
        self.part = part
        self.source = open_source(
            Path(job.image),
            model.config["in_channels"],
            missing_chunks=True,  # they were counted when the job began
            axes=job.axes,
            dims=model.dims,
        )
        self.predictor = Predictor(model, job.options)
        self.tiling = self.predictor.plan(self.source.size)
        self.ranges = job.ranges
        values = model.class_values if job.options.output == "labels" else None
        self.class_values = None if values is None else np.asarray(values)
        self.array = open_level(part / _folder(job.options.output) / "0", write=True)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, plane by plane, row by row."""
        sides = zip(self.source.size, block_of(self.tiling), strict=True)
        firsts = [*itertools.product(*(range(0, n, side) for n, side in sides))]
        return [*itertools.product(self.source.planes, firsts)]

    def marker(self, block: Block) -> Path:
        """Returns the file whose existence says that a block is done."""
        plane, first = block
        return self.part / "blocks" / ".".join(map(str, (*plane, *first)))

    def run(self, blocks: list[Block], done: Callable[[Block], None] = lambda block: None) -> None:
        """Computes blocks and writes them; calls `done` for each that has reached the disk."""
        for number, plane in enumerate(self.source.planes):
            chosen = [block for block in blocks if block[0] == plane]
            if chosen:
                self._run(chosen, None if self.ranges is None else self.ranges[number], done)

    def _run(
        self, blocks: list[Block], values: Range | None, done: Callable[[Block], None]
    ) -> None:
        """Computes and writes blocks of one plane or volume; see :meth:`run`."""
        groups = [self._tiles(block) for block in blocks]
        owner = {tile: b for b, group in zip(blocks, groups, strict=True) for tile in group}
        left = {block: len(group) for block, group in zip(blocks, groups, strict=True)}
        buffers: dict[Block, NDArray[np.generic]] = {}

        def write(origin: Shape, tile: Tensor) -> None:
            block = owner[origin]
            if block not in buffers:
                shape = tuple(part.stop - part.start for part in self._place(block))
                buffers[block] = np.empty(self.predictor.shape(shape), tile.numpy().dtype)
            starts = zip(origin, block[1], tile.shape[-len(origin) :], strict=True)
            place: list[Any] = [slice(o - first, o - first + n) for o, first, n in starts]
            buffers[block][(..., *place)] = tile.numpy()
            left[block] -= 1
            if left[block] == 0:
                self._write(block, buffers.pop(block))
                done(block)

        self.predictor.run(self.tiling, self.source.pixels(blocks[0][0]), values, write, groups)

    def _place(self, block: Block) -> list[slice]:
        """Returns where a block lies in the image, along each axis."""
        sides = zip(block[1], block_of(self.tiling), self.source.size, strict=True)
        return [slice(start, min(start + side, n)) for start, side, n in sides]

    def _tiles(self, block: Block) -> list[Shape]:
        """Returns the first pixels of the tiles of a block."""
        pairs = zip(self._place(block), self.tiling.tile, strict=True)
        return [*itertools.product(*(range(p.start, p.stop, side) for p, side in pairs))]

    def _write(self, block: Block, values: NDArray[np.generic]) -> None:
        """Writes a block and flushes it to disk, so that it outlives a crash or a power failure."""
        index = self.source.place(self.array, block[0], *self._place(block))
        self.array[index] = values if self.class_values is None else self.class_values[values]
        root = self.part / _folder(self.predictor.output) / "0"
        sides = zip(index, self.array.shape, self.array.chunks, strict=True)
        spans = [i if isinstance(i, slice) else slice(i, i + 1) for i, *_ in sides]
        chunks = (
            range((s.start or 0) // c, -(-(n if s.stop is None else s.stop) // c))
            for s, n, c in zip(spans, self.array.shape, self.array.chunks, strict=True)
        )
        for place in itertools.product(*chunks):
            _flush(root / self.array.metadata.encode_chunk_key(place))
        self.marker(block).touch()


def read_job(part: Path) -> Job:
    """Reads `job.json`.

    Raises:
        ValueError: If it is missing or not a job of unet_fast.
    """
    file = part / "job.json"
    try:
        content = parsed_json(read_file(file, TEXT))
        if content["ranges"] is not None:
            pairs = [(tuple(r["low"]), tuple(r["width"])) for r in content["ranges"]]
            content["ranges"] = [Range(low, width) for low, width in pairs]
        options = content["options"]
        options["tile"] = tuple(options["tile"])
        return Job(**content | {"options": Options(**options)})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: must hold a job of unet_fast: {reason_of(error)}") from None


def block_of(tiling: Tiling) -> Shape:
    """Returns the sides of a block: of one tile, or of as many small ones as fit :data:`SIDE`."""
    most = SIDE[len(tiling.tile)]
    sides = zip(tiling.tile, tiling.image, strict=True)
    return tuple(min(tile * max(1, most // tile), n) for tile, n in sides)


def _chunk_of(tiling: Tiling) -> Shape:
    """Returns the sides of a chunk: of a block, or equal parts of a large block of a volume."""
    block, most = block_of(tiling), SIDE[3]
    if len(block) == 2:
        return block

    def part_of(side: int, n: int) -> int:
        if side == n:  # the last part of the only block along an axis may be shorter
            return -(-side // -(-side // most))
        return next((s for s in range(most, most // 2, -1) if side % s == 0), side)

    return tuple(part_of(side, n) for side, n in zip(block, tiling.image, strict=True))


def _begin(part: Path, source: Source, predictor: Predictor, tiling: Tiling, job: Job) -> None:
    """Makes the folder of a job."""
    if predictor.model.normalisation == "percentile":
        readings = (functools.partial(source.parts, plane) for plane in source.planes)
        job = replace(job, ranges=[range_of(reading) for reading in readings])
    if part.exists():
        (part / "job.json").unlink(missing_ok=True)  # first: without it there is nothing to resume
        shutil.rmtree(part)
    (part / "blocks").mkdir(parents=True)
    dtype = str(predictor.dtype).removeprefix("torch.")
    if job.options.output == "labels" and predictor.model.class_values is not None:
        dtype = str(np.min_scalar_type(max(predictor.model.class_values)))
    _create(part / _folder(job.options.output), source, predictor.shape(()), tiling, dtype)
    replace_file(part / "job.json", json.dumps(asdict(job), indent=1).encode())


def _create(
    folder: Path, source: Source, channels: tuple[int, ...], tiling: Tiling, dtype: str
) -> Any:
    """Makes an OME-Zarr for a result."""
    axes, shape = source.layout(channels)
    chunk = dict(zip(source.spatial, _chunk_of(tiling), strict=True))
    return create(
        folder,
        name=stem_of(source.path),
        shape=shape,
        axes=axes,
        chunks=tuple(chunk.get(axis, 1) for axis in axes),
        dtype=dtype,
        pixel_size=source.pixel_size,
        labels=not channels,
    )


def _folder(output: str) -> str:
    """Returns the folder for the blocks of a job; objects are numbered only at the end."""
    return "classes" if output == "instances" else "image"


def _same(part: Path, begun: Job, job: Job) -> None:
    """Raises ValueError if a job was begun with other settings."""
    # Compared as stored in the file, where tuples are lists.
    old, new = (json.loads(json.dumps(asdict(j) | asdict(j.options))) for j in (begun, job))
    for name in sorted(new.keys() - {"options", "ranges"}):
        if old.get(name) != new[name]:
            raise ValueError(
                f"{part}: must go on with the settings it was begun with, {name} was "
                f"{old.get(name)}, got {new[name]}; --overwrite starts again"
            )


def _stamp(image: Path) -> str:
    """Returns a text that changes with an image: size and time of its file or array metadata."""
    names = ("zarr.json", ".zattrs", ".zarray", ".zgroup")
    files = [image / name for name in names] if image.is_dir() else [image]
    return " ".join(f"{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files if f.exists())


def _digest(file: Path) -> str:
    return hashlib.sha256(read_file(file)).hexdigest()


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compute(part: str, device: str, stamp: str, block: Block) -> None:
    """Computes one block, unless a worker that was lost has finished it."""
    worker = _worker(part, device, stamp)
    if not worker.marker(block).exists():
        worker.run([block])


@functools.lru_cache(maxsize=1)
def _worker(part: str, device: str, stamp: str) -> Worker:
    """Returns the worker of a job, cached for the next block."""
    return Worker(Path(part), device)


def _number(part: Path, source: Source, tiling: Tiling, objects: ObjectRule) -> int:
    """Numbers the objects of every plane, from the states of all pixels. Returns their number."""
    found = 0
    classes = open_level(part / "classes" / "0")
    for name in ("parts", "image"):
        shutil.rmtree(part / name, ignore_errors=True)  # left by a run that was killed here
    parts, result = (
        _create(part / name, source, (), tiling, "int32") for name in ("parts", "image")
    )
    for plane in source.planes:

        def read(array: Any, part: Part, plane: Any = plane) -> Any:
            return array[source.place(array, plane, *part)]

        def write(array: Any, part: Part, ids: Any, plane: Any = plane) -> None:
            array[source.place(array, plane, *part)] = ids

        found += label_in_blocks(
            source.size,
            block_of(tiling),
            objects,
            functools.partial(read, classes),
            [(functools.partial(read, a), functools.partial(write, a)) for a in (result, parts)],
        )
    return found
