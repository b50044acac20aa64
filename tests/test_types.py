"""Arguments of other types get one line that names them."""

import inspect
from typing import get_type_hints

import numpy as np
import pytest
import torch
from typed_calls import results, unknown_setting, wrong_setting

import unet_fast as u
from unet_fast.ops._elastic_deform import _Settings

LABELS = torch.zeros(1, 8, 9, dtype=torch.int32)
IMAGE, LOGITS = torch.zeros(1, 1, 8, 9), torch.zeros(1, 2, 8, 9)
NET = {"base_channels": 2, "depth": 1}

WRONG = [
    (
        lambda: u.weighted_ce([[1]], LABELS),
        "weighted_ce: logits must be a tensor or a NumPy array, got list",
    ),
    (
        lambda: u.weighted_ce(LOGITS, None),
        "weighted_ce: target must be a tensor or a NumPy array, got NoneType",
    ),
    (
        lambda: u.weighted_ce(LOGITS, LABELS, [1]),
        "weighted_ce: weight must be a tensor or a NumPy array, got list",
    ),
    (lambda: u.weighted_ce(LOGITS, LABELS, ignore_index=1.5), "ignore_index must be an integer"),
    (lambda: u.border_weight_map(None), "border_weight_map: labels must be a tensor"),
    (lambda: u.border_weight_map(LABELS, w0="a"), "w0 must be a number, got 'a'"),
    (lambda: u.border_weight_map(LABELS, w0=1e300), "w0 must be >= 0 and finite in float32"),
    (lambda: u.border_weight_map(LABELS, spacing=3), "spacing must be a sequence of numbers"),
    (lambda: u.border_weight_map(LABELS, spacing=("a", 1)), "spacing must be a number, got 'a'"),
    (lambda: u.border_weight_map(LABELS, halo=3), r"halo must be \(v, s\), got 3"),
    (lambda: u.two_nearest([1]), "two_nearest: labels must be a tensor or a NumPy array, got list"),
    (lambda: u.separate_touching(LABELS, dims=4), "dims must be 2, 3 or None, got 4"),
    (lambda: u.separate_touching(LABELS[0], dims=3), r"must be \(D, H, W\)"),
    (lambda: u.two_nearest(np.array(["a"])), "labels must be an array of numbers, got <U1"),
    (
        lambda: u.label_components(None),
        "label_components: mask must be a tensor or a NumPy array, got NoneType",
    ),
    (lambda: u.label_components(IMAGE[0, 0]), "mask must be bool or integer, got torch.float32"),
    (lambda: u.elastic_deform(None), "elastic_deform: image or labels must be given"),
    (
        lambda: u.elastic_deform(IMAGE, [1]),
        "displacement must be a tensor or a NumPy array, got list",
    ),
    (
        lambda: u.elastic_deform(IMAGE, labels=[1]),
        "labels must be a tensor or a NumPy array, got list",
    ),
    (lambda: u.elastic_deform(IMAGE, output_shape=(2**40, 1)), "output_shape must be below 2"),
    (lambda: u.Augmentation(gray_white=(1,)), "Augmentation: gray_white must be 2 values"),
    (
        lambda: u.Augmentation(sigma="a"),
        "Augmentation: sigma must be a number or a sequence, got 'a'",
    ),
    (lambda: u.Augmentation(flip="keys"), "Augmentation: flip must be"),
    (lambda: u.BorderWeights(w0="a"), "BorderWeights: w0 must be a number, got 'a'"),
    (lambda: u.BorderWeights(class_weight=3), "BorderWeights: class_weight must be"),
    (lambda: u.TrainConfig("a", "b", out="c", weights=5), "train: weights must be BorderWeights"),
    (lambda: u.TrainConfig("a", "b", out="c", augmentation=5), "train: augmentation must be"),
    (lambda: u.TrainConfig("a", "b", out="c", steps="x"), "train: steps must be an integer"),
    (lambda: u.TrainConfig("a", "b", out="c", momentum="x"), "train: momentum must be a number"),
    (lambda: u.UNet("a"), "UNet: in_channels must be an integer, got 'a'"),
    (lambda: u.UNet(depth=2.5), "UNet: depth must be an integer, got 2.5"),
    (lambda: u.predict(None, IMAGE[0]), "predict: model must be a UNet, got NoneType"),
    (lambda: u.predict(u.UNet(**NET), None), "predict: image must be"),
    (
        lambda: u.UNet(**NET)(IMAGE.numpy()),
        r"UNet: input must be a tensor \(torch.from_numpy makes one of an array\), got ndarray",
    ),
    (
        lambda: u.predict(u.UNet(3, **NET), np.ones((8, 9, 3), np.float32)),
        r"C = 3, got \(8, 9, 3\) \(np.moveaxis\(image, -1, 0\) puts channels first\)",
    ),
    (
        lambda: u.predict(u.UNet(**NET), IMAGE[0], device="gpu"),
        "predict: device must take the network, got 'gpu': ",
    ),
    (lambda: u.predict(u.UNet(**NET), IMAGE[0], tile=7.5), "predict: tile must be an integer"),
    (lambda: u.predict(u.UNet(**NET), IMAGE[0], tta=["flips"]), "predict: tta must be"),
    (lambda: u.predict(torch.nn.Conv2d(1, 1, 1), IMAGE[0]), "predict: model must be a UNet, got"),
    (lambda: u.border_weight_map(LABELS > 0), "label_components numbers the parts of a mask"),
    (lambda: u.save_model(torch.nn.Linear(1, 1), "x"), "save_model: model must be a UNet, got Lin"),
    (lambda: u.train("images"), "train: config must be a TrainConfig, got str"),
    # One image, without the axis of the batch.
    (lambda: u.UNet(**NET)(IMAGE[0]), r"got \(1, 8, 9\) \(input\[None\] adds the axis of the"),
    (lambda: u.elastic_deform(IMAGE[0]), r"got \(1, 8, 9\) \(image\[None\] adds the axis of the"),
    (
        lambda: u.elastic_deform(IMAGE, labels=LABELS[0]),
        r"got \(8, 9\) \(labels\[None\] adds the axis of the batch\)",
    ),
    (lambda: u.elastic_deform(None, labels=LABELS[0]), r"\(labels\[None\] adds the axis of the"),
    (
        lambda: u.weighted_ce(LOGITS[0], LABELS[0]),
        r"got \(8, 9\) \(logits\[None\] and target\[None\] add the axis of the batch\)",
    ),
]


@pytest.mark.parametrize(
    "call",
    [
        lambda: u.border_weight_map(torch.ones(9, 9, 1, dtype=torch.int32)),
        lambda: u.BorderWeights()(torch.ones(1, 9, 9, 1, dtype=torch.int32)),
        lambda: u.elastic_deform(torch.ones(1, 9, 9, 3)),
        lambda: u.Augmentation()(torch.ones(9, 9, 3)),
    ],
)
def test_channels_last_is_told(call):
    with pytest.warns(UserWarning, match="axis (of .* is 1 pixel: if it )?is one of channels"):
        call()


@pytest.mark.parametrize("call", range(len(WRONG)))
def test_one_line(call):
    function, message = WRONG[call]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        function()
    assert "\n" not in str(caught.value)


def test_types_that_mypy_promises():
    """`mypy` checks the file of these calls; here they give what is promised there."""
    for found, like in results():
        several = isinstance(like, tuple)
        pairs = zip(found, like, strict=True) if several else [(found, like)]
        assert all(type(x) is type(y) for x, y in pairs)
    for call in (unknown_setting, wrong_setting):
        with pytest.raises(TypeError, match=r"boundry|grid_spacing must be"):
            call()
    taken = inspect.signature(u.elastic_deform).parameters.keys()
    assert get_type_hints(_Settings).keys() == taken - {"image", "displacement", "labels"}
