"""The page of results and the experiments behind it."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from unet_fast import UNet

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` takes it out again

from benchmarks import segmentation as experiments


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
