"""Cases of metrics, damaged arguments, and operators on several threads."""

import contextlib
import math

import numpy as np
import torch
from choices import FLOATS, INTEGERS, OPS, REDUCTIONS, case
from scipy import ndimage

from unet_fast import (
    Augmentation,
    BorderWeights,
    WeightedCELoss,
    border_weight_map,
    elastic_deform,
    label_components,
    metrics,
    separate_touching,
    two_nearest,
    weighted_ce,
)

# Metrics


def expected_scores(truth, found):
    """All scores, by sums over all pairs of objects and pixels."""
    rs, ss = (np.unique(x[x > 0]) for x in (truth, found))
    common = np.array([[((truth == r) & (found == s)).sum() for s in ss] for r in rs])
    common = common.reshape(len(rs), len(ss))
    sizes, others = (
        np.array([(x == i).sum() for i in ids]) for x, ids in ((truth, rs), (found, ss))
    )
    iou = common / (sizes[:, None] + others - common)
    a, b = (x[truth > 0].astype(np.int64) for x in (truth, found))
    b = np.where(b > 0, b, 1000 + np.arange(b.size))  # background: an object of each pixel
    p = np.array([[((a == i) & (b == j)).mean() for j in np.unique(b)] for i in rs])
    return iou, np.where(2 * common > sizes[:, None], iou, 0).sum(), p


def entropy(shares):
    shares = shares[shares > 0]
    return -(shares * np.log(shares)).sum() if shares.size > 1 else 0.0


def equal(a, b):
    assert abs(a - b) <= 1e-9, f"{a}, expected {b}"


@case
def metrics_(c):
    shape = tuple(c.rng.integers(1, 7, c.pick(1, 2, 2, 3)))
    dtypes = [x for x in INTEGERS if x != torch.int8]
    truth, found = (c.ids(shape, c.pick(*dtypes), 300).numpy() for _ in range(2))
    if c.chance(0.3):
        found = np.where(c.rng.random(shape) < 0.8, truth, found)
    a, b = truth > 0, found > 0
    both, either = (a & b).sum(), (a | b).sum()
    for x, y in ((truth, found), (found, truth)):
        equal(metrics.iou(x, y), both / either if either else 1)
        equal(metrics.dice(x, y), 2 * both / (both + either) if either else 1)
        equal(metrics.pixel_error(x, y), (a != b).mean())
    iou, seg, p = expected_scores(truth, found)
    threshold = c.pick(0.5, 0.75, c.rng.uniform(0.5, 1))
    result, back = (metrics.detection(*x, threshold) for x in ((truth, found), (found, truth)))
    pairs = iou[iou > threshold]
    assert (result.found, result.missed, result.excess) == (
        pairs.size,
        iou.shape[0] - pairs.size,
        iou.shape[1] - pairs.size,
    )
    assert (back.missed, back.excess) == (result.excess, result.missed)
    total = sum(iou.shape) - pairs.size
    equal(metrics.average_precision(truth, found, threshold), pairs.size / total if total else 1)
    equal(result.panoptic_quality, 2 * pairs.sum() / sum(iou.shape) if total else 1)
    equal(result.f1, 2 * pairs.size / sum(iou.shape) if total else 1)
    assert metrics.detections(truth, found, [threshold]) == [result]
    assert metrics.pooled([result, back]).found == 2 * pairs.size
    if len(shape) == 2:
        names = np.unique(found[found > 0])[(iou > 0.5).any(0)] if len(iou) else []
        assert np.array_equal(metrics.matched(truth, found), np.isin(found, names))
    if not a.any():
        return
    equal(metrics.seg_sum(truth, found)[0], seg)
    equal(metrics.seg(truth, found), seg / len(iou))
    rand, info = metrics.rand_split_merge(truth, found), metrics.info_split_merge(truth, found)
    squares = (p**2).sum()
    equal(rand.split, squares / (p.sum(1) ** 2).sum())
    equal(rand.merge, squares / (p.sum(0) ** 2).sum())
    equal(metrics.v_rand(truth, found), 2 * rand.split * rand.merge / (rand.split + rand.merge))
    equal(metrics.rand_error(truth, found), 1 - rand.score)
    of_truth, of_found = entropy(p.sum(1)), entropy(p.sum(0))
    shared = of_truth + of_found - entropy(p)
    equal(info.split, shared / of_found if of_found else 1)
    equal(info.merge, shared / of_truth if of_truth else 1)
    both = of_truth + of_found
    equal(metrics.v_info(truth, found), 2 * shared / both if both else 1)
    names = c.rng.permutation(1000) + 2**40  # other numbers of the objects
    renamed = [np.where(x > 0, names[x], 0) for x in (truth, found)]
    for score in (metrics.seg, metrics.v_rand, metrics.v_info, metrics.average_precision):
        value = score(truth, found)
        assert 0 <= value <= 1
        equal(score(*renamed), value)
    if len(shape) == 2 and c.chance(0.1):
        warped(c, a, c.rng.random(shape))


def warped(c, truth, share):
    """Against flips after each of which components are counted."""

    def topology(mask):
        mask = np.pad(mask, 1)
        return ndimage.label(mask)[1], ndimage.label(~mask, np.ones((3, 3)))[1]

    mask, wanted, before = truth.copy(), share > 0.5, None
    places = np.argwhere(mask != wanted)
    places = places[np.argsort(-np.abs(share - 0.5)[mask != wanted], kind="stable")].tolist()
    while before is None or (mask != before).any():
        before = mask.copy()
        for at in map(tuple, places):
            if mask[at] != wanted[at]:
                old = topology(mask)
                mask[at] ^= True
                mask[at] ^= topology(mask) != old
    result = metrics.warping(truth, share)
    assert result.pixels == (mask != wanted).sum()
    equal(metrics.warping_error(truth, share), result.pixels / truth.size)
    assert metrics.warping(truth, truth).pixels == 0
    best = metrics.isbi2012(truth, share)
    at = [(ndimage.label(truth)[0], ndimage.label(share > t)[0]) for t in metrics.THRESHOLDS]
    equal(best.v_rand.score, max(metrics.v_rand(*x) for x in at))
    equal(best.v_info.score, max(metrics.v_info(*x) for x in at))
    equal(best.pixel_error, 1 - max(metrics.dice(*x) for x in at))
    thin = metrics.thinned(at[5][1])
    assert np.array_equal(thin[wanted], at[5][1][wanted])
    for x, y in ((thin[1:], thin[:-1]), (thin[:, 1:], thin[:, :-1])):
        assert ((x == y) | (x == 0) | (y == 0)).all()


# Wrong arguments

LABELS = torch.arange(84).reshape(2, 6, 7) % 5
LOGITS = torch.linspace(0, 1, 420).reshape(2, 5, 6, 7)
IMAGE, WEIGHT, FIELD, CURVE = (
    LOGITS[:, :2],
    LOGITS[:, 2],
    LOGITS[:, :2, :3, :3],
    LOGITS[:, :2, 0, :3],
)
DRAWN = Augmentation().draw(2, (2, 6, 7), generator=torch.Generator().manual_seed(0))
ARRAYS = {"truth": LABELS.numpy(), "prediction": LABELS.numpy()}
TERMS = {"w0": 10.0, "sigma": 5.0, "class_weight": (1.0, 2.0), "halo": (0.1, 3.0)}
MOVED = {"image": IMAGE, "labels": LABELS, "output_shape": (5, 5), "label_shape": (3, 3)}
MOVED |= {"offset": torch.zeros(2, 2), "order": 1, "boundary": "mirror"}
MOVED |= {"source": torch.arange(2)}
CALLS = [
    (
        weighted_ce,
        {"logits": LOGITS, "target": LABELS, "weight": WEIGHT}
        | {"ignore_index": -100, "reduction": "mean"},
    ),
    (WeightedCELoss, {"ignore_index": -100, "reduction": "mean"}),
    (two_nearest, {"labels": LABELS, "spacing": (1.0, 2.0)}),
    (separate_touching, {"labels": LABELS, "mode": "one_sided"}),
    (
        border_weight_map,
        {"labels": LABELS, "where": "everywhere", "foreground": LABELS > 2}
        | {"spacing": (1.0, 2.0)}
        | TERMS,
    ),
    (BorderWeights, {"ridge": "none", "ignore_label": 3, "spacing": (1.0, 2.0)} | TERMS),
    (
        BorderWeights(class_weight="balanced"),
        {"labels": LABELS, "classes": (LABELS > 1).byte(), "num_classes": 2},
    ),
    (label_components, {"mask": LABELS, "connectivity": 1}),
    (
        elastic_deform,
        {"displacement": FIELD, "affine": CURVE, "grid": "keys", "cval": 0.0}
        | {"gray_curve": CURVE, "grid_extent": "output", "grid_spacing": None}
        | MOVED,
    ),
    (Augmentation, vars(Augmentation())),
    (Augmentation().draw, {"n": 2, "shape": (2, 6, 7), "generator": None}),
    (Augmentation().apply, {"parameters": DRAWN, "riders": 0} | MOVED),
    *((x, ARRAYS) for x in (metrics.iou, metrics.dice, metrics.pixel_error, metrics.seg)),
    *((x, ARRAYS) for x in (metrics.v_rand, metrics.v_info, metrics.rand_error)),
    (metrics.average_precision, ARRAYS | {"threshold": 0.5}),
    (metrics.detections, ARRAYS | {"thresholds": [0.5, 0.7]}),
    (metrics.warping_error, {x: y[0] for x, y in ARRAYS.items()} | {"threshold": 0.5}),
    (metrics.isbi2012, {"truth": LABELS.numpy() > 2, "probability": WEIGHT.numpy()}),
]
DAMAGED = ["x", "", [], [1], [None], (1, "x"), None, {}, math.nan, math.inf, 2**63, -(2**70), -1]
DAMAGED += [0, 3, 1.5, True, object(), 1j, np.int8(3)]
WRONG = [np.zeros((2, 6, 7)), np.zeros(2, "U3")]
WRONG += [torch.zeros(shape) for shape in ((), (0,), (1,), (2, 6, 7), (2, 2, 6, 7), (1,) * 6)]
WRONG += [torch.zeros(2, 6, 7, dtype=x) for x in (torch.bool, torch.uint32, torch.complex64)]
WRONG += [LABELS - 1, LABELS * 2**60, LABELS.to("meta"), LOGITS.to("meta"), LABELS[:, :0]]
WRONG += [LABELS.to_sparse(), LOGITS.to_sparse(), LABELS.byte(), IMAGE * math.nan]


@case
def arguments(c):
    """One is damaged: it works, or says in one line what is wrong."""
    function, right = c.pick(*CALLS)
    owner = getattr(function, "__name__", type(function).__name__)
    name = c.pick(*right)
    tensor = isinstance(right[name], torch.Tensor | np.ndarray)  # replaced by others, too
    value = c.pick(*DAMAGED, *(WRONG if tensor else ()))
    try:
        function(**right | {name: value})
        return
    except (TypeError, ValueError) as error:
        message = str(error)
    except RuntimeError:  # of devices and layouts without kernels
        if not isinstance(value, torch.Tensor) or not (value.is_meta or value.is_sparse):
            raise
        return
    assert len(message.splitlines()) == 1, f"{owner}, {name}: {message}"


ONE, BYTES = torch.zeros(()), (LABELS % 2).byte()
ONES, SCALES, WHICH = [1.0, 1.0, 1.0], [0.4, 0.4], torch.arange(2)
SHAPE, VOLUMES, DOUBLE = [6, 7], LABELS.unsqueeze(1), torch.zeros((), dtype=torch.float64)
CURVE = CURVE.contiguous()
PLACED = (FIELD, CURVE, torch.zeros(2, 2))
RAW = [
    (OPS.weighted_ce, [LOGITS, LABELS, WEIGHT, 3, -100]),
    (OPS.weighted_ce_backward, [ONE, LOGITS, LABELS, WEIGHT, DOUBLE + 1, 3, -100]),
    (OPS.two_nearest, [VOLUMES, ONES]),
    (OPS.separate_touching, [VOLUMES, 2]),
    (
        OPS.border_weights,
        [VOLUMES, BYTES, BYTES > 0, torch.ones(2), 2, 1, 3, 10.0, 5.0, False, 0.5, 3.0, ONES],
    ),
    (
        OPS.elastic_deform,
        [IMAGE, *PLACED, LABELS, CURVE, [1, 3], 0, False, SCALES, 0, 0.0, SHAPE, SHAPE, WHICH],
    ),
    (
        OPS.elastic_deform_backward,
        [IMAGE, IMAGE, *PLACED, CURVE, [1, 3], 0, False, SCALES, 0, 0.0, True, True],
    ),
]


def damaged(c, value):
    """Another value of the same type, or none."""
    if c.chance(0.05):
        return None
    if isinstance(value, torch.Tensor):
        shape = list(value.shape)
        if c.chance() and shape:
            shape[c.rng.integers(len(shape))] = c.pick(0, 1, 2, 9)
        shape = c.pick(shape, shape, shape, shape[1:], [1, *shape], [])
        other = c.normal(*shape, scale=c.pick(0, 1, 1e9, 1e300))
        if c.chance(0.3):
            return value.expand(c.pick(1, 3), *value.shape)
        kind = c.pick(*FLOATS, *INTEGERS, torch.bool, torch.complex128, torch.uint64, value.dtype)
        return c.layout(other.to(kind))
    if isinstance(value, list):
        return c.pick([], value[1:], value + value, [damaged(c, value[0]), *value[1:]])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return c.pick(-1, 0, 1, 2, 3, 4, 255, 300, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
    return c.pick(math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e-300, 1e300, 3.5)


@case
def raw(c):
    """One or two arguments are others: it works or raises, but never crashes or hangs."""
    op, right = c.pick(*RAW)
    values = [*right]
    for _ in range(c.pick(1, 1, 2)):
        at = c.rng.integers(len(values))
        values[at] = damaged(c, right[at])
    with contextlib.suppress(RuntimeError, IndexError, ValueError, TypeError):
        op(*values)


@case
def threads(c):
    """One operator, on images large enough that each thread has something to do."""
    sides = tuple(c.rng.integers(60, 140, 2).tolist())
    image, labels = (
        torch.from_numpy(c.rng.random((1, 2, *sides))).float(),
        c.ids((1, *sides), INTEGERS[4]),
    )
    field, kind = c.normal(1, 2, 3, 3, scale=20), c.rng.integers(3)
    order, reduction, weigh = (
        c.pick(0, 1, 3),
        c.pick(*REDUCTIONS),
        c.pick("paper_2015", "falk_2019"),
    )

    def results():
        x, d = (z.clone().requires_grad_() for z in (image, field))
        if kind == 0:
            loss = weighted_ce(x, labels % 2, image[:, 0], reduction=reduction)
            return loss, *torch.autograd.grad(loss.sum(), x)
        if kind == 1:
            out, ids = elastic_deform(x, d, labels=labels, order=order)
            return out, ids, *torch.autograd.grad((out**2).sum(), (x, d))
        ours = getattr(BorderWeights, weigh)()(labels)
        return *two_nearest(labels), separate_touching(labels), *ours

    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for same in zip(*found, strict=True):
        assert torch.equal(same[0], same[1])
        assert torch.equal(same[0], same[2])
