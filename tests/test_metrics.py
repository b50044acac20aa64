import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.metrics import adapted_rand_error, variation_of_information

from unet_fast.metrics import (
    average_precision,
    detection,
    info_split_merge,
    iou,
    pixel_error,
    rand_split_merge,
    seg,
    v_info,
    v_rand,
)

maps = hnp.arrays(np.int32, (5, 6), elements=st.sampled_from([0, 1, 2, 300]))


def brute_seg(truth, prediction):
    scores = []
    for r in set(truth[truth > 0]):
        score = 0.0
        for s in set(prediction[prediction > 0]):
            common = ((truth == r) & (prediction == s)).sum()
            if common > 0.5 * (truth == r).sum():
                score = common / ((truth == r) | (prediction == s)).sum()
        scores.append(score)
    return np.mean(scores)


@settings(deadline=None, derandomize=True)
@given(maps, maps)
def test_equal_brute_force(truth, prediction):
    a, b = truth > 0, prediction > 0
    union = (a | b).sum()
    assert iou(truth, prediction) == ((a & b).sum() / union if union else 1)
    if a.any():
        assert seg(truth, prediction) == pytest.approx(brute_seg(truth, prediction))


def test_golden_values():
    truth = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]])
    half = torch.tensor([[5, 5, 0, 0], [5, 5, 0, 3]])
    assert iou(truth, half) == 5 / 8
    assert seg(truth, half) == 0.5  # the first is found whole, the second by a quarter
    assert iou(truth * 0, truth * 0) == 1
    assert seg(truth, truth * 7) == 1
    assert iou(truth.bool(), half.bool()) == 5 / 8


@pytest.mark.parametrize("metric", [iou, seg, pixel_error, v_rand, v_info, average_precision])
def test_rejects(metric):
    ones = np.ones((2, 2), int)
    with pytest.raises(TypeError, match="prediction must hold integers or bools, got float64"):
        metric(ones, ones / 2)
    with pytest.raises(ValueError, match=r"shape of truth, \(2, 2\), got \(2, 1\)"):
        metric(ones, ones[:, :1])
    if metric in (seg, v_rand, v_info):
        with pytest.raises(ValueError, match=r"\w+: truth must hold at least one object"):
            metric(ones * 0, ones)
    with pytest.raises(ValueError, match="truth must hold no negative ids, got -3"):
        metric(ones * -3, ones)


def test_thresholds_and_no_pixels():
    for threshold in (0.49, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must be in \[0.5, 1\), got "):
            detection([1], [1], threshold)
    with pytest.raises(ValueError, match="at least one pixel"):
        pixel_error(np.zeros((0, 3), int), np.zeros((0, 3), int))


def brute_shares(truth, prediction):
    """Of the pixels of reference objects the label pairs; background pixels are their own."""
    inside = truth.ravel() > 0
    a, b = truth.ravel()[inside].astype(int), prediction.ravel()[inside].astype(int)
    b = np.where(b > 0, b, 10**6 + np.arange(b.size))
    return a, b


@settings(deadline=None, derandomize=True, max_examples=200)
@given(maps, maps)
def test_split_and_merge_scores(truth, prediction):
    """Against sums over all pairs of labels, and against scikit-image."""
    if not (truth > 0).any():
        return
    a, b = brute_shares(truth, prediction)
    n = a.size
    p = np.array([[((a == i) & (b == j)).sum() / n for j in np.unique(b)] for i in np.unique(a)])
    rand = rand_split_merge(truth, prediction)
    assert rand.split == pytest.approx((p**2).sum() / (p.sum(1) ** 2).sum())
    assert rand.merge == pytest.approx((p**2).sum() / (p.sum(0) ** 2).sum())
    assert v_rand(truth, prediction) == rand.score

    def entropy(x):
        x = x[x > 0]
        result = -(x * np.log(x)).sum()
        return 0 if result < 1e-12 else result  # one object: its shares add up to 1 but for an ulp

    h_truth, h_found, h_both = entropy(p.sum(1)), entropy(p.sum(0)), entropy(p)
    information = h_truth + h_found - h_both
    info = info_split_merge(truth, prediction)
    assert info.split == pytest.approx(information / h_found if h_found else 1, abs=1e-9)
    assert info.merge == pytest.approx(information / h_truth if h_truth else 1, abs=1e-9)
    total = h_truth + h_found
    assert v_info(truth, prediction) == pytest.approx(
        2 * information / total if total else 1, abs=1e-9
    )

    # H(S|T) and H(T|S) in bits, after the relabelling.
    splits, merges = variation_of_information(a.reshape(1, -1), b.reshape(1, -1))
    assert info.split == pytest.approx(1 - splits * np.log(2) / h_found if h_found else 1, abs=1e-9)
    assert info.merge == pytest.approx(1 - merges * np.log(2) / h_truth if h_truth else 1, abs=1e-9)


def test_rand_of_large_maps_is_that_of_scikit_image():
    """Which leaves out pairs of a pixel with itself: of order 1 / n."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (20, 20)).repeat(10, 0).repeat(10, 1)
    prediction = np.where(rng.random(truth.shape) < 0.9, truth, rng.integers(0, 9, truth.shape))
    a, b = brute_shares(truth, prediction)
    error, recall, precision = adapted_rand_error(a, b)  # named the other way round there
    found = rand_split_merge(truth, prediction)
    assert found.score == pytest.approx(1 - error, abs=1e-3)
    assert {round(found.split, 3), round(found.merge, 3)} == {round(recall, 3), round(precision, 3)}


def test_golden_split_and_merge_scores():
    truth = [1, 1, 2, 2]
    rand, info = rand_split_merge(truth, [1, 1, 1, 2]), info_split_merge(truth, [1, 1, 1, 2])
    assert (rand.merge, rand.split, rand.score) == pytest.approx((0.6, 0.75, 2 / 3))
    assert (info.merge, info.split) == pytest.approx((0.311278, 0.383689), abs=1e-6)
    assert info.score == pytest.approx(0.343711, abs=1e-6)
    rand, info = rand_split_merge(truth, [1, 0, 2, 2]), info_split_merge(truth, [1, 0, 2, 2])
    assert (rand.merge, rand.split, rand.score) == pytest.approx((1, 0.75, 0.857143), abs=1e-6)
    assert (info.merge, info.split, info.score) == pytest.approx((1, 2 / 3, 0.8))
    assert v_rand([5, 5], [7, 7]) == v_info([5, 5], [7, 7]) == 1
    assert v_info([5, 5], [7, 8]) == 0
    assert info_split_merge([5, 5], [7, 8]).merge == 1


@settings(deadline=None, derandomize=True, max_examples=200)
@given(maps, maps, st.sampled_from([0.5, 0.7, 0.9]))
def test_detection(truth, prediction, threshold):
    pairs = []
    for r in set(truth[truth > 0]):
        for s in set(prediction[prediction > 0]):
            ratio = ((truth == r) & (prediction == s)).sum() / (
                (truth == r) | (prediction == s)
            ).sum()
            pairs += [ratio] if ratio > threshold else []
    found = detection(truth, prediction, threshold)
    assert found.found == len(pairs)
    assert found.found + found.missed == len(set(truth[truth > 0]))
    assert found.found + found.excess == len(set(prediction[prediction > 0]))
    total = found.found + found.missed + found.excess
    ap = len(pairs) / total if total else 1
    assert average_precision(truth, prediction, threshold) == pytest.approx(ap)
    pq = sum(pairs) / (len(pairs) + found.missed / 2 + found.excess / 2) if total else 1
    assert found.panoptic_quality == pytest.approx(pq)
    assert found.f1 == pytest.approx(2 * ap / (1 + ap))


def test_ids_may_be_anything():
    truth = np.array([[0, 2**40, 2**40, 7], [7, 7, 0, 3]])
    assert average_precision(truth, truth) == seg(truth, truth) == v_rand(truth, truth) == 1
    assert average_precision(truth.astype(np.uint64), truth) == 1
    assert average_precision([1, 1], [0, 0]) == 0
    assert average_precision([0, 0], [0, 0]) == 1
    assert detection([0, 0], [0, 0]).panoptic_quality == 1
    assert pixel_error(truth, truth > 5) == 1 / 8


def test_as_many_objects_as_pixels():
    """More pairs of objects than a table has room for."""
    truth = np.arange(1, 901).reshape(30, 30)
    assert seg(truth, truth) == v_rand(truth, truth) == average_precision(truth, truth) == 1
    halves = (truth + 1) // 2
    assert seg(truth, halves) == 0.5
    assert rand_split_merge(truth, halves).merge == pytest.approx(0.5)
    assert rand_split_merge(truth, halves).split == 1
    assert detection(truth, halves).found == 0
