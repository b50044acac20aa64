import re

import pytest

from unet_fast.images.pairing import SUFFIX_HINT, Reading, find_pairs, match
from unet_fast.images.source import list_sources


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def shown(pairs):
    return [(p.name, p.image.name, p.labels.name) for p in pairs]


MARKS = ["_mask", "_masks", "_cp_masks", "-labels", "_labels", "_label", "_seg", ".Labels", "_gt"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("one_folder", [False, True])
def test_what_labels_add_to_names_is_found(tmp_path, mark, one_folder):
    images = fill(tmp_path / "images", "a.tif", "b c.ome.tif", "d_mask_1.png")
    labels = images if one_folder else tmp_path / "labels"
    fill(labels, f"a{mark}.png", f"b c{mark}.tif", f"d_mask_1{mark}.png")
    found = find_pairs(images, labels)
    assert shown(found.pairs) == [
        ("a", "a.tif", f"a{mark}.png"),
        ("b c", "b c.ome.tif", f"b c{mark}.tif"),
        ("d_mask_1", "d_mask_1.png", f"d_mask_1{mark}.png"),
    ]
    assert found.notes == [
        f"labels of NAME are taken to be NAME{mark}: --label-suffix says otherwise"
    ]


def test_names_of_images_may_add_something_too(tmp_path):
    fill(tmp_path / "a", "000_img.png", "001_img.png", "000_masks.png", "001_masks.png")
    found = find_pairs(tmp_path / "a", tmp_path / "a")
    assert shown(found.pairs) == [
        ("000_img", "000_img.png", "000_masks.png"),
        ("001_img", "001_img.png", "001_masks.png"),
    ]


def test_equal_names_need_no_suffix(tmp_path):
    names = "a_mask.png", "b_mask.png", "a.png", "b.png"
    images, labels = fill(tmp_path / "i", *names), fill(tmp_path / "l", *names)
    found = find_pairs(images, labels)
    assert [pair.image.name for pair in found.pairs] == sorted(names)
    assert all(pair.image.name == pair.labels.name for pair in found.pairs)
    assert not found.notes
    fill(tmp_path / "ome", "a.ome.tif"), fill(tmp_path / "png", "a.png")
    for places in (("ome", "png"), ("png", "ome")):
        assert len(find_pairs(*(tmp_path / p for p in places)).pairs) == 1


def test_label_suffix_overrides(tmp_path):
    images = fill(tmp_path / "i", "a.png", "b.png")
    labels = fill(tmp_path / "l", *(f"{x}{y}.png" for x in "ab" for y in ("_cells", "_mask", "")))
    found = find_pairs(images, labels, Reading(label_suffix="_cells"))
    assert [pair.labels.name for pair in found.pairs] == ["a_cells.png", "b_cells.png"]
    assert not found.notes
    message = re.escape(
        f"{labels}: names of labels must end in '_nuclei', the label suffix, before"
    )
    with pytest.raises(ValueError, match=message):
        find_pairs(images, labels, Reading(label_suffix="_nuclei"))
    (labels / "b_cells.png").unlink()
    with pytest.raises(ValueError, match=r"partner of .*b\.png, .*\(--skip-unlabelled leaves"):
        find_pairs(images, labels, Reading(label_suffix="_cells"))


def test_names_that_do_not_pair(tmp_path):
    images, labels = fill(tmp_path / "i", "a.png", "b.png"), fill(tmp_path / "l", "a_mask.png")
    with pytest.raises(ValueError, match=r"partner of .*b\.png, got none of that name \(--skip"):
        find_pairs(images, labels)
    found = find_pairs(images, labels, Reading(skip_unlabelled=True))
    assert shown(found.pairs) == [("a", "a.png", "a_mask.png")]
    assert "images without labels, left out: 1 of 2" in found.notes
    fill(labels, "c.png")
    with pytest.raises(ValueError, match=r"i: must hold a partner of .*c\.png, got none"):
        find_pairs(images, labels, Reading(skip_unlabelled=True))
    fill(tmp_path / "x", "a.png"), fill(tmp_path / "y", "z.png")
    found = match(tmp_path / "x", tmp_path / "y")
    assert not found.pairs
    assert [f.name for f in found.unlabelled + found.strays] == ["a.png", "z.png"]
    with pytest.raises(ValueError, match=r"labels of the images in .*, got none"):
        find_pairs(images, images, Reading(skip_unlabelled=True))  # one folder, no suffix


def test_a_suffix_that_is_not_found_is_offered(tmp_path):
    images = fill(tmp_path / "i", "a.png", "b.png", "c.png", "1.png")
    labels = fill(tmp_path / "l", "a-xyz.png", "b-xyz.tif", "c z.png", "10.png")
    with pytest.raises(ValueError, match=r"partner of .*, --label-suffix -xyz pairs 2 images\)"):
        find_pairs(images, labels)
    assert len(find_pairs(images, labels, Reading("-xyz", skip_unlabelled=True)).pairs) == 2
    fill(images, "a z.png", "b z.png", "c z.png", "1 z.png")
    with pytest.raises(ValueError, match=r"--label-suffix ' z' pairs 4 images\)"):
        find_pairs(images, images)
    fill(tmp_path / "o", "10.png", "20.png")
    assert match(images, tmp_path / "o").hint == "--label-suffix says how names of labels end"


def test_images_among_labels_are_no_labels(tmp_path):
    images = fill(tmp_path / "i", "a.png", "b.png")
    labels = fill(tmp_path / "l", "a.png", "b.png", "a_mask.png", "b_mask.png")
    assert [p.labels.name for p in match(images, labels).pairs] == ["a_mask.png", "b_mask.png"]


def test_nested_folders(tmp_path):
    images = fill(tmp_path / "i", "one/a.png", "two/a.png", ".hidden/a.png", "c.png")
    labels = fill(images / "labels", "one/a_mask.png", "two/a_mask.png", "c_mask.png")
    found = find_pairs(images, labels, Reading(recursive=True))
    assert [pair.name for pair in found.pairs] == ["c", "one/a", "two/a"]
    assert all(pair.labels.parent.name == pair.image.parent.name for pair in found.pairs[1:])
    (images / "c.png").unlink()
    with pytest.raises(
        ValueError, match="got none: there are images in nested folders, which --re"
    ):
        find_pairs(images, labels)
    fill(images, "one/a.tif")
    with pytest.raises(ValueError, match=r"unique without suffix, got a\.png and a\.tif"):
        find_pairs(images, labels, Reading(recursive=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.czi", "b.CZI", "c.czi"],
            "found 3 .czi files, which must be exported as TIFF (e.g. in",
        ),
        (["a.lif"], "found 1 .lif file, which must be exported as TIFF"),
        (["a.webp", "a.gif"], "found 1 .gif file, 1 .webp file, which must be converted to PNG"),
        (["a.npy"], "found 1 .npy file, which must be saved as TIFF (e.g. in Python: tifffile."),
        (
            ["a_seg.npy"],
            "found 1 _seg.npy file, which must be saved as PNG or TIFF in Cellpose (",
        ),
    ],
)
def test_formats_that_are_not_read_have_a_way_out(tmp_path, names, message):
    folder = fill(tmp_path / "f", *names)
    with pytest.raises(ValueError, match=r"must hold images .*, got none: " + re.escape(message)):
        list_sources(folder)
    fill(folder, "z.png", "notes.txt")
    with pytest.warns(UserWarning, match=re.escape(f"{folder}: {message}")) as told:
        assert list_sources(folder) == [folder / "z.png"]
    assert len(told) == 1
    fill(tmp_path / "l", "z.png")
    assert len(find_pairs(folder, tmp_path / "l").left_out) == len(told)


def test_outlines_are_labels(tmp_path):
    images = fill(tmp_path / "i", "a.tif", "b.tif", "c.tif", "d.png")
    fill(tmp_path / "l", "a.zip", "b.geojson", "c.roi", "d.png", "d.json", "all.zip")
    found = find_pairs(images, tmp_path / "l")
    assert [p.labels.name for p in found.pairs] == ["a.zip", "b.geojson", "c.roi", "d.png"]
    fill(tmp_path / "m", *(f"{name}_RoiSet.zip" for name in "abcd"))
    assert len(find_pairs(images, tmp_path / "m").pairs) == 4
    (images / "d.png").unlink()
    fill(images, "a.zip", "b.geojson", "c_RoiSet.roi", "metadata.json", "c.json")
    with pytest.raises(ValueError, match=r"partner of .*c\.tif"):  # two ways of naming
        find_pairs(images, images)
    (images / "c_RoiSet.roi").rename(images / "c.roi")
    found = find_pairs(images, images)  # one folder
    assert [p.labels.name for p in found.pairs] == ["a.zip", "b.geojson", "c.roi"]
    assert not found.left_out


def test_a_folder_of_masks_for_each_image(tmp_path):
    """As in the Data Science Bowl of 2018: no suffix is offered, which would leave cells out."""
    for name in (
        "images/a.png",
        "images/b.png",
        *(f"labels/{x}/{i}.png" for x in "ab" for i in (1, 2)),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("flat/a_1.png", "flat/b_1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert match(tmp_path / "images", tmp_path / "flat").hint == SUFFIX_HINT
    with pytest.raises(ValueError, match="a folder of masks for each image: number their objects"):
        find_pairs(tmp_path / "images", tmp_path / "labels", Reading(recursive=True))
