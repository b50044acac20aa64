"""Overlap-tile prediction of images of any size, with the same result as all at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._files import reason_of
from .._layers import fused_in_bfloat16
from .._memory import PROGRAM, check_memory, gigabytes
from ..images.intensity import Range, as_float32, range_of
from ..images.source import Pixels
from ..model_file import rule_of
from ..unet import UNet
from .options import Options
from .tiling import Shape, Tiling, mirrored, plan, tile_bytes
from .views import Region, Rotation, views_of

OUTPUTS = ("scores", "probabilities", "labels", "instances")
AVERAGES = ("scores", "probabilities")
_LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
"""Layouts in memory that convolutions are fastest in, by the number of spatial axes."""


@overload
def predict(
    model: UNet, image: Tensor, *, device: torch.device | str | None = None, **options: Any
) -> Tensor: ...
@overload
def predict(
    model: UNet, image: NDArray[Any], *, device: torch.device | str | None = None, **options: Any
) -> NDArray[Any]: ...
def predict(
    model: UNet,
    image: Tensor | NDArray[Any],
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> Tensor | NDArray[Any]:
    """Predicts an image tile by tile, with the result of the whole image, whatever the tile size.

    The image is mirrored at its border, so that every pixel has its full context. Tiles of another
    size give the same numbers up to rounding (docs/prediction.md).

    Args:
        model: The network; it runs in evaluation mode and is left as it was. A bare `UNet` sees the
            values as given; one from :func:`load_model` gets them normalised as in training.
        image: A tensor or a NumPy array, (H, W) or (C, H, W), any size from 1 x 1, any real dtype,
            finite; of a network with three axes a volume, (D, H, W) or (C, D, H, W).
        device: Device to compute on; None: that of the model.
        **options: The fields of `unet_fast.prediction.options.Options`.

            ======================  ================================================================
            output                  "probabilities" (the default) or "scores", before softmax:
                                    (K, H, W), float32; "labels", the most probable class: (H, W),
                                    uint8 (int64 over 256 classes); "instances", the objects:
                                    (H, W), int32, numbered from 1. Of volumes: (K, D, H, W) and
                                    (D, H, W)
            min_area                minimum pixels of a connected component of seeds, >= 0
            seed_threshold          in [0, 1): pixels of higher foreground probability are seeds,
                                    which make the objects and grow into the rest of the
                                    foreground; 0: all foreground is seed
            foreground_threshold    in [0, 1): pixels of higher probability are foreground
            holes                   pixels, in [0, 1024]: holes of up to this size are filled
            grow                    pixels, in [0, 16], that objects grow into gaps between them;
                                    only gaps of up to 2 `grow` pixels are closed
            tta                     averaging over views: "flips" (4, of volumes 8), "rotations"
                                    (4, by right angles), "square" (8, both), or angles in degrees;
                                    of volumes each plane is rotated by itself
            average                 what is averaged: "scores" (the default) or "probabilities"
            tile                    side or sides of a tile of the output in pixels, >= 1, rounded
                                    up to multiples of `model.alignment`; None: chosen
            memory_budget           bytes for tiles being processed, or "500MB"; None: 1 GiB on a
                                    CPU, 4 GiB on a GPU, of volumes 4 and 8 GiB, or what the given
                                    tile takes
            batch_size              tiles in a batch, >= 1; None: chosen
            precision               torch.bfloat16 or torch.float16 (autocast); None: that of the
                                    weights
            compile                 whether `torch.compile` makes the network faster: worth it for
                                    many tiles
            ======================  ================================================================

            The five options about objects default to what training fitted (`model.objects`); a
            network without such a rule makes objects of all foreground.

    Returns:
        The prediction, on the CPU; of a NumPy array as NumPy.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an argument breaks its rule; if the image is larger than a tile and the
            network takes statistics from all that it sees (instance and group norm, batch norm
            without running mean), for then no tile agrees with the whole.

    Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, section 2 and figure 2.
    """
    settings = Options(**options)
    if not isinstance(getattr(model, "config", None), dict):  # a compiled one is of another type
        raise TypeError(f"predict: model must be a UNet, got {type(model).__name__}")
    channels = model.config["in_channels"]
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().float().numpy()
    else:
        pixels = np.asarray(image)
    dims = model.dims
    pixels = pixels[None] if pixels.ndim == dims else pixels
    if pixels.ndim != dims + 1 or pixels.shape[0] != channels or pixels.size == 0:
        hint = ""
        if pixels.ndim == dims + 1 and pixels.shape[-1] == channels:
            hint = " (np.moveaxis(image, -1, 0) puts channels first)"
        elif dims == 2 and pixels.ndim in (3, 4):
            hint = " (volumes need a network with dims=3; one with dims=2 takes each plane)"
        axes = "D, H, W"[-3 * dims + 2 :]
        raise ValueError(
            f"predict: image must be ({axes}) or (C, {axes}) with C = {channels}, "
            f"got {tuple(np.shape(image))}{hint}"
        )
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"predict: image must hold real numbers, got {pixels.dtype}")
    values = range_of(lambda: [pixels]) if model.normalisation == "percentile" else None
    with evaluating(model, device):
        found = _of_array(Predictor(model, settings), pixels, values)
    return found.numpy() if isinstance(image, np.ndarray) else found


def logits_of(model: UNet, image: Tensor) -> Tensor:
    """Returns the scores, (K, *S), on the CPU, of a normalised image or volume, (C, *S)."""
    with evaluating(model, None):
        return _of_array(Predictor(model, Options("scores")), image.detach().cpu().numpy(), None)


def _of_array(predictor: "Predictor", pixels: NDArray[np.generic], values: Range | None) -> Tensor:
    tiling = predictor.plan(pixels.shape[1:])
    return predictor.image(tiling, lambda *part: pixels[:, *part], values)


@contextmanager
def evaluating(model: UNet, device: torch.device | str | None) -> Iterator[None]:
    """Puts a network in evaluation mode on a device, within a `with` block."""
    home, training = next(model.parameters()).device, [m for m in model.modules() if m.training]
    try:
        model.to(home if device is None else device).eval()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        model.to(home)
        raise ValueError(
            f"predict: device must take the network, got {str(device)!r}: {reason_of(error)}"
        ) from None
    try:
        yield
    finally:
        model.to(home)
        for module in training:
            module.training = True


class Predictor:
    """A network that is ready to predict tiles.

    Args:
        model: The network, in evaluation mode, on the device to compute on.
        options: What to predict, and how.

    Raises:
        ValueError: If an option breaks its rule.
    """

    def __init__(self, model: UNet, options: Options) -> None:
        output, average = options.output, options.average
        if output not in OUTPUTS:
            raise ValueError(f"predict: output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        if average not in (None, *AVERAGES):
            raise ValueError(f"predict: average must be one of {AVERAGES}, got {average!r}")
        if average == "probabilities" and output == "scores":
            raise ValueError("predict: average must be scores for output scores, got probabilities")
        self.model = model
        self.options = options
        self.output = output
        self.average = average or "scores"
        if output != "instances" and options.rule:
            raise ValueError(
                f"predict: {', '.join(options.rule)} must go with instances, got {output}"
            )
        try:
            self.objects = replace(rule_of(model), **options.rule)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"predict: {error}") from None
        self.views = views_of(model, options.tta)
        self.turns = any(isinstance(view, Rotation) for view in self.views)
        weight = next(model.parameters())
        self.device, self.weights = weight.device, weight.dtype
        name, own = options.precision, str(self.weights).removeprefix("torch.")
        if name not in (None, own, "bfloat16", "float16"):
            raise ValueError(
                f"predict: precision must be {own} as the weights, bfloat16 or float16, got {name}"
            )
        self.precision: torch.dtype = getattr(torch, name or own)
        if torch.is_autocast_enabled(self.device.type):
            self.precision = torch.get_autocast_dtype(self.device.type)
        self.classes: int = model.config["num_classes"]
        self.net: nn.Module = model
        if options.compile:
            self.net = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        elif self.device.type == "cpu" and self.precision == torch.bfloat16:
            self.net = fused_in_bfloat16(model)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the predicted values."""
        if self.output in ("scores", "probabilities"):
            return torch.float32
        small = self.classes <= 256 or self.output == "instances"
        return torch.uint8 if small else torch.int64

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the result for an image of that size."""
        return (self.classes, *size) if self.output in ("scores", "probabilities") else size

    def plan(self, image: Shape, device: str | None = None) -> Tiling:
        """Chooses the tiles for an image of that size, on this device or another type of device."""
        return plan(
            self.model,
            image,
            device=device or self.device.type,
            value_bytes=self._value_bytes,
            tile=self.options.sides,
            memory_budget=self.options.budget,
            batch_size=self.options.batch_size,
        )

    @property
    def _value_bytes(self) -> int:
        # The bounding box of a rotated tile has up to twice its pixels.
        return self.precision.itemsize * (2 if self.turns else 1)

    def check_fits(self, tiling: Tiling, held: float = 0) -> None:
        """Refuses tiles that cannot fit into memory.

        Args:
            tiling: The tiles.
            held: Bytes of the result, if it is held in memory.

        Raises:
            ValueError: One line, that says what would fit.
        """

        def needed(tiling: Tiling) -> float:
            tiles = tiling.batch * tile_bytes(self.model, tiling, self._value_bytes)
            weights = sum(p.numel() for p in self.model.parameters()) * self.weights.itemsize
            held_here = held if self.device.type == "cpu" else 0
            return PROGRAM[self.device.type] + weights + tiles + held_here

        def way_out(there: float) -> str:
            usual = plan(
                self.model,
                tiling.image,
                device=self.device.type,
                value_bytes=self._value_bytes,
            )
            if needed(usual) <= there:
                return f"without tile, batch_size and memory_budget {gigabytes(needed(usual))} do"
            return (
                "scale the image down, give a smaller memory_budget, or let format ome-zarr write "
                "it block by block"
            )

        sides = " x ".join(map(str, tiling.tile))
        subject = f"predict: tile {sides} with batch_size {tiling.batch}"
        check_memory(needed(tiling), self.device, subject, way_out)

    def image(
        self,
        tiling: Tiling,
        pixels: Pixels,
        values: Range | None,
        progress: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Predicts an image into memory; see :meth:`run`. `progress` is called for each tile."""
        shape = self.shape(tiling.image)
        of_objects = 4 if self.output == "instances" else 0  # their numbers, too
        self.check_fits(tiling, math.prod(shape) * (self.dtype.itemsize + of_objects))
        result = torch.empty(shape, dtype=self.dtype, device="cpu")
        array = result.numpy()  # filled without torch's threads, which compute

        def write(origin: Shape, part: Tensor) -> None:
            sides = part.shape[-len(origin) :]
            place: list[Any] = [slice(o, o + n) for o, n in zip(origin, sides, strict=True)]
            array[(..., *place)] = part.numpy()
            progress()

        self.run(tiling, pixels, values, write)
        return torch.from_numpy(self.objects.of(array)) if self.output == "instances" else result

    def run(
        self,
        tiling: Tiling,
        pixels: Pixels,
        values: Range | None,
        write: Callable[[Shape, Tensor], None],
        groups: Sequence[Sequence[Shape]] | None = None,
    ) -> None:
        """Predicts tiles, while the next ones are read and the last ones written.

        Args:
            tiling: The tiles.
            pixels: Reads the image, in another thread.
            values: Normalisation of the image, or None.
            write: Called with the first pixel of a tile and its prediction, on the CPU and cut off
                where the image ends; in another thread, one tile at a time.
            groups: First pixels of the tiles to predict, in groups; no batch holds tiles of two
                groups. None: all tiles, as one group.
        """
        size = tiling.batch
        batches = [
            group[i : i + size]
            for group in ([tiling.origins] if groups is None else groups)
            for i in range(0, len(group), size)
        ]
        if not batches:
            return

        def read(batch: Sequence[Shape]) -> list[list[Tensor]]:
            return [self._parts(tiling, pixels, values, origin) for origin in batch]

        def hand_out(batch: Sequence[Shape], results: Tensor) -> None:
            if results.is_cuda:  # page-locked memory, which torch keeps, is copied to at full speed
                staged = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
                results = staged.copy_(results)
            results = results.cpu()
            for origin, result in zip(batch, results, strict=True):
                inside = (slice(n - o) for n, o in zip(tiling.image, origin, strict=True))
                write(origin, result[..., *inside])

        # NumPy, torch and compressors release the interpreter while they work. The network stays in
        # this thread, because autocast and inference mode are set for each thread.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            ahead = reader.submit(read, batches[0])
            behind: Future[None] = writer.submit(lambda: None)
            for i, batch in enumerate(batches):
                parts = ahead.result()
                if i + 1 < len(batches):
                    ahead = reader.submit(read, batches[i + 1])
                results = self._compute(tiling, parts, batch)
                behind.result()
                behind = writer.submit(hand_out, batch, results)
            behind.result()

    def _parts(
        self, tiling: Tiling, pixels: Pixels, values: Range | None, origin: Shape
    ) -> list[Tensor]:
        """Reads what of the image each view needs for a tile."""
        read: dict[Region, Tensor] = {}
        for view in self.views:
            region = view.region(tiling, origin)
            if region not in read:
                box = [slice(i.min(), i.max() + 1) for i in _indices(region, tiling.image)]
                part = as_float32(pixels(*box))
                read[region] = torch.from_numpy(part if values is None else values.apply(part))
        return [read[view.region(tiling, origin)] for view in self.views]

    @torch.inference_mode()
    def _compute(
        self, tiling: Tiling, parts: list[list[Tensor]], origins: Sequence[Shape]
    ) -> Tensor:
        """Predicts a batch of tiles."""
        total = torch.zeros((), device=self.device)
        # One view at a time: views may have different shapes, and only one takes memory.
        for view, of_view in zip(self.views, zip(*parts, strict=True), strict=True):
            read = zip(of_view, origins, strict=True)
            planes = [self._plane(part, view.region(tiling, o), tiling.image) for part, o in read]
            pairs = zip(planes, origins, strict=True)
            inputs = torch.stack([view.enter(plane, tiling, o) for plane, o in pairs])
            # Convolutions keep the layout of their input, and this one is faster. A single channel
            # fits both layouts: its strides must say which, and those of a new tensor do.
            layout = _LAYOUTS[self.model.dims]
            inputs = torch.empty_like(inputs, memory_format=layout).copy_(inputs)
            with self._autocast():
                scores = self.net(inputs).float()
            pairs = zip(scores, origins, strict=True)
            scores = torch.stack([view.leave(x, tiling, origin) for x, origin in pairs])
            total = total + (scores if self.average == "scores" else scores.softmax(1))
        mean = total / len(self.views)
        if self.output == "labels":
            return mean.argmax(1).to(self.dtype)
        if self.output == "instances":
            shares = mean.softmax(1) if self.average == "scores" else mean
            return self.objects.states(1 - shares[:, 0], mean.argmax(1) != 0)
        if self.output == "probabilities" and self.average == "scores":
            return mean.softmax(1)
        return mean

    def _plane(self, part: Tensor, region: Region, image: Shape) -> Tensor:
        """Returns a part of the mirrored plane, (C, *region), given what it shows of the image."""
        part = part.to(self.device, self.weights)
        for axis, index in enumerate(_indices(region, image), 1):
            if index[-1] - index[0] != len(index) - 1:  # else nothing is mirrored
                at = torch.from_numpy(index - index.min()).to(self.device)
                part = part.index_select(axis, at)
        return part

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == self.weights:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)


def _indices(region: Region, image: Shape) -> list[NDArray[np.intp]]:
    """Returns what a part of the mirrored plane shows of the image, along each axis."""
    return [mirrored(*span) for span in zip(*region, image, strict=True)]
