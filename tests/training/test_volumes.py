"""Volumes in training: parts cut for tiles, sparse labels, settings from the size of voxels."""

import json
from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
import tifffile
import torch
from runs import config, discs_in
from scipy import ndimage

from unet_fast import Augmentation, BorderWeights, TrainConfig, train
from unet_fast.cli import main
from unet_fast.model_file import pack, unpack
from unet_fast.training import samples, tiles, volumes
from unet_fast.training.check import check_data
from unet_fast.training.samples import NumberedLabels, Sample, load_samples
from unet_fast.training.tiles import Dataset
from unet_fast.training.volumes import with_voxels

SHAPE = (12, 40, 44)


def balls(rng, shape=SHAPE, count=12):
    """A volume of bright balls, some of which touch, and their numbers."""
    labels = np.zeros(shape, np.int32)
    for number in range(1, count + 1):
        centre = [rng.integers(0, side) for side in shape]
        distance = sum((g - c) ** 2 for g, c in zip(np.indices(shape), centre, strict=True))
        labels[(distance < rng.integers(4, 6) ** 2) & (labels == 0)] = number
    image = ndimage.gaussian_filter((labels > 0).astype(np.float32), 1)
    return image + 0.05 * rng.standard_normal(shape).astype(np.float32), labels


def dataset(labels, image=None, ignore_label=None):
    image = labels.astype(np.float32) if image is None else image
    sample = Sample("a", image[None], labels)
    weights = BorderWeights(ignore_label=ignore_label)
    objects = NumberedLabels([labels], None, None)
    return Dataset([sample], objects, weights, torch.device("cpu"), float("inf"))


@pytest.mark.parametrize("grid", ["interpolating", "approximating", "keys"])
def test_a_tile_of_a_part_is_that_of_the_whole(grid, rng):
    """Only the part that a tile may read is handed to the operator."""
    image, labels = balls(rng)
    data = dataset(labels, image)
    points = (4, 5, 4) if grid == "approximating" else 3
    augmentation = Augmentation(sigma=(2, 6, 6), points=points, grid=grid, rotation=40)
    shapes = (10, 20, 24), (6, 16, 18)
    for step in range(1, 13):
        drawn = data.draw(augmentation, 2, *shapes, seed=3, step=step)
        found, ids = data.cut(augmentation, drawn, *shapes)
        images, all_labels = (x.expand(2, *x.shape[1:]) for x in data.stacks[0])
        settings = {"output_shape": shapes[0], "label_shape": shapes[1], "offset": drawn.offset}
        expected = augmentation.apply(images, all_labels, drawn.parameters, **settings)
        assert torch.allclose(found, expected[0], atol=2e-4)
        assert (ids != expected[1]).float().mean() < 1e-3  # ties of the nearest pixel


@pytest.mark.parametrize("shape", [(30, 50), (9, 30, 20)])
def test_tiles_hold_a_pixel_that_counts(shape, rng):
    """In all files, and each such pixel has its turn."""
    labels = np.full(shape, 9, np.int32)
    known = rng.random(shape) < 0.02
    labels[known] = rng.integers(0, 3, int(known.sum()))
    data = dataset(labels, ignore_label=9)
    still = Augmentation(sigma=0, rotation=0)
    size = (6,) * len(shape)
    seen = np.zeros(shape, bool)
    for step in range(1, 600):
        offset = data.draw(still, 1, size, size, seed=0, step=step).offset[0].int().tolist()
        assert all(0 <= o <= side - 6 for o, side in zip(offset, shape, strict=True))
        part = (*(slice(o, o + 6) for o in offset),)
        assert known[part].any()
        seen[part] |= known[part]
    assert (seen == known).mean() > 0.999


def test_settings_from_the_size_of_voxels(tmp_path):
    config = TrainConfig(tmp_path, tmp_path, out=tmp_path, dims=3)
    assert config.augmentation == Augmentation.volumes()
    image = np.zeros((1, *SHAPE), np.float32)
    sample = Sample("a", image, image[0].astype(np.int32), spacing=(2.0, 0.5, 0.5))
    found = with_voxels(config, [sample])
    assert found.flat_levels == 2
    assert found.weights.spacing == (4, 1, 1)
    assert found.augmentation.voxel_size == (4, 1, 1)
    assert found.augmentation.spacing == (8, 32, 32)
    assert found.augmentation.sigma == (1, 4, 4)
    assert with_voxels(found, [sample]) == found  # as when a run is resumed
    cube = with_voxels(config, [replace(sample, spacing=(0.5, 0.5, 0.5))])
    assert cube == replace(config, flat_levels=0)
    given = replace(config, weights=BorderWeights(spacing=(3, 1, 1)), flat_levels=1)
    assert with_voxels(given, [sample]).weights == given.weights
    assert with_voxels(given, [sample]).flat_levels == 1
    with pytest.warns(UserWarning, match="volumes differ in the size of their voxels: 1 x 1 x 1"):
        with_voxels(config, [sample, replace(sample, spacing=(1.0, 1.0, 1.0))])
    with pytest.raises(ValueError, match=r"a: the size of its voxels must be known, got none"):
        with_voxels(config, [replace(sample, spacing=None)])


def files(folder, rng, count=2, axes="ZYX", planes=None):
    """Folders of volumes and labels; of labels only some planes are known, the others are 0."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    options = {"imagej": True, "metadata": {"axes": axes, "spacing": 0.4, "unit": "um"}}
    options["resolution"] = (5.0, 5.0)  # pixels of 0.2 um
    for i in range(count):
        image, labels = balls(rng)
        labels += 1  # 1 is the background
        if planes is not None:
            labels[[z for z in range(len(labels)) if z not in planes]] = 0
        pixels = (1000 * image.clip(0)).astype(np.uint16)
        tifffile.imwrite(folder / "images" / f"v{i}.tif", pixels, **options)
        tifffile.imwrite(folder / "labels" / f"v{i}.tif", labels.astype(np.uint16), **options)
    return folder / "images", folder / "labels"


SPARSE = ["--dims", "3", "--ignore-label", "0", "--background-label", "1"]
SMALL = ["--steps", "3", "--base-channels", "2", "--depth", "1", "--tile", "8", "16", "16"]


def test_from_five_planes_to_objects(tmp_path, rng, capsys):
    """The walk of docs/volumes.md: check, train, predict."""
    images, labels = files(tmp_path, rng, planes=(1, 4, 6, 8, 10))
    both = [str(images), str(labels)]
    assert main(["check", *both, *SPARSE, "--out", str(tmp_path / "check")]) == 0
    said = capsys.readouterr().out
    assert "2 volumes" in said
    assert "voxels of 0.4 x 0.2 x 0.2 um (Z, Y, X)" in said
    assert "the upper 1 level of the network in the plane only" in said
    assert "58.3 % of the pixels are ignored" in said
    assert (tmp_path / "check" / "check.png").stat().st_size > 10_000
    run = tmp_path / "run"
    assert main(["train", *both, *SPARSE, "--out", str(run), *SMALL, "--previews", "1"]) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(row["loss"] < 10 for row in log)
    assert (run / "previews" / "tiles.png").exists()
    written = (run / "config.toml").read_text()
    for line in ("dims = 3", "flat_levels = 1", "ignore_label = 0", "background_label = 1"):
        assert line in written
    assert main(["train", "--config", str(run / "config.toml"), "--resume", "--steps", "4"]) == 0
    out = tmp_path / "results"
    assert main(["predict", str(run), str(images), "--out", str(out)]) == 0
    with tifffile.TiffFile(out / "v0.tif") as found:
        assert found.series[0].axes == "ZYX"
        assert found.series[0].shape == SHAPE
    scores = tmp_path / "scores"
    words = ["evaluate", str(out), str(labels), *SPARSE, "--out", str(scores)]
    capsys.readouterr()
    assert main(words) == 0


def test_unlabelled_is_another_name(tmp_path, rng):
    images, labels = files(tmp_path, rng, planes=(3, 6))
    words = ["train", str(images), str(labels), "--dims", "3", "--unlabelled", "0"]
    words += ["--background-label", "1", *SMALL, "--previews", "0", "--out", str(tmp_path / "run")]
    assert main(words) == 0


BAD = {
    "odd axes": (["--axes", "XYZ"], "axes must have Y (rows) before X (columns), got 'XYZ'"),
    "other axes": (["--axes", "YXZ"], "v0.tif, 44 x 12 x 40, got 12 x 40 x 44"),
    "no background label": (["--ignore-label", "0"], "ignore_label must not be that of the"),
    "three sizes": (["--voxel-size", "1", "1"], "voxel_size must be three sizes > 0"),
    "tile": (["--tile", "8", "8"], "tile must be a side >= 1, or 3 of them, got (8, 8)"),
    "levels": (["--flat-levels", "9"], "flat_levels must be in [0, depth], got 9"),
    "rotation": (["--augmentation.rotation", "1", "2"], "rotation must be one value, or 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_of_volumes(case, tmp_path, rng, capsys):
    images, labels = files(tmp_path, rng, count=1)
    more, said = BAD[case]
    words = ["train", str(images), str(labels), "--out", str(tmp_path / "run"), "--dims", "3"]
    assert main([*words, *SMALL[:6], *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_size_of_voxels_for_images(tmp_path):
    with pytest.raises(ValueError, match="voxel_size must go with dims 3, got"):
        TrainConfig(tmp_path, tmp_path, out=tmp_path, voxel_size=(1.0, 1.0, 1.0))


def test_two_labels_to_ignore(tmp_path):
    weights = BorderWeights(ignore_label=7)
    assert TrainConfig(tmp_path, tmp_path, out=tmp_path, weights=weights).ignore_label == 7
    with pytest.raises(ValueError, match=r"weights.ignore_label must be ignore_label, 8, got 7"):
        TrainConfig(tmp_path, tmp_path, out=tmp_path, weights=weights, ignore_label=8)


@pytest.mark.filterwarnings("default:files without")
def test_bad_volumes(tmp_path, rng, capsys):
    """One line each: depths that differ, planes as labels, no voxel size, nothing annotated."""

    def line(*more):
        words = ["train", str(images), str(labels), "--out", str(tmp_path / "run"), "--dims", "3"]
        assert main([*words, *SMALL, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    images, labels = files(tmp_path, rng, count=1)
    whole = tifffile.imread(labels / "v0.tif")
    tifffile.imwrite(labels / "v0.tif", whole[:-1], imagej=True, metadata={"axes": "ZYX"})
    assert f"v0.tif: must have the size of {images / 'v0.tif'}, 12 x 40 x 44, got 11" in line()
    tifffile.imwrite(labels / "v0.tif", whole[3])
    assert "must be a volume, got a plane of shape" in line()
    tifffile.imwrite(labels / "v0.tif", whole)
    tifffile.imwrite(images / "v0.tif", whole)  # which says nothing of sizes
    assert "the size of its voxels must be known, got none in the file (--voxel-size" in line()
    tifffile.imwrite(labels / "v0.tif", np.where(whole > 0, 7, 0).astype(np.uint16))
    more = ["--voxel-size", "2,1,1", "--ignore-label", "7"]
    words = ["train", str(images), str(labels), "--out", str(tmp_path / "run"), "--dims", "3"]
    assert main([*words, *SMALL, *more]) == 2
    warned, error = capsys.readouterr().err.splitlines()
    assert "files without a pixel that counts, left out: v0" in warned
    assert "labels must hold an object, got none in any file" in error


def test_volumes_that_stay_in_their_files(tmp_path, rng, monkeypatch):
    """Tiles read as they are drawn, also ahead and after a kill, train the same network."""
    images, labels = files(tmp_path, rng, planes=(2, 5, 9))
    common = {"dims": 3, "ignore_label": 0, "background_label": 1, "previews": 0, "steps": 4}
    common |= {"base_channels": 2, "depth": 1, "tile": (8, 16, 16), "batch_size": 2}
    monkeypatch.setattr(tiles, "EVALUATED", 5000)
    whole = train(TrainConfig(images, labels, out=tmp_path / "whole", **common))
    monkeypatch.setattr(samples, "STORED", 0)
    monkeypatch.setattr(Dataset, "read", partialmethod(_counted, Dataset.read, counts := []))
    stored = train(TrainConfig(images, labels, out=tmp_path / "stored", **common))
    assert counts == [2] * 4
    train(TrainConfig(images, labels, out=tmp_path / "begun", **common | {"steps": 2}))
    again = TrainConfig(images, labels, out=tmp_path / "begun", **common, resume=True)
    for name, x in whole.state_dict().items():
        assert torch.equal(x, stored.state_dict()[name])
    assert train(again).config == whole.config
    picture = tmp_path / "check.png"
    reading = again.reading
    assert check_data(images, labels, out=tmp_path, reading=reading, picture=picture).suggestion


def _counted(self, read, counts, augmentation, drawn, shape):
    counts.append(len(drawn.files))
    return read(self, augmentation, drawn, shape)


def test_the_part_of_a_large_volume_that_is_evaluated():
    """About the planes that hold the most known voxels; of one known everywhere, the centre."""
    known = np.zeros((20, 40, 60), bool)
    known[15], known[:, 3], known[:, :, 30] = True, True, True
    box = volumes.box_around(known, 48)
    assert [len(range(*part.indices(99))) for part in box] == [2, 4, 6]
    assert known[box].sum() > 20
    assert volumes.box_around(known, known.size) == (slice(0, 20), slice(0, 40), slice(0, 60))
    middle = volumes.box_around(np.ones((20, 40, 60), bool), 6000)
    assert middle == (slice(5, 15), slice(10, 30), slice(15, 45))


def test_marked_labels(tmp_path, rng):
    """Background becomes 0, what does not count the largest number."""
    images, labels = files(tmp_path, rng, count=1, planes=(2, 3))
    config = TrainConfig(images, labels, out=tmp_path, dims=3, ignore_label=0, background_label=1)
    (sample,) = load_samples(images, labels, reading=config.reading)
    assert sample.spacing == pytest.approx((0.4, 0.2, 0.2))
    assert sample.image.shape == (1, *SHAPE)
    assert config.reading.ignored == 2**31 - 1
    assert ((sample.labels == 2**31 - 1).mean((1, 2)) == [z not in (2, 3) for z in range(12)]).all()
    assert set(np.unique(sample.labels[2:4]).tolist()) <= {0, *range(2, 14)}
    with pytest.raises(ValueError, match=r"v0.tif: labels must hold no 0 with background_label 1"):
        load_samples(images, labels, reading=replace(config.reading, ignore_label=None))


def test_files_without_a_pixel_that_counts_are_left_out(tmp_path, rng):
    """Else they would be evaluated, with a loss of 0, and decide which model is the best."""
    images, labels = files(tmp_path, rng, count=3, planes=(2, 3))
    whole = np.zeros(SHAPE, np.uint16)
    tifffile.imwrite(labels / "v1.tif", whole, imagej=True, metadata={"axes": "ZYX"})
    config = TrainConfig(images, labels, out=tmp_path, dims=3, ignore_label=0, background_label=1)
    with pytest.warns(UserWarning, match=r"files without a pixel that counts, left out: v1"):
        _, train_set, validation_set = tiles.load_sets(config, False, torch.device("cpu"))
    assert sorted(train_set.names + validation_set.names) == ["v0", "v2"]


def test_what_is_counted_is_counted_everywhere(rng, monkeypatch):
    """Also of a volume of which a part is evaluated."""
    image, labels = balls(rng)
    labels[:, :, 30:] = np.where(labels[:, :, 30:] > 0, 40, 0)
    whole = dataset(labels, image)
    monkeypatch.setattr(tiles, "EVALUATED", 4 * 40 * 44)
    parts = dataset(labels, image)
    assert parts.evaluated == [tuple(int(side * (1 / 3) ** (1 / 3)) for side in SHAPE)]
    assert parts.areas().tolist() == whole.areas().tolist()
    for data in (whole, parts):
        data.balanced()
    assert parts.weights.class_weight == pytest.approx(whole.weights.class_weight, rel=0.02)


def test_the_evaluated_part_holds_known_voxels():
    """Where the planes that hold the most along each axis do not cross."""
    known = np.zeros((100, 100, 100), bool)
    known[1, :30, :30] = True
    known[50:60, 70:80, 70:80] = True
    assert known[volumes.box_around(known, 33554)].any()


def test_class_maps_have_a_background_of_their_own(tmp_path, rng):
    images, labels = files(tmp_path, rng, count=1, planes=(2, 3))
    (tmp_path / "classes").mkdir()
    ids = tifffile.imread(labels / "v0.tif")
    kinds = np.where(ids > 1, 1 + ids % 2, 0).astype(np.uint8)
    tifffile.imwrite(tmp_path / "classes" / "v0.tif", kinds, imagej=True, metadata={"axes": "ZYX"})
    config = TrainConfig(
        *(images, labels),
        **{"out": tmp_path, "dims": 3, "ignore_label": 0, "background_label": 1},
        **{"classes": tmp_path / "classes", "validation": 0.0},
    )
    _, data, _ = tiles.load_sets(config, False, torch.device("cpu"))
    assert data.class_values == [0, 1, 2]
    found = data.classes(data.sample(0)[1]).numpy()
    assert (found[[0, 5]] == 255).all()
    assert (found[2:4] == kinds[2:4]).all()


def test_one_setting_of_the_deformation_keeps_the_others(tmp_path, rng):
    images, labels = files(tmp_path, rng, count=1)
    words = ["train", str(images), str(labels), "--dims", "3", "--out", str(tmp_path / "run")]
    words += ["--validation", "0", "--background-label", "1"]
    more = ["--previews", "0", "--voxel-size", "1", "1", "1", "--augmentation.rotation"]
    assert main([*words, *SMALL, *more, "180", "5", "5"]) == 0
    written = (tmp_path / "run" / "config.toml").read_text()
    for line in ('grid = "approximating"', "sigma = 4.0", "spacing = 32.0", "180.0"):
        assert line in written


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_batch_renorm_trains(precision, tmp_path, rng):
    images, labels = files(tmp_path, rng, count=1)
    common = {"dims": 3, "previews": 0, "steps": 2, "base_channels": 2, "depth": 1}
    common |= {
        "background_label": 1,
        "tile": (8, 16, 16),
        "norm": "batch_renorm",
        "precision": precision,
    }
    model = train(TrainConfig(images, labels, out=tmp_path / "run", validation=0.0, **common))
    assert int(model.down[0][1].num_batches_tracked) == 2


def test_planes_that_nobody_looked_at(tmp_path, rng, capsys):
    """Both options for them were forgotten."""
    images, labels = files(tmp_path, rng, planes=(2, 5, 9))
    for file in labels.iterdir():
        ids = tifffile.imread(file)
        metadata = {"axes": "ZYX"}
        tifffile.imwrite(file, np.where(ids > 1, ids, 0), imagej=True, metadata=metadata)
    words = ["check", str(images), str(labels), "--dims", "3", "--out", str(tmp_path / "check")]
    assert main([*words, "--strict"]) == 1
    output = capsys.readouterr().out
    assert "most planes hold no object and count as background; if nobody looked" in output
    assert "v0 (9 of 12), v1 (9 of 12)" in output
    assert "volumes of 12 x 40 x 44, voxels of 0.4 x 0.2 x 0.2 um (Z, Y, X)" in output
    assert "smaller than" not in output


@pytest.mark.filterwarnings("ignore:no pixel has the label")
def test_runs_from_before_volumes_go_on(tmp_path):
    """Their settings have no axes, and the label to ignore among the weights."""
    weights = BorderWeights(ignore_label=9)
    discs = discs_in(tmp_path / "discs")
    settings = config(discs, tmp_path / "run", steps=1, tile=None, depth=1, weights=weights)
    train(settings)
    file = tmp_path / "run" / "state.safetensors"
    tensors, description = unpack(file, "a training state")
    for name in ("dims", "tile", "ignore_label"):
        del description["settings"][name]
    file.write_bytes(pack(tensors, description))
    train(replace(settings, steps=2, resume=True))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("planes", [(2, 5, 9), range(12)], ids=["apart", "all"])
def test_objects_that_are_numbered_anew_in_each_plane(planes, tmp_path, rng, capsys):
    images, labels = files(tmp_path, rng, planes=planes)
    words = ["check", str(images), str(labels), "--dims", "3", "--out", str(tmp_path / "check")]
    words += ["--ignore-label", "0", "--background-label", "1", "--overwrite"]
    main(words)
    assert "numbered anew" not in capsys.readouterr().out
    for file in labels.iterdir():
        ids = tifffile.imread(file)
        for plane in ids:
            cells = plane > 1
            numbers, index = np.unique(plane[cells], return_inverse=True)
            plane[cells] = 2 + rng.permutation(len(numbers))[index]
        tifffile.imwrite(file, ids, imagej=True, metadata={"axes": "ZYX"})
    main(words)
    assert "objects seem to be numbered anew in each plane" in capsys.readouterr().out


def test_objects_wider_than_a_tile(tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        volume = np.zeros((5, 100, 120), np.uint8)
        volume[1:3, 5:95, 5:85], volume[:, 5:15, 100:115] = 1, 2
        tifffile.imwrite(tmp_path / name / "v.tif", volume * (60 if name == "images" else 1))
    words = ["check", *(str(tmp_path / name) for name in ("images", "labels"))]
    words += ["--dims", "3", "--axes", "ZYX", "--voxel-size=1,0.5,0.5", "--overwrite"]
    main([*words, "--out", str(tmp_path / "check")])
    said = "objects are about 91 px wide in a plane, more than a tile: scale the volumes down, to "
    assert said + "voxels of about 1 x 0.71 x 0.71 um (Z, Y, X)" in capsys.readouterr().out
