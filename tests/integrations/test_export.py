"""Exported networks: in other runtimes they give what `predict` gives."""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import needs
from test_pytorch_unet import Theirs
from torch import nn

from unet_fast import TrainConfig, UNet, demo, load_model, predict, save_model, train
from unet_fast.cli import main
from unet_fast.integrations import onnx
from unet_fast.integrations.bioimageio import export_bioimageio
from unet_fast.integrations.onnx import export_onnx
from unet_fast.objects import ObjectRule
from unet_fast.training.samples import load_samples

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "onnx_tiles.py"


@pytest.fixture
def tiles():
    """The example, as a module."""
    needs("onnxruntime")
    needs("onnxscript")
    spec = importlib.util.spec_from_file_location("onnx_tiles", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(**options):
    """A narrow network in which nothing is as it starts."""
    model = UNet(**{"base_channels": 3, "depth": 2, "num_classes": 3} | options).eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for x in (layer.weight, layer.running_var):
                x.data.uniform_(0.5, 2)
            for x in (layer.bias, layer.running_mean):
                x.data.normal_(0, 0.2)
    model.normalisation = "percentile"
    return model


NETWORKS = {
    "valid": {},
    "same": {"padding": "same", "norm": "batch", "bottleneck_norm": "batch", "in_channels": 2},
    "bilinear": {"upsampling": "bilinear", "norm": "batch_renorm"},
    "2015": {"upsampling": "release_2015", "poolings": ((1, 2), (3, 2)), "padding": "same"},
    "volumes": {"dims": 3, "depth": 1, "widening": "before_pooling", "norm": "batch"},
    "flat": {"dims": 3, "depth": 1, "poolings": ((1, 2, 2),), "padding": "same"},
    "group": {"padding": "same", "norm": "group"},
}
THOROUGH = functools.partial(pytest.param, marks=pytest.mark.thorough)
SIDES = {2: ((57, 90), (3, 140)), 3: ((9, 31, 26), (40, 2, 3))}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_example_gives_what_predict_gives(tiles, tmp_path, rng, name):
    model = network(**NETWORKS[name])
    export_onnx(model, tmp_path / "out")
    loaded, about = tiles.load(tmp_path / "out")
    assert about["tiles"] == (name != "group")
    for sides in SIDES[model.dims]:
        image = rng.integers(20, 999, (model.config["in_channels"], *sides)).astype(np.uint16)
        if name == "2015":  # few bright pixels, which percentiles do not see
            image[0] = rng.normal(size=sides) > 3
        expected = predict(model, image)
        for tile in (16, 512):
            found = tiles.predict(loaded, about, image, tile)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["valid", "same", "volumes", *map(THOROUGH, ["bilinear", "2015", "flat"])]
)
def test_tiles_equal_the_whole_bit_for_bit(tiles, tmp_path, rng, name):
    """All sums of small integers are exact, in whatever order."""
    options = NETWORKS[name] | {"norm": None, "bottleneck_norm": None, "in_channels": 1}
    model = UNet(**{"base_channels": 4, "depth": 2} | options)
    for x in model.parameters():  # few weights are not 0, so that sums stay small
        few = torch.rand(x.shape) < 3 * len(x) / x.numel()
        x.data = few * torch.where(torch.rand(x.shape) < 0.2, -1.0, 1.0)
    model.head.weight.data /= 2**12  # keeps softmax from its ends
    export_onnx(model, tmp_path / "out")
    loaded, about = tiles.load(tmp_path / "out")
    for sides in SIDES[model.dims]:
        image = rng.integers(0, 4, (1, *sides)).astype(np.float32)
        whole = tiles.predict(loaded, about, image)
        assert len(np.unique(whole)) > 2
        for tile in (8, 16):
            assert (tiles.predict(loaded, about, image, tile) == whole).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a whole demo, where `UNET_FAST_DEMO` names its folder; else one of fewer steps."""
    if "UNET_FAST_DEMO" in os.environ:
        return Path(os.environ["UNET_FAST_DEMO"]).resolve() / "model"
    out, seen = tmp_path_factory.mktemp("run"), demo.SAMPLE / "train"
    settings = {"base_channels": 8, "depth": 2, "tile": 100, "steps": 200, "previews": 0}
    train(TrainConfig(seen / "images", seen / "labels", out=out, device="cpu", **settings))
    return out


def test_the_demo_finds_the_same_objects(tiles, run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["export", str(run), "--to", "onnx", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"network: {out / 'model.onnx'}\n")
    (network, about), model, objects = tiles.load(out), load_model(run), 0
    rule = ObjectRule(**about["objects"])
    assert rule == model.objects
    for sample in load_samples(*(demo.SAMPLE / "test" / kind for kind in ("images", "labels"))):
        probabilities = torch.from_numpy(tiles.predict(network, about, sample.image, 64))
        states = rule.states(1 - probabilities[0], probabilities.argmax(0) != 0).numpy()
        expected = predict(model, sample.image, output="instances")
        np.testing.assert_array_equal(rule.of(states), expected)
        objects += expected.max()
    assert objects > 50


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    needs("onnxscript")
    out = tmp_path_factory.mktemp("exported") / "out"
    export_onnx(network(num_classes=2), out, spacing=(0.5, 0.25))
    return out


def test_the_description(exported):
    about = json.loads((exported / "model.json").read_text())
    assert about["format"] == 1
    assert (about["classes"], about["spacing"]) == ([0, 1], [0.5, 0.25])
    assert (about["percentiles"], about["alignment"], about["border"]) == (
        [1, 99.8],
        [4, 4],
        [20, 20],
    )
    content = (exported / "model.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert str(ROOT).encode() not in content
    assert {path.name for path in exported.iterdir()} == {"model.onnx", "model.json"}


def test_the_example_runs(exported, tmp_path, rng):
    needs("onnxruntime")
    image = rng.random((1, 30, 40)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    command = [sys.executable, EXAMPLE, exported, tmp_path / "image.npy", tmp_path / "out.npy"]
    subprocess.run(command, check=True)
    assert np.load(tmp_path / "out.npy").shape == (2, 30, 40)


def test_images_in_a_batch(tiles, exported):
    loaded, _ = tiles.load(exported)
    images = np.random.default_rng(0).random((3, 1, 60, 72)).astype(np.float32)
    together = loaded.run(None, {"image": images})[0]
    one_by_one = [loaded.run(None, {"image": image[None]})[0][0] for image in images]
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-6)
    assert together.shape == (3, 2, 20, 32)


def test_a_model_is_left_as_it_was(tmp_path):
    needs("onnxscript")
    model = UNet(base_channels=2, depth=1).train()
    export_onnx(model, tmp_path / "out")
    assert model.training


def test_spacing_is_that_of_training(tmp_path):
    needs("onnxscript")
    save_model(UNet(base_channels=2, depth=1, dims=3), tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text("voxel_size = [2.0, 0.5, 0.5]\n")
    assert main(f"export {tmp_path / 'run'} --to onnx --out {tmp_path / 'out'}".split()) == 0
    assert json.loads((tmp_path / "out" / "model.json").read_text())["spacing"] == [2, 0.5, 0.5]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model.json", (b'"format": 1', b'"format": 2'), "model.json must be of format 1, got 2"),
        ("model.json", (b"{", b""), "Expecting|Extra data"),
        ("model.onnx", (b"Softmax", b"Hardmax"), "model.onnx must be the file that was exported"),
        ("model.onnx", None, "No such file"),
    ],
)
def test_the_example_refuses_in_one_line(exported, tmp_path, file, change, said):
    needs("onnxruntime")
    for path in exported.iterdir():
        if path.name != file or change:
            old, new = change if path.name == file else (b"", b"")
            (tmp_path / path.name).write_bytes(path.read_bytes().replace(old, new, 1))
    np.save(tmp_path / "image.npy", np.zeros((1, 9, 9)))
    command = [sys.executable, EXAMPLE, tmp_path, tmp_path / "image.npy", tmp_path / "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(f"onnx_tiles.py: .*({said})", done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{none} --to onnx --out {out}", "{none}: must hold a model, but has no"),
        ("{run} --to onnx --out {run}", "out must be a new folder, got {run}"),
        ("{run} --to onnx --out {out} --opset 9", "export: opset must be in [18, 23], got 9"),
        (
            "{run} --to onnx --out {out} --spacing 1",
            "export: spacing must be 2 sizes > 0, got [1.0",
        ),
        ("{run} --to onnx --out {out} --author A", "export: --author must go with --to bioimageio"),
        ("{run} --to bioimageio --out {out} --author A", "export: --license must be given with"),
        (
            "{run} --to bioimageio --out {out} --author A --license mine",
            "export: license must be an SPDX identifier, as CC-BY-4.0, got mine",
        ),
        (
            "{run} --to bioimageio --out {out} --author A B/C --license MIT",
            "export: author must be a name without slashes, got B/C",
        ),
        (
            "{run} --to bioimageio --out {out} --author A --license MIT --name x/y",
            "export: name must be of 5 to 128 letters, digits, spaces and _+-(), got x/y",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(run, tmp_path, capsys, words, said):
    needs("onnxscript")
    if "bioimageio" in words:
        needs("bioimageio.spec")
    places = {"run": run, "none": tmp_path / "none", "out": tmp_path / "out"}
    assert main(["export", *words.format(**places).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unet-fast: {said.format(**places)}")
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "bioimageio"])
def test_a_missing_package_is_named(run, tmp_path, capsys, monkeypatch, to):
    for name in ("onnx", "bioimageio.spec"):
        monkeypatch.setitem(sys.modules, name, None)
    options = {"onnx": "", "bioimageio": " --author A --license MIT"}[to]
    assert main(f"export {run} --to {to} --out {tmp_path / 'out'}{options}".split()) == 2
    said = capsys.readouterr().err
    assert said.endswith(f" must be installed (pip install 'unet_fast[{to}]')\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "onnx_bytes", stops)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(load_model(run), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("name", ["same", "volumes", *map(THOROUGH, ["valid", "group"])])
def test_packages_of_bioimageio(tmp_path, name, rng):
    core, spec = needs("bioimageio.core"), needs("bioimageio.spec")
    model = network(**NETWORKS[name])
    export_bioimageio(
        model, tmp_path / "out", name="Nuclei of a test", authors=["A", "B"], license="CC0-1.0"
    )
    file = tmp_path / "out" / "bioimageio.zip"
    tested = core.test_model(file)
    assert tested.status == "passed", tested.display()
    with zipfile.ZipFile(file) as files:
        network_of_torch = files.read("model.pt")
    assert str(ROOT).encode() not in network_of_torch
    described = spec.load_description(file, perform_io_checks=True)
    assert described.cite[0].doi == "10.1007/978-3-319-24574-4_28"
    assert described.config.unet_fast["alignment"] == [*model.alignment]
    if name == "same":  # whole images, in blocks
        image = rng.integers(20, 999, (2, 120, 104)).astype(np.float32)
        sample = core.digest_spec.create_sample_for_model(described, inputs={"image": image[None]})
        with core.create_prediction_pipeline(described) as pipeline:
            found = pipeline.predict_sample_with_blocking(sample, ns=1)
        found = found.members["probabilities"].data.to_numpy()[0]
        np.testing.assert_allclose(found, predict(model, image), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the packages
def test_code_of_the_page_runs(run, tmp_path, monkeypatch):
    for name in ("onnxscript", "onnxruntime", "bioimageio.spec"):
        needs(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "examples").mkdir()
    for place in (tmp_path, tmp_path / "examples"):
        shutil.copy(EXAMPLE, place)
    shutil.copytree(run, "run")
    np.save("image.npy", np.random.default_rng(0).random((1, 70, 50)))
    torch.save(Theirs().state_dict(), "checkpoint.pth")
    page, names = (ROOT / "docs" / "export.md").read_text(), {}
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "export.md", "exec"), names)
        for program, *words in map(shlex.split, code.splitlines() if language == "bash" else ()):
            if program == "unet-fast":
                assert main(words) == 0
            elif program == "python":
                subprocess.run([sys.executable, *words], check=True)
    assert np.load("probabilities.npy").shape == (2, 70, 50)
    assert names["objects"].shape == (300, 500)
    assert len(blocks) == 5
