"""elastic_deform on volumes: what is not told by the tests of planes, and all options together."""

import itertools
import math

import numpy as np
import pytest
import torch
from budget import examples, rounds
from conftest import usable_device
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from test_elastic_deform import (
    BOUNDARIES,
    FLOATS,
    GRIDS,
    NOT_FINITE,
    POSITION,
    field,
    native,
    pixels,
    random_case,
    same_by_lean_kernels,
    scipy_field,
    to,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from unet_fast import elastic_deform, reference

OPS = torch.ops.unet_fast
SHAPE = (7, 12, 15)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def deform(request):
    """The reference, or the operator on a device; arguments and results on the CPU."""
    if request.param == "reference":
        return reference.elastic_deform
    device = usable_device(request.param)

    def run(image, *args, **options):
        args = [x.to(device) for x in args]
        result = elastic_deform(image.to(device), *args, **to(device, options))
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(r.cpu() for r in result)

    return run


@pytest.mark.parametrize("knots", [(3, 3, 3), (1, 1, 1), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_scipy(deform, rng, order, boundary, knots):
    image, displacement = rng.normal(size=(2, 2, *SHAPE)), rng.normal(size=(2, 3, *knots)) * 4
    labels = rng.integers(0, 2**31, (2, *SHAPE)).astype(np.int32)
    out, ids = deform(
        torch.from_numpy(image),
        torch.from_numpy(displacement),
        labels=torch.from_numpy(labels),
        order=order,
        boundary=boundary,
        cval=0.25,
    )
    # SciPy pads for the spline of nearest; we do as elasticdeform, and clamp positions.
    mode = "mirror" if order == 3 and boundary == "nearest" else boundary
    for n in range(2):
        position = pixels(SHAPE) + scipy_field(displacement[n], SHAPE)
        nearest = ndimage.map_coordinates(labels[n], position, order=0, mode=boundary)
        np.testing.assert_array_equal(ids[n], nearest)
        if mode != boundary:
            position = np.clip(position, 0, np.array(SHAPE)[:, None, None, None] - 1)
        for c in range(2):
            expected = ndimage.map_coordinates(
                image[n, c], position, order=order, mode=mode, cval=0.25
            )
            np.testing.assert_allclose(out[n, c], expected, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_affine_and_crop_equal_scipy(deform, rng, order):
    """Zoom about the centre and a crop, by the formulas of the package elasticdeform."""
    image, displacement = rng.random(SHAPE), rng.normal(size=(3, 2, 3, 4)) * 2
    start, shape = np.array([1.0, 3.0, 2.0]), (5, 8, 11)
    crop = tuple(slice(int(s), int(s) + n) for s, n in zip(start, shape, strict=True))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] / 1.3
    centre = np.array(shape) / 2 - 0.5
    translation = centre - turn @ centre
    turned = np.einsum("ij,j...->i...", turn, pixels(shape))
    position = turned + (translation + start)[:, None, None, None]
    position = position + scipy_field(displacement, SHAPE)[:, *crop]
    out = deform(
        torch.from_numpy(image)[None, None],
        torch.from_numpy(displacement)[None],
        affine=torch.from_numpy(np.c_[turn, translation])[None],
        offset=torch.from_numpy(start)[None],
        grid_extent="input",
        output_shape=shape,
        order=order,
    )
    expected = ndimage.map_coordinates(image, position, order=order, mode="mirror")
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-12)


def test_equals_torch_grid_sample(deform, rng):
    image, displacement = rng.normal(size=(2, 3, *SHAPE)), rng.normal(size=(2, 3, 3, 2, 4)) * 3
    fields = np.stack([scipy_field(d, SHAPE) for d in displacement])
    position = torch.from_numpy(pixels(SHAPE) + fields).flip(1).movedim(1, -1)  # x first
    where = position * (2 / (torch.tensor(SHAPE).flip(0).double() - 1)) - 1
    options = {"padding_mode": "reflection", "align_corners": True, "mode": "bilinear"}
    expected = functional.grid_sample(torch.from_numpy(image), where, **options)
    out = deform(torch.from_numpy(image), torch.from_numpy(displacement))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_keys_grid_equals_torch_bicubic(deform):
    displacement = torch.randn(1, 3, 3, 4, 5).double()
    expected = displacement
    for axis, size in enumerate((9, 6, 11)):  # one after the other: each leaves the rest alone
        lines = expected.movedim(2 + axis, 2).flatten(3)
        lines = functional.interpolate(
            lines, (size, lines.shape[3]), mode="bicubic", align_corners=True
        )
        rest = expected.movedim(2 + axis, 2).shape[3:]
        expected = lines.unflatten(3, rest).movedim(2, 2 + axis)
    moved = field(deform, displacement, (9, 6, 11), margin=12, grid="keys")
    torch.testing.assert_close(moved, expected)


def test_approximating_grid_with_a_spacing_for_each_axis(deform, rng):
    """B-splines with the displacements as coefficients, as SciPy without its filter."""
    spacing, shape = (2.0, 5.0, 7.0), (7, 14, 20)
    displacement = rng.normal(size=(3, 7, 6, 6))
    moved = field(
        deform,
        torch.from_numpy(displacement)[None],
        shape,
        grid="approximating",
        grid_spacing=spacing,
    )
    where = pixels(shape) / np.array(spacing)[:, None, None, None] + 1
    expected = [
        ndimage.map_coordinates(d, where, order=3, mode="mirror", prefilter=False)
        for d in displacement
    ]
    np.testing.assert_allclose(moved[0], expected, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_plane_is_a_volume_of_one_voxel_along_any_axis(deform, rng, order, axis):
    image, labels = torch.rand(2, 2, 9, 11).double(), torch.randint(0, 9, (2, 9, 11))
    displacement = torch.randn(2, 2, 3, 4).double() * 3
    still = torch.zeros(2, 1, 3, 4).double()
    flat = torch.cat([displacement[:, :axis], still, displacement[:, axis:]], 1)
    plane, ids = deform(image, displacement, labels=labels, order=order)
    volume, volume_ids = deform(
        image.unsqueeze(2 + axis),
        flat.unsqueeze(2 + axis),
        labels=labels.unsqueeze(1 + axis),
        order=order,
    )
    torch.testing.assert_close(volume.squeeze(2 + axis), plane, rtol=0, atol=1e-12)
    assert torch.equal(volume_ids.squeeze(1 + axis), ids)


@pytest.mark.parametrize("order", [0, 1])
def test_identity_changes_nothing(deform, order):
    for dtype in FLOATS:
        image = torch.randn(1, 2, 3, 5, 300).to(dtype)
        assert torch.equal(deform(image, order=order), image)
        turn = torch.eye(3, 4)[None, [2, 0, 1]]  # (d, r, c) <- (c, d, r)
        turned = deform(image, affine=turn, order=order, output_shape=(5, 300, 3))
        assert torch.equal(turned, image.permute(0, 1, 3, 4, 2))


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 9)] * 3))
@examples(200)
def test_equals_the_reference_in_float64(seed, sides):
    image, options = random_case(np.random.default_rng(seed), torch.float64, axes=3, sides=sides)
    results = elastic_deform(image, **options)
    expected = reference.elastic_deform(image, **options)
    torch.testing.assert_close(results[0], expected[0], rtol=0, atol=1e-10)
    assert torch.equal(results[1], expected[1])


def test_equals_the_reference_on_devices(device, rng):
    for _ in range(25):
        image, options = random_case(rng, torch.float64, axes=3)
        results = elastic_deform(image.to(device), **to(device, options))
        expected = reference.elastic_deform(image, **options)
        torch.testing.assert_close(results[0].cpu(), expected[0], rtol=0, atol=1e-10)
        assert torch.equal(results[1].cpu(), expected[1])


@pytest.mark.parametrize("dtype", [*FLOATS[:3], torch.uint8, torch.uint16], ids=str)
def test_equals_the_reference_in_other_types(device, rng, dtype):
    """But for the rounding of positions, which near a step may choose the other side."""
    unit = 1.0 if dtype.is_floating_point else torch.iinfo(dtype).max
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 1 / unit
    off, wrong, count = 0, 0, [0, 0]
    for _ in range(20):
        image, options = random_case(rng, dtype, axes=3)
        moved, labels = elastic_deform(image.to(device), **to(device, options))
        expected, expected_labels = reference.elastic_deform(image, **options)
        assert (moved.dtype, labels.dtype) == (dtype, expected_labels.dtype)
        error = (moved.cpu().double() - expected.double()).abs() / unit
        scale = 1.0 if options["affine"] is None else options["affine"].abs().max().item()
        # Slopes of image (order 3 overshoots) and grey curve, each at most about 4, on three axes.
        off += (error > 2 * rounding + 24 * POSITION * max(1, scale)).sum().item()
        wrong += (labels.cpu().long() != expected_labels.long()).sum().item()
        count = [count[0] + error.numel(), count[1] + labels.numel()]
    assert off <= 2e-3 * count[0]
    assert wrong <= 2e-3 * count[1]


def test_sources_and_several_maps(deform, rng):
    image, options = torch.rand(3, 2, 4, 5, 6), {"output_shape": (3, 4, 9)}
    labels = torch.randint(0, 99, (3, 2, 4, 5, 6))
    displacement, source = torch.randn(4, 3, 2, 3, 2) * 2, torch.tensor([2, 0, 2, 1])
    picked = deform(
        image[source], displacement, labels=labels[source][:, 1].contiguous(), **options
    )
    moved, maps = deform(image, displacement, labels=labels, source=source, **options)
    assert torch.equal(moved, picked[0])
    assert torch.equal(maps[:, 1], picked[1])


@pytest.mark.parametrize("module", [elastic_deform, reference.elastic_deform])
def test_labels_alone(module):
    """Five axes are K maps of each volume; what has fewer is planar."""
    labels, displacement = torch.randint(0, 99, (2, 2, 4, 5, 6)), torch.randn(2, 3, 2, 2, 2)
    image = torch.zeros(2, 1, 4, 5, 6)
    maps = module(None, displacement, labels=labels)
    for k in range(2):
        _, expected = module(image, displacement, labels=labels[:, k].contiguous())
        assert torch.equal(maps[:, k], expected)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_strides(device, order):
    image = torch.rand(2, 3, 6, 8, 9).to(device)
    labels = torch.randint(0, 99, (2, 6, 8, 9)).to(device)
    displacement = (torch.randn(2, 3, 3, 3, 3) * 2).to(device)
    expected = elastic_deform(image, displacement, labels=labels, order=order)
    last = image.contiguous(memory_format=torch.channels_last_3d)
    moved, _ = elastic_deform(last, displacement, labels=labels, order=order)
    assert torch.equal(moved, expected[0])
    assert moved.is_contiguous(memory_format=torch.channels_last_3d)
    wide = torch.zeros(2, 3, 12, 16, 18).to(device)
    wide[..., ::2, ::2, ::2] = image
    odd = elastic_deform(
        wide[..., ::2, ::2, ::2],
        displacement.transpose(2, 4).contiguous().transpose(2, 4),
        labels=labels.transpose(1, 3).contiguous().transpose(1, 3),
        order=order,
    )
    for ours, theirs in zip(odd, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()


def test_volumes_beyond_int32():
    """Offsets in a volume may exceed 2^31; pages that nobody touches take no memory."""
    sides = (70, 20_000, 2000)
    image = torch.empty(1, 1, *sides, dtype=torch.uint8)
    image[0, 0, -1, -1, -300:] = 7
    image[0, 0, 0, 0, :300] = 3
    steep = torch.zeros(1, 3, 4)
    steep[0, :, 2] = torch.tensor([sides[0] - 1.0, sides[1] - 1.0, sides[2] - 300.0])
    ends, ids = elastic_deform(image, affine=steep, output_shape=(1, 1, 2), labels=image[0])
    assert ends.flatten().tolist() == ids.flatten().tolist() == [3, 7]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 3])
def test_gradcheck(device, order, grid):
    image = torch.rand(1, 2, 3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    points = (4, 4, 5) if grid == "approximating" else (2, 1, 3)
    displacement = torch.randn(1, 3, *points, dtype=torch.float64, device=device)
    options = {
        "affine": torch.eye(3, 4)[None] + 0.3 * torch.randn(1, 3, 4),
        "gray_curve": torch.rand(1, 2, 4),
        "order": (order, 1),
        "grid": grid,
        "output_shape": (3, 2, 4),
    }
    options = to(device, options)
    inputs = image, displacement.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d: elastic_deform(x, d, **options), inputs, atol=1e-6)


def test_gradients_equal_the_reference(device, rng):
    for _ in range(25):
        image, options = random_case(rng, torch.float64, axes=3)
        grad, results = None, []
        for function, where in ((elastic_deform, device), (reference.elastic_deform, "cpu")):
            moved = to(where, options)
            x = image.to(where).clone(memory_format=torch.preserve_format).requires_grad_()
            d = moved.pop("displacement")
            inputs = (x,) if d is None else (x, d.requires_grad_())
            out, _ = function(*inputs, **moved)
            grad = torch.randn(out.shape, dtype=out.dtype) if grad is None else grad
            gradients = torch.autograd.grad(out, inputs, grad.to(where), materialize_grads=True)
            results.append([g.cpu() for g in gradients])
        for ours, theirs in zip(*results, strict=True):
            rounding = 1e-9 if theirs.dtype == torch.float64 else 1e-7
            atol = rounding * (1 + theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_backward_is_the_adjoint(device, order):
    x = torch.randn(2, 2, 9, 10, 12, dtype=torch.float64, device=device, requires_grad=True)
    displacement = (torch.randn(2, 3, 3, 3, 3) * 6).to(device)
    moved = elastic_deform(x, displacement, order=order, output_shape=(8, 7, 40))
    y = torch.randn_like(moved)
    (back,) = torch.autograd.grad(moved, x, y)
    left, right = (moved * y).sum().item(), (x * back).sum().item()
    assert left == pytest.approx(right, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_positions_that_are_no_voxels(deform, value):
    image, labels = torch.rand(1, 1, 4, 5, 7).double(), torch.ones(1, 4, 5, 7, dtype=torch.uint8)
    bad = torch.zeros(1, 3, 3, 3, 3).double()
    bad[0, 0, 1, 1, 1] = value
    turn = torch.eye(3, 4)[None].double()
    turn[0, 0, 3] = value
    offset = torch.tensor([[value, 0, 0]], dtype=torch.float64)
    for boundary, order in itertools.product(BOUNDARIES, (0, 1, 3)):
        options = {"labels": labels, "order": order, "boundary": boundary, "cval": 5}
        moved, ids = deform(image, bad, **options)
        assert torch.isnan(moved).any()
        lost = torch.isnan(moved[:, 0]) | (moved[:, 0] == 5)
        assert torch.equal(ids == 0, lost)
        for arguments in ({"affine": turn}, {"offset": offset}):
            moved, ids = deform(image, **arguments, **options)
            assert torch.isnan(moved).all()
            assert (ids == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8], ids=str)
def test_cuda_kernels_on_host(host_kernels, rng, dtype):
    off, wrong, count = 0, 0, [0, 0]
    for _ in range(rounds(12 if dtype == torch.float64 else 4, host_kernels)):
        image, options = random_case(rng, dtype, axes=3)
        source = rng.integers(0, len(image), len(image)) if rng.random() < 0.5 else None
        *parameters, labels, curve, settings, shape, window = native(image, options)
        moved, ids = host_kernels.elastic_deform_3d(
            image.numpy(), *parameters, labels, curve, *settings, shape, window, source
        )
        source = None if source is None else torch.from_numpy(source)
        expected, expected_ids = elastic_deform(image, source=source, **options)
        error = np.abs(moved.astype(float) - expected.double().numpy())
        assert np.isnan(error).sum() == 0
        if dtype == torch.float64:
            assert error.max() < 1e-10
            assert np.array_equal(ids, expected_ids.numpy())
        scale = 1.0 if options["affine"] is None else options["affine"].abs().max().item()
        allowed = 1.0 if dtype == torch.uint8 else 48 * POSITION * max(1, scale)
        off, wrong = off + (error > allowed).sum(), wrong + (ids != expected_ids.numpy()).sum()
        count = [count[0] + error.size, count[1] + ids.size]
    assert off <= 2e-3 * count[0]
    assert wrong <= 2e-3 * count[1]


def test_lean_cuda_kernels_on_host(host_kernels, rng):
    same_by_lean_kernels(host_kernels, rng, torch.float64, 3, 4)
    same_by_lean_kernels(host_kernels, rng, torch.float32, 3, 2)


@pytest.mark.thorough
def test_cuda_derivatives_on_host(host_kernels, rng):
    for _ in range(rounds(15, host_kernels)):
        image, options = random_case(rng, torch.float64, axes=3)
        grad = torch.randn(*image.shape[:2], *options["output_shape"], dtype=torch.float64)
        *parameters, _, curve, settings, _, _ = native(image, options)
        ours = host_kernels.elastic_deform_backward_3d(
            grad.numpy(), image.numpy(), *parameters, curve, *settings
        )
        x, d = image.clone().requires_grad_(), options.pop("displacement")
        inputs = (x,) if d is None else (x, d.requires_grad_())
        out, _ = elastic_deform(*inputs, **options)
        expected = torch.autograd.grad(out, inputs, grad)
        for a, b in zip(ours, expected, strict=False):
            rounding = 1e-9 if b.dtype == torch.float64 else 1e-7
            atol = rounding * (1 + b.abs().max().item())
            np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=atol)


def native_arguments(device):
    image = torch.rand(1, 2, 4, 5, 6, dtype=torch.float64, device=device)
    displacement = torch.randn(1, 3, 3, 3, 3, dtype=torch.float64, device=device)
    labels = torch.randint(0, 9, (1, 4, 5, 6), device=device)
    scales, shape, window = [2 / 2, 2 / 4, 2 / 6], [3, 5, 7], [1, 3, 5]
    settings = ([1, 3], 0, False, scales, 0, 0.0, shape, window, None)
    return (image, displacement, None, None, labels, None, *settings)


def test_opcheck(device):
    image, displacement, *rest = native_arguments(device)
    inputs = image.requires_grad_(), displacement.requires_grad_()
    torch.library.opcheck(OPS.elastic_deform.default, (*inputs, *rest))


def test_fake_results_have_the_layout_of_real_ones(device):
    for last, size in itertools.product((False, True), ([3, 4, 5], [1, 1, 1], [1, 4, 1])):
        image, *rest = native_arguments(device)
        rest[-3:-1] = size, [1, 1, 1]
        rest[-2] = [s % 2 or 2 for s in size]
        image = image.contiguous(memory_format=torch.channels_last_3d) if last else image
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = OPS.elastic_deform(mode.from_tensor(image), *rest)
        for a, b in zip(fake, OPS.elastic_deform(image, *rest), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_transforms_of_torch(device):
    """`torch.compile` without graph breaks, `vmap` and `torch.func.grad`."""
    image = torch.rand(2, 1, 4, 5, 6, device=device)
    displacement = torch.randn(2, 3, 2, 2, 2, device=device)

    def loss(x, d):
        return elastic_deform(x, d).square().sum()

    expected = torch.func.grad(loss, (0, 1))(image, displacement)
    leaves = image.clone().requires_grad_(), displacement.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)
    each = torch.vmap(elastic_deform)(image[:, None], displacement[:, None])
    assert torch.equal(each[:, 0], elastic_deform(image, displacement))


VOLUME, IDS = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(1, 1, 4, 0, 4)}, r"\(N, C, D, H, W\) with D, H, W >= 1, got"),
        ({"image": torch.zeros(4, 4, 4)}, r"\(N, C, H, W\) or \(N, C, D, H, W\), got \(4, 4, 4\)"),
        ({"labels": IDS[:, 0]}, r"labels must have shape \(1, 4, 4, 4\), got \(1, 4, 4\)"),
        ({"labels": IDS[..., :3]}, r"labels must have shape \(1, 4, 4, 4\), got \(1, 4, 4, 3\)"),
        ({"image": VOLUME[:, :, 0], "labels": IDS[None]}, r"shape \(1, 4, 4\), got \(1, 1, 4, 4,"),
        (
            {"displacement": torch.zeros(1, 2, 3, 3)},
            r"shape \(1, 3, P >= 1, Q >= 1, R >= 1\), got \(1, 2, 3, 3\)",
        ),
        ({"displacement": torch.zeros(1, 3, 3, 0, 3)}, r"R >= 1\), got \(1, 3, 3, 0, 3\)"),
        ({"affine": torch.zeros(1, 2, 3)}, r"affine must have shape \(1, 3, 4\), got \(1, 2, 3\)"),
        ({"offset": torch.zeros(1, 2)}, r"offset must have shape \(1, 3\), got \(1, 2\)"),
        ({"output_shape": (4, 4)}, r"output_shape must be three sizes >= 1, got \(4, 4\)"),
        ({"labels": IDS, "label_shape": (4, 4)}, "label_shape must be three sizes >= 1"),
        (
            {"displacement": torch.zeros(1, 3, 3, 4, 4), "grid": "approximating"},
            r"at least 4 points along each axis for an approximating grid, got \(3, 4, 4\)",
        ),
        ({"grid": "approximating", "grid_spacing": (1, 2)}, r"each of 3 axes, got \(1.0, 2.0\)"),
    ],
)
@pytest.mark.parametrize("function", [elastic_deform, reference.elastic_deform])
def test_rejects(function, change, message):
    with pytest.raises(ValueError, match=f"^elastic_deform: .*{message}"):
        function(**{"image": VOLUME} | change)


def test_raw_operator_rejects():
    image, displacement, *rest = native_arguments("cpu")
    wrong = {
        "takes an image": (image[0, 0], displacement),
        r"takes labels \(N, D, H, W\)": (image[..., :3], displacement),
        "3 rows an image": (image, displacement[:, :2]),
        "takes parameters": (image, displacement[:, :, 0]),
    }
    for message, inputs in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.elastic_deform(*inputs, *rest)


def test_not_finite_float32(deform):
    displacement = torch.randn(1, 3, 5, 5, 5)
    for value, grid in itertools.product((math.nan, math.inf, 3e38), GRIDS):
        displacement[0, 0, 2, 2, 2] = value
        assert torch.isnan(deform(torch.rand(1, 1, 6, 6, 40), displacement, grid=grid)).any()
