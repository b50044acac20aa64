import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image

from unet_fast import UNet, demo, load_model, plots
from unet_fast.cli import main
from unet_fast.images.pairing import Reading
from unet_fast.training.checkpoint import read_log
from unet_fast.training.samples import load_samples


def test_sample():
    parts = {
        part: load_samples(demo.SAMPLES[2] / part / "images", demo.SAMPLES[2] / part / "labels")
        for part in ("train", "test")
    }
    names = {part: {s.name for s in samples} for part, samples in parts.items()}
    assert (len(names["train"]), len(names["test"])) == (27, 9)
    assert not names["train"] & names["test"]
    assert sum(f.stat().st_size for f in demo.SAMPLES[2].rglob("*.*")) < 2_000_000
    readme = (demo.SAMPLES[2] / "README.md").read_text()
    assert "CC0" in readme


def test_demo_of_a_volume(tmp_path, monkeypatch, capsys):
    """The same on a volume of which some planes are annotated."""
    small = {"steps": 2, "base_channels": 2, "depth": 1, "tile": (8, 16, 16)}
    monkeypatch.setitem(demo.SETTINGS, 3, demo.SETTINGS[3] | small)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--dims", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ovule +[01]\.\d{3} .* 17$", printed, re.MULTILINE)
    picture = np.asarray(Image.open(tmp_path / "unet_fast_demo_3d" / "demo.png"))
    assert picture.shape[0] > 500
    sample = demo.SAMPLES[3]
    assert sum(f.stat().st_size for f in sample.rglob("*.tif")) < 1_000_000
    assert "Copyright (c) 2019 Heidelberg Collaboratory" in (sample / "README.md").read_text()
    labels = load_samples(
        sample / "train" / "images", sample / "train" / "labels", reading=Reading(dims=3)
    )[0].labels
    assert 0.2 < (labels > 0).mean() < 0.25


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    """The whole demo with a network too small to learn; CI runs it at full length."""
    few = tmp_path / "sample"
    for kind in ("images", "labels"):
        (few / "train" / kind).mkdir(parents=True)
        for file in sorted((demo.SAMPLES[2] / "train" / kind).iterdir())[:3]:
            (few / "train" / kind / file.name).symlink_to(file)
    (few / "test").symlink_to(demo.SAMPLES[2] / "test")
    monkeypatch.setitem(demo.SAMPLES, 2, few)
    monkeypatch.setitem(demo.SETTINGS, 2, {"steps": 2, "base_channels": 2, "tile": 20})
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    scores = r" +[01]\.\d{3} +[01]\.\d{3} +[01]\.\d{3} +\d+ +(\d+)$"
    rows = re.findall(r"^\d{3}_\w{12}" + scores, printed, re.MULTILINE)
    assert len(rows) == 9
    (total,) = re.findall("^all" + scores, printed, re.MULTILINE)
    assert sum(map(int, rows)) == int(total)
    picture = np.asarray(Image.open(out / "demo.png"))
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    assert isinstance(load_model(out / "model"), UNet)

    # Without the picture it was stopped, and goes on.
    (out / "demo.png").unlink()
    monkeypatch.setitem(demo.SETTINGS, 2, {"steps": 3, "base_channels": 2, "tile": 20})
    capsys.readouterr()
    assert main(["demo", "--out", str(out)]) == 0
    said = f"demo: goes on where it was stopped, in {out / 'model'}\n"
    assert capsys.readouterr().err.startswith(said)
    assert [row["step"] for row in read_log(out / "model")] == [1, 2, 3]
    assert tomllib.loads((out / "model" / "config.toml").read_text())["steps"] == 3

    # A whole one is replaced.
    def stop(config):
        left = {file.name for file in config.out.iterdir()}
        raise ValueError(f"left: {sorted(left & {'config.toml', 'state.safetensors'})}")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", stop)
        model = {file: file.read_bytes() for file in (out / "model").iterdir() if file.is_file()}
        capsys.readouterr()
        assert main(["demo", "--out", str(out)]) == 2
        assert capsys.readouterr().err == "unet-fast: left: []\n"
        for file, content in model.items():
            file.write_bytes(content)

    # The settings of another run: the model is somebody's.
    settings = out / "model" / "config.toml"
    settings.write_text(settings.read_text().replace(str(few / "train"), "/mine"))
    capsys.readouterr()
    assert main(["demo", "--out", str(out)]) == 2
    assert "must not hold a model of yours" in capsys.readouterr().err
    assert (out / "model" / "last.safetensors").exists()

    blocked = tmp_path / "file"
    blocked.write_text("")
    capsys.readouterr()
    assert main(["demo", "--out", str(blocked)]) == 2
    assert "must be a folder that can be written" in capsys.readouterr().err


def test_colours():
    truth = np.array([[0, 0, 4, 4]])
    prediction = np.array([[0, 1, 0, 1]])
    errors = plots.error_colours(truth, prediction)
    assert tuple(errors[0, 0]) == (0, 0, 0)
    expected = (plots.FALSE_POSITIVE, plots.MISSED, plots.HIT)
    np.testing.assert_array_equal(errors[0, 1:], expected)
    colours = plots.instance_colours(np.array([[0, 1, 2, 1]]))
    assert (colours[0, 0] == 0).all()
    np.testing.assert_array_equal(colours[0, 1], colours[0, 3])
    assert np.abs(colours[0, 1] - colours[0, 2]).max() > 0.3
    edges = plots.outlines(np.array([[1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 0, 0]]))
    assert edges.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]]


def test_imports_from_the_root_of_a_clone():
    """Where the source folder hides the installed package, the compiled parts are still found."""
    root = Path(__file__).parent.parent
    code = "import unet_fast; print(unet_fast.build_info()['min_torch'])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "2.10"
