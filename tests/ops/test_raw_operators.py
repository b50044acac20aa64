"""The operators of `torch.ops.unet_fast` check what they are given, whoever calls them."""

import pytest
import torch

import unet_fast  # registers them

OPS = torch.ops.unet_fast
assert unet_fast.UNet

LOGITS, TARGET = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
LOSS, ONE = torch.zeros(()), torch.zeros((), dtype=torch.float64)
LABELS = torch.zeros(1, 1, 4, 5, dtype=torch.int32)
IMAGE, FIELD = torch.zeros(2, 1, 6, 7), torch.zeros(2, 2, 3, 3, dtype=torch.float64)


def ce_backward(grad=LOSS, normaliser=ONE, reduction=3, logits=LOGITS):
    return OPS.weighted_ce_backward(grad, logits, TARGET, None, normaliser, reduction, -100)


def weights(classes=None, foreground=None, class_weight=None, n=2, ridge=0, sigma=5.0, sizes=None):
    sizes = [1.0, 1.0, 1.0] if sizes is None else sizes
    settings = n, ridge, None, 10.0, sigma, False, 0.0, 1.0, sizes
    return OPS.border_weights(LABELS, classes, foreground, class_weight, *settings)


def deform(image=IMAGE, field=FIELD, affine=None, labels=None, source=None, **changes):
    values = {
        "orders": [1],
        "grid": 0,
        "scales": [0.4, 0.4],
        "boundary": 0,
        "out": [6, 7],
    } | changes
    return OPS.elastic_deform(
        image,
        field,
        affine,
        None,
        labels,
        None,
        values["orders"],
        values["grid"],
        False,
        values["scales"],
        values["boundary"],
        0.0,
        values["out"],
        values["out"],
        source,
    )


def deform_backward(grad=IMAGE, field=FIELD, of_image=True, of_displacement=True):
    settings = [1], 0, False, [0.4, 0.4], 0, 0.0, of_image, of_displacement
    return OPS.elastic_deform_backward(grad, IMAGE, field, None, None, None, *settings)


WRONG = {
    "grad of one loss": (lambda: ce_backward(torch.zeros(2)), "grad must be of 1 elements"),
    "grad of each loss": (lambda: ce_backward(reduction=0), "grad must be of 40 elements"),
    "grad in float64": (lambda: ce_backward(torch.zeros((), dtype=torch.float64)), "grad must be"),
    "normaliser": (lambda: ce_backward(normaliser=torch.zeros(0)), "normaliser must be of 1"),
    "reduction": (lambda: ce_backward(reduction=4), r"reduction must be in \[0, 3\], got 4"),
    "logits": (lambda: ce_backward(logits=torch.zeros(5)), r"logits must be \(N, C, ...\), got 1"),
    "target": (
        lambda: OPS.weighted_ce(LOGITS, TARGET[:1], None, 3, -100),
        "target must be of 40 elements",
    ),
    "weight": (
        lambda: OPS.weighted_ce(LOGITS, TARGET, torch.zeros(3), 3, -100),
        "weight must be of 40 elements",
    ),
    "two sizes": (lambda: OPS.two_nearest(LABELS, [1.0, 1.0]), "spacing must be three sizes"),
    "no size": (lambda: OPS.two_nearest(LABELS, [1.0, 0.0, 1.0]), "spacing must be > 0"),
    "labels": (lambda: OPS.two_nearest(LABELS[0], [1.0] * 3), r"labels \(N, D, H, W\)"),
    "ridge": (lambda: OPS.separate_touching(LABELS, 3), "ridge must be 0, 1 or 2, got 3"),
    "ridge of weights": (lambda: weights(ridge=-1), "ridge must be 0, 1 or 2, got -1"),
    "sigma": (lambda: weights(sigma=0.0), "sigma must be > 0"),
    "classes": (lambda: weights(LABELS), "classes must be of 20 elements in Byte"),
    "foreground": (lambda: weights(foreground=torch.zeros(3) > 0), "foreground must be of 20"),
    "class_weight": (lambda: weights(class_weight=torch.zeros(3)), "class_weight must be of 2"),
    "num_classes": (lambda: weights(n=300), "num_classes must be in"),
    "grid": (lambda: deform(grid=3), "grids 0 to 2"),
    "boundary": (lambda: deform(boundary=-1), "boundaries 0 to 3"),
    "orders": (lambda: deform(orders=[1, 1]), "C orders"),
    "order": (lambda: deform(orders=[2]), "order must be 0, 1 or 3, got 2"),
    "no side": (lambda: deform(torch.zeros(2, 1, 0, 7)), "image must be of sides from 1"),
    "no point": (lambda: deform(field=FIELD[:, :, :0]), "at least one point"),
    "affine": (lambda: deform(affine=torch.zeros(2, 2, 2)), r"affine must be \(N, 2, 3\)"),
    "large output": (lambda: deform(out=[2**31, 2**31]), "output_shape must be below"),
    "many images": (
        lambda: deform(out=[2**28, 2**28], field=None, source=torch.zeros(2**8).long()),
        "sizes must be",
    ),
    "no channels": (
        lambda: unet_fast.elastic_deform(
            torch.zeros(1, 0, 4, 4),
            labels=torch.zeros(1, 4, 4).int(),
            output_shape=(2**28, 2**28),
            label_shape=(2, 2),
        ),
        r"at most 2\^34 pixels without channels",
    ),
    "negative output": (lambda: deform(out=[-1, 7]), "output_shape must be below"),
    "moved labels": (
        lambda: deform(labels=torch.zeros(2, 6, 8).int()),
        r"takes labels \(N, H, W\)",
    ),
    "no displacement": (lambda: deform_backward(field=None), "there is no displacement"),
    "upstream": (lambda: deform_backward(IMAGE[:1]), r"grad must be \(N, C, H, W\)"),
    "upstream type": (lambda: deform_backward(IMAGE.double()), "grad must be of 84 elements"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    call, message = WRONG[wrong]
    with pytest.raises((RuntimeError, IndexError), match=message):
        call()


def test_right_arguments():
    assert ce_backward()[0].shape == LOGITS[0].shape
    assert weights()[1].shape == LABELS.shape
    assert deform()[0].shape == IMAGE.shape
    assert [x.shape for x in deform_backward()] == [IMAGE.shape, FIELD.shape]
    assert [x.numel() for x in deform_backward(field=None, of_displacement=False)] == [84, 0]
