"""What operators take: tensors and NumPy arrays, with and without axes of one; and what they give
back: the same."""

import io
import re

import numpy as np
import pytest
import torch

import unet_fast as u
from unet_fast import Augmentation, BorderWeights, reference

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, (2, 12, 10)).astype(np.int32)
LOGITS = RNG.normal(size=(2, 3, 12, 10)).astype(np.float32)
TARGET = RNG.integers(0, 3, (2, 12, 10))
WEIGHT = RNG.random((2, 12, 10)).astype(np.float32)
IMAGE = RNG.random((2, 1, 12, 10)).astype(np.float32)
FIELD = RNG.normal(size=(2, 2, 3, 3))

CALLS = {
    "weighted_ce": (lambda m, *x: m.weighted_ce(*x, reduction="none"), (LOGITS, TARGET, WEIGHT)),
    "weighted_mean": (lambda m, *x: m.weighted_ce(*x), (LOGITS, TARGET, WEIGHT)),
    "two_nearest": (lambda m, x: m.two_nearest(x), (LABELS,)),
    "separate_touching": (lambda m, x: m.separate_touching(x), (LABELS,)),
    "border_weight_map": (
        lambda m, x, y: m.border_weight_map(x, foreground=y),
        (LABELS, LABELS > 1),
    ),
    "border_weights": (lambda m, x, y: m.border_weights(x, y), (LABELS, LABELS % 3)),
    "elastic_deform": (
        lambda m, x, y, z: m.elastic_deform(x, y, labels=z),
        (IMAGE, FIELD, LABELS),
    ),
}


class Operators:
    """As in :mod:`unet_fast.reference`."""

    def __getattr__(self, name):
        if name == "border_weights":
            return lambda labels, classes: BorderWeights(class_weight=None)(labels, classes)
        return getattr(u, name)


def parts(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("module", [Operators(), reference], ids=["operators", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_arrays_in_arrays_out(module, name):
    call, arrays = CALLS[name]
    if module is reference and name.startswith("weighted"):
        pytest.skip("the reference of the loss takes tensors only")
    expected = parts(call(module, *map(torch.from_numpy, arrays)))
    kinds = [lambda x: x, lambda x: x[..., ::-1].copy()[..., ::-1], read_only, swapped]
    for kind in kinds:
        found = parts(call(module, *map(kind, arrays)))
        for x, y in zip(found, expected, strict=True):
            assert isinstance(x, np.ndarray | np.generic)
            np.testing.assert_array_equal(x, y.numpy(), strict=True)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def swapped(x):
    return x.astype(x.dtype.newbyteorder(">"))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16, np.uint8])
def test_unsigned_labels(dtype):
    for module in (u, reference):
        found = module.separate_touching(LABELS.astype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, u.separate_touching(LABELS))
    high = np.full((3, 3), 2**31, np.uint32)
    with pytest.raises(ValueError, match=r"labels must be in .*, got 2147483648"):
        u.two_nearest(high)


def test_tensors_decide_by_the_first():
    loss = u.weighted_ce(torch.from_numpy(LOGITS), TARGET, WEIGHT)
    assert isinstance(loss, torch.Tensor)


@pytest.mark.parametrize("module", [u, reference], ids=["operators", "reference"])
def test_an_axis_of_one_channel(module):
    x = torch.from_numpy(LABELS)
    for call in (
        lambda x: module.two_nearest(x)[0],
        module.separate_touching,
        module.border_weight_map,
        lambda x: module.two_nearest(x, spacing=(0.5, 2))[1],
    ):
        found = call(x[:, None])
        assert found.shape == (2, 1, 12, 10)
        assert torch.equal(found[:, 0], call(x))
    for shape in ((2, 1, 12, 10), (2, 12, 10)):
        loss = u.weighted_ce(
            torch.from_numpy(LOGITS),
            torch.from_numpy(TARGET).reshape(shape),
            torch.from_numpy(WEIGHT)[:, None],
            reduction="none",
        )
        assert loss.shape == shape


@pytest.mark.parametrize("module", [u, reference], ids=["operators", "reference"])
def test_volumes(module):
    volume = torch.from_numpy(RNG.integers(0, 3, (5, 6, 7)).astype(np.int32))
    expected = module.two_nearest(volume[None, None], dims=3)[1][0, 0]
    for shape, options in (
        ((5, 6, 7), {"dims": 3}),
        ((5, 6, 7), {"spacing": (1.0, 1.0, 1.0)}),
        ((1, 5, 6, 7), {}),
        ((1, 5, 6, 7), {"dims": 3}),
        ((1, 1, 5, 6, 7), {}),
    ):
        found = module.two_nearest(volume.reshape(shape), **options)[1]
        assert found.shape == shape
        assert torch.equal(found.reshape(5, 6, 7), expected)
    slices = module.two_nearest(volume, dims=2)[1]
    assert not torch.equal(slices, expected)
    target, weights = BorderWeights()(volume, dims=3)
    assert (target.shape, weights.shape) == (volume.shape, volume.shape)


def ball():
    z, y, x = np.ogrid[:9, :40, :40]
    centres = ((20, 8), (8, 20), (30, 12), (12, 33), (30, 30))
    volume = np.zeros((9, 40, 40), np.int32)
    for i, (a, b) in enumerate(centres):
        volume[(z - 4) ** 2 + (y - a) ** 2 + (x - b) ** 2 < 30] = i + 1
    return volume


def test_a_batch_that_looks_like_a_volume_is_told():
    with pytest.warns(UserWarning, match=r"labels \(9, 40, 40\) share .*dims=3 takes a volume"):
        u.border_weight_map(ball())
    for dims in (2, 3):
        u.border_weight_map(ball(), dims=dims)
    several = np.stack([np.rot90(ball()[4], k) for k in range(4)])
    u.border_weight_map(several)  # warnings are errors here
    u.border_weight_map(np.repeat(ball()[4:5], 5, 0))  # one image again and again
    u.border_weight_map((ball() > 0).astype(np.uint8))  # masks


@pytest.mark.parametrize("module", [u, reference], ids=["operators", "reference"])
def test_labels_alone_and_several_maps(module):
    field, labels = torch.from_numpy(FIELD), torch.from_numpy(LABELS)
    image, moved = module.elastic_deform(torch.from_numpy(IMAGE), field, labels=labels)
    assert torch.equal(module.elastic_deform(None, field, labels=labels), moved)
    maps = torch.stack([labels, 3 - labels], 1)
    again, both = module.elastic_deform(torch.from_numpy(IMAGE), field, labels=maps)
    assert torch.equal(again, image)
    assert torch.equal(both, torch.stack([moved, 3 - moved], 1))
    assert torch.equal(module.elastic_deform(None, field, labels=maps[:, :1])[:, 0], moved)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, K >= 1, 12, 10\)"):
        module.elastic_deform(torch.from_numpy(IMAGE), field, labels=maps[:, :, 1:])


def test_augmentation_of_one_sample():
    augment = Augmentation.paper_2015()

    def draw(image, labels=None):
        return augment(image, labels, generator=torch.Generator().manual_seed(1))

    image, labels = torch.from_numpy(IMAGE[:1]), torch.from_numpy(LABELS[:1])
    expected = draw(image, labels)
    for x, y in (
        (image[0], labels[0]),
        (image[0, 0], labels[0]),
        (image[0], labels),
        (image, labels[:, None]),
        (image[0].numpy(), labels[0].numpy()),
    ):
        found = draw(x, y)
        for a, b, given in zip(found, expected, (x, y), strict=True):
            assert type(a) is type(given)
            assert a.shape == given.shape
            assert np.array_equal(np.asarray(a).ravel(), b.numpy().ravel())
    assert draw(image[0])[1] is None
    parameters = augment.draw(1, (1, 12, 10), generator=torch.Generator().manual_seed(1))
    nothing, moved = augment.apply(None, labels, parameters)
    assert nothing is None
    assert torch.equal(moved, expected[1])
    with pytest.raises(ValueError, match=r"image must be \(N, C, H, W\).*got list"):
        augment([1])


def test_classes_by_id():
    labels = torch.from_numpy(LABELS)
    expected = BorderWeights()(labels, torch.tensor([0, 1, 2, 1])[labels.long()])
    for classes in ({1: 1, 2: 2, 3: 1}, torch.tensor([0, 1, 2, 1]), np.array([0, 1, 2, 1])):
        assert all(map(torch.equal, BorderWeights()(labels, classes), expected))
        target, weights = reference.border_weights(labels, classes, class_weight="balanced")
        assert torch.equal(target, expected[0])
        torch.testing.assert_close(weights, expected[1])
    with pytest.raises(ValueError, match="classes must have a class for id 3, got none"):
        BorderWeights()(labels, {1: 1, 2: 2})
    with pytest.raises(ValueError, match="a class for each id up to 3, got 3 of them"):
        BorderWeights()(labels, torch.tensor([0, 1, 2]))


def test_the_default_device_changes_nothing():
    image, labels = torch.from_numpy(IMAGE), torch.from_numpy(LABELS)
    net = u.UNet(base_channels=2, depth=1, padding="same")

    def results():
        generator = torch.Generator("cpu").manual_seed(1)
        settings = BorderWeights(class_weight=(1.0, 2.0))
        augment = Augmentation.falk_2019()
        return (
            *augment(image, labels, generator=generator),
            *settings(labels),
            *BorderWeights().balanced([labels])(labels),
            u.border_weight_map(labels),
            u.predict(net, image[0]),
            u.weighted_ce(*map(torch.from_numpy, (LOGITS, TARGET, WEIGHT))),
        )

    expected = results()
    with torch.device("meta"):
        found = results()
    assert all(map(torch.equal, found, expected))


def test_settings_load_without_pickled_code():
    """As torch.load does in trainers that keep settings in their checkpoints."""
    parameters = Augmentation().draw(2, (1, 8, 8))
    config = u.TrainConfig("images", "labels", out="run")
    for value in (parameters, BorderWeights.falk_2019(), Augmentation(), config):
        file = io.BytesIO()
        torch.save({"hyper_parameters": value}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["hyper_parameters"]
        assert type(loaded) is type(value)
        for name in vars(value):
            x, y = getattr(loaded, name), getattr(value, name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_functional_transforms():
    x, t, w = map(torch.from_numpy, (LOGITS, TARGET, WEIGHT))

    def loss(x):
        return u.weighted_ce(x, t, w)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    (second,) = torch.autograd.grad(expected.square().sum(), leaf)
    found = torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    torch.testing.assert_close(found, second)
    each = torch.func.vmap(torch.func.grad(lambda x, t: u.weighted_ce(x[None], t[None])))(x, t)
    for i in range(2):
        one = torch.func.grad(lambda x, i=i: u.weighted_ce(x[None], t[i : i + 1]))(x[i])
        assert torch.equal(each[i], one)


def test_batching_rules():
    labels = torch.from_numpy(np.stack([LABELS, LABELS[::-1]]))
    image, field = torch.from_numpy(np.stack([IMAGE, 1 - IMAGE])), torch.from_numpy(FIELD)
    for call, inputs in (
        (u.two_nearest, (labels,)),
        (u.separate_touching, (labels,)),
        (u.border_weight_map, (labels,)),
        (lambda x, y: u.elastic_deform(x, field, labels=y), (image, labels)),
    ):
        found = parts(torch.func.vmap(call)(*inputs))
        for i in range(2):
            for x, y in zip(found, parts(call(*(x[i] for x in inputs))), strict=True):
                assert torch.equal(x[i], y)
    gradient = torch.func.grad(lambda x: u.elastic_deform(x, field).square().sum())(image[0])
    leaf = image[0].clone().requires_grad_()
    u.elastic_deform(leaf, field).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)


def test_no_pixels_need_no_classes():
    empty = torch.zeros(0, 4, 5, dtype=torch.int32)
    target, weights = BorderWeights()(empty, torch.tensor([0, 1]))
    assert target.shape == weights.shape == (0, 4, 5)


def test_class_weights_of_another_device():
    message = r"border_weights: class_weight must be on cpu or cpu, got meta"
    with pytest.raises(ValueError, match=message):
        reference.border_weights(LABELS, class_weight=torch.ones(2, device="meta"))


@pytest.mark.parametrize("shape", [(4, 5), (1, 1, 1, 1, 4, 5)])
def test_axes_of_labels_alone(shape):
    axes = "(N, H, W), (N, K, H, W) or (N, K, D, H, W)"
    message = f"labels must be {axes}, without an image, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        u.elastic_deform(None, torch.from_numpy(FIELD), labels=torch.zeros(shape).int())
