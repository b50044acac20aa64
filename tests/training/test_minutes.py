"""Runs of so many minutes, settings that nobody typed, and what is told on the way."""

import io
import json
import re
import sys
import tomllib
import types

import pytest
import torch
from runs import config, discs_in, options

from unet_fast import TrainConfig, UNet, train
from unet_fast import _progress as progress
from unet_fast.cli import main
from unet_fast.cli.training import _tell_of
from unet_fast.objects import ObjectRule
from unet_fast.training import loop, run
from unet_fast.training.checkpoint import read_log
from unet_fast.training.config import read_toml
from unet_fast.training.processes import Processes
from unet_fast.training.step import Step
from unet_fast.training.validation import described


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs")


class Clock:
    """Time that passes in steps of training and in evaluations only."""

    def __init__(self, monkeypatch, step=0.5, file=0.7):
        self.now = 0.0
        compute, look = Step.compute_eagerly, run.look

        def slow_compute(*args):
            self.now += step
            return compute(*args)

        def slow_look(*args):
            self.now += file
            return look(*args)

        monkeypatch.setattr(Step, "compute_eagerly", slow_compute)
        monkeypatch.setattr(run, "look", slow_look)

    def __call__(self):
        return self.now


def timed(discs, out, **changes):
    return config(discs, out, steps=None, minutes=1, **changes)


def test_a_run_ends_in_time(discs, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    train(timed(discs, tmp_path / "run"), clock=clock)
    assert clock.now == pytest.approx(60, rel=0.1)
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert 100 <= settings["steps"] <= 120  # of half a second
    assert "minutes" not in settings
    assert settings["evaluate_every"] <= settings["steps"]
    rates = [row["learning_rate"] for row in read_log(tmp_path / "run")]
    assert len(rates) == settings["steps"]
    assert rates[-1] < 0.01 * max(rates)  # the schedule ends, too


def test_the_steps_timed_leave_no_trace(discs, tmp_path, monkeypatch):
    """The run is the one that its config.toml repeats, bit for bit."""
    changes = {"norm": "batch", "optimizer": "adam", "precision": "float32"}
    clock = Clock(monkeypatch, step=6.0)
    one = train(timed(discs, tmp_path / "one", **changes), clock=clock)
    steps = len(read_log(tmp_path / "one"))
    assert 3 <= steps <= 9
    file = tmp_path / "one" / "config.toml"
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "two")]) == 0
    for name in ("best", "last"):
        two, three = (tmp_path / d / f"{name}.safetensors" for d in ("one", "two"))
        assert two.read_bytes() == three.read_bytes()
    assert all(x.isfinite().all() for x in one.state_dict().values())


def test_a_resumed_run_keeps_its_steps(discs, tmp_path, monkeypatch):
    """However fast the machine is now."""
    changes = {"checkpoint_every": 1, "precision": "float32"}
    clock = Clock(monkeypatch, step=6.0)
    whole = tmp_path / "whole"
    train(timed(discs, whole, **changes), clock=clock)
    broken, save = tmp_path / "broken", run.save_state
    calls = []

    def cut_off(*args):
        save(*args)
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the power is gone")

    monkeypatch.setattr(run, "save_state", cut_off)
    with pytest.raises(OSError, match="the power is gone"):
        train(timed(discs, broken, **changes), clock=clock)
    monkeypatch.setattr(run, "save_state", save)
    clock = Clock(monkeypatch, step=0.001)
    train(timed(discs, broken, resume=True, **changes), clock=clock)
    for name in ("best.safetensors", "last.safetensors", "config.toml", "split.json"):
        one, two = ((d / name).read_text(errors="replace") for d in (whole, broken))
        assert one.replace(str(whole), "") == two.replace(str(broken), "")


def test_too_little_time(discs, tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, step=100.0)
    with pytest.raises(ValueError, match=r"minutes must allow a step .* steps of 100 s"):
        train(timed(discs, tmp_path / "run", previews=0), clock=clock)
    for words, message in (
        (["--minutes", "0"], "minutes must be > 0, got 0"),
        (["--minutes", "nan"], "minutes must be > 0, got nan"),
        (["--minutes", "1e-9"], "minutes must allow a step"),
        (["--minutes", "2", "--steps", "5"], "minutes must be none where steps are given, got 2"),
    ):
        out = tmp_path / "typed"
        call = ["train", *map(str, discs), "--out", str(out), *options({"previews": 0}), *words]
        capsys.readouterr()
        assert main(call) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_typed_time_counts_more_than_steps_of_a_file(discs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train", seen.append)
    monkeypatch.setattr("unet_fast.cli.training._tell_of", lambda config, model: None)
    file = tmp_path / "settings.toml"
    words = ["train", *map(str, discs), "--out", str(tmp_path / "run"), "--config", str(file)]
    for text, typed, expected in (
        ("steps = 7", [], (7, None)),
        ("steps = 7", ["--minutes", "3"], (None, 3)),
        ("minutes = 3", ["--steps=9"], (9, None)),
        ("minutes = 3", [], (None, 3)),
        ("", [], (None, None)),
    ):
        file.write_text(text)
        assert main([*words, *typed]) == 0
        assert (seen[-1].steps, seen[-1].minutes) == expected


def test_what_is_not_said_is_what_check_suggests(discs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train", seen.append)
    monkeypatch.setattr("unet_fast.cli.training._tell_of", lambda config, model: None)
    out = tmp_path / "run"
    words = ["train", *map(str, discs), "--out", str(out)]
    assert main(words) == 0
    gpu = torch.cuda.is_available()
    assert seen[-1] == TrainConfig.suggested(*discs, out=out)
    assert seen[-1].base_channels == (64 if gpu else 16)
    assert seen[-1].optimizer == "adam"
    assert seen[-1].tile == 36  # of images of 48 pixels
    assert main([*words, "--optimizer", "sgd", "--weights.w0", "3"]) == 0
    assert (seen[-1].optimizer, seen[-1].weights.w0, seen[-1].tile) == ("sgd", 3, 36)
    file = tmp_path / "settings.toml"
    file.write_text("base_channels = 5\n[augmentation]\nflip = true\n")
    assert main([*words, "--config", str(file)]) == 0
    assert (seen[-1].base_channels, seen[-1].tile) == (5, 36)
    assert seen[-1].augmentation.flip
    assert main([*words, "--preset", "paper-2015"]) == 0
    assert seen[-1] == TrainConfig(*discs, out=out)
    assert seen[-1].base_channels == 64
    changed = TrainConfig.suggested(*discs, out=out, tile=30, seed=4)
    assert (changed.tile, changed.seed, changed.optimizer) == (30, 4, "adam")


def test_a_resumed_run_takes_its_own_settings(discs, tmp_path):
    """Also those that the first command typed and the second does not."""
    out = tmp_path / "run"
    words = ["train", *map(str, discs), "--out", str(out)]
    assert main([*words, *options({"steps": 2, "previews": 0, "seed": 3})]) == 0
    assert main([*words, "--steps", "3", "--resume"]) == 0
    settings = tomllib.loads((out / "config.toml").read_text())
    assert (settings["seed"], settings["depth"], settings["steps"]) == (3, 1, 3)


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = 0.0
    with progress.bar(40, "train", "step", initial=4, clock=lambda: now) as shown:
        for _ in range(36):
            now += 3.0
            shown.set_postfix_str("loss 0.5", refresh=False)
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9  # one in four steps: no more than 30 s between two
    assert lines[0] == "train: step 8 of 40, loss 0.5, 01:36 left"
    assert lines[-1] == "train: step 40 of 40, loss 0.5, 00:00 left"


def test_a_run_tells_how_far_it_is(discs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    words = ["train", *map(str, discs), "--out", str(tmp_path / "run")]
    assert main([*words, *options({"steps": 4, "evaluate_every": 2, "previews": 0})]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 4
    number = r"\d+\.\d+"
    assert re.search(
        rf"^train: step 3 of 4, loss {number}, validation PQ {number}, \d+ objects of \d+, "
        rf"[\d.e+-]+ images/s, 00:\d\d left$",
        captured.err,
        re.MULTILINE,
    )
    assert re.search(rf"^step \d, 1 validation image: PQ {number}, ", captured.out)
    assert re.search(r"^objects: .*: PQ \S+, \d+ objects of \d+$", captured.out, re.MULTILINE)
    assert captured.out.endswith(f"model: {tmp_path / 'run'}\n")


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bar(3, "predict", "image") as shown:
        shown.update()
    assert "predict" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


def test_lines_of_what_has_no_end_yet(capsys):
    with progress.bar(None, "x", "block") as shown:
        shown.update(3)
        shown.refresh()
        shown.reset(8)
        shown.refresh()
        shown.update(2)
        shown.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["x: block 3", "x: block 0 of 8", "x: block 2 of 8, 00:00 left"]


@pytest.mark.parametrize(("compile", "steps"), [(False, 120), (True, 100)])
def test_a_compiled_run_compiles_twice(tmp_path, monkeypatch, compile, steps):
    """The first step, which took 10 s of the minute, is made again; others take half a second."""
    monkeypatch.setattr(loop, "_trial", lambda *_: (10.0, 0.5))
    free = types.SimpleNamespace(cost=0)
    train_set = types.SimpleNamespace(device="cpu")
    run = types.SimpleNamespace(train_set=train_set, processes=Processes(), plan=lambda steps: free)
    settings = timed(("images", "labels"), tmp_path, compile=compile)
    found = loop._in_time(settings, lambda config: run, 0.0, lambda: 0.0)
    assert (found.steps, found.minutes) == (steps, None)


def test_tables_of_settings(tmp_path):
    file = tmp_path / "settings.toml"
    for text, message in (
        ("weights = 3", "weights must be a table, got 3"),
        ("[steps]\nw0 = 3", "steps must be a value, not a table"),
        ("[weights.w0]\na = 3", "weights.w0 must be a value, not a table"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{file}: {message}")):
            read_toml(file)


def test_what_is_told_of_classes_without_objects(tmp_path, capsys):
    settings = config(("images", "labels"), tmp_path)
    best = {"step": 2, "by": "iou", "iou": 0.5, "loss": 0.25}
    row = {"step": 3, "loss": 0.5, "learning_rate": 0.1, "gradient_norm": None, "seconds": 1}
    row |= {"training": {"files": 2, "iou": 0.4}, "best": best}
    (tmp_path / "log.jsonl").write_text(json.dumps(row))
    model = UNet(base_channels=1, depth=1)
    lines = ["step 2, 2 training images: pixel IoU 0.500, loss 0.250", f"model: {tmp_path}"]
    _tell_of(settings, model)
    assert capsys.readouterr().out.splitlines() == lines
    model.objects = ObjectRule()
    _tell_of(settings, model)
    rule = f"objects: {described(model.objects)}: pixel IoU 0.500"
    assert capsys.readouterr().out.splitlines() == [lines[0], rule, lines[1]]
