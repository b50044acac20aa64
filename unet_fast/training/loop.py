"""Training: one flat loop."""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .._device import device_scope, find_device, local_device
from .._files import locked, make_folder, remove_parts, replace_file
from .._progress import counted, say
from ..model_file import load_model
from ..plots import draw_tiles
from ..unet import UNet
from .checkpoint import STATE, check_unused
from .config import CONFIG, SPLIT, TrainConfig, as_toml, read_toml
from .journal import Journal
from .memory import bytes_of_run, check_fits
from .previews import Artist, tile_panels, tiles_file
from .processes import Processes, joined_processes, lost
from .run import Run
from .runtime import interruption, reproducible
from .step import network_of
from .tiles import Dataset, load_sets
from .validation import said_of


def train(config: TrainConfig, *, clock: Callable[[], float] = time.perf_counter) -> UNet:
    """Trains a network by the recipe of 2015, with weight maps made after augmentation.

    Each step takes random tiles, each cut, deformed and changed in grey value in one pass, and
    mirrored where it reaches beyond its image; targets and weights come from the deformed labels.
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

        clock: Returns the time in seconds, by which `config.minutes` counts.

    Returns:
        The model that :func:`load_model` finds in `config.out`.

    Raises:
        TypeError: If `config` is not a :class:`TrainConfig`.
        ValueError: One line that names what is wrong: a setting, a file, a checkpoint, or an
            output folder that holds a run already or cannot be written.
        FloatingPointError: If loss, gradient or weights are not finite; the line names step and
            files, and `nonfinite.json` holds how they were deformed.
        RuntimeError: If another process of the run is lost.
        KeyboardInterrupt: After SIGINT (Ctrl-C) or SIGTERM, once a checkpoint is written.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"train: config must be a TrainConfig, got {type(config).__name__}")
    device = local_device(find_device(config.device))
    with device_scope(device):
        return _train(config, device, clock)


def _train(config: TrainConfig, device: torch.device, clock: Callable[[], float]) -> UNet:
    out, begin = config.out, clock()
    resumed = config.resume and (out / STATE).exists()
    config, train_set, validation_set = load_sets(config, resumed, device)
    check_fits(config, (train_set, validation_set), device)
    # Signals are held back until the processes have left their group: if one dies by a signal,
    # torchrun ends the others, which are to report first what happened.
    with (
        ExitStack() as signals,
        joined_processes(device) as processes,
        reproducible(config, device),
    ):
        if processes.first:
            make_folder(out)
            signals.enter_context(locked(out / STATE))  # one run for each folder
            check_unused(out, config)
            for folder in (out, out / "previews"):
                remove_parts(folder)
        build = partial(_build, train_set, validation_set, processes, device)
        if config.minutes is not None:
            config = _in_time(config, build, begin, clock)
        run = build(config)
        config = run.config
        if processes.first:
            _tell_of_tile(run)
        if resumed:
            run.resume()
            if processes.first:
                _tell_of_resumption(run)
        if processes.first:
            replace_file(out / CONFIG, as_toml(config).encode())
            parts = {"train": train_set.names, "validation": validation_set.names}
            replace_file(out / SPLIT, (json.dumps(parts, indent=1) + "\n").encode())
        _loop(run, clock, signals.enter_context(interruption()))
        processes.wait(device)  # until the model is written
        return load_model(out, device=device)


def _tell_of_tile(run: Run) -> None:
    """Says that the network takes no tiles of the side that was asked for."""
    asked, sides, depth = run.config.output_tile, run.step.label_shape, run.config.depth
    if sides != asked:
        one, other = (" x ".join(map(str, dict.fromkeys(x))) for x in (asked, sides))
        say(
            f"train: tile {one} becomes {other}, the next for depth {depth}; a smaller depth has "
            "sides closer to it"
        )


def _tell_of_resumption(run: Run) -> None:
    """Says that a resumed run has nothing to do, or that its learning rate jumps."""
    config, done = run.config, run.progress.step
    if run.ended:
        steps = f"{done} of {counted(config.length, 'step')} done"
        why = f"{steps}; --steps N goes on"
        if done < config.length:
            why = f"{steps}, ended by --patience {config.patience}; a larger one goes on"
        say(f"train: nothing to do: {why}")
        return
    begun = config.out / CONFIG
    earlier = read_toml(begun).get("steps") if begun.exists() else None
    if not isinstance(earlier, int) or earlier < 1:
        return
    before, now = (replace(config, steps=n).rate(done + 1) for n in (earlier, config.length))
    if before != now:
        say(
            f"train: with {counted(config.length, 'step')} instead of {earlier} the learning rate "
            f"goes on at {now:.2g}, not at {before:.2g} (step {done + 1})"
        )


def _loop(run: Run, clock: Callable[[], float], interrupted: Callable[[], bool]) -> None:
    """Runs the steps until the last one, or until the run is interrupted."""
    config, progress, processes, step = run.config, run.progress, run.processes, run.step
    out, first, last, said = config.out, processes.first, config.length, ""
    start = clock() - progress.seconds
    step.record()
    journal = Journal(out, progress.step, last, first, config.tensorboard, clock)
    with Artist() as artist, journal:
        for number in range(progress.step + 1, last + 1):
            if run.ended:
                break
            try:
                drawn, loss, norm, tiles = step(number)
                shared = torch.stack([loss, loss.new_tensor(float(interrupted()))])
                value, stop = processes.add(shared).tolist()
            except RuntimeError as error:
                raise lost(error, processes, number) or error from None
            gradient = norm.item()
            evaluated, saved = config.evaluates(number), stop > 0 or config.saves(number)
            if number == 1 and first and config.previews:
                artist.draw(draw_tiles, tiles_file(out), tile_panels(run.train_set, *tiles))
            run.check(number, value, gradient, drawn, saved)
            progress.step = number

            row: dict[str, Any] = {"step": number, "loss": value}
            row["learning_rate"] = config.rate(number)
            row["gradient_norm"] = gradient if math.isfinite(gradient) else None
            if evaluated:
                looks, scores, best = run.evaluate()
                row[run.kind] = scores
                said = f", {run.kind} {said_of(scores, config.best_by)}"
                if best is not None:
                    row["best"] = best
            row["seconds"] = round(clock() - start, 3)
            journal.add(row, said, step.count)
            if evaluated and first:
                run.draw(artist, looks)
            if saved and first:
                artist.wait()  # a run that goes on from here has no pictures to draw
                run.save()
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after step {number}, which is saved; --resume goes on"
                )


def _build(
    train_set: Dataset,
    validation_set: Dataset,
    processes: Processes,
    device: torch.device,
    config: TrainConfig,
) -> Run:
    torch.manual_seed(config.seed)  # the same weights in all processes
    model = network_of(config, train_set)
    model.normalisation = "percentile"
    model.class_values = train_set.class_values
    model.ridge_width = config.weights.ridge_width
    return Run(config, model.to(device), train_set, validation_set, processes, device)


def cost_of(config: TrainConfig) -> tuple[float, float]:
    """Estimates what a run takes on this machine: seconds, from its first steps, and bytes.

    Raises:
        ValueError: As :func:`train`.
    """
    device = local_device(find_device(config.device))
    with device_scope(device), joined_processes(device) as processes, reproducible(config, device):
        config, train_set, validation_set = load_sets(config, False, device)
        check_fits(config, (train_set, validation_set), device)
        memory = bytes_of_run(config, (train_set, validation_set), device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are shown when the run begins
            run = _build(train_set, validation_set, processes, device, config)
        step = _trial(run, time.perf_counter, 1.0)[1]
        return step * (config.length + run.planned.cost), memory


TRIAL = 0.03
"""Share of the time that goes into timing the first steps."""


def _in_time(
    config: TrainConfig,
    build: Callable[[TrainConfig], Run],
    begin: float,
    clock: Callable[[], float],
) -> TrainConfig:
    """Returns settings with the steps that fit into the minutes.

    A resumed run keeps the steps it was begun with, because the schedule must be the same.
    Otherwise the first steps are run, timed, and discarded with all that they changed.
    """
    assert config.minutes is not None
    seconds = 60 * config.minutes
    if config.resume and (config.out / CONFIG).exists():
        earlier = read_toml(config.out / CONFIG)
        steps, every = earlier.get("steps"), earlier.get("evaluate_every")
        return replace(config, minutes=None, steps=steps, evaluate_every=every)
    run = build(replace(config, minutes=None))
    first, one = _trial(run, clock, TRIAL * seconds)
    seconds -= clock() - begin
    if config.compile:  # the run compiles once more
        seconds -= first
    shared = torch.tensor([one, seconds], dtype=torch.float64, device=run.train_set.device)
    run.processes.broadcast(shared)  # all processes take as many steps
    one, seconds = shared.tolist()
    steps, above = 0, 1 + max(0, math.floor(seconds / one))
    while above - steps > 1:  # `steps` fit, `above` do not
        middle = (steps + above) // 2
        fits = middle + run.plan(middle).cost <= seconds / one
        steps, above = (middle, above) if fits else (steps, middle)
    if steps < 1:
        raise ValueError(
            f"train: minutes must allow a step and an evaluation, got {config.minutes:g} with "
            f"steps of {one:.3g} s; {max(0.0, seconds):.3g} s were left for them"
        )
    return replace(config, minutes=None, steps=steps)


def _trial(run: Run, clock: Callable[[], float], seconds: float) -> tuple[float, float]:
    """Times the first step, and the mean of later ones, for about that many seconds.

    The run cannot be used afterwards.
    """
    run.step.record()
    ends, goes_on = [clock()], True
    while goes_on:
        run.step(len(ends))
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)
        ends.append(clock())
        enough = ends[-1] - ends[0] >= seconds or len(ends) > 50
        flag = torch.tensor([float(len(ends) < 4 or not enough)], device=run.train_set.device)
        run.processes.broadcast(flag)  # all processes stop together
        goes_on = bool(flag.item())
    return ends[1] - ends[0], (ends[-1] - ends[1]) / (len(ends) - 2)
