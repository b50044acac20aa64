import json
import math

import numpy as np
import pytest
import tifffile
import torch

from unet_fast import Augmentation, BorderWeights, label_components
from unet_fast.cli import main
from unet_fast.images.files import read_image, read_labels, write_labels, write_tiff

TOUCHING = torch.tensor([[1, 1, 2, 2, 0, 0, 9, 9]], dtype=torch.uint16)


def test_target_and_weights_agree():
    target, weights = BorderWeights(class_weight=None)(TOUCHING)
    assert target.dtype == torch.uint8
    assert weights.dtype == torch.float32
    assert target.tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]
    assert weights[0, 1].item() == pytest.approx(10.801987, abs=1e-6)  # d1 = 0, d2 = 1
    assert weights[0, 4].item() == pytest.approx(9.352702, abs=1e-6)  # d1 = 1, d2 = 2
    assert weights[0, 0] == weights[0, 7] == 1


def test_ignored_pixels():
    target, weights = BorderWeights(class_weight=None, ignore_label=9)(TOUCHING)
    assert target.tolist() == [[1, 0, 0, 1, 0, 0, 255, 255]]
    assert (weights[0, 6:] == 0).all()
    assert weights[0, 4].item() == pytest.approx(1 + 10 * math.exp(-16 / 50), abs=1e-5)


def test_falk_2019_golden_values():
    target, weights = BorderWeights.falk_2019()(TOUCHING)
    assert target.tolist() == [[1, 1, 0, 1, 0, 0, 1, 1]]  # the ridge is one-sided
    assert weights[0, 2].item() == pytest.approx(50.310356, abs=1e-5)
    assert weights[0, 4].item() == pytest.approx(45.120356, abs=1e-5)
    assert weights[0, 0] == 1
    nothing = BorderWeights.falk_2019()(torch.zeros(2, 3, 4, dtype=torch.int32))[1]
    assert (nothing == torch.tensor(0.1)).all()


def test_paper_2015_balances_classes():
    _, weights = BorderWeights.paper_2015()(torch.tensor([[1, 0, 0, 0]]))
    torch.testing.assert_close(weights[0], torch.tensor([2, 2 / 3, 2 / 3, 2 / 3]))


def test_settings_changed_one_by_one_start_from_the_paper():
    """As on the command line: --weights.w0 5 must leave the rest of the preset alone."""
    assert BorderWeights() == BorderWeights.paper_2015()
    assert Augmentation() == Augmentation.paper_2015()


def test_label_components():
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [255, 0, 1]])
    labels = label_components(mask)
    assert labels.dtype == torch.int32
    assert labels.tolist() == [[1, 1, 0], [0, 0, 2], [3, 0, 2]]


def test_label_components_of_batches_and_diagonals():
    mask = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 1]]], dtype=torch.bool)
    assert label_components(mask).tolist() == [[[1, 0], [0, 2]], [[0, 0], [0, 1]]]
    assert label_components(mask, connectivity=2)[0].tolist() == [[1, 0], [0, 1]]
    assert label_components(mask[None], connectivity=3).tolist() == [
        [[[1, 0], [0, 1]], [[0, 0], [0, 1]]]
    ]
    assert label_components(mask[:0]).shape == (0, 2, 2)
    with pytest.raises(ValueError, match=r"connectivity must be in \[1, 2\], got 3"):
        label_components(mask, connectivity=3)
    with pytest.raises(ValueError, match=r"mask must be \(H, W\).*got \(2,\)"):
        label_components(mask[0, 0])


def test_several_classes():
    labels = torch.tensor([[1, 1, 2, 2, 0, 3]])
    classes = torch.tensor([[1, 1, 2, 2, 0, 2]])
    settings = BorderWeights(class_weight=None)
    target, weights = settings(labels, classes)
    assert target.tolist() == [[1, 1, 2, 2, 0, 2]]  # no ridge between classes
    assert weights[0, 4].item() == pytest.approx(1 + 10 * math.exp(-4 / 50))
    assert torch.equal(weights, settings(labels, classes, num_classes=9)[1])
    counted = BorderWeights().balanced([labels, labels], [classes, classes])
    assert counted.class_weight == pytest.approx((6 / 3, 6 / 6, 6 / 9))
    assert torch.equal(counted(labels, classes)[0], target)
    stuff = settings(torch.zeros_like(labels), classes)  # a class without objects
    assert torch.equal(stuff[0], target)
    assert (stuff[1] == 1).all()


def test_balanced_over_a_data_set():
    settings = BorderWeights(class_weight="balanced", ignore_label=9)
    maps = [TOUCHING, torch.tensor([[0, 0, 0, 5]])]  # counted: 7 of background, 3 of objects
    fixed = settings.balanced(maps)
    assert fixed.class_weight == pytest.approx((10 / 14, 10 / 6))
    assert fixed.w0 == settings.w0
    assert BorderWeights.falk_2019().balanced(maps) == BorderWeights.falk_2019()
    batch = torch.stack([TOUCHING, TOUCHING])
    for one in (TOUCHING, TOUCHING.numpy(), batch, batch[:, None]):  # one map, or a batch
        assert settings.balanced(one) == settings.balanced([TOUCHING])
    classes = (TOUCHING.int() > 0).int()
    assert settings.balanced(TOUCHING, classes) == settings.balanced([TOUCHING], [classes])
    empty = settings.balanced([torch.zeros(2, 2, dtype=torch.int32)])
    assert empty.class_weight == (1, 0)


def test_ignored_regions_are_no_objects():
    target, _ = BorderWeights(ignore_label=2)(TOUCHING)
    assert target.tolist() == [[1, 1, 255, 255, 0, 0, 1, 1]]  # no ridge along them


def test_balanced_alone_counts_each_image_without_its_ignored_pixels():
    settings = BorderWeights(class_weight="balanced", ignore_label=9)
    labels = torch.tensor([[1, 0, 9, 9, 9, 9]], dtype=torch.uint8)
    assert settings(labels)[1].tolist() == [[1, 1, 0, 0, 0, 0]]
    three = torch.tensor([[1, 0, 0, 0, 9, 9]], dtype=torch.uint8)
    target, weights = settings(torch.stack([labels, three]))
    assert target.shape == weights.shape == (2, 1, 6)
    torch.testing.assert_close(weights[1, 0, :4], torch.tensor([2, 2 / 3, 2 / 3, 2 / 3]))
    assert settings(torch.zeros(0, 4, 5, dtype=torch.uint8))[1].shape == (0, 4, 5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("settings", [BorderWeights(), BorderWeights(ignore_label=9)])
def test_rejects_labels_that_are_no_integers(settings, dtype):
    with pytest.raises(TypeError, match="labels must be an integer tensor, got"):
        settings(torch.ones(3, 3, dtype=dtype))


def test_ignore_label_outside_the_dtype_of_the_labels():
    labels = torch.tensor([[44, 0, 255]], dtype=torch.uint8)  # 300 and -1 in eight bits
    for label in (300, -1):
        assert BorderWeights(ignore_label=label)(labels)[0].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w0": -1}, "w0 must be >= 0, got -1"),
        ({"sigma": 0}, "sigma must be > 0, got 0"),
        ({"ridge": "both"}, "ridge must be two_sided, one_sided or none, got both"),
        (
            {"class_weight": "equal"},
            "class_weight must be weights >= 0, of the background first, or",
        ),
        (
            {"class_weight": (1, -1)},
            "class_weight must be weights >= 0, of the background first, or",
        ),
        ({"class_weight": (1,)}, "class_weight must be weights >= 0, of the background first, or"),
        ({"spacing": (1, 0)}, r"spacing must be sizes in \[1e-12, 1e12\], got \(1, 0\)"),
        ({"halo": (0, 1, 2)}, r"halo must be \(v in \[0, 1\], s > 0\), got \(0, 1, 2\)"),
        ({"halo": (2, 1)}, r"halo must be \(v in \[0, 1\], s > 0\), got \(2, 1\)"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match="^BorderWeights: " + message):
        BorderWeights(**options)


@pytest.fixture
def label_folder(tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    small = np.array([[1, 1, 2, 2, 0, 0, 9, 9]] * 4, dtype=np.uint16)
    write_labels(folder / "a.png", small)
    write_labels(folder / "b.png", np.zeros((3, 5), dtype=np.uint8))
    return folder


@pytest.mark.parametrize("preset", ["paper-2015", "falk-2019"])
def test_command(label_folder, tmp_path, capsys, preset):
    out = tmp_path / "out"
    words = ["weights", str(label_folder), "--out", str(out), "--preset", preset]
    assert main(words) == 0
    assert f"2 weight maps: {out}" in capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"a.tif", "a.png", "b.tif", "b.png"}
    maps = [torch.from_numpy(read_labels(label_folder / name)) for name in ("a.png", "b.png")]
    settings = BorderWeights.paper_2015() if preset == "paper-2015" else BorderWeights.falk_2019()
    expected = settings.balanced(maps)(maps[0])[1]
    written = tifffile.imread(out / "a.tif")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, expected)
    picture = read_image(out / "a.png")
    assert picture.shape[0] == 3
    assert len(np.unique(picture)) > 20
    assert main([*words, "--overwrite", "--ignore-label", "9"]) == 0
    assert (tifffile.imread(out / "a.tif")[:, 6:] == 0).all()


@pytest.mark.filterwarnings("default")
def test_command_takes_what_training_takes(label_folder, tmp_path, capsys):
    """Nested folders, stacks, images beside their labels, outlines of the size of an image."""
    out = tmp_path / "out"
    words = ["weights", str(label_folder), "--out", str(out), "--overwrite"]
    (label_folder / "b.png").rename(label_folder / "c.png")
    small = read_labels(label_folder / "a.png")
    (label_folder / "day 1").mkdir()
    stack = np.stack([small, small[:, ::-1], 0 * small])
    write_tiff(label_folder / "day 1" / "s.tif", stack, "ZYX", {"X": 0.5, "Y": 0.5})
    assert main([*words, "--recursive"]) == 0
    assert f"3 weight maps: {out}" in capsys.readouterr().out
    written = tifffile.imread(out / "day 1" / "s.tif")
    weigh = BorderWeights.paper_2015().balanced(
        [torch.from_numpy(x.copy()) for x in (small, *stack, np.zeros((3, 5), np.int32))]
    )
    for found, ids in zip(written, stack, strict=True):
        np.testing.assert_array_equal(found, weigh(torch.from_numpy(ids.copy()))[1])
    assert (out / "day 1" / "s.png").exists()
    for name in ("a", "c"):
        (label_folder / f"{name}.png").rename(label_folder / f"{name}_mask.png")
        write_labels(label_folder / f"{name}.png", small)
    assert main(words) == 0
    told = capsys.readouterr()
    assert f"2 weight maps: {out}" in told.out
    assert "warning: labels of NAME are taken to be NAME_mask" in told.err
    assert {f.name for f in out.glob("*_mask.tif")} == {"a_mask.tif", "c_mask.tif"}
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    box = [[1, 1], [5, 1], [5, 3], [1, 3], [1, 1]]
    (drawn / "a.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [box]}))
    words = ["weights", str(drawn), "--out", str(tmp_path / "more")]
    assert main(words) == 2
    assert "a.geojson: outlines must go with an image, whose size" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    images = tmp_path / "images"
    images.mkdir()
    write_labels(images / "a.png", small)
    assert main([*words, "--images", str(images)]) == 0
    assert tifffile.imread(tmp_path / "more" / "a.tif").shape == small.shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "must be a folder of images, got nothing there"),
        (["{labels}", "--preset", "unet"], 'Invalid value "unet" for --preset'),
        (["{labels}", "--out", "{labels}", "--overwrite"], "out must not be the folder of the"),
        (["{labels}", "--out", "{labels}/a.png"], "must be a folder that can be written"),
        (["{labels}/float.tif"], "labels must be integers, got float32"),
    ],
)
def test_command_refuses(label_folder, tmp_path, capsys, words, message):
    tifffile.imwrite(label_folder / "float.tif", np.full((2, 2), 0.5, dtype=np.float32))
    before = {f.name: f.read_bytes() for f in label_folder.iterdir()}
    if "float" not in words[0]:
        (label_folder / "float.tif").unlink()
        del before["float.tif"]
    words = [word.format(labels=label_folder) for word in words]
    words += [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["weights", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert {f.name: f.read_bytes() for f in label_folder.iterdir()} == before


def test_command_keeps_what_is_there(label_folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.tif").write_text("mine")
    assert main(["weights", str(label_folder), "--out", str(out)]) == 2
    assert "must not hold files of the results' names" in capsys.readouterr().err
    assert (out / "b.tif").read_text() == "mine"
