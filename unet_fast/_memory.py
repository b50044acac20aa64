"""How much memory this process may take, and the refusal of what cannot fit."""

import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

PROGRAM = defaultdict(lambda: 4.5e8, cuda=8e8)
"""Bytes of the program itself: torch and what else is loaded; on a GPU its context."""
MARGIN = 1.5
"""Estimates are right within this factor: what needs this many times what there is cannot fit."""


def check_memory(
    needed: float,
    device: torch.device,
    subject: str,
    way_out: Callable[[float], str],
    processes: int = 1,
) -> None:
    """Refuses work that cannot fit into memory, and warns of work that may not.

    Args:
        needed: Estimate of the bytes that a process takes in all.
        device: Where the memory is.
        subject: What needs it, as "train: tile 40000 with base_channels 16".
        way_out: Tells what needs no more than so many bytes.
        processes: Number of processes that share the memory.

    Raises:
        ValueError: One line, if `needed` exceeds what there is by more than :data:`MARGIN`.
    """
    there = memory_for(device)
    if there is None or needed * processes <= there:
        return
    place = "this machine" if device.type == "cpu" else str(device)
    text = (
        f"{subject} needs about {gigabytes(needed * processes)} of memory, "
        f"and {place} has {gigabytes(there)} free"
    )
    if needed * processes > MARGIN * there:
        raise ValueError(f"{text}: {way_out(there / processes)}")
    warnings.warn(f"{text}, so it may be killed: {way_out(there / processes)}", stacklevel=2)


def memory_for(device: torch.device) -> int | None:
    """Returns the bytes that this process may take in all, what it has taken included.

    On a CPU this is what Linux calls available, or what limits of cgroups leave if that is less.
    None where it is unknown.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _of_host(Path("/"))


def gigabytes(count: float) -> str:
    """Formats a number of bytes: "1.1 GB"."""
    if count < 99.5e9:
        return f"{count / 1e9:.2g} GB"
    return f"{min(count, 1e18) / 1e9:,.0f} GB"


def _of_host(root: Path) -> int | None:
    """Returns what a process on Linux may take; `root` is that of the file system."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        free = sum(1024 * int(facts[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
        own = int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, LookupError, ValueError):  # another system
        return None
    return min([free, *_left_by_cgroups(root)]) + own


def _left_by_cgroups(root: Path) -> list[int]:
    """Returns the bytes that each cgroup with a limit around this process leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = mount / path.lstrip("/")  # a container sees its own as the root of all
        for folder in (own, *(p for p in own.parents if p.is_relative_to(mount))):
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                rows = (folder / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # "max": no limit
                continue
            stat = dict(row.split() for row in rows)
            cache = ("total_inactive_file", "total_active_file")  # it gives way
            if "total_inactive_file" not in stat:
                cache = ("inactive_file", "active_file")
            left.append(max(0, most - used + sum(int(stat.get(name, 0)) for name in cache)))
    return left
