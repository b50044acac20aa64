"""Which learning rate, schedule and reduction train best: short runs on three real data sets.

    UNET_FAST_DATA=... python -m benchmarks.recipe --csv benchmarks/results/recipe_cpu.csv

Each variant changes one setting of the default recipe, or the optimiser with a rate of its own.
Scores are those of validation files at the last step. Runs whose row is in the CSV are left out.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from unet_fast import TrainConfig, train
from unet_fast.training.checkpoint import read_log

from .interleave import header, write_csv

# Validation frames lie apart from those of training where files are frames of one sequence.
SETS = {
    "dsb2018_fluo": (range(0, 120, 3), range(121, 181, 3)),
    "dic_c2dh_hela": (range(0, 36, 3), range(44, 56, 2)),
    "isbi2012_em": ((*range(7), *range(10, 17)), (7, 8, 9, 17, 18, 19)),
}
SCORES = "loss", "iou", "mean_iou", "seg"
FREE = {"clip_gradient": None}
SGD = {"optimizer": "sgd", "learning_rate": 2e-3}
ADAM = {"optimizer": "adam", "learning_rate": 1e-3}
VARIANTS = [
    SGD | {"clip_gradient": 1.0},
    *[SGD | {"learning_rate": rate} | FREE for rate in (2e-3, 1e-3, 4e-3, 5e-4, 8e-3)],
    SGD | {"warmup": 0.0} | FREE,
    SGD | {"schedule": "constant"} | FREE,
    SGD | {"loss_reduction": "mean"} | FREE,
    SGD | {"learning_rate": 5e-8, "loss_reduction": "sum"} | FREE,
    SGD | {"learning_rate": 2e-2, "momentum": 0.9} | FREE,
    *[ADAM | {"learning_rate": rate} | FREE for rate in (3e-4, 1e-3, 1e-4)],
    ADAM | {"clip_gradient": 1.0},
    ADAM | {"optimizer": "adamw", "weight_decay": 0.01, "clip_gradient": 1.0},
    SGD | {"ema": 0.99, "clip_gradient": 1.0},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--variants", type=int, nargs="+", default=range(len(VARIANTS)))
    options = parser.parse_args()
    if "UNET_FAST_DATA" not in os.environ:
        parser.error("UNET_FAST_DATA must name the folder of the data sets")
    data = Path(os.environ["UNET_FAST_DATA"])
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for number in options.variants:
            for name in options.sets:
                run(data / name, VARIANTS[number], seed, options)


def run(folder: Path, variant: dict[str, object], seed: int, options: argparse.Namespace) -> None:
    setting = " ".join(f"{k}={v}" for k, v in variant.items())
    key = {"set": folder.name, "setting": setting, "seed": str(seed), "steps": str(options.steps)}
    known = list(csv.DictReader(options.csv.open())) if options.csv.exists() else []
    if any(all(row[k] == v for k, v in key.items()) for row in known):
        return
    names = sorted(file.stem for file in (folder / "images").iterdir())
    parts = [[names[i] for i in part] for part in SETS[folder.name]]
    with tempfile.TemporaryDirectory() as place:
        split = Path(place) / "split.json"
        split.write_text(json.dumps(dict(zip(("train", "validation"), parts, strict=True))))
        config = TrainConfig(
            folder / "images",
            folder / "labels",
            out=Path(place) / "run",
            steps=options.steps,
            split=split,
            base_channels=16,
            tile=196,
            seed=seed,
            evaluate_every=options.steps,
            previews=0,
            **variant,
        )
        start = time.perf_counter()
        try:
            train(config)
            last = read_log(config.out)[-1]["validation"]
        except FloatingPointError:
            last = dict.fromkeys(SCORES) | {"loss": float("inf")}
        seconds = time.perf_counter() - start
    row = key | {
        **{k: "" if last[k] is None else f"{last[k]:.4f}" for k in SCORES},
        "seconds": f"{seconds:.0f}",
        **header(torch.device("cpu")),
    }
    print(" ".join(f"{k}={row[k]}" for k in (*key, *SCORES, "seconds")), flush=True)
    write_csv(options.csv, [row])


if __name__ == "__main__":
    main()
