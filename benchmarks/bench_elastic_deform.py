"""elastic_deform against its reference, SciPy, elasticdeform, torch and augmentation libraries.

Image 512 x 512, linear; labels of the same size, nearest; displacements on a 3 x 3 grid. Volume
128 x 128 x 128, displacements on a 4 x 4 x 4 grid. SciPy's
formula gives what the package elasticdeform gives, which is timed where it can be imported: as of
its version 0.5.1, where NumPy is older than 2.
"""

import functools
import os

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from unet_fast import elastic_deform, reference

from .interleave import Case, Rival, optional

SIDE = 512
SIGMA = 10.0
BATCH = 16
VOLUME = (128, 128, 128)
FLOAT, BYTES = "512 x 512 and labels", "512 x 512 uint8 and labels"
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it asks its index for a newer one


def sample(n=1, device="cpu", channels=1, dtype=torch.float32, side=SIDE):
    """Image, displacement and labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(n, channels, side, side, generator=generator)
    if not dtype.is_floating_point:
        image = image * torch.iinfo(dtype).max
    displacement = SIGMA * torch.randn(n, 2, 3, 3, generator=generator)
    blobs = torch.arange(side) // 30
    labels = (blobs[:, None] * 18 + blobs).expand(n, side, side).to(torch.int32).contiguous()
    return image.to(dtype).to(device), displacement.to(device), labels.to(device)


def volume_sample(device="cpu", sides=VOLUME):
    """A volume, displacements of a few voxels and labels of cubes."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, *sides, generator=generator)
    displacement = 4 * torch.randn(1, 3, 4, 4, 4, generator=generator)
    blobs = [torch.arange(side) // 10 for side in sides]
    labels = (blobs[0][:, None, None] * 64 + blobs[1][:, None]) * 64 + blobs[2]
    return image.to(device), displacement.to(device), labels[None].to(torch.int32).to(device)


def scipy_positions(displacement, sides):
    """Where each pixel is read, (axes, *sides)."""
    shape = displacement[0].shape
    lines = [np.linspace(0, p - 1, n) for p, n in zip(shape, sides, strict=True)]
    knots = np.stack(np.meshgrid(*lines, indexing="ij"))
    field = [ndimage.map_coordinates(d, knots, order=3, mode="mirror") for d in displacement]
    return np.indices(sides) + np.stack(field)


def scipy_deform(image, displacement, labels):
    """The field once, for both."""
    position = scipy_positions(displacement, image.shape)
    return (
        ndimage.map_coordinates(image, position, order=1, mode="mirror"),
        ndimage.map_coordinates(labels, position, order=0, mode="mirror"),
    )


def grid_sample_rival(image, displacement, labels):
    """Two calls of grid_sample with the field at hand; of one volume."""
    sides = image.shape[2:]
    position = torch.from_numpy(scipy_positions(displacement[0].cpu().numpy(), sides))
    scale = torch.tensor([2 / (side - 1) for side in sides])
    grid = (position.movedim(0, -1) * scale - 1).flip(-1)[None].to(image)
    options = {"padding_mode": "reflection", "align_corners": True}
    ids = labels[:, None].float()

    def run():
        moved = functional.grid_sample(image, grid, mode="bilinear", **options)
        return moved, functional.grid_sample(ids, grid, mode="nearest", **options)

    return Rival("torch grid_sample, its field at hand", run)


def monai_volume_rival(image, labels):
    transforms, name = optional("monai.transforms"), "MONAI Rand3DElasticd"
    if transforms is None:
        return Rival(name, None)
    transform = transforms.Rand3DElasticd(
        ("image", "labels"),
        sigma_range=(5, 5),
        magnitude_range=(100, 100),
        prob=1,
        mode=("bilinear", "nearest"),
        padding_mode="reflection",
        device=image.device,
    )
    pair = {"image": image[0], "labels": labels.float()}
    return Rival(name, lambda: transform(pair), "monai")


def torchio_rival(image, labels):
    torchio, name = optional("torchio"), "TorchIO RandomElasticDeformation"
    if torchio is None:
        return Rival(name, None)
    transform = torchio.RandomElasticDeformation(num_control_points=7, max_displacement=7)
    subject = torchio.Subject(
        image=torchio.ScalarImage(tensor=image[0]), labels=torchio.LabelMap(tensor=labels)
    )
    return Rival(name, lambda: transform(subject), "torchio")


def torch_deform(image, displacement, labels):
    """Bicubic upsampling of the grid and two calls of grid_sample."""
    side = image.shape[-1]
    field = functional.interpolate(displacement, (side, side), mode="bicubic", align_corners=True)
    axis = torch.arange(side, dtype=torch.float32, device=image.device)
    position = field + torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    grid = position.flip(1).permute(0, 2, 3, 1) * (2 / (side - 1)) - 1
    options = {"padding_mode": "reflection", "align_corners": True}
    moved = functional.grid_sample(image, grid, mode="bilinear", **options)
    ids = functional.grid_sample(labels[:, None].float(), grid, mode="nearest", **options)
    return moved, ids[:, 0].to(labels.dtype)


def opencv_deform(cv2, displacement, side=SIDE):
    """At its best: the identity, and labels in a type that it takes, are made beforehand."""
    axis = np.arange(side, dtype=np.float32)
    rows, columns = np.meshgrid(axis, axis, indexing="ij")

    def run(image, labels):
        y, x = (cv2.resize(d, (side, side), interpolation=cv2.INTER_CUBIC) for d in displacement)
        cv2.add(x, columns, x)
        cv2.add(y, rows, y)
        border = cv2.BORDER_REFLECT_101
        return (
            cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=border),
            cv2.remap(labels, x, y, cv2.INTER_NEAREST, borderMode=border),
        )

    return run


def check(device):
    image, displacement, labels = sample(device=device)
    ours = elastic_deform(image, displacement, labels=labels)
    theirs = reference.elastic_deform(image, displacement, labels=labels)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)
    assert (ours[1] == theirs[1]).double().mean() > 0.9999
    if device.type == "cpu":
        moved, ids = scipy_deform(image[0, 0].numpy(), displacement[0].numpy(), labels[0].numpy())
        torch.testing.assert_close(ours[0][0, 0], torch.from_numpy(moved), rtol=0, atol=1e-3)
        assert (ours[1][0].numpy() == ids).mean() > 0.999
    ours = elastic_deform(image, displacement, labels=labels, grid="keys")
    theirs = torch_deform(image, displacement, labels)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-3)
    assert (ours[1] == theirs[1]).double().mean() > 0.999


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("function", [elastic_deform, reference.elastic_deform])
def bench_elastic_deform(benchmark, device, timed, function, order):
    check(device)
    image, displacement, labels = sample(device=device)
    benchmark.name = f"{'unet_fast' if function is elastic_deform else 'reference'}, order {order}"
    benchmark.group = f"elastic deformation, {FLOAT}, {device}"
    timed(lambda: function(image, displacement, labels=labels, order=order))


def scipy_rival(image, displacement, labels):
    name = "SciPy, equal to elasticdeform"
    arrays = image[0, 0].numpy(), displacement[0].numpy(), labels[0].numpy()
    return Rival(name, lambda: scipy_deform(*arrays), "scipy")


def opencv_rival(image, displacement, labels):
    cv2, name = optional("cv2"), "OpenCV resize + remap"
    if cv2 is None:
        return Rival(name, None)
    cv2.setNumThreads(torch.get_num_threads())
    run = opencv_deform(cv2, displacement[0].numpy(), image.shape[-1])
    plane, ids = image[0, 0].numpy(), labels[0].numpy().astype(np.int16)
    return Rival(name, lambda: run(plane, ids), "opencv-python-headless")


def elasticdeform_rival(image, displacement, labels, order=1):
    package, name = optional("elasticdeform"), f"elasticdeform, order {order}"
    if package is None:
        return Rival(name, None)
    planes, knots = [image[0, 0].numpy(), labels[0].numpy()], displacement[0].numpy()
    return Rival(
        name,
        lambda: package.deform_grid(planes, knots, order=[order, 0], mode="mirror"),
        "elasticdeform",
    )


def batchgenerators_rival(image, labels):
    sides = image.shape[2:]
    name = "batchgeneratorsv2 SpatialTransform"
    spatial = optional("batchgeneratorsv2.transforms.spatial.spatial")
    if spatial is None:
        return Rival(name, None)
    transform = spatial.SpatialTransform(
        sides,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=1,
        elastic_deform_scale=(0.3, 0.3),
        elastic_deform_magnitude=(0.05, 0.05),
        p_rotation=0,
        p_scaling=0,
        mode_seg="nearest",
    )
    return Rival(
        name, lambda: transform(image=image[0], segmentation=labels[:1]), "batchgeneratorsv2"
    )


def monai_rival(image, labels):
    """Image by image; labels by the nearest pixel."""
    transforms, name = optional("monai.transforms"), "MONAI Rand2DElasticd"
    if transforms is None:
        return Rival(name, None)
    transform = transforms.Rand2DElasticd(
        ("image", "labels"),
        spacing=(SIDE / 2, SIDE / 2),
        magnitude_range=(SIGMA, SIGMA),
        prob=1,
        mode=("bilinear", "nearest"),
        padding_mode="reflection",
        device=image.device,
    )
    pairs = [
        {"image": plane, "labels": ids}
        for plane, ids in zip(image, labels[:, None].float(), strict=True)
    ]
    return Rival(name, lambda: [transform(pair) for pair in pairs], "monai")


def kornia_rival(image):
    """Smooths noise of the size of the image; its labels would take a second call."""
    kornia, name = optional("kornia.geometry.transform"), "kornia elastic_transform2d, image only"
    if kornia is None:
        return Rival(name, None)
    noise = torch.rand(len(image), 2, SIDE, SIDE, device=image.device) * 2 - 1
    run = functools.partial(kornia.elastic_transform2d, image, noise, (63, 63), (32.0, 32.0))
    return Rival(name, run, "kornia")


def albumentations_rivals(image, labels):
    """Of bytes, which are its best case."""
    names = "albumentations ElasticTransform", "albumentations GridElasticDeform"
    package = optional("albumentations")
    if package is None:
        return [Rival(name, None) for name in names]
    transforms = (
        package.ElasticTransform(alpha=300, sigma=50, approximate=True, p=1),
        package.GridElasticDeform(num_grid_xy=(2, 2), magnitude=10, p=1),
    )
    plane, ids = image[0, 0].numpy(), labels[0].numpy()
    return [
        Rival(name, functools.partial(transform, image=plane, mask=ids), "albumentations")
        for name, transform in zip(names, transforms, strict=True)
    ]


def moved(image, labels):
    """Bytes read and written."""
    return 2 * sum(x.numel() * x.element_size() for x in (image, labels))


def cases(device, peers):
    check(device)
    n = 1 if device.type == "cpu" else BATCH
    parts = image, displacement, labels = sample(n, device)
    name = FLOAT if n == 1 else f"{n} of {FLOAT}"
    run = functools.partial(elastic_deform, image, displacement, labels=labels)
    plain = functools.partial(reference.elastic_deform, image, displacement, labels=labels)
    rivals = [
        Rival("reference", plain),
        Rival("torch grid_sample", functools.partial(torch_deform, *parts)),
    ]
    if n == 1:
        rivals.append(scipy_rival(*parts))
    if peers:
        if n == 1:
            rivals += [elasticdeform_rival(*parts), opencv_rival(*parts)]
            rivals.append(batchgenerators_rival(image, labels))
        rivals += [monai_rival(image, labels), kornia_rival(image)]
    yield Case(name, "elastic_deform", run, rivals, moved=moved(image, labels))
    cubic = functools.partial(run, order=3)
    rivals = [elasticdeform_rival(*parts, order=3)] if peers and n == 1 else []
    yield Case(f"{name}, order 3", "elastic_deform", cubic, rivals, moved=moved(image, labels))
    if n == 1:
        image, displacement, labels = sample(dtype=torch.uint8)
        labels = labels.to(torch.uint8)
        run = functools.partial(elastic_deform, image, displacement, labels=labels)
        rivals = albumentations_rivals(image, labels) if peers else []
        yield Case(BYTES, "elastic_deform", run, rivals, moved=moved(image, labels))
    yield from volume_cases(device, peers)


def volume_cases(device, peers):
    """One volume, at the order of an image and of labels, and at that of weight maps."""
    parts = image, displacement, labels = volume_sample(device)
    small = volume_sample(device, (20, 30, 40))
    ours = elastic_deform(small[0], small[1], labels=small[2])
    plain = reference.elastic_deform(small[0], small[1], labels=small[2])
    sampled = grid_sample_rival(*small).function()
    for moved_, ids in (plain, (sampled[0], sampled[1][:, 0].to(torch.int32))):
        torch.testing.assert_close(ours[0], moved_, rtol=0, atol=1e-3)
        assert (ours[1] == ids).double().mean() > 0.999
    rivals = [grid_sample_rival(*parts)]
    if device.type == "cpu":
        rivals.append(scipy_rival(*parts))
    if peers:
        rivals += [monai_volume_rival(image, labels)]
        if device.type == "cpu":
            rivals += [elasticdeform_rival(*parts), torchio_rival(image, labels)]
            rivals.append(batchgenerators_rival(image, labels))
    name = f"{' x '.join(map(str, VOLUME))} and labels"
    run = functools.partial(elastic_deform, image, displacement, labels=labels)
    size = moved(image, labels)
    yield Case(name, "elastic_deform", run, rivals, moved=size, memory=True)
    cubic = functools.partial(run, order=3)
    yield Case(f"{name}, order 3", "elastic_deform", cubic, moved=size)


def growth(device, peers):
    """Against pixels, channels and batch."""
    series = {
        "pixels": [(s * s, {"side": s}) for s in (256, 512, 1024, 2048, 4096)],
        "channels": [(c, {"side": 256, "channels": c}) for c in (1, 2, 4, 8, 16)],
        "batch": [(n, {"side": 256, "n": n}) for n in (1, 2, 4, 8, 16, 32)],
    }
    for axis, points in series.items():
        for x, shape in points:
            parts = image, displacement, labels = sample(device=device, **shape)
            rivals = [Rival("torch grid_sample", functools.partial(torch_deform, *parts))]
            if axis == "pixels" and device.type == "cpu":
                rivals.append(scipy_rival(*parts))
                if peers:
                    rivals.append(opencv_rival(*parts))
            run = functools.partial(elastic_deform, image, displacement, labels=labels)
            name = "x".join(map(str, image.shape))
            size = moved(image, labels)
            yield Case(name, "elastic_deform", run, rivals, moved=size, axis=axis, x=x)
