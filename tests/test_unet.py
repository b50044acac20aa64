import math

import pytest
import torch
from torch import nn

from unet_fast import UNet


def parameters(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**options).parameters())


def test_parameter_counts():
    assert parameters() == 31_030_658
    assert parameters(in_channels=3) == 31_031_810
    assert parameters(num_classes=1) == 31_030_593
    assert parameters(upsampling="release_2015") == 31_100_354


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
@pytest.mark.parametrize("norm", [None, "batch", "group", "instance"])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_variants_run_and_train(padding, norm, upsampling):
    net = UNet(3, 4, base_channels=6, depth=2, padding=padding, norm=norm, upsampling=upsampling)
    shape = net.input_shape((8, 12))
    y = net(torch.randn(2, 3, *shape))
    assert y.shape == (2, 4, *net.output_shape(shape))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert UNet(**net.config).state_dict().keys() == net.state_dict().keys()


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
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match="^UNet: " + message):
        UNet(**options)
