"""Memory: what there is, what is needed, and what is refused."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from runs import config, discs_in

from unet_fast import UNet, _memory, save_model
from unet_fast.cli import main
from unet_fast.training.config import as_dict
from unet_fast.training.memory import bytes_of_run
from unet_fast.training.tiles import load_sets

CPU = torch.device("cpu")


def host(root, groups, files):
    """A file system that says what a machine of 8 GB with 5 GB free has."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        "MemTotal: 8000000 kB\nMemAvailable:    5000000 kB\nSwapFree: 1000000 kB\nHugePages: 0\n"
    )
    (root / "proc/self/statm").write_text("9 5 0 0 0 0 0")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


STAT = "anon 5\ninactive_file 300\nactive_file 200\n"


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("", {}, 6_144_000_000),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max"}, 6_144_000_000),
        (
            "0::/user/mine\n",
            {
                "sys/fs/cgroup/user/memory.max": "10000",
                "sys/fs/cgroup/user/memory.current": "4000",
                "sys/fs/cgroup/user/memory.stat": STAT,
                "sys/fs/cgroup/user/mine/memory.max": "max",
            },
            6500,
        ),
        (
            "4:memory:/job\n3:cpuset:/\n0::/\n",
            {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "10000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "4000",
                "sys/fs/cgroup/memory/job/memory.stat": STAT + "total_inactive_file 700\n",
            },
            6700,
        ),
    ],
)
def test_what_there_is(tmp_path, groups, files, left):
    own = 5 * os.sysconf("SC_PAGE_SIZE")
    assert _memory._of_host(host(tmp_path, groups, files)) == left + own


def test_unknown_memory_refuses_nothing(tmp_path, monkeypatch):
    assert _memory._of_host(tmp_path) is None
    monkeypatch.setattr(_memory, "memory_for", lambda device: None)
    _memory.check_memory(1e30, CPU, "all", lambda there: "none")


def test_what_may_not_fit_is_warned_of(monkeypatch):
    monkeypatch.setattr(_memory, "memory_for", lambda device: 10**10)
    _memory.check_memory(1e10, CPU, "it", lambda there: "less")
    with pytest.warns(UserWarning, match=r"^it needs about 12 GB of memory, and this machine has "):
        _memory.check_memory(1.2e10, CPU, "it", lambda there: "less")
    with pytest.raises(ValueError, match=r"10 GB free: 5 GB do"):
        _memory.check_memory(1e10, CPU, "it", lambda there: f"{there / 1e9:.0f} GB do", 2)


CHILD = """
import json, sys
from unet_fast import TrainConfig, train
def peak():
    (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
program = peak()
train(TrainConfig(**json.loads(sys.argv[1])))
print("peak", program, peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "changes",
    [
        {"tile": 576, "base_channels": 32, "padding": "same"},  # activations
        {"tile": 16, "base_channels": 128, "depth": 3, "optimizer": "adam"},  # weights
    ],
)
def test_estimate_equals_what_a_run_takes(tmp_path, changes):
    discs = discs_in(tmp_path / "discs", size=64)
    settings = config(discs, tmp_path / "run", **{"depth": 2, "steps": 1, **changes})
    plain = {k: v for k, v in as_dict(settings).items() if k not in ("weights", "augmentation")}
    call = [sys.executable, "-c", CHILD, json.dumps(plain)]
    run = subprocess.run(call, capture_output=True, text=True, check=True)
    program, peak = map(int, re.search(r"^peak (\d+) (\d+)$", run.stdout, re.MULTILINE).groups())
    needed = bytes_of_run(settings, load_sets(settings, False, CPU)[1:], CPU)
    assert peak > 2 * program, "the program alone says nothing of the formula"
    assert 1 / 1.5 < needed / peak < 1.5, (needed, peak)


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (["--tile", "40000"], "tile"),
        (["--base-channels", "2048"], "base_channels"),
        (["--batch-size", "60000"], "batch_size"),
        (["--tile", "1000000000000"], "tile"),  # more than 64 bits can count
    ],
)
def test_a_run_that_cannot_fit_is_refused(tmp_path, capsys, monkeypatch, words, fits):
    monkeypatch.setattr(_memory, "memory_for", lambda device: 2 * 10**9)
    discs = discs_in(tmp_path / "discs")
    call = ["train", *map(str, discs), "--out", str(tmp_path / "run"), *words]
    assert main([*call, "--depth", "2"]) == 2
    error = capsys.readouterr().err
    known = re.fullmatch(
        r"unet-fast: train: tile \d+ with batch_size \d+ and base_channels \d+ needs about [\d,]+ "
        rf"GB of memory, and this machine has 2 GB free: (.* or )?{fits} (\d+)( or .*)? fits\n",
        error,
    )
    assert known, error
    assert not (tmp_path / "run").exists()
    if words[1] == "40000":  # what it says is true
        settings = config(discs, tmp_path / "run", tile=int(known[2]), base_channels=16)
        sets = load_sets(settings, False, CPU)[1:]
        assert bytes_of_run(settings, sets, CPU) <= 2e9


def test_a_prediction_that_cannot_fit_is_refused(tmp_path, capsys, monkeypatch):
    discs = discs_in(tmp_path / "discs", count=1, size=1500)
    model = tmp_path / "model.safetensors"
    save_model(UNet(base_channels=32, depth=2).eval(), model)
    monkeypatch.setattr(_memory, "memory_for", lambda device: 5 * 10**8)
    call = ["predict", str(model), str(discs[0]), "--precision", "float32", "--out"]
    assert main([*call, str(tmp_path / "out"), "--tile", "1500"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"unet-fast: \S+: tile 1500 x 1500 with batch_size 1 needs about [\d.]+ GB of memory, and "
        r"this machine has 0.5 GB free: scale the image down, give a smaller memory_b.*\n",
        error,
    ), error
    monkeypatch.setattr(_memory, "memory_for", lambda device: 10**9)
    words = "--tile", "1500", "--batch-size", "1", "--format", "ome-zarr"
    assert main([*call, str(tmp_path / "zarr"), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(r"without tile, batch_size and memory_budget 0\.8\d? GB do", error), error
