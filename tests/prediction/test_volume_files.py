"""Volumes in, volumes out: formats, block by block, overlays, what is refused."""

import math

import numpy as np
import pytest
import tifffile
import zarr
from budget import first
from ome_zarr_models.v05.image import Image as OmeImage
from ome_zarr_models.v05.labels import Labels as OmeLabels
from PIL import Image
from test_predict_files import model_in as model_of_size

from unet_fast import UNet, load_model, predict, save_model
from unet_fast.cli import main
from unet_fast.images.sections import GAP
from unet_fast.images.source import open_source
from unet_fast.images.zarr import create
from unet_fast.prediction import out_of_core
from unet_fast.prediction.cluster import cluster
from unet_fast.prediction.options import Options
from unet_fast.prediction.out_of_core import is_begun, predict_blocks
from unet_fast.prediction.tiling import Tiling

SIZE = {"X": 0.5, "Y": 0.5, "Z": 2.0}
FLAT = {"kernels": [(1, 3, 3), (3, 3, 3)], "poolings": [(1, 2, 2)]}


def model_in(folder, channels=1):
    return model_of_size(folder, channels, size=(20, 50, 50), dims=3, depth=1, **FLAT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("run"))


def voxels(*shape, seed=0):
    """Blobs of grey values, uint8."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(0, 255, [*shape[:-3], *(-(-n // 4) for n in shape[-3:])])
    for axis in (-3, -2, -1):
        fine = fine.repeat(4, axis).take(range(shape[axis]), axis)
    return (fine * 0.8 + rng.integers(0, 50, shape)).astype(np.uint8)


def zarr_in(path, array, axes="ZYX"):
    chunks = tuple(min(16, n) for n in array.shape)
    options = {"chunks": chunks, "dtype": "uint8", "pixel_size": SIZE, "labels": False}
    create(path, name="x", shape=array.shape, axes=axes, **options)[...] = array
    return path


def written(folder, kind, volume):
    """Writes a volume, (D, H, W), with the size of its voxels. Returns the file."""
    if kind == "ome-zarr":
        return zarr_in(folder / "x.ome.zarr", volume)
    metadata = {"axes": "ZYX"}
    if kind == "imagej":
        metadata |= {"spacing": 2.0, "unit": "um"}
        options = {"imagej": True, "resolution": (2, 2)}
    else:
        metadata |= {f"PhysicalSize{axis}": size for axis, size in SIZE.items()}
        options = {"ome": True}
    tifffile.imwrite(folder / "x.tif", volume, metadata=metadata, **options)
    return folder / "x.tif"


def predicted(run, volume, output="labels", **options):
    return predict(load_model(run), volume, output=output, **{"tile": 24} | options)


def call(*words):
    return main(["predict", *map(str, words), "--precision", "float32"])


@pytest.mark.parametrize("kind", first("ome-zarr", "imagej", "ome"))
@pytest.mark.parametrize(
    ("output", "format", "name"),
    [
        ("instances", "tiff", "x.tif"),
        ("labels", "ome-tiff", "x.ome.tif"),
        ("probabilities", "ome-tiff", "x.ome.tif"),
        ("instances", "ome-zarr", "x.ome.zarr"),
        ("scores", "ome-zarr", "x.ome.zarr"),
    ],
)
def test_formats(run, tmp_path, kind, output, format, name):
    """Each holds what `predict` gives, and all but plain TIFF the size of the voxels."""
    volume, out = voxels(20, 50, 41), tmp_path / "out"
    words = "--output", output, "--format", format, "--tile", 24, "--out", out
    assert call(run, written(tmp_path, kind, volume), *words) == 0
    expected = predicted(run, volume, output)
    channels = 2 if expected.ndim == 4 else 1
    found = open_source(out / name, channels, dims=3)
    every = [slice(None)] * 3
    assert np.array_equal(found.pixels()(*every), expected.reshape(channels, *volume.shape))
    sizes = SIZE if format != "tiff" else {"X": 0.5, "Y": 0.5}
    assert found.pixel_size == pytest.approx(sizes)
    if format == "ome-zarr":
        group = zarr.open_group(out / name, mode="r")
        assert OmeImage.from_zarr(group).attributes.ome.version == "0.5"
        assert group["0"].nchunks_initialized == group["0"].nchunks
    with Image.open(out / "overlays" / "x.png") as picture:  # Z is four times as long as drawn
        assert picture.size == (5 * (41 + GAP + 80), 5 * (50 + GAP + 80))
    assert sorted(p.name for p in out.iterdir()) == sorted([name, "overlays"])


def test_results_go_into_the_labels_of_their_images(run, tmp_path, capsys):
    volume, out = voxels(20, 50, 41), tmp_path / "out"
    image = written(tmp_path, "ome-zarr", volume)
    words = image, "--tile", 24, "--into-image", "--out", out
    assert call(run, *words) == 0
    assert call(run, *words, "--output", "labels") == 0
    labels = zarr.open_group(image / "labels", mode="r")
    names = ["unet_fast_objects", "unet_fast_classes"]
    assert OmeLabels.from_zarr(labels).ome_attributes.labels == names
    for name, output in zip(names, ("instances", "labels"), strict=True):
        assert np.array_equal(labels[f"{name}/0"][:], predicted(run, volume, output))
    assert np.array_equal(open_source(image, 1, dims=3).pixels()(*[slice(None)] * 3)[0], volume)
    assert [p.name for p in out.iterdir()] == ["overlays"]
    assert {p.name for p in (image / "labels").iterdir()} == {*names, "zarr.json"}

    assert call(run, *words) == 2
    assert "got " + str(image / "labels" / names[0]) in capsys.readouterr().err
    (image / "labels" / "zarr.json").unlink()  # killed before the result was listed
    assert call(run, *words, "--resume") == 0
    listed = zarr.open_group(image / "labels", mode="r").attrs["ome"]
    assert listed == {"version": "0.5", "labels": names[:1]}

    refused = {
        (image, "--output", "scores"): "into_image must go with ome-zarr and instances or labels",
        (image, "--format", "tiff"): "into_image must go with ome-zarr and instances or labels",
        (written(tmp_path, "ome", volume),): "must be an OME-Zarr image of version 0.5",
    }
    for asked, message in refused.items():
        assert call(run, *asked, "--into-image", "--out", tmp_path / "none") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("format", ["auto", "ome-zarr"])
def test_each_time_is_a_volume(tmp_path, format):
    """Two channels, two times: axes TCZYX."""
    run = model_in(tmp_path / "run", 2)
    stack = voxels(2, 2, 9, 30, 26)
    tifffile.imwrite(tmp_path / "x.tif", stack.swapaxes(1, 2), ome=True, metadata={"axes": "TZCYX"})
    words = "--output", "probabilities", "--out", tmp_path / "out", "--format", format
    assert call(run, tmp_path / "x.tif", *words, "--tile", 24) == 0
    name = "x.tif" if format == "auto" else "x.ome.zarr"
    found = open_source(tmp_path / "out" / name, 2, dims=3)
    assert found.stack == {"T": 2}
    for time in range(2):
        expected = predicted(run, stack[time], "probabilities")
        assert np.array_equal(found.pixels((time,))(*[slice(None)] * 3), expected)


@pytest.mark.parametrize("output", ["instances", "scores"])
def test_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch, output):
    """Blocks that reached the disk are not computed again; the result is that of one piece."""
    monkeypatch.setitem(out_of_core.SIDE, 3, 16)
    volume = voxels(20, 50, 41)
    source = open_source(zarr_in(tmp_path / "x.ome.zarr", volume), 1, dims=3)
    out = tmp_path / "out.ome.zarr"
    options = Options(output, tile=16)
    counts = []

    def stop(done, total):
        counts.append(done)
        if len(counts) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        predict_blocks(run, source, out, options, device="cpu", progress=stop)
    assert is_begun(out)
    part = out.with_name(out.name + ".part")
    blocks = {p.name: p.stat().st_mtime_ns for p in (part / "blocks").iterdir()}
    assert len(blocks) >= 5
    assert "0.0.0" in blocks
    again = []
    predict_blocks(
        run, source, out, options, device="cpu", resume=True, progress=lambda *n: again.append(n)
    )
    assert again[0] == (len(blocks), 2 * 4 * 3)
    found = zarr.open_array(out / "0", mode="r")
    # At once, batches are larger and sums in another order.
    np.testing.assert_allclose(found, predicted(run, volume, output, tile=16), atol=1e-5)


@pytest.mark.thorough
def test_a_cluster_gives_the_same(run, tmp_path):
    volume = voxels(20, 50, 41)
    source = open_source(zarr_in(tmp_path / "x.ome.zarr", volume), 1, dims=3)
    out = tmp_path / "out.ome.zarr"
    with cluster(2, None) as client:
        predict_blocks(run, source, out, Options("scores", tile=16), device="cpu", client=client)
    found = zarr.open_array(out / "0", mode="r")
    np.testing.assert_allclose(found, predicted(run, volume, "scores", tile=16), atol=1e-5)


@pytest.mark.parametrize(
    ("tile", "image", "chunk"),
    [
        ((128, 128, 128), (1024, 1024, 1000), (128, 128, 128)),
        ((48, 16, 256), (500, 500, 500), (96, 128, 128)),  # small ones together, large ones cut
        ((60, 200, 240), (60, 200, 480), (60, 100, 120)),
        ((262, 131, 240), (500, 131, 480), (262, 66, 120)),  # there is no better divisor
    ],
)
def test_chunks_of_volumes(tile, image, chunk):
    tiling = Tiling(image, tile, (0,) * 3, (0,) * 3, tile, 1)
    found = out_of_core._chunk_of(tiling)
    assert found == chunk
    for side, block, n in zip(found, out_of_core.block_of(tiling), image, strict=True):
        assert block % side == 0 or block == n  # no chunk belongs to two blocks


def test_memory_does_not_grow_with_the_volume(run, tmp_path, monkeypatch):
    """No part of the volume or of the result is larger than a tile with its halo, or a block."""
    volume = voxels(24, 90, 120)
    source = open_source(zarr_in(tmp_path / "x.ome.zarr", volume), 1, dims=3)
    monkeypatch.setitem(out_of_core.SIDE, 3, 16)
    sizes = []
    read, write = type(source).pixels, out_of_core.Worker._write

    def counted(self, plane=()):
        def part(*place):
            values = read(self, plane)(*place)
            sizes.append(values.size)
            return values

        return part

    def counted_write(self, block, values):
        sizes.append(values.size)
        write(self, block, values)

    monkeypatch.setattr(type(source), "pixels", counted)
    monkeypatch.setattr(out_of_core.Worker, "_write", counted_write)
    monkeypatch.setattr("unet_fast.images.source._PART", 2**14)
    predict_blocks(run, source, tmp_path / "out", Options("labels", tile=16), device="cpu")
    model = load_model(run)
    assert max(sizes) <= math.prod(model.input_shape((16 + 16,) * 3))
    assert max(sizes) < volume.size / 3


def test_refuses(run, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "x.tif", voxels(5, 12, 14), metadata={"axes": "ZYX"})
    Image.fromarray(voxels(1, 12, 14)[0]).save(tmp_path / "plane.png")
    flat = tmp_path / "flat"
    save_model(UNet(base_channels=2, depth=1), flat)
    for words, text in (
        ((run, "x.tif", "--format", "png"), "a volume must go into tiff or ome-tiff, got png"),
        ((run, "plane.png"), "must be a volume, got a plane of shape"),
        ((run, "x.tif", "--tile", "16,16"), "tile must be one or three sides >= 1, got (16, 16)"),
        ((flat, "x.tif", "--tile", "8,8,8"), "tile must be one or two sides >= 1, got (8, 8, 8)"),
    ):
        out = "--output", "labels", "--out", tmp_path / "out"
        assert call(words[0], tmp_path / words[1], *out, *words[2:]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert call(run, tmp_path / "x.tif", "--rois", "--out", tmp_path / "out") == 2
    assert "--rois must go with images of one plane, got volumes" in capsys.readouterr().err
    assert call(run, tmp_path / "x.tif", *out, "--tile", "4,8,16", "--no-overlay") == 0
    found = tifffile.imread(tmp_path / "out" / "x.tif")
    assert np.array_equal(found, predicted(run, voxels(5, 12, 14)))


def test_planes_of_a_volume_for_a_network_of_two_axes(tmp_path):
    save_model(UNet(base_channels=2, depth=1), tmp_path / "run")
    volume = voxels(3, 20, 22)
    written(tmp_path, "imagej", volume)
    words = "--out", tmp_path / "out", "--output", "probabilities"
    assert call(tmp_path / "run", tmp_path / "x.tif", *words) == 0
    found = tifffile.imread(tmp_path / "out" / "x.tif")  # (C, Z, Y, X)
    net = load_model(tmp_path / "run")
    assert np.array_equal(found, np.stack([predict(net, plane) for plane in volume], 1))
