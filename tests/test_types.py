"""Arguments of other types get one line that names them."""

import pytest
import torch

import unet_fast as u

LABELS = torch.zeros(1, 8, 9, dtype=torch.int32)
IMAGE, LOGITS = torch.zeros(1, 1, 8, 9), torch.zeros(1, 2, 8, 9)
NET = {"base_channels": 2, "depth": 1}

WRONG = [
    (lambda: u.weighted_ce([[1]], LABELS), "weighted_ce: logits must be a tensor, got list"),
    (lambda: u.weighted_ce(LOGITS, None), "weighted_ce: target must be a tensor, got NoneType"),
    (lambda: u.weighted_ce(LOGITS.numpy(), LABELS), "logits must be a tensor, got ndarray"),
    (lambda: u.weighted_ce(LOGITS, LABELS, [1]), "weighted_ce: weight must be a tensor, got list"),
    (lambda: u.weighted_ce(LOGITS, LABELS, ignore_index=1.5), "ignore_index must be an integer"),
    (lambda: u.border_weight_map(None), "border_weight_map: labels must be a tensor"),
    (lambda: u.border_weight_map(LABELS, w0="a"), "w0 must be a number, got 'a'"),
    (lambda: u.border_weight_map(LABELS, w0=1e300), "w0 must be >= 0 and finite in float32"),
    (lambda: u.border_weight_map(LABELS, spacing=3), "spacing must be a sequence of numbers"),
    (lambda: u.border_weight_map(LABELS, spacing=("a", 1)), "spacing must be a number, got 'a'"),
    (lambda: u.border_weight_map(LABELS, halo=3), r"halo must be \(v, s\), got 3"),
    (lambda: u.two_nearest([1]), "two_nearest: labels must be a tensor, got list"),
    (lambda: u.separate_touching(LABELS.numpy(), "none"), "labels must be a tensor, got ndarray"),
    (lambda: u.label_components(None), "label_components: mask must be a tensor, got NoneType"),
    (lambda: u.elastic_deform(None), "elastic_deform: image must be a tensor, got NoneType"),
    (lambda: u.elastic_deform(IMAGE, [1]), "displacement must be a tensor, got list"),
    (lambda: u.elastic_deform(IMAGE, labels=[1]), "labels must be a tensor, got list"),
    (lambda: u.elastic_deform(IMAGE, output_shape=(2**40, 1)), "output_shape must be below 2"),
    (lambda: u.Augmentation(gray_white=(1,)), "Augmentation: gray_white must be 2 values"),
    (lambda: u.Augmentation(sigma="a"), "Augmentation: sigma must be a number, got 'a'"),
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
]


@pytest.mark.parametrize("call", range(len(WRONG)))
def test_one_line(call):
    function, message = WRONG[call]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        function()
    assert "\n" not in str(caught.value)
