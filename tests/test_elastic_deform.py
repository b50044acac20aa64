import numpy as np
import pytest
import torch
from scipy import ndimage

from unet_fast import elastic_deform

SHAPE = (23, 31)


def scipy_displacement(displacement, shape):
    """The cubic B-spline through the control values, whose corners lie on the image's corners."""
    points = [np.linspace(0, p - 1, n) for p, n in zip(displacement.shape[1:], shape, strict=True)]
    grid = np.stack(np.meshgrid(*points, indexing="ij"))
    return np.stack(
        [ndimage.map_coordinates(d, grid, order=3, mode="mirror") for d in displacement]
    )


@pytest.mark.parametrize("knots", [(3, 3), (1, 1), (2, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("boundary", ["mirror", "constant", "wrap", "nearest"])
@pytest.mark.parametrize("order", [0, 1])
def test_equals_scipy(rng, order, boundary, knots):
    image = rng.normal(size=(2, 3, *SHAPE))
    displacement = rng.normal(size=(2, 2, *knots)) * 8
    out = elastic_deform(
        torch.from_numpy(image),
        torch.from_numpy(displacement),
        order=order,
        boundary=boundary,
        cval=0.25,
    )
    identity = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    for n in range(2):
        position = identity + scipy_displacement(displacement[n], SHAPE)
        for c in range(3):
            expected = ndimage.map_coordinates(
                image[n, c], position, order=order, mode=boundary, cval=0.25
            )
            np.testing.assert_allclose(out[n, c], expected, atol=1e-12)


def test_grid_values_are_reached():
    rows = torch.arange(121.0).double()[:, None].expand(121, 121)
    image = torch.stack([rows, rows.T])[None]  # its value is the position it was read at
    tile = {"output_shape": (41, 41), "offset": torch.tensor([[40.0, 40.0]])}
    displacement = torch.randn(1, 2, 3, 3).double() * 5
    moved = elastic_deform(image, displacement, **tile) - elastic_deform(image, **tile)
    torch.testing.assert_close(moved[:, :, ::20, ::20], displacement)
    constant = elastic_deform(image, torch.full((1, 2, 4, 4), 3.0), **tile)
    torch.testing.assert_close(constant, image[:, :, 43:84, 43:84])


def test_affine_and_offset():
    image = torch.rand(2, 1, 9, 9)
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 8]]).expand(2, 2, 3)  # (r, c) <- (c, 8 - r)
    turned = elastic_deform(image, affine=turn)
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)))
    corner = torch.tensor([[2.0, 3.0], [4.0, 0.0]])
    tile = elastic_deform(image, offset=corner, output_shape=(4, 5))
    assert torch.equal(tile[0], image[0, :, 2:6, 3:8])
    assert torch.equal(tile[1], image[1, :, 4:8, 0:5])


def test_mirrors_at_any_distance():
    image = torch.arange(3.0).view(1, 1, 1, 3)
    wide = elastic_deform(image, offset=torch.tensor([[0.0, -5.0]]), output_shape=(1, 12))
    assert wide.flatten().tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    single = elastic_deform(image[..., :1] + 7, torch.randn(1, 2, 3, 3), output_shape=(4, 4))
    assert (single == 7).all()


def test_labels_take_the_same_positions():
    ids = torch.randint(0, 2**31 - 1, (2, 20, 30), dtype=torch.int32)
    image = (ids % 1000).double()[:, None]
    displacement = torch.randn(2, 2, 3, 3) * 4
    moved, labels = elastic_deform(image, displacement, labels=ids, order=0)
    assert labels.dtype == torch.int32
    assert torch.equal((labels % 1000).double(), moved[:, 0])
    _, inner = elastic_deform(image, displacement, labels=ids, label_shape=(10, 24))
    assert torch.equal(inner, labels[:, 5:15, 3:27])


def test_empty_batch():
    image, labels = torch.zeros(0, 2, 4, 5), torch.zeros(0, 4, 5, dtype=torch.int16)
    moved = elastic_deform(image, torch.zeros(0, 2, 3, 3), labels=labels, output_shape=(6, 6))
    assert [m.shape for m in moved] == [(0, 2, 6, 6), (0, 6, 6)]
    assert moved[1].dtype == torch.int16


def test_gray_curve():
    image = torch.tensor([-0.1, 0.0, 0.25, 0.5, 1.0, 1.2]).view(1, 1, 1, 6)
    curve = torch.tensor([0.1, 0.2, 0.9]).view(1, 1, 3)
    expected = torch.tensor([0.08, 0.1, 0.15, 0.2, 0.9, 1.18])
    torch.testing.assert_close(elastic_deform(image, gray_curve=curve).flatten(), expected)
    two = elastic_deform(image.expand(1, 2, 1, 6), gray_curve=curve)
    torch.testing.assert_close(two[0, 1, 0], expected)
    assert elastic_deform(image.bfloat16(), gray_curve=curve).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(1, 1, 4, 4).int()}, TypeError, "image must be floating point"),
        ({"image": torch.zeros(1, 4, 4)}, ValueError, r"image must be \(N, C, H, W\)"),
        ({"labels": torch.zeros(1, 4, 4)}, TypeError, "labels must be integer, got"),
        ({"labels": torch.zeros(1, 4, 5).int()}, ValueError, r"labels must have shape \(1, 4, 4\)"),
        ({"displacement": torch.zeros(2, 2, 3, 3)}, ValueError, r"shape \(1, 2, any, any\), got"),
        ({"affine": torch.zeros(1, 2, 2)}, ValueError, r"affine must have shape \(1, 2, 3\), got"),
        ({"offset": torch.zeros(2)}, ValueError, r"offset must have shape \(1, 2\), got \(2,\)"),
        ({"gray_curve": torch.zeros(1, 1, 1)}, ValueError, "at least 2 points, got 1"),
        ({"output_shape": (4,)}, ValueError, r"output_shape must be two sizes >= 1, got \(4,\)"),
        ({"output_shape": (0, 4)}, ValueError, r"output_shape must be two sizes >= 1"),
        ({"order": 2}, ValueError, "order must be 0 or 1, got 2"),
        ({"boundary": "reflect"}, ValueError, "boundary must be one of mirror.*got 'reflect'"),
        (
            {"labels": torch.zeros(1, 4, 4).int(), "label_shape": (3, 4)},
            ValueError,
            "label_shape must be smaller than output_shape by an even number",
        ),
    ],
)
def test_rejects(change, error, message):
    arguments = {"image": torch.zeros(1, 1, 4, 4)} | change
    with pytest.raises(error, match=message):
        elastic_deform(**arguments)
