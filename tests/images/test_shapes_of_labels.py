"""Ten usual shapes of labels: `check` reads the same objects, or says in a line what to do."""

import json
import zipfile

import numpy as np
import pytest
import roifile
import tifffile
from PIL import Image

from unet_fast.cli import main
from unet_fast.images.pairing import Reading, find_pairs
from unet_fast.training.samples import load_samples, read_pair

COUNT, SIDE = 3, 96
BOXES = [(8, 10, 30, 40), (40, 8, 60, 30), (45, 50, 80, 85)]
"""Top, left, bottom, right of the objects of every image; they do not touch."""


def image(i):
    rng = np.random.default_rng(i)
    return (60 + 100 * (ids(i) > 0) + rng.integers(0, 40, (SIDE, SIDE))).astype(np.uint8)


def ids(i):
    """Object k of image i is shifted by i pixels."""
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for number, (top, left, bottom, right) in enumerate(BOXES, 1):
        labels[top + i : bottom + i, left:right] = number
    return labels


def corners(i):
    return [
        [[left, top + i], [right, top + i], [right, bottom + i], [left, bottom + i]]
        for top, left, bottom, right in BOXES
    ]


def instances(folder, i):
    Image.fromarray(ids(i)).save(folder / f"{i}.png")


def mask(folder, i):
    Image.fromarray(255 * (ids(i) > 0).astype(np.uint8)).save(folder / f"{i}.png")


def colours(folder, i):
    table = np.array([[255, 255, 255], [200, 0, 0], [0, 150, 0], [10, 20, 240]], np.uint8)
    Image.fromarray(table[ids(i)]).save(folder / f"{i}.png")


def palette(folder, i):
    picture = Image.fromarray(ids(i)).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(folder / f"{i}.png")


def suffix(folder, i):
    Image.fromarray(ids(i)).save(folder / f"{i}_cp_masks.png")


def rois(folder, i):
    with zipfile.ZipFile(folder / f"{i}.zip", "w") as archive:
        for k, ring in enumerate(corners(i)):
            archive.writestr(f"{k}.roi", roifile.ImagejRoi.frompoints(ring).tobytes())


def geojson(folder, i):
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
            "properties": {"objectType": "annotation", "classification": {"name": "Cell"}},
        }
        for ring in corners(i)
    ]
    (folder / f"{i}.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": features})
    )


def ome_tiff(folder, i):
    tifffile.imwrite(folder / f"{i}.ome.tif", ids(i), ome=True, metadata={"axes": "YX"})


def classes(folder, i):
    """One value per class: objects 1 and 2 are of class 7, object 3 is of class 9."""
    Image.fromarray(np.array([0, 7, 7, 9], np.uint8)[ids(i)]).save(folder / f"{i}.png")


SHAPES = [instances, mask, colours, palette, suffix, rois, geojson, ome_tiff, classes]


@pytest.fixture(autouse=True)
def _no_trial(monkeypatch):
    monkeypatch.setattr("unet_fast.training.loop.cost_of", lambda config: (60.0, 1e9))


def check(tmp_path, capsys, *words, code=0):
    call = ["check", str(tmp_path / "images"), str(tmp_path / "labels"), *words]
    assert main([*call, "--out", str(tmp_path / "check"), "--overwrite"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def make(tmp_path, write):
    for folder in (tmp_path / "images", tmp_path / "labels"):
        folder.mkdir()
    for i in range(COUNT):
        Image.fromarray(image(i)).save(tmp_path / "images" / f"{i}.png")
        write(tmp_path / "labels", i)


@pytest.mark.parametrize("write", SHAPES, ids=lambda write: write.__name__)
def test_the_same_objects(tmp_path, capsys, write):
    make(tmp_path, write)
    words = ["--label-type", "semantic"] if write is classes else []
    assert f"{COUNT} images, {COUNT * len(BOXES)} objects, " in check(tmp_path, capsys, *words)
    for i, pair in enumerate(find_pairs(tmp_path / "images", tmp_path / "labels").pairs):
        (sample,) = read_pair(pair, Reading())
        np.testing.assert_array_equal(sample.labels > 0, ids(i) > 0)
        if write not in (mask, classes):
            pairs = np.unique(np.stack([sample.labels.ravel(), ids(i).ravel()]), axis=1)
            assert pairs.shape == (2, len(BOXES) + 1)


def test_the_same_objects_of_stacks(tmp_path, capsys):
    for kind, of in (("images", image), ("labels", ids)):
        (tmp_path / kind).mkdir()
        stack = np.stack([of(i) for i in range(COUNT)])
        metadata = {"axes": "ZYX"}
        tifffile.imwrite(tmp_path / kind / "a.tif", stack, imagej=True, metadata=metadata)
    assert f"{COUNT} images, {COUNT * len(BOXES)} objects, " in check(tmp_path, capsys)
    with pytest.warns(UserWarning, match="stacks, of which each plane counts as an image"):
        samples = load_samples(tmp_path / "images", tmp_path / "labels")
    for i, sample in enumerate(samples):
        assert sample.name == f"a[{i}]"
        np.testing.assert_array_equal(sample.labels, ids(i))
        np.testing.assert_array_equal(sample.image[0], image(i))


def test_of_cellpose_without_masks(tmp_path, capsys):
    make(tmp_path, lambda folder, i: (folder / f"{i}_seg.npy").write_bytes(b"pickle"))
    call = ["check", str(tmp_path / "images"), str(tmp_path / "labels")]
    assert main([*call, "--out", str(tmp_path / "check")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "found 3 _seg.npy files, which must be saved as PNG or TIFF in Cellpose (File >" in error
