import math

import pytest
import torch

from unet_fast import Augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


STILL = {"sigma": 0.0, "rotation": 0.0, "gray_slope": (1.0, 1.0), "gray_offset": 0.0}


def test_no_change_without_ranges():
    image, labels = torch.rand(2, 3, 20, 30), torch.randint(0, 9, (2, 20, 30))
    out, moved = Augmentation(**STILL)(image, labels, generator=generator())
    torch.testing.assert_close(out, image)
    assert torch.equal(moved, labels)


def test_same_seed_same_result():
    aug, image = Augmentation.paper_2015(), torch.rand(2, 1, 40, 40)
    labels = torch.randint(0, 9, (2, 40, 40))
    first = aug(image, labels, generator=generator(3))
    again = aug(image, labels, generator=generator(3))
    other = aug(image, labels, generator=generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    parameters = aug.draw(2, image.shape[1:], generator=generator(3))
    assert torch.equal(aug.apply(image, labels, parameters)[0], first[0])
    assert aug(image)[1] is None


def test_draws_from_the_stated_distributions():
    aug = Augmentation(
        grid=(3, 4), sigma=7.0, rotation=30.0, scale=(0.5, 2.0), shift=5.0, flip=True
    )
    p = aug.draw(4000, (2, 101, 51), generator=generator())
    assert len(p) == 4000
    assert p.displacement.shape == (4000, 2, 3, 4)
    assert p.displacement.std().item() == pytest.approx(7.0, rel=0.02)
    linear = p.affine[:, :, :2]
    determinant = torch.linalg.det(linear)
    assert (determinant < 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    zoom = determinant.abs().rsqrt()
    assert 0.5 <= zoom.min() < 0.51
    assert 1.99 < zoom.max() <= 2.0
    angle = torch.rad2deg(torch.atan2(-linear[:, 1, 0], linear[:, 0, 0]))
    assert -30 <= angle.min() < -29
    assert 29 < angle.max() <= 30
    centre = torch.tensor([50.0, 25.0]).double()
    shift = centre - (linear @ centre + p.affine[:, :, 2])
    assert shift.abs().max() <= 5
    assert shift.abs().max() > 4.9
    assert p.gray_curve.shape == (4000, 2, 5)
    assert (p.gray_curve[:, :, 0].abs() <= 0.05).all()
    slopes = p.gray_curve.diff(dim=2) * 4
    assert 0.8 - 1e-5 <= slopes.min() < 0.81
    assert 1.19 < slopes.max() <= 1.2 + 1e-5


def test_scale_magnifies_and_shift_moves():
    image = torch.zeros(1, 1, 21, 21)
    image[0, 0, 8:13, 8:13] = 1
    bigger, _ = Augmentation(**STILL, scale=(2.0, 2.0))(image)
    assert bigger.sum() > 3 * image.sum()
    p = Augmentation(**STILL).draw(1, (21, 21))
    p.affine[0, :, 2] -= torch.tensor([3.0, -2.0])
    moved, _ = Augmentation().apply(image, None, p)
    assert torch.equal(moved, image.roll((3, -2), (2, 3)))


def test_rotation_is_about_the_centre():
    image = torch.rand(1, 1, 15, 15)
    p = Augmentation(**{**STILL, "rotation": 180.0}).draw(500, (15, 15), generator=generator(1))
    corners = torch.tensor([[0.0, 0, 1], [14, 14, 1]]).double()
    mapped = corners @ p.affine.transpose(1, 2)
    torch.testing.assert_close(mapped.mean(1), torch.full((500, 2), 7.0).double())
    assert math.isclose((mapped[:, 0] - 7).norm(dim=1).std().item(), 0, abs_tol=1e-9)
    assert image.shape == Augmentation(**STILL)(image)[0].shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (0, 3)}, r"grid must be two counts >= 1, got \(0, 3\)"),
        ({"sigma": -1}, "sigma must be >= 0, got -1"),
        ({"sigma": math.inf}, "sigma must be >= 0, got inf"),
        ({"rotation": math.nan}, "rotation must be >= 0, got nan"),
        ({"scale": (2, 1)}, "scale must be two ascending factors > 0"),
        ({"gray_slope": (-1, 1)}, "gray_slope must be ascending and >= 0"),
        ({"gray_points": 1}, "gray_points must be >= 2, got 1"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match="^Augmentation: " + message):
        Augmentation(**options)
