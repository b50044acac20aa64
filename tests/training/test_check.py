import re
import tomllib

import numpy as np
import pytest
import tifffile
from PIL import Image
from runs import discs_in, options

from unet_fast.cli import main
from unet_fast.images.files import read_labels
from unet_fast.training.check import interpolated, merged_parts, parts_of


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs", count=4, size=200)


@pytest.fixture(autouse=True)
def _no_trial(request, monkeypatch):
    """Steps are timed where that is what a test is about."""
    if request.node.name != "test_train_takes_the_suggestion":
        monkeypatch.setattr("unet_fast.training.loop.seconds_of", lambda config: 60.0)


def run(capsys, discs, tmp_path, *words, code):
    call = ["check", *map(str, discs), "--out", str(tmp_path / "check"), "--overwrite", *words]
    assert main(call) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def rewrite(path, array, **options):
    path.unlink()
    Image.fromarray(array).save(path, **options)


def test_good_data(discs, tmp_path, capsys):
    output = run(capsys, discs, tmp_path, "--strict", code=0)
    assert "4 images, 16 objects, median diameter 1" in output
    assert "pixels by class: 0: 98." in output
    assert "intensities from " in output
    picture = np.asarray(Image.open(tmp_path / "check" / "check.png"))
    assert picture.shape[0] > 1000
    assert picture.std() > 10


def test_train_takes_the_suggestion(discs, tmp_path, capsys):
    output = run(capsys, discs, tmp_path, code=0)
    suggested = tmp_path / "check" / "suggested.toml"
    assert f"--config {suggested}" in output
    assert re.search(r"time: 5000 steps, as suggested, take about [\d.e+]+ minutes on this", output)
    settings = tomllib.loads(suggested.read_text())
    assert settings["label_type"] == "instances"
    assert settings["tile"] == 196
    assert settings["optimizer"] == "adam"
    out = tmp_path / "run"
    words = options({"steps": 2, "previews": 0})
    assert main(["train", "--config", str(suggested), "--out", str(out), *words]) == 0
    made = tomllib.loads((out / "config.toml").read_text())
    assert made["images"] == str(discs[0])
    assert made["steps"] == 2
    assert made["augmentation"] == settings["augmentation"]

    again = tmp_path / "again"  # and the file of a run repeats the run
    assert main(["train", "--config", str(out / "config.toml"), "--out", str(again)]) == 0
    one, two = ((d / "last.safetensors").read_bytes() for d in (out, again))
    assert one == two


def test_keeps_what_is_there(discs, tmp_path, capsys):
    run(capsys, discs, tmp_path, code=0)
    suggested = tmp_path / "check" / "suggested.toml"
    suggested.write_text("mine")
    assert main(["check", *map(str, discs), "--out", str(tmp_path / "check")]) == 0
    assert "kept as they were" in capsys.readouterr().out
    assert suggested.read_text() == "mine"


def test_files_and_sizes(discs, tmp_path, capsys):
    """Everything at once, with names; training would refuse it."""
    images, labels = discs
    (labels / "0.png").unlink()
    Image.new("L", (9, 9)).save(labels / "extra.png")
    rewrite(labels / "1.png", np.ones((20, 30), np.uint8))
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:200])
    output = run(capsys, discs, tmp_path, code=2)
    assert "error    1 files without labels: 0.png" in output
    assert "error    1 files without an image: extra.png" in output
    assert f"{labels / '1.png'}: must have the size of" in output
    assert f"{images / '2.png'}: cannot be read as an image" in output
    assert not (tmp_path / "check" / "suggested.toml").exists()
    assert main(["train", *map(str, discs), "--out", str(tmp_path / "r"), "--steps", "1"]) == 2


def test_masks(discs, tmp_path, capsys):
    """0 and 255, palette, touching blobs: training takes them, but see what that means."""
    for file in sorted(discs[1].iterdir()):
        mask = np.zeros((200, 200), np.uint8)
        rows, columns = np.mgrid[:200, :200]
        for r, c in ((50, 50), (50, 78), (140, 60)):  # the first two touch
            mask[np.hypot(rows - r, columns - c) < 15] = 255
        rewrite(file, mask)
    palette = Image.open(discs[1] / "3.png").convert("P")
    palette.putpalette([0, 0, 0] * 255 + [255, 0, 0])
    palette.save(discs[1] / "3.png")
    output = run(capsys, discs, tmp_path, "--strict", code=1)
    assert "note     masks: [0, 255] are the only values" in output
    assert "warning  palette labels, read as the numbers of the palette: 3.png" in output
    assert "warning  4 parts of masks look like several objects that touch" in output
    assert "unet_fast.label_components" in output
    assert "0 (1), 1 (1), 2 (1), 3 (1)" in output
    settings = tomllib.loads((tmp_path / "check" / "suggested.toml").read_text())
    assert settings["label_type"] == "semantic"
    run(capsys, discs, tmp_path, code=0)


def test_colour_masks(discs, tmp_path, capsys):
    grey = np.asarray(Image.open(discs[1] / "0.png"))
    rewrite(discs[1] / "0.png", np.repeat(grey[..., None], 3, 2))  # the same in all channels: fine
    run(capsys, discs, tmp_path, "--strict", code=0)
    rewrite(discs[1] / "0.png", np.stack([grey, grey * 2, grey * 0], 2))
    output = run(capsys, discs, tmp_path, code=2)
    assert "labels must be one number per pixel, got a colour image with 3 channels" in output


def test_float_labels(discs, tmp_path, capsys):
    labels = read_labels(discs[1] / "0.png")
    (discs[1] / "0.png").unlink()
    tifffile.imwrite(discs[1] / "0.tif", labels.astype(np.float32))
    run(capsys, discs, tmp_path, "--strict", code=0)
    tifffile.imwrite(discs[1] / "0.tif", labels.astype(np.float32) / 7)
    assert "labels must be integers, got float32" in run(capsys, discs, tmp_path, code=2)


@pytest.mark.parametrize("save", ["resized", "jpeg"])
def test_interpolated_labels(discs, tmp_path, capsys, save):
    mask = Image.fromarray(255 * (read_labels(discs[1] / "0.png") > 0).astype(np.uint8))
    if save == "resized":
        mask = mask.resize((77, 77), Image.Resampling.BICUBIC)
        mask.resize((200, 200), Image.Resampling.BICUBIC).save(discs[1] / "0.png")
    else:
        (discs[1] / "0.png").unlink()
        mask.save(discs[1] / "0.jpg", quality=50)
    output = run(capsys, discs, tmp_path, "--strict", code=1)
    assert re.search("warning  labels look interpolated.*: 0$", output, re.MULTILINE)
    assert ("labels in JPEG, which changes their values: 0.jpg" in output) == (save == "jpeg")


def test_real_label_maps_do_not_look_interpolated():
    from unet_fast.demo import SAMPLE

    files = sorted(SAMPLE.rglob("labels/*.png"))
    assert len(files) == 36
    assert not any(interpolated(read_labels(f)) for f in files)


def test_empty_labels_and_class_maps(discs, tmp_path, capsys):
    blank = np.zeros((200, 200), np.uint8)
    rewrite(discs[1] / "0.png", blank)
    assert "warning  1 label files are empty: 0" in run(capsys, discs, tmp_path, code=0)
    for file in discs[1].iterdir():
        rewrite(file, blank)
    output = run(capsys, discs, tmp_path, code=2)
    assert "error    labels must hold an object, got none in any file" in output
    assert output.count("must hold an object") == 1  # said once
    assert main(["train", *map(str, discs), "--out", str(tmp_path / "r"), "--steps", "1"]) == 2
    assert "labels must hold an object, got none in any file" in capsys.readouterr().err

    rng = np.random.default_rng(0)
    for file in discs[1].iterdir():  # blobs of two classes
        coarse = rng.choice([0, 0, 0, 1, 2], (20, 20)).astype(np.uint8)
        rewrite(file, np.kron(coarse, np.ones((10, 10), np.uint8)))
    output = run(capsys, discs, tmp_path, code=0)
    assert "values [1, 2] recur, each in many parts" in output
    output = run(capsys, discs, tmp_path, "--label-type", "semantic", code=0)
    assert "recur" not in output
    assert re.search(r"pixels by class: 0: \d\d.\d %, 1: \d\d.\d %, 2: \d\d.\d %", output)


def test_objects_in_parts_small_flat_and_copied_images(discs, tmp_path, capsys):
    ids = np.zeros((200, 200), np.uint8)
    ids[20:80, 20:80], ids[100:150, 100:150], ids[160:190, 160:190] = 7, 7, 9
    rewrite(discs[1] / "0.png", ids)
    rewrite(discs[0] / "1.png", np.full((200, 200), 9, np.uint8))
    Image.open(discs[0] / "2.png").save(discs[0] / "3.png")
    output = run(capsys, discs, tmp_path, code=0)
    assert "warning  objects in several parts (how many of them): 0 (1)" in output
    assert "warning  images with a channel of one value only: 1" in output
    assert "warning  copies of one image: 2, 3" in output
    small = discs_in(tmp_path / "small", count=3, size=60)
    output = run(capsys, small, tmp_path, code=0)
    assert "warning  3 images are smaller than 188 px" in output


def test_classes_beside_instances(discs, tmp_path, capsys):
    classes = tmp_path / "classes"
    classes.mkdir()
    for file in discs[1].iterdir():
        ids = np.asarray(Image.open(file))
        Image.fromarray(np.where(ids > 2, 2, ids > 0).astype(np.uint8)).save(classes / file.name)
    output = run(capsys, discs, tmp_path, "--classes", str(classes), code=0)
    assert re.search(r"16 objects.*0: .*, 1: .*, 2: ", output)
    (classes / "0.png").unlink()
    output = run(capsys, discs, tmp_path, "--classes", str(classes), code=2)
    assert "error    1 images without a class map: 0" in output
    Image.new("L", (200, 200)).save(classes / "other.png")
    output = run(capsys, discs, tmp_path, "--classes", str(classes), code=2)
    assert "error    1 class maps without an image: other" in output


def test_folders(discs, tmp_path, capsys):
    assert main(["check", str(tmp_path / "no"), str(discs[1]), "--out", str(tmp_path / "c")]) == 2
    error = capsys.readouterr().err
    assert error == f"unet-fast: {tmp_path / 'no'}: must be a folder of images, got nothing there\n"


def test_parts():
    labels = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [5, 5, 0, 0]], np.int32)
    assert parts_of(labels) == {1: 2, 5: 1}
    assert parts_of(labels, ignore_label=1) == {5: 1}


def test_merged_parts():
    rows, columns = np.mgrid[:60, :120]
    discs = [np.hypot(rows - 30, columns - c) < 12 for c in (20, 40, 90)]
    assert merged_parts(discs[0] | discs[1] | discs[2]) == 1
    assert merged_parts(discs[0] | discs[2]) == 0
    assert merged_parts(np.ones((5, 5), bool)) == 0
    assert merged_parts(np.zeros((5, 5), bool)) == 0
    assert merged_parts(np.pad(np.ones((10, 50), bool), 3)) == 0  # a rod is one
