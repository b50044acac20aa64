"""Kinds of labels, splits, and where the data lies."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config, discs_in, options

from unet_fast import Augmentation, BorderWeights, UNet, load_model, predict, train
from unet_fast.cli import main
from unet_fast.images import files
from unet_fast.images.folders import label_type_of
from unet_fast.training.checkpoint import read_log
from unet_fast.training.processes import Processes
from unet_fast.training.samples import (
    NumberedLabels,
    Sample,
    load_samples,
    number_objects,
    split_names,
)
from unet_fast.training.tiles import Dataset
from unet_fast.training.validation import Judge, look


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs", count=4)


def sample(labels, classes=None):
    labels = np.asarray(labels, np.int32)
    classes = None if classes is None else np.asarray(classes, np.int32)
    return Sample("a", np.zeros((1, *labels.shape), np.float32), labels, classes)


def test_label_type():
    mask, ids = np.array([[0, 255]]), np.array([[0, 3, 9]])
    assert label_type_of([mask, mask], None) == "semantic"
    assert label_type_of([mask, ids], None) == "instances"
    assert label_type_of([ids], 9) == "semantic"
    assert label_type_of([np.zeros((2, 2), int)], None) == "instances"


def test_masks_become_objects():
    """Connected parts along the axes; numbers go on from image to image."""
    mask = [[255, 0, 255], [0, 255, 0], [0, 0, 0]]
    objects = number_objects([sample(mask), sample(mask)], "semantic", None)
    assert objects.class_values == [0, 255]
    assert objects.num_classes == 2
    assert objects.table is None
    numbers = [set(x[x > 0].tolist()) for x in objects.labels]
    assert [len(n) for n in numbers] == [3, 3]
    assert not numbers[0] & numbers[1]
    assert all(((x > 0) == (np.array(mask) > 0)).all() for x in objects.labels)


def test_class_maps_become_objects_with_classes():
    labels = [[0, 5, 5, 200], [0, 0, 9, 200], [5, 0, 9, 200]]
    objects = number_objects([sample(labels)], "semantic", 200)
    assert objects.class_values == [0, 5, 9]
    (ids,) = objects.labels
    classes = objects.table[ids]
    assert classes.tolist() == [[0, 1, 1, 255], [0, 0, 2, 255], [1, 0, 2, 255]]
    assert ids[0, 1] == ids[0, 2] != ids[2, 0]
    assert ids[1, 2] == ids[2, 2]
    assert (ids[classes == 0] == 0).all()


def test_instances_with_a_class_map():
    labels = [[1, 1, 2, 0], [1, 1, 2, 7]]
    classes = [[3, 3, 4, 4], [3, 3, 4, 0]]
    objects = number_objects([sample(labels, classes)], "instances", None)
    assert objects.class_values == [0, 3, 4]
    # A pixel with a class and no object is background, and so is one with no class.
    assert objects.table[objects.labels[0]].tolist() == [[1, 1, 2, 0], [1, 1, 2, 0]]
    assert len(np.unique(objects.labels[0])) == 3


def test_instances_stay():
    maps = [sample([[0, 7], [7, 9]])]
    objects = number_objects(maps, "instances", None)
    assert objects.labels[0] is maps[0].labels
    assert objects.table is None
    assert objects.num_classes == 2


def test_refuses_one_class():
    with pytest.raises(ValueError, match=r"from 2 to 254 classes.* got 1 \(3 only\)"):
        number_objects([sample([[3, 3]])], "semantic", None)
    many = sample(np.arange(300).reshape(15, 20))
    with pytest.raises(ValueError, match=r"from 2 to 254 classes.* got 300"):
        number_objects([many], "semantic", None)


def test_targets_of_classes_and_ignored_pixels():
    labels = np.zeros((20, 20), np.int32)
    labels[2:9, 2:9], labels[2:9, 11:18], labels[15:, :] = 1, 2, 200
    one = sample(labels)
    objects = number_objects([one], "semantic", 200)
    weights = BorderWeights(class_weight=(1, 1, 3), ignore_label=200)
    data = Dataset([one], objects, weights, torch.device("cpu"), math.inf)
    target, w = data.targets(data.sample(0)[1][None])
    assert target[0, 5, 5] == 1
    assert target[0, 5, 15] == 2
    assert (target[0, 15:] == 255).all()
    assert (w[0, 15:] == 0).all()
    assert w[0, 5, 15] == 3
    assert w[0, 5, 10] == pytest.approx(1)  # distances are those of a class by itself
    assert torch.equal(data.classes(data.sample(0)[1]), target[0])
    plain = Dataset(
        [one], number_objects([one], "instances", 200), weights, torch.device("cpu"), math.inf
    )
    assert (plain.classes(plain.sample(0)[1])[15:] == 255).all()


def test_a_class_without_training_pixels():
    """Its weight is 0 where the others are balanced; validation may still meet it."""
    one, other = sample([[0, 5], [0, 0]]), sample([[0, 5], [9, 0]])
    objects = number_objects([one, other], "semantic", None)
    first = replace(objects, labels=objects.labels[:1])
    data = Dataset([one], first, BorderWeights(), torch.device("cpu"), math.inf)
    data.balanced()
    assert data.weights.class_weight == pytest.approx((2 / 3, 2.0, 0.0))
    target, _ = data.targets(torch.from_numpy(objects.labels[1])[None])
    assert target.tolist() == [[[0, 1], [2, 0]]]


def test_streamed_data_are_the_same():
    one = sample([[0, 1], [2, 0]])
    streamed, resident = (
        Dataset(
            [one], NumberedLabels([one.labels], None, None), BorderWeights(), torch.device("cpu"), b
        )
        for b in (31, 32)  # bytes of 4 + 4 numbers
    )
    assert not streamed.resident
    assert resident.resident
    for a, b in zip(streamed.sample(0), resident.sample(0), strict=True):
        assert torch.equal(a, b)


def test_one_pass_cuts_the_tiles_of_images_of_one_size(monkeypatch):
    """Images of three sizes: three passes at most, and the same tiles as one by one."""
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (50, 20), (30, 40), (60, 60), (50, 20), (30, 40)]
    samples = [
        Sample(str(i), rng.random((2, *s)).astype(np.float32), rng.integers(0, 9, s, np.int32))
        for i, s in enumerate(sizes)
    ]
    objects = NumberedLabels([s.labels for s in samples], None, None)
    calls = []
    augmentation = Augmentation()
    apply = Augmentation.apply
    monkeypatch.setattr(Augmentation, "apply", lambda *a, **k: calls.append(a) or apply(*a, **k))
    shapes = (28, 28), (12, 12)
    results = []
    for budget in (0, math.inf):
        data = Dataset(samples, objects, BorderWeights(), torch.device("cpu"), budget)
        drawn = data.draw(augmentation, 12, *shapes, seed=0, step=1)
        calls.clear()
        results.append(data.cut(augmentation, drawn, *shapes))
        assert len(calls) == (3 if budget else 6)
    for n, file in enumerate(drawn.files):
        tile, labels = apply(
            augmentation,
            data.sample(file)[0][None],
            data.sample(file)[1][None],
            drawn.parameters[n : n + 1],
            output_shape=shapes[0],
            label_shape=shapes[1],
            offset=drawn.offset[n : n + 1],
        )
        for images, ids in results:
            assert torch.equal(images[n], tile[0])
            assert torch.equal(ids[n], labels[0])


def test_split():
    names = [f"{i:02d}" for i in range(10)]
    train_names, kept = split_names(names, 0.2, 0, None)
    assert len(kept) == 2
    assert sorted(train_names + kept) == names
    assert train_names == sorted(train_names)
    assert split_names(names, 0.2, 0, None)[1] == kept
    assert any(split_names(names, 0.2, s, None)[1] != kept for s in range(1, 5))
    assert [len(x) for x in split_names(names, 0.0, 0, None)] == [10, 0]
    assert [len(x) for x in split_names(names[:2], 0.01, 0, None)] == [1, 1]
    assert [len(x) for x in split_names(names[:2], 0.99, 0, None)] == [1, 1]
    assert [len(x) for x in split_names(names[:1], 0.9, 0, None)] == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["0", "9"]}', "that are there, got 9 .names are without suffix, as 0.$"),
        (
            '{"train": ["0"], "validation": ["0"]}',
            "got 0 twice .take it out of train or validation.$",
        ),
        ('{"train": [], "validation": ["0"]}', "got none .move names from validation to train.$"),
        ('{"train": "0123"}', 'must be JSON {"train": [names], "validation": [names]}'),
        ('{"train": 3}', 'must be JSON {"train": [names], "validation": [names]}'),
        ("[]", "must be JSON"),
        ("{", "must be JSON"),
        (None, "must be JSON.*: No such file"),
    ],
)
def test_split_file(tmp_path, discs, capsys, content, message):
    file = tmp_path / "split.json"
    if content is not None:
        file.write_text(content)
    call = ["train", *map(str, discs), "--out", str(tmp_path / "run"), *options({"steps": 1})]
    assert main([*call, "--split", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unet-fast: {file}: ")
    assert re.search(message.replace("[", r"\[").replace("{", r"\{"), error)
    file.write_text('{"train": ["3", "0"], "validation": ["1"]}')
    assert main([*call, "--split", str(file)]) == 0
    made = json.loads((tmp_path / "run" / "split.json").read_text())
    assert made == {"train": ["3", "0"], "validation": ["1"]}


def test_semantic_masks_end_to_end(discs, tmp_path, capsys):
    """0/255 masks: trained without a word more, and predicted as 0 and 255."""
    for file in discs[1].glob("*.png"):
        mask = 255 * (np.asarray(Image.open(file)) > 0).astype(np.uint8)
        Image.fromarray(mask).save(file)
    run, out = tmp_path / "run", tmp_path / "out"
    settings = {"steps": 80, "base_channels": 8, "depth": 2, "tile": 40, "previews": 1}
    settings |= {"momentum": 0.9, "learning_rate": 0.02, "dropout": 0, "seed": 2}
    assert main(["train", *map(str, discs), "--out", str(run), *options(settings)]) == 0
    assert load_model(run).class_values == [0, 255]
    assert 'label_type = "semantic"' in (run / "config.toml").read_text()
    call = ["predict", str(run), str(discs[0]), "--out", str(out), "--output", "labels"]
    assert main(call) == 0
    found = {v for f in out.glob("*.png") for v in np.unique(files.read_labels(f)).tolist()}
    assert found == {0, 255}
    (preview,) = (run / "previews").glob("step_*.png")
    assert np.asarray(Image.open(preview)).std() > 10


def test_classes_and_channels_end_to_end(discs, tmp_path):
    """Three classes, two channels, ignored pixels, a folder of class maps."""
    images, labels = discs
    classes = tmp_path / "classes"
    classes.mkdir()
    for file in sorted(labels.iterdir()):
        ids = np.asarray(Image.open(file)).copy()
        Image.fromarray(np.where(ids > 2, 20, 10 * (ids > 0)).astype(np.uint8)).save(
            classes / file.name
        )
        ids[:5] = 250
        Image.fromarray(ids).save(file)
        grey = files.read_image(images / file.name)[0]
        files.write_tiff((images / file.name).with_suffix(".tif"), np.stack([grey, 255 - grey]))
        (images / file.name).unlink()
    weights = BorderWeights(ignore_label=250)
    run = tmp_path / "run"
    train(config(discs, run, classes=classes, weights=weights, steps=4, evaluate_every=2))
    model = load_model(run)
    assert model.config["in_channels"] == 2
    assert model.config["num_classes"] == 3
    assert model.class_values == [0, 10, 20]
    scores = read_log(run)[-1]["validation"]
    assert 0 <= scores["seg"] <= 1  # classes whose objects are numbered have objects
    assert 0 <= scores["iou"] <= 1
    train(config(discs, run, classes=classes, weights=weights, steps=6, resume=True))
    assert len(read_log(run)) == 6
    assert len(load_samples(images, labels, classes)) == 4


def test_evaluation_of_known_scores():
    """Against counting by hand: three classes, ignored pixels, several images."""

    rng = np.random.default_rng(0)
    maps = [rng.choice([0, 0, 5, 9, 200], (24, 31)).astype(np.int32) for _ in range(3)]
    samples = [
        Sample(str(i), rng.random((1, *x.shape)).astype(np.float32), x) for i, x in enumerate(maps)
    ]
    objects = number_objects(samples, "semantic", 200)
    weights = BorderWeights(class_weight=(1, 2, 3), ignore_label=200)
    data = Dataset(samples, objects, weights, torch.device("cpu"), math.inf)
    model = UNet(1, 3, base_channels=2, depth=1).eval()
    looks = [look(model, data, i, "weighted_mean") for i in range(len(data))]
    scores, rule = Judge("mean_iou", False, data, 1, Processes())(looks)
    values, hits, unions = np.array([0, 5, 9]), np.zeros(3), np.zeros(3)
    loss = total = 0.0
    for i, truth in enumerate(maps):
        logits = predict(model, data.sample(i)[0], output="scores")
        found, counts = values[logits.argmax(0).numpy()], truth != 200
        for k, v in enumerate(values):
            hits[k] += ((found == v) & (truth == v)).sum()
            unions[k] += (((found == v) | (truth == v)) & counts).sum()
        target, w = data.targets(data.sample(i)[1][None])
        ce = torch.nn.functional.cross_entropy(
            logits[None], target.long(), ignore_index=255, reduction="none"
        )
        loss += float((ce * w).sum())
        total += float(w.sum())
    assert scores["iou"] == pytest.approx((hits / unions)[1:].mean())
    assert scores["mean_iou"] == pytest.approx((hits / unions).mean())
    assert scores["loss"] == pytest.approx(loss / total, rel=1e-5)
    assert rule is None
    assert "seg" not in scores


def test_a_split_keeps_stacks_together(tmp_path):
    files = [f"s{i // 4}" for i in range(20)]
    names = [f"{file}[{i % 4}]" for i, file in enumerate(files)]
    train, validation = split_names(names, 0.4, 0, None, files)
    assert len(validation) == 8
    assert not {n[:2] for n in train} & {n[:2] for n in validation}
    assert len(split_names(names[:4], 0.2, 0, None, files[:4])[1]) == 1  # of one stack, a plane
    split = tmp_path / "split.json"
    split.write_text('{"train": ["s0", "s1[2]"], "validation": ["s3"]}')
    train, validation = split_names(names, 0.4, 0, split, files)
    assert train == [*names[:4], "s1[2]"]
    assert validation == names[12:16]


def test_class_maps_without_background():
    """0 is background all the same: pixels outside objects have it."""
    objects = number_objects([sample([[1, 0], [2, 2]], [[3, 3], [5, 5]])], "instances", None)
    assert objects.class_values == [0, 3, 5]
    assert objects.table[objects.labels[0]].tolist() == [[1, 0], [2, 2]]


def test_class_maps_without_partners(discs, tmp_path):
    images, labels = discs
    classes = shutil.copytree(labels, tmp_path / "classes")
    (classes / "3.png").unlink()
    message = f"{classes}: must hold a partner of {images / '3.png'}, got none"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_samples(images, labels, classes)
    for name in ("3.png", "4.png"):
        shutil.copy(labels / "0.png", classes / name)
    message = f"{images}: must hold a partner of {classes / '4.png'}, got none"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_samples(images, labels, classes)
