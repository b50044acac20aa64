"""Objects made of a predicted mask."""

import json
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from unet_fast import UNet, load_model, metrics, predict, save_model, separate_touching
from unet_fast.demo import SAMPLE
from unet_fast.images.files import read_labels
from unet_fast.model_file import pack, unpack
from unet_fast.objects import REACH, ObjectRule


def arrays(dtype, values):
    """Small images and volumes."""
    shapes = st.sampled_from([(7, 9), (3, 4, 5)])
    return shapes.flatmap(lambda x: hnp.arrays(dtype, x, elements=st.sampled_from(values)))


def neighbours(place, shape):
    """Pixels one step along an axis away."""
    for axis in range(len(shape)):
        for step in (-1, 1):
            other = (*place[:axis], place[axis] + step, *place[axis + 1 :])
            if 0 <= other[axis] < shape[axis]:
                yield other


def steps_from(labels, value):
    """Steps along the axes from every pixel to an object, through anything."""
    far = 10**6
    steps = np.where(labels == value, 0, far)
    queue = deque(map(tuple, np.argwhere(labels == value)))
    while queue:
        at = queue.popleft()
        for other in neighbours(at, steps.shape):
            if steps[other] == far:
                steps[other] = steps[at] + 1
                queue.append(other)
    return steps


def flooded(objects, free):
    """Objects that grow step by step into what is free; the smaller number comes first."""
    result = objects.copy()
    queue = deque(sorted(map(tuple, np.argwhere(objects)), key=lambda at: objects[at]))
    while queue:
        at = queue.popleft()
        for other in neighbours(at, result.shape):
            if free[other] and result[other] == 0:
                result[other] = result[at]
                queue.append(other)
    return result


@examples(100, deadline=None, derandomize=True)
@given(arrays(np.int32, [0, 0, 0, 1, 2, 3]), st.integers(0, 3))
def test_grown_equals_the_distances_to_all_objects(labels, grow):
    ids = [i for i in np.unique(labels) if i]
    steps = {i: steps_from(labels, i) for i in ids}
    expected = labels.copy()
    for place in map(tuple, np.argwhere(labels == 0)):
        nearest = sorted((steps[i][place], i) for i in ids)
        if len(nearest) > 1:
            (d1, owner), (d2, _) = nearest[:2]
            if d1 <= grow and d2 <= 2 * grow + 1 - d1:
                expected[place] = owner
    np.testing.assert_array_equal(ObjectRule(grow=grow).grown(labels, labels * 0), expected)


def test_grown_back_is_what_was_carved():
    labels = np.zeros((12, 14), int)
    labels[2:10, 1:6], labels[2:10, 6:13] = 1, 2
    for mode in ("two_sided", "one_sided"):
        carved = separate_touching(torch.from_numpy(labels), mode).numpy()
        assert (carved != labels).any()
        grown = ObjectRule(grow=1).of_mask(carved > 0)
        if mode == "two_sided":
            np.testing.assert_array_equal(grown, labels)
        else:  # who had lost the line cannot be told
            np.testing.assert_array_equal(grown > 0, labels > 0)
            assert grown.max() == 2


def test_growing_back_mends_real_nuclei():
    """The carved truth of the bundled images, relabelled, is nearer to the truth afterwards."""
    truth = [read_labels(file) for file in sorted((SAMPLE / "train" / "labels").iterdir())]
    masks = [separate_touching(torch.from_numpy(x), "two_sided").numpy() > 0 for x in truth]
    plain = metrics.seg(truth, [ObjectRule().of_mask(x) for x in masks])
    grown = metrics.seg(truth, [ObjectRule(grow=1).of_mask(x) for x in masks])
    assert plain < grown
    assert grown > 0.98


@examples(100, deadline=None, derandomize=True)
@given(arrays(np.uint8, [0, 1, 1, 2]))
def test_seeds_grow_into_foreground(states):
    """Each pixel of foreground goes to the seed that reaches it first through foreground."""
    found = ObjectRule().of(states)
    seeds = ObjectRule().of_mask(states == 2)
    np.testing.assert_array_equal(found[states == 2], seeds[states == 2])
    assert not found[states == 0].any()
    np.testing.assert_array_equal(found, flooded(seeds, states == 1))


@examples(100, deadline=None, derandomize=True)
@given(arrays(np.uint8, [0, 1, 2, 3, 4, 4]))
def test_objects_grow_from_the_clearer_to_the_fainter(states):
    """Three levels: each is flooded by itself, from what the levels above have given."""
    rule = ObjectRule(levels=3)
    expected = ObjectRule().of_mask(states == rule.seed)
    for level in (3, 2, 1):
        expected = flooded(expected, states >= level)
    np.testing.assert_array_equal(rule.of(states), expected)


@examples(100, deadline=None, derandomize=True)
@given(arrays(bool, [True, True, True, False]), st.integers(0, 5))
def test_small_holes_are_filled(mask, holes):
    """Background parts of up to so many pixels that do not reach the rim, within one object."""
    plain, found = ObjectRule().of_mask(mask), ObjectRule(holes=holes).of_mask(mask)
    expected = plain.copy()
    parts, count = ndimage.label(plain == 0)
    for part in range(1, count + 1):
        inside = parts == part
        rim = inside.sum() > inside[(slice(1, -1),) * inside.ndim].sum()
        around = set(plain[ndimage.binary_dilation(inside) & ~inside].tolist())
        if not rim and inside.sum() <= holes and len(around) == 1:
            expected[inside] = around.pop()
    np.testing.assert_array_equal(found, expected)


def test_seeds_that_are_left_out_are_foreground_of_others():
    """A speck of clear foreground in a cell is no object, and no hole in it either."""
    states = np.zeros((9, 14), int)
    states[1:8, 1:13] = 1
    states[2:7, 2:7] = states[4, 10] = 2
    found = ObjectRule(min_area=2).of(states)
    np.testing.assert_array_equal(found, states > 0)


def test_states_count_the_thresholds_exceeded():
    share = torch.tensor([0.1, 0.55, 0.62, 0.72, 0.82, 0.92, 0.99])
    rule = ObjectRule(seed_threshold=0.9, foreground_threshold=0.6, levels=3)
    assert rule.states(share, share > 0.5).tolist() == [0, 0, 1, 2, 3, 4, 4]
    plain = ObjectRule(foreground_threshold=0.6, levels=3)
    assert plain.states(share, share > 0.5).tolist() == [0, 0, 4, 4, 4, 4, 4]
    # Of several classes, what background is the most probable of is none, without a threshold.
    assert ObjectRule().states(torch.tensor([0.55]), torch.tensor([False])).tolist() == [0]


def test_growth_into_foreground_ends():
    states = np.full((3, 50), 1)
    states[1, 0] = 2
    found = ObjectRule().of(states)
    assert found[1].tolist() == [1] * (REACH + 1) + [0] * (49 - REACH)


def test_a_border_that_leaks_parts_by_seeds():
    model = UNet(base_channels=4, depth=1)
    torch.manual_seed(1)
    image = torch.rand(30, 40)
    probability = predict(model, image)[1].numpy()
    threshold = float(np.quantile(probability[probability > 0.5], 0.6))
    states = np.where(probability > threshold, 2, probability > 0.5)
    for average in ("scores", "probabilities"):
        found = predict(
            model, image, output="instances", seed_threshold=threshold, average=average, tile=8
        )
        np.testing.assert_array_equal(found.numpy(), ObjectRule().of(states))
    assert found.max() > predict(model, image, output="instances").max()


def test_small_parts_are_left_out_before_the_rest_grows():
    mask = np.array([[1, 1, 0, 1, 0, 1, 1]])
    np.testing.assert_array_equal(ObjectRule().of_mask(mask), [[1, 1, 0, 2, 0, 3, 3]])
    np.testing.assert_array_equal(ObjectRule(min_area=2).of_mask(mask), [[1, 1, 0, 0, 0, 2, 2]])
    np.testing.assert_array_equal(
        ObjectRule(min_area=2, grow=1).of_mask(mask), [[1, 1, 0, 0, 0, 2, 2]]
    )
    np.testing.assert_array_equal(
        ObjectRule(min_area=2, grow=2).of_mask(mask), [[1, 1, 1, 1, 2, 2, 2]]
    )
    np.testing.assert_array_equal(ObjectRule(min_area=3).of_mask(mask), np.zeros((1, 7)))


def test_predict_takes_the_width_of_training(tmp_path):
    torch.manual_seed(0)
    model = UNet(base_channels=4, depth=1)
    image = torch.rand(40, 50)
    scores = predict(model, image, output="scores")
    with torch.no_grad():  # as much foreground as leaves objects with gaps between them
        model.head.bias[1] -= (scores[1] - scores[0]).quantile(0.7)
    mask = predict(model, image, output="labels").numpy()
    plain = predict(model, image, output="instances").numpy()
    np.testing.assert_array_equal(plain, ObjectRule().of_mask(mask))
    model.ridge_width = 2
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.ridge_width == 2
    grown = predict(loaded, image, output="instances", tile=16).numpy()
    np.testing.assert_array_equal(grown, ObjectRule(grow=2).of_mask(mask))
    assert (grown != plain).any()
    large = predict(loaded, image, output="instances", min_area=9, grow=0).numpy()
    np.testing.assert_array_equal(large, ObjectRule(min_area=9).of_mask(mask))


def rewritten(file, *left_out, **changes):
    """A model file with another description."""
    weights, description = unpack(file, "a model")
    description = {k: v for k, v in (description | changes).items() if k not in left_out}
    file.write_bytes(pack(weights, json.loads(json.dumps(description))))


def test_models_of_before_predict_as_before(tmp_path):
    """Without a rule all that is not background makes objects; the oldest do not grow."""
    torch.manual_seed(0)
    model, image = UNet(1, 3, base_channels=4, depth=1), torch.rand(40, 50)
    model.ridge_width = 1
    file = tmp_path / "model.safetensors"
    save_model(model, file)
    mask = predict(model, image, output="labels").numpy()
    rewritten(file, "objects")
    found = predict(load_model(file), image, output="instances").numpy()
    np.testing.assert_array_equal(found, ObjectRule(grow=1).of_mask(mask))
    rewritten(file, "ridge_width")
    assert load_model(file).ridge_width == 0
    found = predict(load_model(file), image, output="instances").numpy()
    np.testing.assert_array_equal(found, ObjectRule().of_mask(mask))


def test_the_rule_is_kept_with_the_model(tmp_path):
    """It is what predict takes, in tiles, too; each option takes the place of its part."""
    torch.manual_seed(1)
    model, image = UNet(base_channels=4, depth=1), torch.rand(60, 70)
    share = 1 - predict(model, image)[0]
    low, high = (float(share.quantile(q)) for q in (0.3, 0.8))
    rule = ObjectRule(4, 1, high, low, levels=4, holes=3)
    model.objects = rule
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.objects == rule

    def made(rule):
        return rule.of(rule.states(share, share > 0.5).numpy())

    for tile in (None, 16):
        found = predict(loaded, image, output="instances", tile=tile).numpy()
        np.testing.assert_array_equal(found, made(rule))
    assert found.max() > 1
    for change in (
        {"min_area": 0},
        {"grow": 0},
        {"seed_threshold": 0.0},
        {"foreground_threshold": low - 0.001},
        {"holes": 0},
    ):
        other = predict(loaded, image, output="instances", **change).numpy()
        np.testing.assert_array_equal(other, made(replace(rule, **change)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"seed_threshold": 2}, r"seed_threshold must be in \[0, 1\), got 2"),
        ({"seed_threshold": "high"}, "seed_threshold must be a number, got 'high'"),
        ({"min_area": 1.5}, "min_area must be an integer, got 1.5"),
        ({"levels": 9}, r"levels must be in \[1, 8\], got 9"),
        ({"speed": 1}, "unexpected keyword argument 'speed'"),
        ([3], "must be a mapping"),
    ],
)
def test_a_damaged_rule_is_refused(tmp_path, rule, message):
    save_model(UNet(base_channels=1, depth=1), tmp_path)
    rewritten(tmp_path / "model.safetensors", objects=rule)
    with pytest.raises(ValueError, match=f"must hold a model, but it cannot be read: .*{message}"):
        load_model(tmp_path)


def test_kinds_are_refused():
    model = UNet(base_channels=1, depth=1)
    with pytest.raises(ValueError, match=r"predict: grow must be an integer, got 1\.5"):
        predict(model, torch.rand(9, 9), output="instances", grow=1.5)
    with pytest.raises(ValueError, match="predict: min_area must be an integer, got nan"):
        predict(model, torch.rand(9, 9), output="instances", min_area=float("nan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_area": -1}, "predict: min_area must be >= 0, got -1"),
        ({"grow": 17}, r"predict: grow must be in \[0, 16\], got 17"),
        ({"seed_threshold": 1.0}, r"predict: seed_threshold must be in \[0, 1\), got 1\.0"),
        ({"seed_threshold": 0.5, "output": "labels"}, "must go with instances, got labels"),
        ({"grow": 1, "output": "labels"}, "must go with instances, got labels"),
        ({"min_area": 1, "output": "scores"}, "must go with instances, got scores"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        predict(
            UNet(base_channels=1, depth=1), torch.rand(9, 9), **{"output": "instances"} | options
        )
