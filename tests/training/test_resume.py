"""Nothing that was written is lost, and a run goes on as if it had never stopped."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from budget import first
from runs import config, discs_in, options

from unet_fast import load_model, model_file, train
from unet_fast._files import replace_file
from unet_fast.cli import main
from unet_fast.model_file import pack, unpack
from unet_fast.training import checkpoint, loop, run, step
from unet_fast.training.checkpoint import read_log
from unet_fast.training.processes import Processes
from unet_fast.training.runtime import interruption
from unet_fast.training.tiles import load_sets

MODELS = "last.safetensors", "best.safetensors", "state.safetensors"


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs")


def words(discs, out, **changes):
    settings = {"steps": 30, "checkpoint_every": 3, "evaluate_every": 10, "previews": 0} | changes
    return ["train", *map(str, discs), "--out", str(out), *options(settings)]


def start(call):
    return subprocess.Popen(
        [sys.executable, "-m", "unet_fast.cli", *call], stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(process, log, count):
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < count):
        time.sleep(0.002)


def rows(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(out)]


def same(one, two):
    return [n for n in MODELS if (one / n).read_bytes() != (two / n).read_bytes()] == [] and (
        rows(one) == rows(two)
    )


@pytest.mark.thorough
def test_killed_at_random_steps(discs, tmp_path):
    """kill -9, again and again: the files end up equal to those of an unbroken run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words(discs, whole)) == 0
    dice = random.Random(time.time_ns())
    reached = 0
    for _ in range(3):
        reached = min(29, reached + dice.randint(1, 12))
        process = start([*words(discs, broken), "--resume"])
        wait_for_lines(process, broken / "log.jsonl", reached)
        time.sleep(dice.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert main([*words(discs, broken), "--resume"]) == 0
    assert same(whole, broken)
    before = {n: (broken / n).read_bytes() for n in MODELS}
    assert main([*words(discs, broken), "--resume"]) == 0  # nothing left to do
    assert before == {n: (broken / n).read_bytes() for n in MODELS}
    assert not list(broken.glob("*.part"))


@pytest.mark.parametrize("number", first(signal.SIGTERM, signal.SIGINT))
def test_interrupted_runs_save_first(discs, tmp_path, number):
    out = tmp_path / "run"
    process = start(words(discs, out, steps=100000, checkpoint_every=100000, evaluate_every=100000))
    wait_for_lines(process, out / "log.jsonl", 3)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1, error
    (done,) = re.findall(r"^unet-fast: interrupted: stopped after step (\d+), .*\n$", error)
    assert unpack(out / "state.safetensors", "")[1]["progress"]["step"] == int(done)
    assert [row["step"] for row in read_log(out)] == list(range(1, int(done) + 1))
    load_model(out)


VARIANTS = {
    "most": {"optimizer": "adam", "precision": "float16", "ema": 0.9, "clip_gradient": 0.5},
    "sgd": {"weight_decay": 0.01, "clip_gradient": 0.5},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "schedule": "constant", "warmup": 0.0},
    "mean of the weights": {"ema": 0.9, "norm": "batch"},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16", "batch_size": 2},
    "pixels": {"loss_reduction": "mean", "best_by": "loss"},
    "sum": {"loss_reduction": "sum", "learning_rate": 1e-6, "padding": "same", "norm": "group"},
}


@pytest.mark.parametrize("kind", first(*VARIANTS))
def test_every_kind_of_run_goes_on(discs, tmp_path, monkeypatch, kind):
    """Stopped by Ctrl-C in step 3 of 7; then the same bits as without."""
    changes = {"steps": 7, "evaluate_every": 2, "previews": 0, "dropout": 0.3} | VARIANTS[kind]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = train(config(discs, whole, **changes))
    seed_of = step.seed_of

    def stop_in_step_3(*key):
        if key[1:3] == (2, 3):
            signal.raise_signal(signal.SIGINT)
        return seed_of(*key)

    monkeypatch.setattr(step, "seed_of", stop_in_step_3)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3, which is saved"):
        train(config(discs, broken, **changes))
    monkeypatch.undo()
    resumed = train(config(discs, broken, resume=True, **changes))
    assert same(whole, broken)
    expected = model.state_dict()
    assert all(torch.equal(x, expected[k]) for k, x in resumed.state_dict().items())


def test_headers_hold_neither_time_nor_path(discs, tmp_path):
    for name in ("one", "two"):
        train(config(discs, tmp_path / name, deterministic=True))
    assert same(tmp_path / "one", tmp_path / "two")
    header = (tmp_path / "one" / "state.safetensors").read_bytes()[:5000]
    assert str(tmp_path).encode() not in header
    assert b"discs" not in header


def test_resume_without_a_checkpoint_starts(discs, tmp_path):
    train(config(discs, tmp_path / "one"))
    train(config(discs, tmp_path / "two", resume=True))
    assert same(tmp_path / "one", tmp_path / "two")


def test_more_steps_for_a_finished_run(discs, tmp_path):
    out = tmp_path / "run"
    train(config(discs, out, steps=3))
    train(config(discs, out, steps=5, resume=True))
    assert [row["step"] for row in read_log(out)] == [1, 2, 3, 4, 5]


def test_resuming_says_what_happens(discs, tmp_path, capsys):
    out = tmp_path / "run"
    train(config(discs, out, steps=2))
    assert "train:" not in capsys.readouterr().err.replace("train: step", "")
    train(config(discs, out, steps=2, resume=True))
    said = "train: nothing to do: 2 of 2 steps done; --steps N goes on\n"
    assert capsys.readouterr().err.startswith(said)
    train(config(discs, out, steps=4, resume=True))
    said = "train: with 4 steps instead of 2 the learning rate goes on at 0.0015, not at 0 (step 3)"
    assert capsys.readouterr().err.startswith(f"{said}\n")

    (out / "config.toml").unlink()  # which says how many steps there were
    train(config(discs, out, steps=5, resume=True))
    assert "learning rate" not in capsys.readouterr().err

    flat = tmp_path / "flat"  # a constant rate does not jump
    train(config(discs, flat, steps=2, schedule="constant", warmup=0.0))
    capsys.readouterr()
    train(config(discs, flat, steps=4, schedule="constant", warmup=0.0, resume=True))
    assert "learning rate" not in capsys.readouterr().err


def check_fails(capsys, call, message):
    capsys.readouterr()
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def fill_disk_for(monkeypatch, name):
    """Files of that name meet a full disk when they are flushed."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, content):
        with monkeypatch.context() as patch:
            if path.name == name:
                patch.setattr(os, "fsync", full)
            replace_file(path, content)

    for module in (model_file, checkpoint):
        monkeypatch.setattr(module, "replace_file", write)


def test_full_disk(discs, tmp_path, monkeypatch, capsys):
    """One line, and the checkpoint before is whole."""
    out = tmp_path / "run"
    call = words(discs, out, steps=4, evaluate_every=2, checkpoint_every=1)
    assert main([*call, "--schedule", "constant"]) == 0
    more = [*words(discs, out, steps=8, evaluate_every=4, checkpoint_every=1), "--resume"]
    more += ["--schedule", "constant"]  # as before: nothing is told but the full disk
    for name in MODELS[0], MODELS[2]:
        before = (out / name).read_bytes()
        fill_disk_for(monkeypatch, name)
        check_fails(capsys, more, f"{name}: cannot be written: No space left on device")
        monkeypatch.undo()
        assert not list(out.glob(".*"))
        assert (out / name).read_bytes() == before
        load_model(out / "last.safetensors")
        shutil.copytree(out, tmp_path / name)
        assert main([*more[:3], "--out", str(tmp_path / name), *more[5:]]) == 0
        assert read_log(tmp_path / name)[-1]["step"] == 8


def test_nonfinite_loss(discs, tmp_path, capsys):
    """Step, files and deformation of what made it; the checkpoint stays."""
    out = tmp_path / "run"
    call = words(discs, out, steps=50, learning_rate=1e15, warmup=0, checkpoint_every=1)
    call += ["--clip-gradient", "none"]
    check_fails(capsys, call, r"loss, gradient and weights must stay finite, got .* from \d \(how")
    facts = json.loads((out / "nonfinite.json").read_text())
    (tile,) = facts["tiles"]
    assert tile["file"] in "012"
    assert len(tile["offset"]) == 2
    assert len(tile["affine"]) == 2
    assert len(tile["displacement"][0]) == 3
    assert len(tile["gray_curve"][0]) > 2
    step = unpack(out / "state.safetensors", "")[1]["progress"]["step"]
    assert step == facts["step"] - 1 == len(read_log(out))


def test_weights_that_are_not_finite(discs, tmp_path):
    """After a step whose loss and gradient were: they are not saved, and the first process says."""
    settings, *sets = load_sets(config(discs, tmp_path), False, torch.device("cpu"))
    one = loop._build(*sets, Processes(), torch.device("cpu"), settings)
    drawn, *_ = one.step(1)
    one.step.parameters[0].data.fill_(math.inf)
    one.check(1, 0.5, 0.5, drawn, saved=False)
    for processes in (Processes(1, 2), Processes()):
        one.processes = processes
        with pytest.raises(FloatingPointError, match="got weights that are not at step 1 from"):
            one.check(1, 0.5, 0.5, drawn, saved=True)
        assert (tmp_path / "nonfinite.json").exists() == processes.first
    facts = json.loads((tmp_path / "nonfinite.json").read_text())
    assert facts["found"] == "weights that are not"


def test_the_first_process_alone_cuts_the_log(discs, tmp_path):
    """All go on from the same state, whose log has rows of later steps."""
    out = tmp_path / "run"
    out.mkdir()
    row = {"loss": 0.5, "learning_rate": 0.1, "gradient_norm": None, "seconds": 1}
    lines = [json.dumps(row | {"step": step}) for step in (1, 2, 3)]
    (out / "log.jsonl").write_text("\n".join(lines))
    settings, *sets = load_sets(config(discs, out), False, torch.device("cpu"))

    def build():
        return loop._build(*sets, Processes(), torch.device("cpu"), settings)

    begun = build()
    for begun.progress.step in (1, 2):
        begun.step(begun.progress.step)
    begun.save()
    for processes, steps in ((Processes(1, 2), [1, 2, 3]), (Processes(), [1, 2])):
        one = build()
        one.processes = processes
        one.resume()
        assert one.progress.step == 2
        assert [row["step"] for row in read_log(out)] == steps


def test_damaged_and_foreign_checkpoints(discs, tmp_path, capsys):
    out = tmp_path / "run"
    call = words(discs, out, steps=4, evaluate_every=2)
    assert main(call) == 0
    call.append("--resume")
    state = out / "state.safetensors"
    good = state.read_bytes()
    tensors, description = unpack(state, "")

    def refused(content, message):
        state.write_bytes(content)
        check_fails(capsys, call, message)

    refused(good[:-50], "must hold a training state, but it cannot be read")
    refused(b"", "must hold a training state, but it cannot be read")
    refused((out / "last.safetensors").read_bytes(), "must hold a training state, but has none")
    refused(pack(tensors, description | {"format": 2}), "a training state of format 1, got 2")
    fewer = {k: x for k, x in tensors.items() if "head" not in k}
    refused(pack(fewer, description), "must fit the network: Error")
    slots = {k: x for k, x in tensors.items() if not k.startswith("optimizer")}
    refused(pack(slots, description), "must fit the network: the optimiser has nothing")
    earlier = description["settings"] | {"tile": None}  # as older runs wrote the default
    refused(
        pack(tensors, description | {"settings": earlier}),
        "tile must be as it was when the run began, 388, to go on, got 16",
    )
    torch.save(tensors, state)
    check_fails(capsys, call, "must hold a training state, but it cannot be read")
    state.write_bytes(good)
    for option, value, message in (
        ("--seed", "5", "seed must be as it was when the run began, 0, to go on, got 5"),
        ("--weights.w0", "5", "weights.w0 must be as it was when the run began, 10.0, to go on"),
        ("--ema", "0.9", "ema must be as it was when the run began, None, to go on, got 0.9"),
        ("--base-channels", "8", "base_channels must be as it was"),
    ):
        at = call.index(option) if option in call else len(call)
        check_fails(capsys, [*call[:at], *call[at + 2 :], option, value], message)
    state.unlink()
    check_fails(capsys, call, "must hold state.safetensors to be resumed, but has only best")
    state.write_bytes(good)
    (discs[0] / "0.png").unlink()
    (discs[1] / "0.png").unlink()
    check_fails(capsys, call, "split.json: must list files that are there, got 0")


def test_deterministic_is_set_while_it_trains(discs, tmp_path, monkeypatch):
    seen = []
    seed_of = step.seed_of
    monkeypatch.setattr(
        step,
        "seed_of",
        lambda *key: seen.append(torch.are_deterministic_algorithms_enabled()) or seed_of(*key),
    )
    train(config(discs, tmp_path / "run", deterministic=True))
    train(config(discs, tmp_path / "other"))
    assert seen == [True] * 3 + [False] * 3
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ  # asked for on CUDA only


def test_float16_leaves_out_steps_that_overflow(discs, tmp_path):
    """A first step left out must not leave the momentum unset."""
    changes = {"precision": "float16", "steps": 4, "base_channels": 16, "depth": 3}
    for seed in (1, 4):
        train(config(discs, tmp_path / f"{seed}", seed=seed, **changes))
        assert read_log(tmp_path / f"{seed}")[0]["gradient_norm"] is None


def test_no_momentum(discs, tmp_path):
    """The optimiser then has nothing to keep."""
    changes = {"momentum": 0, "schedule": "constant", "warmup": 0, "evaluate_every": 2}
    train(config(discs, tmp_path / "whole", steps=4, **changes))
    train(config(discs, tmp_path / "broken", steps=2, **changes))
    train(config(discs, tmp_path / "broken", steps=4, resume=True, **changes))
    assert same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("writes", first("best", "state"))
def test_a_kill_between_the_files_of_a_checkpoint(discs, tmp_path, monkeypatch, writes):
    """Of the first and of the last checkpoint: the run ends up equal to an unbroken one."""
    changes = {"steps": 6, "checkpoint_every": 3, "evaluate_every": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config(discs, whole, **changes))
    name = "save_state" if writes == "state" else "save_model"
    save = getattr(run, name)
    for kill_at in (1, 2):
        count = 0

        def cut_off(*args, kill_at=kill_at):
            nonlocal count
            count += 1
            if count == kill_at:
                raise OSError("the power is gone")
            save(*args)

        monkeypatch.setattr(run, name, cut_off)
        with pytest.raises(OSError, match="the power is gone"):
            train(config(discs, broken, resume=True, **changes))
        monkeypatch.undo()
        train(config(discs, broken, resume=True, **changes))
        assert same(whole, broken)
        shutil.rmtree(broken)


def test_a_gradient_that_is_not_finite_is_not_applied(discs, tmp_path, monkeypatch):
    """It ends the run before anything is saved; the checkpoint before is whole."""
    out = tmp_path / "run"
    total = torch.nn.utils.get_total_norm
    norms = iter([False, False, True])
    monkeypatch.setattr(
        torch.nn.utils,
        "get_total_norm",
        lambda g: total(g) * (float("inf") if next(norms) else 1),
    )
    with pytest.raises(FloatingPointError, match=r"got loss \S+, gradient norm inf at step 3"):
        train(config(discs, out, steps=5, checkpoint_every=1))
    assert unpack(out / "state.safetensors", "")[1]["progress"]["step"] == 2
    monkeypatch.undo()
    train(config(discs, out, steps=5, checkpoint_every=1, resume=True))


def test_an_evaluation_that_fails_loses_no_step(discs, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def fail(*args):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(run, "look", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(config(discs, out, steps=4, evaluate_every=2))
    monkeypatch.undo()
    assert unpack(out / "state.safetensors", "")[1]["progress"]["step"] == 2
    monkeypatch.setattr(run, "look", fail)  # the last one is repeated: nothing is saved
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(config(discs, out, steps=4, evaluate_every=4, resume=True))
    monkeypatch.undo()
    assert unpack(out / "state.safetensors", "")[1]["progress"]["step"] == 2
    train(config(discs, out, steps=4, evaluate_every=2, resume=True))
    assert [row["step"] for row in read_log(out)][-2:] == [3, 4]


def test_a_second_signal_ends_a_run_at_once():
    """The first one is noted; in other threads than the main one none arrives."""
    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(s) for s in signals]
    with interruption() as came:
        assert not came()
        signal.raise_signal(signal.SIGTERM)
        assert came()
        with pytest.raises(KeyboardInterrupt, match="stopped at once; go on from the last check"):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in signals] == before

    def elsewhere():
        with interruption() as came:
            return came(), [signal.getsignal(s) for s in signals]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result() == (False, before)
