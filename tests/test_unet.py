import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_fast import UNet, load_model, predict, save_model
from unet_fast._layers import BatchRenorm, MaxPool3d, max_pool_by_selection


def parameters(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**options).parameters())


def test_parameter_counts():
    assert parameters() == 31_030_658
    assert parameters(in_channels=3) == 31_031_810
    assert parameters(num_classes=1) == 31_030_593
    assert parameters(upsampling="release_2015") == 31_100_354


def test_volumes_of_2016():
    """Sizes and channels of figure 2; parameters without those of batch norm."""
    assert parameters(dims=3, base_channels=32, depth=3) != 19_069_955
    with torch.device("meta"):
        net = UNet.cicek_2016()
        assert sum(p.numel() for p in UNet.cicek_2016(norm=None).parameters()) == 19_069_955
        assert sum(p.numel() for p in UNet.cicek_2016(base_channels=8).parameters()) == 1_194_003
    assert net.output_shape((132, 132, 116)) == (44, 44, 28)
    assert net.input_shape((44, 44, 28)) == (132, 132, 116)
    seen = []
    for module in net.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.register_forward_hook(lambda m, i, o: seen.append((o.shape[1], o.shape[2])))
    net(torch.empty(1, 3, 132, 132, 116, device="meta"))
    down = [(32, 130), (64, 128), (64, 62), (128, 60), (128, 28), (256, 26), (256, 11), (512, 9)]
    up = [(512, 18), (256, 16), (256, 14), (256, 28), (128, 26), (128, 24), (128, 48), (64, 46)]
    assert seen == [*down, *up, (64, 44), (3, 44)]


def test_twenty_three_convolutions():
    with torch.device("meta"):
        net = UNet()
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert sum(isinstance(m, kinds) for m in net.modules()) == 23


def test_layer_table():
    """Sizes and channels after every step of figure 1, 572 -> 388."""
    with torch.device("meta"):
        net = UNet()
    seen = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda m, i, o: seen.append((o.shape[1], o.shape[2])))
    net(torch.empty(1, 1, 572, 572, device="meta"))
    down = [(64, 570), (64, 568), (128, 282), (128, 280), (256, 138), (256, 136)]
    down += [(512, 66), (512, 64), (1024, 30), (1024, 28)]
    up = [(512, 56), (512, 54), (512, 52), (256, 104), (256, 102), (256, 100)]
    up += [(128, 200), (128, 198), (128, 196), (64, 392), (64, 390), (64, 388), (2, 388)]
    assert seen == down + up


@pytest.mark.parametrize(
    ("side", "output"), [(188, 4), (284, 100), (380, 196), (476, 292), (572, 388), (668, 484)]
)
def test_sizes(side, output):
    with torch.device("meta"):
        net = UNet(base_channels=2)
    assert net.output_shape((side, 572)) == (output, 388)
    assert net.input_shape((output, 388)) == (side, 572)
    assert net.input_shape((output - 1, 385)) == (side, 572)


@pytest.mark.parametrize(("depth", "shrink"), [(1, 16), (2, 40), (3, 88), (4, 184)])
def test_every_size_up_to_the_smallest_valid_ones(depth, shrink):
    net = UNet(base_channels=1, depth=depth).eval()
    assert net.shrink == shrink
    valid = {4 * (2**depth - 1) + b * 2**depth for b in range(100)}
    for side in range(1, shrink + 3 * 2**depth):
        if side in valid and side > shrink:
            y = net(torch.zeros(1, 1, side, side))
            assert tuple(y.shape[2:]) == net.output_shape((side, side)) == (side - shrink,) * 2
        else:
            with pytest.raises(ValueError, match=f"nearest to {side}"):
                net.output_shape((side, side))


def test_wrong_sizes_name_the_nearest_valid_ones():
    net = UNet(base_channels=1)
    with pytest.raises(ValueError, match=r"16 b \+ 60 and >= 188 .*570\); nearest to 570: 556 and"):
        net(torch.zeros(1, 1, 572, 570))
    with pytest.raises(ValueError, match=r"nearest to 100: 188$"):
        net(torch.zeros(1, 1, 100, 188))
    same = UNet(base_channels=1, padding="same")
    with pytest.raises(ValueError, match=r"multiples of 16 .*nearest to 50: 48 and 64$"):
        same(torch.zeros(1, 1, 50, 64))
    with pytest.raises(ValueError, match=r"input must be \(N, 1, H, W\), got \(1, 3, 64, 64\)"):
        same(torch.zeros(1, 3, 64, 64))
    assert same.input_shape((1, 17)) == (16, 32)


@pytest.mark.parametrize("upsampling", ["transpose", "release_2015", "bilinear"])
@pytest.mark.parametrize("norm", [None, "batch", "batch_renorm", "group", "instance"])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_variants_run_and_train(padding, norm, upsampling):
    net = UNet(3, 4, base_channels=6, depth=2, padding=padding, norm=norm, upsampling=upsampling)
    shape = net.input_shape((8, 12))
    y = net(torch.randn(2, 3, *shape))
    assert y.shape == (2, 4, *net.output_shape(shape))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert UNet(**net.config).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("upsampling", ["transpose", "release_2015", "bilinear"])
@pytest.mark.parametrize("norm", [None, "batch", "batch_renorm", "group", "instance"])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_volumes_of_flat_voxels_run_and_train(tmp_path, padding, norm, upsampling):
    net = UNet(
        dims=3,
        base_channels=2,
        depth=2,
        kernels=[(1, 3, 3), (3, 3, 3), (3, 3, 3)],
        poolings=[(1, 2, 2), (2, 2, 2)],
        padding=padding,
        norm=norm,
        upsampling=upsampling,
        widening="before_pooling",
        up_bias=upsampling != "transpose",
    )
    assert net.alignment == (2, 4, 4)
    shape = net.input_shape((4, 4, 4))
    assert shape == ((20, 44, 44) if padding == "valid" else (4, 4, 4))
    y = net(torch.randn(2, 1, *shape))
    assert y.shape == (2, 2, *net.output_shape(shape))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    save_model(net, tmp_path)
    again = load_model(tmp_path)
    assert (again.config, again.kernels) == (net.config, net.kernels)
    assert predict(again, torch.rand(3, 9, 7)).shape == (2, 3, 9, 7)


def test_volumes_are_pooled_in_the_precision_of_autocast():
    x = torch.rand(1, 2, 4, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = MaxPool3d((2, 2, 2))(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.nn.functional.max_pool3d(x, 2))


kernels = st.sampled_from([1, 3, 5])
poolings = st.sampled_from([1, 2, 3])


@settings(deadline=None)
@given(st.data(), st.sampled_from(["valid", "same"]), st.integers(1, 3))
def test_sizes_of_any_kernels_and_poolings(data, padding, depth):
    """What the rule says is what the layers do, for each axis by itself."""
    net = UNet(
        base_channels=1,
        depth=depth,
        kernels=data.draw(
            st.lists(st.tuples(kernels, kernels), min_size=depth + 1, max_size=depth + 1)
        ),
        poolings=data.draw(st.lists(st.tuples(poolings, poolings), min_size=depth, max_size=depth)),
        padding=padding,
    )
    wanted = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    shape = net.input_shape(wanted)
    output = net.output_shape(shape)
    with torch.device("meta"):
        assert net.to("meta")(torch.empty(1, 1, *shape)).shape[2:] == output
    for have, want, step in zip(output, wanted, net.alignment, strict=True):
        assert want <= have
        assert have - step < max(want, 1) or net.padding == "same"
    for axis, step in itertools.product(range(2), range(1, 4)):
        smaller = list(shape)
        smaller[axis] -= step
        if step % net.alignment[axis] and smaller[axis] > 0:
            with pytest.raises(ValueError, match="UNet: input sides"):
                net.output_shape(smaller)


@pytest.mark.parametrize("window", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_by_selection_equals_torch(window, dtype):
    """With equal values, of which the first one gets the gradient, and infinite ones."""
    x = torch.randint(-2, 3, (2, 3, 6, 4, 4)).to(dtype)
    x[0, 0, 0] = -math.inf
    x[0, 1, :3] = math.inf
    grads = []
    for pool in (F.max_pool3d, max_pool_by_selection):
        leaf = x.clone().requires_grad_()
        y = pool(leaf, window)
        y.backward(torch.arange(1.0, 1 + y.numel()).reshape(y.shape).to(dtype))
        grads.append((y, leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_batch_renorm_is_that_of_the_paper():
    """Algorithm 1, written out; the corrections have no gradient, limits rise from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    norm, plain = BatchRenorm(3), torch.nn.BatchNorm3d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4, 5, 6, generator=generator) * 3 + 1
    assert torch.allclose(norm(x), plain(x), atol=1e-6)  # at first it is batch norm
    assert torch.allclose(norm.running_var, plain.running_var)
    for steps, most, least, size in ((500, 2.0, 2.5, 9), (10**6, 3.0, 5.0, 99)):
        norm.num_batches_tracked.fill_(steps)
        mean, sd = norm.running_mean.clone(), (norm.running_var + norm.eps).sqrt()
        x = (torch.randn(2, 3, 4, 5, 6, generator=generator) * size + size).requires_grad_()
        other = x.detach().clone().requires_grad_()
        axes = 0, 2, 3, 4
        batch, width = other.mean(axes), (other.var(axes, correction=0) + norm.eps).sqrt()
        r = (width / sd).detach().clamp(1 / most, most)
        d = ((batch - mean) / sd).detach().clamp(-least, least)
        assert (r == most).any()
        assert (d == least).any()

        def shaped(v):
            return v.view(-1, 1, 1, 1)

        expected = (other - shaped(batch)) / shaped(width) * shaped(r) + shaped(d)
        expected = expected * shaped(norm.weight.detach()) + shaped(norm.bias.detach())
        change = torch.randn(x.shape, generator=generator)
        found = norm(x)
        (found * change).sum().backward()
        (expected * change).sum().backward()
        assert torch.allclose(found, expected, atol=1e-3)
        assert torch.allclose(x.grad, other.grad, atol=1e-4)
    x = torch.randn(2, 3, 4, 5, 6, generator=generator)
    with torch.no_grad():
        for _ in range(200):
            trained = norm(x)
    assert torch.allclose(norm.eval()(x), trained, atol=0.02)


def test_bottleneck_norm_and_dropout_places():
    net = UNet(base_channels=2, depth=2, bottleneck_norm="batch")
    kinds = [type(m).__name__ for m in net.bottom]
    assert kinds == ["Conv2d", "ReLU", "BatchNorm2d"] * 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.down.modules())

    dropped = []
    net.dropout.register_forward_hook(lambda m, i, o: dropped.append((o.shape[1], o)))
    concatenated = []
    net.merge[1].register_forward_hook(lambda m, i, o: concatenated.append(i[0]))
    net(torch.randn(1, 1, *net.input_shape((4, 4))))
    assert [channels for channels, _ in dropped] == [4, 8]  # last level before the bottom; bottom
    zeros = (dropped[0][1] == 0).float().mean()
    assert zeros > 0.5  # half dropped, and the zeros of the ReLU
    skip = concatenated[0][:, 4:]  # upsampled first, then the skip, which carries the dropped map
    edge = (dropped[0][1].shape[2] - skip.shape[2]) // 2
    assert torch.equal(skip, dropped[0][1][:, :, edge:-edge, edge:-edge])


def test_dropout_only_in_training():
    net = UNet(base_channels=2, depth=1)
    x = torch.randn(1, 1, 20, 20)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_he_initialisation():
    net = UNet()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 10_000:
            inputs = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)
            expected = math.sqrt(2 / inputs)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert (module.bias == 0).all()


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_gradients_keep_the_memory_layout(padding):
    """Else layers before a skip connection mix both layouts, which is slow."""
    net = UNet(base_channels=2, depth=2, padding=padding).to(memory_format=torch.channels_last)
    layouts = []

    def keep(_, __, output):
        output.register_hook(
            lambda g: layouts.append(g.is_contiguous(memory_format=torch.channels_last))
        )

    for module in [*net.down, net.bottom, *net.merge]:
        module.register_forward_hook(keep)
    x = torch.rand(1, 1, 60, 60).contiguous(memory_format=torch.channels_last)
    net(x).square().sum().backward()
    assert layouts == [True] * 5


def test_shifts_by_the_stride_commute():
    net = UNet(base_channels=4, depth=2).eval().double()
    x = torch.randn(1, 1, 60, 60).double()
    moved = net(x[:, :, 4:, 4:][:, :, :52, :52])
    torch.testing.assert_close(moved, net(x)[:, :, 4:16, 4:16])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, r"depth must be in \[1, 12\], got 0"),
        ({"base_channels": 10**20}, r"base_channels must be in \[1, 65536\], got 1"),
        ({"padding": "reflect"}, "padding must be one of .*got 'reflect'"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"bottleneck_norm": "group"}, "bottleneck_norm must be one of"),
        ({"upsampling": "nearest"}, "upsampling must be one of"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dims": 4}, r"dims must be one of \(2, 3\), got 4"),
        ({"widening": "late"}, "widening must be one of .*got 'late'"),
        ({"depth": 1, "kernels": [(3, 3)]}, r"kernels must be 2 times 2 numbers, got \[\(3, 3\)\]"),
        ({"depth": 1, "kernels": [(3, 3), (2, 3)]}, "kernels must be of 1, 3, 5, 7, got 2"),
        ({"depth": 1, "poolings": [2]}, r"poolings must be 1 times 2 numbers, got \[2\]"),
        ({"depth": 1, "poolings": [(1, 0)]}, "poolings must be of 1, 2, 3, 4, got 0"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match="^UNet: " + message):
        UNet(**options)


def test_rejects_shapes_of_other_dimensions():
    with torch.device("meta"):
        net = UNet.cicek_2016()
    with pytest.raises(ValueError, match=r"input must be \(N, 3, D, H, W\), got \(1, 3, 92, 92\)"):
        net(torch.empty(1, 3, 92, 92))
    with pytest.raises(ValueError, match=r"input must have 3 sides, got \(92, 92\)"):
        net.output_shape((92, 92))
    flat = UNet(dims=3, base_channels=1, depth=1, poolings=[(1, 2, 2)])
    with pytest.raises(
        ValueError, match=r"sides along axis 2 must be 2 b \+ 4 and >= 18 .*to 21: 20"
    ):
        flat.output_shape((20, 20, 21))
    assert flat.output_shape((13, 20, 20)) == (1, 4, 4)
    with pytest.raises(TypeError, match="poolings must be integers, got 'a'"):
        UNet(depth=1, poolings=["ab"])


@pytest.mark.parametrize("shape", [(0, 4), (4, -1)])
def test_outputs_without_a_pixel(shape):
    with pytest.raises(ValueError, match=r"UNet: output sides must be >= 1, got \(.*\)$"):
        UNet(base_channels=1).input_shape(shape)


@pytest.mark.filterwarnings("ignore")  # torch's own tracers warn about each other
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "norm": "batch"},
        {"dims": 3, "depth": 1, "upsampling": "bilinear"},
    ],
)
def test_traced_networks_take_other_sizes(options):
    net = UNet(**{"base_channels": 2, "depth": 2} | options).eval()
    small, large = (
        torch.rand(n, 1, *net.input_shape([k * step for step in net.alignment]))
        for n, k in ((2, 2), (3, 5))
    )
    dynamic = dict.fromkeys((0, *range(2, 2 + net.dims)), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(net, (small,), dynamic_shapes=(dynamic,)).module()
    traced = torch.jit.trace(net, small)
    with torch.no_grad():
        expected = net(large)
        for other in (exported, traced):
            torch.testing.assert_close(other(large), expected, rtol=0, atol=1e-5)
