import itertools
import math

import numpy as np
import pytest
import torch
from budget import rounds
from conftest import usable_device
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode

import unet_fast
from unet_fast import elastic_deform, reference
from unet_fast.contracts.elastic_deform import check_grid

try:
    import elasticdeform
except ImportError:  # not installed, or a wheel for NumPy 1
    elasticdeform = None

OPS = torch.ops.unet_fast
SHAPE = (23, 31)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
GRIDS = ["interpolating", "approximating", "keys"]
BOUNDARIES = ["mirror", "constant", "wrap", "nearest"]
# Positions in float32 err by less than so many pixels at scale 1.
POSITION = 5e-5


@pytest.fixture(params=["reference", "cpu", "cuda"])
def deform(request):
    """The reference, or the operator on a device; arguments and results on the CPU."""
    if request.param == "reference":
        return reference.elastic_deform
    device = usable_device(request.param)

    def move(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def run(*args, **options):
        result = elastic_deform(*map(move, args), **{k: move(v) for k, v in options.items()})
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(r.cpu() for r in result)

    return run


def scipy_field(displacement, shape):
    """The cubic B-spline through the control values, whose corners lie on the image's corners."""
    points = [np.linspace(0, p - 1, n) for p, n in zip(displacement.shape[1:], shape, strict=True)]
    grid = np.stack(np.meshgrid(*points, indexing="ij"))
    return np.stack(
        [ndimage.map_coordinates(d, grid, order=3, mode="mirror") for d in displacement]
    )


def pixels(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)


@pytest.mark.parametrize("knots", [(3, 3), (1, 1), (2, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_scipy(deform, rng, order, boundary, knots):
    image = rng.normal(size=(2, 3, *SHAPE))
    displacement = rng.normal(size=(2, 2, *knots)) * 8
    out = deform(
        torch.from_numpy(image),
        torch.from_numpy(displacement),
        order=order,
        boundary=boundary,
        cval=0.25,
    )
    # SciPy pads for the spline of nearest; we do as elasticdeform, and clamp positions.
    mode = "mirror" if order == 3 and boundary == "nearest" else boundary
    for n in range(2):
        position = pixels(SHAPE) + scipy_field(displacement[n], SHAPE)
        if mode != boundary:
            position = np.clip(position, 0, np.array(SHAPE)[:, None, None] - 1)
        for c in range(3):
            expected = ndimage.map_coordinates(
                image[n, c], position, order=order, mode=mode, cval=0.25
            )
            np.testing.assert_allclose(out[n, c], expected, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_elasticdeform(deform, rng, order):
    """Rotation and zoom about the centre, and a crop, by the formulas of that package."""
    image, displacement = rng.random(SHAPE), rng.normal(size=(2, 3, 4)) * 5
    crop, start = (slice(4, 19), slice(7, 30)), np.array([4.0, 7.0])
    shape = (15, 23)
    angle, zoom = np.deg2rad(25), 1.3
    linear = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / zoom
    centre = np.array(shape) / 2 - 0.5
    translation = centre - linear @ centre
    turned = np.einsum("ij,jhw->ihw", linear, pixels(shape)) + (translation + start)[:, None, None]
    position = turned + scipy_field(displacement, SHAPE)[:, *crop]
    expected = ndimage.map_coordinates(image, position, order=order, mode="mirror")
    out = deform(
        torch.from_numpy(image)[None, None],
        torch.from_numpy(displacement)[None],
        affine=torch.from_numpy(np.c_[linear, translation])[None],
        offset=torch.from_numpy(start)[None],
        grid_extent="input",
        output_shape=shape,
        order=order,
    )
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-12)
    if elasticdeform is None:  # the formulas are checked above
        return
    theirs = elasticdeform.deform_grid(
        image, displacement, order, "mirror", crop=crop, rotate=25, zoom=zoom
    )
    np.testing.assert_allclose(out[0, 0], theirs, atol=1e-12)


def ramps(shape):
    """An image whose value is the position it was read at, (1, axes, *shape)."""
    return torch.from_numpy(pixels(shape))[None]


def field(deform, displacement, shape, *, margin=60, **options):
    """The displacement of every pixel of an output in the middle of a large image."""
    image = ramps([n + 2 * margin for n in shape])
    tile = {"output_shape": shape, "offset": torch.full((1, len(shape)), float(margin))}
    still = deform(image, **tile, **{k: v for k, v in options.items() if k == "affine"})
    return deform(image, displacement, **tile, **options) - still


def test_interpolating_grid_values_are_reached(deform):
    displacement = torch.randn(1, 2, 3, 3).double() * 5
    moved = field(deform, displacement, (41, 41))
    torch.testing.assert_close(moved[:, :, ::20, ::20], displacement)


def test_keys_grid_equals_torch_bicubic(deform):
    displacement = torch.randn(1, 2, 4, 5).double() * 5
    moved = field(deform, displacement, (41, 30), grid="keys")
    expected = torch.nn.functional.interpolate(
        displacement, (41, 30), mode="bicubic", align_corners=True
    )
    torch.testing.assert_close(moved, expected)


def test_approximating_grid_equals_the_authors_field(deform, rng):
    """B-splines with the displacements as coefficients, displacement 1 on pixel 0."""
    spacing, shape = 7.0, (29, 20)
    displacement = rng.normal(size=(2, 8, 6)) * 5
    moved = field(
        deform, torch.from_numpy(displacement)[None], shape, grid="approximating", grid_spacing=7
    )
    where = pixels(shape) / spacing + 1
    expected = [
        ndimage.map_coordinates(d, where, order=3, mode="mirror", prefilter=False)
        for d in displacement
    ]
    np.testing.assert_allclose(moved[0], expected, atol=1e-12)
    # Coefficients of variance 1: variance 1/2 on the knots, 0.4601 between, in one dimension.
    units = torch.eye(8).double().reshape(8, 1, 8, 1).expand(8, 2, 8, 4)
    weights = torch.stack([field(deform, u[None], (29, 1), grid="approximating") for u in units])
    variance = (weights[:, 0, 0, :, 0] ** 2).sum(0)
    assert variance[0].item() == pytest.approx(0.5, abs=1e-9)
    assert weights[:, 0, 0].sum(0) == pytest.approx(torch.ones(29, 1), abs=1e-9)


def test_approximating_displacements_turn_with_the_pixels(deform):
    constant = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    turn = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 20.0]]])
    for grid, expected in (("approximating", [1.0, -3.0]), ("interpolating", [3.0, 1.0])):
        moved = field(deform, constant, (9, 9), grid=grid, affine=turn)
        result = moved.amin((0, 2, 3)), moved.amax((0, 2, 3))
        for extreme in result:
            torch.testing.assert_close(extreme, torch.tensor(expected).double())


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_of_the_input(deform, grid):
    """A window sees its part of the field; beyond the grid the field is that of its border."""
    displacement = torch.randn(1, 2, 5, 4).double()
    margin = 12
    image = ramps((20 + 2 * margin, 30 + 2 * margin))
    whole = deform(image, displacement, grid=grid, boundary="nearest") - image
    start = torch.tensor([[-3.0, 25.0]]) + margin
    window = {"offset": start, "output_shape": (8, 9), "grid_extent": "input"}
    inner = deform(image, displacement, grid=grid, **window)
    rows, columns = slice(margin - 3, margin + 5), slice(margin + 25, margin + 34)
    torch.testing.assert_close(inner - image[:, :, rows, columns], whole[:, :, rows, columns])

    corner = image[:, :, :20, :30]  # whose grid ends with it; values are positions
    beyond = deform(
        corner,
        displacement,
        grid=grid,
        grid_extent="input",
        offset=torch.tensor([[-2.0, 27.0]]),
        output_shape=(4, 6),
        affine=torch.tensor([[[0.0, 0, 12], [0, 0, -17]]]),  # read in the middle of the image
    )
    # Rows -2 and -1 as row 0, columns 30 to 32 as column 29.
    u = beyond - torch.tensor([10.0, 10.0]).double().view(1, 2, 1, 1)
    if grid != "approximating":  # whose displacements are turned by the affine map, here to 0
        expected = deform(
            image,
            displacement,
            grid=grid,
            offset=torch.tensor([[margin, margin]]).double(),
            output_shape=(20, 30),
        )
        expected = expected - image[:, :, margin : margin + 20, margin : margin + 30]
        nearest = expected[:, :, [0, 0, 0, 1]][:, :, :, [27, 28, 29, 29, 29, 29]]
        torch.testing.assert_close(u, nearest)
    else:
        torch.testing.assert_close(u, torch.zeros_like(u))


def test_affine_and_offset(deform):
    image = torch.rand(2, 1, 9, 9)
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 8]]).expand(2, 2, 3)  # (r, c) <- (c, 8 - r)
    turned = deform(image, affine=turn)
    assert torch.equal(turned, torch.rot90(image, 1, (2, 3)))
    corner = torch.tensor([[2.0, 3.0], [4.0, 0.0]])
    tile = deform(image, offset=corner, output_shape=(4, 5))
    assert torch.equal(tile[0], image[0, :, 2:6, 3:8])
    assert torch.equal(tile[1], image[1, :, 4:8, 0:5])


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_identity_changes_nothing(deform, order, boundary):
    for dtype in FLOATS:
        image = torch.randn(2, 3, 17, 300).to(dtype)
        tolerance = 0 if order < 3 else torch.finfo(dtype).eps * 16
        same = deform(image, order=order, boundary=boundary)
        torch.testing.assert_close(same, image, rtol=0, atol=tolerance)
    for dtype in (torch.uint8, torch.uint16):
        image = torch.randint(0, torch.iinfo(dtype).max + 1, (1, 1, 17, 300)).to(dtype)
        assert torch.equal(deform(image, order=order, boundary=boundary), image)


@pytest.mark.parametrize("side", [2895, 2897])
def test_memory_around_32_mib(side):
    """From there on tensors on the CPU ask for large pages."""
    image = torch.rand(1, 1, side, side)
    results = [elastic_deform(image), elastic_deform(image + 1)]
    assert torch.equal(results[0], image)
    assert torch.equal(results[1], image + 1)


def test_mirrors_at_any_distance(deform):
    image = torch.arange(3.0).view(1, 1, 1, 3)
    wide = deform(image, offset=torch.tensor([[0.0, -5.0]]), output_shape=(1, 12))
    assert wide.flatten().tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    far = deform(
        image, offset=torch.tensor([[0, 4e8 + 1]], dtype=torch.float64), output_shape=(1, 4)
    )
    assert far.flatten().tolist() == [1, 2, 1, 0]
    single = deform(image[..., :1] + 7, torch.randn(1, 2, 3, 3), output_shape=(4, 4))
    assert (single == 7).all()


def test_labels_take_the_same_positions(deform):
    ids = torch.randint(0, 2**31 - 1, (2, 20, 30), dtype=torch.int32)
    image = (ids % 1000).double()[:, None]
    displacement = torch.randn(2, 2, 3, 3) * 4
    moved, labels = deform(image, displacement, labels=ids, order=0)
    assert labels.dtype == torch.int32
    assert torch.equal((labels % 1000).double(), moved[:, 0])
    _, inner = deform(image, displacement, labels=ids, label_shape=(10, 24))
    assert torch.equal(inner, labels[:, 5:15, 3:27])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_type(deform, dtype):
    span = torch.iinfo(dtype)
    ids = torch.randint(max(span.min, -(2**40)), min(span.max, 2**40) + 1, (1, 12, 9)).to(dtype)
    shift = torch.tensor([[2.0, -1.0]])
    _, moved = deform(torch.zeros(1, 0, 12, 9), labels=ids, offset=shift, boundary="constant")
    expected = torch.zeros(1, 12, 9, dtype=torch.int64)
    expected[:, :10, 1:] = ids.long()[:, 2:, :8]
    assert moved.dtype == dtype
    assert torch.equal(moved.long(), expected)
    column = ids[:, :, ::2][:, :, :1]  # contiguous, although neighbours in a line are two apart
    _, moved = deform(torch.zeros(1, 0, 12, 1), labels=column)
    assert torch.equal(moved, column)


def test_empty_batch(deform):
    image, labels = torch.zeros(0, 2, 4, 5), torch.zeros(0, 4, 5, dtype=torch.int16)
    moved = deform(image, torch.zeros(0, 2, 3, 3), labels=labels, output_shape=(6, 6))
    assert [m.shape for m in moved] == [(0, 2, 6, 6), (0, 6, 6)]
    assert moved[1].dtype == torch.int16


def test_gray_curve(deform):
    image = torch.tensor([-0.1, 0.0, 0.25, 0.5, 1.0, 1.2]).view(1, 1, 1, 6)
    curve = torch.tensor([0.1, 0.2, 0.9]).view(1, 1, 3)
    expected = torch.tensor([0.08, 0.1, 0.15, 0.2, 0.9, 1.18])
    torch.testing.assert_close(deform(image, gray_curve=curve).flatten(), expected)
    two = deform(image.expand(1, 2, 1, 6), gray_curve=curve)
    torch.testing.assert_close(two[0, 1, 0], expected)
    assert deform(image.bfloat16(), gray_curve=curve).dtype == torch.bfloat16
    each = torch.stack([curve[0, 0], torch.tensor([0.0, 0.5, 1.0])])[None]
    two = deform(image.expand(1, 2, 1, 6), gray_curve=each)
    torch.testing.assert_close(two[0], torch.stack([expected, image.flatten()])[:, None])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
def test_integers_are_rounded_and_clamped(deform, dtype):
    most = torch.iinfo(dtype).max
    image = torch.tensor([0, 1, 4, most]).view(1, 1, 1, 4).to(dtype)
    half = deform(image, offset=torch.tensor([[0.0, 0.5]]), output_shape=(1, 2))
    assert half.flatten().tolist() == [1, 3]  # 0.5 and 2.5: up
    curve = torch.tensor([-0.5, 1.5]).view(1, 1, 2)
    assert deform(image, gray_curve=curve).flatten().tolist() == [0, 0, 0, most]
    over = deform(image, order=3, offset=torch.tensor([[0.0, 1.5]]), output_shape=(1, 1))
    assert over.item() == 0  # the spline undershoots


def test_order_of_each_channel(deform):
    image, displacement = torch.rand(1, 3, 12, 13).double(), torch.randn(1, 2, 3, 3) * 3
    mixed = deform(image, displacement, order=(3, 0, 1))
    for c, order in enumerate((3, 0, 1)):
        alone = deform(image[:, c : c + 1], displacement, order=order)
        assert torch.equal(mixed[:, c], alone[:, 0])


def random_case(rng, dtype, axes=2, sides=None):
    """Arguments at random: sizes around blocks, axes of one pixel, flat voxels, all options."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def chance():
        return rng.random() < 0.5

    def normal(*shape, scale=1.0):
        return torch.from_numpy(rng.normal(size=shape) * scale)

    n, channels = rng.integers(1, 3), rng.integers(1, 4)
    if axes == 2:
        sides = [rng.integers(1, 40), rng.integers(1, pick(6, 40, 400))]
        out = [rng.integers(1, 30), rng.integers(1, pick(6, 40, 700))]
        most, far, layout = 6, (1, 20, 300), torch.channels_last
    else:
        if sides is None:
            sides = rng.permutation([rng.integers(1, pick(2, 10, 18)) for _ in range(3)])
        out = [*rng.integers(1, (pick(2, 9), pick(2, 9))), rng.integers(1, pick(9, 300))]
        most, far, layout = 5, (1, 5, 100), torch.channels_last_3d
    sides, out = [int(n) for n in sides], tuple(int(n) for n in out)
    image = torch.from_numpy(rng.random((n, channels, *sides)))
    if not dtype.is_floating_point:
        image = (image * torch.iinfo(dtype).max).round().long()
    image = image.to(dtype)
    if chance():
        image = image.contiguous(memory_format=layout)
    grid = pick(*GRIDS)
    points = rng.integers(1, most, axes) + (3 if grid == "approximating" else 0)
    labels = torch.from_numpy(rng.integers(0, 120, (n, *sides)))
    single = chance()
    spacing = None
    if grid == "approximating" and chance():
        spacing = max(*sides, *out) / (points - 3.0) * (1 + rng.random(axes))
        spacing = tuple(spacing.tolist()) if axes == 3 else max(spacing.tolist())
    options = {
        "displacement": normal(n, axes, *points, scale=pick(*far)) if chance() else None,
        "affine": normal(n, axes, axes + 1, scale=pick(1, 10)) if chance() else None,
        "offset": normal(n, axes, scale=pick(1, 10, 1e4)) if chance() else None,
        "labels": labels.to(pick(*INTEGERS)),
        "gray_curve": torch.from_numpy(rng.random((n, pick(1, channels), 5))) if chance() else None,
        "order": tuple(pick(0, 1, 3) for _ in range(channels)),
        "grid": grid,
        "grid_extent": pick("output", "input"),
        "grid_spacing": spacing,
        "boundary": pick("mirror", *BOUNDARIES),
        "cval": 0.3,
        "output_shape": out,
        "label_shape": tuple(int(o - 2 * rng.integers(0, (o + 1) // 2)) for o in out),
    }
    for name in ("displacement", "affine", "offset"):
        if single and options[name] is not None:
            options[name] = options[name].float()
    return image, options


def to(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def test_equals_the_reference_in_float64(device, rng):
    for _ in range(300):
        image, options = random_case(rng, torch.float64)
        results = elastic_deform(image.to(device), **to(device, options))
        expected = reference.elastic_deform(image, **options)
        # Positions up to 1e4 pixels away, rounded; times the slope of the image.
        torch.testing.assert_close(results[0].cpu(), expected[0], rtol=0, atol=1e-10)
        assert torch.equal(results[1].cpu(), expected[1])


def with_sources(rng, image, labels):
    """More images and labels, and which of them each sample reads: the same ones as before."""
    n, m = len(image), int(rng.integers(len(image), 5))
    source = torch.from_numpy(rng.permutation(m)[:n].copy())
    images = torch.rand(m, *image.shape[1:], dtype=torch.float64).to(image.dtype)
    if image.stride(1) == 1 and image.shape[1] > 1:
        images = images.contiguous(memory_format=torch.channels_last)
    many = torch.zeros(m, *labels.shape[1:], dtype=labels.dtype)
    for k, s in enumerate(source.tolist()):
        images[s] = image[k]
        many[s] = labels[k]
    return images, many, source


def test_source(deform, rng):
    """Samples read the images that they are told to, as if those had been picked before."""
    for _ in range(40):
        image, options = random_case(rng, torch.float64)
        expected = deform(image, **options)
        images, labels, source = with_sources(rng, image, options.pop("labels"))
        source = source.to([torch.int64, torch.int32, torch.uint8, torch.int16][rng.integers(4)])
        results = deform(images, labels=labels, source=source, **options)
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
    one = torch.rand(3, 1, 5, 6)
    again = deform(one, source=torch.tensor([2, 0, 2, 2]))
    assert torch.equal(again, one[[2, 0, 2, 2]])
    assert deform(one, source=torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 5, 6)


@pytest.mark.parametrize("source", [[0, 3], [-1]], ids=str)
@pytest.mark.parametrize("function", [elastic_deform, reference.elastic_deform])
def test_source_out_of_range(function, source):
    with pytest.raises(
        ValueError, match=rf"source must be of images from 0 to 2, got {source[-1]}$"
    ):
        function(torch.zeros(3, 1, 4, 4), source=torch.tensor(source))


@pytest.mark.parametrize("dtype", [*FLOATS[:3], torch.uint8, torch.uint16], ids=str)
def test_equals_the_reference_in_other_types(device, rng, dtype):
    """But for the rounding of positions, which near a step may choose the other side."""
    unit = 1.0 if dtype.is_floating_point else torch.iinfo(dtype).max
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 1 / unit
    for _ in range(100):
        image, options = random_case(rng, dtype)
        moved, labels = elastic_deform(image.to(device), **to(device, options))
        expected, expected_labels = reference.elastic_deform(image, **options)
        assert (moved.dtype, labels.dtype) == (dtype, expected_labels.dtype)
        error = (moved.cpu().double() - expected.double()).abs() / unit
        scale = 1.0 if options["affine"] is None else options["affine"].abs().max().item()
        # Slopes of image (order 3 overshoots) and grey curve, each at most about 4.
        allowed = 2 * rounding + 16 * POSITION * max(1, scale)
        off = (error > allowed).double().mean().item()
        assert off <= 2e-3, f"{off:.1e} of the pixels err more than {allowed:.1e}"
        assert (labels.cpu().long() != expected_labels.long()).double().mean().item() <= 2e-3


@pytest.mark.parametrize(("start", "far"), [(0, 0), (30_000, 300), (4_000_000, 5000)])
def test_positions_in_float32(device, start, far):
    """A sawtooth of slope 1 shows the error of the positions, however far tile and field reach."""
    size, period = 512, 16
    start += far
    teeth = (torch.arange(start, start + size + 64) % period).float()
    wide = torch.zeros(1, 1, 1, start + size + 64)
    wide[..., start:] = teeth
    displacement = torch.randn(1, 2, 3, 3) * 10 - far
    tile = {"output_shape": (64, size), "offset": torch.tensor([[0.0, start + far + 32.25]])}
    both = [
        elastic_deform(wide.to(dtype).to(device), displacement.to(device), **to(device, tile)).cpu()
        for dtype in (torch.float32, torch.float64)
    ]
    ramp = torch.arange(wide.shape[3]).double().expand_as(wide)
    position = elastic_deform(ramp.to(device), displacement.to(device), **to(device, tile)).cpu()
    phase = position % period
    smooth = (phase > 0.01) & (phase < period - 1.01)  # not on the steps
    assert smooth.double().mean() > 0.9
    assert (both[0].double() - both[1]).abs()[smooth].max() < POSITION


@pytest.mark.parametrize("order", [0, 1, 3])
def test_strides(device, order):
    image = torch.rand(2, 3, 30, 34).to(device)
    labels = torch.randint(0, 99, (2, 30, 34)).to(device)
    displacement = (torch.randn(2, 2, 3, 3) * 4).to(device)
    expected = elastic_deform(image, displacement, labels=labels, order=order)
    last = image.contiguous(memory_format=torch.channels_last)
    moved, _ = elastic_deform(last, displacement, labels=labels, order=order)
    assert torch.equal(moved, expected[0])
    assert moved.is_contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(4, 3, 60, 68).to(device)
    wide[::2, :, ::2, ::2] = image
    odd = elastic_deform(
        wide[::2, :, ::2, ::2],
        displacement.transpose(2, 3).contiguous().transpose(2, 3),
        labels=labels.transpose(1, 2).contiguous().transpose(1, 2),
        order=order,
    )
    for ours, theirs in zip(odd, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    same = elastic_deform(image[:1].expand(2, 3, 30, 34), displacement, order=order)
    assert torch.equal(same[1], elastic_deform(image[:1], displacement[1:], order=order)[0])


def test_images_beyond_int32():
    """Offsets in an image may exceed 2^31; pages that nobody touches take no memory."""
    rows, columns = 70_000, 40_000
    image = torch.empty(1, 1, rows, columns, dtype=torch.uint8)
    image[..., -1, -300:] = 7
    image[..., 0, :300] = 3
    # The last column reads the last row, the others the first.
    steep = torch.tensor([[[0, rows - 1.0, 0], [0, columns - 300.0, 0]]])
    ends, ids = elastic_deform(image, affine=steep, output_shape=(1, 2), labels=image[0])
    assert ends.flatten().tolist() == ids.flatten().tolist() == [3, 7]
    # The block spans all rows, the window of the labels is one pixel of it.
    back = torch.tensor([[[0, 0.5 - rows / 2, rows - 1.0], [0, 0, columns - 1.0]]])
    _, one = elastic_deform(
        image, affine=back, output_shape=(1, 3), labels=image[0], label_shape=(1, 1)
    )
    assert one.item() == 0


NOT_FINITE = [math.nan, math.inf, -math.inf, 1e12, -1e300]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_positions_that_are_no_pixels(deform, value, boundary):
    image = torch.rand(1, 2, 9, 300).double()
    labels = torch.ones(1, 9, 300, dtype=torch.uint8)
    bad = torch.zeros(1, 2, 3, 3).double()
    bad[0, 1, 1, 1] = value
    turn = torch.eye(2, 3)[None].double()
    turn[0, 0, 2] = value
    for arguments in (
        {"displacement": bad},
        {"affine": turn},
        {"offset": torch.tensor([[0.0, value]], dtype=torch.float64)},
    ):
        for order in (0, 1, 3):
            moved, ids = deform(
                image, labels=labels, order=order, boundary=boundary, cval=5, **arguments
            )
            lost = torch.isnan(moved)
            assert torch.equal(ids[0] == 0, lost[0, 0] | (moved[0, 0] == 5))
            if "displacement" not in arguments:
                assert lost.all()
            else:
                assert lost[0, :, 4, 150].all()
    whole = deform((image * 255).byte(), affine=turn, boundary=boundary)
    assert (whole == 0).all()


def test_not_finite_float32(deform):
    image = torch.rand(1, 1, 20, 300)
    displacement = torch.randn(1, 2, 6, 6)
    for value, grid in itertools.product((math.nan, math.inf, 3e38), GRIDS):
        displacement[0, 0, 2, 2] = value
        moved = deform(image, displacement, grid=grid)
        assert torch.isnan(moved).any()
    assert torch.isnan(deform(image.half(), displacement.half())).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_gradcheck(device, order, grid):
    image = torch.rand(2, 2, 6, 7, dtype=torch.float64, device=device, requires_grad=True)
    points = (4, 5) if grid == "approximating" else (2, 3)
    displacement = torch.randn(2, 2, *points, dtype=torch.float64, device=device)
    options = {
        "affine": torch.eye(2, 3)[None] + 0.3 * torch.randn(2, 2, 3),
        "gray_curve": torch.rand(2, 2, 4),
        "order": (order, 1),
        "grid": grid,
        "output_shape": (5, 8),
    }
    options = to(device, options)
    inputs = image, displacement.requires_grad_(order > 0)
    assert torch.autograd.gradcheck(lambda x, d: elastic_deform(x, d, **options), inputs, atol=1e-6)


def test_only_pixels_that_are_read_count(device):
    """What lies under pixels that take the constant, NaN say, does not reach the gradients."""
    image = torch.rand(1, 1, 9, 9, dtype=torch.float64, device=device)
    image[0, 0, 0, 0] = image[0, 0, 8, 8] = math.nan
    d = torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    far = torch.full((1, 2), 8.5, device=device)
    out = elastic_deform(image, d, offset=far, boundary="constant")
    assert (out == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), d)
    assert (grad == 0).all()


def test_images_of_a_batch_do_not_meet(device):
    """A derivative of 1e12, or none at all, in one image leaves those of the others alone."""
    grads = []
    for value in (1.0, 1e12, math.inf):
        x = torch.rand(2, 1, 20, 20, device=device, requires_grad=True)
        weight = torch.ones(2, 1, 20, 20, device=device)
        weight[0, 0, 3, 3] = value
        (grad,) = torch.autograd.grad((elastic_deform(x) * weight).sum(), x)
        grads.append(grad[1])
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_gradients_equal_the_reference(device, rng):
    for _ in range(100):
        image, options = random_case(rng, torch.float64)
        grad = None
        results = []
        for function, where in ((elastic_deform, device), (reference.elastic_deform, "cpu")):
            moved = to(where, options)
            x = image.to(where).clone(memory_format=torch.preserve_format).requires_grad_()
            d = moved.pop("displacement")
            d = None if d is None else d.requires_grad_()
            out, _ = function(x, d, **moved)
            grad = torch.randn(out.shape, dtype=out.dtype) if grad is None else grad
            inputs = (x,) if d is None else (x, d)
            gradients = torch.autograd.grad(
                (out * grad.to(where)).sum(), inputs, materialize_grads=True
            )
            results.append([g.cpu() for g in gradients])
        for ours, theirs in zip(*results, strict=True):
            scale = 1 + theirs.abs().max().item()
            rounding = 1e-9 if theirs.dtype == torch.float64 else 1e-7
            torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_backward_is_the_adjoint(device, order):
    """<A x, y> = <x, A' y>: the deformation is linear in the image."""
    x = torch.randn(2, 2, 40, 50, dtype=torch.float64, device=device, requires_grad=True)
    displacement = (torch.randn(2, 2, 3, 3) * 20).to(device)
    moved = elastic_deform(x, displacement, order=order, output_shape=(30, 70))
    y = torch.randn_like(moved)
    (back,) = torch.autograd.grad(moved, x, y)
    left, right = (moved * y).sum().item(), (x * back).sum().item()
    assert left == pytest.approx(right, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_backward_of_other_types(device, dtype):
    image = torch.rand(2, 2, 20, 24).to(dtype)
    displacement = torch.randn(2, 2, 3, 3) * 3
    results = []
    for x, d in ((image.to(device), displacement.to(device)), (image.double(), displacement)):
        x, d = x.detach().requires_grad_(), d.detach().requires_grad_()
        out = elastic_deform(x, d)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        grads = torch.autograd.grad((out.double() * weight.double()).sum(), (x, d))
        results.append([g.cpu() for g in grads])
    for ours, theirs, kind in zip(*results, (dtype, torch.float32), strict=True):
        assert ours.dtype == kind
        tolerance = 16 * torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sides", [(200, 210), (20, 30, 40)])
def test_same_bits_for_any_number_of_threads(sides):
    axes = len(sides)
    image = torch.rand(1, 2, *sides)
    displacement = torch.randn(1, axes, *[3] * axes) * 0.15 * sides[0]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, d = image.clone().requires_grad_(), displacement.clone().requires_grad_()
            out = elastic_deform(x, d, order=(1, 3))
            (out**2).sum().backward()
            results.append((out.detach(), x.grad, d.grad))
    finally:
        torch.set_num_threads(threads)
    for others in zip(*results, strict=True):
        assert torch.equal(others[0], others[1])
        assert torch.equal(others[0], others[2])


def test_backward_repeats_bit_for_bit(device):
    image = torch.rand(2, 2, 100, 110, device=device)
    displacement = (torch.randn(2, 2, 3, 3) * 40).to(device)
    grads = []
    for _ in range(3):
        x, d = image.clone().requires_grad_(), displacement.clone().requires_grad_()
        (elastic_deform(x, d) ** 2).sum().backward()
        grads.append((x.grad, d.grad))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def native(image, options):
    """The arguments of random_case as the kernels take them, NumPy arrays."""
    options = dict(options)
    names = ("displacement", "affine", "offset")
    parameters = [None if (x := options.pop(n)) is None else x.numpy() for n in names]
    labels, curve = options.pop("labels"), options.pop("gray_curve")
    shape = options["output_shape"]
    spans_input = options["grid_extent"] == "input"
    spanned = tuple(image.shape[2:]) if spans_input else shape
    displacement = None if parameters[0] is None else torch.from_numpy(parameters[0])
    scales = check_grid(displacement, options["grid"], options["grid_spacing"], spanned)
    if curve is not None:
        curve = curve.to(torch.float64 if image.dtype == torch.float64 else torch.float32).numpy()
    settings = (
        options["order"],
        GRIDS.index(options["grid"]),
        spans_input,
        scales,
        ("mirror", "constant", "nearest", "wrap").index(options["boundary"]),
        options["cval"],
    )
    return (*parameters, labels.numpy(), curve, settings, shape, options["label_shape"])


def test_cuda_positions_on_host(host_kernels):
    """As test_positions_in_float32."""
    ramp = (torch.arange(2000.0) % 16).expand(1, 1, 1, 2000)
    displacement = np.random.default_rng(0).normal(size=(1, 2, 3, 3)) * 10 - 1000
    offset = np.array([[0.0, 1100.25]])
    settings = ((1,), 0, False, (0.0, 2 / 511), 0, 0.0)
    both = [
        host_kernels.elastic_deform(
            ramp.to(dtype).numpy(),
            displacement,
            None,
            offset,
            None,
            None,
            *settings,
            *[(1, 512)] * 2,
        )[0]
        for dtype in (torch.float32, torch.float64)
    ]
    smooth = (both[1] > 0.01) & (both[1] < 14.99)
    assert smooth.mean() > 0.8
    steps = np.abs(both[0] - both[1]) > 0.5  # sawtooth falls from 15 to 0 within a pixel
    assert np.abs(both[0] - both[1])[smooth & ~steps].max() < 16 * POSITION
    rising = smooth & (np.abs(np.gradient(both[1][0, 0, 0])) < 2)
    assert np.median(np.abs(both[0] - both[1])[rising]) < POSITION


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8], ids=str)
def test_cuda_kernels_on_host(host_kernels, rng, dtype):
    for _ in range(rounds(40 if dtype == torch.float64 else 10, host_kernels)):
        image, options = random_case(rng, dtype)
        *parameters, labels, curve, settings, shape, window = native(image, options)
        images, source = image, None
        if rng.random() < 0.5:
            images, labels, source = with_sources(rng, image, torch.from_numpy(labels))
            labels, source = labels.numpy(), source.numpy()
        moved, ids = host_kernels.elastic_deform(
            images.numpy(), *parameters, labels, curve, *settings, shape, window, source
        )
        expected, expected_ids = elastic_deform(image, **options)
        error = np.abs(moved.astype(float) - expected.double().numpy())
        assert np.isnan(error).sum() == 0
        if dtype == torch.float64:
            assert error.max() < 1e-10
            assert np.array_equal(ids, expected_ids.numpy())
            continue
        scale = 1.0 if options["affine"] is None else options["affine"].abs().max().item()
        allowed = 1.0 if dtype == torch.uint8 else 32 * POSITION * max(1, scale)
        assert (error > allowed).mean() <= 2e-3
        assert (ids != expected_ids.numpy()).mean() <= 2e-3


def lean_case(rng, dtype, axes=2):
    """As random_case, but such that the lean kernels work on it; more than a tile of 64 x 32."""
    image, options = random_case(rng, dtype, axes)
    n, channels = image.shape[:2]
    depth = [int(rng.integers(1, 4))] * (axes - 2)
    out = (*depth, int(rng.integers(60, 70)), int(rng.integers(30, 70)))
    shape = (n, channels, *depth, *rng.integers(3, 60, 2).tolist())
    unit = 1 if dtype.is_floating_point else torch.iinfo(dtype).max
    image = (torch.from_numpy(rng.random(shape)) * unit).to(dtype)
    points = [4] * axes if options["grid"] == "approximating" else rng.integers(1, 4, axes)
    labels = torch.from_numpy(rng.integers(0, 120, (n, *shape[2:])))
    return image, {
        **options,
        "displacement": torch.from_numpy(rng.normal(size=(n, axes, *points)) * 9),
        "affine": None,
        "labels": labels.to(options["labels"].dtype),
        "order": (int(rng.integers(0, 2)),) * channels,
        "grid_extent": "output",
        "grid_spacing": None,
        "output_shape": out,
        "label_shape": tuple(int(o - 2 * rng.integers(0, (o + 1) // 2)) for o in out),
    }


def same_by_lean_kernels(host_kernels, rng, dtype, axes, cases):
    suffix = "" if axes == 2 else "_3d"
    for _ in range(cases):
        image, options = lean_case(rng, dtype, axes)
        *parameters, labels, curve, settings, shape, window = native(image, options)
        find = getattr(host_kernels, "elastic_deform_lean_order" + suffix)
        lean = find(image.numpy(), parameters[0], settings[0], settings[3], shape)
        assert lean == options["order"][0]
        moved, ids = getattr(host_kernels, "elastic_deform" + suffix)(
            image.numpy(), *parameters, labels, curve, *settings, shape, window
        )
        expected, expected_ids = elastic_deform(image, **options)
        error = np.abs(moved.astype(float) - expected.double().numpy())
        if dtype == torch.float64:
            assert error.max() < 1e-10
            assert np.array_equal(ids, expected_ids.numpy())
            continue
        allowed = 1.0 if dtype == torch.uint8 else 16 * axes * POSITION
        assert (error > allowed).mean() <= 2e-3
        assert (ids != expected_ids.numpy()).mean() <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8], ids=str)
def test_lean_cuda_kernels_on_host(host_kernels, rng, dtype):
    same_by_lean_kernels(host_kernels, rng, dtype, 2, 16 if dtype == torch.float64 else 6)


def test_choice_of_cuda_kernels_on_host(host_kernels):
    """Lean kernels only where an image, its channels and the grid allow them."""
    image = np.zeros((1, 2, 9, 10), np.float32)
    last = np.zeros((1, 9, 10, 2), np.float32).transpose(0, 3, 1, 2)
    shape = (64, 32)

    def order(image, orders, points):
        displacement = np.zeros((1, 2, *points))
        scales = [(p - 1) / (n - 1) for p, n in zip(points, shape, strict=True)]
        return host_kernels.elastic_deform_lean_order(image, displacement, orders, scales, shape)

    assert order(image, (1, 1), (4, 4)) == 1
    assert order(image, (0, 0), (4, 4)) == 0
    assert order(image, (0, 1), (4, 4)) == -1
    assert order(image, (3, 3), (4, 4)) == -1
    assert order(last, (1, 1), (4, 4)) == -1
    assert order(image, (1, 1), (5, 4)) == -1
    assert order(image, (1, 1), (4, 5)) == -1


def compare_derivatives(host_kernels, image, options, grad):
    """The kernels' derivatives equal those of the CPU."""
    *parameters, _, curve, settings, _, _ = native(image, options)
    ours = host_kernels.elastic_deform_backward(
        grad.numpy(), image.numpy(), *parameters, curve, *settings
    )
    x, d = image.clone().requires_grad_(), options.pop("displacement")
    inputs = (x,) if d is None else (x, d.requires_grad_())
    out, _ = elastic_deform(x, d, **options)
    expected = torch.autograd.grad(out, inputs, grad)
    for a, b in zip(ours, expected, strict=False):
        scale = 1 + b.abs().max().item()
        rounding = 1e-9 if b.dtype == torch.float64 else 1e-7
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=rounding * scale)


@pytest.mark.thorough
def test_cuda_derivatives_on_host(host_kernels, rng):
    for _ in range(rounds(40, host_kernels)):
        image, options = random_case(rng, torch.float64)
        grad = torch.randn(*image.shape[:2], *options["output_shape"], dtype=torch.float64)
        compare_derivatives(host_kernels, image, options, grad)


@pytest.mark.parametrize("grid", GRIDS)
def test_cuda_derivatives_of_many_knots_on_host(host_kernels, rng, grid):
    """Sums over parts of an axis: cells of less than a pixel to many, lines longer than a block."""
    image, options = random_case(rng, torch.float64)
    shape = 11, 600
    displacement = torch.from_numpy(rng.normal(size=(image.shape[0], 2, 30, 9)))
    options |= {"displacement": displacement, "grid": grid, "grid_spacing": None}
    options |= {"output_shape": shape, "label_shape": shape}
    grad = torch.randn(*image.shape[:2], *shape, dtype=torch.float64)
    compare_derivatives(host_kernels, image, options, grad)


@pytest.mark.thorough
def test_lean_cuda_derivatives_on_host(host_kernels, rng):
    for _ in range(3):
        image, options = lean_case(rng, torch.float64)
        grad = torch.randn(*image.shape[:2], *options["output_shape"], dtype=torch.float64)
        options["order"] = (1,) * image.shape[1]
        compare_derivatives(host_kernels, image, options, grad)


def test_cuda_gradient_of_what_is_not_finite_on_host(host_kernels):
    """One infinite derivative spoils the image's gradient, as a scaled loss expects it to."""
    settings = ((1,), 0, False, (0.0, 0.0), 0, 0.0)
    image = np.random.default_rng(0).random((1, 1, 5, 6)).astype(np.float32)
    for value, lost in ((np.inf, True), (np.nan, True), (0.0, False), (3e38, False)):
        grad = np.full_like(image, value)
        back, _ = host_kernels.elastic_deform_backward(
            grad, image, None, None, None, None, *settings
        )
        assert np.isnan(back).all() == lost
        if not lost:
            np.testing.assert_allclose(back, grad, rtol=1e-6)


def native_arguments(device):
    image = torch.rand(1, 2, 9, 10, dtype=torch.float64, device=device)
    displacement = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=device)
    labels = torch.randint(0, 9, (1, 9, 10), device=device)
    settings = ([1, 3], 0, False, [2 / 7, 2 / 8], 0, 0.0, [8, 9], [6, 5], None)
    return (image, displacement, None, None, labels, None, *settings)


def test_opcheck(device):
    arguments = native_arguments(device)
    torch.library.opcheck(OPS.elastic_deform.default, arguments)
    image, displacement, *rest = arguments
    source = torch.zeros(1, dtype=torch.int64, device=device)
    torch.library.opcheck(OPS.elastic_deform.default, (*arguments[:-1], source))
    arguments = (image.requires_grad_(), displacement.requires_grad_(), *rest)
    torch.library.opcheck(OPS.elastic_deform.default, arguments)


def test_fake_results_have_the_layout_of_real_ones(device):
    for last, size in itertools.product((False, True), ([8, 9], [1, 1])):
        image, *rest = native_arguments(device)
        rest[-3:-1] = size, [1, 1]
        image = image.contiguous(memory_format=torch.channels_last) if last else image
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = OPS.elastic_deform(mode.from_tensor(image), *rest)
        real = OPS.elastic_deform(image, *rest)
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiles_without_graph_breaks(device):
    image = torch.rand(1, 1, 20, 21, device=device)
    labels = torch.randint(0, 9, (1, 20, 21), device=device)
    displacement = (torch.randn(1, 2, 3, 3) * 3).to(device)

    def step(x, d):
        moved, ids = elastic_deform(x, d, labels=labels, affine=None)
        return (moved**2).sum() + ids.sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, d = image.clone().requires_grad_(), displacement.clone().requires_grad_()
        function(x, d).backward()
        grads.append((x.grad, d.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # raised by torch's forward mode itself
def test_what_cannot_be_differentiated_says_so():
    image = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    for name, tensor in (
        ("affine", torch.eye(2, 3)[None]),
        ("offset", torch.zeros(1, 2)),
        ("gray_curve", torch.rand(1, 1, 3)),
    ):
        with pytest.raises(NotImplementedError, match=f"elastic_deform: {name} must not require"):
            elastic_deform(image, **{name: tensor.requires_grad_()})
        with torch.no_grad():
            elastic_deform(image, **{name: tensor})
    bytes_, d = torch.zeros(1, 1, 5, 5, dtype=torch.uint8), torch.zeros(1, 2, 1, 1)
    with pytest.raises(NotImplementedError, match="displacement must not require a gradient with"):
        elastic_deform(bytes_, d.requires_grad_())
    source = torch.zeros(2, dtype=torch.int64)
    for inputs in (
        (image.clone().requires_grad_(),),
        (image, torch.zeros(2, 2, 1, 1).requires_grad_()),
    ):
        with pytest.raises(NotImplementedError, match="must not require a gradient with source"):
            elastic_deform(*inputs, source=source)
    x = image.clone().requires_grad_()
    (grad,) = torch.autograd.grad(elastic_deform(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not available"):
        grad.sum().backward()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        elastic_deform(torch.autograd.forward_ad.make_dual(image, torch.ones_like(image)))
    zero = torch.zeros(1, 2)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        elastic_deform(image, offset=torch.autograd.forward_ad.make_dual(zero, zero + 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(1, 1, 4, 4).int()}, TypeError, "image must be float16, bfloat16"),
        ({"image": torch.zeros(1, 4, 4)}, ValueError, r"image must be \(N, C, H, W\)"),
        ({"image": torch.zeros(1, 1, 0, 4)}, ValueError, r"with H, W >= 1, got \(1, 1, 0, 4\)"),
        ({"labels": torch.zeros(1, 4, 4)}, TypeError, "labels must be integer, got"),
        ({"labels": torch.zeros(1, 4, 4).bool()}, TypeError, "labels must be integer, got"),
        ({"labels": torch.zeros(1, 4, 5).int()}, ValueError, r"labels must have shape \(1, 4, 4\)"),
        (
            {"displacement": torch.zeros(2, 2, 3, 3)},
            ValueError,
            r"shape \(1, 2, P >= 1, Q >= 1\), got",
        ),
        (
            {"displacement": torch.zeros(1, 2, 0, 3)},
            ValueError,
            r"shape \(1, 2, P >= 1, Q >= 1\), got",
        ),
        ({"displacement": torch.zeros(1, 2, 3, 3).int()}, TypeError, "displacement must be float"),
        ({"affine": torch.zeros(1, 2, 2)}, ValueError, r"affine must have shape \(1, 2, 3\), got"),
        ({"offset": torch.zeros(2)}, ValueError, r"offset must have shape \(1, 2\), got \(2,\)"),
        ({"gray_curve": torch.zeros(1, 1, 1)}, ValueError, "at least 2 points, got 1"),
        ({"source": torch.zeros(1)}, TypeError, "source must be integer, got torch.float32"),
        (
            {"source": torch.zeros(1, 1).int()},
            ValueError,
            r"source must have shape \(N,\), got \(1, 1\)",
        ),
        (
            {"source": torch.zeros(3).int(), "offset": torch.zeros(1, 2)},
            ValueError,
            r"offset must have shape \(3, 2\), got \(1, 2\)",
        ),
        ({"output_shape": (4,)}, ValueError, r"output_shape must be two sizes >= 1, got \(4,\)"),
        ({"output_shape": (0, 4)}, ValueError, r"output_shape must be two sizes >= 1"),
        ({"order": 2}, ValueError, "order must be 0, 1 or 3.*got 2"),
        ({"order": (1, 1)}, ValueError, r"order must be .* each of 1 channels, got \(1, 1\)"),
        ({"boundary": "reflect"}, ValueError, "boundary must be one of mirror.*got 'reflect'"),
        ({"grid": "bicubic"}, ValueError, "grid must be one of interpolating.*got 'bicubic'"),
        ({"grid": ["keys"]}, ValueError, "grid must be one of interpolating"),
        ({"order": 1.0}, TypeError, "order must be an integer or a sequence of them, got 1.0"),
        ({"order": (1.0,)}, TypeError, r"order must be an integer or .*, got \(1.0,\)"),
        ({"output_shape": 5}, ValueError, r"output_shape must be two sizes >= 1, got \(5,\)"),
        ({"output_shape": (4.0, 4.0)}, TypeError, "output_shape must be an integer or a sequence"),
        ({"cval": None}, TypeError, "cval must be a number, got None"),
        ({"cval": "1"}, TypeError, "cval must be a number or a sequence of them, got '1'"),
        ({"grid_extent": "tile"}, ValueError, "grid_extent must be one of output, input, got"),
        ({"grid_spacing": 9}, ValueError, "grid_spacing must be None with grid 'interpolating'"),
        (
            {"displacement": torch.zeros(1, 2, 3, 4), "grid": "approximating"},
            ValueError,
            r"displacement must have at least 4 points .* got \(3, 4\)",
        ),
        (
            {"displacement": torch.zeros(1, 2, 4, 4), "grid": "approximating", "grid_spacing": 2},
            ValueError,
            "at least 5 points to span 4 pixels at grid_spacing 2, got 4",
        ),
        (
            {"grid": "approximating", "grid_spacing": (0, 2)},
            ValueError,
            r"grid_spacing must be a distance from 1e-6 to 2\^30, .* got \(0.0, 2.0\)",
        ),
        (
            {"labels": torch.zeros(1, 4, 4).int(), "label_shape": (3, 4)},
            ValueError,
            "label_shape must be smaller than output_shape by an even number",
        ),
    ],
)
@pytest.mark.parametrize("function", [elastic_deform, reference.elastic_deform])
def test_rejects(function, change, error, message):
    arguments = {"image": torch.zeros(1, 1, 4, 4)} | change
    with pytest.raises(error, match=f"^elastic_deform: .*{message}"):
        function(**arguments)


def test_wrong_calls_do_not_spoil_right_ones():
    """1.0 == 1: what is kept of checked calls must tell them apart."""
    image = torch.rand(1, 1, 4, 4)
    for wrong, right in (({"order": (1.0,)}, {"order": (1,)}), ({"order": True}, {"order": 1})):
        try:
            elastic_deform(image, **wrong)
        except TypeError:
            assert wrong["order"] == (1.0,)
        assert torch.equal(elastic_deform(image, **right), image)
    assert torch.equal(
        elastic_deform(image, order=np.int64(1), output_shape=image.shape[2:]), image
    )


def test_limits_of_the_kernels():
    thin = torch.zeros(1, dtype=torch.uint8).expand(1, 1, 2**29 + 1, 1)
    with pytest.raises(
        ValueError, match=r"^elastic_deform: image must be of sides from 1 to 2\^29"
    ):
        elastic_deform(thin, output_shape=(1, 1))
    # One row, whatever the stride of rows says.
    flat = torch.arange(8.0).as_strided((1, 1, 1, 4), (8, 8, 2**40, 1))
    assert elastic_deform(flat).flatten().tolist() == [0, 1, 2, 3]


def test_spacing_by_default_can_be_given():
    """(n - 1) / (P - 3), rounded, spans n pixels."""
    for n, points in ((12, 18), (30, 7), (512, 14)):
        d = torch.randn(1, 2, points, points)
        image = torch.rand(1, 1, n, n)
        given = elastic_deform(image, d, grid="approximating", grid_spacing=(n - 1) / (points - 3))
        torch.testing.assert_close(given, elastic_deform(image, d, grid="approximating"))


def test_devices_must_agree():
    with pytest.raises(ValueError, match="elastic_deform: offset must be on cpu, got meta"):
        elastic_deform(torch.zeros(1, 1, 4, 4), offset=torch.zeros(1, 2, device="meta"))
    with pytest.raises(RuntimeError, match="elastic_deform: there are kernels for cpu and cuda"):
        elastic_deform(torch.zeros(1, 1, 4, 4, device="meta"))
    assert unet_fast.elastic_deform is elastic_deform


def test_shapes_without_labels():
    """As compilers ask for them, of an image by itself."""
    with FakeTensorMode():
        image, field = torch.rand(2, 3, 8, 9), torch.zeros(2, 2, 3, 3)
        result = elastic_deform(image, field, output_shape=(5, 6))
    assert (result.shape, result.dtype) == ((2, 3, 5, 6), torch.float32)
