"""The transforms for MONAI: what they do to samples and batches, and how it is undone."""

import pickle
import re
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from peers import EXAMPLES, needs, run_page

from unet_fast import Augmentation, BorderWeights, weighted_ce

needs("monai")
from monai.data import (  # noqa: E402
    CacheDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    decollate_batch,
    set_track_meta,
)
from monai.transforms import (  # noqa: E402
    AsDiscreted,
    Compose,
    EnsureTyped,
    Flipd,
    Invertd,
    allow_missing_keys_mode,
)
from monai.utils import set_determinism  # noqa: E402

from unet_fast.integrations.monai import BorderWeightsd, ElasticDeformd  # noqa: E402

SHAPES = {2: (96, 88), 3: (24, 40, 36)}
AFFINE = torch.diag(torch.tensor([0.5, 0.7, 2.0, 1.0], dtype=torch.float64))
MILD = {  # its fields can be undone, and leave most of a sample in sight
    2: Augmentation(sigma=3.0, rotation=20.0),
    3: Augmentation(sigma=1.5, rotation=10.0),
}


def smooth(shape, channels=1):
    """Waves, which are interpolated well."""
    axes = torch.meshgrid(*[torch.arange(float(side)) for side in shape], indexing="ij")
    waves = [sum(torch.sin(x / 7 + i + c) for i, x in enumerate(axes)) for c in range(channels)]
    return torch.stack(waves) / (2 * len(shape)) + 0.5


def blocks(shape):
    """Cubes, each with a number of its own, that touch; some are background."""
    axes = torch.meshgrid(*[torch.arange(side) // 12 for side in shape], indexing="ij")
    ids = 1 + sum(x * 10**i for i, x in enumerate(axes))
    return (ids * (sum(axes) % 3 > 0))[None].to(torch.int32)


def sample(dims, **more):
    image = MetaTensor(smooth(SHAPES[dims]), affine=AFFINE.clone(), meta={"name": "a"})
    return {"image": image, "label": MetaTensor(blocks(SHAPES[dims]), affine=AFFINE), **more}


def deform(dims, seed=0, **settings):
    settings = {"label_keys": "label", "augmentation": MILD[dims]} | settings
    keys = settings.pop("keys", "image")
    return ElasticDeformd(keys, spatial_dims=dims, **settings).set_random_state(seed)


def drawn(transform, n, shape, seed=0):
    """The parameters that a transform draws with this seed."""
    again = pickle.loads(pickle.dumps(transform)).set_random_state(seed)
    return again.randomize(n, shape)


def batch_of(dims, n=3):
    items = [sample(dims) for _ in range(n)]
    return next(iter(DataLoader(Dataset(items), batch_size=n)))


def inner(dims):
    return (..., *[slice(side // 5, -(side // 5)) for side in SHAPES[dims]])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_sample_is_deformed_as_augmentation_does(dims):
    given = sample(dims, second=smooth(SHAPES[dims], 2).numpy(), other=blocks(SHAPES[dims]).long())
    before = {key: torch.as_tensor(x).clone() for key, x in given.items()}
    transform = deform(dims, keys=["image", "second"], label_keys=["label", "other"])
    result = transform(given)
    chosen, parameters = drawn(transform, 1, (3, *SHAPES[dims]))
    assert chosen == [0]
    images = torch.cat([before["image"], before["second"]])
    labels = torch.cat([before["label"], before["other"].int()])
    moved, ids = transform.augmentation.apply(images[None], labels[None], parameters)
    assert torch.equal(torch.cat([result["image"], result["second"]]), moved[0])
    assert torch.equal(result["label"], ids[0, :1])
    assert torch.equal(result["other"], ids[0, 1:].long())
    assert not torch.equal(result["image"], before["image"])
    for key, x in given.items():  # what was given stays
        assert torch.equal(torch.as_tensor(x), before[key])
        assert not getattr(x, "applied_operations", [])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_batch_is_deformed_as_augmentation_does(dims):
    batch = batch_of(dims)
    transform = deform(dims)
    result = transform(batch)
    _, parameters = drawn(transform, 3, (1, *SHAPES[dims]))
    plain = batch["image"].as_tensor(), batch["label"].as_tensor()
    moved, ids = transform.augmentation.apply(*plain, parameters)
    assert torch.equal(result["image"], moved)
    assert torch.equal(result["label"], ids)
    assert not torch.equal(moved[0], moved[1])
    transform.set_random_state(0)
    without = transform(dict(zip(("image", "label"), plain, strict=True)))
    assert type(without["image"]) is torch.Tensor
    assert torch.equal(without["image"], moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.uint16])
def test_types_and_devices_stay(device, dtype):
    image = (200 * smooth(SHAPES[2])).to(dtype).expand(6, 1, -1, -1).to(device)
    label = blocks(SHAPES[2]).to(torch.uint16).expand(6, 1, -1, -1).to(device)
    transform = deform(2, prob=0.5)
    result = BorderWeightsd("label", spatial_dims=2)(transform({"image": image, "label": label}))
    assert (result["image"].dtype, result["label"].dtype) == (dtype, torch.uint16)
    assert all(x.device == image.device for x in result.values())
    chosen, _ = drawn(transform, 6, (1, *SHAPES[2]))
    assert 0 < len(chosen) < 6
    for i in range(6):
        for key, x in (("image", image), ("label", label)):
            assert torch.equal(result[key][i].long(), x[i].long()) == (i not in chosen)


@pytest.mark.parametrize("batched", [False, True])
def test_metadata_stay(batched):
    given = batch_of(2) if batched else sample(2)
    result = BorderWeightsd("label", spatial_dims=2)(deform(2)(given))
    assert set(result) == {"image", "label", "label_target", "label_weights"}
    for key, x in result.items():
        assert isinstance(x, MetaTensor)
        assert x.shape == given["image"].shape
        assert torch.equal(x.affine, given["image"].affine)
        assert x.is_batch == batched
        for one in decollate_batch(x) if batched else [x]:
            assert torch.equal(one.affine, AFFINE)
            assert [step["class"] for step in one.applied_operations] == ["ElasticDeformd"], key
    assert result["image"].meta["name"] == (["a"] * 3 if batched else "a")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_inverse(dims, batched, device):
    given = {k: x.to(device) for k, x in (batch_of(dims) if batched else sample(dims)).items()}
    still = replace(MILD[dims], gray_black=(0, 0), gray_white=(1, 1), gray_slope=(1, 1))
    transform = deform(dims, augmentation=still)
    result = transform(given)
    back = transform.inverse(result)
    assert back["image"].device == given["image"].device
    here = inner(dims)
    assert (back["image"] - given["image"])[here].abs().max() < 0.01
    assert (result["image"] - given["image"])[here].abs().max() > 0.08
    assert (back["label"] == given["label"])[here].float().mean() > 0.97
    assert (result["label"] == given["label"])[here].float().mean() < 0.9
    for x in back.values():
        assert not any(x.applied_operations)
        assert torch.equal(x.affine, given["image"].affine)


def test_inverse_of_a_field_that_folds():
    transform = deform(2, augmentation=Augmentation(sigma=40.0))
    with pytest.raises(ValueError, match="undo: the deformation must not fold"):
        transform.inverse(transform(sample(2)))


def test_inverse_of_another_shape_or_untraced():
    transform = deform(2)
    result = transform(sample(2))["image"]
    smaller = MetaTensor(result[:, :80]).copy_meta_from(result)
    said = r"'image' must have the spatial shape that was deformed, \(96, 88\), got \(80, 88\)"
    with allow_missing_keys_mode(transform):
        with pytest.raises(ValueError, match=said):
            transform.inverse({"image": smaller})
        with pytest.raises(ValueError, match="empty 'applied_operations'"):
            transform.inverse({"image": result.as_tensor()})


@pytest.mark.parametrize("dims", [2, 3])
def test_a_prediction_is_put_back_in_place(dims):
    """As in MONAI: the batch of predictions is taken apart, and Invertd undoes all transforms."""
    transform = Compose(
        [EnsureTyped(["image", "label"]), Flipd(["image", "label"], 1), deform(dims)]
    )
    loader = DataLoader(Dataset([sample(dims) for _ in range(2)], transform), batch_size=2)
    batch = next(iter(loader))
    batch["pred"] = torch.cat([batch["label"] > 0, batch["label"] == 0], 1)
    batch["float"] = batch["pred"].float()
    linear = Invertd("float", transform, orig_keys="image", nearest_interp=False)
    nearest = Invertd(["pred", "label"], transform, orig_keys=["image", "label"])
    for one in map(Compose([nearest, linear]), decollate_batch(batch)):
        truth = sample(dims)["label"] > 0
        assert one["pred"].dtype == torch.bool
        assert (one["pred"][:1] == truth)[inner(dims)].float().mean() > 0.97
        assert ((one["float"][:1] > 0.5) == truth)[inner(dims)].float().mean() > 0.97
        assert 0.05 < ((one["float"] > 0) & (one["float"] < 1)).float().mean() < 1
        assert set(one["label"].unique().tolist()) <= set(blocks(SHAPES[dims]).unique().tolist())


def test_compose_undoes_all():
    still = replace(MILD[2], gray_black=(0, 0), gray_white=(1, 1), gray_slope=(1, 1))
    steps = [deform(2, augmentation=still), Flipd(["image", "label"], 0)]
    transform = Compose([*steps, BorderWeightsd("label", spatial_dims=2)])
    given = sample(2)
    back = transform.inverse(transform(given))
    assert (back["image"] - given["image"])[inner(2)].abs().max() < 0.02
    assert (back["label"] == given["label"])[inner(2)].float().mean() > 0.97


def test_random_state():
    transform = Compose([deform(2), BorderWeightsd("label", spatial_dims=2)])
    results = [transform.set_random_state(seed)(sample(2)) for seed in (1, 1, 2)]
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key])
        assert not torch.equal(results[0][key], results[2][key])
    assert not torch.equal(transform(sample(2))["image"], results[2]["image"])  # it goes on


def test_set_determinism():
    results = []
    for seed in (7, 7, 8):
        set_determinism(seed)
        results.append(Compose([ElasticDeformd("image", spatial_dims=2)])(sample(2))["image"])
    set_determinism(None)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_workers_draw_different_numbers():
    data = CacheDataset([sample(2) for _ in range(4)], deform(2), progress=False)
    results = []
    for _ in range(2):
        data.transform.set_random_state(0)
        torch.manual_seed(0)
        loader = DataLoader(data, batch_size=2, num_workers=2)
        results.append(torch.cat([batch["image"].as_tensor() for batch in loader]))
    assert torch.equal(*results)
    assert len({x.sum().item() for x in results[0]}) == 4


def test_some_or_none_are_deformed():
    given = sample(2)
    never = deform(2, prob=0)
    result = never(given)
    assert torch.equal(result["image"], given["image"])
    assert torch.equal(never.inverse(result)["label"], given["label"])
    sometimes = deform(2, prob=0.5)
    batch = batch_of(2, 8)
    result = sometimes(batch)
    chosen, _ = drawn(sometimes, 8, (1, *SHAPES[2]))
    assert 0 < len(chosen) < 8
    done = [one[-1]["do_transforms"] for one in result["image"].applied_operations]
    assert done == [i in chosen for i in range(8)]
    back = sometimes.inverse(result)["label"]
    for i in range(8):
        assert torch.equal(result["image"][i], batch["image"][i]) == (i not in chosen)
        assert torch.equal(back[i], batch["label"][i]) == (i not in chosen)


def test_keys_that_are_missing():
    alone = {"label": sample(2)["label"]}
    with pytest.raises(KeyError, match="image"):
        deform(2)(alone)
    for make in (deform(2, allow_missing_keys=True), deform(2, keys=())):
        assert not torch.equal(make(alone)["label"], alone["label"])
    assert deform(2, allow_missing_keys=True)({"a": 1}) == {"a": 1}
    weigh = BorderWeightsd(["label", "other"], spatial_dims=2, allow_missing_keys=True)
    assert set(weigh(alone)) == {"label", "label_target", "label_weights"}


def test_without_metadata():
    set_track_meta(False)
    try:
        result = BorderWeightsd("label", spatial_dims=2)(deform(2)(sample(2)))
    finally:
        set_track_meta(True)
    assert {type(x) for x in result.values()} == {torch.Tensor}
    assert torch.equal(result["image"], deform(2)(sample(2))["image"])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_weights(dims, batched):
    given = batch_of(dims) if batched else sample(dims)
    weights = BorderWeights(sigma=3.0).balanced(blocks(SHAPES[dims]), dims=dims)
    result = BorderWeightsd("label", spatial_dims=dims, weights=weights)(given)
    target, expected = weights(blocks(SHAPES[dims]), dims=dims)
    shape = given["label"].shape
    assert torch.equal(result["label_target"], target.expand(shape))
    assert torch.equal(result["label_weights"], expected.expand(shape))
    logits = torch.zeros(len(result["label"]), 2, *SHAPES[dims])
    if batched:
        assert weighted_ce(logits, result["label_target"], result["label_weights"]).isfinite()


def test_weights_of_several_classes():
    ids = blocks(SHAPES[2])
    of_ids = {int(i): 1 + int(i) % 2 for i in ids.unique() if i}
    of_pixels = torch.where(ids > 0, 1 + ids % 2, 0)
    given = {"cells": ids, "kind": of_pixels.to(torch.uint8), "more": ids}
    weights = BorderWeights.paper_2015()
    expected = weights(ids, of_ids, num_classes=3)
    settings = {"spatial_dims": 2, "num_classes": 3}
    by_id = BorderWeightsd("cells", classes=of_ids, target_postfix="t", **settings)(given)
    by_pixel = BorderWeightsd(["cells", "more"], classes=["kind", "kind"], **settings)(given)
    for target, weight in (("cells_t", "cells_weights"),):
        assert torch.equal(by_id[target], expected[0])
        assert torch.equal(by_id[weight], expected[1])
    for key in ("cells", "more"):
        assert torch.equal(by_pixel[f"{key}_target"], expected[0])
        assert torch.equal(by_pixel[f"{key}_weights"], expected[1])


GOOD = sample(2)
WRONG = [
    (
        {"label": GOOD["label"].float()},
        r"'label' must be integer, got torch.float32 \(EnsureTyped\('label', dtype=torch.int32\)",
    ),
    ({"label": GOOD["label"] > 0}, "'label' must be integer, got torch.bool"),
    (
        {"label": torch.zeros(3, 96, 88)},
        r"'label' must have one channel, of a number for each object, got \(3, 96, 88\) "
        r"\(AsDiscreted\('label', argmax=True, dtype=torch.int32\)",
    ),
]
WRONG_TOGETHER = [
    (
        {"label": GOOD["label"][:, :80]},
        r"'label' must have the shape of 'image' except for channels, \(1, 96, 88\), got "
        r"\(1, 80, 88\)",
    ),
    (
        {"label": GOOD["label"][None]},
        r"'label' must have the shape of 'image' except .* got \(1, 1, 96, 88\)",
    ),
    (
        {"image": torch.zeros(96, 88)},
        r"'image' must be \(C, H, W\) or a batch, \(N, C, H, W\), got \(96, 88\)",
    ),
    ({"image": "a.png"}, r"'image' must be \(C, H, W\) or a batch, .*, got str"),
    (
        {"image": torch.zeros(1, 96, 88, dtype=torch.int32)},
        "'image' must be floating point, uint8 or uint16, got torch.int32 ",
    ),
]


@pytest.mark.parametrize(("change", "said"), WRONG + WRONG_TOGETHER)
def test_bad_input_of_elastic_deform(change, said):
    with pytest.raises((TypeError, ValueError), match=f"^ElasticDeformd: {said}") as caught:
        deform(2)(GOOD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_bad_input_of_border_weights(change, said):
    with pytest.raises((TypeError, ValueError), match=f"^BorderWeightsd: {said}") as caught:
        BorderWeightsd("label", spatial_dims=2)(GOOD | change)
    assert "\n" not in str(caught.value)


def test_bad_settings():
    for make in (ElasticDeformd, BorderWeightsd):
        with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 4"):
            make("label", spatial_dims=4)
        with pytest.raises(TypeError, match="spatial_dims"):  # a volume may look like a batch
            make("label")
    with pytest.raises(ValueError, match=r"classes must be a mapping or 2 keys, .* got 'kind'"):
        BorderWeightsd(["a", "b"], spatial_dims=2, classes="kind")
    given = {"label": GOOD["label"], "kind": GOOD["label"][:, :9]}
    with pytest.raises(ValueError, match="'kind' must have the shape of 'label' except"):
        BorderWeightsd("label", spatial_dims=2, classes="kind")(given)


def test_what_messages_advise_helps():
    hot = torch.nn.functional.one_hot(GOOD["label"][0].long()).movedim(-1, 0).float()
    mended = AsDiscreted("label", argmax=True, dtype=torch.int32)({"label": hot})
    assert torch.equal(deform(2, keys=())(mended)["label"], deform(2)(GOOD)["label"])
    mended = EnsureTyped("label", dtype=torch.int32)({"label": GOOD["label"].float()})
    assert torch.equal(deform(2, keys=())(mended)["label"], deform(2)(GOOD)["label"])


def test_pickles():
    for transform in (deform(2), BorderWeightsd("label", spatial_dims=2)):
        again = pickle.loads(pickle.dumps(transform))
        one, two = transform(sample(2)), again(sample(2))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("monai.md")
    assert names["loss"].isfinite()
    assert [x.shape for x in names["predictions"]] == [(2, 128, 128)] * 2


def test_example(capsys, monkeypatch):
    path = EXAMPLES / "monai_training.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "2"])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"step 2: loss \d", printed)
    assert re.search(r"objects found: \d+ of \d+", printed)
