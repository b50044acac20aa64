"""Objects as a table, as ROIs for ImageJ and as GeoJSON for QuPath."""

import csv
import json
import sys
import zipfile

import numpy as np
import pytest
import roifile
import tifffile
from PIL import Image
from scipy import ndimage
from skimage.measure import regionprops
from test_predict_files import call, complaint, model_in, pixels, zarr_in

from unet_fast.cli import main
from unet_fast.images.source import open_source
from unet_fast.prediction import tables


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("run"))


def inside(rings, shape):
    """The pixels inside an odd number of outlines: rays to the left count vertical edges."""
    crossed = np.zeros((shape[0], shape[1] + 1), int)
    for ring in map(np.asarray, rings):
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
            if x0 == x1:
                crossed[min(y0, y1) : max(y0, y1), x0] += 1
    return crossed.cumsum(1)[:, :-1] % 2 == 1


def area(ring):
    x, y = np.asarray(ring).T
    return (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2


@pytest.mark.parametrize("density", [0.3, 0.6, 0.8, 1.0])
def test_outlines_enclose_exactly_the_pixels(density):
    """Objects with holes, with corners that touch, in several parts; corners are true corners."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((40, 50)) < density, rng.integers(1, 4, (40, 50)), 0)
    labels[:, 30:] = ndimage.label(labels[:, 30:])[0] + 10 * (labels[:, 30:] > 0)
    seen = []
    for number, parts in tables.outlines_of(labels):
        seen.append(number)
        rings = [ring for part in parts for ring in part]
        assert np.array_equal(inside(rings, labels.shape), labels == number)
        for outer, *holes in parts:
            assert area(outer) > 0
            assert all(area(hole) < 0 for hole in holes)
            for ring in (outer, *holes):
                turns = np.diff(np.vstack([ring, ring[:2]]), axis=0) != 0
                assert (turns.sum(1) == 1).all()  # along an axis ...
                assert (turns[:-1] != turns[1:]).all()  # and then along the other one
    assert seen == np.unique(labels[labels > 0]).tolist()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_outlines_of_an_image(run, tmp_path, capsys):
    image, out = pixels(3, 90, 80), tmp_path / "out"
    sizes = {"resolution": (1e4 / 0.5, 1e4 / 0.25), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "x.tif", np.moveaxis(image, 0, -1), photometric="rgb", **sizes)
    model = model_in(tmp_path / "three", 3)
    assert call(model, tmp_path / "x.tif", "--out", out, "--table", "--rois") == 0
    assert f"tables: {out / 'tables'}\noutlines: {out / 'rois'}\n" in capsys.readouterr().out
    labels = np.asarray(Image.open(out / "x.png")).astype(int)
    rows = rows_of(out / "tables" / "x.csv")
    assert list(rows[0])[:5] == ["image", "plane", "id", "pixels", "area_um2"]
    objects = regionprops(labels)
    assert len(rows) == len(objects) > 3
    for row, known in zip(rows, objects, strict=True):
        assert (row["image"], row["plane"], int(row["id"])) == ("x", "", known.label)
        assert int(row["pixels"]) == known.area
        assert float(row["area_um2"]) == pytest.approx(known.area * 0.125, rel=1e-4)
        place = [float(row[name]) for name in ("y_um", "x_um")]
        assert place == pytest.approx(np.multiply(known.centroid, (0.25, 0.5)), rel=1e-4)
        means = [float(row[f"mean_{i}"]) for i in (1, 2, 3)]
        assert means == pytest.approx(image[:, labels == known.label].mean(1), rel=1e-4)
        assert float(row["major_axis_um"]) >= float(row["minor_axis_um"]) >= 0
    rois = roifile.roiread(out / "rois" / "x_rois.zip")
    assert [int(roi.name) for roi in rois] == [known.label for known in objects]
    features = json.loads((out / "rois" / "x.geojson").read_text())["features"]
    for roi, feature, known in zip(rois, features, objects, strict=True):
        rings = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] for ring in rings)
        assert np.array_equal(inside(rings, labels.shape), labels == known.label)
        assert np.array_equal(roi.coordinates(), np.array(rings[0])[:-1])
        assert feature["properties"]["name"] == roi.name


def test_planes_of_a_stack(run, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", pixels(2, 3, 60, 70), ome=True, metadata={"axes": "TZYX"})
    assert call(run, tmp_path / "x.tif", "--out", tmp_path, "--format", "ome-tiff", "--rois",
                "--table") == 0  # fmt: skip
    result = open_source(tmp_path / "x.ome.tif", 1)
    counts = {f"t{t} z{z}": int(result.array[t, z].max()) for t in range(2) for z in range(3)}
    rows = rows_of(tmp_path / "tables" / "x.csv")
    assert {name: sum(row["plane"] == name for row in rows) for name in counts} == counts
    assert "area_px" in rows[0]
    rois = roifile.roiread(tmp_path / "rois" / "x_rois.zip")
    last = [roi for roi in rois if roi.name.startswith("t1-z2-")]
    assert len(last) == counts["t1 z2"]
    assert {roi.position for roi in last} == {6}
    features = json.loads((tmp_path / "rois" / "x.geojson").read_text())["features"]
    assert features[-1]["geometry"]["plane"] == {"c": -1, "z": 2, "t": 1}


@pytest.mark.parametrize("known", [True, False])
def test_table_of_volumes(tmp_path, known):
    """Two volumes of a movie, each with objects of its own; the last one is flat."""
    shape = (2, 5, 30, 40)
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0} if known else {}
    image = np.random.default_rng(0).integers(0, 2000, shape).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.ome.tif", image, metadata={"axes": "TZYX", **sizes})
    source = open_source(tmp_path / "x.ome.tif", 1, dims=3)
    result = np.zeros(shape, np.int32)
    result[0, 1:4, 2:9, 3:9], result[0, 2:, 20:25, 3:9], result[1, 4, 9:19, 30:] = 1, 4, 2
    result[0, 3, 8, 8] = 0
    (tmp_path / "tables").mkdir()
    tables.write_objects(tmp_path, "x", source, result, table=True, rois=False)
    rows = rows_of(tmp_path / "tables" / "x.csv")
    unit, cubed = ("um", "um3") if known else ("px", "px")
    assert list(rows[0]) == ["image", "plane", "id", "voxels", f"volume_{cubed}", f"x_{unit}",
                             f"y_{unit}", f"z_{unit}", "z_first", "z_last", "mean_1"]  # fmt: skip
    spacing = np.array([2.0, 0.25, 0.5] if known else [1, 1, 1])
    assert [(row["image"], row["plane"], row["id"]) for row in rows] == [
        ("x", "0", "1"), ("x", "0", "4"), ("x", "1", "2"),
    ]  # fmt: skip
    for row in rows:
        mask = result[int(row["plane"])] == int(row["id"])
        places = np.argwhere(mask)
        assert int(row["voxels"]) == len(places)
        assert float(row[f"volume_{cubed}"]) == pytest.approx(
            len(places) * spacing.prod(), rel=1e-4
        )
        centroid = [float(row[f"{axis}_{unit}"]) for axis in "zyx"]
        assert centroid == pytest.approx(places.mean(0) * spacing, rel=1e-4)
        assert [int(row["z_first"]), int(row["z_last"])] == [places[0][0], places[-1][0]]
        mean = image[int(row["plane"])][mask].mean()
        assert float(row["mean_1"]) == pytest.approx(mean, rel=1e-4)
    assert tables.table_of("x", source, 0 * result).count(b"\n") == 1
    with pytest.raises(ValueError, match="--rois must go with images of one plane, got volumes"):
        tables.write_objects(tmp_path, "x", source, result, table=True, rois=True)


def test_nothing_found(tmp_path):
    image = open_source(zarr_in(tmp_path / "x.zarr", pixels(20, 20)), 1)
    empty = np.zeros((20, 20), np.int32)
    assert tables.table_of("x", image, empty).count(b"\n") == 1
    assert json.loads(tables.geojson_of(image, empty))["features"] == []
    (tmp_path / "x.zip").write_bytes(tables.rois_of(image, empty))
    assert zipfile.ZipFile(tmp_path / "x.zip").namelist() == []


def test_results_that_were_there_get_what_they_lack(run, tmp_path):
    """The files are those of an unbroken run, and complete ones stay."""
    Image.fromarray(pixels(40, 40)).save(tmp_path / "x.png")
    tifffile.imwrite(tmp_path / "s.tif", pixels(2, 40, 40), metadata={"axes": "ZYX"})
    words = run, tmp_path / "x.png", tmp_path / "s.tif"
    assert call(*words, "--out", tmp_path / "one", "--table", "--rois") == 0
    assert call(*words, "--out", tmp_path / "two") == 0
    assert call(*words, "--out", tmp_path / "two", "--resume", "--table", "--rois") == 0
    names = "tables/x.csv", "rois/x_rois.zip", "rois/x.geojson", "tables/s.csv", "rois/s.geojson"
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    before = (tmp_path / "two" / names[0]).stat().st_ino
    assert call(*words, "--out", tmp_path / "two", "--resume", "--table") == 0
    assert (tmp_path / "two" / names[0]).stat().st_ino == before


def test_what_is_refused(run, tmp_path, capsys, monkeypatch):
    image = zarr_in(tmp_path / "x.ome.zarr", pixels(40, 40))
    words = run, image, "--out", tmp_path / "out", "--table"
    assert "with a result in memory, got OME-Zarr; --format tiff" in complaint(capsys, *words)
    assert "table must go with output instances, got labels" in complaint(
        capsys, *words, "--output", "labels"
    )
    assert "table must go with format png" in complaint(capsys, *words, "--format", "ome-zarr")
    assert call(*words, "--format", "tiff") == 0
    tifffile.imwrite(tmp_path / "out" / "x.tif", np.full((40, 40), 0.5, np.float32))
    (tmp_path / "out" / "tables" / "x.csv").unlink()
    text = complaint(capsys, *words, "--format", "tiff", "--resume")
    assert "x.tif: must number objects for --table, got float32" in text
    monkeypatch.setitem(sys.modules, "skimage", None)
    text = complaint(capsys, *words)
    assert "--table must have skimage installed, got none: pip install '.[rois]'" in text
    assert main(["predict", "--help"]) == 0
