"""`unet-fast evaluate --dims 3`: each volume is one image, whose objects lie in three axes."""

import json

import numpy as np
import pytest
import tifffile
from scipy import ndimage
from test_evaluate import write_as

from unet_fast import metrics
from unet_fast.cli import main
from unet_fast.images.files import write_labels, write_tiff
from unet_fast.images.pairing import Reading
from unet_fast.objects import ObjectRule
from unet_fast.scores.evaluate import evaluate_files
from unet_fast.scores.overlap import object_errors
from unet_fast.scores.report import PICTURE

VOLUMES = Reading(dims=3)


@pytest.fixture
def volumes(tmp_path):
    """Labels of two volumes, and predictions, in which some objects are missed."""
    generator = np.random.default_rng(0)
    truth = np.kron(generator.integers(0, 6, (2, 3, 5, 6)), np.ones((3, 4, 4), int))
    found = np.where(truth % 5 == 4, 0, np.roll(truth, 1, 2) * 3)
    for name, arrays in (("labels", truth), ("found", found)):
        (tmp_path / name).mkdir()
        for i, array in enumerate(arrays):
            write_tiff(tmp_path / name / f"{i}.tif", array, "ZYX")
    return tmp_path, truth, found


def test_a_volume_is_one_image(volumes, capsys):
    place, truth, found = volumes
    images = place / "images"
    images.mkdir()
    for i in range(2):
        write_tiff(images / f"{i}.tif", truth[i].astype(np.uint8), "ZYX")
    words = ["evaluate", str(place / "found"), str(place / "labels"), "--dims", "3"]
    assert main([*words, "--out", str(place / "out"), "--images", str(images)]) == 0
    assert "images     2\n" in capsys.readouterr().out
    content = json.loads((place / "out" / "evaluation.json").read_text())
    for i, row in enumerate(content["images"]):
        both = truth[i], found[i]
        detected = metrics.detection(*both)
        assert row["image"] == str(i)
        assert row["reference_objects"] == len(np.unique(truth[i])) - 1
        assert row["seg"] == metrics.seg(*both)
        assert (row["pq_50"], row["f1_50"]) == (detected.panoptic_quality, detected.f1)
        assert (row["iou"], row["pixel_error"]) == (metrics.iou(*both), metrics.pixel_error(*both))
        assert (row["v_rand"], row["v_info"]) == (metrics.v_rand(*both), metrics.v_info(*both))
    assert content["summary"]["seg"] == metrics.seg(list(truth), list(found))
    assert (place / "out" / PICTURE).stat().st_size > 10000
    result = evaluate_files(place / "found", place / "labels", images=images, reading=VOLUMES)
    for example in result.examples:
        name, z = example.title.split(": ")[1].split(", section z")
        i, counts = int(name), [len(np.unique(x[x > 0])) for x in truth[int(name)]]
        assert counts[int(z)] == max(counts)
        assert abs(int(z) - 4) == min(abs(k - 4) for k, n in enumerate(counts) if n == max(counts))
        assert np.array_equal(example.labels, truth[i][int(z)])
        assert np.array_equal(example.errors, object_errors(truth[i], found[i])[int(z)])
        assert example.image.shape == truth[i][0].shape
        assert np.array_equal(example.image > 0, truth[i][int(z)] > 0)


@pytest.mark.parametrize("format", ["pages", "imagej", "ome-tiff", "ome-zarr", "zarr"])
def test_formats(volumes, format):
    place, truth, found = volumes
    write_as(place / "a", format, truth[0].astype(np.int32), "ZYX")
    write_as(place / "b", "ome-tiff", found[0].astype(np.int32), "ZYX")
    expected = evaluate_files(place / "found", place / "labels", reading=VOLUMES).rows[0]
    assert evaluate_files(place / "b", place / "a", reading=VOLUMES).rows == [
        expected | {"image": "x"}
    ]


def test_volumes_of_a_movie(volumes):
    place, truth, found = volumes
    write_as(place / "a", "ome-tiff", truth.astype(np.int32), "TZYX")
    write_as(place / "b", "ome-zarr", found.astype(np.int32), "TZYX")
    rows = evaluate_files(place / "b", place / "a", reading=VOLUMES).rows
    expected = evaluate_files(place / "found", place / "labels", reading=VOLUMES).rows
    assert rows == [row | {"image": f"x[{i}]"} for i, row in enumerate(expected)]


def test_a_volume_of_one_plane_scores_as_that_plane(volumes):
    place, truth, found = volumes
    for name, array in (("a", truth), ("b", found)):
        write_as(place / name, "ome-zarr", array[0][:1].astype(np.int32), "ZYX")
    one, other = (
        evaluate_files(place / "b", place / "a", reading=reading) for reading in (None, VOLUMES)
    )
    assert one.rows == other.rows
    assert np.array_equal(one.examples[0].errors, other.examples[0].errors)


@pytest.mark.parametrize("kind", ["masks", "probabilities"])
def test_objects_are_made_of_whole_volumes(volumes, kind):
    """Both of predictions and of labels that are masks: parts that touch in depth are one."""
    place, truth, found = volumes
    for i in range(2):
        write_tiff(place / "labels" / f"{i}.tif", 255 * (truth[i] > 2), "ZYX")
        mask = found[i] > 6
        values = 9 * mask if kind == "masks" else mask.astype(np.float32) * 0.9
        write_tiff(place / "found" / f"{i}.tif", values, "ZYX")
    rule = ObjectRule(min_area=50, grow=1)
    result = evaluate_files(place / "found", place / "labels", objects=rule, reading=VOLUMES)
    parts = [ndimage.label(x > 2)[0] for x in truth]
    made = [rule.of_mask(x > 6) for x in found]
    assert result.summary["seg"] == metrics.seg(parts, made)
    assert result.summary["predicted_objects"] == sum(x.max() for x in made)
    assert result.labels.startswith("masks")


@pytest.mark.parametrize("background", [None, 1])
def test_only_annotated_voxels_count(volumes, background):
    """As if there were no others: of a few sections, with 0 for what nobody looked at."""
    place, truth, found = volumes
    annotated = np.zeros(truth.shape, bool)
    annotated[:, [1, 4]], annotated[:, 4, :, :9] = True, False
    if background is None:
        words, labels = ["--ignore-label", "99"], np.where(annotated, truth, 99)
    else:
        words = ["--ignore-label", "0", "--background-label", "1"]
        labels = np.where(annotated, truth + 1, 0)
    generator = np.random.default_rng(1)
    words = ["evaluate", str(place / "found"), str(place / "labels"), "--dims", "3", *words]
    for changed in (False, True):  # elsewhere anything may be predicted
        shown = np.where(annotated | (not changed), found, generator.integers(0, 99, found.shape))
        for i in range(2):
            write_tiff(place / "labels" / f"{i}.tif", labels[i], "ZYX")
            write_tiff(place / "found" / f"{i}.tif", shown[i], "ZYX")
        assert main([*words, "--out", str(place / "out"), "--overwrite"]) == 0
        rows = json.loads((place / "out" / "evaluation.json").read_text())["images"]
        for i, row in enumerate(rows):
            both = truth[i][annotated[i]], found[i][annotated[i]]
            assert row["pixel_error"] == pytest.approx(metrics.pixel_error(*both))
            assert row["iou"] == metrics.iou(*both)
            assert row["seg"] == metrics.seg(*both)
            assert row["pq_50"] == metrics.detection(*both).panoptic_quality
            assert row["v_rand"] == metrics.v_rand(*both)


@pytest.mark.filterwarnings("default")
def test_sparse_labels_raise_no_doubts(tmp_path, capsys):
    """Most voxels do not count; they surround places of background, or of objects alone."""
    sparse = np.zeros((9, 20, 24), int)
    for y, x in np.ndindex(2, 3):
        sparse[:, 7 * y + 1 : 7 * y + 6, 7 * x + 1 : 7 * x + 6] = 1
    sparse[:, 2:4, 2:4] = 2
    files = [tmp_path / "found.tif", tmp_path / "labels.tif"]
    words = ["evaluate", *map(str, files), "--dims", "3", "--instances"]
    write_tiff(files[0], sparse == 2, "ZYX")
    for labels in (sparse, np.where(sparse == 1, 3, sparse)):
        write_tiff(files[1], labels, "ZYX")
        assert main([*words, "--ignore-label", "0", "--background-label", "1"]) == 0
        assert capsys.readouterr().err == ""
    assert main([*words, "--ignore-label", "7"]) == 0
    assert "evaluate: labels: no pixel has the label to ignore" in capsys.readouterr().err


def test_refused(volumes, capsys):
    place, truth, found = volumes

    def line(*words):
        assert main(["evaluate", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    volume, plane, other = (place / name for name in ("volume.tif", "plane.png", "other.tif"))
    write_tiff(volume, truth[0], "ZYX")
    write_labels(plane, truth[0][0])
    write_tiff(other, found[0][1:], "ZYX")
    for words in ((volume, plane), (plane, volume)):
        said = line(*words, "--dims", 3)
        assert f"{plane}: must be a volume, got a plane of shape (20, 24)" in said
    assert f"must have the planes of {plane}, 1 plane, got 9 planes" in line(volume, plane)
    assert f"must have the planes of {volume}, 9 planes, got 1 plane" in line(plane, volume)
    said = line(other, volume, "--dims", 3)
    assert f"{other}: must have the size of {volume}, 9 x 20 x 24, got 8 x 20 x 24" in said
    tifffile.imwrite(other, (truth[0] / 9).astype(np.float32), metadata={"axes": "ZYX"})
    said = line(other, volume, "--dims", 3)
    assert "must be label images with --dims 3, got probabilities in" in said
    assert f"{other} (--instances makes objects of them)" in said
    write_tiff(other, np.random.default_rng(0).integers(0, 256, truth[0].shape), "ZYX")
    assert "got what looks like images" in line(volume, other, "--dims", 3)
    said = line(volume, volume, "--dims", 3, "--background-label", 1)
    assert f"{volume}: labels must hold no 0 with background_label 1" in said
