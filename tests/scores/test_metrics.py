import numpy as np
import pytest
import tifffile
import torch
from budget import examples
from ctc_metrics.metrics.technical.seg import seg as ctc_seg
from ctc_metrics.utils.representations import match as ctc_match
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.metrics import adapted_rand_error, variation_of_information

from unet_fast.metrics import (
    SplitMerge,
    average_precision,
    detection,
    dice,
    info_split_merge,
    iou,
    isbi2012,
    isbi2012_scores,
    matched,
    pixel_error,
    rand_error,
    rand_split_merge,
    seg,
    thinned,
    v_info,
    v_rand,
    warping,
    warping_error,
)
from unet_fast.scores.topology import Warping, left_over, warp

shapes = st.sampled_from([(5, 6), (2, 3, 4)])
"""Of images and of volumes."""
pairs_of_maps = shapes.flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.int32, shape, elements=st.sampled_from([0, 1, 2, 300]))] * 2
    )
)


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


@examples(100, deadline=None, derandomize=True)
@given(pairs_of_maps)
def test_equal_brute_force(maps):
    truth, prediction = maps
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


@pytest.mark.parametrize(
    "metric", [iou, dice, seg, pixel_error, v_rand, rand_error, v_info, average_precision]
)
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


@examples(200, deadline=None, derandomize=True)
@given(pairs_of_maps)
def test_split_and_merge_scores(maps):
    """Against sums over all pairs of labels, and against scikit-image."""
    truth, prediction = maps
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


@examples(200, deadline=None, derandomize=True)
@given(pairs_of_maps, st.sampled_from([0.5, 0.7, 0.9]))
def test_detection(maps, threshold):
    truth, prediction = maps
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


def test_dice_and_rand_error():
    truth = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]])
    half = torch.tensor([[5, 5, 0, 0], [5, 5, 0, 3]])
    assert dice(truth, half) == 10 / 13
    assert dice(truth * 0, truth * 0) == 1
    assert rand_error(truth, half) == 1 - v_rand(truth, half)
    assert rand_error(truth, truth) == 0


@examples(50, deadline=None, derandomize=True)
@given(pairs_of_maps)
def test_a_volume_of_one_plane_scores_as_that_plane(maps):
    truth, prediction = (x.reshape(-1, x.shape[-1]) for x in maps)
    for metric in (iou, dice, pixel_error, detection, average_precision):
        assert metric(truth[None], prediction[None]) == metric(truth, prediction)
    assert np.array_equal(matched(truth[None], prediction[None])[0], matched(truth, prediction))
    assert np.array_equal(thinned(truth[None])[0], thinned(truth))
    if truth.any():
        for metric in (seg, v_rand, v_info, rand_error):
            assert metric(truth[None], prediction[None]) == metric(truth, prediction)


@examples(30, deadline=None, derandomize=True)
@given(st.lists(pairs_of_maps, min_size=2, max_size=4), st.booleans())
def test_seg_equals_the_cell_tracking_challenges(tmp_path_factory, pairs, tensors):
    """Of a published implementation, over all objects of all images."""
    folder = tmp_path_factory.mktemp("ctc")
    objects, ious = [], []
    for i, pair in enumerate(pairs):
        files = [folder / f"{i}{kind}.tif" for kind in "rs"]
        for file, labels in zip(files, pair, strict=True):
            # Background must be there, and one object: else the labels are not those it takes.
            padded = np.pad(labels, (0, 1)).astype(np.int64)
            tifffile.imwrite(file, padded, photometric="minisblack")
        of_image = ctc_match(*map(str, files))
        objects.append(of_image[0])
        ious.append(of_image[4])
    truth, prediction = zip(*pairs, strict=True)
    if not any(map(len, objects)):
        return
    expected = ctc_seg(objects, ious)
    lists = (
        [torch.from_numpy(x) for x in truth] if tensors else list(truth),
        list(prediction),
    )
    assert seg(*lists) == pytest.approx(expected, abs=1e-12)


def test_sequences_are_refused():
    one = np.ones((2, 2), int)
    with pytest.raises(ValueError, match="as many images as truth, 2, got 1"):
        seg([one, one], [one])
    with pytest.raises(ValueError, match="as many images as truth, 2, got 1"):
        seg([one, one], one)
    with pytest.raises(ValueError, match="at least one object"):
        seg([one * 0, one * 0], [one, one])
    assert seg([one * 0, one], [one, one]) == 1
    lists = [one.tolist(), one.tolist()], [one.tolist(), (one * 0).tolist()]
    assert seg(*lists) == 0.5  # two images, though their objects have one number
    assert seg(*map(np.array, lists)) == 0  # one volume: half of its object is not more than half
    with pytest.raises(ValueError, match="seg: truth must hold at least one image, got none"):
        seg([], [])


# Warping


def topology(mask):
    """Components of foreground and background in a frame of background."""
    mask = np.pad(mask, 1)
    return ndimage.label(mask)[1], ndimage.label(~mask, np.ones((3, 3)))[1]


def plain_warp(truth, wanted, urgency):
    """Sweeps over all pixels that differ, counting components to see which are simple."""
    mask = truth.copy()
    places = np.argwhere(truth != wanted)
    places = places[np.argsort(-urgency[truth != wanted], kind="stable")]
    while True:
        flipped = False
        for row, column in places:
            if mask[row, column] == wanted[row, column]:
                continue
            before = topology(mask)
            mask[row, column] ^= True
            if topology(mask) == before:
                flipped = True
            else:
                mask[row, column] ^= True
        if not flipped:
            return mask


masks = hnp.arrays(np.bool_, (5, 6))
probabilities = hnp.arrays(np.float64, (5, 6), elements=st.sampled_from([0.1, 0.3, 0.6, 0.9, 1.0]))


@examples(100, deadline=None, derandomize=True)
@given(masks, probabilities)
def test_warp_equals_sweeps_that_count_components(truth, probability):
    wanted = probability > 0.5
    urgency = np.abs(probability - 0.5)
    warped = warp(truth, wanted, urgency)
    np.testing.assert_array_equal(warped, plain_warp(truth, wanted, urgency))
    assert topology(warped) == topology(truth)
    assert warping_error(truth, probability) == (warped != wanted).mean()


def picture(*rows):
    return np.array([[c == "#" for c in row] for row in rows])


@pytest.mark.parametrize(
    ("truth", "wanted", "left"),
    [
        (("#####",), ("##.##",), Warping(1, 1, 0, 0, 0)),
        (("##.##",), ("#####",), Warping(1, 0, 1, 0, 0)),
        (("##...",), ("##..#",), Warping(1, 0, 0, 0, 1)),
        (("#...#",), ("#....",), Warping(1, 0, 0, 1, 0)),
        (("###", "###", "###"), ("###", "#.#", "###"), Warping(1, 0, 0, 0, 0)),
        (("##...",), (".####",), Warping(0, 0, 0, 0, 0)),
        (("#####",) * 3, ("##.##",) * 3, Warping(1, 1, 0, 0, 0)),
        (("....",), ("....",), Warping(0, 0, 0, 0, 0)),
    ],
)
def test_what_is_left_after_warping(truth, wanted, left):
    assert warping(picture(*truth), picture(*wanted)) == left


@examples(100, deadline=None, derandomize=True)
@given(masks, masks)
def test_groups_equal_brute_force(warped, wanted):
    """Each group of its own, by the components that it touches."""
    excess, missing = wanted & ~warped, warped & ~wanted
    objects, rest = ndimage.label(warped)[0], ndimage.label(warped & wanted)[0]

    def touched(group, others):
        around = ndimage.binary_dilation(group) & ~group
        return len(set(others[around & (others > 0)]))

    groups, count = ndimage.label(excess)
    joined = [touched(groups == i + 1, objects) for i in range(count)]
    torn = []
    for k in range(1, objects.max(initial=0) + 1):
        groups, count = ndimage.label(missing, np.ones((3, 3)))
        for i in range(count):
            group = (groups == i + 1) & (objects == k)
            if group.any():
                torn.append(touched(group, rest))
    assert left_over(warped, wanted) == Warping(
        pixels=(warped != wanted).sum(),
        splits=sum(n > 1 for n in torn),
        mergers=sum(n > 1 for n in joined),
        deletions=torn.count(0),
        additions=joined.count(0),
    )


def test_masks_have_no_threshold():
    ones = np.ones((4, 4), int)
    assert warping(ones, ones, 1) == warping(ones > 0, ones > 0, 0) == Warping(0, 0, 0, 0, 0)
    half = torch.full((4, 4), 0.5, dtype=torch.bfloat16)
    assert warping_error(ones, half, 0.4) == 0


def test_warping_is_refused():
    ones = np.ones((2, 2), int)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        warping_error(ones, ones, 2)
    with pytest.raises(ValueError, match=r"prediction must be in \[0, 1\], got nan"):
        warping_error(ones, np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"shape of truth, \(2, 2\), got \(2, 1\)"):
        warping(ones, np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"truth must be \(H, W\) with a pixel at least"):
        warping(np.ones((2, 2, 2), int), np.ones((2, 2, 2), int))
    with pytest.raises(TypeError, match="truth must hold integers or bools"):
        warping(np.ones((2, 2)), np.ones((2, 2)))


# ISBI 2012


def cells_and_probability(seed):
    generator = np.random.default_rng(seed)
    seeds = np.zeros((40, 50), int)
    seeds.flat[generator.choice(seeds.size, 12, replace=False)] = np.arange(1, 13)
    index = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    cells = seeds[tuple(index)]
    border = np.zeros(cells.shape, bool)
    border[1:] |= cells[1:] != cells[:-1]
    border[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    noise = ndimage.gaussian_filter(generator.normal(size=cells.shape), 1) * 2
    blurred = ndimage.gaussian_filter((~border).astype(float), 1)
    return ~border, np.clip(blurred + noise * 0.3, 0, 1)


def test_isbi2012_is_the_best_mean():
    slices = [cells_and_probability(seed) for seed in range(2)]
    truth, probability = (np.stack(x) for x in zip(*slices, strict=True))
    result = isbi2012(truth, torch.from_numpy(probability))

    def means(score):
        return [np.mean([score(t, p, k / 10) for t, p in slices]) for k in range(11)]

    def objects(t, p, k):
        return ndimage.label(t)[0], ndimage.label(p > k)[0]

    rand = means(lambda t, p, k: v_rand(*objects(t, p, k)))
    info = means(lambda t, p, k: v_info(*objects(t, p, k)))
    f1 = means(lambda t, p, k: dice(t, p > k))
    assert result.v_rand.score == pytest.approx(max(rand))
    assert result.thresholds["v_rand"] == np.argmax(rand) / 10
    assert result.rand_error == pytest.approx(1 - max(rand))
    assert result.v_info.score == pytest.approx(max(info))
    assert result.pixel_error == pytest.approx(1 - max(f1))
    warped = means(lambda t, p, k: warping(t, p, k).splits + warping(t, p, k).mergers)
    assert warped[10] == 0  # nothing is predicted
    assert min(warped[1:10]) > 0
    assert result.warping_error == pytest.approx(min(warped[1:10]) / truth[0].size)
    # Thinner borders leave fewer pixels that are objects of their own.
    assert result.v_rand_thinned.score > result.v_rand.score


def test_isbi2012_of_the_truth_is_perfect():
    truth, _ = cells_and_probability(3)
    result = isbi2012(truth, truth.astype(np.float32))
    assert result.v_rand == result.v_info == SplitMerge(1, 1, 1)
    assert (result.pixel_error, result.rand_error, result.warping_error) == (0, 0, 0)


@examples(100, deadline=None, derandomize=True)
@given(shapes.flatmap(lambda shape: hnp.arrays(np.bool_, shape)))
def test_thinned_borders(mask):
    objects = ndimage.label(mask)[0]
    thin = thinned(objects)
    np.testing.assert_array_equal(thin[mask], objects[mask])  # nothing is lost
    for axis in range(mask.ndim):
        a, b = thin.swapaxes(0, axis)[1:], thin.swapaxes(0, axis)[:-1]
        assert ((a == b) | (a == 0) | (b == 0)).all()  # still apart
    steps = np.stack(
        [
            ndimage.distance_transform_cdt(objects != k, "taxicab")
            for k in range(1, objects.max(initial=0) + 1)
        ]
        or [np.zeros(mask.shape)]
    )
    for place in map(tuple, np.argwhere(thin > 0)):  # each pixel has come to one of the nearest
        assert steps[thin[place] - 1][place] == steps[(slice(None), *place)].min()
    if objects.max(initial=0) > 1:  # and a line runs where two are as near, or nearly
        two = np.sort(steps, 0)[:2]
        assert (two[1] - two[0])[thin == 0].max(initial=0) <= 2


def test_slices_are_scored_one_by_one():
    """And what is made for images says so; all else takes volumes."""
    truth, probability = np.ones((2, 3, 3), int), np.ones((2, 3, 3))
    said = r"isbi2012_scores: truth and probability must be a slice, \(H, W\), got \(2, 3, 3\)"
    with pytest.raises(ValueError, match=said):
        isbi2012_scores(truth, probability)
    for metric in (warping, warping_error):
        with pytest.raises(ValueError, match=r"truth must be \(H, W\) with .*, got \(2, 3, 3\)"):
            metric(truth, truth)


def test_isbi2012_is_refused():
    ones = np.ones((3, 3), int)
    with pytest.raises(TypeError, match="probability must hold floats, got int64"):
        isbi2012(ones, ones)
    with pytest.raises(ValueError, match=r"shape of truth, \(3, 3\), got \(2, 3\)"):
        isbi2012(ones, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"isbi2012: probability must be in \[0, 1\], got 2"):
        isbi2012(ones, 2 * np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"truth must be \(H, W\) or \(N, H, W\), got \(3,\)"):
        isbi2012(ones[0], np.ones(3))
    with pytest.raises(ValueError, match="at least one slice"):
        isbi2012(np.ones((0, 3, 3), int), np.ones((0, 3, 3)))
    with pytest.raises(ValueError, match="truth must hold at least one object, got none"):
        isbi2012(ones * 0, np.ones((3, 3)))


@examples(100, deadline=None, derandomize=True)
@given(pairs_of_maps, st.sampled_from([np.int64, np.uint64, np.uint16]), st.booleans())
def test_what_objects_are_called_does_not_matter(maps, dtype, many):
    """Ids so large that they are numbered first, few or as many as pixels."""
    truth, prediction = maps
    if many:
        truth = np.arange(1, truth.size + 1).reshape(truth.shape)
    top = np.iinfo(dtype).max
    renamed = [np.where(x > 0, top - x.astype(dtype), 0).astype(dtype) for x in (truth, prediction)]
    kept = [x.astype(np.int64) for x in (truth, prediction)]
    assert detection(*renamed) == detection(*kept)
    if truth.any():
        for metric in (seg, v_rand, v_info):
            assert metric(*renamed) == pytest.approx(metric(*kept))
