import dataclasses
import math

import numpy as np
import pytest
import torch

from unet_fast import Augmentation, elastic_deform
from unet_fast.cli import main
from unet_fast.images.files import read_image, write_labels
from unet_fast.plots import draw_augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


STILL = {
    "sigma": 0.0,
    "rotation": 0.0,
    "gray_slope": (1, 1),
    "gray_black": (0, 0),
    "gray_white": (1, 1),
}


def test_no_change_without_ranges():
    image, labels = torch.rand(2, 3, 20, 30), torch.randint(0, 9, (2, 20, 30))
    out, moved = Augmentation(**STILL)(image, labels, generator=generator())
    assert torch.equal(out, image)
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


def test_volumes_are_drawn_for_each_axis():
    aug = Augmentation(
        sigma=(1.0, 5.0, 9.0),
        points=(2, 3, 4),
        rotation=(30.0, 0.0, 0.0),
        scale=(0.5, 2.0),
        shift=2.0,
        flip=(True, False, True),
    )
    p = aug.draw(4000, (2, 11, 21, 31), generator=generator())
    assert p.displacement.shape == (4000, 3, 2, 3, 4)
    assert p.gray_curve.shape[:2] == (4000, 2)
    assert p.displacement.std((0, 2, 3, 4)).tolist() == pytest.approx([1, 5, 9], rel=0.02)
    linear = p.affine[:, :, :3]
    assert (linear[:, 0, 1:] == 0).all()  # planes turn in themselves
    assert (linear[:, 1:, 0] == 0).all()
    mirrored = (linear[:, 0, 0] < 0).double()
    assert mirrored.mean().item() == pytest.approx(0.5, abs=0.03)
    determinant = torch.linalg.det(linear)
    assert (determinant < 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    zoom = determinant.abs() ** (-1 / 3)
    assert 0.5 <= zoom.min() < 0.51
    assert 1.99 < zoom.max() <= 2.0
    angle = torch.rad2deg(torch.atan2(-linear[:, 2, 1], linear[:, 1, 1]))
    assert angle.abs().max() <= 30.001
    assert angle.std().item() == pytest.approx(60 / math.sqrt(12), rel=0.05)
    centre = torch.tensor([5.0, 10.0, 15.0]).double()
    moved = linear @ centre + p.affine[:, :, 3] - centre
    assert 1.9 < moved.abs().max() <= 2.001
    assert moved.abs().amin() < 0.1


def test_rotation_of_flat_voxels_is_one_of_the_object():
    """Lengths in micrometres stay; without voxel sizes, those in voxels do."""
    still, size = {**STILL, "rotation": 180.0}, torch.tensor([3.0, 1.0, 0.5]).double()
    for voxel_size, unit in ((None, torch.ones(3).double()), ((3.0, 1.0, 0.5), size)):
        aug = Augmentation(**still, voxel_size=voxel_size)
        linear = aug.draw(9, (1, 5, 6, 7), generator=generator()).affine[:, :, :3]
        turn = unit[:, None] * linear / unit
        eye = torch.eye(3).double().expand(9, 3, 3)
        torch.testing.assert_close(turn @ turn.mT, eye)
        assert (torch.linalg.det(turn) > 0).all()
        assert (turn.abs() > 0.01).any(0).all()


def test_cicek_2016():
    p = Augmentation.cicek_2016().draw(2000, (1, 64, 33, 31), generator=generator())
    assert p.displacement.shape == (2000, 3, 6, 5, 4)
    assert p.displacement.std().item() == pytest.approx(4.0, rel=0.02)
    trace = p.affine[:, :, :3].diagonal(dim1=1, dim2=2).sum(1)
    assert torch.rad2deg(torch.acos((trace - 1) / 2)).max() < 5 * math.sqrt(3)


def test_volumes_and_their_labels_move_alike():
    volume = torch.zeros(2, 1, 12, 24, 30)
    volume[:, :, 4:8, 8:16, 10:20] = 1
    labels = volume[:, 0].int()
    aug = Augmentation(
        sigma=(0.5, 2.0, 2.0), points=4, rotation=(40.0, 0.0, 0.0), flip=True, gray_black=(0, 0)
    )
    moved, ids = aug(volume, labels, generator=generator())
    assert moved.shape == volume.shape
    assert ids.shape == labels.shape
    assert not torch.equal(ids, labels)
    assert ((moved[:, 0] > 0.5) == (ids > 0)).float().mean() > 0.99  # linear against nearest
    p = aug.draw(2, volume.shape[1:], generator=generator())
    again = elastic_deform(
        volume, p.displacement, labels=labels, affine=p.affine, gray_curve=p.gray_curve
    )
    assert torch.equal(moved, again[0])
    assert torch.equal(ids, again[1])
    moved, ids = Augmentation.cicek_2016()(volume.numpy(), labels.numpy())
    assert (moved.shape, ids.shape) == (volume.shape, labels.shape)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (
            {"sigma": (1, 2, 3)},
            (1, 9, 9),
            "sigma must be one value, or 2 for samples of 2 axes, got",
        ),
        ({"points": (3, 3)}, (1, 9, 9, 9), r"points must be one value, or 3 .* got \(3, 3\)"),
        ({"rotation": (9, 0, 0)}, (9, 9), "rotation must be one value, or 1 for samples of 2 axes"),
        (
            {"voxel_size": (1, 2)},
            (1, 9, 9, 9),
            "voxel_size must be one value, or 3 for samples of 3",
        ),
    ],
)
def test_settings_of_other_dimensions(options, shape, message):
    with pytest.raises(ValueError, match=f"^Augmentation: {message}"):
        Augmentation(**options).draw(1, shape)


def test_draws_from_the_stated_distributions():
    aug = Augmentation(
        points=(3, 4), sigma=7.0, rotation=30.0, scale=(0.5, 2.0), shift=5.0, flip=True
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
    assert p.gray_curve.shape[:2] == (4000, 2)
    black, white = p.gray_curve[:, :, 0], p.gray_curve[:, :, -1]
    # Smoothing moves the ends a little: by up to 0.4 s of the change of slope.
    assert -0.055 < black.min() < -0.049
    assert 1.049 < white.max() < 1.055
    slopes = p.gray_curve.diff(dim=2) * (p.gray_curve.shape[2] - 1)
    assert 0.8 - 1e-9 <= slopes.min() < 0.81
    assert 1.19 < slopes.max() <= 1.2 + 1e-9


def test_riders_are_only_moved():
    """Weight maps as extra channels: same positions, an order of their own, no grey curve."""
    aug = Augmentation.paper_2015()
    image, mask = torch.rand(2, 1, 30, 40), (torch.rand(2, 1, 30, 40) > 0.5).float()
    p = aug.draw(2, (1, 30, 40), generator=generator())
    both, _ = aug.apply(torch.cat([image, mask], 1), None, p, order=(1, 0), riders=1)
    torch.testing.assert_close(both[:, :1], aug.apply(image, None, p)[0])
    torch.testing.assert_close(both[:, 1:], aug.apply(mask, None, quiet(p), order=0)[0])


def test_draw_refuses():
    with pytest.raises(ValueError, match=r"^Augmentation.draw: n must be in .* -1 and \(3, 3\)"):
        Augmentation().draw(-1, (3, 3))
    with pytest.raises(ValueError, match=r"or \(C, D, H, W\), got 1 and \(5,\)"):
        Augmentation().draw(1, (5,))


def test_gray_curve_without_slack_is_straight():
    aug = Augmentation(gray_slope=(1, 1), gray_white=(0.9, 1.1))
    curve = aug.draw(10, (8, 8), generator=generator()).gray_curve
    line = curve[:, :, :1] + torch.linspace(0, 1, curve.shape[2])
    torch.testing.assert_close(curve, line.double())
    assert curve[:, 0, 0].unique().numel() == 10


def test_falk_2019_is_the_authors_grid():
    aug = Augmentation.falk_2019()
    p = aug.draw(500, (540, 540), generator=generator())
    assert p.displacement.shape == (500, 2, 7, 7)  # 540 px at 150 px
    image = torch.rand(1, 1, 32, 32)
    moved, _ = aug(image, generator=generator(5))
    parameters = aug.draw(1, (1, 32, 32), generator=generator(5))
    expected = elastic_deform(
        image,
        parameters.displacement,
        affine=parameters.affine,
        gray_curve=parameters.gray_curve,
        grid="approximating",
        grid_spacing=150,
    )
    assert torch.equal(moved, expected)


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
    p = Augmentation(**{**STILL, "rotation": 180.0}).draw(500, (15, 15), generator=generator(1))
    corners = torch.tensor([[0.0, 0, 1], [14, 14, 1]]).double()
    mapped = corners @ p.affine.transpose(1, 2)
    torch.testing.assert_close(mapped.mean(1), torch.full((500, 2), 7.0).double())
    assert math.isclose((mapped[:, 0] - 7).norm(dim=1).std().item(), 0, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": (0, 3)}, r"points must be counts in \[1, 65536\], got \(0, 3\)"),
        ({"grid": "bicubic"}, "grid must be interpolating, approximating or keys, got bicubic"),
        ({"grid": "approximating"}, "points must be at least 4 along each axis for an"),
        ({"spacing": 150}, "spacing must be None, or >= 1 with an approximating grid, got 150"),
        ({"sigma": -1}, "sigma must be >= 0, got -1"),
        ({"sigma": math.inf}, "sigma must be >= 0, got inf"),
        ({"rotation": math.nan}, "rotation must be >= 0, got nan"),
        ({"scale": (2, 1)}, "scale must be two ascending factors > 0"),
        ({"gray_slope": (-1, 1)}, "gray_slope must be ascending and >= 0"),
        ({"gray_black": (0.1, 0)}, r"gray_black must be ascending, got \(0.1, 0\)"),
        ({"gray_white": (2, 2)}, "gray_slope must allow a white for every black between them"),
        ({"gray_points": 4}, "gray_points must be 2, 3, 5 or 9, got 4"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match="^Augmentation: " + message):
        Augmentation(**options)


def test_grid_moves_with_the_image():
    """Where a line was, a line is: both are read at the same positions."""
    aug = Augmentation(sigma=3)
    image = torch.rand(3, 2, 65, 80)
    labels = torch.randint(0, 9, (3, 65, 80))
    p = aug.draw(3, (2, 65, 80), generator=generator())
    moved, ids, lines = aug.with_grid(image, labels, p)
    assert torch.equal(moved, aug.apply(image, labels, p)[0])
    assert torch.equal(ids, aug.apply(image, labels, p)[1])
    still = Augmentation(**STILL)
    straight = still.with_grid(image, labels, still.draw(3, (65, 80)))[2]
    assert torch.equal(straight[:, ::8], torch.ones(3, 9, 80))
    assert straight.mean() < 0.3
    torch.testing.assert_close(lines, aug.apply(straight[:, None], None, quiet(p))[0][:, 0])


def quiet(parameters):
    return dataclasses.replace(parameters, gray_curve=None)


@pytest.fixture
def folders(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    cells = np.zeros((40, 60), dtype=np.uint8)
    cells[10:20, 10:30], cells[25:35, 20:50] = 1, 2
    for name, size in (("a", (40, 60)), ("b", (33, 20))):
        write_labels(tmp_path / "labels" / f"{name}.png", cells[: size[0], : size[1]])
        write_labels(tmp_path / "images" / f"{name}.png", 90 * cells[: size[0], : size[1]])
    return tmp_path


@pytest.mark.parametrize("preset", ["paper-2015", "falk-2019"])
def test_command(folders, capsys, preset):
    out = folders / "out"
    words = ["augment", str(folders / "images"), str(folders / "labels"), "--out", str(out)]
    words += ["--preset", preset]
    assert main([*words, "--samples", "2"]) == 0
    assert f"2 contact sheets: {out}" in capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"a.png", "b.png"}
    first = read_image(out / "a.png")
    assert first.shape[0] == 3
    assert len(np.unique(first)) > 50
    assert main([*words, "--samples", "2", "--overwrite"]) == 0
    np.testing.assert_array_equal(read_image(out / "a.png"), first)
    assert main([*words, "--samples", "2", "--overwrite", "--seed", "1"]) == 0
    assert not np.array_equal(read_image(out / "a.png"), first)


def test_command_pairs_as_training_does(folders, capsys):
    """Nested folders, and labels that end in a suffix."""
    for kind, end in (("images", ""), ("labels", "-xyz")):
        (folders / kind / "day 1").mkdir()
        for file in sorted((folders / kind).glob("*.png")):
            file.rename(folders / kind / "day 1" / f"{file.stem}{end}.png")
    words = [str(folders / kind) for kind in ("images", "labels")]
    words += ["--out", str(folders / "out"), "--recursive", "--samples", "1"]
    assert main(["augment", *words]) == 2
    assert "--label-suffix -xyz pairs 2 images" in capsys.readouterr().err
    assert not (folders / "out").exists()
    assert main(["augment", *words, "--label-suffix", "-xyz"]) == 0
    found = [p.relative_to(folders / "out").as_posix() for p in (folders / "out").rglob("*.png")]
    assert sorted(found) == ["day 1/a.png", "day 1/b.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/nowhere", "{root}/labels"], "must be a folder of images, got nothing there"),
        (["{root}/images", "{root}/images", "--samples", "0"], "samples must be from 1 to 100"),
        (["{root}/images", "{root}/labels", "--out", "{root}/images"], "out must not"),
        (["{root}/images", "{root}/labels", "--out", "{root}/labels"], "out must not"),
        (["{root}/images", "{root}/labels", "--preset", "unet"], 'Invalid value "unet"'),
        (["{root}/images", "{root}/odd"], "must have the size of"),
        (["{root}/images", "{root}/fewer"], "must hold a partner of"),
    ],
)
def test_command_refuses(folders, capsys, words, message):
    for name, files in (("odd", "ab"), ("fewer", "a")):
        (folders / name).mkdir()
        for file in files:
            write_labels(folders / name / f"{file}.png", np.ones((9, 9), dtype=np.uint8))
    before = {f: f.read_bytes() for f in folders.rglob("*.png")}
    words = [word.format(root=folders) for word in words]
    words += [] if "--out" in words else ["--out", str(folders / "out")]
    assert main(["augment", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert {f: f.read_bytes() for f in folders.rglob("*.png")} == before


def test_places_without_a_picture_stay_white(tmp_path):
    """Five pictures in rows of four."""
    samples = [(np.zeros((40, 40)), np.zeros((40, 40), int), np.zeros((40, 40)))] * 5
    draw_augmentation(tmp_path / "a.png", samples=samples, title="")
    rows, columns, _ = (picture := read_image(tmp_path / "a.png").transpose(1, 2, 0)).shape
    below = picture[rows * 6 // 10 :]
    assert below[:, : columns // 4].min() < 128
    assert below[:, columns * 3 // 10 :].min() == 255


@pytest.mark.parametrize("name", ["sigma", "points", "rotation", "flip", "voxel_size"])
def test_settings_of_no_axis_are_refused(name):
    with pytest.raises(ValueError, match=f"Augmentation: {name} must be of 1 to 3 axes, got"):
        Augmentation(**{name: ()})
