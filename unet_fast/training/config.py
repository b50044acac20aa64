"""The settings of a training run: in Python, on the command line, in a file."""

import math
import tomllib
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import torch

from .._files import TEXT, read_file, reason_of
from ..augment import Augmentation
from ..contracts.types import check_fields
from ..images.pairing import Reading
from ..unet import Norm
from ..weights import BorderWeights

DEFAULT_TILE: dict[tuple[int, str], int | tuple[int, ...]] = {
    **{(2, "valid"): 388, (2, "same"): 384},
    **{(3, "valid"): (28, 44, 44), (3, "same"): (32, 64, 64)},
}
"""Sides of the output tile by axes and padding; those without padding are the papers'."""
CONFIG, SPLIT = "config.toml", "split.json"
"""Files of a run: its settings, and which files it trains on."""
FITTED = ("tile", "base_channels", "optimizer")
"""Settings that `check` suggests, and `train` takes where they are not given."""
STEPS = 5000
"""Default number of steps of a run."""
LEARNING_RATE = {"sgd": 2e-3, "adam": 1e-3, "adamw": 1e-3}
"""Default peak rates, for a loss divided by the sum of the weights: see docs/training.md."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; on the command line the same names with dashes.

    A file of settings is TOML with the same names: RUN/config.toml, or what `unet-fast check`
    writes.
    """

    images: Path
    """Folder of images (PNG, TIFF, JPEG)."""
    labels: Path
    """Folder of labels of the same names, or as a_mask.png: integers, 0 background; see label_type.
    """
    _: KW_ONLY
    out: Path
    """Folder for all that the run writes."""
    steps: int | None = None
    """Training steps, >= 1. None: 5000, or as many as minutes allow."""
    minutes: float | None = None
    """Minutes for the whole run, > 0: the first steps are timed, and steps is set to what fits."""

    classes: Path | None = None
    """Folder of class maps, 0 background, for instance labels of several classes."""
    label_suffix: str | None = None
    """What names of labels have behind the name of the image, as _mask in a_mask.png. None: found.
    """
    recursive: bool = False
    """Take files of nested folders, too; names are then paths below the folder."""
    skip_unlabelled: bool = False
    """Leave out images without labels."""
    axes: str | None = None
    """Axes of images whose files do not say, as ZYX (planes, or depth) or CYX (channels)."""
    dims: Literal[2, 3] = 2
    """2: each plane is an image, also of a stack; 3: stacks along Z are volumes."""
    voxel_size: tuple[float, ...] | None = None
    """Micrometres along Z, Y and X, for volumes whose files do not say; 1 1 1: as deep as wide."""
    ignore_label: int | None = None
    """Label of pixels that do not count, as those that nobody looked at; tiles are drawn around
    the others."""
    background_label: int | None = None
    """Label of the background, if that is not 0; ignore_label may be 0 then."""
    label_type: Literal["auto", "instances", "semantic"] = "auto"
    """instances: one value for each object; semantic: one for each class; auto: by the values."""
    validation: float = 0.2
    """Share of the files that are kept for validation, in [0, 1); 0: none."""
    split: Path | None = None
    """JSON file with the split: {"train": [names], "validation": [names]}, without suffixes."""
    data_budget: float | None = None
    """Gigabytes of data to keep on a GPU; more is streamed. None: half of the free memory."""

    base_channels: int = 64
    """Channels of the uppermost level."""
    depth: int = 4
    """Number of poolings."""
    flat_levels: int | None = None
    """Of volumes: uppermost levels whose convolutions and poolings leave the depth as it is, in
    [0, depth]. None: until voxels are less than twice as deep as wide."""
    padding: Literal["valid", "same"] = "valid"
    """valid: unpadded, the paper; same: zero padding."""
    norm: Norm = "none"
    """Normalisation behind each convolution; none in the paper of 2015, batch in that of 2016."""
    dropout: float = 0.5
    """Probability of dropout at the bottom."""

    tile: int | tuple[int, ...] | None = None
    """Side of the output tile in pixels, or that along each axis, rounded up to valid ones. None:
    388, or 384 with same; of volumes 28 44 44, or 32 64 64 with same."""
    batch_size: int = 1
    """Tiles per step in each process."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd with momentum is the paper's."""
    learning_rate: float | None = None
    """Peak of the learning rate. None: 0.002 for sgd, 0.001 for adam and adamw."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0, or constant."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0, in [0, 1]."""
    momentum: float = 0.99
    """Momentum of sgd; 0.99 is the paper's."""
    weight_decay: float = 0.0
    """Weight decay, >= 0."""
    clip_gradient: float | None = 1.0
    """Greatest norm of the gradient, > 0; a longer gradient is scaled down. None: no limit."""
    ema: float | None = None
    """Decay of a running mean of the weights, in (0, 1), which is then the model. None: no mean."""
    loss_reduction: Literal["weighted_mean", "mean", "sum"] = "weighted_mean"
    """Divisor of the loss: sum of weights or number of pixels; sum (the paper) needs tiny rates."""
    weights: BorderWeights = field(default_factory=BorderWeights.paper_2015)
    """Targets and weights; "balanced" is counted over all training labels."""
    augmentation: Augmentation = field(default_factory=Augmentation.paper_2015)
    """Random deformation; of volumes that of the paper of 2016, unless something else is given."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the convolutions. auto: bfloat16 where the device supports it natively."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cuda_graph: bool = False
    """Replay the step as a CUDA graph: needs one process on a GPU, not float16."""

    evaluate_every: int | None = None
    """Steps between evaluations, >= 1. None: ten evaluations, or what 5 % of the time allows, which
    also limits how many files an evaluation takes."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, >= 1; each evaluation makes one, too. None: 500."""
    best_by: Literal["auto", "pq", "ap", "seg", "v_rand", "mean_iou", "iou", "loss"] = "auto"
    """Score that decides which evaluation is best. auto: pq if labels hold objects, v_rand if most
    of an image is foreground with thin borders, mean_iou for classes without objects."""
    patience: int | None = None
    """Stop after this many evaluations without a better one, >= 1. None: never."""
    previews: int = 3
    """Images drawn at each evaluation, >= 0."""
    tensorboard: bool = False
    """Write curves for TensorBoard, too."""
    seed: int = 0
    """Seed of all random numbers, >= 0."""
    deterministic: bool = False
    """Use only algorithms whose results repeat bit for bit."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:N or another accelerator of this PyTorch, as
    mps, which computes the network only; with torchrun a GPU for each process."""
    resume: bool = False
    """Go on from the checkpoint in the output folder; without one, start at step 1."""

    def __post_init__(self) -> None:
        """Checks the values; the network checks its own. Paths may be strings."""
        for name in PATHS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        check_fields("train", self)
        if self.dims == 3 and self.augmentation == Augmentation.paper_2015():
            object.__setattr__(self, "augmentation", Augmentation.volumes())
        if self.ignore_label is None:  # as it was given before labels had a setting for it
            object.__setattr__(self, "ignore_label", self.weights.ignore_label)
        marked = (None, self.ignore_label, self.reading.ignored)
        if self.weights.ignore_label not in marked:
            raise ValueError(
                f"train: weights.ignore_label must be ignore_label, {self.ignore_label}, got "
                f"{self.weights.ignore_label}"
            )
        self.augmentation.draw(0, (1,) * (self.dims + 1))  # checks settings of each axis
        tile, flat = self.tile, self.flat_levels
        sides = () if tile is None else (tile,) if isinstance(tile, int) else tile
        rules = (
            ("steps", _none_or(self.steps, lambda x: x >= 1), "be >= 1"),
            ("minutes", _none_or(self.minutes, lambda x: 0 < x < math.inf), "be > 0"),
            (
                "minutes",
                self.minutes is None or self.steps is None,
                "be none where steps are given",
            ),
            ("validation", 0 <= self.validation < 1, "be in [0, 1)"),
            ("data_budget", _none_or(self.data_budget, lambda x: x >= 0), "be >= 0"),
            (
                "tile",
                len(sides) in (0, 1, self.dims) and all(side >= 1 for side in sides),
                f"be a side >= 1, or {self.dims} of them",
            ),
            ("flat_levels", flat is None or 0 <= flat <= self.depth, "be in [0, depth]"),
            ("flat_levels", flat is None or self.dims == 3, "go with dims 3"),
            ("batch_size", 1 <= self.batch_size <= 65536, "be in [1, 65536]"),
            ("learning_rate", _none_or(self.learning_rate, lambda x: 0 < x < math.inf), "be > 0"),
            ("warmup", 0 <= self.warmup <= 1, "be in [0, 1]"),
            ("momentum", 0 <= self.momentum < 1, "be in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "be >= 0"),
            ("clip_gradient", _none_or(self.clip_gradient, lambda x: x > 0), "be > 0"),
            ("ema", _none_or(self.ema, lambda x: 0 < x < 1), "be in (0, 1)"),
            ("evaluate_every", _none_or(self.evaluate_every, lambda x: x >= 1), "be >= 1"),
            ("checkpoint_every", _none_or(self.checkpoint_every, lambda x: x >= 1), "be >= 1"),
            ("patience", _none_or(self.patience, lambda x: x >= 1), "be >= 1"),
            ("previews", self.previews >= 0, "be >= 0"),
            ("seed", 0 <= self.seed < 2**63, "be in [0, 2^63 - 1]"),
            (
                "cuda_graph",
                not (self.cuda_graph and self.precision == "float16"),
                "be off with precision float16",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"train: {name} must {rule}, got {getattr(self, name)}")
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name, None), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(
                    f"train: {name} must be one of {', '.join(choices)}, got {value!r}"
                )

    @classmethod
    def suggested(
        cls, images: Path | str, labels: Path | str, *, out: Path | str, **changes: Any
    ) -> "TrainConfig":
        """Returns the settings that `unet-fast check` suggests and `unet-fast train` takes.

        The defaults of this class are the paper's recipe; these fit the images and the machine.

        Args:
            images: Folder of images.
            labels: Folder of labels of the same names.
            out: Folder for all that the run writes.
            **changes: Other settings, which are taken as they are.

        Raises:
            ValueError: One line, if a setting or a file is wrong.
        """
        from .suggest import suggested_settings

        config = cls(Path(images), Path(labels), out=Path(out), **changes)
        more = suggested_settings(config)
        return replace(config, **{k: v for k, v in more.items() if k not in changes})

    @property
    def reading(self) -> Reading:
        """How images and labels are found and read."""
        return Reading(**{entry.name: getattr(self, entry.name) for entry in fields(Reading)})

    @property
    def peak_rate(self) -> float:
        """The greatest learning rate."""
        return self.learning_rate or LEARNING_RATE[self.optimizer]

    @property
    def output_tile(self) -> tuple[int, ...]:
        """Sides of the output tile, before they are rounded up."""
        tile = self.tile or DEFAULT_TILE[self.dims, self.padding]
        return (tile,) * self.dims if isinstance(tile, int) else tuple(tile)

    @property
    def length(self) -> int:
        """Number of steps, unless `minutes` decides it."""
        return self.steps or STEPS

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        rise = max(1, round(self.length * self.warmup)) if self.warmup > 0 else 0
        if step <= rise:
            return self.peak_rate * step / rise
        if self.schedule == "constant":
            return self.peak_rate
        done = (step - 1 - rise) / max(1, self.length - rise)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after a step."""
        return step == self.length or (
            self.evaluate_every is not None and step % self.evaluate_every == 0
        )

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after a step."""
        return step % (self.checkpoint_every or 500) == 0 or self.evaluates(step)


PATHS = ("images", "labels", "out", "classes", "split")
"""Settings that are paths."""
TABLES = ("weights", "augmentation")
"""Settings that are tables of settings."""
FREE = {
    *(
        *PATHS,
        "label_suffix",
        "recursive",
        "skip_unlabelled",
        "data_budget",
        "steps",
        "minutes",
        "compile",
        "cuda_graph",
        "evaluate_every",
    ),
    *("checkpoint_every", "patience", "previews", "tensorboard", "device", "resume"),
}
"""Settings that may change when a run is resumed."""


def as_dict(settings: Any) -> dict[str, Any]:
    """Converts settings for TOML and JSON: paths to strings, nested settings to tables.

    None is left out if it is the default, else it is "none", as on the command line.
    """
    result: dict[str, Any] = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            result[entry.name] = as_dict(value)
        elif value is not None:
            value = str(value) if isinstance(value, Path) else value
            result[entry.name] = list(value) if isinstance(value, tuple) else value
        elif entry.default is not None and entry.default is not MISSING:
            result[entry.name] = "none"
    return result


def as_toml(config: TrainConfig, comments: str = "") -> str:
    """Formats settings, without `resume`, as a file for `unet-fast train --config FILE`."""
    settings = as_dict(config)
    for name in PATHS:
        if name in settings:
            settings[name] = str(Path(settings[name]).absolute())
    del settings["resume"]
    tables = {k: settings.pop(k) for k in list(settings) if isinstance(settings[k], dict)}
    return comments + tomli_w.dumps(settings | tables)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a file that :func:`as_toml` wrote.

    Raises:
        ValueError: If there is no such file, or it is not TOML with such tables.
    """
    try:
        settings = tomllib.loads(read_file(path, TEXT).decode())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: must be a TOML file: {reason_of(error)}") from None
    except RecursionError:
        raise ValueError(f"{path}: must be a TOML file: it is nested too deeply") from None
    for name, value in settings.items():
        if name in TABLES and not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a table, got {value!r}")
        nested = {f"{name}.{k}": v for k, v in value.items()} if name in TABLES else {name: value}
        for inner, one in nested.items():
            if isinstance(one, dict):
                raise ValueError(f"{path}: {inner} must be a value, not a table")
    return settings


def _none_or(value: Any, rule: Any) -> bool:
    return value is None or bool(rule(value))


torch.serialization.add_safe_globals([TrainConfig, type(Path())])  # in others' checkpoints
