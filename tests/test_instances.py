"""Objects made of a predicted mask."""

import json
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unet_fast import UNet, load_model, metrics, predict, save_model, separate_touching
from unet_fast.components import REACH, Objects
from unet_fast.demo import SAMPLE
from unet_fast.imageio import read_labels
from unet_fast.unet import pack, unpack

maps = hnp.arrays(np.int32, (7, 9), elements=st.sampled_from([0, 0, 0, 1, 2, 3]))


def steps_from(labels, value):
    """Steps along the axes from every pixel to an object, through anything."""
    far = 10**6
    steps = np.where(labels == value, 0, far)
    queue = deque(map(tuple, np.argwhere(labels == value)))
    while queue:
        row, column = queue.popleft()
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= r < steps.shape[0] and 0 <= c < steps.shape[1]
            if inside and steps[r, c] == far:
                steps[r, c] = steps[row, column] + 1
                queue.append((r, c))
    return steps


@settings(deadline=None, derandomize=True)
@given(maps, st.integers(0, 3))
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
    np.testing.assert_array_equal(Objects(grow=grow).grown(labels, labels * 0), expected)


def test_grown_back_is_what_was_carved():
    labels = np.zeros((12, 14), int)
    labels[2:10, 1:6], labels[2:10, 6:13] = 1, 2
    for mode in ("two_sided", "one_sided"):
        carved = separate_touching(torch.from_numpy(labels), mode).numpy()
        assert (carved != labels).any()
        grown = Objects(grow=1).of_mask(carved > 0)
        if mode == "two_sided":
            np.testing.assert_array_equal(grown, labels)
        else:  # who had lost the line cannot be told
            np.testing.assert_array_equal(grown > 0, labels > 0)
            assert grown.max() == 2


def test_growing_back_mends_real_nuclei():
    """The carved truth of the bundled images, relabelled, is nearer to the truth afterwards."""
    truth = [read_labels(file) for file in sorted((SAMPLE / "train" / "labels").iterdir())]
    masks = [separate_touching(torch.from_numpy(x), "two_sided").numpy() > 0 for x in truth]
    plain = metrics.seg(truth, [Objects().of_mask(x) for x in masks])
    grown = metrics.seg(truth, [Objects(grow=1).of_mask(x) for x in masks])
    assert plain < grown
    assert grown > 0.98


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.uint8, (6, 8), elements=st.sampled_from([0, 1, 1, 2])))
def test_seeds_grow_into_foreground(states):
    """Each pixel of foreground goes to the seed that reaches it first through foreground."""
    found = Objects().of(states)
    seeds = Objects().of_mask(states == 2)
    np.testing.assert_array_equal(found[states == 2], seeds[states == 2])
    assert not found[states == 0].any()
    expected = seeds.copy()
    queue = deque(sorted(map(tuple, np.argwhere(seeds)), key=lambda at: seeds[at]))
    while queue:  # first come, first served, the smaller number first
        row, column = queue.popleft()
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= r < states.shape[0] and 0 <= c < states.shape[1]
            if inside and states[r, c] == 1 and expected[r, c] == 0:
                expected[r, c] = expected[row, column]
                queue.append((r, c))
    np.testing.assert_array_equal(found, expected)


def test_growth_into_foreground_ends():
    states = np.full((3, 50), 1)
    states[1, 0] = 2
    found = Objects().of(states)
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
        np.testing.assert_array_equal(found.numpy(), Objects().of(states))
    assert found.max() > predict(model, image, output="instances").max()


def test_small_parts_are_left_out_before_the_rest_grows():
    mask = np.array([[1, 1, 0, 1, 0, 1, 1]])
    np.testing.assert_array_equal(Objects().of_mask(mask), [[1, 1, 0, 2, 0, 3, 3]])
    np.testing.assert_array_equal(Objects(min_area=2).of_mask(mask), [[1, 1, 0, 0, 0, 2, 2]])
    np.testing.assert_array_equal(
        Objects(min_area=2, grow=1).of_mask(mask), [[1, 1, 0, 0, 0, 2, 2]]
    )
    np.testing.assert_array_equal(
        Objects(min_area=2, grow=2).of_mask(mask), [[1, 1, 1, 1, 2, 2, 2]]
    )
    np.testing.assert_array_equal(Objects(min_area=3).of_mask(mask), np.zeros((1, 7)))


def test_predict_takes_the_width_of_training(tmp_path):
    torch.manual_seed(0)
    model = UNet(base_channels=4, depth=1)
    image = torch.rand(40, 50)
    scores = predict(model, image, output="scores")
    with torch.no_grad():  # as much foreground as leaves objects with gaps between them
        model.head.bias[1] -= (scores[1] - scores[0]).quantile(0.7)
    mask = predict(model, image, output="labels").numpy()
    plain = predict(model, image, output="instances").numpy()
    np.testing.assert_array_equal(plain, Objects().of_mask(mask))
    model.ridge_width = 2
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.ridge_width == 2
    grown = predict(loaded, image, output="instances", tile=16).numpy()
    np.testing.assert_array_equal(grown, Objects(grow=2).of_mask(mask))
    assert (grown != plain).any()
    large = predict(loaded, image, output="instances", min_area=9, grow=0).numpy()
    np.testing.assert_array_equal(large, Objects(min_area=9).of_mask(mask))


def test_models_of_before_do_not_grow(tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(UNet(base_channels=1, depth=1), file)
    weights, description = unpack(file, "a model")
    del description["ridge_width"]
    file.write_bytes(pack(weights, json.loads(json.dumps(description))))
    assert load_model(file).ridge_width == 0


def test_kinds_are_refused():
    model = UNet(base_channels=1, depth=1)
    with pytest.raises(TypeError, match=r"predict: grow must be an integer, got 1\.5"):
        predict(model, torch.rand(9, 9), output="instances", grow=1.5)
    with pytest.raises(TypeError, match="predict: min_area must be an integer, got nan"):
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
