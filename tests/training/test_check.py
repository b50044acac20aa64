import json
import re
import tomllib

import numpy as np
import pytest
import tifffile
from PIL import Image
from runs import discs_in, options
from scipy import ndimage

from unet_fast.cli import main
from unet_fast.demo import SAMPLE
from unet_fast.images.files import read_image, read_labels
from unet_fast.images.signs import (
    flatness,
    hollow,
    interpolated,
    inverted,
    merged_parts,
    misplaced,
    outlines,
    parts_of,
    unlabelled,
)
from unet_fast.training.check import check_data
from unet_fast.training.config import TrainConfig
from unet_fast.training.looks import warn_of
from unet_fast.training.samples import load_samples
from unet_fast.training.suggest import fitting, suggested_settings, width_of


@pytest.fixture
def discs(tmp_path):
    return discs_in(tmp_path / "discs", count=4, size=200)


@pytest.fixture(autouse=True)
def _no_trial(request, monkeypatch):
    """Steps are timed where that is what a test is about."""
    if request.node.name != "test_train_takes_the_suggestion":
        monkeypatch.setattr("unet_fast.training.loop.cost_of", lambda config: (60.0, 1.1e9))


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
    cost = r"time: about [\d.]+ (min|h), memory: about 0\.\d+ GB \(5000 steps, as suggested"
    assert re.search(cost, output)
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


def test_suggestions_are_of_the_data_checked_last(discs, tmp_path, capsys):
    """Those of other data are refused or, with --overwrite, gone even if the data have errors."""
    output = run(capsys, discs, tmp_path, code=0)
    assert "time: about 1 min, memory: about 1.1 GB (5000 steps" in output
    suggested = tmp_path / "check" / "suggested.toml"
    suggested.write_text("mine")
    assert main(["check", *map(str, discs), "--out", str(tmp_path / "check")]) == 2
    error = f"unet-fast: out must not hold a check, got {suggested} (--overwrite replaces)\n"
    assert capsys.readouterr() == ("", error)  # before any work
    assert suggested.read_text() == "mine"
    (discs[1] / "0.png").unlink()
    run(capsys, discs, tmp_path, code=2)
    assert list((tmp_path / "check").iterdir()) == []


def test_files_and_sizes(discs, tmp_path, capsys):
    """Everything at once, with names; training would refuse it."""
    images, labels = discs
    (labels / "0.png").unlink()
    Image.new("L", (9, 9)).save(labels / "extra.png")
    rewrite(labels / "1.png", np.ones((20, 30), np.uint8))
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:200])
    output = run(capsys, discs, tmp_path, code=2)
    assert "1 file without labels (--skip-unlabelled leaves such images out): 0.png" in output
    assert "error    1 file without an image: extra.png" in output
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
    assert "warning  parts of masks that look like several objects that touch, 4 in all" in output
    assert "unet_fast.label_components" in output
    assert "0 (1), 1 (1), 2 (1), 3 (1)" in output
    settings = tomllib.loads((tmp_path / "check" / "suggested.toml").read_text())
    assert settings["label_type"] == "semantic"
    run(capsys, discs, tmp_path, code=0)


def test_colour_masks(discs, tmp_path, capsys):
    grey = np.asarray(Image.open(discs[1] / "0.png"))
    rewrite(discs[1] / "0.png", np.repeat(grey[..., None], 3, 2))  # the same in all channels: fine
    run(capsys, discs, tmp_path, "--strict", code=0)
    colours = np.stack([grey, grey * 2, grey * 0], 2)
    rewrite(discs[1] / "0.png", colours)
    output = run(capsys, discs, tmp_path, "--strict", code=0)
    assert "note     each colour is taken as an object, and #000000 as background: 0.png" in output
    assert "4 images, 16 objects" in output
    (discs[1] / "0.png").unlink()
    Image.fromarray(colours).save(discs[1] / "0.jpg")
    output = run(capsys, discs, tmp_path, code=2)
    assert "labels in JPEG, which changes their values" in output


def test_float_labels(discs, tmp_path, capsys):
    labels = read_labels(discs[1] / "0.png")
    (discs[1] / "0.png").unlink()
    tifffile.imwrite(discs[1] / "0.tif", labels.astype(np.float32))
    run(capsys, discs, tmp_path, "--strict", code=0)
    tifffile.imwrite(discs[1] / "0.tif", labels.astype(np.float32) / 7)
    assert "labels must be integers, got float32" in run(capsys, discs, tmp_path, code=2)


def test_interpolated_labels(discs, tmp_path, capsys):
    mask = Image.fromarray(255 * (read_labels(discs[1] / "0.png") > 0).astype(np.uint8))
    mask = mask.resize((77, 77), Image.Resampling.BICUBIC)
    mask.resize((200, 200), Image.Resampling.BICUBIC).save(discs[1] / "0.png")
    output = run(capsys, discs, tmp_path, "--strict", code=1)
    assert re.search("warning  labels look interpolated.*: 0$", output, re.MULTILINE)


def test_jpeg_labels(discs, tmp_path, capsys):
    (discs[1] / "0.png").rename(discs[1] / "0.jpg")
    output = run(capsys, discs, tmp_path, code=2)
    assert "error    labels in JPEG, which changes their values: export them anew as PNG" in output
    assert main(["train", *map(str, discs), "--out", str(tmp_path / "run")]) == 2
    assert "0.jpg: labels must be PNG or TIFF, got a JPEG" in capsys.readouterr().err


def test_swapped_folders(discs, tmp_path, capsys):
    output = run(capsys, discs[::-1], tmp_path, code=2)
    assert "error    the labels look like photographs and the images like labels: did " in output
    assert "look interpolated" not in output  # what follows from it is not said


def test_one_image(tmp_path, capsys):
    one = discs_in(tmp_path / "one", count=1, size=200)
    output = run(capsys, one, tmp_path, "--strict", code=1)
    assert "warning  one image only: none is left for validation" in output
    assert "--validation 0" in output


@pytest.mark.filterwarnings("default")
def test_train_says_what_makes_it_useless(discs, tmp_path, capsys):
    small = [*options({"steps": 1}), "--out", str(tmp_path / "run")]
    assert main(["train", *map(str, discs[::-1]), *small]) == 2
    assert "did you swap the two folders?" in capsys.readouterr().err
    one = discs_in(tmp_path / "one", count=1)
    labels = one[1] / "0.png"
    soft = ndimage.gaussian_filter(60.0 * np.asarray(Image.open(labels)), 2)
    rewrite(labels, soft.astype(np.uint8))
    assert main(["train", *map(str, one), *small]) == 0
    told = capsys.readouterr().err
    assert "unet-fast: warning: one image only: none is left for validation" in told
    assert "unet-fast: warning: labels look interpolated" in told


def test_masks_among_numbered_labels(discs, tmp_path, capsys):
    labels = read_labels(discs[1] / "1.png")
    rewrite(discs[1] / "1.png", 255 * (labels > 0).astype(np.uint8))
    output = run(capsys, discs, tmp_path, "--strict", code=1)
    text = "masks among files that number their objects"
    assert re.search(f"warning  {text}.*: 1$", output, re.MULTILINE)
    with pytest.warns(UserWarning, match=text):
        warn_of(load_samples(*discs), validated=True, label_type="instances", ignore_label=None)


def test_masks_in_which_0_is_no_background(discs, tmp_path, capsys):
    masks = {file: read_labels(file) > 0 for file in sorted(discs[1].iterdir())}
    for inside, outside, text in (
        (0, 255, "masks look inverted: 255 surrounds places of 0"),
        (255, 127, "no pixel is 0, which stands for the background, but most along the edges of"),
    ):
        for file, mask in masks.items():
            rewrite(file, np.where(mask, inside, outside).astype(np.uint8))
        assert f"warning  {text}" in run(capsys, discs, tmp_path, code=0)
        with pytest.warns(UserWarning, match=text):
            warn_of(load_samples(*discs), validated=True, label_type="semantic", ignore_label=None)


def test_cells_that_fill_an_image_are_no_inverted_mask():
    cells = np.kron(np.ones((3, 4), bool), np.pad(np.ones((9, 9), bool), 1))
    assert not inverted(cells)
    assert inverted(~np.pad(cells, 30)[::2, ::2])


@pytest.mark.parametrize("way", ["flipped", "others"])
def test_labels_beside_their_objects(discs, tmp_path, capsys, way):
    files = sorted(discs[1].iterdir())
    found = [np.asarray(Image.open(file)) for file in files]
    wrong = [x[::-1] for x in found] if way == "flipped" else [*found[1:], found[0]]
    for file, labels in zip(files, wrong, strict=True):
        rewrite(file, labels)
    output = run(capsys, discs, tmp_path, "--strict", code=1)
    text = "labels lie beside the objects; those of another image, or flipped ones, fit better"
    assert f"warning  {text}: 0, 1, 2, 3" in output
    with pytest.warns(UserWarning, match=text):
        warn_of(load_samples(*discs), validated=True, label_type="instances", ignore_label=None)


def test_labels_of_real_nuclei_lie_where_they_must():
    samples = load_samples(SAMPLE / "train" / "images", SAMPLE / "train" / "labels")
    maps = [s.labels for s in samples]
    assert not any(misplaced(s.image.mean(0), s.labels, maps) for s in samples)
    assert all(misplaced(s.image.mean(0), s.labels[::-1], maps) for s in samples)


def test_a_label_to_ignore_that_no_pixel_has(discs, tmp_path, capsys):
    output = run(capsys, discs, tmp_path, "--strict", "--ignore-label", "4711", code=1)
    assert "warning  no pixel has the label to ignore" in output


def test_lines_around_objects(discs, tmp_path, capsys):
    for file in discs[1].iterdir():
        lines = outlines(read_labels(file))
        lines[::3] = False  # broken
        rewrite(file, 255 * lines.astype(np.uint8))
    output = run(capsys, discs, tmp_path, "--strict", code=1)
    assert re.search(r"warning  \d+ of \d+ objects are thin outlines: fill them", output)


def test_pictures_refuse_photographs_and_jpeg(discs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "pictures")]
    assert main(["weights", str(discs[0]), *out]) == 2
    assert "weights: labels: objects must be numbered, got what looks like" in told(capsys)
    assert main(["augment", *map(str, discs[::-1]), *out]) == 2
    assert "did you swap the two folders?" in told(capsys)
    (discs[1] / "0.png").rename(discs[1] / "0.jpg")
    for words in (["weights", discs[1]], ["evaluate", discs[1], discs[1]]):
        assert main([*map(str, words), *out]) == 2
        assert "0.jpg: labels must be PNG or TIFF, got a JPEG" in told(capsys)


def told(capsys):
    return capsys.readouterr().err


@pytest.mark.parametrize("dark", [False, True])
def test_objects_without_label(tmp_path, capsys, dark):
    sparse = discs_in(tmp_path / "sparse", count=4, size=200)
    for file in sorted(sparse[1].iterdir()):
        labels = read_labels(file).astype(np.uint8)
        rewrite(file, np.where(labels > 2, 0, labels))
        if dark:
            image = sparse[0] / file.name
            rewrite(image, 255 - np.asarray(Image.open(image)))
    output = run(capsys, sparse, tmp_path, "--strict", code=1)
    assert "warning  8 places as bright or dark as the 8 objects, but without label" in output
    assert "--ignore-label: 0 (2), 1 (2), 2 (2), 3 (2)" in output
    for file in sorted(sparse[1].iterdir()):  # all that is not labelled is ignored
        labels = read_labels(file).astype(np.uint8)
        rewrite(file, np.where(labels == 0, 9, labels))
        labels[:60] = 0
    output = run(capsys, sparse, tmp_path, "--ignore-label", "9", code=0)
    assert "places" not in output


def test_real_nuclei_all_have_labels():
    for file in sorted((SAMPLE / "test" / "images").iterdir()):
        labels = read_labels(SAMPLE / "test" / "labels" / file.name)
        nothing = np.zeros(labels.shape, bool)
        ids = np.unique(labels)[1:]
        assert unlabelled(read_image(file), labels, nothing) < 0.1 * len(ids)
        few = np.where(labels > ids[len(ids) // 3], 0, labels)
        assert unlabelled(read_image(file), few, nothing) > 0.2 * len(ids), file


def test_outlines_and_objects_cut_by_edges(discs, tmp_path, capsys):
    for file in sorted(discs[1].iterdir()):
        labels = read_labels(file).astype(np.uint8)
        thin = np.where(outlines(labels), labels, 0).astype(np.uint8)
        rewrite(file, thin)
    output = run(capsys, discs, tmp_path, code=0)
    assert re.search(r"warning  \d+ of \d+ objects are thin outlines: fill them", output)
    assert hollow(labels) == (0, 4)
    stripes = np.repeat(np.arange(200, dtype=np.uint8)[:, None] // 20 % 10, 200, 1)
    for file in discs[1].iterdir():
        rewrite(file, stripes)
    output = run(capsys, discs, tmp_path, code=0)
    assert "warning  36 of 36 objects are cut by the edges of the images" in output


def test_tiles_show_whole_objects(discs, tmp_path, capsys):
    assert fitting([(512, 512)], 30.0, "cpu")["tile"] == 196
    assert fitting([(512, 512)], 250.2, "cpu")["tile"] == 251
    assert fitting([(900, 900)], 500.0, "cpu")["tile"] == 388
    assert fitting([(200, 300)], 250.0, "cpu")["tile"] <= 200
    square = np.zeros((60, 60), np.int32)
    square[5:25, 5:25], square[30:50, 30:50] = 3, 3
    expected = np.sqrt(400 * 4 / np.pi)
    assert width_of([square], "semantic", None) == pytest.approx(expected)
    assert width_of([square], "instances", None) == pytest.approx(expected * np.sqrt(2))
    assert width_of([square], "instances", 3) == 0
    for file in discs[1].iterdir():
        rewrite(file, np.pad(np.ones((198, 198), np.uint8), 1))
    output = run(capsys, discs, tmp_path, code=0)
    assert "warning  a tenth of the objects are wider than 223 px, more than a tile" in output


def test_real_label_maps_do_not_look_interpolated():
    files = sorted(SAMPLE.rglob("labels/*.png"))
    assert len(files) == 36
    assert not any(interpolated(read_labels(f)) for f in files)


def test_empty_labels_and_class_maps(discs, tmp_path, capsys):
    blank = np.zeros((200, 200), np.uint8)
    rewrite(discs[1] / "0.png", blank)
    assert "warning  1 label file without objects: 0" in run(capsys, discs, tmp_path, code=0)
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
    assert "warning  3 images smaller than 188 px" in output


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
    assert "error    1 image without a class map: 0" in output
    Image.new("L", (200, 200)).save(classes / "other.png")
    output = run(capsys, discs, tmp_path, "--classes", str(classes), code=2)
    assert "error    1 class map without an image: other" in output


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


@pytest.mark.filterwarnings("default")
def test_names_of_files(discs, tmp_path, capsys):
    """What people's folders hold: nested, half labelled, suffixes, formats that are not read."""
    images, labels = discs
    for folder, mark in ((images, ""), (labels, "_cp_masks")):
        (folder / "day 1").mkdir()
        for file in sorted(folder.glob("*.png")):
            file.rename(folder / "day 1" / f"{file.stem}{mark}.png")
    (labels / "day 1" / "0_seg.npy").write_bytes(b"")
    words = "--recursive", "--skip-unlabelled"
    (labels / "day 1" / "3_cp_masks.png").unlink()
    assert main(["check", *map(str, discs), "--out", str(tmp_path / "c")]) == 2
    assert "nested folders, which --recursive takes" in capsys.readouterr().err
    output = run(capsys, discs, tmp_path, "--recursive", code=2)
    assert "1 file without labels (--skip-unlabelled leaves such images out): 3.png" in output
    output = run(capsys, discs, tmp_path, *words, code=0)
    assert "note     labels of NAME are taken to be NAME_cp_masks" in output
    assert "note     images without labels, left out: 1 of 4" in output
    assert re.search("warning  .*labels: found 1 _seg.npy file, which must be saved as PNG", output)
    assert "3 images, 12 objects" in output
    for file in sorted((labels / "day 1").glob("*.png")):
        file.rename(file.with_stem(file.stem.replace("_cp_masks", "-xyz")))
    output = run(capsys, discs, tmp_path, "--recursive", code=2)
    assert "leaves such images out, --label-suffix -xyz pairs 3 images): 0" in output
    run(capsys, discs, tmp_path, *words, "--label-suffix", "-xyz", code=0)
    train = ["train", "--config", str(tmp_path / "check" / "suggested.toml"), "--steps", "1"]
    assert main([*train, "--out", str(tmp_path / "r"), *options({"previews": 0})]) == 0
    error = capsys.readouterr().err
    assert error.count("warning: images without labels, left out: 1 of 4") == 1
    assert error.count("found 1 _seg.npy file") == 1
    split = json.loads((tmp_path / "r" / "split.json").read_text())
    assert sorted(split["train"] + split["validation"]) == ["day 1/0", "day 1/1", "day 1/2"]


def stacks(folder, count=2, planes=3):
    """Stacks of discs with labels; ImageJ's and plain ones, of which nothing says the axes."""
    images, labels = discs_in(folder, count=count * planes, size=200)
    for i in range(count):
        named = {"imagej": True, "metadata": {"axes": "ZYX"}}
        options = named if i % 2 else {"photometric": "minisblack", "metadata": None}
        for kind in (images, labels):
            files = [kind / f"{j}.png" for j in range(i * planes, (i + 1) * planes)]
            tifffile.imwrite(
                kind / f"s{i}.tif", np.stack([np.asarray(Image.open(f)) for f in files]), **options
            )
            for file in files:
                file.unlink()
    return images, labels


@pytest.mark.filterwarnings("default:stacks")
def test_stacks_plane_by_plane(tmp_path, capsys):
    both = stacks(tmp_path / "stacks")
    output = run(capsys, both, tmp_path, "--strict", code=0)
    said = "note     stacks, of which each plane counts as an image (--axes CYX: as channels; "
    assert f"{said}--dims 3: as volumes): s0.tif" in output
    assert "6 images, 24 objects" in output
    train = ["train", *map(str, both), "--out", str(tmp_path / "r"), "--steps", "1"]
    assert main([*train, *options({"previews": 0})]) == 0
    said = "warning: stacks, of which each plane counts as an image"
    assert capsys.readouterr().err.count(said) == 1
    split = json.loads((tmp_path / "r" / "split.json").read_text())
    assert len(split["train"]) == len(split["validation"]) == 3
    assert len({name.partition("[")[0] for name in split["validation"]}) == 1
    tifffile.imwrite(both[1] / "s1.tif", tifffile.imread(both[1] / "s1.tif"), imagej=True)
    output = run(capsys, both, tmp_path, code=2)  # planes stored as channels
    assert "s1.tif: must have the planes of" in output
    assert set(split["train"]) in ({"s0[0]", "s0[1]", "s0[2]"}, {"s1[0]", "s1[1]", "s1[2]"})


def test_axes(tmp_path, capsys):
    """Channels that are pages of a TIFF, of which nothing says so."""
    images, labels = both = discs_in(tmp_path / "d", count=2, size=200)
    for file in sorted(images.iterdir()):
        pages = np.stack([np.asarray(Image.open(file)) + np.uint8(i) for i in range(5)])
        tifffile.imwrite(file.with_suffix(".tif"), pages, photometric="minisblack", metadata=None)
        file.unlink()
    output = run(capsys, both, tmp_path, code=2)
    assert f"{labels / '0.png'}: must have the planes of {images / '0.tif'}, 5 planes" in output
    assert "got 1 plane (--axes says what axes of images are: ZYX planes, CYX channels)" in output
    output = run(capsys, both, tmp_path, "--axes", "CYX", code=0)
    assert "5 channels" in output
    assert 'axes = "CYX"' in (tmp_path / "check" / "suggested.toml").read_text()
    for axes in ("YX5", "CX", "ZZYX", "zyx"):
        words = ["check", *map(str, both), "--out", str(tmp_path / "c"), "--axes", axes]
        assert main(words) == 2
        assert f"axes must be letters of TZCYX, each once, Y and X among them, got '{axes}'" in (
            capsys.readouterr().err
        )


def test_one_folder_of_images_and_labels(discs, tmp_path, capsys, monkeypatch):
    """What is read again to time the first steps is not said again."""
    images, labels = discs
    for file in sorted(labels.iterdir()):
        file.rename(images / f"{file.stem}_cp_masks.png")

    def trial(config):
        assert len(load_samples(config.images, config.labels, reading=config.reading)) == 4
        return 60.0, 1e9

    monkeypatch.setattr("unet_fast.training.loop.cost_of", trial)
    output = run(capsys, (images, images), tmp_path, "--strict", code=0)
    assert output.count("labels of NAME are taken to be NAME_cp_masks") == 1
    assert "4 images, 16 objects" in output


def test_signs_need_room():
    """Of a row of pixels nothing is said, nor of parts that are thin everywhere."""
    for shape in ((1, 5), (2, 9), (9, 2)):
        assert not interpolated(np.arange(np.prod(shape), dtype=np.int32).reshape(shape))
    lines = np.zeros((9, 9), bool)
    lines[::4] = True
    assert merged_parts(lines) == 0
    assert flatness(np.zeros((5, 1))) == 1
    assert flatness(np.arange(20).reshape(4, 5)) == 0


def test_saturated_images_and_odd_classes(discs, tmp_path):
    """Without a picture: nothing is written."""
    images, labels = discs
    (tmp_path / "classes").mkdir()
    for file in sorted(labels.iterdir()):
        kinds = (np.asarray(Image.open(file)) > 0).astype(np.uint8)
        if file.stem == "1":
            kinds[:50] = 0
            picture = np.asarray(Image.open(images / file.name)).copy()
            picture[:20] = 255
            Image.fromarray(picture).save(images / file.name)
        Image.fromarray(kinds).save(tmp_path / "classes" / file.name)
    report = check_data(images, labels, out=tmp_path / "run", classes=tmp_path / "classes")
    lines = [text for level, text in report.findings if level == "warning"]
    assert any("over 5 % of the pixels are saturated: 1" in line for line in lines)
    (odd,) = [line for line in lines if "have a class but no object, or the reverse" in line]
    assert odd.endswith("they count as background: 1")
    assert not (tmp_path / "run").exists()


def test_suggestions_for_a_kind_that_is_said(tmp_path):
    """Parts of masks are objects: of two, each is narrower than both together."""
    picture, labels = np.zeros((2, 400, 400), np.uint8)
    labels[20:190, 20:380] = labels[210:380, 20:380] = 1
    for kind, array in (("images", picture), ("labels", labels)):
        (tmp_path / kind).mkdir()
        Image.fromarray(array).save(tmp_path / kind / "a.png")
    one, both = (
        suggested_settings(
            TrainConfig(tmp_path / "images", tmp_path / "labels", out=tmp_path, label_type=kind)
        )["tile"]
        for kind in ("semantic", "instances")
    )
    assert one == np.ceil(np.sqrt(170 * 360 * 4 / np.pi))
    assert both > one
