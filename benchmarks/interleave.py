"""What is timed against what, the timing itself, and rows of a CSV file about it.

The machines are shared and noisy: single times say little, the median of the ratios of neighbouring
runs (A B A B) says much.
"""

import csv
import datetime
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

import unet_fast

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler is talkative
LIMIT = 30
"""Seconds after which a call of a rival is stopped."""
COLUMNS = (
    *("suite", "case", "axis", "x", "ours", "rival", "rival version"),
    *("ours ms", "rival ms", "ratio p20", "ratio p50", "ratio p80", "rounds"),
    *("images", "limit", "share", "ours MB", "rival MB", "note"),
    *("device", "driver", "threads", "torch", "unet_fast", "commit", "date"),
)
"""Of the suite's CSV files."""


@dataclass
class Rival:
    """What somebody would use instead."""

    name: str
    function: Callable | None
    """None where its package is not installed."""
    package: str | None = None
    check: Callable | None = None
    """Fails if its result is another than ours."""


@dataclass
class Case:
    """What is timed against what; the result was checked when this is made."""

    name: str
    ours: str
    function: Callable
    rivals: list[Rival] = field(default_factory=list)
    moved: int = 0
    """Bytes that the task reads and writes at least; its limit is a copy of as many."""
    operations: float = 0
    """Floating-point operations of the task; its limit is a matrix product of as many."""
    precision: torch.dtype = torch.float32
    """Of these operations."""
    axis: str = ""
    """What grows, in a case of a series, ..."""
    x: int | str = ""
    """... and how much of it there is."""
    images: int | str = ""
    """How many images a call is about."""
    memory: bool = False
    """Whether the memory that a call takes is measured, too."""
    timed: bool = False
    """Whether the functions return the seconds that count."""


class StoppedError(Exception):
    """A call took longer than :data:`LIMIT`."""


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


@contextmanager
def stopped_after(limit):
    """Ends what takes longer; a single call into C ends first."""

    def stop(*_):
        raise StoppedError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare(ours, rival, device, budget=3.0, least=3, timed=False):
    """Columns of a row: medians in milliseconds, and quantiles of rival / ours.

    Args:
        ours: A function without arguments; so is the rival.
        rival: Called in turn with ours; None: ours alone.
        device: Where they compute.
        budget: Seconds that the rounds take, about, unless `least` takes longer.
        least: The least number of rounds; where a call takes more than a third of the limit there
            is one, unless the functions return the seconds.
        timed: Whether the functions return the seconds that count.

    Raises:
        StoppedError: If the first call of the rival takes longer than :data:`LIMIT`.
    """

    def once(function):
        start = time.perf_counter()
        counted = function() if timed else seconds(function, device)
        return counted, time.perf_counter() - start

    functions = [f for f in (ours, rival) if f is not None]
    first = [once(ours)[1]]
    if rival is not None:
        # A block of steps has a length of its own and is not stopped.
        with nullcontext() if timed else stopped_after(LIMIT):
            first.append(once(rival)[1])
    slow = max(first) > LIMIT / 3
    # The first calls compile, allocate, search; a slow one is not repeated for that.
    again = 0 if slow else 1 if max(first) > 2 else 2
    last = [
        min([once(f)[1] for _ in range(again)] or [t])
        for f, t in zip(functions, first, strict=True)
    ]
    if slow and not timed:
        least = 1
    rounds = min(max(int(budget / sum(last)), least), 200)
    times = [[once(f)[0] for f in functions] for _ in range(rounds)]
    columns = {"ours ms": f"{1e3 * statistics.median(t[0] for t in times):.4f}", "rounds": rounds}
    if rival is None:
        return columns
    ratios = [b / a for a, b in times]
    low, middle, high = (ratios * 3)[:3]
    if rounds > 1:
        cuts = statistics.quantiles(ratios, n=10, method="inclusive")
        low, middle, high = cuts[1], cuts[4], cuts[7]
    return columns | {
        "rival ms": f"{1e3 * statistics.median(t[1] for t in times):.4f}",
        "ratio p20": f"{low:.3f}",
        "ratio p50": f"{middle:.3f}",
        "ratio p80": f"{high:.3f}",
    }


def measure(suite, case, device, limits, stopped, budget=3.0):
    """A row for each rival, or one for ours alone.

    Args:
        suite: The name of the suite.
        case: Its case.
        device: Where it computes.
        limits: Operations a second of a matrix product, by dtype.
        stopped: Names of rivals that were stopped in smaller cases of a series; more are added.
        budget: Seconds for each rival.
    """
    row = dict.fromkeys(COLUMNS, "") | {"suite": suite, "case": case.name, "ours": case.ours}
    row |= {"axis": case.axis, "x": case.x, "images": case.images, **header(device)}
    options = {"device": device, "timed": case.timed}
    if case.moved:
        copied = compare(case.function, copy_of(case.moved, device), device, budget=budget / 3)
        row |= {"limit": f"copy of {case.moved / 1e6:.3g} MB", "share": copied["ratio p50"]}
    if case.memory:
        row["ours MB"] = f"{peak_megabytes(case.function, device):.1f}"
    for rival in case.rivals or [Rival("", None)]:
        found = {"rival": rival.name}
        key = case.ours, case.axis, rival.name
        if rival.function is None:
            found["note"] = "not installed" if rival.name else ""
        elif key in stopped:
            found["note"] = "not tried: stopped before"
        else:
            found["rival version"] = version_of(rival.package)
            try:
                if rival.check is not None:
                    rival.check()
                found |= compare(case.function, rival.function, budget=budget, **options)
                if case.memory:
                    found["rival MB"] = f"{peak_megabytes(rival.function, device):.1f}"
            except StoppedError:
                if case.axis:
                    stopped.add(key)
                found["note"] = f"stopped after {LIMIT} s"
            except AssertionError:
                raise  # another result
            except Exception as error:  # what others raise is theirs, and no reason to end here
                lines = str(error).splitlines() or [""]
                found["note"] = f"failed: {type(error).__name__}: {lines[0][:100]}"
        if "ours ms" not in found:
            found |= compare(case.function, None, budget=budget / 3, **options)
        if case.operations:
            rate = case.operations / (1e-3 * float(found["ours ms"]))
            name = name_of(case.precision)
            found |= {"limit": f"{name} product", "share": f"{rate / limits[case.precision]:.3f}"}
        yield row | found


def name_of(dtype):
    """Without the module."""
    return str(dtype).removeprefix("torch.")


def copy_of(n, device):
    """A copy that reads and writes n bytes in all."""
    source = torch.ones(max(n // 2, 1), dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


def peak_megabytes(function, device):
    """The most memory that a call holds at once beyond what was there before."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
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


@functools.cache
def header(device):
    """The columns that say what measured where and when; one time for all rows of a process."""
    return {
        "device": device_name(device),
        "driver": driver(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "unet_fast": unet_fast.build_info()["version"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version_of(package):
    """The version of a package; "" where there is none of that name."""
    try:
        return "" if package is None else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device):
    """The name of the GPU, or of the CPU and the instruction set in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    name = model.group(1) if model else platform.machine()
    return f"{name}, {unet_fast.build_info()['simd']}"


def driver(device):
    """The version of the GPU's driver, or nothing."""
    if device.type != "cuda":
        return ""
    return _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit():
    """The checked-out commit, or nothing outside a git checkout."""
    return _line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _line(*command):
    """The first line of the output of a command, or nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip().split("\n")[0]


def columns_of(path):
    """The names in the first line of a CSV file."""
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def write_csv(path, rows):
    """Appends rows; the file starts with the names of their columns.

    Raises:
        ValueError: If the file has other columns.
    """
    new = not path.exists()
    if not new and columns_of(path) != list(rows[0]):
        raise ValueError(f"{path}: must have the columns of the new rows, got {columns_of(path)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def print_table(rows, columns):
    """The chosen columns, aligned."""
    table = [columns, *([str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
