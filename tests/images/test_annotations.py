"""Labels that other programs draw, read as pixels."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import roifile
import tifffile
from PIL import Image
from skimage.draw import polygon2mask

from unet_fast.images.annotations import fill, objects_of_colours
from unet_fast.images.files import read_labels
from unet_fast.images.source import open_source, planes_of

SIZE = (40, 50)
BOX = [[10, 5], [30, 5], [30, 15], [10, 15]]
"""x and y of corners: rows 5 to 14, columns 10 to 29."""


def drawn(*boxes):
    labels = np.zeros(SIZE, np.int32)
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        labels[top:bottom, left:right] = number
    return labels


def geojson(path, *geometries, wrap=None):
    features = [{"type": "Feature", "geometry": g, "properties": {"a": 1}} for g in geometries]
    collection = {"type": "FeatureCollection", "features": features}
    path.write_text(json.dumps(wrap(features) if wrap else collection))
    return path


def polygon(*rings):
    return {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]}


def read(path):
    told = []
    return read_labels(path, SIZE, told.append), told


def refused(path, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_labels(path, SIZE)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_fill_agrees_with_scikit_image(rng):
    """At points that no pixel's centre has, so that edges do not matter."""
    for _ in range(50):
        ring = rng.uniform(-20, 60, (rng.integers(3, 30), 2))
        mask = np.zeros(SIZE, bool)
        found = fill([ring], SIZE)
        if found is not None:
            (top, left), inside = found
            mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        np.testing.assert_array_equal(mask, polygon2mask(SIZE, ring[:, ::-1] - 0.5))


@pytest.mark.parametrize("wrap", [None, lambda f: f, lambda f: f[0], lambda f: f[0]["geometry"]])
def test_geojson(tmp_path, wrap):
    labels, told = read(geojson(tmp_path / "a.geojson", polygon(BOX), wrap=wrap))
    np.testing.assert_array_equal(labels, drawn((5, 10, 15, 30)))
    assert not told


def test_geojson_of_several_parts(tmp_path):
    hole = [[12, 7], [12, 9], [14, 9], [14, 7]]
    far = [[40, 30], [70, 30], [70, 90], [40, 90]]  # cut off at the border
    parts = {"type": "MultiPolygon", "coordinates": [[BOX, hole], [far]]}
    other = polygon([[0, 0], [3, 0], [3, 3], [0, 3]])
    collection = {"type": "GeometryCollection", "geometries": [other, {"type": "Point"}]}
    point = {"type": "Point", "coordinates": [1, 1]}
    labels, told = read(geojson(tmp_path / "a.json", parts, point, None, collection))
    expected = drawn((5, 10, 15, 30))
    expected[7:9, 12:14] = 0
    expected[30:, 40:] = 1
    expected[:3, :3] = 4
    np.testing.assert_array_equal(labels, expected)
    assert told == ["points, lines and texts are left out"]


def test_what_is_lost_is_told(tmp_path):
    over = [[20, 10], [40, 10], [40, 20], [20, 20]]
    beyond = [[100, 100], [110, 100], [110, 110]]
    labels, told = read(geojson(tmp_path / "a.json", *map(polygon, (BOX, over, beyond))))
    np.testing.assert_array_equal(labels, drawn((5, 10, 15, 30), (10, 20, 20, 40)))
    assert told == [
        "outlines beyond the image, or of no pixel, are left out: of another image?",
        "outlines overlap: where they do, the later one wins",
    ]


def rois():
    """A polygon, a rectangle, an oval, a composite with a hole, a point; and their labels."""
    box = roifile.ImagejRoi.frompoints(BOX)
    rectangle = roifile.ImagejRoi()
    rectangle.roitype = roifile.ROI_TYPE.RECT
    rectangle.top, rectangle.left, rectangle.bottom, rectangle.right = 20, 2, 24, 9
    oval = roifile.ImagejRoi()
    oval.roitype = roifile.ROI_TYPE.OVAL
    oval.top, oval.left, oval.bottom, oval.right = 20, 30, 36, 46
    expected = drawn((5, 10, 15, 30), (20, 2, 24, 9))
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    expected[np.hypot(rows - 28, columns - 38) < 8] = 3
    point = roifile.ImagejRoi.frompoints([[1, 1]])
    point.roitype = roifile.ROI_TYPE.POINT
    return [box, rectangle, oval, point], expected


def test_rois(tmp_path):
    every, expected = rois()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, roi in enumerate(every):
            archive.writestr(f"{i}.roi", roi.tobytes())
    labels, told = read(tmp_path / "a.zip")
    np.testing.assert_array_equal(labels, expected)
    assert told == ["points, lines and texts are left out"]
    (tmp_path / "b.roi").write_bytes(every[0].tobytes())
    np.testing.assert_array_equal(read(tmp_path / "b.roi")[0], expected == 1)


def test_roi_with_a_hole(tmp_path):
    hole = [[12, 7], [12, 9], [14, 9], [14, 7]]
    roi = roifile.ImagejRoi()
    roi.roitype = roifile.ROI_TYPE.RECT
    path = []
    for ring in (BOX, hole):
        for i, (x, y) in enumerate(ring):
            path += [float(i > 0), x, y]
        path.append(4.0)
    roi.multi_coordinates = np.array(path, np.float32)
    roi.shape_roi_size = len(path)
    (tmp_path / "a.roi").write_bytes(roi.tobytes())
    expected = drawn((5, 10, 15, 30))
    expected[7:9, 12:14] = 0
    np.testing.assert_array_equal(read(tmp_path / "a.roi")[0], expected)


def test_rectangle_between_pixels(tmp_path):
    """Edges within pixels: those whose centres are inside belong to it."""
    roi = roifile.ImagejRoi()
    roi.roitype = roifile.ROI_TYPE.RECT
    roi.version, roi.options = 227, roifile.ROI_OPTIONS.SUB_PIXEL_RESOLUTION
    roi.top, roi.left, roi.bottom, roi.right = 20, 2, 24, 9
    roi.xd, roi.yd, roi.widthd, roi.heightd = 2.6, 20.4, 6.0, 4.0  # x to 8.6, y to 24.4
    (tmp_path / "a.roi").write_bytes(roi.tobytes())
    np.testing.assert_array_equal(read(tmp_path / "a.roi")[0], drawn((20, 3, 24, 9)))


def test_outlines_need_a_size(tmp_path):
    with pytest.raises(ValueError, match=r"a.json: must be a label image, got outlines"):
        read_labels(geojson(tmp_path / "a.json", polygon(BOX)))


def test_without_roifile(tmp_path, monkeypatch):
    (tmp_path / "a.roi").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "roifile", None)
    refused(tmp_path / "a.roi", "needs the package roifile: pip install 'unet_fast[rois]'")


def test_broken_and_hostile_outlines_get_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for content in ("", "{}", "7", '{"type": "FeatureCollection"}', "[" * 100_000):
        path.write_text(content)
        refused(path, "cannot be read as GeoJSON")
    path.write_text('{"shapes": []}')
    refused(path, "it must hold features, as QuPath exports them (File > Export objects as")
    for point in ([1e300, 0], [float("nan"), 0], ["x", 0], [1], [10**400, 0]):
        geojson(path, polygon([*BOX, point]))
        refused(path, "cannot be read as GeoJSON")
    geojson(path, *[polygon([[0, 0], [50, 0], [50, 40], [0, 40]])] * 40)
    monkeypatch.setattr("unet_fast.images.annotations._MOST_FILLED", 1)
    refused(path, "its objects must cover the image at most 1 times")
    monkeypatch.setattr("unet_fast.images.annotations._MOST_CROSSINGS", 50)
    refused(path, "an outline must cross at most 50 rows, got 80")
    refused(tmp_path / "no.json", "no such file")

    path = tmp_path / "a.zip"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.roi", bytes(5_000_000))  # a bomb
    path.write_bytes(data.getvalue())
    refused(path, "a.roi must have at most 4194304 bytes")
    path.write_bytes(data.getvalue()[:-30])
    refused(path, "cannot be read as ROIs of ImageJ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "")
    refused(path, "a zip must hold .roi files, as ImageJ's ROI Manager saves them")
    monkeypatch.setattr("unet_fast.images.annotations._MOST_ROIS", 0)
    refused(path, "a zip must hold at most 0 files, got 1")
    whole = rois()[0][0].tobytes()
    for end in range(0, 64 + 16, 7):
        (tmp_path / "b.roi").write_bytes(whole[:end])
        refused(tmp_path / "b.roi", "cannot be read as ROIs of ImageJ")


def coloured(labels, ground, colours=((255, 0, 0), (0, 200, 0), (1, 2, 3))):
    return np.array([ground, *colours], np.uint8)[labels]


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (9, 8, 7)])
def test_colours(tmp_path, ground):
    labels = drawn((5, 0, 15, 30), (20, 2, 24, 9), (30, 30, 35, 35))
    Image.fromarray(coloured(labels, ground)).save(tmp_path / "a.png")
    found, told = read(tmp_path / "a.png")
    numbers = np.array([0, 255 << 16, 200 << 8, (1 << 16) + (2 << 8) + 3])
    np.testing.assert_array_equal(found, numbers[labels])
    name = "#" + bytes(ground).hex()
    assert told == [f"each colour is taken as an object, and {name} as background"]
    alpha = Image.open(tmp_path / "a.png").convert("RGBA")
    alpha.save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "b.png")[0], found)


def test_black_objects_on_white(tmp_path):
    labels = drawn((5, 5, 15, 30), (20, 2, 24, 9))
    picture = coloured(labels, (255, 255, 255), [(0, 0, 0), (9, 9, 8)])
    Image.fromarray(picture).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png")[0]
    np.testing.assert_array_equal(found, np.array([0, 1 << 24, 9 * 65536 + 9 * 256 + 8])[labels])


def test_pictures_that_are_no_labels(tmp_path, rng):
    labels = drawn((5, 0, 15, 30), (20, 2, 24, 9), (30, 30, 35, 35))
    picture = Image.fromarray(coloured(labels, (0, 0, 0)))
    picture.resize((97, 83), Image.Resampling.BICUBIC).save(tmp_path / "smooth.png")
    refused(tmp_path / "smooth.png", "one colour for each object, got ")
    picture.save(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "labels must be PNG or TIFF, got a JPEG")
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(tmp_path / "photo.png")
    refused(
        tmp_path / "photo.png", "is it a photograph, or was it saved with smooth edges or as JPEG?"
    )
    few = rng.integers(0, 4, (*SIZE, 3), np.uint8)  # 64 colours, each of many pixels
    Image.fromarray(few).save(tmp_path / "photo.png")
    refused(tmp_path / "photo.png", "got 64 colours, 0 of them of fewer than 4 pixels: is it a")
    smooth = np.dstack([np.repeat(np.arange(SIZE[1], dtype=np.uint8) // 5 * 20, 40)] * 3)
    smooth = smooth.reshape(SIZE[1], SIZE[0], 3)
    smooth[10] = 255, 0, 0  # an outline in red upon a grey image
    Image.fromarray(smooth).save(tmp_path / "drawn_upon.png")
    refused(tmp_path / "drawn_upon.png", "is it a photograph")
    with pytest.raises(ValueError, match=r"got 3 channels of uint16"):
        objects_of_colours(tmp_path, np.ones((3, 4, 4), np.uint16), print)


def test_channels_are_no_colours(tmp_path):
    planes = np.stack([drawn((1, 1, 5, 5)), drawn((2, 2, 9, 9)), drawn()]).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", planes, imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(ValueError, match="got 3 channels: planes of a stack must be saved as such"):
        next(planes_of(open_source(tmp_path / "a.tif", None))).labels()
