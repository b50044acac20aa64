"""Training: one flat loop."""

import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.profiler import record_function

from .._device import current, find_device, local_device, precision_of
from .._files import make_folder, replace_file
from .._progress import bar
from ..contracts.border_weight_map import IGNORED
from ..images.folders import label_type_of
from ..model_file import BEST, LAST, MODEL, load_model, save_model
from ..ops import weighted_ce
from ..plots import draw_tiles
from ..prediction.objects import ObjectRule
from ..unet import UNet
from .checkpoint import LOG, STATE, Progress, cut_log, load_state, read_log, save_state
from .config import FREE, TrainConfig, as_dict, as_toml, read_toml
from .previews import Artist, Scalars, draw_run, run_panels, tile_panels, tiles_file
from .processes import Processes, joined_processes
from .runtime import recorded, settled
from .samples import load_samples, number_objects, split_names
from .tiles import Dataset, Tiles, seed_of
from .validation import Judge, Look, Plan, Scores, best_by_of, has_objects, look, plan_of, said_of

CONFIG, SPLIT = "config.toml", "split.json"
"""Files of a run: its settings, and which files it trains on."""
SPAN = "unet_fast:"
"""What the names of the parts of a step begin with in a profile of torch.profiler."""


def train(config: TrainConfig, *, clock: Callable[[], float] = time.perf_counter) -> UNet:
    """Trains a network by the recipe of 2015, with weight maps made after augmentation.

    Each step takes random tiles: each is cut, deformed and changed in grey value in one pass,
    mirrored where it reaches over its image; targets and weights come from the deformed labels.
    Under torchrun every process takes its share of the tiles of a step, and one step of K processes
    is one step of a single process with K times the batch size, but for dropout and batch norm.

    Args:
        config: The settings. `config.out` gets

            ====================  ==================================================================
            config.toml           the settings; `unet-fast train --config` of it repeats the run
            split.json            the files of training and validation
            log.jsonl             a line a step: step, loss, learning_rate, gradient_norm, seconds
                                  and, after an evaluation, validation
            best.safetensors      the model of the best evaluation; :func:`load_model` reads it
            last.safetensors      the model of the last checkpoint
            state.safetensors     what `resume` goes on from
            curves.png, previews  drawn at each evaluation
            ====================  ==================================================================

        clock: Tells the time in seconds; what `config.minutes` counts by.

    Returns:
        The model that :func:`load_model` finds in `config.out`.

    Raises:
        ValueError: One line that names what is wrong: a setting, a file, a checkpoint, or an
            output folder that holds a run already or cannot be written.
        FloatingPointError: If loss, gradient or weights are not finite; the line names step and
            files, and `nonfinite.json` holds how they were deformed.
        RuntimeError: If another process of the run is gone.
        KeyboardInterrupt: After SIGINT (Ctrl-C) or SIGTERM, once a checkpoint is written.
    """
    device = local_device(find_device(config.device))
    with current(device):
        return _train(config, device, clock)


def _train(config: TrainConfig, device: torch.device, clock: Callable[[], float]) -> UNet:
    out, begin = config.out, clock()
    resumed = config.resume and (out / STATE).exists()
    config, train_set, validation_set = _load(config, resumed, device)
    # Signals are held back until the processes have parted: torchrun ends the others of a process
    # that died by a signal, and they are to say first what happened.
    with ExitStack() as signals, joined_processes(device) as processes, settled(config, device):
        if processes.first:
            _claim(make_folder(out), config)
        build = partial(_build, train_set, validation_set, processes, device)
        if config.minutes is not None:
            config = _in_time(config, build, begin, clock)
        run = build(config)
        config = run.config
        if resumed:
            run.resume()
        if processes.first:
            replace_file(out / CONFIG, as_toml(config).encode())
            parts = {"train": train_set.names, "validation": validation_set.names}
            replace_file(out / SPLIT, (json.dumps(parts, indent=1) + "\n").encode())
        run.loop(clock, signals.enter_context(_interruption()))
        processes.meet(device)  # the model is written
        return load_model(out, device=device)


def _build(
    train_set: Dataset,
    validation_set: Dataset,
    processes: Processes,
    device: torch.device,
    config: TrainConfig,
) -> "_Run":
    torch.manual_seed(config.seed)  # the same weights in all processes
    model = UNet(
        train_set.channels,
        train_set.num_classes,
        base_channels=config.base_channels,
        depth=config.depth,
        padding=config.padding,
        norm=None if config.norm == "none" else config.norm,
        dropout=config.dropout,
    )
    model.normalisation = "percentile"
    model.class_values = train_set.class_values
    model.ridge_width = config.weights.ridge_width
    return _Run(config, model.to(device), train_set, validation_set, processes, device)


def seconds_of(config: TrainConfig) -> float:
    """How long a run of `config.steps` takes on this machine, by its first steps.

    Raises:
        ValueError: As :func:`train`.
    """
    device = local_device(find_device(config.device))
    with current(device), joined_processes(device) as processes, settled(config, device):
        config, train_set, validation_set = _load(config, False, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are said when the run begins
            run = _build(train_set, validation_set, processes, device, config)
        return run.trial(time.perf_counter, 1.0)[1] * (config.length + run.planned.cost)


TRIAL = 0.03
"""Share of the time that goes into finding out how long a step takes."""


def _in_time(
    config: TrainConfig,
    build: Callable[[TrainConfig], "_Run"],
    begin: float,
    clock: Callable[[], float],
) -> TrainConfig:
    """Settings with the steps that fit into the minutes.

    Those that the run was begun with, if it goes on: the schedule must be the same. Otherwise the
    first steps are made, timed, and thrown away with all that they changed.
    """
    assert config.minutes is not None
    seconds = 60 * config.minutes
    if config.resume and (config.out / CONFIG).exists():
        earlier = read_toml(config.out / CONFIG)
        steps, every = earlier.get("steps"), earlier.get("evaluate_every")
        return replace(config, minutes=None, steps=steps, evaluate_every=every)
    run = build(replace(config, minutes=None))
    first, one = run.trial(clock, TRIAL * seconds)
    seconds -= clock() - begin
    if config.compile:  # once more
        seconds -= first
    shared = torch.tensor([one, seconds], dtype=torch.float64, device=run.device)
    run.processes.spread(shared)  # all make as many steps
    one, seconds = shared.tolist()
    steps, above = 0, 1 + max(0, math.floor(seconds / one))
    while above - steps > 1:  # steps fit, above do not
        middle = (steps + above) // 2
        fits = middle + run.plan(middle).cost <= seconds / one
        steps, above = (middle, above) if fits else (steps, middle)
    if steps < 1:
        raise ValueError(
            f"train: minutes must allow a step and an evaluation, got {config.minutes:g} with "
            f"steps of {one:.3g} s; {max(0.0, seconds):.3g} s were left for them"
        )
    return replace(config, minutes=None, steps=steps)


def _load(
    config: TrainConfig, resumed: bool, device: torch.device
) -> tuple[TrainConfig, Dataset, Dataset]:
    """Settings with the type of the labels, and the data for training and for validation."""
    samples = load_samples(config.images, config.labels, config.classes)
    ignored = config.weights.ignore_label
    if config.label_type == "auto":
        maps = [] if config.classes else [s.labels for s in samples]
        config = replace(config, label_type=label_type_of(maps, ignored))
    objects = number_objects(samples, config.label_type, ignored)
    names = [s.name for s in samples]
    split = config.out / SPLIT if resumed else config.split
    parts = split_names(names, config.validation, config.seed, split)
    budget = math.inf
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        budget = 0.5 * free if config.data_budget is None else 1e9 * config.data_budget
    sets = []
    for part in parts:
        index = [names.index(name) for name in part]
        chosen = replace(objects, labels=[objects.labels[i] for i in index])
        data = Dataset([samples[i] for i in index], chosen, config.weights, device, budget)
        budget -= data.size if data.resident else 0
        sets.append(data)
    train_set, validation_set = sets
    train_set.balanced()
    validation_set.weights = train_set.weights
    return config, train_set, validation_set


class _Run:
    """A network with all that trains it."""

    def __init__(
        self,
        config: TrainConfig,
        model: UNet,
        train_set: Dataset,
        validation_set: Dataset,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self.train_set, self.validation_set, self.processes = train_set, validation_set, processes
        self.input_shape = model.input_shape((config.output_tile,) * 2)
        self.label_shape = model.output_shape(self.input_shape)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = list(model.parameters())
        rate = torch.tensor(config.peak_rate, device=device) if config.cuda_graph else 0.0
        self.optimizer = _optimizer(config, self.parameters, rate)
        self.precision = precision_of(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.average = None if config.ema is None else deepcopy(model)
        network: nn.Module = model
        if processes.count > 1:
            ids = [device.index] if device.type == "cuda" else None
            network = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.network = torch.compile(network) if config.compile else network
        self.progress = Progress()
        self.count = config.batch_size * processes.count  # tiles of a step
        # Where there are no files for validation, objects are fitted on those of training.
        self.kind = "validation" if len(validation_set) else "training"
        self.judged = validation_set if len(validation_set) else train_set
        by = best_by_of(config, train_set)
        fits = has_objects(config, train_set)
        self.judge = Judge(by, fits, train_set, config.weights.ridge_width, processes)
        self.every = config.evaluate_every
        self.planned = self.plan(config.length)
        self.config = replace(
            config,
            steps=config.length,
            evaluate_every=self.planned.every,
            best_by=by,
            tile=config.output_tile,
        )
        self.settings = {k: v for k, v in as_dict(self.config).items() if k not in FREE}
        self.settings["learning_rate"] = config.peak_rate
        self.settings["batch_size"] = self.count
        if config.patience is not None and not len(validation_set):
            raise ValueError(
                f"train: patience must be none without files for validation, got {config.patience}"
            )

    def plan(self, steps: int) -> Plan:
        """When to evaluate, and on how many files; see :func:`plan_of`."""
        step = self.count * math.prod(self.input_shape)
        return plan_of(steps, self.every, step, self.judged.shapes, self.model)

    @property
    def ended(self) -> bool:
        """Whether no step is left, or evaluations have not got better for too long."""
        progress, patience = self.progress, self.config.patience
        impatient = patience is not None and progress.since_best >= patience
        return impatient or progress.step >= self.config.length

    @property
    def product(self) -> UNet:
        """The network that is evaluated and saved."""
        return self.model if self.average is None else self.average

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that holds tensors, for the training state."""
        modules: dict[str, nn.Module] = {"model": self.model}
        if self.average is not None:
            modules["average"] = self.average
        return modules

    def resume(self) -> None:
        """Goes back to the checkpoint in the output folder."""
        self.progress = load_state(self.config.out, self.settings, self.modules, self.optimizer)
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        if self.progress.objects is not None:
            self.product.objects = ObjectRule(**self.progress.objects)
        if self.processes.first:
            self.progress.seconds = cut_log(self.config.out, self.progress.step, self.ended)

    def loop(self, clock: Callable[[], float], interrupted: Callable[[], bool]) -> None:
        """The steps, until the last one, or until one in which the run is interrupted."""
        config, progress, processes = self.config, self.progress, self.processes
        out, first, last = config.out, processes.first, config.length
        compute = self.as_configured()
        start = clock() - progress.seconds
        begun, done = clock(), 0
        scalars = Scalars(out, progress.step) if first and config.tensorboard else None
        shown = bar(last, "train", "step", initial=progress.step, hidden=not first, clock=clock)
        said = ""
        log_of = _log(out, first, progress.step)
        with Artist() as artist, shown, log_of as log:
            for step in range(progress.step + 1, last + 1):
                if self.ended:
                    break
                rate = config.rate(step)
                try:
                    drawn, loss, norm, tiles = self.step(step, compute)
                    shared = torch.stack([loss, loss.new_tensor(float(interrupted()))])
                    value, stop = processes.add(shared).tolist()
                except RuntimeError as error:
                    raise _lost(error, processes, step) or error from None
                if step == 1 and first and config.previews:
                    artist.draw(draw_tiles, tiles_file(out), tile_panels(self.train_set, *tiles))
                gradient = norm.item()
                # The gradient scaler leaves out steps whose gradient is not finite.
                if not math.isfinite(value + (0 if self.scaler.is_enabled() else gradient)):
                    self._report(step, f"loss {value}, gradient norm {gradient}", drawn)
                evaluated, saved = config.evaluates(step), stop > 0 or config.saves(step)
                if saved and not all(bool(p.isfinite().all()) for p in self.parameters):
                    self._report(step, "weights that are not", drawn)
                progress.step = step

                row: dict[str, Any] = {"step": step, "loss": value, "learning_rate": rate}
                row["gradient_norm"] = gradient if math.isfinite(gradient) else None
                if evaluated:
                    looks, scores, best = self._evaluate()
                    row[self.kind] = scores
                    said = f", {self.kind} {said_of(scores, config.best_by)}"
                    if best is not None:
                        row["best"] = best
                row["seconds"] = round(clock() - start, 3)
                if first:
                    _write(log, out / LOG, row)
                if saved and first:
                    self._save()
                if evaluated and first:
                    self._draw(artist, looks)
                if scalars is not None:
                    scalars.add(row)
                done += self.count
                speed = done / max(clock() - begun, 1e-9)
                shown.set_postfix_str(
                    f"loss {value:.3f}{said}, {speed:.3g} images/s", refresh=False
                )
                shown.update()
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {step}, which is saved; go on with resume"
                    )
        if scalars is not None:
            scalars.close()

    def trial(self, clock: Callable[[], float], seconds: float) -> tuple[float, float]:
        """How long the first step takes, and a later one, tried for about so many seconds.

        The run is of no use afterwards.
        """
        compute = self.as_configured()
        ends, goes_on = [clock()], True
        while goes_on:
            self.step(len(ends), compute)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            ends.append(clock())
            enough = ends[-1] - ends[0] >= seconds or len(ends) > 50
            flag = torch.tensor([float(len(ends) < 4 or not enough)], device=self.device)
            self.processes.spread(flag)  # all of them stop together
            goes_on = bool(flag.item())
        return ends[1] - ends[0], (ends[-1] - ends[1]) / (len(ends) - 2)

    def as_configured(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """:meth:`compute`, as a CUDA graph if that is asked for."""
        return recorded(self.compute, self.device) if self.config.cuda_graph else self.compute

    def step(
        self, step: int, compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tiles, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Makes a step.

        Returns:
            Which tiles all processes took, this one's share of the loss, the norm of the gradient,
            and its tiles with their labels.
        """
        config, shapes = self.config, (self.input_shape, self.label_shape)
        _set_rate(self.optimizer, config.rate(step))
        drawn = self.train_set.draw(
            config.augmentation, self.count, *shapes, seed=config.seed, step=step
        )
        first = self.processes.rank * config.batch_size
        mine = drawn[first : first + config.batch_size]
        with record_function(f"{SPAN} tiles"):
            tiles = self.train_set.cut(config.augmentation, mine, *shapes)
        # For dropout:
        torch.manual_seed(seed_of(config.seed, 2, step, self.processes.rank))
        self.model.train()
        loss, norm = compute(*tiles)
        return drawn, loss, norm, tiles

    def compute(self, tiles: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A step, from tiles and their labels to new weights.

        Returns:
            This process's share of the loss of all, and the norm of the gradient.
        """
        config, processes = self.config, self.processes
        with record_function(f"{SPAN} weights"):
            target, weights = self.train_set.targets(labels)
        self.optimizer.zero_grad(set_to_none=True)
        with record_function(f"{SPAN} network"), self._autocast():
            scores = self.network(tiles.contiguous(memory_format=torch.channels_last))
        with record_function(f"{SPAN} loss"):
            ce = weighted_ce(scores, target, weights, ignore_index=IGNORED, reduction="sum")
            # Divided by the sum over all processes: the mean of their means is something else.
            loss = ce / _divisor(config.loss_reduction, target, weights, processes)
        with record_function(f"{SPAN} backward"):  # processes take means of gradients
            self.scaler.scale(loss * processes.count).backward()
        with record_function(f"{SPAN} optimizer"):
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if config.clip_gradient is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, config.clip_gradient, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._update_average()
        return loss.detach(), norm

    def _update_average(self) -> None:
        """The running mean of weights and statistics; the first step is taken as it is."""
        if self.average is None or self.config.ema is None:
            return
        share = 1 - self.config.ema if self.progress.step > 0 else 1.0
        pairs = zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        )
        for mean, now in pairs:
            if mean.is_floating_point():
                mean.lerp_(now, share)
            else:
                mean.copy_(now)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def _evaluate(self) -> tuple[list[Look], Scores, dict[str, Any] | None]:
        """Scores the network and fits the rule of its objects; keeps it if it is the best.

        The last evaluation takes more files than those before, and the best model so far is kept
        only if it is better than the last one there, too.

        Returns:
            What this process saw of the files, the scores, and, at the last evaluation, those of
            the best model with its step.
        """
        progress, processes, planned = self.progress, self.processes, self.planned
        try:
            looks = self._look(self.product, planned.files)
            # All rules are tried at the first evaluation and at the last.
            scores, self.product.objects = self.judge(looks, self.product.objects)
            files, best, by = planned.files, None, self.config.best_by
            better = _score(progress, scores, by)
            if self.ended:
                looks += self._look(self.product, planned.last, planned.files)
                scores, self.product.objects = self.judge(looks)
                del looks[max(1, self.config.previews) :]  # the rest is not drawn
                files, best = planned.last, dict[str, Any](scores, step=progress.step, by=by)
                if not better and len(self.validation_set) and (self.config.out / BEST).exists():
                    rival = load_model(self.config.out / BEST, device=self.device)
                    rival.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                    theirs, rival.objects = self.judge(self._look(rival, planned.last))
                    # The same weights: a run that was killed here is at it again.
                    again = _equal(rival, self.product)
                    better = again or _value(scores, by) > _value(theirs, by)
                    if not better:
                        best = dict[str, Any](theirs, step=progress.best_step, by=by)
                        if processes.first:  # with its rule of all these files
                            save_model(rival, self.config.out / BEST)
        except (RuntimeError, MemoryError):  # images too large for the memory, say
            if processes.first and not self.ended:  # the last one is to be done again
                self._save()
            raise
        rule = self.product.objects
        progress.objects = None if rule is None else asdict(rule)
        if better:
            progress.best_step = progress.step
            if processes.first and len(self.validation_set):
                save_model(self.product, self.config.out / BEST)
        return looks, scores | {"files": files}, best

    def _look(self, model: UNet, stop: int, start: int = 0) -> list[Look]:
        """This process's share of the files; all share one network, its statistics included."""
        for x in model.buffers():
            self.processes.spread(x)
        count = self.processes.count
        mine = [i for i in range(start, stop) if i % count == self.processes.rank]
        with self._autocast():
            return [look(model, self.judged, i, self.config.loss_reduction) for i in mine]

    def _draw(self, artist: Artist, looks: list[Look]) -> None:
        """Curves, and the first images; of training where there are none for validation."""
        title = f"{self.kind} images after {self.progress.step} steps"
        shown = looks[: self.config.previews]
        out, rule = self.config.out, self.product.objects
        panels = run_panels(self.judged, shown, rule)
        artist.draw(draw_run, out, read_log(out), panels, rule is None, self.progress.step, title)

    def _save(self) -> None:
        """The state comes last: what a kill leaves of the rest is written again from it."""
        self.progress.scaler = dict(self.scaler.state_dict())
        save_model(self.product, self.config.out / LAST)
        save_state(self.config.out, self.progress, self.settings, self.modules, self.optimizer)

    def _report(self, step: int, value: str, drawn: Tiles) -> None:
        """Ends the run; the last checkpoint stays as it is."""
        config, names = self.config, self.train_set.names
        where = config.out / "nonfinite.json"
        if self.processes.first:
            facts = {"step": step, "found": value, "tiles": drawn.describe(names)}
            replace_file(where, (json.dumps(facts, indent=1) + "\n").encode())
        files = ", ".join(dict.fromkeys(names[i] for i in drawn.files))
        raise FloatingPointError(
            f"train: loss, gradient and weights must stay finite, got {value} at step {step} from "
            f"{files} (how they were deformed: {where}); try a learning_rate below "
            f"{config.peak_rate}"
        )


def _claim(out: Path, config: TrainConfig) -> None:
    """Makes sure that no run is overwritten."""
    models = [out / name for name in (BEST, LAST, MODEL) if (out / name).exists()]
    others = [out / name for name in (STATE, LOG, CONFIG) if (out / name).exists()]
    if not config.resume:
        if models or others:
            raise ValueError(
                "train: out must be a folder without a run, or resume must be set, got "
                f"{(models + others)[0]}"
            )
        return
    # Without a state they are of a first checkpoint that was cut off, or somebody's.
    first = next(step for step in range(1, config.length + 1) if config.saves(step))
    begun = others and max((row["step"] for row in read_log(out)), default=0) <= first
    if models and not (out / STATE).exists() and not begun:
        raise ValueError(f"{out}: must hold {STATE} to be resumed, but has only {models[0].name}")


def _optimizer(
    config: TrainConfig, parameters: list[nn.Parameter], rate: Tensor | float
) -> Optimizer:
    options: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer != "sgd":
        options["capturable"] = config.cuda_graph
        return (Adam if config.optimizer == "adam" else AdamW)(parameters, **options)
    optimizer = SGD(parameters, momentum=config.momentum, **options)
    if config.momentum > 0:
        # Made here: a first step that the gradient scaler leaves out would leave them unset.
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _divisor(
    reduction: str, target: Tensor, weights: Tensor, processes: Processes
) -> Tensor | float:
    """What the sum of the loss is divided by, that of all processes; never 0."""
    if reduction == "sum":
        return 1.0
    if reduction == "mean":
        return processes.add((target != IGNORED).sum().to(weights.dtype)).clamp_min(1)
    return processes.add(weights.sum()).clamp_min(torch.finfo(weights.dtype).tiny)


def _score(progress: Progress, scores: Scores, by: str) -> bool:
    """Whether an evaluation is the best so far, which it then is; of equals the first one."""
    value = _value(scores, by)
    if value <= (-math.inf if progress.best is None else progress.best):
        progress.since_best += 1
        return False
    progress.best, progress.since_best = value, 0
    return True


def _equal(one: UNet, other: UNet) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _value(scores: Scores, by: str) -> float:
    """What is greater of a better network; where labels hold no object, of the one of less loss."""
    value, loss = scores.get(by), scores["loss"]
    if loss is None:
        return -math.inf
    return -loss if value is None or by == "loss" else value


def _lost(error: RuntimeError, processes: Processes, step: int) -> RuntimeError | None:
    """What to say where another process is gone; None of other errors."""
    reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    talk = isinstance(error, torch.distributed.DistError) or "gloo" in reason
    if processes.count == 1 or not talk:
        return None
    return RuntimeError(
        f"train: process {processes.rank} lost contact with another at step {step}; go on from the "
        f"last checkpoint with resume ({reason})"
    )


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGINT or SIGTERM came; after a second one the process ends at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: False
        return

    def note(number: int, _: Any) -> None:
        if came:
            raise KeyboardInterrupt("stopped at once; go on from the last checkpoint with resume")
        came.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log(out: Path, first: bool, step: int) -> Iterator[FileIO]:
    """The log, open for more lines; another process than the first has none."""
    path = out / LOG if first else Path(os.devnull)
    with path.open("ab" if step else "wb", buffering=0) as file:
        yield file


def _write(log: FileIO, path: Path, row: dict[str, Any]) -> None:
    """Adds a line to the log."""
    try:
        log.write((json.dumps(row, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
