"""What evaluations choose: the rule of objects, the best model, and when they take place."""

import json
import math
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config, discs_in
from scipy import ndimage

from unet_fast import BorderWeights, UNet, load_model, metrics, predict, train
from unet_fast.objects import ObjectRule
from unet_fast.training import run
from unet_fast.training.checkpoint import Progress
from unet_fast.training.processes import Processes
from unet_fast.training.samples import Sample, load_samples, number_objects
from unet_fast.training.step import _divisor
from unet_fast.training.tiles import Dataset
from unet_fast.training.validation import (
    SEEDS,
    Judge,
    Look,
    best_by_of,
    described,
    look,
    plan_of,
    said_of,
)


def dataset_of(labels, kind="instances"):
    samples = [Sample(str(i), x[None].astype(np.float32), x) for i, x in enumerate(labels)]
    objects = number_objects(samples, kind, None)
    return Dataset(samples, objects, BorderWeights(), torch.device("cpu"), math.inf)


def look_at(truth, share):
    share = torch.as_tensor(share, dtype=torch.float32)
    return Look(
        index=0,
        sums=torch.zeros(6, dtype=torch.float64),
        target=(truth > 0).astype(np.uint8),
        classes=(share > 0.5).long(),
        share=share,
        truth=truth.astype(np.int32),
        counts=np.ones(truth.shape, bool),
    )


def cells(leak=0.75, speck=0.99):
    """Two discs of clear foreground, a border that leaks, and specks."""
    rows, columns = np.mgrid[:60, :90]
    truth = np.zeros((60, 90), np.int32)
    for number, centre in enumerate((25, 58), 1):
        truth[np.hypot(rows - 30, columns - centre) < 16] = number
    share = np.where(truth > 0, 0.97, 0.05)
    share[25:35, 39:45] = leak
    share[5, 5:85:8] = speck  # ten specks of a pixel
    return truth, share


def fitted(truth, share, by="pq"):
    return Judge(by, True, dataset_of([truth]), 1, Processes())([look_at(truth, share)])


def test_the_rule_parts_cells_and_leaves_out_specks():
    truth, share = cells()
    scores, rule = fitted(truth, share)
    assert (scores["predicted"], scores["true"]) == (2, 2)
    assert scores["pq"] > 0.95
    assert 0.75 < rule.seed_threshold < 0.97
    assert rule.min_area > 1
    judge = Judge("pq", True, dataset_of([truth]), 1, Processes())
    without = judge.scores([look_at(truth, share)], ObjectRule(grow=1))
    assert without["predicted"] == 11
    assert without["pq"] < 0.5
    assert f"seeds above {rule.seed_threshold:g}" in described(rule)
    assert f"at least {rule.min_area} px" in described(rule)


def test_of_equals_the_gentlest_rule():
    """Where nothing leaks and there are no specks, all foreground makes objects."""
    truth, share = cells(leak=0.05, speck=0.05)
    scores, rule = fitted(truth, share)
    assert rule.seed_threshold == 0
    assert rule.min_area == 0
    assert rule.holes == 0
    assert scores["pq"] > 0.95  # they grow into a gap that is none of a ridge


def test_smallest_areas_stay_below_those_of_the_objects():
    """However large the specks are, no seed as large as a training object is left out."""
    truth, share = cells()
    share[0:20, 0:20] = 0.99  # larger than the smallest object
    truth[50:54, 80:84] = 3
    share[50:54, 80:84] = 0.97
    judge = Judge("pq", True, dataset_of([truth]), 1, Processes())
    _, rule = judge([look_at(truth, share)])
    areas = np.unique(truth[truth > 0], return_counts=True)[1]
    assert judge.smallest == pytest.approx(np.percentile(areas, 1))
    assert rule.min_area <= judge.smallest < 400


def test_holes_are_filled_where_that_is_better():
    truth, share = cells(leak=0.05, speck=0.05)
    for row in range(22, 40, 4):
        share[row : row + 2, 20:30:4] = share[row : row + 2, 53:63:4] = 0.05
    judge = Judge("pq", True, dataset_of([truth]), 1, Processes())
    looks = [look_at(truth, share)]
    scores, rule = judge(looks)
    assert rule.holes >= 2
    assert scores["pq"] > judge.scores(looks, replace(rule, holes=0))["pq"]


def test_an_earlier_rule_is_adjusted_only():
    truth, share = cells()
    judge = Judge("pq", True, dataset_of([truth]), 1, Processes())
    looks = [look_at(truth, share)]
    rule = ObjectRule(7, 1, 0.7, 0.5, levels=4)
    adjusted = judge.fit(looks, rule)
    at = SEEDS.index(0.7)
    assert adjusted.seed_threshold in SEEDS[at - 1 : at + 2]
    assert replace(adjusted, seed_threshold=0.7) == rule


def test_fitted_rules_score_what_predict_makes(tmp_path, monkeypatch):
    """The scores of an evaluation are those of the files that predict writes."""
    monkeypatch.setattr("unet_fast.training.validation.SHARE", 100)  # of the time: all files
    discs = discs_in(tmp_path / "discs", count=6)
    changes = {"steps": 60, "learning_rate": 0.02, "momentum": 0.9, "base_channels": 8}
    changes |= {"seed": 2, "precision": "float32", "validation": 0.5, "evaluate_every": 20}
    model = train(config(discs, tmp_path / "run", **changes))
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    samples = [s for s in load_samples(*discs) if s.name in split["validation"]]
    assert len(samples) == 3
    best = rows[-1]["best"]
    assert best["by"] == "pq"
    models = {
        name: load_model(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "last")
    }
    values = {}
    for name, one in models.items():
        found = [predict(one, s.image, output="instances") for s in samples]
        pairs = [metrics.detection(s.labels, x) for s, x in zip(samples, found, strict=True)]
        values[name] = metrics.pooled(pairs).panoptic_quality
    assert values["best"] >= values["last"]
    assert values["best"] == pytest.approx(best["pq"])
    assert values["last"] == pytest.approx(rows[-1]["validation"]["pq"])
    assert torch.equal(model.head.weight, models["best"].head.weight)
    assert model.objects == models["best"].objects


@pytest.mark.parametrize("last_is_better", [True, False])
def test_the_best_model_is_not_worse_than_the_last_on_all_files(
    tmp_path, monkeypatch, last_is_better
):
    """Evaluations look at a part of the files; the last one decides on all, whoever led before."""
    discs = discs_in(tmp_path / "discs", count=8)
    seen = []

    def scored(self, looks, rule=None):
        """Ever worse on the part; on all files as asked for."""
        seen.append(len(looks))
        if len(looks) < 4:
            pq = 0.9 - 0.1 * len(seen)
        else:
            pq = 0.5 if 4 not in seen[:-1] else (0.3 if last_is_better else 0.6)
        numbers = {"loss": 1.0, "iou": 0.5, "mean_iou": 0.5, "ap": pq, "seg": pq, "pq": pq}
        return numbers | {"predicted": 4.0, "true": 4.0}, ObjectRule(grow=1)

    monkeypatch.setattr(Judge, "__call__", scored)
    plan = run.plan_of
    monkeypatch.setattr(run, "plan_of", lambda *x: replace(plan(*x), every=2, files=1, last=4))
    changes = {"steps": 6, "validation": 0.5, "precision": "float32"}
    train(config(discs, tmp_path / "run", **changes))
    assert seen == [1, 1, 1, 4, 4]  # the last two: of the last model and of the first
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["best"]["step"] == (6 if last_is_better else 2)
    best, last = ((tmp_path / "run" / f"{x}.safetensors").read_bytes() for x in ("best", "last"))
    assert (best == last) == last_is_better


def labels_of(kind):
    """A map of few cells, of masks alike, or of many parts with thin borders."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:80, :80]
    if kind == "borders":
        return (np.minimum(rows % 20, columns % 20) > 1).astype(np.int32)
    labels = np.zeros((80, 80), np.int32)
    for number in range(1, 6):
        r, c = rng.integers(8, 72, 2)
        labels[np.hypot(rows - r, columns - c) < 8] = number
    return labels


def test_what_auto_stands_for(tmp_path):
    instances, borders = labels_of("cells"), labels_of("borders")
    masks = np.minimum(instances, 1)
    classes = masks + (np.arange(80) > 40) * masks
    big = np.where(instances > 0, 0, 1)  # mostly foreground, but what parts it is not thin
    for labels, kind, wanted in (
        (instances, "instances", "pq"),
        (masks, "semantic", "pq"),
        (borders, "semantic", "v_rand"),
        (ndimage.label(borders)[0], "instances", "pq"),
        (big, "semantic", "pq"),
        (classes, "semantic", "mean_iou"),
    ):
        data = dataset_of([labels.astype(np.int32)], kind)
        settings = config(("images", "labels"), tmp_path, label_type=kind)
        assert best_by_of(settings, data) == wanted
        assert best_by_of(replace(settings, best_by="loss"), data) == "loss"
    with pytest.raises(ValueError, match="best_by must be mean_iou, iou or loss for classes"):
        best_by_of(replace(settings, best_by="pq"), data)


def test_auto_is_resolved_in_the_settings(tmp_path):
    discs = discs_in(tmp_path / "discs")
    train(config(discs, tmp_path / "run"))
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["best_by"] == "pq"
    for file in discs[1].iterdir():
        labels = labels_of("borders")[:48, :48] * 255
        Image.fromarray(labels.astype(np.uint8)).save(file)
    train(config(discs, tmp_path / "borders"))
    assert tomllib.loads((tmp_path / "borders" / "config.toml").read_text())["best_by"] == "v_rand"
    rows = (tmp_path / "borders" / "log.jsonl").read_text().splitlines()
    assert 0 <= json.loads(rows[-1])["validation"]["v_rand"] <= 1


def test_training_images_stand_in_where_there_are_none_for_validation(tmp_path):
    discs = discs_in(tmp_path / "discs")
    model = train(config(discs, tmp_path / "run", validation=0))
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert "validation" not in row
    assert row["training"]["files"] >= 1
    assert isinstance(model.objects, ObjectRule)
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_no_object_in_the_files_for_validation(tmp_path):
    discs = discs_in(tmp_path / "discs")
    Image.new("L", (48, 48)).save(discs[1] / "0.png")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["1", "2"], "validation": ["0"]}))
    with pytest.warns(UserWarning, match="must hold objects, got none: seeds are above 0.9"):
        model = train(config(discs, tmp_path / "run", split=split))
    assert model.objects.seed_threshold == 0.9


def test_objects_of_one_pixel(tmp_path):
    discs = discs_in(tmp_path / "discs")
    for file in discs[1].iterdir():
        labels = np.zeros((48, 48), np.uint8)
        labels[::6, ::6] = np.arange(1, 65).reshape(8, 8)
        Image.fromarray(labels).save(file)
    with pytest.warns(UserWarning, match="got 1 pixels: all foreground makes objects"):
        model = train(config(discs, tmp_path / "run"))
    assert model.objects == ObjectRule(grow=1)
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert row["validation"]["true"] == 64


def test_no_object_in_the_files_for_training(tmp_path):
    discs = discs_in(tmp_path / "discs")
    for name in "12":
        Image.new("L", (48, 48)).save(discs[1] / f"{name}.png")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["1", "2"], "validation": ["0"]}))
    with pytest.warns(UserWarning, match="got none: all foreground makes objects"):
        train(config(discs, tmp_path / "run", split=split))


def test_a_rule_for_masks_and_for_classes_with_objects(tmp_path):
    """Masks hold objects, too: their connected parts. Foreground is what is not background."""
    truth, _ = cells()
    mask = np.minimum(truth, 1)
    data = dataset_of([mask], "semantic")
    model = UNet(base_channels=1, depth=1)
    found = look(model, data, 0, "weighted_mean")
    assert len(np.unique(found.truth)) == 3
    probabilities = predict(model, data.sample(0)[0])
    np.testing.assert_allclose(found.share, 1 - probabilities[0], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 100, 1500, 100000])
@pytest.mark.parametrize("count", [1, 2, 36])
@pytest.mark.parametrize("every", [None, 1, 50])
def test_evaluations_take_a_twentieth_of_the_time(steps, count, every):
    model = UNet(base_channels=1)
    plan = plan_of(steps, every, 380**2, [(512, 512)] * count, model)
    evaluations = (steps - 1) // plan.every
    assert 1 <= plan.files <= plan.last <= count
    assert plan.every == every or every is None
    if every is None:
        assert evaluations <= 10
    least = plan.cost / (evaluations * plan.files + plan.last)  # of a file
    one_each = least * (evaluations + 1)
    assert plan.cost <= 0.05 * steps + one_each
    if steps == 100000:
        assert plan.last == count


def test_errors_of_classes_and_of_objects():
    truth, share = cells()
    seen = look_at(truth, share)
    seen.counts[:, :30] = False
    wanted, found = seen.errors(None)
    assert np.array_equal(wanted, truth > 0)
    assert np.array_equal(found, (share > 0.5) & seen.counts)
    seen.counts[:] = True
    wanted, found = seen.errors(ObjectRule())
    assert np.array_equal(wanted, truth > 0)
    assert set(np.unique(found)) == {0, 2}  # the leak makes one object of two: no partner


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum"])
def test_what_the_loss_is_divided_by(reduction):
    """Sums over images, as over tiles; of an image without pixels that count it stays finite."""
    truth, _ = cells()
    data = dataset_of([truth])
    _, labels = data.sample(0)
    target, weights = data.targets(labels[None])
    total = {"weighted_mean": float(weights.sum()), "mean": truth.size, "sum": 1}[reduction]
    seen = look(UNet(base_channels=1, depth=1), data, 0, reduction)
    assert float(seen.sums[1]) == pytest.approx(total)
    assert float(_divisor(reduction, target, weights, Processes())) == pytest.approx(total)
    ignored = torch.full_like(target, 255)
    assert _divisor(reduction, ignored, 0 * weights, Processes()) > 0


def test_only_the_first_process_warns():
    """Of training objects too small for a rule; warnings are errors here."""
    truth = np.eye(3, dtype=np.int32)
    with pytest.warns(UserWarning, match="got 3 pixels: all foreground makes objects"):
        assert not Judge("pq", True, dataset_of([truth]), 1, Processes()).fits
    assert not Judge("pq", True, dataset_of([truth]), 1, Processes(1, 2)).fits


def test_an_evaluation_in_words():
    assert said_of({"iou": 0.5, "loss": 1.0}, "iou") == "pixel IoU 0.500"
    counts = {"predicted": 3.0, "true": 4.0}
    assert said_of({"pq": None, "loss": 1.0} | counts, "pq") == "PQ none, 3 objects of 4"


def test_a_loss_that_is_not_finite_is_no_best():
    """Not even the first evaluation's."""
    progress = Progress()
    assert not run._score(progress, {"loss": None, "pq": 0.9}, "pq")
    assert (progress.best, progress.since_best) == (None, 1)
    assert run._score(progress, {"loss": 2.0, "pq": None}, "pq")
    assert (progress.best, progress.since_best) == (-2, 0)
