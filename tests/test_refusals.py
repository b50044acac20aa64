"""One line and exit code 2, or 130, where Python would print a traceback."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from runs import discs_in, options

from unet_fast import _program, elastic_deform, train
from unet_fast.cli import main
from unet_fast.training import loop
from unet_fast.training.checkpoint import read_log

RUN = {"steps": 2, "base_channels": 2, "depth": 1, "tile": 16, "previews": 0, "validation": 0}


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "²"])
def test_numbers_of_torchrun(tmp_path, monkeypatch, capsys, name, value):
    """They are looked at before a run begins."""
    images, labels = discs_in(tmp_path / "discs")
    monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    code = main(["train", str(images), str(labels), "--out", str(out), *options(RUN)])
    if name == "LOCAL_RANK":  # of GPUs
        assert code == 0
        return
    assert code == 2
    said = f"unet-fast: {name} must be a number >= 0, as torchrun sets it, got {value!r}\n"
    assert capsys.readouterr().err.endswith(said)
    assert not out.exists()


@pytest.mark.parametrize("name", [b"a\xff.png", b"a\nb.png", b"a\x1b[1m.png"])
@pytest.mark.parametrize("command", ["check", "predict"])
def test_names_that_are_no_text(tmp_path, capsys, name, command):
    images, labels = discs_in(tmp_path / "discs", count=1)
    for folder in (images, labels):
        (folder / "0.png").rename(folder / os.fsdecode(name))
    words = [command, str(images), str(labels), "--out", str(tmp_path / "out")]
    if command == "predict":
        (tmp_path / "model").mkdir()
        train_one(tmp_path / "model")
        words[1:3] = [str(tmp_path / "model"), str(images)]
    capsys.readouterr()
    assert main(words) == 2
    printed = "".join(capsys.readouterr())
    said = f"{images}: names must be printable text, got {os.fsdecode(name)!r}"
    assert printed.count(said) == 1
    assert len(printed.splitlines()) == 1


def train_one(place):
    from runs import config

    train(config(discs_in(place / "discs"), place, **RUN))


def test_sigterm_outside_the_loop(tmp_path, monkeypatch, capsys):
    """Locks are opened, and the signal's meaning is the caller's again."""
    images, labels = discs_in(tmp_path / "discs")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "check_unused", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    out = tmp_path / "run"
    assert main(["train", str(images), str(labels), "--out", str(out), *options(RUN)]) == 130
    assert capsys.readouterr().err == "unet-fast: interrupted: terminated\n"
    assert list(out.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("module", [None, "unet_fast", "unet_fast.cli"])
def test_ctrl_c_while_torch_is_loaded(tmp_path, module):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    program = [Path(sys.executable).with_name("unet-fast")]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*(program if module is None else [sys.executable, "-m", module]), "info"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 130
    assert run.stderr == "unet-fast: interrupted\n"


def test_other_errors_before_the_program_runs(monkeypatch, capsys):
    """They are Python's to tell; only Ctrl-C ends in a line, and at once."""
    error = ValueError("no torch")
    _program._interrupted(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: no torch\n"
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        _program._interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    os._exit.assert_called_once_with(130)
    assert capsys.readouterr().err == "unet-fast: interrupted\n"


def test_no_memory(tmp_path, monkeypatch, capsys):
    """In an operator: an error that says so; in a command: one line."""
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        elastic_deform(image, output_shape=(2**26, 2**26))
    images, labels = discs_in(tmp_path / "discs")
    for error in (MemoryError(), RuntimeError("std::bad_alloc")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(loop, "check_unused", fail)
        words = ["train", str(images), str(labels), "--out", str(tmp_path / "run"), *options(RUN)]
        assert main(words) == 2
        assert re.fullmatch("unet-fast: not enough memory.*\n", capsys.readouterr().err)
    error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 16 bytes. Error code 12 (Cannot allocate memory)"
    )
    monkeypatch.setattr(loop, "check_unused", mock.Mock(side_effect=error))
    assert main(words) == 2
    said = "unet-fast: not enough memory: you tried to allocate 16 bytes. Error code 12 (Cannot"
    assert capsys.readouterr().err.startswith(said)


ROWS = ["", "5", "[]", "{}", '{"step": 1}', '{"step": "1", "loss": 1}', "\x00\x00", '{"step": 1, ']
GOOD = '"learning_rate": 0.1, "gradient_norm": null, "seconds": 1'


@pytest.mark.parametrize(
    "row",
    [
        *ROWS,
        f'{{"step": true, "loss": 1, {GOOD}}}',
        f'{{"step": 1, "loss": "1", {GOOD}}}',
        f'{{"step": 1, "loss": 1, {GOOD}, "validation": 5}}',
        f'{{"step": 1, "loss": 1, {GOOD}, "validation": {{"files": "1"}}}}',
        f'{{"step": 1, "loss": 1, {GOOD}, "best": {{"step": 1, "by": "pq"}}}}',
        "[" * 10**5,
        f'{{"step": 1, "loss": 1{"0" * 400}, {GOOD}}}',
    ],
    ids=range(15),
)
def test_rows_that_are_none(tmp_path, row):
    """Of a damaged log; the others count."""
    good = f'{{"step": 2, "loss": 0.5, {GOOD}, "validation": {{"files": 1, "pq": null}}}}'
    (tmp_path / "log.jsonl").write_text(f"{row}\n{good}\n{row}")
    assert [r["step"] for r in read_log(tmp_path)] == [2]


@pytest.mark.parametrize("command", ["train", "check", "evaluate"])
@pytest.mark.parametrize("of", [0, 1])
def test_results_among_the_input(tmp_path, capsys, command, of):
    """What is written there would count as an image without labels in the next call."""
    folders = discs_in(tmp_path / "discs")
    before = sorted(folders[of].iterdir())
    words = [command, *map(str, folders), "--out", str(folders[of])]
    assert main([*words, *(options(RUN) if command == "train" else ())]) == 2
    said = f"unet-fast: out must not be the folder of the input, got {folders[of]}\n"
    assert capsys.readouterr().err.endswith(said)
    assert sorted(folders[of].iterdir()) == before
