"""The state that a run needs to be resumed: one file, written whole or not at all."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from .._files import check_apart, parsed_json, read_file, reason_of, replace_file
from ..contracts.types import check_fields
from ..model_file import BEST, FORMAT, LAST, MODEL, pack, unpack
from ..objects import ObjectRule
from .config import CONFIG, DEFAULT_TILE, TrainConfig

STATE = "state.safetensors"
"""The training state: weights, optimiser and, in the header, all else."""
LOG = "log.jsonl"
"""The log of a run, one line per step."""


@dataclass
class Progress:
    """The state of a run, besides tensors and settings, on which its next steps depend."""

    step: int = 0
    """Steps done."""
    best: float | None = None
    """Score of the best evaluation; greater is better."""
    best_step: int = 0
    """Step of the best evaluation."""
    since_best: int = 0
    """Evaluations since the best one."""
    objects: dict[str, Any] | None = None
    """Object rule of the last evaluation."""
    seconds: float = 0.0
    """Seconds spent before the run was resumed; stored in the log only."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler."""


def save_state(
    folder: Path,
    progress: Progress,
    settings: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizer: Optimizer,
) -> None:
    """Writes the training state.

    Args:
        folder: Folder of the run.
        progress: State of the run.
        settings: Settings that must be the same when the run is resumed.
        modules: The network and all else that holds tensors, by name.
        optimizer: The optimiser.

    Raises:
        ValueError: If it cannot be written; the earlier state is still there.
    """
    tensors = {
        f"{name}.{key}": x for name, m in modules.items() for key, x in m.state_dict().items()
    }
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{slot}": x for slot, x in slots.items() if x is not None}
    facts = {k: v for k, v in vars(progress).items() if k != "seconds"}
    description = {"format": FORMAT, "progress": facts, "settings": settings}
    replace_file(folder / STATE, pack(tensors, description))


def load_state(
    folder: Path,
    settings: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizer: Optimizer,
) -> Progress:
    """Reads the training state into network and optimiser.

    Raises:
        ValueError: If it is damaged, or was written with other settings.
    """
    file = folder / STATE
    tensors, description = unpack(file, "a training state")
    try:
        progress = Progress(**description["progress"])
        check_fields("progress", progress)
        earlier = dict(description["settings"])
        if progress.objects is not None:
            ObjectRule(**progress.objects)  # raises if it is none
    except (LookupError, TypeError, ValueError) as error:
        reason = reason_of(error)
        raise ValueError(f"{file}: must hold a training state, but has none: {reason}") from None
    # Older runs did not resolve the default of the tile, and had no volumes.
    same = earlier.get("padding") == "same"
    defaults = {"dims": 2, "tile": DEFAULT_TILE[2, "same" if same else "valid"]}
    of_weights = earlier.get("weights")
    if isinstance(of_weights, dict):
        defaults |= {k: v for k, v in of_weights.items() if k == "ignore_label"}
    earlier = defaults | {k: v for k, v in earlier.items() if v is not None}
    now, then = _flat(settings), _flat(earlier)
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise ValueError(
                f"train: {name} must be as it was when the run began, {then.get(name)}, to go on, "
                f"got {now.get(name)} ({file})"
            )
    try:
        for name, module in modules.items():
            module.load_state_dict(_below(tensors, f"{name}."))
        # With a gradient scaler the first steps may have been skipped.
        _load_optimizer(optimizer, tensors, stepped=progress.step > 0 and not progress.scaler)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: must fit the network: {reason}") from None
    return progress


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], stepped: bool) -> None:
    stepped = stepped and isinstance(optimizer, Adam)  # Adam has no state before its first step
    saved = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(parameters):
        slots = _below(tensors, f"optimizer.{i}.")
        if not slots and (stepped or optimizer.state.get(parameter)):
            raise ValueError("the optimiser has nothing of some weights")
        # In the parameter's memory format, which fused optimisers need.
        state[i] = {
            slot: torch.empty_like(parameter).copy_(x) if x.shape == parameter.shape else x
            for slot, x in slots.items()
        }
    saved["state"] = state
    optimizer.load_state_dict(saved)


def cut_log(folder: Path, step: int, ended: bool) -> float:
    """Drops what the log says of steps after a checkpoint. Returns the seconds until then.

    Unless the run ended there, rows also lose "best", because no model is the best one yet.
    """
    path = folder / LOG
    kept, seconds = [], 0.0
    for row in read_log(folder):
        if row["step"] <= step:
            if not ended:
                row.pop("best", None)
            kept.append(json.dumps(row) + "\n")
            seconds = row["seconds"]
    replace_file(path, "".join(kept).encode())
    return seconds


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Reads the rows of the log; what is none, as a line that was cut off, is left out."""
    path = folder / LOG
    rows = []
    for line in read_file(path).splitlines() if path.exists() else []:
        try:
            row = parsed_json(line)
        except ValueError:
            continue
        if _is_row(row):
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether something is a row of the log."""

    def number(x: Any) -> bool:
        return type(x) is float or (type(x) is int and abs(x) < 2**63)

    def table(x: Any, *integers: str) -> bool:
        known = isinstance(x, dict) and all(type(x.get(name)) is int for name in integers)
        return known and all(v is None or number(v) for v in x.values())

    if not isinstance(row, dict):
        return False
    scores = [row[kind] for kind in ("validation", "training") if kind in row]
    best = row.get("best", {"step": 0, "by": ""})
    return (
        table({k: v for k, v in row.items() if k not in ("validation", "training", "best")}, "step")
        and all(number(row.get(k)) for k in ("loss", "learning_rate", "seconds"))
        and all(table(x, "files") for x in scores)
        and isinstance(best, dict)
        and isinstance(best.get("by"), str)
        and table({k: v for k, v in best.items() if k != "by"}, "step")
        and ("best" not in row or len(scores) == 1)
    )


def check_unused(out: Path, config: TrainConfig) -> None:
    """Makes sure that no run is overwritten.

    Raises:
        ValueError: If `out` holds a run, or the run to resume is damaged.
    """
    check_apart(out, config.images, config.labels, config.classes)
    models = [out / name for name in (BEST, LAST, MODEL) if (out / name).exists()]
    others = [out / name for name in (STATE, LOG, CONFIG) if (out / name).exists()]
    if not config.resume:
        if models or others:
            raise ValueError(
                "train: out must be a folder without a run, or resume must be set, got "
                f"{(models + others)[0]}"
            )
        return
    # Models without a state are of a first checkpoint that was cut off, or of another origin.
    first = next(step for step in range(1, config.length + 1) if config.saves(step))
    begun = others and max((row["step"] for row in read_log(out)), default=0) <= first
    if models and not (out / STATE).exists() and not begun:
        raise ValueError(f"{out}: must hold {STATE} to be resumed, but has only {models[0].name}")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
