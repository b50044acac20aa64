"""How well volumes are segmented from a few annotated planes, in three axes and plane by plane.

    UNET_FAST_DATA=... python -m benchmarks.volumes run fibsem_medulla_3d 3 --share 5.7 --seed 0
    UNET_FAST_DATA=... python -m benchmarks.volumes all
    python -m benchmarks.volumes report [--check]

A part of each volume is trained on, another one is scored; a gap lies between them. Of the labels
of the first part, planes across all three axes are kept, as many as have at least that share of the
voxels. The same files train a network of volumes, and one of images, plane by plane across Z, for
the same CPU time: ten minutes, that is, five of two cores. The rule for objects is fitted on the
annotated voxels of the first part for both, in three axes, on the probabilities of all planes.

`run` adds a row to benchmarks/results/volumes.csv; `all` makes the rows that are missing; `report`
writes them into docs/volumes.md.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
import torch

from unet_fast import BorderWeights, TrainConfig, UNet, predict, train
from unet_fast._files import replace_file
from unet_fast.contracts.border_weight_map import IGNORED
from unet_fast.images.pairing import Reading
from unet_fast.scores.evaluate import object_scores
from unet_fast.scores.report import as_csv
from unet_fast.training.processes import joined_processes
from unet_fast.training.samples import Sample, load_samples
from unet_fast.training.tiles import load_sets
from unet_fast.training.validation import Judge, Look

from .interleave import header

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "volumes.csv", HERE.parent / "docs" / "volumes.md"
MARK = "<!-- rows of benchmarks/results/volumes.csv -->\n", "<!-- end -->\n"
MINUTES = 10.0
"""CPU time of a training."""
UNUSED = 60000
"""A label that no voxel has: cells fill these volumes, which have no background."""
SETS = {  # axis that parts lie along, end of the first part, begin of the second, size of a voxel
    "fibsem_medulla_3d": (0, 112, 119, (0.01, 0.01, 0.01)),
    "ovule_confocal_3d": (1, 76, 78, (0.235, 0.15, 0.15)),
}
SHARES = ("2.5", "3.3", "5.7", "8.9", "100")
"""Least annotated shares in percent: those of the paper of 2016, and all."""
WANTED = [
    *((n, d, s, "border", seed) for n in SETS for s in ("100", "5.7") for d in (3, 2)
      for seed in (0, 1, 2)),
    *((n, d, s, "border", 0) for n in SETS for s in ("2.5", "3.3", "8.9") for d in (3, 2)),
    *((n, 3, s, "w0=0", 0) for n in SETS for s in ("100", "5.7")),
]  # fmt: skip
SCORES = ("pq_50", "ap_50", "seg", "v_rand", "v_info", "inside", "predicted", "true")


def planes_kept(labels: np.ndarray, share: float) -> np.ndarray:
    """Labels in which all but some planes across each axis are 0, which stands for unknown."""
    kept, count = np.zeros(labels.shape, bool), 0
    while share < 1 and kept.mean() < share:
        count += 1
        kept[:] = False
        for axis, side in enumerate(labels.shape):
            at = np.linspace(0, side - 1, count + 2).round().astype(int)[1:-1]
            np.moveaxis(kept, axis, 0)[at] = True
    return labels if share >= 1 else np.where(kept, labels, 0)


def write_parts(data: Path, name: str, share: str, place: Path) -> None:
    """Writes the part to train on and the part to score, images and labels."""
    axis, end, begin, size = SETS[name]
    pixels, labels = (
        tifffile.imread(next(iter(sorted((data / name / kind).iterdir()))))
        for kind in ("images", "labels")
    )
    options = {"imagej": True, "metadata": {"axes": "ZYX", "spacing": size[0], "unit": "um"}}
    options["resolution"] = (1 / size[2], 1 / size[1])
    for part, span in (("train", slice(0, end)), ("test", slice(begin, None))):
        index = (*[slice(None)] * axis, span)
        ids = labels[index].astype(np.uint16)
        if part == "train":
            ids = planes_kept(ids, float(share) / 100)
        for kind, array in (("images", pixels[index]), ("labels", ids)):
            (place / part / kind).mkdir(parents=True)
            tifffile.imwrite(place / part / kind / "volume.tif", array, **options)


def share_of(model: UNet, image: np.ndarray) -> np.ndarray:
    """The probability of foreground, (D, H, W), of a volume or of its planes one by one."""
    if model.dims == 3:
        return predict(model, image)[1]
    return np.stack([predict(model, image[:, z])[1] for z in range(image.shape[1])])


def look_of(sample: Sample, share: np.ndarray, index: int = 0) -> Look:
    """What the judge of training scores: a prediction, and the voxels that are annotated."""
    known = (sample.labels > 0) & (sample.labels < 2**31 - 1)
    return Look(
        index=index,
        sums=torch.zeros(6, dtype=torch.float64),
        target=known.astype(np.uint8),
        classes=torch.from_numpy((share > 0.5).astype(np.uint8)),
        share=torch.from_numpy(share),
        truth=np.where(known, sample.labels, 0),
        counts=known,
    )


def run(data: Path, key: tuple[str, int, str, str, int], pictures: Path | None = None) -> None:
    """Trains and scores; adds a row, or puts it in the place of that of the same run."""
    name, dims, share, variant, seed = key
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_parts(data, name, share, place)
        config = TrainConfig.suggested(
            place / "train" / "images",
            place / "train" / "labels",
            out=place / "run",
            dims=dims,
            ignore_label=0,
            background_label=UNUSED,
            minutes=MINUTES,
            validation=0.0,
            previews=0,
            seed=seed,
            weights=BorderWeights(w0=0.0) if variant == "w0=0" else BorderWeights(),
        )
        begin = time.process_time()
        model = train(config, clock=time.process_time)
        seconds = time.process_time() - begin
        whole = replace(config, dims=3, tile=None, out=place / "none")
        whole, known, _ = load_sets(whole, False, torch.device("cpu"))
        seen = load_samples(config.images, config.labels, None, whole.reading)[0]
        test = load_samples(
            place / "test" / "images", place / "test" / "labels", None, Reading(dims=3)
        )[0]
        with joined_processes(torch.device("cpu")) as processes:
            judge = Judge("pq", True, known, whole.weights.ridge_width, processes)
            rule = judge.fit([look_of(seen, share_of(model, seen.image))])
        probability = share_of(model, test.image)
        found = look_of(test, probability).objects(rule)
        steps = (place / "run" / "log.jsonl").read_text().count("\n")
    truth = test.labels
    scores = object_scores([truth], [found], [0])[1]
    target = known.weights(torch.from_numpy(truth)[None], dims=3)[0][0].numpy()
    inside = (target == 1) & (probability > 0.5)
    either = ((target == 1) | (probability > 0.5)) & (target != IGNORED)
    row = {"set": name, "dims": str(dims), "share": share, "variant": variant, "seed": str(seed)}
    row |= {k: f"{scores[k]:.6f}" for k in SCORES[:5]}
    row["inside"] = f"{inside.sum() / either.sum():.6f}"
    row |= {"predicted": str(scores["predicted_objects"]), "true": str(scores["reference_objects"])}
    row |= {"steps": str(steps), "seconds": f"{seconds:.0f}"}
    row |= {k: str(v) for k, v in header(torch.device("cpu")).items()}
    print(" ".join(f"{k}={v}" for k, v in row.items()), rule, flush=True)
    rows = [r for r in known_rows() if key_of(r) != key] + [row]
    rows.sort(key=lambda r: WANTED.index(key_of(r)))
    replace_file(ROWS, as_csv(rows, list(row)))


def key_of(row: dict[str, str]) -> tuple[str, int, str, str, int]:
    return row["set"], int(row["dims"]), row["share"], row["variant"], int(row["seed"])


def known_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(ROWS.read_text().splitlines())) if ROWS.exists() else []


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds, a line for each set, share, network and variant."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["share"], row["dims"], row["variant"]), []).append(row)
    lines = [
        "| set | annotated | network | weights | seeds | PQ | AP at 0.5 | SEG | V_rand | V_info |"
    ]
    lines[0] += " IoU inside | objects, true | steps |"
    lines.append("| --- |" + " --- |" * (lines[0].count("|") - 2))
    for (name, share, dims, variant), group in sorted(groups.items(), key=_order):
        values = [[float(row[k]) for row in group] for k in SCORES[:6]]
        cells = [name, f"{share} %", f"{dims}D", variant, str(len(group))]
        cells += [_mean(x) for x in values]
        objects = np.mean([int(row["predicted"]) for row in group])
        cells += [f"{objects:.0f}, {group[0]['true']}"]
        cells.append(f"{np.median([int(row['steps']) for row in group]):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _order(item: tuple[tuple[str, ...], object]) -> tuple[int, float, str, str]:
    (name, share, dims, variant), _ = item
    return list(SETS).index(name), -float(share), variant, dims


def _mean(values: list[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train, predict, score; add a row")
    one.add_argument("set", choices=list(SETS))
    one.add_argument("dims", type=int, choices=(2, 3))
    one.add_argument("--share", choices=SHARES, default="100")
    one.add_argument("--variant", choices=("border", "w0=0"), default="border")
    one.add_argument("--seed", type=int, default=0)
    commands.add_parser("all", help="all rows that are missing")
    page = commands.add_parser("report", help="write the rows into docs/volumes.md")
    page.add_argument("--check", action="store_true", help="exit 1 if it says something else")
    options = parser.parse_args()
    if options.command == "report":
        text = PAGE.read_text()
        before, rest = text.split(MARK[0])
        made = before + MARK[0] + table(known_rows()) + MARK[1] + rest.split(MARK[1])[1]
        if options.check:
            sys.exit(0 if made == text else f"{PAGE}: must say what {ROWS.name} says")
        replace_file(PAGE, made.encode())
        return
    if "UNET_FAST_DATA" not in os.environ:
        parser.error("UNET_FAST_DATA must name the folder of the data sets")
    data = Path(os.environ["UNET_FAST_DATA"])
    if options.command == "run":
        run(data, (options.set, options.dims, options.share, options.variant, options.seed))
        return
    done = {key_of(row) for row in known_rows()}
    for key in WANTED:
        if key not in done:
            run(data, key)


if __name__ == "__main__":
    main()
