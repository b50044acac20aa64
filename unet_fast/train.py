"""Training: the settings, and one flat loop."""

import json
import math
import time
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ._library import HAS_CUDA
from .augment import Augmentation
from .data import Sample, load_samples, normalise
from .imageio import make_folder
from .ops.weighted_ce import weighted_ce
from .reference.border_weight_map import IGNORED
from .unet import MODEL_FILES, UNet, save_model
from .weights import BorderWeights

LEARNING_RATE = 2e-3
"""The default, for momentum 0.99 and a loss divided by the sum of the weights."""
LOG = "log.jsonl"
"""The file of a run that holds a line a step."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; on the command line the same names with dashes."""

    images: Path
    """Folder of images (PNG, TIFF, JPEG)."""
    labels: Path
    """Folder of instance labels of the same names: integers, 0 background."""
    _: KW_ONLY
    out: Path
    """Folder for the model and the log."""
    steps: int
    """Training steps, >= 1."""
    base_channels: int = 64
    """Channels of the uppermost level."""
    depth: int = 4
    """Number of poolings."""
    padding: Literal["valid", "same"] = "valid"
    """valid: unpadded, the paper; same: zero padding."""
    norm: Literal["none", "batch", "group", "instance"] = "none"
    """Normalisation behind each 3x3 convolution; none in the paper."""
    dropout: float = 0.5
    """Probability of dropout at the bottom."""
    tile: int | None = None
    """Side of the output tile in pixels, rounded up to a valid one; None: 388, with same 384."""
    batch_size: int = 1
    """Tiles of a step."""
    learning_rate: float | None = None
    """Peak, reached after a tenth of the steps; then half a cosine to 0. None: 0.002."""
    momentum: float = 0.99
    """Momentum of SGD."""
    weights: BorderWeights = field(default_factory=BorderWeights.paper_2015)
    """Targets and weights; "balanced" is counted over all labels."""
    augmentation: Augmentation = field(default_factory=Augmentation.paper_2015)
    """Random deformation."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Checks the values; the network checks its own. Paths may be strings."""
        for name in ("images", "labels", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        rules = (
            ("steps", self.steps >= 1, "be >= 1"),
            ("tile", self.tile is None or self.tile >= 1, "be >= 1"),
            ("batch_size", self.batch_size >= 1, "be >= 1"),
            ("learning_rate", self.learning_rate is None or self.learning_rate > 0, "be > 0"),
            ("momentum", 0 <= self.momentum < 1, "be in [0, 1)"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"train: {name} must {rule}, got {getattr(self, name)}")


def train(config: TrainConfig) -> UNet:
    """Trains a network by the recipe of 2015, with weight maps made after augmentation.

    SGD with momentum on random tiles: each is cut, deformed and changed in grey value in one pass,
    mirrored where it reaches over the image; targets and weights come from the deformed labels.

    Args:
        config: The settings. `config.out` gets `model.safetensors` and `model.json` at the end
            (see :func:`save_model`) and `log.jsonl`, a line a step: step, loss, learning_rate,
            seconds since the start.

    Returns:
        The network, in evaluation mode, with normalisation set: ready for :func:`predict`.

    Raises:
        ValueError: One line that names what is wrong: a setting, a file, or an output folder that
            holds a model already or cannot be written.
        FloatingPointError: If the loss is not finite.
    """
    device = find_device(config.device)
    samples = load_samples(config.images, config.labels)
    out = make_folder(config.out)
    if any((out / name).exists() for name in MODEL_FILES):
        raise ValueError(f"train: out must be a folder without a model, got {out}")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # weights and dropout draw from the global generator
        torch.manual_seed(config.seed)
        model = UNet(
            len(samples[0].image),
            base_channels=config.base_channels,
            depth=config.depth,
            padding=config.padding,
            norm=None if config.norm == "none" else config.norm,
            dropout=config.dropout,
        )
        model.normalisation = "percentile"
        _loop(config, model.to(device), samples, out, device)
    save_model(model, out)
    return model.eval()


def _loop(
    config: TrainConfig, model: UNet, samples: list[Sample], out: Path, device: torch.device
) -> None:
    generator = Generator().manual_seed(config.seed)
    images = [torch.from_numpy(normalise(s.image)).to(device) for s in samples]
    labels = [torch.from_numpy(s.labels).to(device) for s in samples]
    border_weights = config.weights.balanced(labels)
    peak = config.learning_rate or LEARNING_RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=config.momentum)
    autocast = _autocast_dtype(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()

    start = time.perf_counter()
    progress = tqdm(range(config.steps), desc="train", unit="step", disable=None)
    with (out / LOG).open("w") as log:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = peak * _schedule(step, config.steps)
            chosen = torch.randint(len(samples), (config.batch_size,), generator=generator)
            tiles = [
                draw_tile(config, model, images[i], labels[i], generator) for i in chosen.tolist()
            ]
            image = torch.cat([t[0] for t in tiles]).contiguous(memory_format=torch.channels_last)
            target, weights = border_weights(torch.cat([t[1] for t in tiles]))

            with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
                scores = model(image)
            loss = weighted_ce(scores, target, weights, ignore_index=IGNORED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"train: the loss must stay finite, got {value} at step {step + 1}; "
                    f"try a learning_rate below {peak}"
                )
            row = {
                "step": step + 1,
                "loss": value,
                "learning_rate": group["lr"],
                "seconds": round(time.perf_counter() - start, 3),
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
            progress.set_postfix(loss=f"{value:.3f}", refresh=False)


def draw_tile(
    config: TrainConfig, model: UNet, image: Tensor, labels: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Cuts a random tile out of an image and deforms it, in one pass.

    The label tile lies inside the image, or around it where the image is smaller, so that every
    pixel of it is met; what lies outside is mirrored.

    Args:
        config: Tile size, padding and augmentation.
        model: The network, for the sizes.
        image: (C, H, W), normalised.
        labels: (H, W).
        generator: Source of random numbers, on the CPU.

    Returns:
        The tile, (1, C, *input), and the labels of its centre, (1, *output), where the network maps
        input sizes to output sizes.
    """
    side = config.tile or (388 if config.padding == "valid" else 384)
    input_shape = model.input_shape((side, side))
    label_shape = model.output_shape(input_shape)
    origin = torch.empty(1, 2)
    for axis in range(2):
        room = labels.shape[axis] - label_shape[axis]
        low, high = min(room, 0), max(room, 0)
        position = torch.randint(low, high + 1, (), generator=generator)
        origin[0, axis] = position - (input_shape[axis] - label_shape[axis]) // 2
    parameters = config.augmentation.draw(1, (len(image), *input_shape), generator=generator)
    tile, moved = config.augmentation.apply(
        image[None],
        labels[None],
        parameters,
        output_shape=input_shape,
        label_shape=label_shape,
        offset=origin,
    )
    assert moved is not None  # labels were given
    return tile, moved


def find_device(name: str) -> torch.device:
    """The device of a name: auto (CUDA if device and kernels are there), cpu, cuda or cuda:N.

    Raises:
        ValueError: If there is no such device, or no kernels for it.
    """
    if name == "auto":
        return torch.device("cuda" if HAS_CUDA and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= count:
        raise ValueError(f"device must be present, got {name!r} with {count} CUDA devices")
    if not HAS_CUDA:
        raise ValueError(f"device must have kernels, got {name!r} with a build without CUDA")
    return device


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear rise over a tenth, then half a cosine to 0."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has units for it; emulated it is slower than float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32
