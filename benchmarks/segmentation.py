"""How well the recipe segments: trains on real images, scores images it has not seen.

    UNET_FAST_DATA=... python -m benchmarks.segmentation run dic_c2dh_hela border --seed 0
    UNET_FAST_DATA=... python -m benchmarks.segmentation all --seeds 0 1 2
    python -m benchmarks.segmentation report [--check]

`run` adds a row to benchmarks/results/segmentation.csv; `all` makes the rows that are missing;
`report` writes docs/results.md from the rows. Which files are trained on and which are scored
stands in splits.json; settings were chosen on files of the training part.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from unet_fast import (
    Augmentation,
    BorderWeights,
    TrainConfig,
    UNet,
    load_model,
    metrics,
    predict,
    train,
)
from unet_fast._files import replace_file
from unet_fast.images.files import read_labels, write_labels
from unet_fast.images.intensity import normalise
from unet_fast.objects import ObjectRule
from unet_fast.plots import draw_previews, outlines
from unet_fast.scores.evaluate import flat, object_scores
from unet_fast.scores.report import as_csv
from unet_fast.training.samples import Sample, load_samples

from .interleave import header

HERE = Path(__file__).parent
SPLITS, ROWS = HERE / "splits.json", HERE / "results" / "segmentation.csv"
PAGE = HERE.parent / "docs" / "results.md"
BORDER = 2
"""Width of the border class in pixels."""
THRESHOLDS = (0.0, 0.7, 0.9, 0.97)
"""Of seeds, of which the best on training images is taken; 0: all foreground."""
COMMON = {"base_channels": 16, "optimizer": "adam", "deterministic": True}
SETS = {
    "dic_c2dh_hela": {"steps": 1500, "tile": 196},
    "t98g_phase_contrast": {"steps": 1500, "tile": 196},
    "dsb2018_fluo": {"steps": 1500, "tile": 196},
    "isbi2012_em": {"steps": 2500, "tile": 256, "padding": "same"},
}
VARIANTS = {
    "border": {"weights": BorderWeights.paper_2015()},
    "w0=0": {"weights": replace(BorderWeights.paper_2015(), w0=0.0)},
    "three-class": {"weights": BorderWeights(w0=0.0, ridge="none")},
    "elastic": {"augmentation": replace(Augmentation.paper_2015(), flip=True)},
    "rigid": {"augmentation": replace(Augmentation.paper_2015(), flip=True, sigma=0.0)},
}
EM = "isbi2012_em"
PAIRS = [
    *((s, v) for s in SETS if s != EM for v in ("border", "w0=0", "three-class")),
    *((EM, v) for v in ("elastic", "rigid")),
]
ROTATIONS = [round(360 * k / 7, 2) for k in range(7)]
OBJECT_SCORES = (
    "seg",
    "seg_of_all_foreground",
    "threshold",
    "iou",
    "ap_50",
    "ap_75",
    "f1_50",
    "pq_50",
)
EM_SCORES = (
    *("v_rand_thinned", "v_rand", "v_info_thinned", "v_info"),
    *("pixel_error", "rand_error", "warping_error"),
)


def split_of(folder: Path) -> dict[str, list[str]]:
    """The names of the files of a set, "train" and "test"."""
    parts: dict[str, list[str]] = json.loads(SPLITS.read_text())[folder.name]
    return parts


def trained(folder: Path, variant: str, seed: int, run: Path) -> tuple[UNet, float]:
    """The network of a variant, and the seconds that its training took."""
    if (run / "seconds").exists():
        return load_model(run), float((run / "seconds").read_text())
    with tempfile.TemporaryDirectory() as place:
        split = Path(place) / "split.json"
        split.write_text(json.dumps({"train": split_of(folder)["train"], "validation": []}))
        classes = None
        if variant == "three-class":
            classes = Path(place) / "classes"
            classes.mkdir()
            for file in sorted((folder / "labels").iterdir()):
                write_labels(classes / f"{file.stem}.png", border_classes(read_labels(file)))
        config = TrainConfig(
            folder / "images",
            folder / "labels",
            out=run,
            split=split,
            classes=classes,
            seed=seed,
            evaluate_every=10**9,
            previews=0,
            **COMMON,
            **SETS[folder.name],
            **VARIANTS[variant],
        )
        start = time.perf_counter()
        model = train(config)
        seconds = time.perf_counter() - start
    (run / "seconds").write_text(f"{seconds:.0f}")
    return model, seconds


def border_classes(labels: np.ndarray) -> np.ndarray:
    """0 background, 1 inside, 2 within :data:`BORDER` pixels of what is not the object."""
    near = ndimage.distance_transform_edt(~outlines(labels)) < BORDER
    return np.where(labels > 0, np.where(near, 2, 1), 0)


def smallest(samples: list[Sample]) -> int:
    """Pixels below which an object is left out: half the 5th percentile of training objects."""
    areas: list[int] = []
    for sample in samples:
        areas += np.unique(sample.labels[sample.labels > 0], return_counts=True)[1].tolist()
    return int(0.5 * np.percentile(areas, 5))


def objects_of(model: UNet, probability: np.ndarray, area: int, threshold: float) -> np.ndarray:
    """Objects, of probabilities (K, H, W) of two classes or of the three of a border class."""
    classes = probability.argmax(0)
    seeds = (classes == 1) & (probability[1] > threshold)
    if len(probability) == 2:
        rule = ObjectRule(area, model.ridge_width)
        return rule.of(np.where(seeds, rule.seed, classes))
    parts = ndimage.label(seeds)[0]
    if parts.any():  # into the border, which is theirs: each pixel to the nearest
        nearest = ndimage.distance_transform_edt(
            parts == 0, return_distances=False, return_indices=True
        )
        parts = np.where(classes > 0, parts[tuple(nearest)], 0)
    sizes = np.bincount(parts.ravel())
    return np.where(sizes[parts] >= area, parts, 0)


def best_threshold(samples: list[Sample], model: UNet, area: int) -> float:
    """The threshold of seeds that has the best SEG on images that were trained on."""
    probabilities = [predict(model, s.image) for s in samples]
    scores = [
        metrics.seg(
            [s.labels for s in samples],
            [objects_of(model, p, area, threshold) for p in probabilities],
        )
        for threshold in THRESHOLDS
    ]
    return THRESHOLDS[int(np.argmax(scores))]


def scored(folder: Path, model: UNet, pictures: Path | None, stem: str) -> list[dict[str, float]]:
    """Scores of the images that were not trained on; for EM of one view and of the rotations."""
    by_name = {s.name: s for s in load_samples(folder / "images", folder / "labels")}
    seen, samples = ([by_name[n] for n in split_of(folder)[part]] for part in ("train", "test"))
    truth = [s.labels for s in samples]
    em = folder.name == EM
    if em:
        truth = [ndimage.label(x)[0] for x in truth]
    rows: list[dict[str, float]] = []
    for views in (None, ROTATIONS) if em else (None,):
        probabilities = [predict(model, s.image, tta=views) for s in samples]
        if em:
            inside = [p[1] for p in probabilities]
            row = flat(metrics.isbi2012(np.stack(truth), np.stack(inside)))
            found = [ndimage.label(p > row["v_rand_thinned_threshold"])[0] for p in inside]
            each = [metrics.v_rand(t, f) for t, f in zip(truth, found, strict=True)]
        else:
            area = smallest(seen)
            threshold = best_threshold(seen[:10], model, area)
            found = [objects_of(model, p, area, threshold) for p in probabilities]
            plain = [objects_of(model, p, area, 0) for p in probabilities]
            row = object_scores(truth, found, [0] * len(truth))[1]
            row |= {"seg_of_all_foreground": metrics.seg(truth, plain), "threshold": threshold}
            each = [metrics.seg(t, f) for t, f in zip(truth, found, strict=True)]
        rows.append(row)
        if pictures is not None:
            order = np.argsort(each)
            shown = [(order[-1], "best"), (order[len(order) // 2], "median"), (order[0], "worst")]
            panels = [
                (
                    f"{kind}: {samples[i].name}, {each[i]:.3f}",
                    normalise(samples[i].image)[0],
                    truth[i],
                    1 - probabilities[i][0],
                    (truth[i] > 0).astype(int),
                    np.where(found[i] > 0, np.where(metrics.matched(truth[i], found[i]), 1, 2), 0),
                )
                for i, kind in shown
            ]
            pictures.mkdir(parents=True, exist_ok=True)
            views_name = "-rotations" if views else ""
            title = f"{folder.name}, {stem}: images not trained on, by {'V_rand' if em else 'SEG'}"
            file = pictures / f"{folder.name}-{stem}{views_name}.png"
            draw_previews(file, panels, title, "no object matches")
    return rows


def known() -> list[dict[str, str]]:
    """The rows there are."""
    return list(csv.DictReader(ROWS.read_text().splitlines())) if ROWS.exists() else []


def run(data: Path, name: str, variant: str, seed: int, options: argparse.Namespace) -> None:
    """Trains and scores; adds rows, or puts them in the place of those of the same run."""
    with tempfile.TemporaryDirectory() as place:
        where = (options.work or Path(place)) / f"{name}-{variant}-{seed}"
        model, seconds = trained(data / name, variant, seed, where)
        found = scored(data / name, model, options.pictures, f"{variant}-{seed}")
    rows = [r for r in known() if (r["set"], r["variant"], r["seed"]) != (name, variant, str(seed))]
    for views, scores in zip((1, len(ROTATIONS)), found, strict=False):
        wanted = EM_SCORES if name == EM else OBJECT_SCORES
        rows.append(
            {"set": name, "variant": variant, "views": str(views), "seed": str(seed)}
            | {k: f"{scores[k]:.6f}" for k in wanted}
            | {"steps": str(SETS[name]["steps"]), "seconds": f"{seconds:.0f}"}
            | {k: str(v) for k, v in header(torch.device("cpu")).items()}
        )
        print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    order = {pair: i for i, pair in enumerate(PAIRS)}
    rows.sort(key=lambda r: (order[r["set"], r["variant"]], int(r["views"]), int(r["seed"])))
    facts = list(header(torch.device("cpu")))
    keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in facts]
    replace_file(ROWS, as_csv(rows, keys + facts))


NAMES = {
    "seg": "SEG",
    "seg_of_all_foreground": "of all foreground",
    "threshold": "seeds above",
    "iou": "IoU",
    "ap_50": "AP at 0.5",
    "ap_75": "AP at 0.75",
    "f1_50": "F1 at 0.5",
    "pq_50": "PQ at 0.5",
    "v_rand_thinned": "V_rand",
    "v_rand": "not thinned",
    "v_info_thinned": "V_info",
    "v_info": "not thinned",
    "pixel_error": "pixel error",
    "rand_error": "Rand error",
    "warping_error": "warping error",
}
"""Of scores in the page's tables."""


def report(rows: list[dict[str, str]]) -> str:
    """The page."""
    template = (HERE / "results.md.in").read_text()
    for name in SETS:
        template = template.replace(f"{{{{{name}}}}}", table_of(name, rows))
    return template


def table_of(name: str, rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation over the seeds, a line for each variant."""
    scores = EM_SCORES if name == EM else OBJECT_SCORES
    lines = [
        "| variant | seeds | " + " | ".join(NAMES[k] for k in scores) + " | training | command |",
        "| --- | --- |" + " --- |" * (len(scores) + 2),
    ]
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row["set"] == name:
            groups.setdefault((row["variant"], row["views"]), []).append(row)
    for (variant, views), group in groups.items():
        cells = [f"{variant}, {views} rotations" if views != "1" else variant, str(len(group))]
        cells += [_mean([float(row[k]) for row in group]) for k in scores]
        cells.append(f"{np.median([float(row['seconds']) for row in group]):.0f} s")
        cells.append(f"`run {name} {variant}`")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    """Mean +- standard deviation."""
    digits = 6 if max(values) < 0.01 else 3
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train, predict, score; add a row")
    one.add_argument("set", choices=list(SETS))
    one.add_argument("variant", choices=list(VARIANTS))
    one.add_argument("--seed", type=int, default=0)
    every = commands.add_parser("all", help="all rows that are missing")
    every.add_argument("--seeds", type=int, nargs="+", default=[0])
    every.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    for command in (one, every):
        command.add_argument("--work", type=Path, help="keeps the trained networks here")
        command.add_argument("--pictures", type=Path, help="draws best, median and worst here")
    page = commands.add_parser("report", help="write docs/results.md from the rows")
    page.add_argument("--check", action="store_true", help="exit 1 if it says something else")
    options = parser.parse_args()
    if options.command == "report":
        text = report(known())
        if options.check:
            sys.exit(0 if PAGE.read_text() == text else f"{PAGE}: must say what {ROWS.name} says")
        replace_file(PAGE, text.encode())
        return
    if "UNET_FAST_DATA" not in os.environ:
        parser.error("UNET_FAST_DATA must name the folder of the data sets")
    data = Path(os.environ["UNET_FAST_DATA"])
    torch.set_num_threads(2)
    if options.command == "run":
        if (options.set, options.variant) not in PAIRS:
            parser.error(f"{options.set} goes with {[v for s, v in PAIRS if s == options.set]}")
        run(data, options.set, options.variant, options.seed, options)
        return
    for seed in options.seeds:
        for name, variant in PAIRS:
            there = {(r["set"], r["variant"], r["seed"]) for r in known()}
            if name in options.sets and (name, variant, str(seed)) not in there:
                run(data, name, variant, seed, options)


if __name__ == "__main__":
    main()
