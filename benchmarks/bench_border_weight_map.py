"""border_weight_map and two_nearest against their references and distance transforms of others.

Rivals that make one distance transform per object compute the two distances only.
"""

import functools

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

from unet_fast import border_weight_map, reference, two_nearest

from .interleave import Case, Rival, optional

CASES = {  # name: arguments of crowded
    "512 x 512, 200 cells": ((512, 512), 200),
    "512 x 512, 2000 cells": ((512, 512), 2000),
    "2048 x 2048, 3200 cells": ((2048, 2048), 3200),
    "2048 x 2048, 8 small cells": ((2048, 2048), 8, 0.02),
}
FEW = "512 x 512, 200 cells"
VOLUMES = (((64,) * 3, 100), ((128,) * 3, 10), ((128,) * 3, 300), ((128,) * 3, 3000))
FLAT = (3.0, 1.0, 1.0)
"""Voxel size of a stack."""
BATCH = 16
FUNCTIONS = {"border_weight_map": border_weight_map, "two_nearest": two_nearest}


def crowded(sides, cells, size=0.45):
    """Round cells around random points, their radius in mean distances; int32.

    Without `size` a good part of them touch.
    """
    generator = np.random.default_rng(0)
    centres = generator.random((cells, len(sides))) * sides
    grid = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1)
    distance, nearest = cKDTree(centres).query(grid, workers=-1)
    radius = size * (np.prod(sides) / cells) ** (1 / len(sides))
    return torch.from_numpy(np.where(distance < radius, nearest + 1, 0).astype(np.int32))


def mosaic(side):
    """Fields of 256 x 256 pixels with 50 cells each, side by side."""
    field = crowded((256, 256), 50)
    count = side // 256
    first = 50 * torch.arange(count**2, dtype=torch.int32).reshape(count, 1, count, 1)
    fields = field.reshape(1, 256, 1, 256)
    return torch.where(fields > 0, fields + first, 0).reshape(side, side).contiguous()


def per_object(transform, labels):
    """The two distances of every pixel by one transform per object, running minima."""
    first, second = np.full((2, *labels.shape), np.inf, dtype=np.float32)
    for label in np.unique(labels[labels > 0]):
        distance = transform(labels != label)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    return first, second


def scipy_per_object(labels):
    function = functools.partial(per_object, ndimage.distance_transform_edt, labels.numpy())
    return Rival("SciPy per object", function, "scipy")


def scipy_once(labels):
    background = labels.numpy() == 0
    name = "a single SciPy transform of the volume"
    return Rival(name, functools.partial(ndimage.distance_transform_edt, background), "scipy")


def edt_per_object(labels):
    edt, name = optional("edt"), "edt per object"
    if edt is None:
        return Rival(name, None)
    transform = functools.partial(edt.edt, parallel=torch.get_num_threads())
    return Rival(name, functools.partial(per_object, transform, labels.numpy()), "edt")


def one_edt(labels, spacing=None):
    edt, name = optional("edt"), "a single edt of the image"
    if edt is None:
        return Rival(name, None)
    background = labels.numpy() == 0
    options = {} if spacing is None else {"anisotropy": spacing}
    function = functools.partial(edt.edt, background, parallel=torch.get_num_threads(), **options)
    return Rival(name, function, "edt")


def one_cupyx(labels):
    cupyx, name = optional("cupyx.scipy.ndimage"), "a single cupyx transform of the image"
    if cupyx is None:
        return Rival(name, None)
    background = optional("cupy").asarray(labels == 0)
    return Rival(name, lambda: cupyx.distance_transform_edt(background))


def check(labels):
    for ours, theirs in zip(two_nearest(labels), reference.two_nearest(labels), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        border_weight_map(labels), reference.border_weight_map(labels), rtol=1e-6, atol=1e-6
    )
    if labels.is_cuda:
        return
    for rival in (scipy_per_object(labels), edt_per_object(labels)):
        if rival.function is not None:
            for ours, theirs in zip(two_nearest(labels), rival.function(), strict=True):
                torch.testing.assert_close(ours, torch.from_numpy(theirs))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FUNCTIONS)
def bench_border_weight_map(benchmark, device, timed, case, name):
    check(crowded((128, 96), 12).to(device))
    labels = crowded(*CASES[case]).to(device)
    benchmark.group = f"border weight map, {case}, {device}"
    timed(lambda: FUNCTIONS[name](labels))


@pytest.mark.parametrize("name", FUNCTIONS)
def bench_border_weight_map_reference(benchmark, device, timed, name):
    labels = crowded(*CASES[FEW]).to(device)
    benchmark.group = f"border weight map, {FEW}, {device}"
    timed(lambda: getattr(reference, name)(labels), rounds=1)


def cases(device, peers):
    check(crowded((200, 150), 40).to(device))
    for name, setting in CASES.items():
        labels = crowded(*setting)
        here = labels.to(device)
        for ours, function in FUNCTIONS.items():
            rivals = []
            if name == FEW:
                plain = functools.partial(getattr(reference, ours), here)
                rivals = [Rival("reference", plain), scipy_per_object(labels)]
            if peers and name == FEW:
                rivals += [edt_per_object(labels), one_edt(labels)]
                if device.type == "cuda":
                    rivals.append(one_cupyx(here))
            written = 4 if ours == "border_weight_map" else 8
            yield Case(
                name,
                ours,
                functools.partial(function, here),
                rivals,
                moved=labels.numel() * (4 + written),
            )
    if device.type == "cuda":
        labels = crowded(*CASES[FEW])
        batch = torch.stack([labels.roll(7 * i, -1) for i in range(BATCH)]).to(device)
        torch.testing.assert_close(border_weight_map(batch).cpu(), border_weight_map(batch.cpu()))
        yield Case(
            f"{BATCH} of {FEW}",
            "border_weight_map",
            lambda: border_weight_map(batch),
            moved=8 * batch.numel(),
        )
    for sides, objects in VOLUMES:
        volume = crowded(sides, objects)
        here = volume[None].to(device)
        for spacing in (None, FLAT):
            rivals = []
            if device.type == "cpu":
                if spacing is None:
                    rivals = [scipy_once(volume)]
                if spacing is None and objects <= 300:
                    rivals.append(scipy_per_object(volume))
                if peers:
                    rivals.append(one_edt(volume, spacing))
            elif peers and spacing is None:
                rivals.append(one_cupyx(here[0]))
            name = f"{' x '.join(map(str, sides))}, {objects} objects"
            yield Case(
                name if spacing is None else f"{name}, flat voxels",
                "border_weight_map",
                functools.partial(border_weight_map, here, spacing=spacing),
                rivals,
                moved=8 * volume.numel(),
            )


def growth(device, peers):
    """Against pixels, cells and batch, voxels and cells of volumes."""
    fields = {s: functools.partial(mosaic, s) for s in (256, 512, 1024, 2048, 4096)}
    cells = {n: functools.partial(crowded, (1024, 1024), n) for n in (10, 100, 1000, 10_000)}
    series = {
        "pixels": [(s * s, field, 1) for s, field in fields.items()],
        "cells": [(n, field, 1) for n, field in cells.items()],
        "batch": [(n, fields[256], n) for n in (1, 2, 4, 8, 16, 32)],
        "voxels": [
            (s**3, functools.partial(crowded, (s,) * 3, 100 * (s // 64) ** 3), 1)
            for s in ((64, 128, 256) if device.type == "cpu" else (64, 128))
        ],
        "cells of a volume": [
            (n, functools.partial(crowded, (128,) * 3, n), 1) for n in (10, 100, 1000, 3000)
        ],
    }
    for axis, points in series.items():
        for x, field, batch in points:
            labels = field()
            here = labels.to(device).expand(batch, *labels.shape).contiguous()
            rivals = []
            if axis != "batch" and device.type == "cpu":
                rivals.append(scipy_per_object(labels))
                if peers:
                    rivals += [edt_per_object(labels), one_edt(labels)]
            elif axis != "batch" and peers:
                rivals.append(one_cupyx(here[0]))
            yield Case(
                "x".join(map(str, here.shape)),
                "border_weight_map",
                functools.partial(border_weight_map, here),
                rivals,
                moved=8 * here.numel(),
                axis=axis,
                x=x,
            )
