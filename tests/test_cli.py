"""What the commands say: help, version, what is missing, completion."""

import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch

from unet_fast._progress import counted
from unet_fast.cli import app, info, main
from unet_fast.cli.entry import example_of
from unet_fast.training.config import FITTED, TrainConfig
from unet_fast.training.suggest import fitting

COMMANDS = "augment", "check", "demo", "evaluate", "export", "info", "nnunet", "predict", "train"
COMMANDS += ("weights",)


def test_all_commands_are_tested():
    assert {name for name in app if not name.startswith("-")} == {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(capsys, command):
    """Has an example that can be typed, and only options that the command takes."""
    assert main([command, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    example = next(line for line in lines if line.startswith(f"unet-fast {command}"))
    assert example == example_of(command)
    app.parse_args(shlex.split(example)[1:], exit_on_error=False, print_error=False)
    assert ("--config PATH" in " ".join(lines)) == (command == "train")
    assert "None:" not in " ".join(lines) or command == "train"


def test_help_shows_what_train_takes(capsys):
    """Not the defaults of TrainConfig, where the suggested settings take their place."""
    assert main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = {part.split()[0]: part for part in said.split(" --")}
    shown = {name for name, text in options.items() if "[default: suggested]" in text}
    assert shown == {name.replace("_", "-") for name in FITTED} | {"preset"}
    assert fitting([(60, 60)], 9.0, "cpu").keys() == {*FITTED}
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adam, adamw, got 'x'"):
        TrainConfig("a", "b", out="c", optimizer="x")


def test_help_of_all(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "unet-fast train images labels --out run" in said
    assert "--config" not in said
    assert "--max-pixels N" in said


def test_empty_words_are_no_folders(capsys):
    for words in (["train", "a", "b", "--out", ""], ["train", "", "b", "--out", "c"]):
        assert main(words) == 2
        assert "must be a file or a folder, got an empty word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train a b --out c --steps 1.5", "--steps must be a whole number, got 1.5"),
        ("train a b --out c --weights.ignore-label .5", "--weights.ignore-label must be a whole"),
        ("augment a b --out c --samples 2.0", "--samples must be a whole number, got 2.0"),
        (
            "train a b --out c --augmentation.scale 0.8",
            "train: --augmentation.scale must be follow",
        ),
        ("check a b --axes XY", "axes must have Y (rows) before X (columns), got 'XY'"),
        ("check a b c", "check: arguments must be as in unet-fast check images labels, got too m"),
    ],
)
def test_words_that_are_no_arguments(capsys, words, message):
    assert main(words.split()) == 2
    assert f"unet-fast: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(capsys, option):
    assert main([option]) == 0
    assert capsys.readouterr().out == f"{version('unet_fast')}\n"


@pytest.mark.parametrize("module", ["unet_fast", "unet_fast.cli"])
def test_as_a_module(module):
    command = [sys.executable, "-m", module, "-V"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        == f"{version('unet_fast')}\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "train: images must be given: unet-fast train images labels --out run"),
        ("train a", "train: labels must be given: unet-fast train images labels --out run"),
        ("train a b", "train: --out must be given: unet-fast train images labels --out run"),
        ("train a b --out c --steps", "train: --steps must be followed by its value"),
        ("check", "check: images must be given: unet-fast check images labels"),
        ("predict", "predict: run must be given: unet-fast predict run new_images --out results"),
        (
            "predict run --out out",
            "predict: images must be given: unet-fast predict run new_images --out results",
        ),
        ("predict run a --config b", "--config must go with train, got predict"),
        ("train a b --out c --config d", "d: no such file"),
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
    ],
)
def test_what_is_missing(capsys, words, said):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"unet-fast: {said}")


def test_completion(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--install-completion", "--shell", "bash"]) == 0
    script = tmp_path / ".local/share/bash-completion/completions/unet-fast"
    assert str(script) in capsys.readouterr().out
    assert "--seed-threshold" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_counts():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]


def test_a_command_in_a_thread(capsys):
    """Only the main thread gets signals: there is none to listen for."""
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["--version"]).result() == 0
    assert capsys.readouterr().out == f"{version('unet_fast')}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_info_tries_each_operator(capsys, monkeypatch):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for op in ("weighted_ce", "border_weight_map", "elastic_deform"):
        assert f"{op:<20} as the reference, on cpu" in said
    monkeypatch.setattr(info.ops, "weighted_ce", lambda *inputs: torch.tensor(float("nan")))
    monkeypatch.setattr(info.ops, "elastic_deform", lambda *inputs: inputs[0] + 0.5)

    def fails(*inputs):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(info.ops, "border_weight_map", fails)
    monkeypatch.setitem(info.EXTRAS, "zarr", ("zarr", "no_such_module"))
    assert main(["info"]) == 1
    said = capsys.readouterr().out
    assert "weighted_ce          differs by nan, on cpu" in said
    assert "border_weight_map    fails: no kernel image, on cpu" in said
    assert "elastic_deform       differs by " in said
    assert "zarr                 missing: pip install 'unet_fast[zarr]'" in said
