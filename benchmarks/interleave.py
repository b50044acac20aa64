"""Two functions timed in turn (A B A B), what they allocate, and rows of a CSV file about them.

The machines are shared and noisy: single times say little, the median of the ratios of neighbouring
runs says much.
"""

import argparse
import csv
import datetime
import importlib
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch

import unet_fast


def optional(name):
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def seconds(function, device):
    """The time of one call: on CUDA between events on the stream, else of the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours, rival, device, rounds, warm_up=3):
    """Columns of a row: medians in milliseconds, and quantiles of rival / ours."""
    for _ in range(warm_up):
        ours()
        rival()
    pairs = [(seconds(ours, device), seconds(rival, device)) for _ in range(rounds)]
    low, _, _, middle, _, _, high = statistics.quantiles([b / a for a, b in pairs], n=10)[1:8]
    return {
        "ours ms": f"{1e3 * statistics.median(a for a, _ in pairs):.4f}",
        "rival ms": f"{1e3 * statistics.median(b for _, b in pairs):.4f}",
        "ratio p20": f"{low:.2f}",
        "ratio p50": f"{middle:.2f}",
        "ratio p80": f"{high:.2f}",
    }


def peak_megabytes(function, device):
    """The most memory that a call holds at once beyond what was there before."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 1e6


def peak_resident_megabytes(function):
    """The most memory that a first call adds to the process, its results included; Linux only."""

    def status(field):
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s*(\d+) kB", text).group(1)) / 1e3

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    result = function()
    del result
    return status("VmHWM") - before


def header(operator, device):
    """The columns that say what was measured where."""
    return {
        "operator": operator,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "unet_fast": unet_fast.build_info()["version"],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


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


def write_csv(path, rows):
    """Appends the rows; the file starts with the names of their columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def arguments_of(description):
    """The command line of a benchmark: device, rounds, csv."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=100, type=int)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def print_table(rows, columns):
    """The chosen columns, aligned."""
    table = [columns, *([str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
