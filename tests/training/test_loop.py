import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from budget import first
from conftest import usable_device
from PIL import Image
from runs import config, discs_in, options

from unet_fast import (
    Augmentation,
    BorderWeights,
    UNet,
    load_model,
    metrics,
    predict,
    save_model,
    train,
)
from unet_fast.cli import app, main
from unet_fast.images import files
from unet_fast.training import loop
from unet_fast.training.config import as_toml
from unet_fast.training.previews import Scalars
from unet_fast.training.processes import Processes
from unet_fast.training.samples import NumberedLabels, Sample, load_samples, number_objects
from unet_fast.training.tiles import Dataset, load_sets
from unet_fast.training.validation import Judge, look


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs")


@pytest.mark.parametrize("padding", first("valid", "same"))
def test_learns_discs(discs, tmp_path, padding):
    """From files to a network that finds unseen discs."""
    # Narrower networks or larger rates die from some seeds: all their ReLUs end at 0.
    changes = {"steps": 150, "momentum": 0.9, "learning_rate": 0.02, "base_channels": 8, "seed": 2}
    changes["padding"] = padding
    model = train(config(discs, tmp_path / "run", **changes))
    assert not model.training
    images, labels = discs_in(tmp_path / "unseen", size=70)
    scores = []
    for sample in load_samples(images, labels):
        result = predict(load_model(tmp_path / "run"), sample.image, output="labels")
        assert np.array_equal(result, predict(model, sample.image, output="labels"))
        scores.append(metrics.iou(sample.labels, result))
    assert np.mean(scores) > 0.8

    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 151))
    assert np.mean([row["loss"] for row in log[-20:]]) < 0.5 * log[0]["loss"]
    rates = [row["learning_rate"] for row in log]
    assert max(rates) == pytest.approx(0.02)
    assert rates[0] < rates[10]
    assert rates[-1] < 0.0001


def test_same_seed_same_network(discs, tmp_path):
    state = torch.get_rng_state()
    one = train(config(discs, tmp_path / "one", batch_size=2)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is left alone
    two = train(config(discs, tmp_path / "two", batch_size=2)).state_dict()
    other = train(config(discs, tmp_path / "other", batch_size=2, seed=1)).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


STILL = Augmentation(sigma=0, rotation=0, gray_slope=(1, 1), gray_black=(0, 0), gray_white=(1, 1))


def ramp_set(height, width):
    """One image whose labels number its pixels."""
    labels = np.arange(height * width, dtype=np.int32).reshape(height, width)
    sample = Sample("a", labels[None].astype(np.float32), labels)
    objects = NumberedLabels([labels], None, None)
    result = Dataset([sample], objects, BorderWeights(), torch.device("cpu"), math.inf)
    ids = torch.from_numpy(labels)[None]
    result.stacks = [(ids[:, None].double(), ids)]  # not normalised
    return result


def test_tiles_lie_inside_the_image_and_keep_labels_in_place():
    """Without deformation a tile is a cut-out; its labels belong to its centre."""
    shapes = (40, 40), (24, 24)
    large = ramp_set(30, 44)
    corners = set()
    for step in range(1, 101):
        drawn = large.draw(STILL, 1, *shapes, seed=0, step=step)
        tile, moved = large.cut(STILL, drawn, *shapes)
        assert tile.shape[2:] == (40, 40)
        assert moved.shape[1:] == (24, 24)
        assert torch.equal(tile[0, 0, 8:32, 8:32], moved[0].double())
        assert (moved.diff(dim=2) == 1).all()  # nothing mirrored
        corners.add(divmod(int(moved[0, 0, 0]), 44))
    assert {r for r, _ in corners} == set(range(7))
    assert {0, 20} <= {c for _, c in corners} <= set(range(21))
    small = ramp_set(10, 10)
    drawn = small.draw(STILL, 1, *shapes, seed=0, step=1)
    _, moved = small.cut(STILL, drawn, *shapes)
    assert set(moved.unique().tolist()) == set(range(100))


def test_a_large_batch_holds_the_tiles_of_small_ones():
    """Every pass takes each file once; what a step draws depends on seed and step alone."""
    samples = [
        Sample(str(i), np.zeros((1, 20 + i, 30), np.float32), np.zeros((20 + i, 30), np.int32))
        for i in range(5)
    ]
    objects = NumberedLabels([s.labels for s in samples], None, None)
    files = Dataset(samples, objects, BorderWeights(), torch.device("cpu"), math.inf)
    shapes = (28, 28), (12, 12)
    augmentation = Augmentation()
    drawn = [files.draw(augmentation, 2, *shapes, seed=3, step=s) for s in range(1, 11)]
    order = [i for tiles in drawn for i in tiles.files]
    assert all(sorted(order[p : p + 5]) == list(range(5)) for p in range(0, 20, 5))
    assert order[:5] != order[5:10] or order[5:10] != order[10:15]
    again = files.draw(augmentation, 2, *shapes, seed=3, step=7)
    assert torch.equal(again.parameters.affine, drawn[6].parameters.affine)
    assert torch.equal(again.offset, drawn[6].offset)
    other = files.draw(augmentation, 2, *shapes, seed=4, step=7)
    assert not torch.equal(again.parameters.affine, other.parameters.affine)
    both, _ = files.cut(augmentation, again, *shapes)
    second, _ = files.cut(augmentation, again[1:], *shapes)
    assert torch.equal(both[1:], second)


def test_saved_models(tmp_path):
    model = UNet(2, 3, base_channels=2, depth=1, padding="same", norm="batch")
    model.normalisation = "percentile"
    model.class_values = [0, 7, 255]
    save_model(model, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    file = tmp_path / "sub" / "own.safetensors"
    save_model(model, file)
    assert file.read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    x = torch.randn(1, 2, 8, 8)
    for path in (tmp_path, file, str(file)):
        loaded = load_model(path)
        assert loaded.config == model.config
        assert loaded.normalisation == "percentile"
        assert loaded.class_values == [0, 7, 255]
        assert not loaded.training
        assert torch.equal(loaded(x), model.eval()(x))


def test_refuses_foreign_models(tmp_path):
    """One line each; what is loaded is never unpickled."""
    model = UNet(base_channels=1, depth=1)
    save_model(model, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    torch.save(model.state_dict(), tmp_path / "pickle.safetensors")
    cut, bare, newer, other = (tmp_path / f"{n}.safetensors" for n in ("cut", "bare", "new", "odd"))
    cut.write_bytes(good[:-100])
    safetensors.torch.save_file(model.state_dict(), bare)
    newer.write_bytes(good.replace(b'\\"format\\": 1', b'\\"format\\": 2'))
    other.write_bytes(good.replace(b'\\"base_channels\\": 1', b'\\"base_channels\\": 2'))
    model.head.bias.data[0] = math.nan
    save_model(model, tmp_path / "nan.safetensors")
    for path, message in (
        (tmp_path / "pickle.safetensors", "cannot be read"),
        (cut, "cannot be read"),
        (bare, "has no description"),
        (newer, "a model of format 1, got 2"),
        (other, "cannot be read: Error"),
        (tmp_path / "nan.safetensors", "must be finite, got NaN or infinity in head.bias"),
        (tmp_path / "none.safetensors", "has no best.safetensors"),
        (tmp_path, "has no best.safetensors, last.safetensors or model.safetensors"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load_model(path)
        assert "\n" not in str(error.value)


def test_settings_reach_the_loss(discs, tmp_path):
    plain = train(config(discs, tmp_path / "a", weights=BorderWeights(w0=0)))
    bordered = train(config(discs, tmp_path / "b", weights=BorderWeights(w0=50)))
    assert not torch.equal(plain.head.weight, bordered.head.weight)


def test_stops_early(discs, tmp_path):
    """A learning rate of nearly nothing: no evaluation is better than the first."""
    changes = {"steps": 50, "evaluate_every": 2, "patience": 3, "learning_rate": 1e-30}
    train(config(discs, tmp_path / "run", **changes))
    assert [row["step"] for row in data_rows(tmp_path)] == list(range(1, 9))
    train(config(discs, tmp_path / "run", resume=True, **changes))
    assert len(data_rows(tmp_path)) == 8


def data_rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("by", "best"),
    [("auto", max), ("pq", max), ("mean_iou", max), ("iou", max), ("seg", max), ("loss", min)],
)
def test_best_and_last_models(discs, tmp_path, by, best):
    """The best evaluation's model is kept, by whatever is asked for, and the last."""
    changes = {"steps": 8, "evaluate_every": 2, "learning_rate": 0.05, "momentum": 0.5}
    changes |= {"precision": "float32", "best_by": by, "schedule": "constant"}
    model = train(config(discs, tmp_path / "run", **changes))
    scores = [row["validation"] for row in data_rows(tmp_path) if "validation" in row]
    (name,) = json.loads((tmp_path / "run" / "split.json").read_text())["validation"]
    kept = [s for s in load_samples(*discs) if s.name == name]
    files = Dataset(
        kept,
        number_objects(kept, "instances", None),
        BorderWeights(),
        torch.device("cpu"),
        math.inf,
    )

    def scores_of(model):
        looks = [look(model, files, i, "weighted_mean") for i in range(len(files))]
        return Judge(by, True, files, 1, Processes()).scores(looks, model.objects)

    found = scores_of(load_model(tmp_path / "run"))
    by = "pq" if by == "auto" else by
    wanted = best(s[by] for s in scores)
    if by != "loss":  # whose class weights are those of the training images
        assert found[by] == pytest.approx(wanted)
    last = load_model(tmp_path / "run" / "last.safetensors")
    found = scores_of(last)
    assert found["iou"] == pytest.approx(scores[-1]["iou"])
    same = torch.equal(last.head.bias, model.head.bias)
    assert same == ([s[by] for s in scores].index(wanted) == len(scores) - 1)  # the first of equals


def test_the_mean_of_the_weights_is_the_model(discs, tmp_path):
    """ema 0.5 over two steps: the first is taken as it is, the second counts half."""
    changes = {"validation": 0, "evaluate_every": 1, "dropout": 0, "schedule": "constant"}
    changes |= {"clip_gradient": None}
    changes |= {"warmup": 0, "precision": "float32"}
    one, two = (
        train(config(discs, tmp_path / f"{n}", steps=n, **changes)).state_dict() for n in (1, 2)
    )
    mean = train(config(discs, tmp_path / "mean", steps=2, ema=0.5, **changes)).state_dict()
    for name, x in mean.items():
        torch.testing.assert_close(x, 0.5 * (one[name] + two[name]))


def test_the_mean_counts_the_batches_of_batch_norm(discs, tmp_path):
    """A number of batches has no mean: that of the last step is taken."""
    settings = config(discs, tmp_path / "run", ema=0.5, norm="batch")
    settings, *sets = load_sets(settings, False, torch.device("cpu"))
    step = loop._build(*sets, Processes(), torch.device("cpu"), settings).step
    for number in (1, 2):
        step(number)
    state = step.saved_model.state_dict()
    assert step.saved_model is not step.model
    counts = {int(x) for name, x in state.items() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_clips_the_gradient(discs, tmp_path):
    changes = {"steps": 1, "warmup": 0, "dropout": 0, "precision": "float32", "validation": 0}
    changes |= {"learning_rate": 1.0, "momentum": 0.0}
    torch.manual_seed(0)
    start = UNet(base_channels=4, depth=2, dropout=0).state_dict()
    moved = train(config(discs, tmp_path / "run", clip_gradient=0.01, **changes)).state_dict()
    norm = math.sqrt(sum(float((moved[k] - x).square().sum()) for k, x in start.items()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert data_rows(tmp_path)[0]["gradient_norm"] > 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_schedule(discs, tmp_path, optimizer):
    settings = config(discs, tmp_path, steps=100, optimizer=optimizer)
    peak = {"sgd": 2e-3, "adam": 1e-3, "adamw": 1e-3}[optimizer]
    rates = [settings.rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(peak / 10)
    assert max(rates) == rates[9] == peak
    assert rates[55] == pytest.approx(peak / 2, rel=0.05)
    assert 0 < rates[99] < peak / 100
    constant = config(discs, tmp_path, steps=100, schedule="constant", warmup=0, learning_rate=1)
    assert {constant.rate(step) for step in range(1, 101)} == {1}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiled_network(discs, tmp_path):
    changes = {"steps": 2, "precision": "float32", "dropout": 0, "depth": 1, "tile": 16}
    plain = train(config(discs, tmp_path / "a", **changes)).state_dict()
    compiled = train(config(discs, tmp_path / "b", compile=True, **changes)).state_dict()
    for name, x in plain.items():
        torch.testing.assert_close(compiled[name], x, rtol=1e-4, atol=1e-6)


def test_tensorboard(discs, tmp_path, monkeypatch, capsys):
    train(config(discs, tmp_path / "run", tensorboard=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [e.value for e in events.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in data_rows(tmp_path)])
    assert [e.step for e in events.Scalars("validation/iou")] == [3]

    scalars = Scalars(tmp_path / "other", 0)
    row = {"step": 1, "loss": 0.5, "learning_rate": 0.1, "gradient_norm": None}
    scalars.add(row | {"validation": {"pq": None, "iou": 0.25}})
    scalars.close()
    events = EventAccumulator(str(tmp_path / "other" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate", "validation/iou"}

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    call = [*arguments(discs, tmp_path / "other"), "--tensorboard"]
    capsys.readouterr()  # where it takes long, training says how far it is
    check_fails(
        capsys, call, "tensorboard must be installed (pip install 'unet_fast[tensorboard]')"
    )


def test_pictures_of_a_run(discs, tmp_path):
    train(config(discs, tmp_path / "run", steps=4, evaluate_every=2, previews=2))
    pictures = sorted((tmp_path / "run" / "previews").iterdir())
    assert [f.name for f in pictures] == ["step_000002.png", "step_000004.png", "tiles.png"]
    for file in (*pictures, tmp_path / "run" / "curves.png"):
        assert np.asarray(Image.open(file)).std() > 10


def test_on_cuda(tmp_path, discs):
    """The same run streamed, deterministic and as a CUDA graph."""
    usable_device("cuda")
    changes = {"steps": 8, "device": "cuda", "precision": "float32", "dropout": 0, "momentum": 0.9}
    plain = train(config(discs, tmp_path / "plain", deterministic=True, **changes))
    again = train(config(discs, tmp_path / "again", deterministic=True, **changes))
    streamed = config(discs, tmp_path / "streamed", deterministic=True, data_budget=0, **changes)
    graph = train(config(discs, tmp_path / "graph", cuda_graph=True, **changes)).state_dict()
    other = train(streamed).state_dict()
    for name, x in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
        assert torch.equal(other[name], x)
        torch.testing.assert_close(graph[name], x, rtol=1e-3, atol=1e-4)
    train(config(discs, tmp_path / "half", **changes | {"precision": "float16"}))
    train(config(discs, tmp_path / "compiled", compile=True, **changes))


# The command line. Every mistake gets one line on standard error and exit code 2.


def arguments(discs, out, *changes):
    pairs = zip(changes[::2], changes[1::2], strict=True)
    settings = {"steps": 2, "previews": 0} | {k.strip("-").replace("-", "_"): v for k, v in pairs}
    return ["train", *map(str, discs), "--out", str(out), *options(settings)]


def test_command_line(discs, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([*arguments(discs, run, "--weights.w0", "5"), "--augmentation.flip"]) == 0
    assert main(["predict", str(run), str(discs[0]), "--out", str(out)]) == 0
    assert {f.name for f in out.glob("*.png")} == {"0.png", "1.png", "2.png"}
    one = str(discs[0] / "0.png")
    assert main(["predict", str(run), one, "--out", str(out), "--output", "probabilities"]) == 0
    probability = files.read_image(out / "0.tif")
    np.testing.assert_allclose(probability.sum(0), 1, rtol=1e-5)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"model: {run}" in printed
    assert re.search(rf"^3 images, [\d,]+ objects: {out}$", printed, re.MULTILINE)
    assert f"overlays: {out}/overlays" in printed
    assert "cuda_kernels" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--weights.w0", "5"], BorderWeights(w0=5)),  # the rest of the preset stays
        (["--weights.class-weight", "none"], BorderWeights(class_weight=None)),
        (["--weights.class-weight", "1", "3"], BorderWeights(class_weight=(1, 3))),
        (
            ["--weights.class-weight", "1", "3", "2", "--weights.spacing", "1", "2", "--seed", "3"],
            BorderWeights(class_weight=(1, 3, 2), spacing=(1, 2)),
        ),
        (["--weights.halo", "0.1", "10"], BorderWeights(halo=(0.1, 10))),
    ],
)
def test_command_line_sets_nested_settings(discs, tmp_path, words, expected):
    call = [*arguments(discs, tmp_path), *words]
    _, bound, _ = app.parse_args(call, exit_on_error=False, print_error=False)
    assert bound.arguments["config"].weights == expected


def check_fails(capsys, call, message):
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("unet-fast: ")
    assert message in error


def rewrite(path, array):
    path.unlink()
    Image.fromarray(array).save(path)


def test_command_line_rejects_bad_data(tmp_path, capsys):
    def fresh(name):
        folders = discs_in(tmp_path / name)
        return folders, folders[0] / "1.png", folders[1] / "1.png"

    folders, _, _ = fresh("good")
    out = tmp_path / "run"
    check_fails(capsys, arguments((tmp_path / "no", folders[1]), out), "must be a folder of images")
    (tmp_path / "empty").mkdir()
    check_fails(capsys, arguments((folders[0], tmp_path / "empty"), out), "must hold images")

    folders, image, label = fresh("unpaired")
    label.unlink()
    check_fails(capsys, arguments(folders, out), f"must hold a partner of {image}")
    folders, image, label = fresh("unpaired_label")
    image.unlink()
    check_fails(capsys, arguments(folders, out), f"must hold a partner of {label}")
    folders, image, _ = fresh("twice")
    Image.open(image).save(image.with_suffix(".tif"))
    check_fails(capsys, arguments(folders, out), "names must be unique without suffix, got 1.png")
    folders, image, label = fresh("sizes")
    rewrite(label, np.zeros((20, 30), np.uint8))
    check_fails(capsys, arguments(folders, out), f"{image}, 48 x 48, got 20 x 30 (crop or scale")
    folders, image, _ = fresh("truncated")
    image.write_bytes(image.read_bytes()[:300])
    check_fails(capsys, arguments(folders, out), f"{image}: cannot be read as an image")
    folders, _, label = fresh("colours")
    rewrite(label, np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    check_fails(capsys, arguments(folders, out), f"{label}: labels must be one number per pixel")
    folders, _, label = fresh("floats")
    label.unlink()
    Image.fromarray(np.full((48, 48), 0.5, np.float32)).save(label.with_suffix(".tif"))
    check_fails(capsys, arguments(folders, out), "got float32 with fractions or NaN (scale")
    folders, image, _ = fresh("channels")
    image.unlink()
    two = np.arange(2 * 48 * 48, dtype=np.float32).reshape(2, 48, 48)
    files.write_tiff(image.with_suffix(".tif"), two)
    check_fails(capsys, arguments(folders, out), "images must have the same channels, got 2 and")
    folders, _, label = fresh("cut_tiff")
    label.unlink()
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(label.with_suffix(".tif"))
    label.with_suffix(".tif").write_bytes(label.with_suffix(".tif").read_bytes()[:180])
    command = [sys.executable, "-m", "unet_fast.cli", *arguments(folders, out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1  # nothing of the decoder's own either
    assert not out.exists()


def test_says_that_the_network_takes_no_such_tile(discs, tmp_path, capsys):
    more = ["--steps", "1", "--depth", "2", "--previews", "0"]
    said = "train: tile 17 becomes 20, the next for depth 2; a smaller depth has sides closer"
    for tile in ("17", "20"):
        assert main(arguments(discs, tmp_path / tile, *more, "--tile", tile)) == 0
        assert (said in capsys.readouterr().err) == (tile == "17")


def test_command_line_rejects_bad_settings(discs, tmp_path, capsys):
    out = tmp_path / "run"
    blocked = tmp_path / "file"
    blocked.write_text("")
    check_fails(capsys, arguments(discs, blocked / "run"), "must be a folder that can be written")
    check_fails(capsys, arguments(discs, out, "--depth", "0"), "depth must be in [1, 12], got 0")
    check_fails(capsys, arguments(discs, out, "--weights.w0", "-1"), "w0 must be >= 0, got -1")
    check_fails(capsys, arguments(discs, out, "--augmentation.sigma", "nan"), "sigma must be >= 0")
    flat = [*arguments(discs, out), "--augmentation.sigma", "1", "2", "3"]
    check_fails(capsys, flat, "sigma must be one value, or 2 for samples of 2 axes, got (1.0, 2.0")
    check_fails(capsys, arguments(discs, out, "--norm", "layer"), "layer")
    check_fails(capsys, arguments(discs, out, "--base-channels", "60000", "--depth", "12"), "")
    check_fails(capsys, arguments(discs, out, "--steps", "0"), "steps must be >= 1, got 0")
    check_fails(capsys, arguments(discs, out, "--steps", "many"), "many")
    check_fails(capsys, arguments(discs, out, "--learning-rate", "-1"), "must be > 0, got -1")
    check_fails(capsys, arguments(discs, out, "--device", "tpu"), "device must be")
    check_fails(capsys, arguments(discs, out, "--device", "cuda:9"), "(auto takes what is there")
    check_fails(capsys, arguments(discs, out, "--validation", "1"), "validation must be in [0, 1)")
    check_fails(capsys, arguments(discs, out, "--ema", "1"), "ema must be in (0, 1), got 1")
    check_fails(capsys, arguments(discs, out, "--patience", "0"), "patience must be >= 1, got 0")
    check_fails(capsys, arguments(discs, out, "--optimizer", "lion"), "lion")
    check_fails(capsys, [*arguments(discs, out), "--cuda-graph"], "cuda_graph must be off but for")
    call = arguments(discs, out, "--validation", "0", "--patience", "3")
    check_fails(capsys, call, "patience must be none without files for validation, got 3")
    broken = tmp_path / "broken.toml"
    for text, message in (
        ("steps = ", f"{broken}: must be a TOML file: Invalid value"),
        ("[augmentation]\nscale = 1", f"{broken}: [augmentation][scale]: "),
        ("stepps = 3", "stepps"),
        ("steps = 0", "steps must be >= 1, got 0"),
    ):
        broken.write_text(text)
        call = ["train", *map(str, discs), "--out", str(out), "--config", str(broken)]
        check_fails(capsys, call, message)
    check_fails(capsys, [*call[:-1], str(tmp_path / "no.toml")], "no.toml: no such file")
    check_fails(capsys, arguments(discs, out, "--unknown", "1"), "--unknown")
    check_fails(capsys, ["train"], "train: images must be given: unet-fast train")
    check_fails(capsys, ["nonsense"], "nonsense")
    check_fails(capsys, ["predict", str(out), str(discs[0]), "--out", "x"], "must hold a model")

    assert main(arguments(discs, out)) == 0
    before = (out / "best.safetensors").read_bytes()
    capsys.readouterr()
    check_fails(capsys, arguments(discs, out), "out must be a folder without a run")
    assert (out / "best.safetensors").read_bytes() == before
    images = str(discs[0])
    labels = str(discs[1])
    before = (discs[1] / "0.png").read_bytes()
    words = ["predict", str(out), images, "--out"]
    check_fails(capsys, [*words, labels], "must not hold files of")
    assert (discs[1] / "0.png").read_bytes() == before
    before = (discs[0] / "0.png").read_bytes()
    check_fails(capsys, [*words, images, "--overwrite"], "must not be the folder of the input")
    assert (discs[0] / "0.png").read_bytes() == before
    assert main(["predict", str(out), images, "--out", str(tmp_path / "new")]) == 0
    assert main(["predict", str(out), images, "--out", str(tmp_path / "new"), "--overwrite"]) == 0
    capsys.readouterr()
    check_fails(capsys, ["predict", str(out), images + "/9.png", "--out", "x"], "no such file")


def test_stops_when_the_loss_explodes(discs, tmp_path, capsys):
    call = arguments(discs, tmp_path / "run", "--learning-rate", "1e30", "--steps", "50")
    check_fails(capsys, call, "loss, gradient and weights must stay finite")


def test_settings_of_other_types(discs, tmp_path):
    with pytest.raises(ValueError, match=r"steps must be an integer, got 2.5"):
        config(discs, tmp_path, steps=2.5)
    with pytest.raises(ValueError, match=r"optimizer must be one of sgd, adam, adamw, got 'lion'"):
        config(discs, tmp_path, optimizer="lion")


def test_settings_survive_their_file(discs, tmp_path, monkeypatch, capsys):
    """None where the default is something else, tuples, tables: as they were."""
    weights = BorderWeights(class_weight=(1, 2, 0.5), halo=(0.1, 10), ignore_label=7)
    augmentation = Augmentation(points=(4, 5), grid="approximating", flip=True)
    changes = {"clip_gradient": None, "ema": 0.5, "label_type": "semantic", "deterministic": True}
    settings = config(discs, tmp_path, weights=weights, augmentation=augmentation, **changes)
    file = tmp_path / "settings.toml"
    file.write_text(as_toml(settings, "# a comment\n"))
    seen = []
    monkeypatch.setattr("unet_fast.training.loop.train", seen.append)
    assert main(["train", "--config", str(file)]) == 0
    assert main(["train", "--config", str(file), "--weights.w0", "3", "--seed", "4"]) == 0
    assert seen[0] == settings
    assert seen[1].seed == 4
    assert seen[1].weights == replace(weights, w0=3)
    file.write_text(as_toml(replace(settings, weights=replace(weights, class_weight=None))))
    assert main(["train", "--config", str(file)]) == 0
    assert seen[2].weights.class_weight is None
    check_fails(capsys, ["check", *map(str, discs), "--config", str(file)], "must go with train")
