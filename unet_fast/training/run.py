"""A training run between its steps: evaluation, checkpoints, resuming."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import torch

from .._files import replace_file
from .._progress import counted
from ..model_file import BEST, LAST, load_model, save_model
from ..objects import ObjectRule
from ..unet import UNet
from .checkpoint import STATE, Progress, cut_log, load_state, read_log, save_state
from .config import FREE, TrainConfig, as_dict
from .previews import Artist, draw_run, run_panels
from .processes import Processes
from .step import Step
from .tiles import Dataset, Tiles
from .validation import Judge, Look, Plan, Scores, best_by_of, has_objects, look, plan_of


class Run:
    """A network in training, with its data, its steps and its progress.

    Args:
        config: The settings.
        model: The network.
        train_set: The images for training.
        validation_set: Those for validation; it may be empty.
        processes: The processes that train the network.
        device: Device of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: UNet,
        train_set: Dataset,
        validation_set: Dataset,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.step = Step(config, model, train_set, processes, device)
        self.train_set, self.validation_set = train_set, validation_set
        self.processes, self.device = processes, device
        self.progress = Progress()
        # Without files for validation, the rule of objects is fitted on files of training.
        self.kind = "validation" if len(validation_set) else "training"
        self.judged = validation_set if len(validation_set) else train_set
        by = best_by_of(config, train_set)
        fits = has_objects(config, train_set)
        self.judge = Judge(by, fits, train_set, config.weights.ridge_width, processes)
        self.every = config.evaluate_every
        self.planned = self.plan(config.length)
        sides = {*config.output_tile}
        self.config = replace(
            config,
            steps=config.length,
            evaluate_every=self.planned.every,
            best_by=by,
            tile=config.output_tile if len(sides) > 1 or config.dims == 3 else sides.pop(),
        )
        self.settings = {k: v for k, v in as_dict(self.config).items() if k not in FREE}
        self.settings["learning_rate"] = config.peak_rate
        self.settings["batch_size"] = self.step.count
        if config.patience is not None and not len(validation_set):
            raise ValueError(
                f"train: patience must be none without files for validation, got {config.patience}"
            )

    def plan(self, steps: int) -> Plan:
        """When to evaluate, and on how many files; see :func:`plan_of`."""
        step = self.step.count * math.prod(self.step.input_shape)
        return plan_of(steps, self.every, step, self.judged.evaluated, self.step.model)

    @property
    def ended(self) -> bool:
        """Whether no step is left, or evaluations have not improved for too long."""
        progress, patience = self.progress, self.config.patience
        impatient = patience is not None and progress.since_best >= patience
        return impatient or progress.step >= self.config.length

    @property
    def saved_model(self) -> UNet:
        """The network that is evaluated and saved."""
        return self.step.saved_model

    def resume(self) -> None:
        """Restores the checkpoint in the output folder."""
        self.progress = load_state(
            self.config.out, self.settings, self.step.modules, self.step.optimizer
        )
        if self.progress.scaler:
            try:
                self.step.scaler.load_state_dict(self.progress.scaler)
            except (LookupError, TypeError, RuntimeError) as error:
                file = self.config.out / STATE
                raise ValueError(f"{file}: must hold a gradient scaler: {error!r}") from None
        if self.progress.objects is not None:
            self.saved_model.objects = ObjectRule(**self.progress.objects)
        self.step.averaged = self.progress.step > 0
        if self.processes.first:
            self.progress.seconds = cut_log(self.config.out, self.progress.step, self.ended)

    def evaluate(self) -> tuple[list[Look], Scores, dict[str, Any] | None]:
        """Scores the network, fits its object rule, and saves it if it is the best.

        The last evaluation takes more files than those before. The best model so far is kept only
        if it is better than the last one on these files, too.

        Returns:
            What this process saw of the files; the scores; and, at the last evaluation, those of
            the best model with its step, else None.
        """
        progress, processes, planned = self.progress, self.processes, self.planned
        try:
            looks = self._look(self.saved_model, planned.files)
            # All rules are tried at the first evaluation and at the last.
            scores, self.saved_model.objects = self.judge(looks, self.saved_model.objects)
            files, best, by = planned.files, None, self.config.best_by
            better = _score(progress, scores, by)
            if self.ended:
                looks += self._look(self.saved_model, planned.last, planned.files)
                scores, self.saved_model.objects = self.judge(looks)
                del looks[max(1, self.config.previews) :]  # the rest is not drawn
                files, best = planned.last, dict[str, Any](scores, step=progress.step, by=by)
                if not better and len(self.validation_set) and (self.config.out / BEST).exists():
                    rival = load_model(self.config.out / BEST, device=self.device)
                    theirs, rival.objects = self.judge(self._look(rival, planned.last))
                    # Same weights: a run that was killed here repeats this evaluation.
                    again = _equal(rival, self.saved_model)
                    better = again or _value(scores, by) > _value(theirs, by)
                    if not better:
                        best = dict[str, Any](theirs, step=progress.best_step, by=by)
                        if processes.first:  # with the rule fitted on all these files
                            save_model(rival, self.config.out / BEST)
        except (RuntimeError, MemoryError):  # e.g. images too large for memory
            if processes.first and not self.ended:  # the last evaluation must be repeated
                self.save()
            raise
        rule = self.saved_model.objects
        progress.objects = None if rule is None else asdict(rule)
        if better:
            progress.best_step = progress.step
            if processes.first and len(self.validation_set):
                save_model(self.saved_model, self.config.out / BEST)
        return looks, scores | {"files": files}, best

    def _look(self, model: UNet, stop: int, start: int = 0) -> list[Look]:
        """Predicts this process's share of the files, with the statistics of the first process."""
        for x in model.buffers():
            self.processes.broadcast(x)
        count = self.processes.count
        mine = [i for i in range(start, stop) if i % count == self.processes.rank]
        with self.step.autocast():
            return [look(model, self.judged, i, self.config.loss_reduction) for i in mine]

    def draw(self, artist: Artist, looks: list[Look]) -> None:
        """Draws curves, and the first images: of training if there are none for validation."""
        title = f"{self.kind} images after {counted(self.progress.step, 'step')}"
        shown = looks[: self.config.previews]
        out, rule = self.config.out, self.saved_model.objects
        panels = run_panels(self.judged, shown, rule)
        artist.draw(draw_run, out, read_log(out), panels, rule is None, self.progress.step, title)

    def save(self) -> None:
        """Writes a checkpoint, state last: a kill in between leaves the earlier state to resume."""
        self.progress.scaler = dict(self.step.scaler.state_dict())
        save_model(self.saved_model, self.config.out / LAST)
        save_state(
            self.config.out, self.progress, self.settings, self.step.modules, self.step.optimizer
        )

    def check(self, step: int, loss: float, gradient: float, drawn: Tiles, saved: bool) -> None:
        """Checks that a step gave finite numbers and, if it is saved, finite weights.

        The last checkpoint stays as it is.

        Raises:
            FloatingPointError: If a number or a weight is not finite.
        """
        # The gradient scaler skips steps whose gradient is not finite.
        if not math.isfinite(loss + (0 if self.step.scaler.is_enabled() else gradient)):
            self._report(step, f"loss {loss}, gradient norm {gradient}", drawn)
        if saved and not all(bool(p.isfinite().all()) for p in self.step.parameters):
            self._report(step, "weights that are not", drawn)

    def _report(self, step: int, value: str, drawn: Tiles) -> None:
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


def _score(progress: Progress, scores: Scores, by: str) -> bool:
    """Records an evaluation. Returns whether it is the best so far; of equals, the first is."""
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
    """Returns the score `by` or, without it, the negative loss; -inf if the loss is not finite."""
    value, loss = scores.get(by), scores["loss"]
    if loss is None:
        return -math.inf
    return -loss if value is None or by == "loss" else value
