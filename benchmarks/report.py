"""Tables and plots of the suite's rows: no figure of them is typed.

    python benchmarks/report.py [--check]

Fills what stands between `<!-- benchmarks: NAME -->` and `<!-- end -->` in the README and in
docs/benchmarks.md, and draws docs/benchmarks/*.png. Of each suite a device's newest run counts.
With `--check` nothing is written; the exit code is 1 if a table, or what a plot was drawn from,
which its file holds, differs. Needs nothing but an installed package.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SUITES = "weighted_ce", "border_weight_map", "elastic_deform", "step", "inference", "metrics"
KINDS = "cpu", "cuda"
TEXTS = "suite", "case", "axis", "ours", "rival", "rival version", "limit", "note"
TEXTS += "device", "driver", "threads", "torch", "unet_fast", "commit", "date"
NUMBERS = "ours ms", "rival ms", "ratio p20", "ratio p50", "ratio p80", "share", "images", "x"
REFERENCE = "reference"
BARE = "bare network"
"""How the name of a rival begins that does only a part of the task; the README leaves it out."""
STOPPED = "stopped", "not tried: stopped"
"""How the note of a rival begins that takes too long."""
LIMIT = 30
"""Seconds after which a rival was stopped."""
SUMMARY = (  # of the README: suite, how its case ends, whose time, what it is
    ("weighted_ce", "one tile of the paper, 2 classes, 388 x 388", "weighted_ce", "weighted_ce"),
    ("border_weight_map", "512 x 512, 200 cells", "border_weight_map", "border_weight_map"),
    ("elastic_deform", "512 x 512 and labels", "elastic_deform", "elastic_deform"),
    ("step", "base 16, 572 -> 388, batch 1", "whole recipe", "training step"),
    ("step", "base 64, 572 -> 388, batch 1", "whole recipe", "training step"),
    ("step", "base 64, 572 -> 388, batch 8", "whole recipe", "training step"),
    ("step", "base 16, 384 -> 384, padded, batch 1", "whole recipe", "training step"),
    ("step", "base 64, 384 -> 384, padded, batch 1", "whole recipe", "training step"),
    ("step", "base 64, 384 -> 384, padded, batch 8", "whole recipe", "training step"),
    ("inference", "base 16, padded, 2048 x 2048", "predict", "predict"),
    ("inference", "base 16, padded, 4096 x 4096", "predict", "predict"),
)
GOALS = (  # suite, case, whose time, goal in images a second
    ("step", "base 64, 572 -> 388, batch 1", "whole recipe", 250),
    ("step", "base 64, 572 -> 388, batch 8", "whole recipe", 500),
    ("inference", "base 64, 572 -> 388, batch 16", "network, inference", 1500),
)
SMALL = 0.03
"""Goal: share of the step that tiles, weights and loss take together, at most."""


def rows_of(path):
    """The rows of a file, checked.

    Raises:
        ValueError: If one lacks a column, or holds no number where there must be one.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, 2):
        for name in (*TEXTS, *NUMBERS):
            if row.get(name) is None:
                raise ValueError(f"{path}, line {line}: must have a {name}")
        for name in NUMBERS:
            text = row[name]
            needed = name == "ours ms" or (name == "x" and row["suite"] == "growth")
            if needed or text:
                try:
                    right = 0 <= float(text) < float("inf") and (float(text) > 0 or name == "share")
                except ValueError:
                    right = False
                if not right:
                    raise ValueError(
                        f"{path}, line {line}: {name} must be a number > 0, got {text}"
                    )
    return rows


def newest(suite, kind):
    """The rows of the newest run of a suite on each device, the newest device first."""
    path = RESULTS / f"{suite}_{kind}.csv"
    if not path.exists():
        return []
    rows = rows_of(path)
    dates = {row["device"]: row["date"] for row in sorted(rows, key=lambda row: row["date"])}
    runs = sorted(dates.items(), key=lambda run: run[1], reverse=True)
    return [[row for row in rows if (row["device"], row["date"]) == run] for run in runs]


def of_devices(suite, table):
    """A heading and a table for each device."""
    parts = []
    for kind in KINDS:
        for rows in newest(suite, kind):
            parts += [heading(rows[0]), "", table(rows), ""]
    return "\n".join(parts) if parts else "Not measured yet.\n"


def heading(row):
    """What measured."""
    driver = f", driver {row['driver']}" if row["driver"] else ""
    return (
        f"*{row['device']}{driver}, {row['threads']} threads, torch {row['torch']}, "
        f"unet_fast {row['unet_fast']} at {row['commit'] or 'no commit'}, {row['date'][:10]}*"
    )


def markdown(columns, lines):
    """A table."""
    return "\n".join("| " + " | ".join(x) + " |" for x in [columns, ["---"] * len(columns), *lines])


def time_of(milliseconds):
    """With three digits."""
    value, unit = (milliseconds, "ms") if milliseconds < 1000 else (milliseconds / 1000, "s")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits + (value < 1)}f} {unit}"


def wins(row):
    """Whether ours takes less time in at least four of five pairs, or the rival was stopped."""
    if row["ratio p20"]:
        return float(row["ratio p20"]) > 1
    return row["note"].startswith(STOPPED)


def loses(row):
    """Whether the rival takes less time in at least four of five pairs."""
    return row["ratio p80"] != "" and float(row["ratio p80"]) < 1


def bold(text, if_so):
    return f"**{text}**" if if_so else text


def number(x):
    """With three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def ratio(row):
    """Median of rival / ours."""
    return float(row["ratio p50"])


def ratio_of(row):
    """Median and quantiles of rival / ours."""
    if not row["ratio p50"]:
        return ""
    p20, p50, p80 = (number(float(row[f"ratio {p}"])) for p in ("p20", "p50", "p80"))
    return f"{p50} ({p20} to {p80})"


def rival_of(row):
    """The rival's time, or why there is none."""
    return time_of(float(row["rival ms"])) if row["rival ms"] else row["note"]


def rate_of(row, column):
    """Images a second."""
    return f"{1e3 * float(row['images']) / float(row[column]):.3g}" if row[column] else ""


def table_of(rows):
    """All rows of a suite on a device; columns that would be empty are left out."""
    columns = {
        "case": lambda row: row["case"],
        "ours": lambda row: row["ours"],
        "time": lambda row: bold(time_of(float(row["ours ms"])), wins(row)),
        "rival": lambda row: f"{row['rival']} {row['rival version']}".strip(),
        "its time": lambda row: bold(rival_of(row), loses(row)),
        "its time / ours, p20 to p80": ratio_of,
        "images/s": lambda row: rate_of(row, "ours ms") if row["images"] else "",
        "the rival's": lambda row: rate_of(row, "rival ms") if row["images"] else "",
        "share of limit": lambda row: (
            row["share"] and f"{100 * float(row['share']):.0f} %, {row['limit']}"
        ),
        "peak MB": lambda row: row["ours MB"],
        "the rival's MB": lambda row: row["rival MB"],
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    kept = [name for name, column in cells.items() if any(column)]
    return markdown(kept, zip(*(cells[name] for name in kept), strict=True))


def limits():
    def table(rows):
        lines = [
            [row["ours"], row["case"], time_of(float(row["ours ms"])), row["note"]] for row in rows
        ]
        return markdown(["what", "of", "time", "rate"], lines)

    return of_devices("limits", table)


def breakdown():
    def table(rows):
        cases = list(dict.fromkeys(row["case"] for row in rows))
        parts = list(dict.fromkeys(row["ours"] for row in rows))
        by = {(row["ours"], row["case"]): row for row in rows}
        lines = []
        for part in parts:
            chosen = [by.get((part, case)) for case in cases]
            cells = [
                f"{time_of(float(r['ours ms']))}, {100 * float(r['share'] or 0):.1f} %" if r else ""
                for r in chosen
            ]
            lines.append([part, *cells])
        return markdown(["part", *cases], lines)

    return of_devices("breakdown", table)


def series_of(rows):
    """{(operator, axis): {method: [(x, milliseconds or None where it was stopped)]}}."""
    series = {}
    for row in rows:
        methods = series.setdefault((row["ours"], row["axis"]), {"unet_fast": {}})
        x = int(float(row["x"]))
        methods["unet_fast"].setdefault(x, []).append(float(row["ours ms"]))
        if row["rival"] and (row["rival ms"] or row["note"].startswith(STOPPED)):
            methods.setdefault(row["rival"], {})[x] = (
                float(row["rival ms"]) if row["rival ms"] else None
            )
    for methods in series.values():
        ours = methods["unet_fast"]
        methods["unet_fast"] = {x: statistics.median(times) for x, times in ours.items()}
    return series


def slope_of(points):
    """Of the line through the logarithms; None of a single point."""
    x, y = (np.log([p[i] for p in points.items() if p[1]]) for i in (0, 1))
    return None if len(x) < 2 else float(np.polyfit(x, y, 1)[0])


def growth():
    def table(rows):
        lines = []
        for (operator, axis), methods in series_of(rows).items():
            for method, points in methods.items():
                timed = {x: y for x, y in points.items() if y}
                if not timed:
                    lines.append(
                        [operator, axis, method, "", f"over {LIMIT} s at {min(points)}", ""]
                    )
                    continue
                ends = [f"{time_of(timed[x])} at {x:,}" for x in (min(timed), max(timed))]
                slow = [x for x, y in points.items() if y is None]
                ends[1] = f"over {LIMIT} s at {min(slow):,}" if slow else ends[1]
                slope = slope_of(timed)
                lines.append(
                    [operator, axis, method, *ends, "" if slope is None else f"{slope:.2f}"]
                )
        return markdown(["operator", "against", "who", "from", "to", "slope"], lines)

    return of_devices("growth", table)


def device_of(kind):
    """The device that measured the most suites, of several the last one; None where none did."""
    suites, dates = {}, {}
    for suite in SUITES:
        for row in (run[0] for run in newest(suite, kind)):
            suites[row["device"]] = suites.get(row["device"], 0) + 1
            dates[row["device"]] = max(row["date"], dates.get(row["device"], ""))
    return max(suites, key=lambda device: (suites[device], dates[device]), default=None)


def on_fullest_device(suite, kind):
    """The rows of the newest run of a suite on that device."""
    device = device_of(kind)
    return [row for run in newest(suite, kind) for row in run if row["device"] == device]


def found(suite, kind, case, ours):
    """The rows of a case in the newest run on that device."""
    rows = on_fullest_device(suite, kind)
    return [row for row in rows if row["case"].endswith(case) and row["ours"] == ours]


def tasks(kind):
    """What the README compares: names of tasks, and their rows that have a ratio."""
    for suite, case, ours, what in SUMMARY:
        rows = [row for row in found(suite, kind, case, ours) if row["ratio p50"]]
        rows = [row for row in rows if not row["rival"].startswith(BARE)]
        if rows:
            yield f"{what}, {rows[0]['case']}", rows


def goals():
    """Those for a GPU of the H200's class."""
    lines = []
    for suite, case, ours, goal in GOALS:
        rows = found(suite, "cuda", case, ours)
        rate = float(rate_of(rows[0], "ours ms")) if rows else None
        verdict = "" if rate is None else "met" if rate >= goal else "not met"
        lines.append(
            [
                f"{ours}, {case}",
                f"at least {goal:,} images/s",
                "not measured" if rate is None else f"{rate:,.0f}",
                verdict,
            ]
        )
    rows = on_fullest_device("breakdown", "cuda")
    for case in dict.fromkeys(row["case"] for row in rows) or [GOALS[0][1]]:
        parts = [r for r in rows if r["case"] == case and r["ours"] in ("tiles", "weights", "loss")]
        share = sum(float(row["share"] or 0) for row in parts)
        verdict = "" if not parts else "met" if share < SMALL else "not met"
        measured = f"{100 * share:.1f} %" if parts else "not measured"
        lines.append(
            [
                f"tiles, weights and loss, {case}",
                f"under {100 * SMALL:.0f} % of the step",
                measured,
                verdict,
            ]
        )
    return markdown(["what", "goal", "measured", ""], lines) + "\n"


def summary():
    """Of the README: for each task ours, the reference and the fastest other."""
    parts = []
    for kind in KINDS:
        lines, headings = [], {}
        for task, rows in tasks(kind):
            headings.setdefault(rows[0]["device"], heading(rows[0]))  # of the first suite
            first, fastest = rows[0], min(rows, key=ratio)
            cells = [task, bold(time_of(float(first["ours ms"])), wins(fastest))]
            plain = [row for row in rows if row["rival"].startswith(REFERENCE)]
            others = [row for row in rows if row not in plain]
            for some, name in ((plain, ""), (others, ", {rival}")):
                row = min(some, key=ratio, default=None)
                times = row and bold(f"{number(ratio(row))} times", row is fastest and loses(row))
                cells.append(times + name.format(**row) if row else "")
            lines.append(cells)
        if lines:
            columns = "task", "unet_fast", "the reference takes", "of others the fastest takes"
            parts += [*headings.values(), "", markdown(columns, lines), ""]
    return "\n".join(parts) if parts else "Not measured yet.\n"


GPUS = {  # architecture; warp instructions a second: all, float64; bytes a second of a copy
    "H200": ("90", 132 * 4 * 1.7e9, 132 * 2 * 1.7e9, 4.05e12),
    "RTX 4090": ("80", 128 * 4 * 2.5e9, 128 / 16 * 2.5e9, 0.92e12),
    "T4": ("75", 40 * 4 * 1.5e9, 40 / 16 * 1.5e9, 0.25e12),
}
"""Peak rates of issue and of float64; the copy is measured on the H200, else 80 to 90 % of peak."""
SMALL_PART = 0.02
"""Kernels that issue less than this part of a case's instructions have no line of their own."""


def estimate(rows, gpu):
    """Microseconds for a million pixels, and what most of them wait for."""
    architecture, issue, double, copy = GPUS[gpu]
    times = dict.fromkeys(("issue", "memory", "float64"), 0.0)
    for row in (row for row in rows if row["architecture"] == architecture):
        warps = 1e12 / 32  # of a million pixels, times a million microseconds
        limits = {
            "issue": warps * float(row["sass"]) / issue,
            "memory": 1e12 * (float(row["read"]) + float(row["written"])) / copy,
            "float64": warps * (float(row["fp64"]) + float(row["conversions64"])) / double,
        }
        most = max(limits, key=limits.get)
        times[most] += limits[most]
    return f"{sum(times.values()):.3g}, {max(times, key=times.get)}"


def kernel_budget():
    """Counts on sm_90, and estimates."""
    path = RESULTS / "kernel_budget.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        kernels = list(dict.fromkeys(row["kernel"] for row in of_case))
        shown = [of_case] + [[r for r in of_case if r["kernel"] == k] for k in kernels]
        total = sum(float(r["sass"]) for r in of_case if r["architecture"] == "90")
        for some in shown:
            counts = [row for row in some if row["architecture"] == "90"]
            added = {c: sum(float(r[c]) for r in counts) for c in counts[0] if c in SUMMED}
            if some is not of_case and added["sass"] < SMALL_PART * total:
                continue
            name = case if some is of_case else ""
            moved = added["read"] + added["written"]
            lines.append(
                [
                    bold(name, bool(name)),
                    "all" if some is of_case else f"`{counts[0]['kernel']}`",
                    f"{added['launches']:.0f}",
                    number(added["sass"]),
                    number(added["fp64"] + added["conversions64"]),
                    str(max(int(r["registers"]) for r in counts)),
                    number(moved),
                    *(estimate(some, gpu) for gpu in GPUS),
                ]
            )
    columns = ["case", "kernel", "launches", "instructions", "float64", "registers", "bytes"]
    return markdown([*columns, *GPUS], lines) + "\n"


SUMMED = "launches", "sass", "fp64", "conversions64", "read", "written"


def nnunet():
    """Scores of nnU-Net's trainings, a line for each variant: mean and deviation over the seeds."""
    with (RESULTS / "nnunet.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {"AP at 0.5": "ap_50", "AP at 0.75": "ap_75", "PQ at 0.5": "pq_50", "SEG": "seg"}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        group = [row for row in rows if row["variant"] == variant]
        values = {x: [float(row[x]) for row in group] for x in (*scores.values(), "found", "false")}
        cells = [
            f"{statistics.mean(values[x]):.3f} ± {statistics.stdev(values[x]):.3f}"
            if len(group) > 1
            else f"{values[x][0]:.3f}"
            for x in scores.values()
        ]
        counts = [f"{statistics.mean(values[x]):.0f}" for x in ("found", "false")]
        minutes = statistics.median(float(row["cpu seconds"]) for row in group) / 60
        counts[0] += f" of {group[0]['objects']}"
        lines.append([variant, str(len(group)), *cells, *counts, f"{minutes:.0f} min"])
    columns = ["variant", "seeds", *scores, "objects", "false", "CPU time of training"]
    return markdown(columns, lines) + "\n"


BLOCKS = {
    **{
        suite: lambda suite=suite: of_devices(suite, table_of)
        for suite in (*SUITES, "integrations")
    },
    **{f.__name__: f for f in (summary, limits, kernel_budget, breakdown, growth, goals, nnunet)},
}


PAGES = {
    ROOT / "README.md": ["summary"],
    ROOT / "docs" / "benchmarks.md": [name for name in BLOCKS if name != "summary"],
}
"""Which tables each has."""


def filled(path):
    """A page with its tables made anew."""
    text = path.read_text()
    names = re.findall(r"<!-- benchmarks: (\w+) -->", text)
    if sorted(names) != sorted(PAGES[path]) or names != [b[2] for b in BLOCK.finditer(text)]:
        raise ValueError(
            f"{path}: must hold once, with an end, each of {', '.join(PAGES[path])}, "
            f"got {', '.join(names)}"
        )
    return BLOCK.sub(lambda block: block[1] + BLOCKS[block[2]]() + block[3], text)


def speed_data(kind):
    """What the README's plot shows: {task: {rival: median of rival / ours}}."""
    return {task: {row["rival"]: ratio(row) for row in rows} for task, rows in tasks(kind)}


def draw_speed(ratios):
    """Bars on a logarithmic axis, from 1, which is ours."""
    bars = [
        (task, rival, ratio) for task, rivals in ratios.items() for rival, ratio in rivals.items()
    ]
    figure = Figure(figsize=(9, 0.24 * len(bars) + 0.32 * len(ratios) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    y, previous = 0.0, None
    for task, rival, ratio in bars:
        if task != previous:
            y += 1.4
            axes.text(1, y - 0.15, task, weight="bold", size=8.5)
            y += 1
            previous = task
        colour = "#3b6ea5" if ratio > 1 else "#c0504d"
        axes.barh(y, ratio - 1, left=1, color=colour, height=0.75)
        axes.text(max(ratio, 1) * 1.05, y, f"{number(ratio)}  {rival}", va="center", size=8)
        y += 1
    axes.set_xscale("log")
    high = max(ratio for *_, ratio in bars)
    axes.set_xlim(min(0.4, 0.8 * min(ratio for *_, ratio in bars)), high * 12)
    axes.set_ylim(y, 0.6)
    axes.set_yticks([])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(
        "its time / that of unet_fast, median (1: as fast; left of it: faster)", size=8.5
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def growth_data(kind):
    """What the plot of growth shows: "operator against axis" -> method -> [[x, milliseconds]]."""
    # What the device that measured most lacks comes from others.
    runs = sorted(newest("growth", kind), key=lambda run: run[0]["device"] == device_of(kind))
    return {
        f"{operator} against {axis}": {
            m: [list(p) for p in points.items()] for m, points in methods.items()
        }
        for run in runs
        for (operator, axis), methods in series_of(run).items()
    }


def draw_growth(panels):
    """Time on logarithmic axes, the fitted slope beside each name."""
    columns = 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(13, 3.7 * rows), layout="constrained")
    for i, (title, methods) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for method, points in methods.items():
            timed = {x: y for x, y in points if y}
            slope = slope_of(timed) if timed else None
            label = method if slope is None else f"{method}, slope {slope:.2f}"
            wide = {"linewidth": 2.2, "color": "black"} if method == "unet_fast" else {}
            (line,) = axes.plot(
                list(timed), list(timed.values()), "o-", markersize=3, label=label, **wide
            )
            stopped = [x for x, y in points if y is None][:1]
            axes.plot(
                stopped, [1e3 * LIMIT] * len(stopped), "x", color=line.get_color(), markersize=9
            )
        axes.set(xscale="log", yscale="log", ylabel="milliseconds")
        axes.set_title(title, size=10)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    return figure


def plots():
    """(file, data, drawing) of what there are rows for."""
    for kind in KINDS:
        for name, data, draw in (
            ("speed", speed_data, draw_speed),
            ("growth", growth_data, draw_growth),
        ):
            content = data(kind)
            if content:
                yield PLOTS / f"{name}_{kind}.png", content, draw


def drawn_from(path):
    """The data that a plot holds, as text; None if there is none."""
    try:
        return Image.open(path).text.get("Data")
    except (OSError, AttributeError):  # none, or no PNG
        return None


def differing(check):
    """Pages and plots that say something else than the rows; unless told to check, made anew."""
    differ = []
    for path in PAGES:
        text = filled(path)
        if text != path.read_text():
            differ.append(path)
            if not check:
                path.write_text(text)
    there = set(PLOTS.glob("*.png"))
    for path, data, draw in plots():
        there.discard(path)
        text = json.dumps(data)
        if drawn_from(path) != text:
            differ.append(path)
            if not check:
                path.parent.mkdir(exist_ok=True)
                draw(data).savefig(path, dpi=110, metadata={"Data": text, "Software": None})
    for path in sorted(there):  # there are no rows for it any more
        differ.append(path)
        if not check:
            path.unlink()
    return differ


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what differs, exit 1 then")
    options = parser.parse_args()
    try:
        differ = differing(options.check)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path in differ:
        print(
            f"{path.relative_to(ROOT)}: {'differs from' if options.check else 'made of'} the rows"
        )
    sys.exit(1 if options.check and differ else 0)


if __name__ == "__main__":
    main()
