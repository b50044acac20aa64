"""Cases of the operators against their references.

Tolerances are those that docs/*.md and the tests of the operators state.
"""

import itertools
import math

import numpy as np
import torch
from choices import (
    BOUNDARIES,
    FLOATS,
    GRIDS,
    INTEGERS,
    NEGLIGIBLE,
    POSITION,
    REDUCTIONS,
    RIDGES,
    case,
)

from unet_fast import (
    Augmentation,
    border_weight_map,
    elastic_deform,
    label_components,
    reference,
    separate_touching,
    two_nearest,
    weighted_ce,
)
from unet_fast.ops import border_weights

# weighted_ce


def exact_ce(logits, target):
    """The loss of each pixel, its gradient, and how far both may be off by the documented errors.

    exp and log1p err by 1.5e-7 and 2e-7 in float32; differences of logits, and sums, are rounded.
    The largest logit may change with each class, and what was summed before is then rescaled.
    """
    double = logits.dtype == torch.float64
    unit = 16 * torch.finfo(torch.float64).eps if double else torch.finfo(torch.float32).eps / 2
    exp_error, log_error = (unit, unit) if double else (1.5e-7, 2e-7)
    x = logits.double()
    largest, first = x.max(1, keepdim=True)
    gap = largest - x
    e = torch.exp(-gap)
    error = torch.where(e > 0, e * (x.shape[1] * (exp_error + 2 * unit) + gap * unit), 0)
    error = (error + torch.finfo(torch.float32).tiny * (not double)).scatter(1, first, 0)
    rest, off = e.scatter(1, first, 0).sum(1), error.sum(1)
    index = target.unsqueeze(1)
    to_target = gap.gather(1, index).squeeze(1)
    ce = torch.log1p(rest) + to_target
    ce_error = off / (1 + rest) + (log_error + unit) * torch.log1p(rest) + 2 * unit * ce
    of_target = torch.zeros_like(x).scatter(1, index, 1.0)
    s = (1 + rest).unsqueeze(1)
    grad = (e - of_target * s) / s
    grad = torch.where((of_target > 0) & (first == index), -rest.unsqueeze(1) / s, grad)
    grad_error = (error + of_target * off.unsqueeze(1)) / s
    grad_error = grad_error + grad.abs() * (off.unsqueeze(1) / s + 8 * unit)
    return ce, ce_error, grad, grad_error, unit


def assert_near(result, expected, error, what):
    """Besides `error`, the result is rounded; it overflows and is NaN where the truth is."""
    info = torch.finfo(result.dtype)
    least = info.tiny * (info.eps if result.dtype == torch.float16 else 1)
    error = error + info.eps * expected.abs() + least
    near = (result.double() - expected).abs() <= error
    near |= result.isinf() & (expected.abs() + error > info.max)  # may overflow
    near &= expected.isfinite()
    alike = (result == expected.to(result.dtype)) | (result.isnan() & expected.isnan())
    alike |= expected.isinf() & error.isinf()  # of a difference of two that overflow
    wrong = (~(near | alike)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}{at}: {result[at]:.9g}, expected {expected[at]:.9g}, error {error[at]:.2e}"
        )


def ce_inputs(c):
    dtype = c.pick(*FLOATS)
    classes = c.pick(1, 2, 2, 3, *range(1, 13), 40 if c.chance(0.9) else 3000)
    shape = (c.pick(1, 1, 2, 3), *c.sides(c.pick(0, 1, 2, 3) if classes < 40 else 1))
    shape = (*(1,) * (classes > 40), *shape[classes > 40 :])
    x = c.normal(shape[0], classes, *shape[1:], scale=c.pick(0.01, 1, 3, 3, 30))
    if c.chance(0.2):  # extreme, as far as the type goes
        most = c.pick(1e4, 1e4, min(3e38, torch.finfo(dtype).max) if dtype != FLOATS[3] else 1e100)
        x[c.some(x, 0.1)] = most
        x[c.some(x, 0.1)] = -most
    special = c.chance(0.15)
    for value in (-math.inf, c.pick(math.nan, math.inf)) if special else ():
        x[c.some(x, c.pick(0, 0.02, 0.3))] = value
    kind = c.pick(torch.uint8, torch.int16, torch.int32, torch.int64)
    top = min(classes, torch.iinfo(kind).max + 1)
    target = torch.from_numpy(c.rng.integers(0, top, shape)).to(kind)
    ignore = c.pick(-100, -1, 0, classes - 1, 255, 120, 2**40)
    if torch.iinfo(kind).min <= ignore <= torch.iinfo(kind).max:
        target[c.some(target, c.pick(0, 0.2, 1))] = ignore
    weight = None
    if c.chance(0.7):
        weight = torch.from_numpy(c.rng.random(shape)) + 0.1
        weight = weight * c.pick(1, 1, 1, 1e-4, 1e-30, 1e-44, 1e30)
        weight[c.some(weight, c.pick(0, 0, 0.3, 1))] = 0
        weight = c.layout(weight.to(c.pick(torch.float32, torch.float32, *FLOATS)))
        weight = torch.where(weight.float().isfinite(), weight, 1)
    if c.chance(0.1):
        x = x[:1].expand_as(x)
    return c.layout(x.to(dtype)), c.layout(target), weight, ignore, special


@case
def weighted_ce_(c):
    logits, target, weight, ignore, special = ce_inputs(c)
    reduction = c.pick(*REDUCTIONS)
    options = {"ignore_index": ignore, "reduction": reduction}
    x = logits.detach().requires_grad_()
    v = None if weight is None else weight.detach().requires_grad_(not special)
    loss = weighted_ce(x, target, v, **options)
    with torch.no_grad():
        assert torch.equal(weighted_ce(x, target, v, **options).nan_to_num(7), loss.nan_to_num(7))
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    upstream = c.normal(*loss.shape).to(wide)
    upstream[c.some(loss, 0.1)] = 0
    inputs = [y for y in (x, v) if y is not None and y.requires_grad]
    grads = torch.autograd.grad(loss, inputs, upstream)
    assert grads[0].stride() == torch.empty_like(x).stride() or x.numel() == 0

    counted = target.long() != ignore
    w = torch.ones(target.shape) if weight is None else weight.to(wide)
    w = torch.where(counted, w, 0).double()
    ce, off, slope, slope_off, unit = exact_ce(logits, torch.where(counted, target.long(), 0))
    undefined = (logits.isnan() | (logits == math.inf)).any(1)
    hopeless = (logits == -math.inf).all(1)
    ce = torch.where(undefined, math.nan, torch.where(hopeless, math.inf, ce))
    each = torch.where(w == 0, 0, w * ce)
    each_off = torch.where(w == 0, 0, w * off + 2 * unit * each)
    summed = min(w.numel(), 256) * unit  # of as many neighbours in float32, then in float64
    divisor = {"mean": counted.sum().double(), "weighted_mean": w.sum()}.get(reduction, 1.0)
    divisor = torch.as_tensor(divisor, dtype=torch.float64)
    if reduction != "none":
        total = each.sum() / divisor if divisor else torch.zeros_like(divisor)
        each_off = each_off.sum() / divisor.clamp_min(1e-300) + (2 * summed + 4 * unit) * total
        each = total
    assert_near(loss.detach(), each, each_off.nan_to_num(0), "loss")
    truth = reference.weighted_ce(logits.double(), target, None if weight is None else w, **options)
    same = each.isfinite() & truth.isfinite()
    size = 1 + logits.double().nan_to_num(0, 0, 0).abs().sum()
    near = (truth - each).abs() <= 1e-14 * size * (w.sum() / divisor.clamp_min(1e-300) + 1)
    assert (near | ~same).all(), "reference"

    up = torch.where(divisor == 0, 0, upstream.double() / divisor.clamp_min(1e-300))
    live = ((w != 0) & (up != 0)).unsqueeze(1)
    factor = (up * w).unsqueeze(1)
    expected = torch.where(undefined.unsqueeze(1), math.nan, factor * slope)
    error = factor.abs() * (slope_off + (2 * summed + 4 * unit) * slope.abs())
    lost = hopeless.unsqueeze(1).expand_as(logits)
    small = factor.abs() < 0.9 * torch.finfo(grads[0].dtype).max  # others may overflow
    assert grads[0][lost & live & small].isfinite().all()
    expected = torch.where(live & ~lost, expected, 0)
    assert_near(torch.where(lost, 0, grads[0]), expected, error.nan_to_num(0), "gradient")
    if len(grads) > 1:
        mean = each if reduction == "weighted_mean" else torch.zeros_like(ce)
        ce = ce.to(wide).double()  # is computed again, in the type of the loss
        by_weight = torch.where(counted & (up != 0), up * (ce - mean), 0).to(wide).double()
        error = off + (2 * summed + 8 * unit) * (ce + mean)
        error = error + each_off if reduction == "weighted_mean" else error
        assert_near(grads[1], by_weight, up.abs() * error, "gradient of weight")


# Distances, ridges and weights


def label_map(c, empty=True):
    shape = c.sides(c.pick(2, 2, 3), empty)
    shape = shape if len(shape) == 2 and c.chance() else (c.pick(1, 2, 0, 1, 2, 3), *shape)
    return c.layout(c.ids(shape, c.pick(*INTEGERS)))


def spacing_of(c, labels, *sizes):
    if c.chance(0.7):
        return None
    return tuple(c.pick(*sizes) for _ in range(spatial_axes(labels)))


def spatial_axes(labels):
    """Number of spatial axes, of which an axis of one channel is none."""
    n = labels.dim()
    return n - 1 - (n == 4 and labels.shape[1] == 1) if n > 2 else 2


@case
def two_nearest_(c):
    labels = label_map(c)
    spacing = spacing_of(c, labels, 0.3, 0.5, 1.0, 1.7, 1e-12, 1e12)
    results = two_nearest(labels, spacing=spacing)
    expected = reference.two_nearest(labels, spacing=spacing)
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        # Squared distances are integers at unit spacing, and the root is rounded correctly.
        rtol = 0 if spacing is None else 2e-7
        torch.testing.assert_close(result, truth, rtol=rtol, atol=0)


@case
def separate_touching_(c):
    labels, mode = label_map(c), c.pick(*RIDGES)
    before = labels.clone()
    result = separate_touching(labels, mode)
    expected = reference.separate_touching(labels, mode)
    assert result.dtype == labels.dtype
    assert np.array_equal(result.numpy(), expected.numpy())
    assert np.array_equal(labels.numpy(), before.numpy())


@case
def border_weight_map_(c):
    """A few units of float32 on both sides, and as many of the exponent, up to log(w0 2^28)."""
    labels = label_map(c)
    unit = c.pick(1.0, 1.0, 1e-11, 1e11)
    spacing = spacing_of(c, labels, 0.5 * unit, unit, 1.7 * unit)
    unit = 1.0 if spacing is None else unit
    options = {
        "w0": c.pick(0.0, 1.0, 10.0, 50.0, c.pick(1e-30, 1e30)),
        "sigma": unit * c.pick(0.21, 0.7, 1.5, 5.0, 60.0, c.pick(1e-30, 1e30, 1e-3)),
        "halo": None if c.chance() else (c.pick(0.0, 0.1, 1.0), unit * c.pick(0.3, 3.0, 1e9)),
        "spacing": spacing,
    }
    if c.chance():
        table = c.pick(None, "balanced", (0.1, 1.0), torch.tensor([0.0, 2.0]))
        cells = c.some(labels, 0.5) if c.chance() else None
        options |= {"where": c.pick("background", "everywhere"), "foreground": cells}
        result = (border_weight_map(labels, class_weight=table, **options),)
        expected = (reference.border_weight_map(labels, class_weight=table, **options),)
        terms = 2
    else:
        n = c.pick(2, 3, 5)
        classes = torch.from_numpy(c.rng.choice([*range(n), 255], labels.shape))
        classes = c.pick(None, classes.to(c.pick(torch.uint8, torch.int16, torch.int64)))
        n = 2 if classes is None else n
        ignore = int(labels.flatten()[0]) if labels.numel() and c.chance() else c.pick(None, 3, -1)
        table = c.pick(None, "balanced", tuple(c.rng.random(n).tolist()))
        options |= {"ridge": c.pick(*RIDGES), "ignore_label": ignore, "class_weight": table}
        options |= {"num_classes": n if c.chance() or classes is None else None}
        if options["num_classes"] is None and isinstance(table, tuple):
            options["num_classes"] = n
        result = border_weights(labels, classes, **options)
        expected = reference.border_weights(labels, classes, **options)
        assert torch.equal(result[0], expected[0])
        terms = 2 * n
    rtol = 2.0**-21 * (1 + math.log(max(options["w0"], 1.0) / NEGLIGIBLE))
    torch.testing.assert_close(result[-1], expected[-1], rtol=rtol, atol=terms * NEGLIGIBLE)


@case
def label_components_(c):
    """Against a search from pixel to pixel."""
    mask = label_map(c)
    mask = torch.as_tensor(mask.numpy() > 0) if c.chance() else mask
    axes = spatial_axes(mask)
    connectivity = int(c.rng.integers(1, axes + 1))
    result = label_components(mask, connectivity)
    assert result.dtype == torch.int32
    assert result.shape == mask.shape
    if mask.numel() == 0:
        return
    steps = itertools.product((-1, 0, 1), repeat=axes)
    steps = [s for s in steps if 0 < sum(map(abs, s)) <= connectivity]
    sides = mask.shape[-axes:]
    images = zip(mask.numpy().reshape(-1, *sides), result.numpy().reshape(-1, *sides), strict=True)
    for image, found in images:
        todo, count = set(map(tuple, np.argwhere(image).tolist())), 0
        assert not found[image == 0].any()
        while todo:
            pixels, count = [todo.pop()], count + 1
            for at in pixels:
                near = {tuple(a + b for a, b in zip(at, s, strict=True)) for s in steps} & todo
                todo -= near
                pixels += near
            ids = found[tuple(np.transpose(pixels))]
            assert ids.min() == ids.max() > 0
        assert set(found[found > 0].tolist()) == set(range(1, count + 1))


# Deformation


def deformation(c, dtype, axes):
    """An image or a volume and options, as in tests/ops/test_elastic_deform.py, but small."""
    n, channels = c.pick(1, 1, 2, 0 if c.chance(0.1) else 1), c.pick(1, 1, 2, 3)
    sides = c.sides(axes, empty=False)
    image = torch.from_numpy(c.rng.random((n, channels, *sides)))
    if not dtype.is_floating_point:
        image = (image * torch.iinfo(dtype).max).round().long()
    image = image.to(dtype)
    out = c.sides(axes, empty=False)
    grid = c.pick(*GRIDS)
    points = c.rng.integers(1, 6, axes) + (3 if grid == "approximating" else 0)
    spacing = None
    if grid == "approximating" and c.chance():
        spacing = max(*sides, *out) / (min(points) - 3) * (1 + c.rng.random())
    curve = torch.from_numpy(c.rng.random((n, c.pick(1, channels), c.pick(2, 5))))
    few = c.pick(torch.float32, torch.float64)
    options = {
        "displacement": c.normal(n, axes, *points, scale=c.pick(1, 20, 300)).to(few),
        "affine": c.normal(n, axes, axes + 1, scale=c.pick(1, 10)).to(few),
        "offset": c.normal(n, axes, scale=c.pick(1, 10, 1e4)).to(few),
        "gray_curve": curve,
    }
    options = {name: c.pick(None, c.layout(x)) for name, x in options.items()}
    return c.layout(image), options | {
        "labels": c.layout(c.ids((n, *sides), c.pick(*INTEGERS), 120)),
        "order": tuple(c.pick(0, 1, 3) for _ in range(channels)),
        "grid": grid,
        "grid_extent": c.pick("output", "input"),
        "grid_spacing": spacing,
        "boundary": c.pick("mirror", *BOUNDARIES),
        "cval": 0.3,
        "output_shape": out,
        "label_shape": tuple(int(o - 2 * c.rng.integers(0, (o + 1) // 2)) for o in out),
    }


def moved_a_little(image, options):
    """The reference at positions that differ by what float32 may: a step has two sides."""
    affine = options["affine"]
    axes = image.dim() - 2
    if affine is None:
        affine = torch.eye(axes, axes + 1).expand(len(image), -1, -1)
    reach = POSITION * max(1.0, affine[:, :, :-1].abs().sum(2).max().item())
    for signs in itertools.product((-reach, 0, reach), repeat=axes):
        shifted = affine.double().clone()
        shifted[:, :, -1] += torch.tensor(signs, dtype=torch.float64)
        yield reference.elastic_deform(image, **options | {"affine": shifted})


def assert_moved(image, options, results):
    """Results equal the reference, but for positions in float32 near a step."""
    moved, labels = (x.double() for x in results)
    truth = [x.double() for x in reference.elastic_deform(image, **options)]
    if image.dtype == torch.float64:
        # Positions up to 1e4 pixels away, rounded; times the slope of the image.
        torch.testing.assert_close(moved, truth[0], rtol=0, atol=1e-10, equal_nan=True)
        assert torch.equal(labels, truth[1])
        return
    unit = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
    rounding = torch.finfo(image.dtype).eps if image.is_floating_point() else 1 / unit
    affine = options["affine"]
    scale = 1.0 if affine is None or not len(image) else max(1.0, affine.abs().max().item())
    allowed = 2 * rounding * truth[0].abs().clamp_min(unit) + 16 * POSITION * scale * unit

    def near(t):
        return ((moved - t[0]).abs() <= allowed) | (moved == t[0]) | (moved.isnan() & t[0].isnan())

    fine, right = near(truth), labels == truth[1]
    if not (fine.all() and right.all()):
        for other in moved_a_little(image, options):
            other = [x.double() for x in other]
            fine, right = fine | near(other), right | (labels == other[1])
    assert right.all(), f"{(~right).sum()} labels differ"
    worst = (moved - truth[0]).abs()[~fine]
    assert fine.all(), (
        f"{len(worst)} pixels differ by {worst.max():.3g}, {allowed.min():.3g} allowed"
    )


def assert_same_gradients(c, image, options):
    options = {**options}
    d = options.pop("displacement")
    results, grad = [], None
    for function in (elastic_deform, reference.elastic_deform):
        x = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        inputs = (x,) if d is None else (x, d.detach().clone().requires_grad_())
        out = function(*inputs, **options)[0]
        grad = c.normal(*out.shape) if grad is None else grad
        results.append(torch.autograd.grad(out, inputs, grad, materialize_grads=True))
    for ours, theirs in zip(*results, strict=True):
        rounding = 1e-9 if theirs.dtype == torch.float64 else 1e-7
        atol = rounding * (1 + theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@case
def elastic_deform_(c):
    deform(c, 2)


@case
def elastic_deform_volumes(c):
    deform(c, 3)


def deform(c, axes):
    dtype = c.pick(torch.float64, torch.float64, *FLOATS, torch.uint8, torch.uint16)
    image, options = deformation(c, dtype, axes)
    kind = c.rng.integers(8) if len(image) else 0
    if kind == 1:  # no pixel is there
        offset = torch.zeros(len(image), axes, dtype=torch.float64)
        offset[0, c.rng.integers(axes)] = c.pick(math.nan, math.inf, -math.inf, 1e12, -1e300)
        options |= {"offset": offset, "displacement": None}
    elif kind == 2:  # positions that are exact in every type, halves among them
        turn = torch.eye(axes)[torch.from_numpy(c.rng.permutation(axes))] * c.pick(1, 0.5, 2)
        turn *= torch.tensor([c.pick(-1, 1) for _ in range(axes)])
        shift = torch.from_numpy(c.rng.integers(-80, 80, (len(image), axes))) / 4
        affine = torch.cat([turn, torch.zeros(axes, 1)], 1).expand(len(image), -1, -1)
        options |= {"displacement": None, "affine": affine, "offset": shift}
    results = elastic_deform(image, **options)
    assert [x.dtype for x in results] == [dtype, options["labels"].dtype]
    assert_moved(image, options, results)
    if kind == 3 and dtype == torch.float64:
        assert_same_gradients(c, image, options)
    if kind == 4:  # samples that read other images, the same as before
        source = torch.from_numpy(c.rng.permutation(len(image) + 1)[: len(image)].copy())
        many = [torch.zeros(len(image) + 1, *x.shape[1:]).to(x) for x in (image, options["labels"])]
        for x, y in zip(many, (image, options["labels"]), strict=True):
            for k, s in enumerate(source.tolist()):
                x[s] = y[k]
        picked = elastic_deform(many[0], **options | {"labels": many[1], "source": source})
        assert all(map(torch.equal, picked, results))


def augmentations(c):
    grid, sides = c.pick(*GRIDS), c.sides(2, empty=False)
    low, high = c.pick(0.0, 0.5, 0.8), c.pick(1.0, 1.2, 4.0)
    black = sorted(c.rng.uniform(-0.2, 0.2, 2).tolist())
    # For every black there is a white that the slopes allow.
    white = sorted(black[i] + c.rng.uniform(low, high) for i in range(2))
    options = {
        "sigma": c.pick(0.0, 1.0, 10.0, 1e4),
        "points": tuple((c.rng.integers(1, 5, 2) + 3 * (grid == "approximating")).tolist()),
        "grid": grid,
        "spacing": c.pick(None, 1.0, 7.5, 150.0) if grid == "approximating" else None,
        "rotation": c.pick(0.0, 20.0, 180.0, 1e3),
        "scale": tuple(sorted(c.rng.uniform(0.1, 3, 2).tolist())),
        "shift": c.pick(0.0, 5.0, 1e5),
        "flip": c.chance(),
        "gray_black": tuple(black),
        "gray_white": (min(white[0], black[0] + high), max(white[1], black[1] + low)),
        "gray_slope": (low, high),
        "gray_points": c.pick(2, 3, 5, 9),
    }
    return Augmentation(**options), sides


@case
def augmentation(c):
    aug, sides = augmentations(c)
    n, channels, seed = c.pick(0, 1, 2), c.pick(1, 3), int(c.rng.integers(2**40))
    shape = (channels, *sides)
    drawn, again = (
        aug.draw(n, shape, generator=torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    for name in ("displacement", "affine", "gray_curve"):
        values = getattr(drawn, name)
        assert torch.equal(values, getattr(again, name))
        assert values.isfinite().all()
        assert len(values) == len(drawn) == n
    zoom = torch.linalg.det(drawn.affine[:, :, :2]).abs().rsqrt()
    assert ((zoom > aug.scale[0] - 1e-6) & (zoom < aug.scale[1] + 1e-6)).all()
    slopes = drawn.gray_curve.diff(dim=2) * (drawn.gray_curve.shape[2] - 1)
    low, high = aug.gray_slope
    assert ((slopes > low - 1e-6) & (slopes < high + 1e-6)).all()
    image = torch.from_numpy(c.rng.random((n, *shape))).to(c.pick(*FLOATS[1:]))
    labels = c.ids((n, *sides), torch.int32)
    results = [aug(image, labels, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
    assert set(results[0][1].flatten().tolist()) <= {0, *labels.flatten().tolist()}
