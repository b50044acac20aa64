"""`unet-fast evaluate`: tables, summaries, what is refused."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from runs import discs_in
from scipy import ndimage

from unet_fast import UNet, metrics, predict, save_model
from unet_fast.cli import main
from unet_fast.images.files import read_labels, write_labels, write_tiff
from unet_fast.images.pairing import Reading
from unet_fast.images.zarr import create
from unet_fast.objects import ObjectRule
from unet_fast.scores.evaluate import IOUS, evaluate_files
from unet_fast.scores.overlap import object_errors
from unet_fast.scores.report import CSV, JSON, PICTURE


@pytest.fixture
def folders(tmp_path):
    """Three images of labels, and predictions of two and of an empty one."""
    generator = np.random.default_rng(0)
    truth = np.kron(generator.integers(0, 6, (3, 6, 7)), np.ones((4, 4), int))
    found = np.where(generator.random(truth.shape) < 0.9, truth * 3, 0)
    truth[2] = 0
    for name, images in (("labels", truth), ("found", found)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            write_labels(tmp_path / name / f"{i}.png", image)
    return tmp_path, truth, found


@pytest.mark.parametrize(("end", "label_end"), [("", "_mask"), ("", "-labels"), ("_img", "_masks")])
def test_labels_named_as_in_training(folders, end, label_end):
    place, _, _ = folders
    before = evaluate_files(place / "found", place / "labels")
    for folder, added in (("found", end), ("labels", label_end)):
        for file in sorted((place / folder).iterdir()):
            file.rename(file.with_stem(file.stem + added))
    with pytest.warns(UserWarning, match=f"NAME{end} are taken to be NAME{label_end}: --label"):
        after = evaluate_files(place / "found", place / "labels")
    assert [row["image"] for row in after.rows] == [f"{i}{end}" for i in range(3)]
    assert after.summary == before.summary
    (place / "found" / f"7{end}.png").write_bytes(b"")
    with (
        pytest.raises(ValueError, match=rf"labels: must hold labels of .*7{end}\.png, got none"),
        pytest.warns(UserWarning, match="are taken"),
    ):
        evaluate_files(place / "found", place / "labels")


@pytest.mark.filterwarnings("default")
def test_labels_beside_their_images(folders, capsys):
    """Images are no labels: in the folder of the labels, in nested folders, with any suffix."""
    place, truth, _ = folders
    before = evaluate_files(place / "found", place / "labels").summary
    for kind, end in (("found", ""), ("labels", "_mask")):
        (place / kind / "day 1").mkdir()
        for file in sorted((place / kind).glob("*.png")):
            file.rename(place / kind / "day 1" / f"{file.stem}{end}.png")
    data, noise = place / "labels", np.random.default_rng(0).integers(0, 256, truth.shape)
    (place / "found" / "overlays" / "day 1").mkdir(parents=True)  # as predict writes them
    for i in range(3):
        write_labels(data / "day 1" / f"{i}.png", noise[i])
        write_labels(place / "found" / "overlays" / "day 1" / f"{i}.png", noise[i])
    nested = Reading(recursive=True)
    for images in (None, data):
        result = evaluate_files(place / "found", data, images=images, reading=nested)
        assert [row["image"] for row in result.rows] == [f"day 1/{i}" for i in range(3)]
        assert result.summary == before
        assert (result.examples[0].image is None) == (images is None)
    for file in sorted((data / "day 1").glob("*_mask.png")):
        file.rename(file.with_stem(file.stem.replace("_mask", "-xyz")))
    words = ["evaluate", str(place / "found"), str(data), "--recursive"]
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "labels: objects must be numbered, got what looks like images" in said
    assert said.count("\n") == 1
    assert main([*words, "--label-suffix", "-xyz"]) == 0
    (data / "day 1" / "0-xyz.png").unlink()
    assert main([*words, "--label-suffix", "-xyz"]) == 2
    assert "got none of that name (--skip-unlabelled leaves such" in capsys.readouterr().err
    assert main([*words, "--label-suffix", "-xyz", "--skip-unlabelled"]) == 0


def test_outlines_are_labels(tmp_path, capsys):
    """GeoJSON of the size of the result, or of the image where there is none."""
    labels, found, images = (tmp_path / name for name in ("labels", "found", "images"))
    for folder in (labels, found, images):
        folder.mkdir()
    truth = np.zeros((20, 30), np.uint8)
    truth[2:8, 3:12], truth[10:15, 20:28] = 1, 2
    for i in range(2):
        rings = [[[3, 2], [12, 2], [12, 8], [3, 8], [3, 2]],
                 [[20, 10], [28, 10], [28, 15], [20, 15], [20, 10]]]  # fmt: skip
        features = [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
            for ring in rings
        ]
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (labels / f"{i}.geojson").write_text(text)
        write_labels(images / f"{i}.png", truth)
    write_labels(found / "0.png", truth)
    words = ["evaluate", str(found), str(labels)]
    assert main(words) == 2
    assert "1.geojson: outlines must go with an image, whose size" in capsys.readouterr().err
    result = evaluate_files(found, labels, only_predicted=True)
    assert (result.summary["reference_objects"], result.summary["pq_50"]) == (2, 1.0)
    assert main([*words, "--images", str(images)]) == 0
    assert "2 predicted, 4 true" in capsys.readouterr().out
    alone = evaluate_files(found / "0.png", labels / "0.geojson")
    assert alone.summary == result.summary | {"labels_without_prediction": 0}
    write_tiff(found / "0.tif", np.stack([truth, truth]), "ZYX")
    with pytest.raises(ValueError, match="outlines must go with an image of one plane, got the st"):
        evaluate_files(found / "0.tif", labels / "0.geojson")


def test_table_and_summary(folders, capsys):
    place, truth, found = folders
    words = ["evaluate", str(place / "found"), str(place / "labels"), "--out", str(place / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    content = json.loads((place / "out" / "evaluation.json").read_text())
    rows = list(csv.DictReader((place / "out" / "evaluation.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == ["0", "1", "2"]
    for i, row in enumerate(content["images"]):
        assert row["iou"] == metrics.iou(truth[i], found[i])
        assert row["dice"] == metrics.dice(truth[i], found[i])
        assert row["pixel_error"] == metrics.pixel_error(truth[i], found[i])
        assert row["ap_75"] == metrics.average_precision(truth[i], found[i], 0.75)
        assert row["f1_50"] == metrics.detection(truth[i], found[i]).f1
        each = [metrics.average_precision(truth[i], found[i], t) for t in IOUS]
        assert row["ap_50_95"] == pytest.approx(np.mean(each))
        assert float(rows[i]["iou"]) == pytest.approx(row["iou"], abs=1e-4)
    assert content["images"][0]["seg"] == metrics.seg(truth[0], found[0])
    assert (
        content["images"][1]["v_rand_split"] == metrics.rand_split_merge(truth[1], found[1]).split
    )
    assert content["images"][2]["seg"] is None  # no reference object
    assert content["images"][2]["v_info"] is None
    assert rows[2]["seg"] == ""
    summary = content["summary"]
    assert summary["seg"] == metrics.seg(list(truth), list(found))
    assert summary["iou"] == metrics.iou(truth, found)
    both = [metrics.detection(t, f) for t, f in zip(truth, found, strict=True)]
    total = [sum(getattr(x, k) for x in both) for k in ("found", "missed", "excess")]
    assert summary["ap_50"] == total[0] / sum(total)
    assert summary["v_rand"] == np.mean([metrics.v_rand(truth[i], found[i]) for i in range(2)])
    counts = f"{summary['predicted_objects']} predicted, {summary['reference_objects']} true"
    assert f"SEG        {summary['seg']:.4f}" in text
    assert all(counts in line for line in text.splitlines() if line.startswith(("SEG", "objects")))
    assert str(place / "out" / "evaluation.png") in text
    assert main(words) == 2
    assert "out must not hold an evaluation" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.filterwarnings("ignore:evaluate. labels. masks look inverted")
def test_masks_become_objects(folders):
    place, truth, found = folders
    for i, image in enumerate(found):
        write_labels(place / "found" / f"{i}.png", (image > 0).astype(int))
    result = evaluate_files(place / "found", place / "labels", objects=ObjectRule(3, 1))
    assert result.summary["seg"] == metrics.seg(
        list(truth), [ObjectRule(3, 1).of_mask(x) for x in found]
    )
    for i, image in enumerate(truth):  # and the reference, where it is a mask
        write_labels(place / "labels" / f"{i}.png", (image > 0) * 255)
    result = evaluate_files(place / "found", place / "labels", objects=ObjectRule())
    parts = [ObjectRule().of_mask(x) for x in truth]
    assert result.summary["seg"] == metrics.seg(parts, [ObjectRule().of_mask(x) for x in found])


def test_what_is_ignored_does_not_count(folders):
    place, truth, found = folders
    for i, image in enumerate(truth):
        image[:, :9] = 7
        write_labels(place / "labels" / f"{i}.png", image)
    result = evaluate_files(place / "found", place / "labels", reading=Reading(ignore_label=7))
    cut = truth[:, :, 9:], found[:, :, 9:]
    assert result.summary["pixel_error"] == pytest.approx(metrics.pixel_error(*cut))
    assert result.summary["seg"] == metrics.seg(*map(list, cut))
    assert result.rows[2]["pixel_error"] == pytest.approx(metrics.pixel_error(cut[0][2], cut[1][2]))


def test_ignored_pixels_neither_tear_nor_join(tmp_path):
    """A mask scored against itself is perfect, whatever grows, and the ignored gap stays out."""
    labels = np.zeros((12, 12), int)
    labels[2:5, 2:10], labels[5], labels[6:9, 2:10] = 1, 255, 2
    for name, image in (("labels", labels), ("found", labels % 255 > 0)):
        (tmp_path / name).mkdir()
        write_labels(tmp_path / name / "a.png", image.astype(int))
    for grow in (0, 1):
        objects = ObjectRule(grow=grow)
        result = evaluate_files(
            tmp_path / "found",
            tmp_path / "labels",
            objects=objects,
            reading=Reading(ignore_label=255),
        )
        assert result.summary["seg"] == result.summary["ap_50_95"] == result.summary["iou"] == 1


def test_masks_are_not_taken_for_objects(tmp_path, capsys):
    mask = np.kron(np.eye(4, dtype=int), np.ones((3, 3), int)) * 255
    write_labels(tmp_path / "a.png", mask)
    words = ["evaluate", str(tmp_path / "a.png"), str(tmp_path / "a.png")]
    assert main(words) == 2
    assert (
        "predictions must number their objects, or go with --instances" in capsys.readouterr().err
    )
    assert main([*words, "--instances"]) == 0
    assert "SEG        1.0000" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_labels_that_are_something_else(folders, capsys):
    """Labels blurred by a resize or by JPEG are told, and images taken for predictions."""
    place, truth, _ = folders
    (place / "images").mkdir()
    for i, ids in enumerate(truth):
        write_labels(
            place / "images" / f"{i}.png", np.random.default_rng(i).integers(99, size=ids.shape)
        )
    assert main(["evaluate", str(place / "images"), str(place / "labels")]) == 0
    text = "warning: evaluate: predictions: objects must be numbered, got what looks like images"
    assert text in capsys.readouterr().err
    discs = read_labels(discs_in(place / "discs", count=1, size=200)[1] / "0.png")
    soft = ndimage.gaussian_filter(60.0 * discs, 2).astype(int)
    write_labels(place / "soft.png", soft)
    for words in (["evaluate", str(place / "soft.png")], ["weights", "--out", str(place / "w")]):
        assert main([*words, str(place / "soft.png")]) == 0
        text = f"warning: {words[0]}: labels look interpolated, or were once saved as JPEG"
        assert text in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_a_background_that_is_not_0_is_told(tmp_path, capsys):
    labels = read_labels(discs_in(tmp_path, count=1, size=200)[1] / "0.png")
    for number, (ids, text) in enumerate(
        [
            (labels + 1, "no pixel is 0, which stands for the background, but most along the"),
            (255 * (labels == 0), "masks look inverted: 255 surrounds places of 0"),
        ]
    ):
        file = str(tmp_path / f"{number}.png")
        write_labels(Path(file), ids)
        assert main(["evaluate", file, file, "--instances"]) == 0
        assert f"warning: evaluate: labels: {text}" in capsys.readouterr().err
        assert main(["weights", file, "--out", str(tmp_path / f"w{number}")]) == 0
        assert f"warning: weights: labels: {text}" in capsys.readouterr().err
    write_labels(Path(file), labels)
    assert main(["evaluate", file, file, "--ignore-label", "9"]) == 0
    assert "evaluate: labels: no pixel has the label to ignore" in capsys.readouterr().err


def test_weights_of_masks_are_those_of_their_parts(tmp_path):
    labels = read_labels(discs_in(tmp_path, count=1, size=100)[1] / "0.png")
    for name, ids in (("numbers", ndimage.label(labels)[0]), ("mask", 255 * (labels > 0))):
        write_labels(tmp_path / f"{name}.png", ids)
        assert main(["weights", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / "w")]) == 0
    numbers, mask = (tifffile.imread(tmp_path / f"w/{x}.tif") for x in ("numbers", "mask"))
    assert np.array_equal(numbers, mask)
    ids = np.zeros((20, 40), int)
    ids[5:15, 2:12], ids[5:15, 14:24], ids[5:15, 30:38] = 255, 255, 2  # two parts, and ignored
    write_labels(tmp_path / "ignored.png", ids)
    words = ["weights", str(tmp_path / "ignored.png"), "--out", str(tmp_path / "w")]
    assert main([*words, "--ignore-label", "2"]) == 0
    found = tifffile.imread(tmp_path / "w/ignored.tif")
    assert (found == 0).sum() == 80
    assert (found[5:15, 30:38] == 0).all()


@pytest.mark.filterwarnings("ignore:evaluate. labels. masks look inverted")
def test_how_labels_are_read_is_told(folders, capsys):
    place, truth, _ = folders
    for name, ids, told in (
        ("ids", truth[0], "numbered objects"),
        ("mask", 255 * (truth[0] > 0), "masks: connected parts are the objects"),
    ):
        file = str(place / f"{name}.png")
        write_labels(Path(file), ids)
        assert main(["evaluate", file, file, "--instances"]) == 0
        assert f"labels     {told}\n" in capsys.readouterr().out


def test_names_of_ome_tiff(folders):
    place, _, found = folders
    result = evaluate_files(place / "found", place / "labels")
    for i, image in enumerate(found):
        (place / "found" / f"{i}.png").unlink()
        write_tiff(place / "found" / f"{i}.ome.tif", image.astype(np.int32), "YX", {}, ome=True)
    assert evaluate_files(place / "found", place / "labels") == result


def test_touching_objects_have_a_border_in_isbi2012(tmp_path):
    labels = np.ones((20, 20), int)
    labels[:, 10:] = 2
    apart = np.ones((20, 20), np.float32)
    apart[:, 9:11] = 0
    for name, image in (("labels", labels), ("apart", apart), ("joined", np.full_like(apart, 0.9))):
        (tmp_path / name).mkdir()
        write = write_labels if name == "labels" else write_tiff
        suffix = "png" if name == "labels" else "tif"
        write(tmp_path / name / f"a.{suffix}", image)
    (tmp_path / "apart" / "a.tif").unlink()
    write_tiff(tmp_path / "apart" / "a.tif", apart * 0.9)
    scores = [
        evaluate_files(tmp_path / name, tmp_path / "labels").summary["v_rand"]
        for name in ("apart", "joined")
    ]
    assert scores[0] == 1
    assert scores[1] < 0.8


def test_empty_slices_of_probabilities(tmp_path):
    """Whole numbers in one of the files do not make labels of it."""
    truth = np.zeros((6, 8), int)
    truth[:, :3], truth[:, 4:] = 1, 1
    for name in ("labels", "found"):
        (tmp_path / name).mkdir()
    for i, probability in enumerate((np.zeros((6, 8)), truth * 0.8)):
        write_labels(tmp_path / "labels" / f"{i}.png", truth)
        write_tiff(tmp_path / "found" / f"{i}.tif", probability.astype(np.float32))
    result = evaluate_files(tmp_path / "found", tmp_path / "labels")
    assert result.rows[1]["v_rand"] == 1
    assert result.rows[0]["v_rand"] < 0.1


def test_an_output_folder_that_cannot_be_is_refused_first(folders, capsys):
    place, *_ = folders
    (place / "file").write_text("")
    words = ["evaluate", str(place / "found"), str(place / "labels"), "--out", str(place / "file")]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_labels_without_prediction_count_as_missed(folders, capsys):
    place, truth, _ = folders
    words = ["evaluate", str(place / "found"), str(place / "labels")]
    assert main([*words, "--strict"]) == 0
    (place / "found" / "1.png").unlink()
    result = evaluate_files(place / "found", place / "labels")
    assert [row["image"] for row in result.rows] == ["0", "1", "2"]
    assert result.summary["labels_without_prediction"] == 1
    assert (result.rows[1]["predicted_objects"], result.rows[1]["iou"]) == (0, 0)
    assert result.rows[1]["reference_objects"] == len(np.unique(truth[1])) - 1
    write_labels(place / "found" / "1.png", np.zeros_like(truth[1]))
    assert evaluate_files(place / "found", place / "labels").rows == result.rows
    (place / "found" / "1.png").unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "\nno result  1: count as missed\n" in capsys.readouterr().out
    assert main([*words, "--strict"]) == 1
    assert main([*words, "--only-predicted"]) == 0
    assert "\nno result  1: left out\n" in capsys.readouterr().out
    left = evaluate_files(place / "found", place / "labels", only_predicted=True)
    assert left.rows == result.rows[::2]


def test_a_slice_without_probabilities(tmp_path):
    """Scored as one in which nothing is probable."""
    for folder in ("found", "labels"):
        (tmp_path / folder).mkdir()
    generator = np.random.default_rng(0)
    for i in range(2):
        mask = np.kron(generator.integers(0, 2, (6, 6)), np.ones((4, 4), int))
        write_labels(tmp_path / "labels" / f"{i}.png", mask)
    tifffile.imwrite(tmp_path / "found" / "0.tif", generator.random((24, 24)).astype(np.float32))
    lacking = evaluate_files(tmp_path / "found", tmp_path / "labels")
    tifffile.imwrite(tmp_path / "found" / "1.tif", np.zeros((24, 24), np.float32))
    assert evaluate_files(tmp_path / "found", tmp_path / "labels").rows == lacking.rows


@pytest.mark.parametrize("channels", [1, 2])
def test_probabilities_get_the_scores_of_isbi2012(tmp_path, channels, capsys):
    generator = np.random.default_rng(1)
    truth = generator.random((2, 20, 24)) < 0.7
    probability = np.clip(0.6 * truth + 0.4 * generator.random(truth.shape), 0, 1).astype("float32")
    for name in ("labels", "found"):
        (tmp_path / name).mkdir()
    for i in range(2):
        write_labels(tmp_path / "labels" / f"{i}.png", truth[i] * 255)
        values = probability[i] if channels == 1 else np.stack([1 - probability[i], probability[i]])
        axes = "YX" if channels == 1 else "CYX"
        write_tiff(tmp_path / "found" / f"{i}.tif", values, axes)
    words = ["evaluate", str(tmp_path / "found"), str(tmp_path / "labels")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "V_rand thinned" in text
    assert "SEG" not in text
    result = evaluate_files(tmp_path / "found", tmp_path / "labels")
    expected = metrics.isbi2012(truth, probability)
    assert result.summary["v_rand"] == pytest.approx(expected.v_rand.score)
    assert result.summary["v_info_thinned_split"] == pytest.approx(expected.v_info_thinned.split)
    assert result.summary["warping_error"] == pytest.approx(expected.warping_error)
    alone = asdict(metrics.isbi2012(truth[0], probability[0]))
    assert result.rows[0]["pixel_error"] == pytest.approx(alone["pixel_error"])
    assert main([*words, "--ignore-label", "7"]) == 2
    assert "must be label images with --ignore-label" in capsys.readouterr().err
    assert main([*words, "--instances"]) == 0
    assert "predicted" in capsys.readouterr().out
    made = [ObjectRule().of_mask(p > 0.5) for p in probability]
    found = evaluate_files(tmp_path / "found", tmp_path / "labels", objects=ObjectRule()).summary
    assert found["seg"] == metrics.seg([ndimage.label(x)[0] for x in truth], made)


@pytest.mark.filterwarnings("ignore:evaluate. predictions. objects must be numbered")
def test_objects_of_probabilities_by_the_rule_of_a_model(tmp_path, capsys):
    """They are those that predict makes; options take the place of parts of the rule."""
    torch.manual_seed(0)
    model = UNet(base_channels=4, depth=1)
    images = [torch.rand(50, 60) for _ in range(2)]
    shares = [predict(model, x)[1] for x in images]
    low, high = (float(shares[0].quantile(q)) for q in (0.3, 0.7))
    model.objects = ObjectRule(3, 1, high, low, levels=2)
    save_model(model, tmp_path / "run")
    for kind in ("labels", "found", "probabilities"):
        (tmp_path / kind).mkdir()
    for i, (image, share) in enumerate(zip(images, shares, strict=True)):
        labels = ndimage.label(ndimage.gaussian_filter(image.numpy(), 2) > 0.5)[0]
        write_labels(tmp_path / "labels" / f"{i}.png", labels)
        found = predict(model, image, output="instances").numpy()
        write_labels(tmp_path / "found" / f"{i}.png", found)
        write_tiff(tmp_path / "probabilities" / f"{i}.tif", share.numpy())
    words = [str(tmp_path / "labels"), "--label-type", "instances"]
    assert main(["evaluate", str(tmp_path / "found"), *words]) == 0
    expected = capsys.readouterr().out
    more = ["--instances", "--model", str(tmp_path / "run")]
    words = ["evaluate", str(tmp_path / "probabilities"), *words]
    assert main([*words, *more]) == 0
    assert capsys.readouterr().out == expected
    assert main([*words, *more, "--min-area", "0"]) == 0
    assert capsys.readouterr().out != expected
    assert main([*words, *more[1:]]) == 2
    assert "model must go with --instances, got" in capsys.readouterr().err


def test_text_of_membranes(tmp_path, capsys):
    """Masks of mostly foreground in several parts get V_rand and V_info, others SEG."""
    cells = np.kron(np.ones((3, 4), int), np.pad(np.ones((9, 9), int), 1))
    nuclei = np.kron(np.ones((3, 4), int), np.pad(np.ones((5, 5), int), 3))
    for name, mask in (("cells.png", cells), ("nuclei.png", nuclei)):
        write_labels(tmp_path / name, mask * 255)
        words = ["evaluate", str(tmp_path / name), str(tmp_path / name), "--instances"]
        assert main(words) == 0
        text = capsys.readouterr().out
        assert ("V_rand" in text) == (mask is cells)
        assert ("SEG" in text) == (mask is nuclei)
        assert "12 predicted, 12 true" in text
    instances = ndimage.label(cells)[0]  # which say what they are
    write_labels(tmp_path / "cells.png", instances)
    assert evaluate_files(*[tmp_path / "cells.png"] * 2).kind == "objects"


def test_errors_object_by_object():
    truth, found = np.zeros((2, 6, 30), int)
    truth[1:5, 1:5], found[1:5, 2:6] = 7, 5  # a pair, one pixel off
    truth[1:5, 8:12] = 2  # missed
    found[1:5, 14:18] = 9  # in excess
    truth[1:5, 20:23], truth[1:5, 24:27], found[1:5, 20:27] = 3, 4, 8  # two joined
    row = "05111600222200333300444344400"[:29]
    expected = np.zeros((6, 30), int)
    expected[1:5, :29] = [int(code) for code in row]
    assert (object_errors(truth, found) == expected).all()
    assert (object_errors(truth, found, np.s_[::4, ::4]) == expected[::4, ::4]).all()
    assert not object_errors(truth * 0, found * 0).any()


def test_examples(folders):
    """The best, the median and the worst image, over their images, each once."""
    place, truth, found = folders
    (place / "images").mkdir()
    for i, image in enumerate(truth):
        write_labels(place / "images" / f"{i}.png", image * 40)
    where = place / "found", place / "labels"
    result = evaluate_files(*where, images=place / "images")
    scores = [row["pq_50"] for row in result.rows]
    order = np.argsort(scores)[::-1]
    ranks = ["best", "median", "worst"]
    assert [e.title for e in result.examples] == [
        f"{rank}: {i}" for rank, i in zip(ranks, order, strict=True)
    ]
    for example, i in zip(result.examples, order, strict=True):
        both = metrics.detection(truth[i], found[i])
        assert f"{both.found} found, {both.missed} missed, {both.excess} in" in example.result
        assert (example.labels == truth[i]).all()
        assert (example.errors == object_errors(truth[i], found[i])).all()
        assert example.image.shape == truth[i].shape
    result.write(place / "out")
    assert (place / "out" / PICTURE).stat().st_size > 10000
    (place / "found" / "0.png").unlink()
    two = evaluate_files(*where, only_predicted=True).examples
    assert [e.title.split(":")[0] for e in two] == ["best", "worst"]
    assert two[0].image is None
    one = evaluate_files(*(folder / "1.png" for folder in where), images=place / "images")
    assert [e.title for e in one.examples] == ["1"]


def test_a_picture_is_not_replaced_unasked(folders, capsys):
    place, *_ = folders
    words = ["evaluate", str(place / "found"), str(place / "labels"), "--out", str(place / "out")]
    assert main(words) == 0
    picture = (place / "out" / PICTURE).read_bytes()
    for name in (CSV, JSON):
        (place / "out" / name).unlink()
    (place / "out" / PICTURE).write_bytes(b"mine")
    assert main(words) == 2
    assert f"got {place / 'out' / PICTURE}" in capsys.readouterr().err
    assert (place / "out" / PICTURE).read_bytes() == b"mine"
    assert main([*words, "--overwrite"]) == 0
    assert (place / "out" / PICTURE).read_bytes() == picture


def write_as(path, format, stack, axes):
    """A stack in a file of that format, or in a Zarr folder."""
    path.mkdir()
    if format == "ome-zarr":
        made = create(
            path / "x.ome.zarr",
            **{"name": "x", "shape": stack.shape, "axes": axes, "dtype": stack.dtype},
            **{"chunks": (1,) * (stack.ndim - 2) + (16, 16), "pixel_size": {}, "labels": True},
        )
        made[...] = stack
    elif format == "zarr":
        zarr.create_array(path / "x.zarr", data=stack, chunks=(1,) * (stack.ndim - 2) + (16, 16))
    elif format == "imagej":
        tifffile.imwrite(
            path / "x.tif", stack.astype(np.uint16), imagej=True, metadata={"axes": axes}
        )
    elif format == "pages":
        tifffile.imwrite(path / "x.tif", stack, photometric="minisblack", compression="zlib")
    else:
        write_tiff(path / "x.ome.tif", stack, axes, ome=True)


@pytest.mark.parametrize("format", ["pages", "imagej", "ome-tiff", "ome-zarr", "zarr"])
def test_planes_of_stacks_count_as_images(folders, format):
    place, truth, found = folders
    truth, found = truth.astype(np.int32), found.astype(np.int32)
    images = evaluate_files(place / "found", place / "labels", images=place / "labels")
    write_as(place / "found_stack", format, found, "ZYX")
    write_as(place / "labels_stack", "pages", truth, "ZYX")
    where = place / "found_stack", place / "labels_stack"
    planes = evaluate_files(*where, images=where[1])
    assert [row.pop("image") for row in planes.rows] == ["x[0]", "x[1]", "x[2]"]
    assert [row.pop("image") for row in images.rows] == ["0", "1", "2"]
    assert planes == images
    for one, other in zip(planes.examples, images.examples, strict=True):
        assert one.title == other.title.replace(": ", ": x[") + "]"
        assert (one.errors == other.errors).all()
        assert (one.image == other.image).all()
    (file,) = where[0].iterdir()
    (labels,) = where[1].iterdir()
    alone = evaluate_files(file, labels)
    assert [row.pop("image") for row in alone.rows] == ["x[0]", "x[1]", "x[2]"]
    assert alone == images


def test_planes_of_time_and_depth(folders):
    """They are told apart by the names of their axes, whatever the order in the file."""
    place, truth, found = folders
    truth, found = (np.stack([x, x[:, ::-1, ::-1]]).astype(np.int32) for x in (truth, found))
    write_as(place / "a", "ome-tiff", truth, "TZYX")
    write_as(place / "b", "ome-zarr", found.swapaxes(0, 1), "ZTYX")
    write_as(place / "c", "ome-tiff", found, "TZYX")
    rows, others = (evaluate_files(place / name, place / "a").rows for name in "bc")
    assert rows[1]["image"] == "x[z0 t1]"
    assert others[1]["image"] == "x[t0 z1]"
    by_name = {row.pop("image"): row for row in rows}
    for row in others:
        t, z = row.pop("image")[2:-1].split()
        assert by_name[f"x[{z} {t}]"] == row


@pytest.mark.parametrize("format", ["ome-tiff", "ome-zarr"])
def test_stacks_of_probabilities(tmp_path, format):
    generator = np.random.default_rng(1)
    truth = (generator.random((2, 20, 24)) < 0.7).astype(np.uint8)
    foreground = np.clip(0.6 * truth + 0.4 * generator.random(truth.shape), 0, 1)
    probability = np.stack([1 - foreground, foreground], 1).astype("float32")
    write_as(tmp_path / "found", format, probability, "ZCYX")
    write_as(tmp_path / "labels", "pages", truth, "ZYX")
    result = evaluate_files(tmp_path / "found", tmp_path / "labels")
    expected = metrics.isbi2012(truth, probability[:, 1])
    assert result.kind == "probabilities"
    assert [row["image"] for row in result.rows] == ["x[0]", "x[1]"]
    assert result.summary["v_rand"] == pytest.approx(expected.v_rand.score)
    assert len(result.examples) == 2


def test_missing_chunks(folders, capsys):
    """Labels may lack what holds background only; of predictions nothing may be missing."""
    place, truth, found = folders
    write_as(place / "a", "zarr", truth, "ZYX")
    write_as(place / "b", "zarr", found, "ZYX")
    words = ["evaluate", str(place / "b"), str(place / "a")]
    assert evaluate_files(place / "b", place / "a").summary["images"] == 3  # truth[2] is empty
    chunk = next((place / "b" / "x.zarr" / "c" / "1").rglob("0"))
    chunk.rename(place / "chunk") if chunk.is_file() else (chunk / "0").rename(place / "chunk")
    assert main(words) == 2
    assert "with --missing-chunks" in capsys.readouterr().err
    assert main([*words, "--missing-chunks"]) == 0


def test_refused(folders, capsys):
    place, _, found = folders

    def line(*words):
        assert main(["evaluate", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "Traceback" not in error
        return error

    assert "nothing: no such file or folder" in line(place / "nothing", place / "labels")
    assert "must go with --instances" in line(place / "found", place / "labels", "--grow", 1)
    assert "grow must be in [0, 16], got 99" in line(
        place / "found", place / "labels", "--instances", "--grow", 99
    )
    images = place / "images"
    images.mkdir()
    write_labels(images / "0.png", found[0])
    with_images = (place / "found", place / "labels", "--images", images)
    with_images = (*with_images, "--out", place / "out")
    assert f"{images}: must hold images of {place}/found/1.png, got none" in line(*with_images)
    write_labels(images / "1.png", found[0][:5])
    write_labels(images / "2.png", found[0])
    assert f"{images}/1.png: must have the size of" in line(*with_images)
    assert not any((place / "out").iterdir())
    stack, other = place / "stack.tif", place / "other.tif"
    write_tiff(stack, found, "ZYX")
    write_tiff(other, found[:2], "ZYX")
    assert f"must have the planes of {other}, 2 planes, got 3 planes" in line(stack, other)
    assert "got 1 plane" in line(place / "found" / "0.png", stack)
    write_tiff(other, found[:, :5], "ZYX")
    assert "must have the size of" in line(stack, other)
    write_labels(place / "found" / "x.png", found[0])
    assert "must hold labels of" in line(place / "found", place / "labels")
    (place / "found" / "x.png").unlink()
    write_labels(place / "found" / "1.png", found[0][:5])
    assert "must have the size of" in line(place / "found", place / "labels")
    (place / "found" / "1.png").unlink()
    write_tiff(place / "found" / "1.tif", np.full(found[0].shape, 0.5, np.float32))
    assert "must hold probabilities as the other files" in line(place / "found", place / "labels")
    with_objects = (place / "found", place / "labels", "--instances")
    assert "must hold probabilities as the other files" in line(*with_objects)
    assert "must be label images" in line(*with_objects[:2], "--ignore-label", 7)
    for name in ("0.png", "2.png"):
        (place / "found" / name).unlink()
    write_tiff(place / "found" / "1.tif", np.full(found[0].shape, 1.5, np.float32))
    assert "probabilities must be in [0, 1], got 1.5 to 1.5" in line(
        place / "found", place / "labels"
    )
    write_tiff(place / "found" / "1.tif", np.full((2, *found[0].shape), 0.625, np.float32))
    said = "1.tif: probabilities of all classes must add up to 1, got a sum off by 0.25"
    assert said in line(place / "found", place / "labels")
    write_tiff(place / "found" / "2.tif", np.full(found[0].shape, 0.5, np.float32))
    (place / "found" / "1.tif").unlink()
    assert "must hold foreground, got none" in line(place / "found", place / "labels")


def test_nothing_to_find_and_nothing_found(folders):
    """Which is perfect; scores that need an object are none."""
    place, _, found = folders
    for folder in ("labels", "found"):
        for i in range(3):
            write_labels(place / folder / f"{i}.png", 0 * found[0])
    result = evaluate_files(place / "found", place / "labels")
    assert [row["pq_50"] for row in result.rows] == [1] * 3
    assert [row["v_rand"] for row in result.rows] == [None] * 3
    assert [e.result for e in result.examples] == ["PQ 1.0000: 0 found, 0 missed, 0 in excess"] * 3
    assert "SEG        none" in result.text()


def test_labels_without_a_result_are_named(folders):
    place, truth, _ = folders
    for i in range(3, 9):
        write_labels(place / "labels" / f"{i}.png", truth[0])
    text = evaluate_files(place / "found", place / "labels").text()
    assert "no result  3, 4, 5, 6, 7 and 1 more: count as missed" in text
    (place / "labels" / "8.png").unlink()
    text = evaluate_files(place / "found", place / "labels", only_predicted=True).text()
    assert "no result  3, 4, 5, 6, 7: left out" in text
    for i in range(3):
        (place / "labels" / f"{i}.png").unlink()
    skip, message = Reading(skip_unlabelled=True), "found: must hold a result that has labels, got"
    with pytest.raises(ValueError, match=message):
        evaluate_files(place / "found", place / "labels", only_predicted=True, reading=skip)
