"""The suite: timing in turn, rows, and tables and plots that say what the rows say."""

import csv
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
sys.path.insert(0, str(ROOT))  # `benchmarks` takes it out again

from benchmarks import bench_step, interleave, report  # noqa: E402
from benchmarks.interleave import Case, Rival  # noqa: E402


def python(*arguments, folder=ROOT):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program in this process: its exit code, and what it prints and says."""

    def run(path, *arguments, folder=ROOT, name=None):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capsys.readouterr()
        code = 0
        try:
            if name is None:
                runpy.run_path(str(folder / path), run_name="__main__")
            else:
                importlib.import_module(name).main()
        except SystemExit as error:
            code = error.code or 0
        return code, *capsys.readouterr()

    return run


def waits(duration):
    return lambda: time.sleep(duration)


def rows_of(case, **options):
    return list(interleave.measure("suite", case, CPU, {torch.float32: 1e9}, set(), **options))


def test_rivals_take_turns():
    calls = []
    found = interleave.compare(
        lambda: calls.append("a"), lambda: calls.append("b"), CPU, budget=0, least=4
    )
    assert calls == ["a", "b", "a", "a", "b", "b", *["a", "b"] * 4]
    assert found["rounds"] == 4


def test_ratios_are_of_neighbours():
    times = iter([1, 4, 1, 1, 4, 4, 1, 2, 10, 40, 100, 300])
    found = interleave.compare(lambda: next(times), lambda: next(times), CPU, budget=0, timed=True)
    assert (found["ours ms"], found["rival ms"]) == ("10000.0000", "40000.0000")
    assert (found["ratio p50"], found["ratio p20"], found["ratio p80"]) == (
        "3.000",
        "2.400",
        "3.600",
    )


def test_a_slow_rival_is_stopped_and_not_tried_again(monkeypatch):
    monkeypatch.setattr(interleave, "LIMIT", 0.2)

    def slow():
        for _ in range(100):
            time.sleep(0.01)

    stopped = set()
    found = []
    for axis, x in (("x", 1), ("x", 2), ("", "")):
        case = Case("case", "ours", waits(0.001), [Rival("slow", slow)], moved=8, axis=axis, x=x)
        found += interleave.measure("suite", case, CPU, {}, stopped, 0.01)
    notes = ["stopped after 0.2 s", "not tried: stopped before", "stopped after 0.2 s"]
    assert [row["note"] for row in found] == notes
    assert all(row["rival ms"] == "" and float(row["ours ms"]) > 0 for row in found)


def test_a_rival_that_fails_has_a_row_but_a_wrong_one_ends_the_run():
    def fail():
        raise RuntimeError("no memory\nof any kind")

    def differ():
        raise AssertionError

    rivals = [Rival("failing", fail), Rival("other", waits(0))]
    found = rows_of(Case("case", "ours", waits(0), rivals), budget=0.01)
    assert [row["note"] for row in found] == ["failed: RuntimeError: no memory", ""]
    assert not report.wins(found[0])
    assert float(found[0]["ours ms"]) >= 0
    wrong = Rival("wrong", waits(0), check=differ)
    with pytest.raises(AssertionError):
        rows_of(Case("case", "ours", waits(0), [wrong]), budget=0.01)


def test_blocks_of_workers_are_whole_rounds():
    """Steps are trained on tiles in their order; some are not timed, the rest not trained on."""

    class Learner:
        device = CPU
        seen: ClassVar = []

        def learn(self, tile):
            self.seen.append(tile.item())
            return tile

    recipe = bench_step.Loaded(bench_step.Setting(steps=1), Learner(), list(range(10**6)))
    workers = recipe.workers
    for block in range(2):
        Learner.seen.clear()
        assert recipe.block() > 0
        first = block * 4 * workers  # untimed, timed, loaded in advance twice
        assert Learner.seen == list(range(first, first + 2 * workers))


def test_a_missing_rival_has_a_row():
    (row,) = rows_of(Case("case", "ours", waits(0), [Rival("edt", None)]), budget=0.01)
    assert (row["rival"], row["note"], row["rival ms"]) == ("edt", "not installed", "")


def test_shares_of_limits():
    case = Case("case", "ours", lambda: 0.02, operations=1e7, timed=True)
    (row,) = rows_of(case, budget=0.1)
    assert row["share"] == "0.500"  # 1e7 operations at 1e9 a second: 10 ms of 20
    (row,) = rows_of(Case("case", "ours", waits(0.002), moved=8), budget=0.1)
    assert 0 < float(row["share"]) < 1
    assert row["limit"] == "copy of 8e-06 MB"


def test_rows_say_what_measured_where(tmp_path):
    (row,) = rows_of(Case("case", "ours", waits(0)), budget=0.01)
    assert tuple(row) == interleave.COLUMNS
    assert all(row[name] for name in ("device", "threads", "torch", "unet_fast", "date"))
    path = tmp_path / "a.csv"
    interleave.write_csv(path, [row])
    interleave.write_csv(path, [row])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="must have the columns of the new rows"):
        interleave.write_csv(path, [{"other": 1}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "argument --only: invalid choice: 'nothing'"),
        (["--budget", "0"], "argument --budget: must be > 0, got 0.0"),
        (["--out", "missing"], "argument --out: must be a folder, got missing"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_bad_input_of_the_suite(program, arguments, message):
    code, _, error = program("benchmarks/run.py", *arguments, name="benchmarks.run")
    assert code == 2
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_the_suite_leaves_rows_of_others_alone(program, tmp_path):
    (tmp_path / "metrics_cpu.csv").write_text("a,b\n1,2\n")
    code, _, error = program(
        "benchmarks/run.py", "--only", "metrics", "--out", str(tmp_path), name="benchmarks.run"
    )
    assert code == 2
    assert "must hold rows of the suite" in error.splitlines()[-1]
    assert (tmp_path / "metrics_cpu.csv").read_text() == "a,b\n1,2\n"


def test_the_suite_measures_what_is_installed():
    """A checkout has no compiled libraries, unless it is installed as editable."""
    code = "import benchmarks, os, sys; print('' in sys.path, os.getcwd() in sys.path)"
    assert python("-c", code).stdout == "False False\n"


def test_pages_and_plots_say_what_the_rows_say():
    run = python("benchmarks/report.py", "--check")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.fixture
def checkout(tmp_path):
    """What the report reads and writes, to change."""
    for name in ("README.md", "docs", "benchmarks"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def change(checkout, suite, wanted, **values):
    path = checkout / "benchmarks" / "results" / f"{suite}_cpu.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if wanted(row)]
    assert chosen
    for row in chosen:
        row |= values
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def write(program, checkout):
    """Runs the report of the checkout."""
    return lambda *words: program("benchmarks/report.py", *words, folder=checkout)


@pytest.fixture
def differing(write):
    def names():
        code, output, error = write("--check")
        assert error == ""
        assert code == (1 if output else 0)
        return [line.removesuffix(": differs from the rows") for line in output.splitlines()]

    return names


def test_the_check_sees_changed_rows(checkout, write, differing):
    plot = "docs/benchmarks/speed_cpu.png"
    change(
        checkout,
        "border_weight_map",
        lambda row: row["case"] == "512 x 512, 200 cells" and row["rival ms"],
        **{"ratio p50": "0.5"},
    )
    assert differing() == ["README.md", "docs/benchmarks.md", plot]
    readme = (checkout / "README.md").read_text()
    assert write()[0] == 0
    assert differing() == []
    assert (checkout / "README.md").read_text() != readme
    change(checkout, "growth", lambda row: row["axis"] == "cells", **{"ours ms": "12.5"})
    assert differing() == ["docs/benchmarks.md", "docs/benchmarks/growth_cpu.png"]


def test_the_check_sees_a_typed_figure(checkout, differing):
    readme = checkout / "README.md"
    text = readme.read_text()
    readme.write_text(re.sub(r"\*\*([\d.]+) ms\*\*", r"**0.001 ms**", text, count=1))
    assert readme.read_text() != text
    assert differing() == ["README.md"]


def test_a_plot_without_rows_or_data_differs(checkout, write, differing):
    plot = checkout / "docs" / "benchmarks" / "speed_cpu.png"
    good = plot.read_bytes()
    plot.write_bytes(b"")
    old = plot.with_name("old.png")
    old.write_bytes(good)
    names = ["docs/benchmarks/speed_cpu.png", "docs/benchmarks/old.png"]
    assert differing() == names
    assert write()[0] == 0
    assert differing() == []
    assert not old.exists()


def test_bad_rows_and_pages(checkout, write):
    readme = checkout / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("<!-- benchmarks: summary -->", "<!-- benchmarks: other -->"))
    code, _, error = write()
    assert code == 2
    assert "README.md: must hold once, with an end, each of summary, got other" in error
    for broken in (
        text.replace("<!-- end -->", ""),
        text.replace("<!-- benchmarks: summary -->", ""),
    ):
        readme.write_text(broken)
        assert write()[0] == 2
        assert readme.read_text() == broken
    readme.write_text(text)
    change(checkout, "step", lambda row: row["rival"], **{"rival ms": "fast"})
    code, _, error = write()
    assert code == 2
    last = error.splitlines()[-1]
    assert last.endswith("step_cpu.csv, line 2: rival ms must be a number > 0, got fast")
    assert "Traceback" not in error


ROW = dict.fromkeys(interleave.COLUMNS, "") | {
    "case": "case",
    "ours": "ours",
    "rival": "other",
    "rival version": "1.0",
    "ours ms": "2",
    "rival ms": "4",
    "ratio p20": "1.9",
    "ratio p50": "2",
    "ratio p80": "2.1",
}


def test_the_winner_is_bold_whoever_it_is():
    assert "| **2.00 ms** | other 1.0 | 4.00 ms | 2 (1.9 to 2.1) |" in report.table_of([ROW])
    lost = ROW | {"rival ms": "1", "ratio p20": "0.4", "ratio p50": "0.5", "ratio p80": "0.6"}
    assert "| 2.00 ms | other 1.0 | **1.00 ms** | 0.5 (0.4 to 0.6) |" in report.table_of([lost])
    tie = ROW | {"ratio p20": "0.9"}
    assert "| 2.00 ms | other 1.0 | 4.00 ms | 2 (0.9 to 2.1) |" in report.table_of([tie])
    note = "stopped after 30 s"
    stopped = ROW | dict.fromkeys(("rival ms", "ratio p20", "ratio p50", "ratio p80"), "")
    assert f"| **2.00 ms** | other 1.0 | {note} |" in report.table_of(
        [ROW, stopped | {"note": note}]
    )


def test_slopes():
    assert report.slope_of({1: 3.0, 10: 30.0, 100: 300.0}) == pytest.approx(1)
    assert report.slope_of({1: 3.0, 10: 3.0, 100: None}) == pytest.approx(0)
    assert report.slope_of({1: 3.0}) is None


def test_the_newest_run_of_a_device_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [
        ROW | {"device": device, "date": date, "case": f"{device}{date}"}
        for device, date in (("a", "2"), ("a", "1"), ("b", "3"), ("a", "2"))
    ]
    interleave.write_csv(tmp_path / "step_cpu.csv", rows)
    cases = [[row["case"] for row in run] for run in report.newest("step", "cpu")]
    assert cases == [["b3"], ["a2", "a2"]]
    assert report.newest("step", "cuda") == []
    assert report.device_of("cpu") == "b"
    interleave.write_csv(tmp_path / "metrics_cpu.csv", rows[:1])
    assert report.device_of("cpu") == "a"  # which measured more
    assert report.device_of("cuda") is None


def test_goals(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.goals().count("not measured") == 4
    suite, case, ours, goal = report.GOALS[0]
    row = ROW | {"case": case, "ours": ours, "ours ms": str(1e4 / goal), "images": "10"}
    row |= {"device": "GPU", "date": "1"}
    interleave.write_csv(tmp_path / f"{suite}_cuda.csv", [row])
    assert f"| at least {goal} images/s | {goal} | met |" in report.goals()
    interleave.write_csv(
        tmp_path / f"{suite}_cuda.csv", [row | {"date": "2", "ours ms": str(1.1e4 / goal)}]
    )
    assert f"| at least {goal} images/s | 227 | not met |" in report.goals()
    parts = {"tiles": "0.01", "weights": "0.005", "loss": "0.005", "network": "0.98"}
    for part, share in parts.items():
        row = ROW | {"case": "c", "ours": part, "share": share, "device": "GPU", "date": "1"}
        interleave.write_csv(tmp_path / "breakdown_cuda.csv", [row])
    assert "| under 3 % of the step | 2.0 % | met |" in report.goals()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_gpus_wants_a_folder():
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 2
    assert "usage" in run.stderr
