"""The inverse of a deformation: what was deformed and put back is where it was."""

from dataclasses import replace

import pytest
import torch

from unet_fast import Augmentation
from unet_fast._undo import undo

STILL = {"gray_black": (0, 0), "gray_white": (1, 1), "gray_slope": (1, 1)}


def waves(shape):
    """A smooth image, and labels of its crests."""
    axes = torch.meshgrid(*[torch.arange(float(side)) for side in shape], indexing="ij")
    image = sum(torch.sin(x / 7 + i) for i, x in enumerate(axes)) / len(shape)
    return image[None, None], (image > 0)[None, None].to(torch.int64)


def inner(shape, share):
    return (..., *[slice(int(side * share), side - int(side * share)) for side in shape])


@pytest.mark.parametrize(
    ("augmentation", "shape"),
    [
        (Augmentation.paper_2015(), (200, 180)),
        (Augmentation.falk_2019(), (200, 180)),
        (Augmentation(grid="keys", sigma=6.0, scale=(0.8, 1.2), shift=9.0, flip=True), (200, 180)),
        (Augmentation.cicek_2016(), (40, 60, 50)),
        (Augmentation(sigma=2.0, rotation=(180, 5, 5), voxel_size=(2, 1, 1)), (40, 60, 50)),
        (Augmentation(sigma=(0, 3, 3), rotation=(20, 0, 0)), (1, 96, 88)),
        (Augmentation(sigma=0, points=1, rotation=90), (64, 64)),
    ],
)
def test_images_and_labels_are_back_in_place(augmentation, shape, device):
    augmentation = replace(augmentation, **STILL)
    image, labels = (x.to(device) for x in waves(shape))
    parameters = augmentation.draw(1, (1, *shape), generator=torch.Generator().manual_seed(1))
    moved, ids = augmentation.apply(image, labels, parameters)
    here = inner(shape, 0.32)
    assert (moved - image)[here].abs().max() > 0.05
    assert (undo(moved, augmentation, parameters) - image)[here].abs().max() < 0.02
    rounded = undo(moved, augmentation, parameters, nearest=True)
    assert 0 < (rounded - image)[here].abs().max() < 0.3
    for x in (ids, ids.bool(), ids.byte()):
        back = undo(x, augmentation, parameters, nearest=True)
        assert back.dtype == x.dtype
        assert (back == labels)[here].double().mean() > 0.97


def test_several_samples_of_one_call():
    augmentation = Augmentation(sigma=4.0, **STILL)
    image = waves((120, 100))[0].expand(3, 2, -1, -1)
    parameters = augmentation.draw(3, (2, 120, 100))
    moved, _ = augmentation.apply(image, None, parameters)
    back = undo(moved, augmentation, parameters)
    for i in range(3):
        one = undo(moved[i : i + 1], augmentation, parameters[[i]])
        assert torch.equal(one, back[i : i + 1])
    assert (back - image)[inner((120, 100), 0.3)].abs().max() < 0.02


def test_what_the_deformed_image_does_not_show_is_0():
    shifted = Augmentation(sigma=0, rotation=0, shift=30.0, **STILL)
    parameters = shifted.draw(1, (64, 64))
    down, right = parameters.affine[0, :, -1].tolist()
    back = undo(torch.ones(1, 1, 64, 64), shifted, parameters)[0, 0]
    row, column = (torch.arange(64.0) - x for x in (down, right))
    shown = (row >= 0) & (row <= 63), (column >= 0) & (column <= 63)
    assert torch.equal(back > 0, shown[0][:, None] & shown[1])
    assert max(abs(down), abs(right)) > 5


@pytest.mark.parametrize("sigma", [40.0, 400.0])
def test_a_field_that_folds_is_refused(sigma):
    augmentation = Augmentation(sigma=sigma)
    said = r"^undo: the deformation must not fold, got one that folds in \d+ % of the pixels; "
    with pytest.raises(ValueError, match=said) as caught:
        undo(torch.ones(1, 1, 96, 88), augmentation, augmentation.draw(1, (96, 88)))
    assert "\n" not in str(caught.value)


def test_many_fields_are_undone_or_refused():
    """Of strong ones, too: positions that are given lead back to where they belong."""
    augmentation = Augmentation(sigma=8.0, **STILL)
    image = waves((96, 88))[0]
    refused = 0
    for seed in range(20):
        parameters = augmentation.draw(1, (96, 88), generator=torch.Generator().manual_seed(seed))
        moved = augmentation.apply(image, None, parameters)[0]
        try:
            back = undo(moved, augmentation, parameters)
        except ValueError:
            refused += 1
            continue
        here = undo(torch.ones_like(image), augmentation, parameters) > 0.999
        assert (back - image)[here].abs().quantile(0.95) < 0.02
        assert here.double().mean() > 0.5
    assert refused < 10
