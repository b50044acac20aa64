"""Times weighted_ce, forward and backward, against its reference (eager torch).

`pytest benchmarks` shows both with pytest-benchmark. `python benchmarks/bench_weighted_ce.py` runs
the two in turn (A B A B), prints medians and the median of the ratios, and with `--csv FILE` keeps
them.
"""

import argparse
import csv
import datetime
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

import unet_fast
from unet_fast import reference

CASES = {  # name: shape of the logits
    "one tile, paper": (1, 2, 388, 388),
    "batch of 8": (8, 2, 512, 512),
    "20 classes": (1, 20, 388, 388),
}
RIVALS = {"unet_fast": unet_fast.weighted_ce, "eager": reference.weighted_ce}


def problem(shape, device):
    generator = torch.Generator().manual_seed(0)
    pixels = (shape[0], *shape[2:])
    logits = torch.randn(shape, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, shape[1], pixels, generator=generator).to(device)
    weight = (torch.rand(pixels, generator=generator) + 0.1).to(device)
    return logits, target, weight


def step(function, logits, target, weight):
    """Forward and backward; waits for the device."""
    logits.grad = None
    loss = function(logits, target, weight)
    loss.backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return loss.detach(), logits.grad


def check(inputs):
    results = [step(function, *inputs) for function in RIVALS.values()]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rival", RIVALS)
def bench_weighted_ce(benchmark, device, case, rival):
    inputs = problem(CASES[case], device)
    check(inputs)
    benchmark.group = f"weighted_ce, {case}, {device}"
    benchmark(step, RIVALS[rival], *inputs)


def device_name(device):
    """The name of the GPU, or of the CPU and the instruction set in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    name = model.group(1) if model else platform.machine()
    return f"{name}, {unet_fast.build_info()['simd']}"


def commit():
    """The checked-out commit, or nothing outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip()


def measure(case, device, rounds):
    """One row: medians in milliseconds, and quantiles of the ratio eager / unet_fast."""
    inputs = problem(CASES[case], device)
    check(inputs)
    times = {name: [] for name in RIVALS}
    for _ in range(rounds):
        for name, function in RIVALS.items():
            start = time.perf_counter()
            step(function, *inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(times["unet_fast"], times["eager"], strict=True)]
    low, median, high = (statistics.quantiles(ratios, n=10)[i] for i in (1, 4, 7))
    return {
        "operator": "weighted_ce",
        "case": case,
        "shape": "x".join(map(str, CASES[case])),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "unet_fast": unet_fast.build_info()["version"],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        **{f"{n} ms": f"{statistics.median(t):.4f}" for n, t in times.items()},
        "ratio p20": f"{low:.2f}",
        "ratio p50": f"{median:.2f}",
        "ratio p80": f"{high:.2f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=60, type=int)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = [measure(case, arguments.device, arguments.rounds) for case in CASES]
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    if arguments.csv:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
