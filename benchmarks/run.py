"""The whole suite: results are checked, then timed in turn with rivals; rows of CSV files.

    python -m benchmarks.run [--device cuda] [--peers]

Without `--peers` the rivals are the plain references and what PyTorch and SciPy have; with it also
other packages, those of `pip install '.[bench]'`; one that is not installed gets a row that says
so. `python benchmarks/report.py` makes tables and plots of the rows.
"""

import argparse
import functools
import os
import time
import warnings
from pathlib import Path

import torch

import unet_fast
from unet_fast._device import precision_of

from . import (
    bench_border_weight_map,
    bench_elastic_deform,
    bench_integrations,
    bench_metrics,
    bench_predict,
    bench_step,
    bench_weighted_ce,
    profile_step,
)
from .interleave import COLUMNS, columns_of, compare, copy_of, header, measure, name_of, write_csv

RESULTS = Path(__file__).parent / "results"
SUITES = {
    "weighted_ce": bench_weighted_ce.cases,
    "border_weight_map": bench_border_weight_map.cases,
    "elastic_deform": bench_elastic_deform.cases,
    "step": bench_step.cases,
    "inference": bench_predict.cases,
    "metrics": bench_metrics.cases,
    "integrations": bench_integrations.cases,
}
GROWING = (bench_weighted_ce, bench_border_weight_map, bench_elastic_deform, bench_step)
COPIED = 2**29
"""Bytes read and written by the copy that bandwidth is measured with; no cache holds as many."""


def measure_limits(device):
    """Rows of what the device can do, and its operations a second by dtype."""
    rates = {}
    found = [("copy", compare(copy_of(COPIED, device), None, device))]
    rows = [("GB/s", COPIED / 1e9)]
    side = 8192 if device.type == "cuda" else 2048
    for dtype in dict.fromkeys((torch.float32, precision_of("auto", device))):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found.append(
            (f"{name_of(dtype)} product", compare(functools.partial(torch.mm, a, b), None, device))
        )
        rows.append(("TFLOP/s", 2 * side**3 / 1e12))
        rates[dtype] = 2 * side**3 / (1e-3 * float(found[-1][1]["ours ms"]))
    case = f"{COPIED // 2**20} MiB", *[f"{side} x {side} x {side}"] * len(rates)
    result = []
    for size, (name, columns), (unit, amount) in zip(case, found, rows, strict=True):
        rate = f"{amount / (1e-3 * float(columns['ours ms'])):.3g} {unit}"
        row = dict.fromkeys(COLUMNS, "") | {"suite": "limits", "case": size, "ours": name}
        result.append(row | columns | {"note": rate} | header(device))
    return result, rates


def show(row):
    """One line."""
    parts = [row["suite"], row["case"], row["ours"], f"{row['ours ms']} ms"]
    if row["rival"]:
        parts.append(f"{row['rival']}: {row['rival ms'] or '-'} ms")
    if row["ratio p50"]:
        parts.append("x {ratio p50} ({ratio p20} to {ratio p80})".format(**row))
    if row["share"]:
        parts.append(f"{100 * float(row['share']):.0f} % of {row['limit']}")
    print(" | ".join([*parts, row["note"]]).rstrip(" |"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["limits", *SUITES, "breakdown", "growth"]
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers", action="store_true", help="other packages, too")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="SUITE")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each rival")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    if options.device == "cuda" and not (torch.cuda.is_available() and unet_fast.HAS_CUDA):
        parser.error("argument --device: cuda needs a GPU and a build with CUDA")
    if not 0 < options.budget < float("inf"):
        parser.error(f"argument --budget: must be > 0, got {options.budget}")
    if not options.out.is_dir():
        parser.error(f"argument --out: must be a folder, got {options.out}")
    only = list(dict.fromkeys(options.only))
    for suite in only:
        path = options.out / f"{suite}_{options.device}.csv"
        if path.exists() and (not path.is_file() or columns_of(path) != list(COLUMNS)):
            parser.error(f"argument --out: must hold rows of the suite, got others in {path}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"argument --out: must be writable, got {options.out}")
    warnings.filterwarnings("ignore", module="monai|torch|albumentations|batchgenerators")
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in training
    limits, rates = measure_limits(device)
    started = time.perf_counter()
    for suite in only:
        begun = time.perf_counter()
        if suite == "limits":
            rows = iter(limits)
        elif suite == "breakdown":
            rows = profile_step.rows(device)
        else:
            rows = measured(suite, device, options, rates)
        for row in rows:
            show(row)
            write_csv(options.out / f"{suite}_{device.type}.csv", [row])
        print(f"# {suite}: {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"# all: {time.perf_counter() - started:.0f} s")


def measured(suite, device, options, rates):
    """The rows of a suite; growth is one of series, in which slow rivals end early."""
    stopped = set()
    makers = [m.growth for m in GROWING] if suite == "growth" else [SUITES[suite]]
    budget = options.budget / 2 if suite == "growth" else options.budget
    for make in makers:
        for case in make(device, options.peers):
            yield from measure(suite, case, device, rates, stopped, budget)


if __name__ == "__main__":
    main()
