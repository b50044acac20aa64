"""Several processes train one network: here two on the CPU."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from budget import first
from runs import discs_in, options

from unet_fast import load_model
from unet_fast.cli import main
from unet_fast.training.checkpoint import read_log
from unet_fast.training.processes import Processes, joined_processes, lost

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs", count=5)


def words(discs, out, **changes):
    settings = {"steps": 12, "evaluate_every": 4, "precision": "float32"} | changes
    return ["train", *map(str, discs), "--out", str(out), *options(settings)]


def torchrun(call):
    return subprocess.Popen(
        [*TORCHRUN, "-m", "unet_fast.cli", *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("reduction", first("weighted_mean", "mean", "sum"))
def test_two_processes_are_one_with_twice_the_batch(discs, tmp_path, reduction):
    """Dropout off: the same loss curve to rounding, the same validation, the same weights."""
    changes = {"dropout": 0, "loss_reduction": reduction, "momentum": 0.9, "batch_size": 2}
    if reduction == "sum":
        changes["learning_rate"] = 1e-6
    process = torchrun(words(discs, tmp_path / "two", **changes))
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert output.count("model: ") == 1  # the first process speaks for all
    assert main(words(discs, tmp_path / "one", **changes | {"batch_size": 4})) == 0
    rows = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [len(r) for r in rows] == [12, 12]
    for one, two in zip(*rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
        for name, value in one.get("validation", {}).items():
            assert two["validation"][name] == pytest.approx(value, rel=1e-3)
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "two" / "previews" / "tiles.png").exists()


@pytest.mark.thorough
def test_batch_norm_and_a_change_of_processes(discs, tmp_path):
    """All evaluate the statistics of the first; one goes on where two began, with their batch."""
    changes = {"norm": "batch", "batch_size": 2, "ema": 0.9}
    process = torchrun(words(discs, tmp_path / "run", **changes))
    _, error = process.communicate()
    assert process.returncode == 0, error
    more = words(discs, tmp_path / "run", **changes | {"steps": 14})
    assert main([*more, "--resume"]) == 2  # a step would no longer be what it was
    more = words(discs, tmp_path / "run", **changes | {"steps": 14, "batch_size": 4})
    assert main([*more, "--resume"]) == 0


def test_the_mean_of_means_is_something_else(discs, tmp_path):
    """What the test above would find if each process divided by its own weights."""
    assert main(words(discs, tmp_path / "both", dropout=0, batch_size=2, steps=1)) == 0
    assert main(words(discs, tmp_path / "first", dropout=0, batch_size=1, steps=2)) == 0
    both = read_log(tmp_path / "both")[0]["loss"]
    single = [row["loss"] for row in read_log(tmp_path / "first")]
    assert both != pytest.approx(np.mean(single), rel=1e-4)


def rank_of(pid):
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = re.search(r"^PPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return None
    ranks = [int(v[5:]) for v in environment if v.startswith(b"RANK=")]
    return (int(parent[1]), ranks[0]) if ranks else None


def worker(launcher, rank):
    """The process of a rank below torchrun."""
    (found,) = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and rank_of(p.name) == (launcher.pid, rank)
    ]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run(discs, tmp_path, rank):
    """With a message, soon, and the last checkpoint goes on."""
    out = tmp_path / "run"
    settings = {"steps": 100000, "checkpoint_every": 5, "evaluate_every": 100000}
    launcher = torchrun(words(discs, out, **settings))
    log = out / "log.jsonl"
    while launcher.poll() is None and (not log.exists() or log.read_text().count("\n") < 8):
        time.sleep(0.01)
    os.kill(worker(launcher, rank), signal.SIGKILL)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    lines = [line for line in error.splitlines() if line.startswith("unet-fast: ")]
    assert len(lines) == 1
    assert re.search(
        rf"train: process {1 - rank} lost contact with another at step \d+; go on", lines[0]
    )
    assert load_model(out)
    done = read_log(out)[-1]["step"]
    settings |= {"steps": done + 3, "batch_size": 2}  # one process takes the tiles of both
    assert main([*words(discs, out, **settings), "--resume"]) == 0
    assert read_log(out)[-1]["step"] == done + 3


def test_a_group_that_the_caller_made(tmp_path):
    """It is used, and it is the caller who ends it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with joined_processes(torch.device("cpu")) as processes:
            assert processes == Processes(0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    with joined_processes(torch.device("cpu")) as processes:
        assert processes == Processes()
        assert not dist.is_initialized()


def test_which_errors_tell_of_a_lost_process():
    talk = RuntimeError("[gloo/transport] Connection closed by peer. More of it")
    said = str(lost(talk, Processes(1, 2), 7))
    assert said.startswith("train: process 1 lost contact with another at step 7; go on from the")
    assert said.endswith("with resume ([gloo/transport] Connection closed by peer)")
    assert lost(dist.DistNetworkError("timed out"), Processes(0, 2), 7) is not None
    assert lost(talk, Processes(), 7) is None  # there is no other
    assert lost(RuntimeError("can't allocate memory"), Processes(1, 2), 7) is None
