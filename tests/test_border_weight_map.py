import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unet_fast import border_weight_map, reference, separate_touching, two_nearest

label_maps = hnp.arrays(
    np.int32,
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    elements=st.sampled_from([0, 0, 0, 1, 2, 7, 2**31 - 1]),
)


def brute_force(labels, spacing=(1, 1)):
    """Nearest pixel of every object from every pixel, the two smallest kept."""
    pixels = list(np.ndindex(labels.shape))
    first, second = np.full(labels.shape, np.inf), np.full(labels.shape, np.inf)
    for p in pixels:
        best = {}
        for q in pixels:
            if labels[q]:
                d = np.hypot(*((np.array(p) - q) * spacing))
                best[labels[q]] = min(best.get(labels[q], np.inf), d)
        nearest = [*sorted(best.values()), np.inf, np.inf]
        first[p], second[p] = nearest[:2]
    return first.astype(np.float32), second.astype(np.float32)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(label_maps, st.sampled_from([(1, 1), (2.0, 0.5)]))
def test_two_nearest_equals_brute_force(labels, spacing):
    expected = brute_force(labels, spacing)
    result = two_nearest(torch.from_numpy(labels), spacing=spacing)
    for r, e in zip(result, expected, strict=True):
        np.testing.assert_allclose(r, e, rtol=1e-6)
    if spacing == (1, 1):  # squared distances are integers
        for r, e in zip(result, expected, strict=True):
            np.testing.assert_array_equal(np.round(r.numpy() ** 2), np.round(e**2))


def random_labels(rng, shape):
    """Sparse to full, few or many objects, ids of any size."""
    ids = rng.choice([2, 3, 9, 2**31 - 1])
    filled = rng.random(shape) < rng.choice([0.02, 0.2, 0.9])
    return torch.from_numpy(np.where(filled, rng.integers(1, ids, shape), 0))


def test_two_nearest_equals_reference_on_random_maps(rng):
    """Exactly, for unit spacing: squared distances are integers."""
    for _ in range(1000):
        shape = rng.integers(1, 40, 2) if rng.random() < 0.7 else (2, *rng.integers(1, 12, 3))
        labels = random_labels(rng, tuple(shape))
        for result, expected in zip(
            two_nearest(labels), reference.two_nearest(labels), strict=True
        ):
            assert torch.equal(result, expected)


def test_two_nearest_with_spacing(rng):
    for _ in range(100):
        shape = (2, *rng.integers(1, 12, 3))
        labels, spacing = random_labels(rng, shape), tuple(rng.choice([0.5, 1, 2.3], 3))
        results = two_nearest(labels, spacing=spacing)
        expected = reference.two_nearest(labels, spacing=spacing)
        for r, e in zip(results, expected, strict=True):
            torch.testing.assert_close(r, e, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(9000, 3), (3, 9000), (200, 300), (1, 33000)], ids=str)
def test_two_nearest_over_long_distances(shape):
    """0 to 3 objects, far apart, on the frame."""
    labels = torch.zeros(shape, dtype=torch.int32)
    for object_, pixel in [(0, (0, 0)), (5, (0, 0)), (5, (-1, -1)), (7, (-1, 0)), (9, (0, -1))]:
        labels[pixel] = object_
        for result, expected in zip(
            two_nearest(labels), reference.two_nearest(labels), strict=True
        ):
            assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
)
def test_label_dtypes(dtype):
    labels = torch.tensor([[0, 127, 0, 3]]).to(dtype)
    assert two_nearest(labels)[1].tolist() == [[3, 2, 1, 2]]
    if dtype == torch.uint16:
        assert two_nearest(torch.tensor([[65535, 0, 1]]).to(dtype))[1].tolist() == [[2, 1, 2]]


def test_strided_labels_and_repeated_calls(rng):
    labels = random_labels(rng, (3, 50, 70))
    expected = reference.two_nearest(labels.transpose(1, 2))
    for _ in range(3):
        results = two_nearest(labels.transpose(1, 2))
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


def test_weights_equal_the_reference(rng):
    """Which has no limit to its reach."""
    for _ in range(50):
        labels = random_labels(rng, (1, *rng.integers(1, 90, 2)))
        for options in ({}, {"sigma": 1.5, "where": "everywhere"}, {"halo": (0.1, 8.0)}):
            result = border_weight_map(labels, **options)
            expected = reference.border_weight_map(labels, **options)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=2e-6)


def test_registration():
    labels = torch.tensor([[[[0, 1, 0, 2]]]], dtype=torch.int32)
    op = torch.ops.unet_fast.two_nearest.default
    torch.library.opcheck(op, (labels, 1.0, 1.0, 1.0, float("inf")))


def test_two_nearest_batches_and_volumes():
    labels = torch.zeros(2, 3, 4, 5, dtype=torch.int16)
    labels[0, 0, 0, 0], labels[0, 2, 3, 4], labels[1, 1, 1, 1] = 1, 5, 3
    first, second = two_nearest(labels)
    assert first.shape == labels.shape
    assert first[0, 0, 0, 0] == 0
    assert second[0, 0, 0, 0] == torch.tensor(4.0 + 9 + 16).sqrt()
    assert second[1].isinf().all()
    assert two_nearest(labels, spacing=(10, 1, 1))[0][1, 0, 1, 1] == 10
    for i, volume in enumerate(labels):
        assert torch.equal(two_nearest(volume[None])[0][0], first[i])
    assert two_nearest(torch.zeros(3, 3, dtype=torch.uint8))[0].isinf().all()
    assert two_nearest(torch.zeros(0, 3, 3, dtype=torch.uint8))[0].shape == (0, 3, 3)


# Two cells with one background pixel between them, then two with two between.
GAP = torch.tensor([[1, 0, 2, 0, 0, 3]])


def test_golden_border_terms():
    weights = border_weight_map(GAP)
    expected = torch.tensor([[1, 10.231163, 1, 9.352702, 9.352702, 1]])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    everywhere = border_weight_map(GAP, where="everywhere")
    torch.testing.assert_close(everywhere[0, 0], 1 + 10 * torch.tensor(-4 / 50).exp())
    one_cell = border_weight_map((GAP == 1).int())
    assert (one_cell == 1).all()
    ridge = torch.tensor([[1, 1, 2, 2]])  # d1 = 0, d2 = 1 on the carved pixels
    carved = separate_touching(ridge)
    weights = border_weight_map(ridge, foreground=carved > 0)
    assert weights[0, 1].item() == pytest.approx(10.801987, abs=1e-6)
    assert weights[0, 0] == 1


def test_class_weights():
    labels = torch.tensor([[1, 0, 0, 0]])
    pair = border_weight_map(labels, class_weight=(0.5, 2.0))
    assert pair.tolist() == [[2, 0.5, 0.5, 0.5]]
    assert torch.equal(border_weight_map(labels, class_weight=torch.tensor([0.5, 2.0])), pair)
    balanced = border_weight_map(torch.cat([labels, labels * 0])[:, None], class_weight="balanced")
    torch.testing.assert_close(balanced[0, 0], torch.tensor([2, 2 / 3, 2 / 3, 2 / 3]))
    assert (balanced[1] == 1).all()


def test_halo():
    one_cell = (GAP == 1).int()
    weights = border_weight_map(one_cell, halo=(0.1, 10.0), class_weight=(0.1, 1.0))
    assert weights[0, 0] == 1
    assert weights[0, 1].item() == pytest.approx(0.1 + 0.9 * np.exp(-1 / 200), abs=1e-6)


def test_separate_touching():
    labels = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 3], [5, 5, 0, 0]])
    two_sided = [[1, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0], [5, 5, 0, 0]]
    assert separate_touching(labels).tolist() == two_sided
    one_sided = [[1, 1, 0, 2], [1, 0, 0, 2], [0, 0, 0, 0], [5, 5, 0, 0]]
    assert separate_touching(labels, "one_sided").tolist() == one_sided
    assert torch.equal(separate_touching(labels, "none"), labels)
    diagonal = torch.tensor([[1, 0], [0, 2]])
    assert torch.equal(separate_touching(diagonal), diagonal)
    assert separate_touching(diagonal, "one_sided").tolist() == [[1, 0], [0, 0]]
    volume = torch.zeros(1, 2, 2, 2, dtype=torch.uint16)
    volume[0, 0], volume[0, 1] = 1, 2
    assert (separate_touching(volume) == 0).all()
    assert separate_touching(volume, "one_sided")[0, 0].float().min() == 1


def transformations(x):
    """The eight flips and right-angle rotations of the last two axes."""
    for turns, flip in itertools.product(range(4), (False, True)):
        y = torch.rot90(x, turns, (-2, -1))
        yield y.flip(-1) if flip else y


@settings(deadline=None, derandomize=True, max_examples=30)
@given(label_maps)
def test_invariances(labels):
    labels = torch.from_numpy(labels)
    renamed = torch.where(labels == 1, 99, torch.where(labels == 7, 1, labels))
    weights = border_weight_map(labels)
    assert torch.equal(border_weight_map(renamed), weights)
    batch = border_weight_map(torch.stack([labels, labels * 0]))
    assert torch.equal(batch[0], weights)
    pairs = zip(transformations(labels), transformations(weights), strict=True)
    for moved, expected in pairs:
        torch.testing.assert_close(border_weight_map(moved), expected)
    carved = separate_touching(labels)
    for moved, expected in zip(transformations(labels), transformations(carved), strict=True):
        assert torch.equal(separate_touching(moved), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: two_nearest(x.float()), TypeError, "labels must be an integer tensor, got"),
        (lambda x: two_nearest(x[0]), ValueError, r"labels must be \(H, W\).*got \(3,\)"),
        (lambda x: two_nearest(x, spacing=(1,)), ValueError, r"spacing must be 2 values > 0"),
        (lambda x: two_nearest(x, spacing=(1, 0)), ValueError, r"got \(1, 0\)"),
        (lambda x: two_nearest(-x), ValueError, "^two_nearest: labels must be >= 0, got -1$"),
        (lambda x: two_nearest(x.long() * 2**31), ValueError, "labels must be <= 2147483647, got"),
        (lambda x: two_nearest(-x.long() * 2**31), ValueError, "labels must be >= 0, got -21"),
        (lambda x: border_weight_map(-x), ValueError, "^border_weight_map: labels must be >= 0"),
        (lambda x: border_weight_map(x, w0=-1), ValueError, "w0 must be >= 0, got -1"),
        (lambda x: border_weight_map(x, sigma=0), ValueError, "sigma must be > 0, got 0"),
        (lambda x: border_weight_map(x, where="x"), ValueError, "where must be background or"),
        (lambda x: border_weight_map(x, class_weight="x"), ValueError, "class_weight must be"),
        (lambda x: border_weight_map(x, class_weight=(1, 2, 3)), ValueError, "two weights >= 0"),
        (lambda x: border_weight_map(x, foreground=x), ValueError, "foreground must be bool of"),
        (lambda x: border_weight_map(x, halo=(2, 1)), ValueError, "halo must be"),
        (lambda x: separate_touching(x, "both"), ValueError, "mode must be two_sided"),
    ],
)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 3, dtype=torch.int32))
