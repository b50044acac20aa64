import dataclasses
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from budget import examples, rounds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch._subclasses.fake_tensor import FakeTensorMode

import unet_fast
from unet_fast import BorderWeights, border_weight_map, reference, separate_touching, two_nearest
from unet_fast.images.files import read_labels
from unet_fast.ops import border_weights

OPS = torch.ops.unet_fast
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
RIDGES = ("none", "one_sided", "two_sided")
# Of float32 weights: a few units in the last place, from the square in the exponent.
ROUNDING = 1e-6

label_maps = hnp.arrays(
    np.int32,
    st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 40)),
        st.tuples(st.just(1), *[st.integers(1, 6)] * 3),
    ),
    elements=st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2, 7, 2**31 - 1]),
    fill=st.just(0),
)


def squared_distances(labels, spacing):
    """From every pixel to the nearest pixel of every object, the two least; by all pairs."""
    pixels = np.argwhere(np.ones_like(labels)) * spacing
    first, second = np.full((2, labels.size), np.inf)
    for label in np.unique(labels[labels > 0]):
        offsets = pixels[:, None] - np.argwhere(labels == label) * spacing
        nearest = (offsets**2).sum(-1).min(1)
        second = np.minimum(second, np.maximum(first, nearest))
        first = np.minimum(first, nearest)
    return first.reshape(labels.shape), second.reshape(labels.shape)


@examples(2000)
@given(label_maps)
def test_two_nearest_equals_brute_force(labels):
    """Exactly: squared distances are integers at unit spacing."""
    images = labels[None] if labels.ndim == 2 else labels
    results = two_nearest(torch.from_numpy(images))
    for image, *distances in zip(images, *results, strict=True):
        for result, squares in zip(distances, squared_distances(image, 1), strict=True):
            np.testing.assert_array_equal(result, np.sqrt(squares).astype(np.float32))


@examples(200)
@given(label_maps, st.tuples(*[st.sampled_from([0.5, 1.0, 2.3])] * 3))
def test_two_nearest_with_spacing_equals_brute_force(labels, spacing):
    images = labels[None] if labels.ndim == 2 else labels
    spacing = spacing[: images.ndim - 1]
    results = two_nearest(torch.from_numpy(images), spacing=spacing)
    for image, *distances in zip(images, *results, strict=True):
        for result, squares in zip(distances, squared_distances(image, spacing), strict=True):
            np.testing.assert_allclose(result, np.sqrt(squares), rtol=2e-7)


def random_labels(rng, shape):
    """Sparse to full, few or many objects, ids of any size."""
    ids = rng.integers(1, 2**31, rng.choice([1, 2, 8, 30]))
    filled = rng.random(shape) < rng.choice([0.02, 0.2, 0.9])
    return torch.from_numpy(np.where(filled, rng.choice(ids, shape), 0))


def random_cells(rng, shape, cells):
    """Discs that touch, as in a crowded image."""
    centres = rng.random((cells, len(shape))) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid[..., None, :] - centres, axis=-1)
    radius = 0.5 * (np.prod(shape) / cells) ** (1 / len(shape))
    return torch.from_numpy(np.where(distance.min(-1) < radius, distance.argmin(-1) + 1, 0))


def test_two_nearest_equals_the_reference_on_larger_maps(device, rng):
    for _ in range(300 if device.type == "cpu" else 100):
        flat = rng.random() < 0.7
        shape = (1, *rng.integers(1, 150, 2)) if flat else (2, *rng.integers(1, 20, 3))
        labels = random_labels(rng, shape)
        results = two_nearest(labels.to(device))
        for result, expected in zip(results, reference.two_nearest(labels), strict=True):
            assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize(
    "shape", [(9000, 3), (3, 9000), (200, 300), (1, 33000), (1, 70, 3, 300)], ids=str
)
def test_two_nearest_over_long_distances(device, shape):
    """0 to 3 objects, far apart, on the frame."""
    labels = torch.zeros(shape, dtype=torch.int32)
    ends = [(0,) * len(shape), (-1,) * len(shape), (*[-1] * (len(shape) - 1), 0)]
    for id_, pixel in [(0, ends[0]), (5, ends[0]), (5, ends[1]), (7, ends[2]), (9, ends[0])]:
        labels[pixel] = id_
        results = two_nearest(labels.to(device))
        for result, expected in zip(results, reference.two_nearest(labels), strict=True):
            assert torch.equal(result.cpu(), expected)


def test_far_objects_among_many(device, rng):
    """Searches that skip whole stretches, from rows whose neighbours were searched before."""
    labels = torch.zeros(300, 900, dtype=torch.int64)
    labels[::60, :40] = torch.arange(1, 41)
    labels[20:280, 700:] = random_cells(rng, (260, 200), 4) + 100
    labels[150:, 300:302] = 77
    for result, expected in zip(
        two_nearest(labels.to(device)), reference.two_nearest(labels), strict=True
    ):
        assert torch.equal(result.cpu(), expected)


@examples(30)
@given(st.integers(0, 10**6))
def test_few_far_objects(seed):
    """Single pixels, some at equal distances; rows of up to six objects and of more."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, [5, 120, 700][3 - rng.choice([2, 3]) :])
    labels = torch.zeros(tuple(shape), dtype=torch.int32)
    pixels = rng.integers(0, shape, (rng.choice([1, 2, 3, 20]), len(shape)))
    for number, pixel in enumerate(np.concatenate([pixels, shape - 1 - pixels])):
        labels[tuple(pixel)] = number % rng.choice([2, 3, 40]) + 1
    for result, expected in zip(
        two_nearest(labels[None]), reference.two_nearest(labels[None]), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_dtypes(device, dtype):
    most = min(torch.iinfo(dtype).max, 2**31 - 1)
    labels = torch.tensor([[0, most, 0, 3, 3]]).to(dtype).to(device)
    assert two_nearest(labels)[1].tolist() == [[3, 2, 1, 2, 3]]
    separated = separate_touching(torch.tensor([[3, most]]).to(dtype).to(device), "one_sided")
    assert separated.dtype == dtype
    assert separated.tolist() == [[3, 0]]
    target, weights = BorderWeights(ignore_label=3, class_weight=None)(labels)
    assert target.tolist() == [[0, 1, 0, 255, 255]]
    assert weights.tolist() == [[1, 1, 1, 0, 0]]


def test_strided_labels_and_repeated_calls(device, rng):
    labels = random_labels(rng, (3, 50, 70)).transpose(1, 2)
    expected = reference.two_nearest(labels)
    moved = labels.to(device)
    for _ in range(3):
        results = two_nearest(moved)
        assert all(torch.equal(r.cpu(), e) for r, e in zip(results, expected, strict=True))
    pictures = [border_weight_map(moved, class_weight="balanced") for _ in range(2)]
    assert torch.equal(*pictures)


def test_same_bits_on_any_number_of_threads(rng):
    labels = random_cells(rng, (130, 90), 30)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(BorderWeights.paper_2015()(labels)[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


MAPS = [
    {},
    {"sigma": 0.21, "where": "everywhere"},
    {"sigma": 0.42, "halo": (0.0, 0.3)},
    {"sigma": 1.5, "where": "everywhere"},
    {"w0": 50.0, "sigma": 6.0, "halo": (0.1, 10.0), "class_weight": (0.1, 1.0)},
    {"class_weight": "balanced", "halo": (0.5, 2.0), "where": "everywhere"},
    {"sigma": 300.0},
    {"w0": 0.0, "class_weight": (2.0, 3.0)},
]


@pytest.mark.parametrize("options", MAPS, ids=str)
def test_weights_equal_the_reference(device, rng, options):
    """Which has no limit to its reach. float32 has 24 bits; a kernel may err by a few units."""
    for case in range(12):
        shape = [(1, 60, 90), (2, 33, 17), (1, 5, 12, 21)][case % 3]
        labels = random_labels(rng, shape) if case % 2 else random_cells(rng, shape[1:], 8)[None]
        more = {"foreground": labels % 2 == 0} if case % 4 == 0 else {}
        labels = labels * 65536 if case % 8 == 0 else labels  # beyond 16 bits
        if case % 5 == 0:
            more["spacing"] = tuple(rng.choice([0.5, 1.7], labels.dim() - 1))
        expected = reference.border_weight_map(labels, **options, **more)
        more = {k: v.to(device) if k == "foreground" else v for k, v in more.items()}
        result = border_weight_map(labels.to(device), **options, **more)
        torch.testing.assert_close(result.cpu(), expected, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.21, 0.35, 0.42, 0.7, 5.0, 60.0])
def test_reach_of_terms_counts_the_last_pixel_along_both_axes(device, sigma):
    """Where the border term of neighbours is small but not nothing."""
    row = torch.zeros(1, 40, dtype=torch.int32)
    row[0, [0, 2, 5, 30]] = torch.tensor([1, 2, 3, 70000], dtype=torch.int32)
    near = torch.tensor([[1, 0, 2]])  # with nothing around that would be searched for anyway
    for labels in (row, row.T, near, near.T, near[:, ::2]):
        for where, cells in itertools.product(("background", "everywhere"), (None, labels > 1)):
            expected = reference.border_weight_map(
                labels, sigma=sigma, where=where, foreground=cells
            )
            result = border_weight_map(
                labels.to(device),
                sigma=sigma,
                where=where,
                foreground=None if cells is None else cells.to(device),
            )
            torch.testing.assert_close(result.cpu(), expected, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("spacing", [(0.3, 0.7), (1e-12, 3e-12), (1e12, 1e12)])
def test_extreme_spacing(device, rng, spacing):
    labels = random_cells(rng, (30, 50), 6)
    expected = reference.two_nearest(labels, spacing=spacing)
    for sizes in (spacing, np.array(spacing)):
        results = two_nearest(labels.to(device), spacing=sizes)
        for result, e in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), e, rtol=1.2e-7, atol=0)
    options = {"spacing": spacing, "sigma": 5 * spacing[1]}
    result = border_weight_map(labels.to(device), **options)
    expected = reference.border_weight_map(labels, **options)
    torch.testing.assert_close(result.cpu(), expected, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("class_weight", [None, "balanced", (0.5, 1.0, 2.0, 0.25)], ids=str)
def test_border_weights_equal_the_reference(device, rng, ridge, class_weight):
    """With several classes, ignored labels and ignored classes."""
    options = {
        "ridge": ridge,
        "class_weight": class_weight,
        "ignore_label": 4,
        "halo": (0.2, 3.0),
        "num_classes": 4,
    }
    for shape in [(2, 40, 33), (1, 6, 9, 20)]:
        labels = random_cells(rng, shape, 20)
        classes = torch.from_numpy(rng.choice([0, 1, 2, 3, 255], 30))[labels]
        expected = reference.border_weights(labels, classes, **options)
        result = border_weights(labels.to(device), classes.to(device), **options)
        assert torch.equal(result[0].cpu(), expected[0])
        torch.testing.assert_close(result[1].cpu(), expected[1], rtol=ROUNDING, atol=1e-8)


def falk_2019(labels, classes, classes_with_background):
    """The rules of the published code (class TrainingSample), pixel by pixel, in double."""
    height, width = labels.shape
    target = classes.copy()
    for y, x in np.ndindex(height, width):
        for dy, dx in [(-1, -1), (-1, 0), (-1, 1), (0, -1)]:
            v, u = y + dy, x + dx
            inside = 0 <= v < height and 0 <= u < width
            if not inside or classes[y, x] in (0, 255) or classes[v, u] != classes[y, x]:
                continue
            if labels[v, u] and labels[y, x] and labels[v, u] != labels[y, x]:
                target[y, x] = 0
    weights = np.where(target == 0, 0.1, 1.0)
    for c in range(1, classes_with_background):
        squares = squared_distances(np.where(classes == c, labels, 0), 1)
        d1, d2 = np.sqrt(squares)
        terms = 50 * np.exp(-((d1 + d2) ** 2) / 72) + 0.9 * np.exp(-(d1**2) / 200)
        weights += np.where(target == 0, terms, 0)
    weights[target == 255] = 0
    return target, weights


@examples(100)
@given(
    hnp.arrays(
        np.int64,
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        elements=st.sampled_from([0, 1, 2, 3, 4, 5, 9]),
    )
)
def test_falk_2019_equals_the_published_rules(labels):
    """Objects 4 and 5 are of a second class, 9 is ignored."""
    classes = np.select([labels == 0, labels == 9, labels > 3], [0, 255, 2], 1)
    target, weights = falk_2019(labels, classes, 3)
    preset = dataclasses.replace(
        BorderWeights.falk_2019(), ignore_label=9, class_weight=(0.1, 1.0, 1.0)
    )
    ours = preset(torch.from_numpy(labels), torch.from_numpy(classes))
    np.testing.assert_array_equal(ours[0], target)
    np.testing.assert_allclose(ours[1], weights, rtol=ROUNDING)


def test_registration(device, rng):
    labels = torch.from_numpy(rng.integers(0, 6, (2, 1, 9, 8))).to(torch.int16).to(device)
    classes = torch.where(labels > 0, 1, 0).to(torch.uint8)
    check = torch.library.opcheck
    check(OPS.two_nearest.default, (labels, [1.0, 2.0, 1.0]))
    check(OPS.separate_touching.default, (labels, 2))
    settings_ = (2, 1, 3, 10.0, 5.0, False, 0.9, 10.0, [1.0, 1.0, 1.0])
    check(OPS.border_weights.default, (labels, classes, None, None, *settings_))
    check(OPS.border_weights.default, (labels, None, labels > 2, torch.ones(2), *settings_))


def test_compiles_without_graph_breaks(device, rng):
    labels = random_cells(rng, (40, 50), 12).to(device)

    def step(x):
        target, weights = BorderWeights.paper_2015()(x)
        return target, weights, *two_nearest(x), separate_touching(x), border_weight_map(x)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(labels), step(labels), strict=True):
        assert torch.equal(result, expected)


def test_captured_in_a_cuda_graph(device, rng):
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA")
    labels = random_cells(rng, (64, 80), 20).to(device)
    weigh = BorderWeights.paper_2015()
    expected = weigh(labels)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weigh(labels)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = weigh(labels)
    for result in results:
        result.zero_()
    graph.replay()
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


def test_never_waits_for_the_device(device, rng):
    if device.type != "cuda":
        pytest.skip("the host waits for CUDA devices only")
    labels = random_cells(rng, (64, 80), 20).to(device)
    classes = torch.where(labels > 5, 2, 1).where(labels > 0, 0)
    weights = torch.tensor([1.0, 2.0], device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        two_nearest(labels)
        separate_touching(labels)
        border_weight_map(labels, class_weight=weights)
        border_weight_map(labels, class_weight=(1, 2))
        BorderWeights.paper_2015()(labels)
        BorderWeights.falk_2019()(labels)
        BorderWeights.paper_2015()(labels, classes, num_classes=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spacing", [None, (2.5, 1.0, 0.5)])
@pytest.mark.parametrize("options", [{"w0": 10.0, "sigma": 2.0}, {"halo": (0.1, 1.5), "w0": 0}])
def test_a_volume_in_blocks(device, options, spacing):
    """With a rim as wide as the terms are above 2^-28, a part gets the weights of the whole."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(60, 31, 70, dtype=torch.int32)
    for i in range(90):
        z, y, x = (torch.randint(0, side - 2, (), generator=generator) for side in labels.shape)
        labels[z : z + 3, y : y + 3, x : x + 3] = i + 1
    labels = labels.to(device)
    settings = {"dims": 3, "spacing": spacing, **options}
    whole = border_weight_map(labels, **settings)
    sigma, height = options.get("sigma", 1.5), options["w0"] or 0.9
    reach = sigma * math.sqrt(2 * math.log(height * 2**28))
    rims = [math.ceil(reach / size) for size in spacing or (1, 1, 1)]
    for first in itertools.product(*(range(0, side, 25) for side in labels.shape)):
        around = tuple(
            slice(max(0, f - rim), f + 25 + rim) for f, rim in zip(first, rims, strict=True)
        )
        part = border_weight_map(labels[around].contiguous(), **settings)
        inner = tuple(
            slice(f - a.start, f - a.start + 25) for f, a in zip(first, around, strict=True)
        )
        wanted = whole[tuple(slice(f, f + 25) for f in first)]
        assert torch.equal(part[inner], wanted)


def test_batches_and_volumes(device):
    labels = torch.zeros(2, 3, 4, 5, dtype=torch.int16)
    labels[0, 0, 0, 0], labels[0, 2, 3, 4], labels[1, 1, 1, 1] = 1, 5, 3
    labels = labels.to(device)
    first, second = two_nearest(labels)
    assert first.shape == labels.shape
    assert first[0, 0, 0, 0] == 0
    assert second[0, 0, 0, 0].item() == np.float32(np.sqrt(4.0 + 9 + 16))
    assert second[1].isinf().all()
    assert two_nearest(labels, spacing=(10, 1, 1))[0][1, 0, 1, 1] == 10
    for i, volume in enumerate(labels):
        assert torch.equal(two_nearest(volume[None])[0][0], first[i])
    nothing = torch.zeros(3, 3, dtype=torch.uint8, device=device)
    assert two_nearest(nothing)[0].isinf().all()
    assert (border_weight_map(nothing, class_weight="balanced") == 1).all()
    full = torch.ones(3, 3, dtype=torch.uint8, device=device)
    assert (two_nearest(full)[0] == 0).all()
    assert two_nearest(full)[1].isinf().all()
    assert (border_weight_map(full) == 1).all()
    for shape in [(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 0, 2, 2)]:
        empty = torch.zeros(shape, dtype=torch.uint8, device=device)
        assert two_nearest(empty)[0].shape == shape
        assert separate_touching(empty).shape == shape
        assert [x.shape for x in BorderWeights()(empty)] == [shape, shape]


# Two cells with one background pixel between them, then two with two between.
GAP = torch.tensor([[1, 0, 2, 0, 0, 3]])


def test_golden_border_terms(device):
    weights = border_weight_map(GAP.to(device)).cpu()
    expected = torch.tensor([[1, 10.231163, 1, 9.352702, 9.352702, 1]])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    everywhere = border_weight_map(GAP.to(device), where="everywhere").cpu()
    torch.testing.assert_close(everywhere[0, 0], 1 + 10 * torch.tensor(-4 / 50).exp())
    one_cell = border_weight_map((GAP == 1).int().to(device))
    assert (one_cell == 1).all()
    ridge = torch.tensor([[1, 1, 2, 2]], device=device)  # d1 = 0, d2 = 1 on the carved pixels
    carved = separate_touching(ridge)
    weights = border_weight_map(ridge, foreground=carved > 0)
    assert weights[0, 1].item() == pytest.approx(10.801987, abs=1e-6)
    assert weights[0, 0] == 1


def test_class_weights(device):
    labels = torch.tensor([[1, 0, 0, 0]], device=device)
    pair = border_weight_map(labels, class_weight=(0.5, 2.0))
    assert pair.tolist() == [[2, 0.5, 0.5, 0.5]]
    for place in ("cpu", device):
        table = torch.tensor([0.5, 2.0], device=place)
        assert torch.equal(border_weight_map(labels, class_weight=table), pair)
    batch = torch.cat([labels, labels * 0])[:, None]
    balanced = border_weight_map(batch, class_weight="balanced").cpu()
    torch.testing.assert_close(balanced[0, 0], torch.tensor([2, 2 / 3, 2 / 3, 2 / 3]))
    assert (balanced[1] == 1).all()


def test_halo(device):
    one_cell = (GAP == 1).int().to(device)
    weights = border_weight_map(one_cell, halo=(0.1, 10.0), class_weight=(0.1, 1.0))
    assert weights[0, 0] == 1
    assert weights[0, 1].item() == pytest.approx(0.1 + 0.9 * np.exp(-1 / 200), abs=1e-6)


def test_infinite_distances_add_nothing_to_the_widest_terms(device):
    one_cell = (GAP == 1).int().to(device)
    for sigma in (1e-30, 1e30, 1e300):
        assert (border_weight_map(one_cell, sigma=sigma) == 1).all()
        assert border_weight_map(GAP.to(device), sigma=sigma).isfinite().all()


def test_separate_touching(device):
    labels = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 3], [5, 5, 0, 0]], device=device)
    two_sided = [[1, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0], [5, 5, 0, 0]]
    assert separate_touching(labels).tolist() == two_sided
    one_sided = [[1, 1, 0, 2], [1, 0, 0, 2], [0, 0, 0, 0], [5, 5, 0, 0]]
    assert separate_touching(labels, "one_sided").tolist() == one_sided
    assert torch.equal(separate_touching(labels, "none"), labels)
    diagonal = torch.tensor([[1, 0], [0, 2]], device=device)
    assert torch.equal(separate_touching(diagonal), diagonal)
    assert separate_touching(diagonal, "one_sided").tolist() == [[1, 0], [0, 0]]
    volume = torch.zeros(1, 2, 2, 2, dtype=torch.uint16)
    volume[0, 0], volume[0, 1] = 1, 2
    volume = volume.to(device)
    assert not separate_touching(volume).cpu().to(torch.int32).any()
    assert (separate_touching(volume, "one_sided")[0, 0].cpu().to(torch.int32) == 1).all()


@pytest.mark.parametrize("mode", RIDGES)
def test_separate_touching_equals_the_reference(device, rng, mode):
    for shape in [(2, 31, 40), (1, 1, 1), (1, 7, 6, 19)]:
        labels = random_labels(rng, shape)
        labels = torch.where(labels > 0, labels % 4, 0)
        result = separate_touching(labels.to(device), mode)
        assert torch.equal(result.cpu(), reference.separate_touching(labels, mode))


def transformations(x):
    """The eight flips and right-angle rotations of the last two axes."""
    for turns, flip in itertools.product(range(4), (False, True)):
        y = torch.rot90(x, turns, (-2, -1))
        yield y.flip(-1) if flip else y


@examples(30)
@given(
    hnp.arrays(
        np.int32,
        st.tuples(st.integers(1, 8), st.integers(1, 8)),
        elements=st.sampled_from([0, 0, 0, 1, 2, 7]),
    )
)
def test_invariances(labels):
    labels = torch.from_numpy(labels)
    renamed = torch.where(labels == 1, 99, torch.where(labels == 7, 1, labels))
    weights = border_weight_map(labels)
    assert torch.equal(border_weight_map(renamed), weights)
    batch = border_weight_map(torch.stack([labels, labels * 0]))
    assert torch.equal(batch[0], weights)
    target, both = BorderWeights.paper_2015()(labels)
    for moved, *expected in zip(
        *map(transformations, (labels, weights, target, both)), strict=True
    ):
        torch.testing.assert_close(border_weight_map(moved), expected[0], rtol=1e-7, atol=0)
        again = BorderWeights.paper_2015()(moved)
        assert torch.equal(again[0], expected[1])
        torch.testing.assert_close(again[1], expected[2], rtol=1e-7, atol=0)
    carved = separate_touching(labels)
    for moved, expected in zip(transformations(labels), transformations(carved), strict=True):
        assert torch.equal(separate_touching(moved), expected)


def test_on_host(host_kernels, rng):
    """The CUDA kernels, run on the host; columns of 17 rows and more are cut into segments."""
    shapes = [(2, 1, 13, 21), (1, 1, 1, 300), (1, 4, 5, 9), (1, 1, 300, 3), (1, 2, 40, 5)]
    for case in range(rounds(25, host_kernels)):
        shape = shapes[case % 5]
        labels = random_labels(rng, shape)
        typed = torch.where(labels > 0, labels % 5, 0).to(INTEGERS[case % 6])
        spacing = [1.0, 1.0, 1.0] if case % 2 else list(rng.choice([0.5, 1.7], 3))
        exact = case % 2 == 1
        results = host_kernels.two_nearest(labels.numpy(), spacing, exact)
        batch = labels if labels.shape[1] > 1 else labels[:, 0]
        axes = spacing if labels.shape[1] > 1 else spacing[1:]
        for result, expected in zip(
            results, reference.two_nearest(batch, spacing=axes), strict=True
        ):
            result = torch.from_numpy(result).reshape(batch.shape)
            torch.testing.assert_close(result, expected, rtol=0 if exact else 2e-7, atol=0)
        ridge = case // 2 % 3
        separated = host_kernels.separate_touching(typed.numpy(), ridge)
        batch = typed if typed.shape[1] > 1 else typed[:, 0]
        expected = reference.separate_touching(batch, RIDGES[ridge])
        np.testing.assert_array_equal(separated.reshape(batch.shape), expected)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("class_weight", [None, (0.5, 1.0, 2.0, 0.25)], ids=str)
@pytest.mark.parametrize("ridge", [1, 2])
def test_weights_on_host(host_kernels, rng, depth, class_weight, ridge):
    """70 rows are eight segments of the sweeps along columns."""
    shape = (2, 70, 9) if depth == 1 else (1, depth, 12, 11)
    labels = random_cells(rng, shape, 20)
    classes = torch.from_numpy(rng.choice([0, 1, 2, 3, 255], 30))[labels]
    volumes = labels.reshape(shape[0], depth, *shape[-2:]).numpy()
    as_bytes = classes.to(torch.uint8).reshape(volumes.shape).numpy()
    spacing = [1.0, 1.0, 1.0]
    numbers = "int32" if depth == 1 else "float"
    settings_ = (4, ridge, 4, 10.0, 2.0, False, 0.8, 3.0, spacing, numbers)
    results = host_kernels.border_weights(volumes, as_bytes, None, class_weight, *settings_)
    expected = reference.border_weights(
        labels,
        classes,
        num_classes=4,
        ridge=RIDGES[ridge],
        ignore_label=4,
        sigma=2.0,
        class_weight="balanced" if class_weight is None else class_weight,
        halo=(0.2, 3.0),
    )
    np.testing.assert_array_equal(results[0].reshape(shape), expected[0])
    np.testing.assert_allclose(results[1].reshape(shape), expected[1], rtol=ROUNDING, atol=1e-8)
    foreground = volumes % 2 == 0
    settings_ = (2, 0, None, 10.0, 2.0, True, 0.0, 1.0, spacing, "int32")
    results = host_kernels.border_weights(volumes, None, foreground, [1.0, 2.0], *settings_)
    expected = reference.border_weight_map(
        labels,
        sigma=2.0,
        where="everywhere",
        class_weight=(1, 2),
        foreground=torch.from_numpy(foreground).reshape(shape),
    )
    np.testing.assert_allclose(results[1].reshape(shape), expected, rtol=ROUNDING, atol=1e-8)


def packed_weights(kernels, labels, foreground=None, class_weight=None, **options):
    """Target and weights of labels (N, H, W) by the packed kernels, run on the host."""
    defaults = {"ridge": 0, "ignore_label": None, "w0": 10.0, "sigma": 2.0, "everywhere": False}
    defaults |= {"halo": 0.0, "halo_sigma": 1.0, "spacing": [1.0] * 3, "numbers": "packed"}
    cells = None if foreground is None else foreground[:, None].numpy()
    results = kernels.border_weights(
        labels[:, None].contiguous().numpy(), None, cells, class_weight, 2, **(defaults | options)
    )
    return [torch.from_numpy(x)[:, 0] for x in results]


@pytest.mark.parametrize("case", range(6))
def test_packed_weights_on_host(host_kernels, rng, case):
    """All dtypes of labels, ridges and options; 50 rows are three segments of the sweep."""
    shape = [(1, 50, 9), (2, 3, 70)][case % 2]
    labels = random_cells(rng, shape, 20) if case < 4 else random_labels(rng, shape) % 5
    cells, positive = labels % 2 == 0, labels.to(INTEGERS[case])
    labels = positive.clone()
    ignored = [None, 4, -1, 0, 300, 2][case]
    ridge, class_weight, halo = case % 3, [None, [0.5, 2.0]][case // 3], [0.0, 0.8][case // 2 % 2]
    if ignored == -1:
        labels[:, 1, 3:5] = -1
    result = packed_weights(
        host_kernels,
        labels,
        class_weight=class_weight,
        ridge=ridge,
        ignore_label=ignored,
        halo=halo,
        halo_sigma=3.0,
    )
    expected = reference.border_weights(
        labels,
        ridge=RIDGES[ridge],
        ignore_label=ignored,
        sigma=2.0,
        class_weight="balanced" if class_weight is None else class_weight,
        halo=(1 - halo, 3.0),
    )
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=ROUNDING, atol=1e-8)
    for where in ("background", "everywhere"):
        options = {"class_weight": [1.0, 2.0], "everywhere": where == "everywhere"}
        result = packed_weights(host_kernels, positive, cells, **options)
        expected = reference.border_weight_map(
            positive, sigma=2.0, where=where, class_weight=(1, 2), foreground=cells
        )
        torch.testing.assert_close(result[1], expected, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.21, 5.0, 13.4])
def test_packed_searches_end_with_rows_and_reach_on_host(host_kernels, sigma):
    """Rows of two runs of the search; 13.4 px reach as far as the kernels go."""
    labels = torch.zeros(1, 2, 530, dtype=torch.int32)
    labels[0, 0, [0, 30, 60, 300, 388, 470, 505, 529]] = torch.arange(1, 9, dtype=torch.int32)
    for maps in (labels, labels[..., :130].mT):
        result = packed_weights(host_kernels, maps, sigma=sigma, class_weight=[1.0, 1.0])
        expected = reference.border_weight_map(maps, sigma=sigma)
        torch.testing.assert_close(result[1], expected, rtol=ROUNDING, atol=1e-8)


def test_packed_weights_of_large_labels_on_host(host_kernels, rng):
    """Labels that agree in the bits a key holds, in one image of a batch."""
    small = random_cells(rng, (2, 27, 30), 8)
    labels = torch.stack([small[0], torch.where(small[1] > 0, (small[1] << 18) + 5, 0)])
    for dtype in (torch.int32, torch.int64):
        target, weights = packed_weights(host_kernels, labels.to(dtype), ridge=2)
        expected = reference.border_weights(labels, sigma=2.0, class_weight="balanced")
        assert torch.equal(target, expected[0])
        torch.testing.assert_close(weights, expected[1], rtol=ROUNDING, atol=1e-8)


def test_what_the_packed_kernels_take_on_host(host_kernels):
    labels = torch.ones(1, 4, 5, dtype=torch.int32)
    for options in ({"sigma": 13.6}, {"halo": 0.9, "halo_sigma": 15.0}, {"spacing": [1, 1, 2.0]}):
        with pytest.raises(ValueError, match="do not take this map"):
            packed_weights(host_kernels, labels, **options)
    settings_ = (None, None, 2, 0, None, 10.0, 2.0, False, 0.0, 1.0, [1.0] * 3, "packed")
    volume = torch.ones(1, 3, 4, 5, dtype=torch.int32).numpy()
    classes = torch.ones(1, 1, 4, 5, dtype=torch.uint8).numpy()
    for maps, kinds in ((volume, None), (labels[None].numpy(), classes)):
        with pytest.raises(ValueError, match="do not take this map"):
            host_kernels.border_weights(maps, kinds, *settings_)


SAMPLE = Path(unet_fast.__file__).parent / "sample" / "train" / "labels"
DATA = os.environ.get("UNET_FAST_DATA")
REAL = {
    "sample": sorted(SAMPLE.glob("*.png"))[:2],
    "hela": sorted(Path(DATA or "/").glob("dic_c2dh_hela/labels/*.png"))[::20] if DATA else [],
    "t98g": sorted(Path(DATA or "/").glob("t98g_phase_contrast/labels/*.png"))[:1] if DATA else [],
    "ovule": sorted(Path(DATA or "/").glob("ovule_confocal_3d/labels/*")) if DATA else [],
}


@pytest.mark.parametrize("name", REAL)
def test_real_label_maps(device, name):
    if not REAL[name]:
        pytest.skip("UNET_FAST_DATA names no folder with this data set")
    for file in REAL[name]:
        array = tifffile.imread(file)[None] if file.suffix == ".tif" else read_labels(file)
        labels = torch.from_numpy(array.astype(np.int32))
        for result, expected in zip(
            two_nearest(labels.to(device)), reference.two_nearest(labels), strict=True
        ):
            assert torch.equal(result.cpu(), expected)
        for preset in (BorderWeights.paper_2015(), BorderWeights.falk_2019()):
            target, weights = preset(labels.to(device))
            expected = reference.border_weights(
                labels,
                ridge=preset.ridge,
                w0=preset.w0,
                sigma=preset.sigma,
                class_weight=preset.class_weight,
                halo=preset.halo,
            )
            assert torch.equal(target.cpu(), expected[0])
            torch.testing.assert_close(weights.cpu(), expected[1], rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("module", [unet_fast, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m.two_nearest(x.float()), TypeError, "labels must be an integer tensor, got"),
        (lambda m, x: m.two_nearest(x[0]), ValueError, r"labels must be \(H, W\).*got \(3,\)"),
        (lambda m, x: m.two_nearest(x, spacing=(1,)), ValueError, r"spacing must be 2 values in"),
        (lambda m, x: m.two_nearest(x, spacing=(1, 0)), ValueError, r"got \(1, 0\)"),
        (lambda m, x: m.two_nearest(-x), ValueError, "^two_nearest: labels must be in .*got -1"),
        (lambda m, x: m.two_nearest(x.long() * 2**31), ValueError, "2147483647], got 2147483648"),
        (lambda m, x: m.two_nearest(-x.long() * 2**31), ValueError, "in .*, got -2147483648"),
        (lambda m, x: m.separate_touching(-x), ValueError, "^separate_touching: labels must be"),
        (lambda m, x: m.separate_touching(x, "both"), ValueError, "mode must be two_sided.*both"),
        (lambda m, x: m.border_weight_map(-x), ValueError, "labels must be in .*, got -1"),
        (lambda m, x: m.border_weight_map(x, w0=-1), ValueError, "w0 must be >= 0 .*got -1"),
        (lambda m, x: m.border_weight_map(x, sigma=0), ValueError, "sigma must be > 0 .*got 0"),
        (lambda m, x: m.border_weight_map(x, sigma=np.nan), ValueError, "sigma must be .*got nan"),
        (lambda m, x: m.border_weight_map(x, where="x"), ValueError, "where must be background or"),
        (
            lambda m, x: m.border_weight_map(x, class_weight="x"),
            ValueError,
            "class_weight must be None, 2 weights or 'balanced', got 'x'",
        ),
        (
            lambda m, x: m.border_weight_map(x, class_weight=(1, 2, 3)),
            ValueError,
            r"class_weight must be 2 weights >= 0.*got \[1.0, 2.0, 3.0\]",
        ),
        (
            lambda m, x: m.border_weight_map(x, class_weight=(1, np.nan)),
            ValueError,
            "class_weight must be 2 weights >= 0",
        ),
        (lambda m, x: m.border_weight_map(x, foreground=x), ValueError, "foreground must be bool"),
        (lambda m, x: m.border_weight_map(x, halo=(2, 1)), ValueError, r"halo must be.*got \(2, 1"),
    ],
)
def test_rejects(module, call, error, message):
    with pytest.raises(error, match=message):
        call(module, torch.ones(3, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    "function",
    [reference.border_weights, border_weights],
    ids=["reference", "kernels"],
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"classes": torch.ones(3, 3)}, TypeError, "classes must be an integer tensor, got"),
        ({"classes": torch.ones(2, 2, dtype=torch.uint8)}, ValueError, "classes must be of shape"),
        ({"classes": torch.full((3, 3), -7)}, ValueError, r"classes must be in \[0, 253\].*got -7"),
        ({"classes": torch.full((3, 3), 300)}, ValueError, "classes must be in .*got 300"),
        (
            {"classes": torch.full((3, 3), 3), "num_classes": 3},
            ValueError,
            r"classes must be in \[0, 2\] or 255 \(ignored\), got 3",
        ),
        ({"num_classes": 3}, ValueError, "num_classes must be 2 without a map of classes, got 3"),
        ({"num_classes": 1}, ValueError, r"num_classes must be in \[2, 254\], got 1"),
        ({"ridge": "x"}, ValueError, "ridge must be two_sided, one_sided or none, got 'x'"),
    ],
)
def test_border_weights_rejects(function, arguments, error, message):
    with pytest.raises(error, match="^border_weights: " + message):
        function(torch.ones(3, 3, dtype=torch.int32), **arguments)


def test_kernels_check_values_where_python_does_not_look():
    """As under torch.compile."""
    labels = torch.ones(1, 1, 3, 3, dtype=torch.int64)
    classes = torch.full_like(labels, 3, dtype=torch.uint8)
    settings_ = (2, 0, None, 10.0, 5.0, False, 0.0, 1.0, [1.0, 1.0, 1.0])
    with pytest.raises(RuntimeError, match=r"classes must be in \[0, 1\] or 255 .*got 3"):
        OPS.border_weights(labels, classes, None, None, *settings_)
    labels[0, 0, 1, 2] = -4
    for call in (
        lambda: OPS.border_weights(labels, None, None, None, *settings_),
        lambda: OPS.two_nearest(labels, [1.0] * 3),
        lambda: OPS.separate_touching(labels, 2),
    ):
        with pytest.raises(RuntimeError, match=r"labels must be in .*got -4 at flat index 5"):
            call()


def test_refuses_more_pixels_than_cuda_kernels_count():
    with FakeTensorMode():
        labels = torch.empty(2, 2**15, 2**15, dtype=torch.uint8, device="cuda")
    for function in (two_nearest, separate_touching, border_weight_map, BorderWeights()):
        with pytest.raises(ValueError, match="labels must have at most 2147483647 pixels on CUDA"):
            function(labels)
