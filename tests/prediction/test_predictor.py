"""Prediction: tiles agree with the whole image."""

import itertools
import math

import numpy as np
import pytest
import torch
from budget import examples, first
from conftest import usable_device
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unet_fast import UNet, predict
from unet_fast._layers import FusedConvolution
from unet_fast.images import intensity
from unet_fast.prediction import tiling
from unet_fast.prediction.options import Options
from unet_fast.prediction.predictor import Predictor


def integer_net(seed=0, corner=None, **options):
    """A network whose every sum is exact in float32, whatever its order.

    Each convolution adds up two inputs, times 1 or -1. With `corner`, 0 or -1 along each axis,
    these lie in that corner of the kernel, so that every output looks as far as it can in one
    direction.
    """
    net = UNet(**{"base_channels": 2, "depth": 2} | options).eval()
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    raising = nn.ConvTranspose2d, nn.ConvTranspose3d
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, *raising)):
                weight = module.weight.zero_()
                outputs = 1 if isinstance(module, raising) else 0
                for out in range(weight.shape[outputs]):
                    kernel = weight.select(outputs, out)  # (inputs, *sides)
                    for i in range(2):
                        tap = [int(draw(n, 1)) for n in kernel.shape]
                        if corner is not None and not isinstance(module, raising):
                            tap[1:] = corner
                        kernel[tuple(tap)] = 1 if i == 0 or draw(3, 1) else -1
                module.bias.copy_(draw(3, *module.bias.shape) - 1)
    return net


def integers(*shape, seed=0):
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed)).float()


def on_the_plane(net, image):
    """The prediction by its definition: one pass over the mirrored image, far beyond its border.

    Beyond what an unpadded network loses, and what interpolation adds.
    """
    unpadded = UNet(**net.config | {"base_channels": 1, "padding": "valid"})
    size = image.shape[1:]
    margins = [
        -(-(lost // 2) // step) * step + 2 * step
        for lost, step in zip(unpadded.shrinkage, net.alignment, strict=True)
    ]
    shape = net.input_shape([n + 2 * m for n, m in zip(size, margins, strict=True)])
    sides = zip(size, shape, margins, net.shrinkage, strict=True)
    for axis, (n, length, margin, lost) in enumerate(sides, 1):
        begin = margin + lost // 2
        period = max(2 * n - 2, 1)
        image = image.index_select(
            axis,
            torch.tensor([min(i % period, -i % period) for i in range(-begin, length - begin)]),
        )
    with torch.inference_mode():
        scores = net(image[None])[0]
    return scores[:, *(slice(m, m + n) for m, n in zip(margins, size, strict=True))]


@st.composite
def networks(draw):
    """Arguments of `integer_net`: two axes or three, half with kernels and poolings of any size."""
    dims, other = draw(st.sampled_from([2, 3])), draw(st.booleans())
    depth = draw(st.integers(1, 2 if other or dims == 3 else 3))
    options = {
        "seed": draw(st.integers(0, 10**6)),
        "corner": draw(st.none() | st.tuples(*[st.sampled_from([0, -1])] * dims)),
        "dims": dims,
        "in_channels": draw(st.sampled_from([1, 3])),
        "depth": depth,
        "padding": draw(st.sampled_from(["valid", "same"])),
        "widening": draw(st.sampled_from(["after_pooling", "before_pooling"])),
        "upsampling": draw(st.sampled_from(["transpose", "release_2015", "bilinear"])),
    }
    if other:
        small = dims + depth == 5  # else there are too many voxels for a test
        exact = [1, 2] if small or options["upsampling"] == "bilinear" else [1, 2, 3]
        for name, levels, numbers in (
            ("kernels", depth + 1, [1, 3] if small else [1, 3, 5]),
            ("poolings", depth, exact),
        ):
            row = st.tuples(*[st.sampled_from(numbers)] * dims)
            options[name] = draw(st.lists(row, min_size=levels, max_size=levels))
    return options


@pytest.mark.filterwarnings("ignore:predict. tile .* becomes")
@examples(200, deadline=None)
@given(options=networks(), data=st.data(), batch_size=st.none() | st.integers(1, 5))
def test_tiles_equal_the_whole_bit_for_bit(options, data, batch_size):
    dims = options["dims"]
    side = st.integers(1, 70 if dims == 2 else 24)
    size = data.draw(st.tuples(*[side] * dims))
    tile = st.integers(1, 80) if dims == 2 else st.integers(12, 30)  # tiles of volumes are many
    net = integer_net(**options)
    image = integers(options["in_channels"], *size, seed=options["seed"])
    whole = on_the_plane(net, image)
    tile = data.draw(tile | st.tuples(*[tile] * dims))
    tiled = predict(net, image, tile=tile, batch_size=batch_size, output="scores")
    assert torch.equal(tiled, whole)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_tiles_equal_the_whole_at_the_papers_depth(padding):
    net = integer_net(depth=4, padding=padding, corner=(0, 0))
    image = integers(1, 301, 77).clamp(max=1)
    whole = on_the_plane(net, image)
    assert len(whole.unique()) > 20  # the network does say something
    for tile in (16, 47, (160, 16), 400):
        assert torch.equal(predict(net, image, tile=tile, output="scores"), whole)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("upsampling", ["transpose", "bilinear"])
@pytest.mark.parametrize(
    "options",
    [
        {"depth": 1},
        {"depth": 2},
        {"depth": 3},
        {"depth": 2, "kernels": [(3, 5), (1, 3), (3, 7)], "poolings": [(4, 1), (2, 2)]},
        {"depth": 1, "dims": 3},
        {"depth": 1, "dims": 3, "kernels": [(1, 3, 3), (3, 3, 5)], "poolings": [(1, 2, 2)]},
    ],
    ids=str,
)
def test_the_halo_is_needed(monkeypatch, padding, upsampling, options):
    """One step less along one axis, and tiles no longer agree: the test of equality can fail."""
    options = options | {"padding": padding, "upsampling": upsampling}
    model = UNet(base_channels=1, **options)
    halo = tiling.halo_of(model)
    if padding == "valid" and upsampling == "transpose":
        assert not any(halo)
        return
    image = integers(1, *[64 if model.dims == 2 else 16] * model.dims)
    tile = 16 if model.dims == 2 else 8
    cases = [(seed, (end,) * model.dims) for seed in range(20) for end in (0, -1)]
    wholes = {}
    for axis in (axis for axis in range(model.dims) if halo[axis]):
        less = [
            h - (a == axis) * step
            for a, (h, step) in enumerate(zip(halo, model.alignment, strict=True))
        ]
        monkeypatch.setattr(tiling, "halo_of", lambda model, less=less: tuple(less))
        for case in cases:
            net = integer_net(*case, **options)
            if case not in wholes:
                wholes[case] = on_the_plane(net, image)
            if not torch.equal(predict(net, image, tile=tile, output="scores"), wholes[case]):
                break
        else:
            pytest.fail(f"no difference along axis {axis}")


def test_tiles_that_are_not_aligned_differ():
    """The network commutes with shifts by multiples of 2^depth only."""
    net, image = integer_net(3, depth=2), integers(1, 60, 60)
    whole = on_the_plane(net, image)
    shifted = on_the_plane(net, image[:, 4:])  # mirrored elsewhere, the same far from there
    assert torch.equal(shifted[:, 30:40, 30:], whole[:, 34:44, 30:])
    shifted = on_the_plane(net, image[:, 2:])
    assert not torch.equal(shifted[:, 30:40, 30:], whole[:, 32:42, 30:])


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    ("norm", "upsampling"), [(None, "transpose"), ("batch", "transpose"), (None, "bilinear")]
)
@pytest.mark.parametrize("precision", first(torch.float32, torch.bfloat16), ids=str)
def test_real_weights(padding, norm, upsampling, precision):
    """Other tiles, other order of sums: the difference is rounding, of some 20 layers."""
    torch.manual_seed(0)
    net = UNet(base_channels=8, padding=padding, norm=norm, upsampling=upsampling).eval()
    image = torch.rand(200, 330)
    whole = predict(net, image, tile=400, output="scores", precision=precision)
    tiled = predict(net, image, tile=(64, 112), output="scores", precision=precision)
    error = (tiled - whole).abs().max() / whole.abs().max()
    assert error <= 32 * torch.finfo(precision).eps
    assert torch.equal(
        tiled, predict(net, image, tile=(64, 112), output="scores", precision=precision)
    )


def test_on_cuda():
    """In float64, whose sums are exact on a GPU too: no tensor cores, no other transforms."""
    device = usable_device("cuda")
    for options in ({}, {"padding": "same"}, {"upsampling": "bilinear"}):
        net, image = integer_net(depth=3, **options).double(), integers(1, 150, 201)
        whole = predict(net, image, output="scores", tile=300)
        for tile in (16, (64, 40), 300):
            found = predict(net, image, output="scores", tile=tile, device=device)
            assert torch.equal(found, whole)
        found = predict(net, image, output="scores", tile=40, tta="square", device=device)
        assert torch.equal(found, predict(net, image, output="scores", tta="square"))
    assert next(net.parameters()).device.type == "cpu"
    net, image = UNet(base_channels=8).eval(), torch.rand(300, 400)
    expected = predict(net, image, output="scores")
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        options = {"output": "scores", "precision": precision, "device": device}
        found = predict(net, image, tile=128, **options)
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
        assert torch.equal(found, predict(net, image, tile=128, **options))
    angles = predict(net, image, output="scores", tta=[10, 20], device=device)
    assert (angles - predict(net, image, output="scores", tta=[10, 20])).abs().max() < 0.05
    with pytest.raises(ValueError, match="memory_budget must hold 1 tile of 16 x 16"):
        predict(net, image, memory_budget=1000, device=device)


@pytest.mark.parametrize("tta", ["flips", "rotations", "square"])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_averages_agree_between_tiles(tta, padding):
    net = integer_net(1, in_channels=2, padding=padding)
    image = integers(2, 45, 66)
    whole = predict(net, image, tile=100, output="scores", tta=tta)
    assert not torch.equal(whole, predict(net, image, output="scores"))
    for tile in (4, (40, 12), 33):
        tiled = predict(net, image, tile=tile, output="scores", tta=tta, batch_size=3)
        assert torch.equal(tiled, whole)


@pytest.mark.parametrize("tta", first("square", "flips", "rotations", [30, -100]))
def test_averages_of_volumes_agree_between_tiles(tta):
    net = integer_net(1, dims=3, depth=1, kernels=[(1, 3, 3), (3, 3, 3)], padding="same")
    volume = integers(1, 12, 21, 30)
    whole = predict(net, volume, tile=40, output="scores", tta=tta)
    assert not torch.equal(whole, predict(net, volume, output="scores"))
    tiled = predict(net, volume, tile=(4, 12, 16), output="scores", tta=tta, batch_size=3)
    if isinstance(tta, str):
        assert torch.equal(tiled, whole)
    else:
        torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("tta", [None, "flips", "rotations", "square", [30, -100]], ids=str)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_network_of_flat_kernels_sees_each_plane(tta, padding):
    """Of a volume it gives what the same network of two axes gives of its planes."""
    flat = integer_net(5, padding=padding, depth=1)
    flats = {"kernels": [(1, 3, 3)] * 2, "poolings": [(1, 2, 2)]}
    net = UNet(base_channels=2, dims=3, depth=1, padding=padding, **flats).eval()
    net.load_state_dict(
        {name: x.unsqueeze(2) if x.dim() == 4 else x for name, x in flat.state_dict().items()}
    )
    volume = integers(1, 3, 20, 33)
    planes = [predict(flat, plane, output="scores", tta=tta) for plane in volume[0]]
    found = predict(net, volume, output="scores", tta=tta, tile=(1, 8, 16))
    torch.testing.assert_close(found, torch.stack(planes, 1))


@pytest.mark.parametrize(
    ("tta", "dims", "views"),
    [("flips", 2, 4), ("rotations", 2, 4), ("square", 2, 8), ("flips", 3, 8), ("square", 3, 8)],
)
def test_averages_are_those_of_turned_images(tta, dims, views):
    """Where the poolings of the turned image fall on the same pixels, as here, by definition."""
    depth = 4 - dims
    net = UNet(base_channels=2, depth=depth, dims=dims).eval()
    # The input's sides keep their residue when it is turned.
    size = (64 if dims == 2 else 16) + 4 * 2**depth - 4
    image = torch.rand(1, *[size] * dims)
    rim = (net.input_shape([size] * dims)[0] - size) // 2
    padded = torch.nn.functional.pad(image, [rim] * 2 * dims, mode="reflect")
    flips = [f for n in range(dims + 1) for f in itertools.combinations(range(1, dims + 1), n)]
    group = {
        "flips": [(f, 0) for f in flips],
        "rotations": [((), k) for k in range(4)],
        "square": [(f, k) for f in ((), (dims,)) for k in range(4)],
    }[tta]
    assert len(group) == views
    results = []
    with torch.inference_mode():
        for flip, turns in group:
            turned = torch.rot90(padded.flip(flip), turns, (-2, -1))
            results.append(torch.rot90(net(turned[None])[0], -turns, (-2, -1)).flip(flip))
    kept = (slice(None, size),) * dims
    for average, mean in (
        ("scores", torch.stack(results).mean(0).softmax(0)),
        ("probabilities", torch.stack(results).softmax(1).mean(0)),
    ):
        found = predict(net, image, tta=tta, average=average)
        torch.testing.assert_close(found, mean[:, *kept])


def test_refuses_quarter_turns_where_rows_and_columns_differ():
    net = UNet(base_channels=2, depth=1, kernels=[(3, 3), (3, 5)]).eval()
    image = torch.rand(20, 20)
    for tta in ("rotations", "square", [0, 90]):
        with pytest.raises(ValueError, match="tta must be without quarter turns where kernels or"):
            predict(net, image, tta=tta)
    assert predict(net, image, tta="flips").shape == predict(net, image, tta=[180]).shape


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_rotations_by_any_angle(padding):
    """Tiles agree; a network that only passes its input on gives it back, smoothed a little."""
    torch.manual_seed(1)
    net = UNet(base_channels=4, depth=2, padding=padding).eval()
    image = torch.rand(50, 75)
    angles = [360 / 7 * k for k in range(7)]
    whole = predict(net, image, tile=100, output="scores", tta=angles)
    tiled = predict(net, image, tile=(16, 24), output="scores", tta=angles, batch_size=4)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))

    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        identity = [*net.down[0], *net.merge[0], net.head]
        for module in identity:
            if isinstance(module, nn.Conv2d):
                channel = 4 if module is net.merge[0][0] else 0  # the skip lies behind
                middle = module.kernel_size[0] // 2
                module.weight[0, channel, middle, middle] = 1
    rows, columns = torch.meshgrid(torch.arange(50.0), torch.arange(75.0), indexing="ij")
    smooth = 3 + (rows / 9).sin() + (columns / 11).cos()
    for angle in (30.0, -100.0, 90.0, 720.0):
        found = predict(net, smooth, output="scores", tta=[angle], tile=32)[0]
        inside = (slice(3, -3), slice(3, -3))  # mirroring has kinks
        torch.testing.assert_close(found[inside], smooth[inside], rtol=0, atol=0.01)


def test_an_angle_of_ninety_degrees_is_a_quarter_turn():
    net, image = UNet(base_channels=2, depth=2).eval(), torch.rand(40, 52)
    turns = predict(net, image, tta=[0, 90, 180.0, -90], output="scores")
    torch.testing.assert_close(turns, predict(net, image, tta="rotations", output="scores"))
    # A rotation by almost as much looks at almost the same pixels, but for where poolings fall.
    net = UNet(base_channels=2, depth=1).eval()
    images = [predict(net, image, tta=[angle], output="scores") for angle in (89.999, 90, 91.001)]
    near, far = ((images[i] - images[1]).abs().mean() for i in (0, 2))
    assert min(near, far) < 0.7 * images[1].std()


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_refuses_tiles_where_statistics_span_the_image(norm):
    net = UNet(base_channels=2, depth=1, norm=norm).eval()
    with pytest.raises(ValueError, match=r"tile must cover the image, for \w+ takes its stat"):
        predict(net, torch.rand(40, 40), tile=16)
    with pytest.raises(ValueError, match=r"memory_budget must hold 1 tile of 40 x 40 pixels, for "):
        predict(net, torch.rand(40, 40), memory_budget=1000)
    assert predict(net, torch.rand(40, 40), tile=40).shape == (2, 40, 40)
    assert predict(net, torch.rand(1500, 30)).shape == (2, 1500, 30)  # at once, however large


def test_refuses_tiles_with_batch_norm_in_training_mode():
    """In training mode the network is put in evaluation mode, but that may not be enough."""
    net = UNet(base_channels=2, depth=1, norm="batch").train()
    torch.testing.assert_close(
        predict(net, torch.rand(40, 40) * 0 + 0.5, tile=16),
        predict(net, torch.rand(40, 40) * 0 + 0.5, tile=40),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    with pytest.raises(ValueError, match="BatchNorm2d without running mean takes its statistics"):
        predict(net, torch.rand(40, 40), tile=16)


@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"upsampling": "bilinear"}], ids=str)
@pytest.mark.parametrize("budget", [2**24, 2**27, 2**33])
@pytest.mark.filterwarnings("ignore:predict. memory_budget leaves tiles")
def test_plans_within_the_budget(options, budget):
    net = UNet(base_channels=16, **options)
    made = tiling.plan(net, (3000, 5000), memory_budget=budget)
    assert all(t % 16 == 0 or t == n for t, n in zip(made.tile, made.image, strict=True))
    assert made.batch * tiling.tile_bytes(net, made, 4) <= budget
    assert net.output_shape(made.input) >= tuple(
        t + 2 * h for t, h in zip(made.tile, made.halo, strict=True)
    )
    covered = np.zeros((3000, 5000), np.uint8)
    for row, column in made.origins:
        assert row % 16 == column % 16 == 0
        covered[row : row + made.tile[0], column : column + made.tile[1]] += 1
    assert (covered == 1).all()
    more = tiling.plan(net, (3000, 5000), memory_budget=2 * budget)
    assert math.prod(more.tile) >= math.prod(made.tile)


def test_a_budget_that_leaves_small_tiles_is_told():
    net = UNet(base_channels=16, padding="same")
    with pytest.warns(UserWarning, match="budget leaves tiles of 32 x 32, each of which reads 49"):
        tiling.plan(net, (3000, 5000), memory_budget=2**24)
    tiling.plan(net, (3000, 5000), memory_budget=2**27)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("budget", [2**27, 2**31])
@pytest.mark.filterwarnings("ignore:predict. memory_budget leaves tiles")
def test_plans_of_volumes_within_the_budget(padding, budget):
    flat = {"kernels": [(1, 3, 3), *[(3, 3, 3)] * 3], "poolings": [(1, 2, 2), *[(2, 2, 2)] * 2]}
    net = UNet(dims=3, base_channels=4, depth=3, padding=padding, **flat)
    assert net.alignment == (4, 8, 8)
    made = tiling.plan(net, (100, 500, 300), memory_budget=budget)
    pairs = zip(made.tile, made.image, net.alignment, strict=True)
    assert all(t % step == 0 or t == n for t, n, step in pairs)
    assert made.batch * tiling.tile_bytes(net, made, 4) <= budget
    assert made.halo == ((0, 0, 0) if padding == "valid" else (24, 48, 48))
    covered = np.zeros(made.image, np.uint8)
    for origin in made.origins:
        covered[tuple(slice(o, o + n) for o, n in zip(origin, made.tile, strict=True))] += 1
    assert (covered == 1).all()


def test_plans():
    net = UNet(base_channels=16)
    assert tiling.plan(net, (1000, 700)).is_whole
    assert tiling.plan(net, (1, 100)).input == (188, 284)
    assert tiling.plan(net, (1100, 100)).tile == (560, 100)  # equal parts, no narrow rest
    small = tiling.plan(net, (1000, 1000), tile=16)
    assert small.batch > 1
    assert tiling.plan(net, (1000, 1000), tile=16, batch_size=5).batch == 5
    wide = UNet(base_channels=64)
    assert tiling.tile_bytes(wide, tiling.plan(wide, (5000, 5000)), 4) <= 2**30
    with pytest.raises(ValueError, match=r"memory_budget must hold 1 tile of 16 x 16.*got 1000"):
        tiling.plan(net, (100, 100), memory_budget=1000)
    with pytest.raises(ValueError, match="memory_budget must hold 64 tile"):
        tiling.plan(net, (1000, 1000), tile=16, memory_budget=2**24, batch_size=64)


@pytest.mark.parametrize(
    ("norm", "bottleneck_norm", "upsampling", "padding", "depth", "base", "shape", "counted"),
    [
        (None, None, "transpose", "valid", 4, 64, (492, 396), 27406096),
        (None, None, "transpose", "same", 4, 16, (304, 208), 4110080),
        (None, "batch", "release_2015", "valid", 4, 64, (492, 396), 31846672),
        (None, None, "bilinear", "same", 3, 32, (304, 200), 8816000),
        (None, None, "bilinear", "valid", 2, 8, (340, 240), 2452416),
        (None, None, "release_2015", "same", 1, 4, (300, 200), 1500000),
        ("batch", None, "transpose", "valid", 4, 64, (492, 396), 27517200),
        ("group", None, "bilinear", "same", 4, 16, (304, 208), 4615936),
    ],
)
def test_numbers_of_a_pass(norm, bottleneck_norm, upsampling, padding, depth, base, shape, counted):
    """As counted once from every tensor that was alive in a pass."""
    names = "norm", "bottleneck_norm", "upsampling", "padding", "depth"
    settings = dict(zip(names, (norm, bottleneck_norm, upsampling, padding, depth), strict=True))
    net = UNet(base_channels=base, **settings)
    found = tiling._values(net, shape)
    assert found == (counted if norm is None else pytest.approx(counted, rel=0.01))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("widening", ["after_pooling", "before_pooling"])
def test_numbers_of_a_pass_on_a_volume(padding, widening):
    """A network of flat kernels takes as much for each plane; one of all kernels takes no more."""
    options = {"base_channels": 4, "depth": 2, "padding": padding, "widening": widening}
    counted = tiling._values(UNet(**options), (104, 84))
    flat = UNet(dims=3, kernels=[(1, 3, 3)] * 3, poolings=[(1, 2, 2)] * 2, **options)
    assert tiling._values(flat, (60, 104, 84)) == 60 * counted
    assert tiling._values(UNet(dims=3, **options), (60, 104, 84)) <= 60 * counted


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((300, 400), {"base_channels": 16}),
        ((300, 400), {"base_channels": 32}),
        ((70, 66, 72), {"dims": 3, "base_channels": 16, "depth": 2}),
        ((70, 66, 72), {"dims": 3, "base_channels": 8, "depth": 2, "padding": "same"}),
    ],
    ids=str,
)
def test_memory_of_a_tile_is_what_a_pass_allocates(size, options):
    """Against the profiler's count of what torch allocates on the CPU."""
    net = UNet(**options).eval()
    made = tiling.plan(net, size)
    layout = torch.channels_last if net.dims == 2 else torch.channels_last_3d
    inputs = torch.rand(1, 1, *made.input).contiguous(memory_format=layout)
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode():
        net(inputs)
        with torch.profiler.profile(activities=activity, profile_memory=True) as profiler:
            net(inputs)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    measured = max(itertools.accumulate(change for _, change in changes))
    assert 0.8 * measured <= tiling.tile_bytes(net, made, 4) <= 1.5 * measured


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_mirrored_at_any_distance(n):
    at = tiling.mirrored(-93, 200, n)
    expected = np.pad(np.arange(n), (93, 200 - 93), mode="reflect")[:200]
    assert (at == expected).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiled():
    torch.manual_seed(0)
    net, image = UNet(base_channels=2, depth=1).eval(), torch.rand(30, 30)
    compiled = predict(net, image, tile=16, compile=True, output="scores")
    torch.testing.assert_close(compiled, predict(net, image, output="scores"))


@examples(100, deadline=None)
@given(
    kind=st.sampled_from(
        ["uint8", "uint16", "int8", "int16", "int32", "float32", "float64", "few"]
    ),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cut=st.integers(1, 7),
    seed=st.integers(0, 10**6),
)
def test_percentiles_are_exact_in_parts(kind, size, cut, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 30, (2, *size)) if kind[0] == "f" else rng.integers(0, 250, (2, *size))
    if kind == "few":
        image = np.round(image / 40) * 40 - 100
    if kind[:3] == "int":
        image = image - 125
    image = image.astype("float32" if kind == "few" else kind)
    found = intensity.range_of(lambda: (image[:, i::cut] for i in range(min(cut, size[0]))))
    flat = image.reshape(2, -1).astype(np.float32).astype(np.float64)
    low, high = np.percentile(flat, [1, 99.8], axis=1)
    same = low == high
    low, high = np.where(same, flat.min(1), low), np.where(same, flat.max(1), high)
    np.testing.assert_allclose(found.low, low, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.width, np.where(high > low, high - low, 1), rtol=1e-9)


def test_refuses_what_is_not_a_number():
    net = UNet(base_channels=1, depth=1)
    image = np.zeros((9, 9), np.float32)
    for value in (np.nan, np.inf):
        image[3, 4] = value
        for normalisation in (None, "percentile"):
            net.normalisation = normalisation
            with pytest.raises(ValueError, match=f"image must be finite in float32, got {value}"):
                predict(net, image, tile=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (33, 21), (64, 64)], ids=str)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_predicts_any_size(size, padding):
    model = UNet(base_channels=2, depth=2, padding=padding).train()
    image = torch.rand(size)
    scores = predict(model, image, output="scores")
    assert scores.shape == (2, *size)
    assert model.training
    found = predict(model, image.numpy())
    assert isinstance(found, np.ndarray)  # NumPy in, NumPy out
    torch.testing.assert_close(torch.from_numpy(found), scores.softmax(0))
    assert torch.equal(predict(model, image[None], output="labels"), scores.argmax(0))
    assert predict(model, image, output="instances").shape == size


def test_prediction_takes_any_tensor_and_leaves_the_model_as_it_was():
    model = UNet(base_channels=2, depth=1, norm="batch").train()
    model.bottom.eval()
    image = torch.rand(9, 11).bfloat16()
    expected = torch.from_numpy(predict(model, image.float().numpy()))
    assert torch.equal(predict(model, image), expected)
    assert torch.equal(predict(model, image.clone().requires_grad_()), expected)
    assert model.training
    assert not model.bottom.training
    assert predict(model.double(), image).shape == (2, 9, 11)
    integers = (image.float() * 1000).numpy().astype(np.uint16)
    assert predict(model, integers).shape == (2, 9, 11)


def test_sparse_images_are_normalised():
    image = np.zeros((1, 100, 100), np.float32)
    image[0, :2, :2] = 5000
    assert intensity.normalise(image).max() == 1
    assert (intensity.normalise(image * 0 + 7) == 0).all()
    ramp = np.linspace(50, 100, 1001, dtype=np.float32).reshape(1, 7, 143)
    assert intensity.normalise(ramp)[0, 0, 10] == pytest.approx(0, abs=1e-6)


def test_mirrors_what_lies_outside():
    model = UNet(base_channels=2, depth=1).eval()
    image = torch.rand(12, 14)
    padded = torch.nn.functional.pad(image[None, None], (8, 8, 8, 8), mode="reflect")
    with torch.no_grad():
        expected = model(padded)[0]
    torch.testing.assert_close(predict(model, image, output="scores"), expected)


def test_normalisation_only_for_trained_models():
    model = UNet(base_channels=2, depth=1).eval()
    image = torch.rand(10, 10)
    bare = predict(model, image)
    assert not torch.allclose(predict(model, image * 3 + 1), bare)
    model.normalisation = "percentile"
    torch.testing.assert_close(predict(model, image * 3 + 1), predict(model, image))


def test_says_that_a_tile_is_too_small_for_the_depth():
    image = torch.rand(9, 11)
    with pytest.warns(
        UserWarning, match="tile 7 becomes 8 where the image is larger: 8, the product"
    ):
        predict(UNet(base_channels=1, depth=3), image, tile=7)
    predict(UNet(base_channels=1, depth=2), image, tile=7)  # rounded, as documented: no warning


def test_predict_rejects():
    model = UNet(base_channels=1, depth=1)
    with pytest.raises(ValueError, match=r"image must be \(H, W\) or .* C = 1, got \(2, 5, 5\)"):
        predict(model, torch.zeros(2, 5, 5))
    with pytest.raises(ValueError, match=r"got \(0, 5\)"):
        predict(model, torch.zeros(0, 5))
    with pytest.raises(
        ValueError, match=r"got \(1, 4, 5, 6\) \(volumes need a network with dims=3"
    ):
        predict(model, torch.zeros(1, 4, 5, 6))
    with pytest.raises(ValueError, match=r"image must be \(D, H, W\) or \(C, D, H, W\) with C = 1"):
        predict(UNet(base_channels=1, depth=1, dims=3), torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"output must be one of .*got 'mask'"):
        predict(model, torch.zeros(5, 5), output="mask")
    image = torch.zeros(5, 5)
    for options, message in (
        ({"tile": 0}, "tile must be one or two sides >= 1, got 0"),
        ({"tile": (4, 4, 4)}, "tile must be one or two sides"),
        ({"tile": "4,x"}, "tile must be like 512 or 32,128,128, got 4,x"),
        ({"memory_budget": 0}, "memory_budget must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"tta": "all"}, "tta must be flips, rotations, square or a list of angles, got 'all'"),
        ({"tta": []}, "tta must hold at least one angle"),
        ({"tta": [float("nan")]}, "tta must hold at least one angle, all finite"),
        ({"precision": torch.float64}, "precision must be float32 as the weights, .*got float64"),
        ({"average": "votes"}, "average must be one of .*got 'votes'"),
        ({"average": "probabilities", "output": "scores"}, "average must be scores for output"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(model, image, **options)
    with pytest.raises(ValueError, match="image must hold real numbers, got complex64"):
        predict(model, image.numpy().astype(np.complex64))


def test_precision_is_that_of_autocast():
    net, image = UNet(base_channels=4, depth=2).eval(), torch.rand(1, 60, 60)
    half = predict(net, image, tile=32, output="scores", precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(net, image, tile=32, output="scores"), half)
    exact = predict(net, image, tile=32, output="scores")
    assert not torch.equal(exact, half)
    assert (exact - half).abs().max() <= 32 * torch.finfo(torch.bfloat16).eps


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here"
)
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"padding": "same"}, 10),
        ({"dims": 3, "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}, 10),
        ({"norm": "batch"}, 0),
        ({"bottleneck_norm": "batch", "upsampling": "bilinear"}, 10),
        ({"upsampling": "release_2015"}, 10),
    ],
    ids=str,
)
def test_fused_convolutions_predict_the_same_bits(options, fused, monkeypatch):
    torch.manual_seed(0)
    net = UNet(base_channels=4, depth=2, **options).eval()
    image = torch.rand(1, *(60,) * net.dims)
    predictor = Predictor(net, Options("scores", precision="bfloat16"))
    assert sum(isinstance(layer, FusedConvolution) for layer in predictor.net.modules()) == fused
    found = predict(net, image, output="scores", precision="bfloat16")
    monkeypatch.setattr("unet_fast.prediction.predictor.fused_in_bfloat16", lambda model: model)
    assert torch.equal(found, predict(net, image, output="scores", precision="bfloat16"))
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}


def test_nothing_to_predict():
    """No tile is read or written where none is left to do."""
    predictor = Predictor(UNet(base_channels=2, depth=1).eval(), Options("labels", tile=16))
    predictor.run(predictor.plan((20, 20)), pytest.fail, None, pytest.fail, groups=[])
