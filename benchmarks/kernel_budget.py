"""Counts what the CUDA kernels cost, on a machine without a GPU.

    python -m benchmarks.kernel_budget [--check]

The kernels' PTX runs in the interpreter of tests/ptx, which counts how often each line of it ran.
ptxas compiles it for each architecture of the package, and an instruction of the result counts as
often as the line that it was made of. Writes benchmarks/results/kernel_budget.csv. With `--check`
nothing is written, and the exit code is 1 if a number is more than 3 % above the file's. It is 2
where a tool is missing, or where the file was made with another ptxas. Takes some minutes.

A row is a kernel in a case on an architecture. Columns: launches; per 32 pixels of the case, which
is what a warp does in one go, the instructions that warps issue (`sass`), of them those in float64
(`fp64`), conversions from and to 64 bits (`conversions64`) and others (`conversions`), and the
sectors of 32 bytes that warps access; bytes that a launch reads and writes, each once, per pixel;
registers of a thread and bytes it spills; bytes of shared memory of a block; how many threads'
atomics changed the sector that most did, per launch.

A loop that ptxas unrolls counts more often than it runs; what depends on values that no case has
does not count at all.
"""

import argparse
import bisect
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from unet_fast.contracts.border_weight_map import RIDGES
from unet_fast.contracts.elastic_deform import BOUNDARIES, GRIDS
from unet_fast.contracts.weighted_ce import WEIGHTED_MEAN

from .bench_border_weight_map import crowded

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # the interpreter, and how kernels are compiled for it

from host import cuda_compiler, host_module, ptx_of_module  # noqa: E402
from ptx.device import Device  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernel_budget.csv"
CACHE = ROOT / ".pytest_cache" / "d" / "cuda_on_host"
"""Where the tests keep what they compile."""
ARCHITECTURES = "75", "80", "90"
GROWTH = 1.03
LEAST = 0.05
"""Growth by less than this is none: of numbers near zero."""
COSTS = "sass", "fp64", "conversions64", "conversions", "sectors", "read", "written"
COSTS += "registers", "spills", "shared", "atomics", "launches"
COLUMNS = "case", "pixels", "architecture", "kernel", *COSTS, "ptxas"


class Missing(Exception):
    """A tool that is not there, or not the same."""


# --- Cases --------------------------------------------------------------------------------------


def weighted_ce(kernels, classes, pixels, channels_last=False, backward=False):
    rng = np.random.default_rng(0)
    shape = (1, pixels, classes) if channels_last else (1, classes, pixels)
    logits = rng.normal(size=shape).astype(np.float32)
    logits = logits.transpose(0, 2, 1) if channels_last else logits
    target = rng.integers(0, classes, (1, pixels))
    weight = rng.random((1, pixels), np.float32)
    inputs = logits, target, weight
    if backward:
        one = np.ones(1, np.float32)
        kernels.weighted_ce_backward(one, *inputs, 1000.0, WEIGHTED_MEAN, -100)
    else:
        kernels.weighted_ce(*inputs, WEIGHTED_MEAN, -100)


def cells(sides, count):
    """Labels (1, D, H, W)."""
    return crowded(sides, count).numpy().reshape(1, *(1,) * (3 - len(sides)), *sides)


def border_map(kernels, sides, count):
    """The paper's weights."""
    ridge = RIDGES.index("two_sided")
    numbers = "packed" if len(sides) == 2 else "int32"
    settings = None, None, None, 2, ridge, None, 10.0, 5.0, False, 0.0, 1.0, [1.0] * 3, numbers
    kernels.border_weights(cells(sides, count), *settings)


def two_nearest(kernels, sides, count):
    kernels.two_nearest(cells(sides, count), [1.0] * 3, True)


def deformation(sides, order):
    """Image, displacements and settings of an elastic deformation on a grid of 3 knots an axis."""
    rng = np.random.default_rng(0)
    axes = len(sides)
    image = rng.random((1, 1, *sides), np.float32)
    displacement = 10 * rng.normal(size=(1, axes, *(3,) * axes))
    scales = [2 / (side - 1) for side in sides]
    places = GRIDS.index("interpolating"), BOUNDARIES.index("mirror")
    return image, displacement, ([order], places[0], False, scales, places[1], 0.0)


def elastic(kernels, sides, order, labelled=True, dtype=np.float32):
    image, displacement, settings = deformation(sides, order)
    image = image if dtype == np.float32 else (image * 255).astype(dtype)
    labels = np.arange(image.size, dtype=np.int32).reshape(1, *sides) // 30
    deform = kernels.elastic_deform if len(sides) == 2 else kernels.elastic_deform_3d
    given = labels if labelled else None
    deform(image, displacement, None, None, given, None, *settings, sides, sides)


def elastic_gradients(kernels, sides, order):
    image, displacement, settings = deformation(sides, order)
    backward = kernels.elastic_deform_backward
    backward = backward if len(sides) == 2 else kernels.elastic_deform_backward_3d
    backward(image, image, displacement, None, None, None, *settings)


CASES = {  # name: pixels, function, its arguments
    "weighted_ce forward, 2 classes": (65536, weighted_ce, (2, 65536)),
    "weighted_ce backward, 2 classes": (65536, weighted_ce, (2, 65536, False, True)),
    "weighted_ce forward, 2 classes, channels last": (65536, weighted_ce, (2, 65536, True)),
    "weighted_ce backward, 2 classes, channels last": (65536, weighted_ce, (2, 65536, True, True)),
    "weighted_ce forward, 20 classes": (16384, weighted_ce, (20, 16384)),
    "weighted_ce backward, 20 classes": (16384, weighted_ce, (20, 16384, False, True)),
    "weighted_ce forward, 64 classes, channels last": (8192, weighted_ce, (64, 8192, True)),
    "weighted_ce backward, 64 classes, channels last": (8192, weighted_ce, (64, 8192, True, True)),
    "weighted_ce forward, 3 classes, volume 32 x 32 x 32": (32**3, weighted_ce, (3, 32**3)),
    "border_weights, 512 x 512, 200 cells": (512**2, border_map, ((512, 512), 200)),
    "border_weights, volume 16 x 64 x 64, 40 cells": (65536, border_map, ((16, 64, 64), 40)),
    "two_nearest, 256 x 256, 50 cells": (65536, two_nearest, ((256, 256), 50)),
    "elastic_deform, order 0, 512 x 512 and labels": (512**2, elastic, ((512, 512), 0)),
    "elastic_deform, order 1, 512 x 512 and labels": (512**2, elastic, ((512, 512), 1)),
    "elastic_deform, order 1, 512 x 512 uint8 and labels": (
        512**2,
        elastic,
        ((512, 512), 1, True, np.uint8),
    ),
    "elastic_deform, order 3, 256 x 256": (65536, elastic, ((256, 256), 3, False)),
    "elastic_deform, order 1, volume 32 x 64 x 64 and labels": (2**17, elastic, ((32, 64, 64), 1)),
    "elastic_deform backward, order 1, 256 x 256": (65536, elastic_gradients, ((256, 256), 1)),
    "elastic_deform backward, order 1, volume 16 x 32 x 32": (
        2**14,
        elastic_gradients,
        ((16, 32, 32), 1),
    ),
}


@dataclass
class Use:
    """What all launches of a kernel in a case cost."""

    launches: int = 0
    lines: Counter = field(default_factory=Counter)
    """How many warps issued each line."""
    sectors: int = 0
    read: int = 0
    written: int = 0
    atomics: int = 0

    def add(self, counts):
        self.launches += 1
        self.lines.update(counts.by_line())
        self.sectors += counts.sectors
        self.read += counts.read
        self.written += counts.written
        self.atomics = max(self.atomics, counts.atomics)


def uses_of(text):
    """{case: {kernel: Use}}, from runs of the PTX."""
    kernels = host_module(CACHE)
    device = Device(kernels, text, measure=True)
    result = {}
    for case, (_, function, arguments) in CASES.items():
        device.counts.clear()
        function(kernels, *arguments)
        uses = result[case] = defaultdict(Use)
        for counts in device.counts:
            uses[counts.kernel.name].add(counts)
    return result


# --- Instructions of the hardware ---------------------------------------------------------------


def nvdisasm():
    """The path of nvdisasm: of the CUDA toolkit, or of its package; or None."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            files = metadata.files("nvidia-cuda-nvdisasm") or []
        except metadata.PackageNotFoundError:
            files = []
        found = next((str(f.locate()) for f in files if f.name == "nvdisasm"), None)
    return found


def tools():
    """(ptxas, nvdisasm).

    Raises:
        Missing: If one of what is needed is not there.
    """
    found = {"nvcc": cuda_compiler(), "ptxas": shutil.which("ptxas"), "nvdisasm": nvdisasm()}
    for name, path in found.items():
        if path is None:
            where = "pip install nvidia-cuda-nvdisasm" if name == "nvdisasm" else "CUDA's toolkit"
            raise Missing(f"needs {name}: {where}")
    return found["ptxas"], found["nvdisasm"]


def output(*command):
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]}: {result.stderr[:2000]}")
    return result.stdout + result.stderr


def version_of(ptxas):
    return re.search(r"V([\d.]+)", output(ptxas, "--version"))[1]


RESOURCES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def resources_of(log):
    """{kernel: (registers, bytes spilled, bytes of shared memory)}, of what `ptxas -v` says."""
    found = {}
    for kernel, stores, loads, registers, rest in RESOURCES.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[kernel] = int(registers), int(stores) + int(loads), int(shared[1]) if shared else 0
    return found


@dataclass
class Block:
    """Instructions that run together: up to a jump or a label."""

    instructions: list = field(default_factory=list)  # (line of the PTX, text)
    calls: str = ""  # a subroutine of ptxas


SECTION = re.compile(r'\s*\.section\s+\.text\.([^,\s"]+)')
LINE = re.compile(r'.*nv_debug_ptx_txt", line (\d+)')
LABEL = re.compile(r"\s*([.$\w]+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
CALL = re.compile(r"CALL\S*\s+`\((\S*__cuda_sm\w*)\)")
PREDICATE = re.compile(r"@!?U?P\w+\s+")


def blocks_of(disassembly):
    """({kernel: its blocks}, {(kernel, subroutine): number of its instructions})."""
    kernels, subroutines = {}, Counter()
    kernel = subroutine = line = None
    for text in disassembly.splitlines():
        if match := SECTION.match(text):
            kernel, subroutine, line = match[1], None, None
            kernels[kernel] = [Block()]
        elif kernel is None:
            continue
        elif match := LINE.match(text):
            line = int(match[1])
        elif match := INSTRUCTION.match(text):
            if subroutine:
                subroutines[kernel, subroutine] += 1
                continue
            block, words = kernels[kernel][-1], PREDICATE.sub("", match[1])
            block.instructions.append((line, words))
            if match := CALL.match(words):
                block.calls = match[1]
            if re.match(r"(BRA|BRX|EXIT|CALL|RET)\b", words):
                kernels[kernel].append(Block())
        elif match := LABEL.match(text):
            kernels[kernel].append(Block())
            if "__cuda_sm" in match[1]:
                subroutine = match[1]
            elif not match[1].startswith(".L"):
                subroutine = None
    return kernels, subroutines


def kind_of(words):
    """In which of the columns an instruction counts, besides `sass`."""
    name = words.split()[0]
    if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", name):
        return "fp64"
    if re.match(r"(F2F|F2I|I2F|FRND)\b", name):
        return "conversions64" if "64" in name else "conversions"
    return None


def weigh(kernel, blocks, subroutines, lines):
    """Counter of instructions that warps issue, by column.

    Blocks with calls are the slow paths of divisions and roots, which ptxas makes for numbers that
    no case has; but a call of an integer division is the only path there is.
    """
    known = sorted(lines)
    total = Counter()
    for block in blocks:
        only_path = re.search(r"(div|rem)_[su]64", block.calls)
        if block.calls and not only_path:
            continue
        for line, words in block.instructions:
            if words.startswith("NOP") or line is None:
                continue
            place = bisect.bisect(known, line) - 1
            runs = lines[known[place]] if place >= 0 else 0
            total["sass"] += runs
            if kind := kind_of(words):
                total[kind] += runs
            if CALL.match(words):
                total["sass"] += runs * subroutines[kernel, block.calls]
    return total


def readable(kernel):
    """`deform<float, float, 2>` of a mangled name."""
    name = output("c++filt", kernel).strip().removeprefix("void ")
    depth, end = 0, len(name)
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = at
            break
    return re.sub(r"\b(\w+::)+", "", name[:end])


def rows():
    """All rows of the file, counted now."""
    ptxas, disassembler = tools()
    version, runs, result = version_of(ptxas), {}, []
    CACHE.mkdir(parents=True, exist_ok=True)
    for architecture in ARCHITECTURES:
        path = ptx_of_module(CACHE, architecture)
        text = path.read_text()
        same = re.sub(r"\.target\s+\w+", "", text)  # most often, for all architectures
        if same not in runs:
            runs[same] = uses_of(text)
        names = sorted({kernel for uses in runs[same].values() for kernel in uses})
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            options = ["-lineinfo", "-v", f"-arch=sm_{architecture}", "-e", ",".join(names)]
            resources = resources_of(output(ptxas, *options, path, "-o", cubin))
            blocks, subroutines = blocks_of(output(disassembler, "-gp", "-c", cubin))
        for case, uses in runs[same].items():
            pixels = CASES[case][0]
            for kernel, use in uses.items():
                weights = weigh(kernel, blocks[kernel], subroutines, use.lines)
                row = {"case": case, "pixels": pixels, "architecture": architecture}
                row |= {"kernel": readable(kernel), "ptxas": version, "launches": use.launches}
                for name in COSTS[:4]:
                    row[name] = weights[name] * 32 / pixels
                row |= {"sectors": use.sectors * 32 / pixels, "atomics": use.atomics}
                row |= {"read": use.read / pixels, "written": use.written / pixels}
                numbers = zip(("registers", "spills", "shared"), resources[kernel], strict=True)
                result.append({k: rounded(v) for k, v in {**row, **dict(numbers)}.items()})
    return result


def rounded(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- Program ------------------------------------------------------------------------------------


def grown(before, now):
    """Lines that tell what costs more than the file says.

    Raises:
        Missing: If the file was made with another ptxas.
    """
    versions = {row["ptxas"] for row in before} - {row["ptxas"] for row in now}
    if versions:
        made = ", ".join(sorted(versions))
        raise Missing(f"ptxas must be the one that made the file, {made}, got {now[0]['ptxas']}")
    known = {(row["case"], row["architecture"], row["kernel"]): row for row in before}
    for row in now:
        key = row["case"], row["architecture"], row["kernel"]
        name = "{}, sm_{}, {}".format(*key)
        if key not in known:
            yield f"{name}: is not in the file"
            continue
        for cost in COSTS:
            old, new = float(known[key][cost]), float(row[cost])
            if new > old * GROWTH and new > old + LEAST:
                yield f"{name}: {cost} is {row[cost]}, was {known[key][cost]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what grew, exit 1 then")
    check = parser.parse_args().check
    try:
        now = rows()
        if check:
            with RESULTS.open(newline="") as file:
                worse = list(grown(list(csv.DictReader(file)), now))
            print("\n".join(worse) or f"kernel_budget: none of {len(now)} rows grew")
            sys.exit(1 if worse else 0)
    except Missing as error:
        print(f"kernel_budget: {error}", file=sys.stderr)
        sys.exit(2)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(now)


if __name__ == "__main__":
    main()
