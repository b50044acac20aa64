"""The page of results and the experiments behind it."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from unet_fast import UNet, train

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` takes it out again

from benchmarks import segmentation as experiments
from benchmarks import volumes


def test_the_page_says_what_the_rows_say():
    assert experiments.PAGE.read_text() == experiments.report(experiments.known())


def test_every_variant_has_a_row():
    there = {(row["set"], row["variant"]) for row in experiments.known()}
    assert there == set(experiments.PAIRS)


def test_no_file_is_on_both_sides():
    splits = json.loads(experiments.SPLITS.read_text())
    assert set(splits) == set(experiments.SETS)
    for name, parts in splits.items():
        assert not set(parts["train"]) & set(parts["test"])
        if "UNET_FAST_DATA" in os.environ:
            folder = Path(os.environ["UNET_FAST_DATA"]) / name / "images"
            assert {f.stem for f in folder.iterdir()} >= set(parts["train"]) | set(parts["test"])
    # Frames that follow each other look alike.
    frames = {part: [int(n[1:]) for n in names] for part, names in splits["dic_c2dh_hela"].items()}
    assert min(frames["test"]) - max(frames["train"]) > 10


def test_border_classes():
    labels = np.zeros((9, 12), int)
    labels[2:9, 0:6], labels[2:9, 6:11] = 1, 2
    expected = np.where(labels > 0, 2, 0)
    expected[4:9, 0:4] = expected[4:9, 8] = 1
    np.testing.assert_array_equal(experiments.border_classes(labels), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_objects_of_both_kinds_of_target(threshold):
    foreground = np.array([[0.1, 0.95, 0.8, 0.6, 0.3, 0.6, 0.99, 0.2]])
    model = UNet(base_channels=1, depth=1)
    model.ridge_width = 1
    found = experiments.objects_of(model, np.stack([1 - foreground, foreground]), 0, threshold)
    expected = [[0, 1, 1, 1, 1, 2, 2, 0]]  # the gap of one pixel is nobody's and goes to the first
    np.testing.assert_array_equal(found, expected)
    border = np.array([[0.1, 0.02, 0.6, 0.6, 0.6, 0.6, 0.005, 0.2]])
    inside = np.array([[0.1, 0.95, 0.3, 0.3, 0.3, 0.3, 0.99, 0.2]])
    found = experiments.objects_of(
        model, np.stack([1 - inside - border, inside, border]), 0, threshold
    )
    np.testing.assert_array_equal(found, [[0, 1, 1, 1, 2, 2, 2, 0]])


def test_the_page_of_volumes_says_what_the_rows_say():
    page = volumes.PAGE.read_text()
    assert volumes.MARK[0] + volumes.table(volumes.known_rows()) + volumes.MARK[1] in page
    assert {volumes.key_of(row) for row in volumes.known_rows()} <= {*volumes.WANTED}


@pytest.mark.parametrize("share", [0.025, 0.089, 1.0])
def test_planes_that_are_kept(share, rng):
    """At least that share, as few as possible, alike across all axes."""
    labels = rng.integers(1, 9, (30, 40, 50))
    kept = volumes.planes_kept(labels, share)
    assert (kept[kept > 0] == labels[kept > 0]).all()
    assert (kept > 0).mean() >= share
    whole = [np.count_nonzero((kept > 0).all((*{0, 1, 2} - {a},))) for a in range(3)]
    assert len({*whole}) == 1 or share == 1
    if share < 1:
        assert (kept > 0).mean() < share + 3 * (1 / 30 + 1 / 40 + 1 / 50)


@pytest.mark.filterwarnings("ignore:stacks")
def test_a_run_on_a_volume(tmp_path, monkeypatch, rng):
    """From files to a row, with hardly any training."""
    for kind in ("images", "labels"):
        (tmp_path / "ovule_confocal_3d" / kind).mkdir(parents=True)
    labels = np.ones((16, 110, 24), np.uint16)
    labels[:, 40:] += 1
    labels[:, 90:] += 1
    labels[8:] += 3
    pixels = (labels * 40 + rng.integers(0, 9, labels.shape)).astype(np.uint8)
    for kind, array in (("images", pixels), ("labels", labels)):
        tifffile.imwrite(tmp_path / "ovule_confocal_3d" / kind / "a.tif", array)
    monkeypatch.setattr(volumes, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(volumes, "train", lambda config, clock: quick(config))

    def quick(config):
        return train(replace(config, minutes=None, steps=1, base_channels=2))

    for dims in (3, 2):
        volumes.run(tmp_path, ("ovule_confocal_3d", dims, "8.9", "border", 0))
    rows = volumes.known_rows()
    assert [row["dims"] for row in rows] == ["3", "2"]
    assert all(0 <= float(row[k]) <= 1 for row in rows for k in ("pq_50", "v_rand", "inside"))
    assert {row["true"] for row in rows} == {"4"}
    assert volumes.table(rows).count("\n") == 4
