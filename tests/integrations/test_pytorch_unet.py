"""Weights of milesial/Pytorch-UNet give here what they give there."""

import pytest
import torch
from torch import nn

from unet_fast import predict
from unet_fast.integrations.pytorch_unet import load_pytorch_unet


class Twice(nn.Module):
    def __init__(self, inputs, outputs, bias):
        super().__init__()
        layers = []
        for i in (inputs, outputs):
            layers += [nn.Conv2d(i, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, inputs, outputs, bias):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Twice(inputs, outputs, bias))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, inputs, bias, bilinear):
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = Twice(inputs, inputs // 2, bias)

    def forward(self, x, skip):
        return self.conv(torch.cat([skip, self.up(x)], 1))


class Head(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.conv = nn.Conv2d(inputs, classes, 1)

    def forward(self, x):
        return self.conv(x)


class Theirs(nn.Module):
    """The network of that repository, by the names of its parameters."""

    def __init__(self, channels=3, classes=2, base=4, bias=False, bilinear=False):
        super().__init__()
        self.inc = Twice(channels, base, bias)
        for i in range(1, 5):
            setattr(self, f"down{i}", Down(base << (i - 1), base << i, bias))
            setattr(self, f"up{i}", Up(base << (5 - i), bias, bilinear))
        self.outc = Head(base, classes)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for x in (layer.weight, layer.running_var):
                    x.data.uniform_(0.5, 2)
                for x in (layer.bias, layer.running_mean):
                    x.data.normal_(0, 0.2)

    def forward(self, x):
        skips = [self.inc(x)]
        for i in range(1, 5):
            skips.append(getattr(self, f"down{i}")(skips[-1]))
        x = skips.pop()
        for i in range(1, 5):
            x = getattr(self, f"up{i}")(x, skips.pop())
        return self.outc(x)


@pytest.mark.parametrize("bias", [False, True])  # older versions had biases
def test_gives_the_same(tmp_path, bias):
    theirs = Theirs(bias=bias).eval()
    torch.save(theirs.state_dict() | {"mask_values": [0, 255]}, tmp_path / "a.pth")
    ours = load_pytorch_unet(tmp_path / "a.pth")
    assert ours.class_values == [0, 255]
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)
    assert predict(ours, image[0, :, :50, :70]).shape == (2, 50, 70)


def test_one_class_becomes_two():
    theirs = Theirs(channels=1, classes=1).eval()
    ours = load_pytorch_unet(theirs.state_dict())
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        found, expected = ours(image).softmax(1)[:, 1:], theirs(image).sigmoid()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_refuses_what_it_cannot_load(tmp_path):
    with pytest.raises(ValueError, match="must have transposed convolutions, got bilinear"):
        load_pytorch_unet(Theirs(bilinear=True).state_dict())
    state = Theirs().state_dict()
    with pytest.raises(ValueError, match="must be of milesial/Pytorch-UNet, but differ: 'inc"):
        load_pytorch_unet({"a": torch.zeros(2)})
    state["down1.extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match="must be of milesial/Pytorch-UNet, but differ: Error"):
        load_pytorch_unet(state)
    for name, content in (("a.pth", b"no checkpoint"), ("b.pth", None)):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: must be a checkpoint of torch"):
            load_pytorch_unet(tmp_path / name)
