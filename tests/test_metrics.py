import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unet_fast.metrics import iou, seg

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


@pytest.mark.parametrize("metric", [iou, seg])
def test_rejects(metric):
    ones = np.ones((2, 2), int)
    with pytest.raises(TypeError, match="prediction must hold integers or bools, got float64"):
        metric(ones, ones / 2)
    with pytest.raises(ValueError, match=r"shape of truth, \(2, 2\), got \(2, 1\)"):
        metric(ones, ones[:, :1])
    with pytest.raises(ValueError, match="seg: truth must hold at least one object"):
        seg(ones * 0, ones)
