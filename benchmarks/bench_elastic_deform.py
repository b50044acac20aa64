"""Times elastic_deform against SciPy, elasticdeform, OpenCV, albumentations and torch itself.

`pytest benchmarks` shows all with pytest-benchmark. `python benchmarks/bench_elastic_deform.py`
runs ours and each rival in turn (A B A B), prints medians and medians of the ratios, and with
`--csv FILE` keeps them. The packages elasticdeform, opencv-python-headless, albumentations, on CUDA
kornia and monai, are rivals where they are installed.

Image 512 x 512, linear; labels of the same size, nearest; displacements on a 3 x 3 grid.
"""

import interleave
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from unet_fast import elastic_deform, reference

SIDE = 512
SIGMA = 10.0
BATCH = 16


def sample(n=1, device="cpu", channels=1, dtype=torch.float32):
    """Image, displacement and labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(n, channels, SIDE, SIDE, generator=generator)
    if not dtype.is_floating_point:
        image = image * torch.iinfo(dtype).max
    displacement = SIGMA * torch.randn(n, 2, 3, 3, generator=generator)
    blobs = torch.arange(SIDE) // 30
    labels = (blobs[:, None] * 18 + blobs).expand(n, SIDE, SIDE).to(torch.int32).contiguous()
    return image.to(dtype).to(device), displacement.to(device), labels.to(device)


def scipy_deform(image, displacement, labels):
    """The field once, for both."""
    knots = np.stack(np.meshgrid(*[np.linspace(0, 2, SIDE)] * 2, indexing="ij"))
    position = np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij")) + np.stack(
        [ndimage.map_coordinates(d, knots, order=3, mode="mirror") for d in displacement]
    )
    return (
        ndimage.map_coordinates(image, position, order=1, mode="mirror"),
        ndimage.map_coordinates(labels, position, order=0, mode="mirror"),
    )


def torch_deform(image, displacement, labels):
    """Bicubic upsampling of the grid and two calls of grid_sample."""
    field = functional.interpolate(displacement, (SIDE, SIDE), mode="bicubic", align_corners=True)
    axis = torch.arange(SIDE, dtype=torch.float32, device=image.device)
    position = field + torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    grid = position.flip(1).permute(0, 2, 3, 1) * (2 / (SIDE - 1)) - 1
    options = {"padding_mode": "reflection", "align_corners": True}
    moved = functional.grid_sample(image, grid, mode="bilinear", **options)
    ids = functional.grid_sample(labels[:, None].float(), grid, mode="nearest", **options)
    return moved, ids[:, 0].to(labels.dtype)


def opencv_deform(cv2, displacement):
    """At its best: the identity, and labels in a type that it takes, are made beforehand."""
    axis = np.arange(SIDE, dtype=np.float32)
    rows, columns = np.meshgrid(axis, axis, indexing="ij")

    def run(image, labels):
        y, x = (cv2.resize(d, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for d in displacement)
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


@pytest.mark.parametrize("order", [0, 1, 3])
def bench_elastic_deform(benchmark, device, order):
    check(device)
    image, displacement, labels = sample(device=device)

    def run():
        elastic_deform(image, displacement, labels=labels, order=order)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"elastic deformation, {device}"
    benchmark(run)


def rivals():
    """(name, function, rounds at most, ours)."""
    image, displacement, labels = sample()
    plane, knots, ids = image[0, 0].numpy(), displacement[0].numpy(), labels[0].numpy()

    def ours(**options):
        return lambda: elastic_deform(image, displacement, labels=labels, **options)

    yield "SciPy", lambda: scipy_deform(plane, knots, ids), 20, ours()
    elasticdeform = interleave.optional("elasticdeform")
    if elasticdeform is not None:
        for order in (1, 3):
            yield (
                f"elasticdeform, order {order}",
                lambda order=order: elasticdeform.deform_grid(
                    [plane, ids], knots, order=[order, 0], mode="mirror"
                ),
                20,
                ours(order=order),
            )
    yield "torch grid_sample", lambda: torch_deform(image, displacement, labels), 20, ours()
    cv2 = interleave.optional("cv2")
    if cv2 is not None:
        cv2.setNumThreads(torch.get_num_threads())
        run, small = opencv_deform(cv2, knots), ids.astype(np.int16)
        yield "OpenCV resize + remap", lambda: run(plane, small), 200, ours()
    album = interleave.optional("albumentations")
    if album is not None:
        image8, _, _ = sample(dtype=torch.uint8)
        plane8, ids8 = image8[0, 0].numpy(), ids.astype(np.uint8)
        labels8 = torch.from_numpy(ids8)[None]
        transforms = (
            album.ElasticTransform(alpha=300, sigma=50, approximate=True, p=1),
            album.GridElasticDeform(num_grid_xy=(2, 2), magnitude=10, p=1),
        )
        for transform in transforms:
            yield (
                f"albumentations {type(transform).__name__}, uint8",
                lambda t=transform: t(image=plane8, mask=ids8),
                50,
                lambda: elastic_deform(image8, displacement, labels=labels8),
            )


def row(device, case, rival, compared):
    header = interleave.header("elastic_deform", device)
    return {**header, "case": case, "rival": rival, **compared}


def measure_cpu(rounds):
    cpu = torch.device("cpu")
    for name, rival, most, ours in rivals():
        compared = interleave.compare(ours, rival, cpu, min(rounds, most))
        yield row(cpu, f"{SIDE}x{SIDE} and labels", name, compared)


def measure_cuda(device, rounds):
    image, displacement, labels = sample(BATCH, device)
    copies = torch.empty_like(image), torch.empty_like(labels)

    def ours():
        return elastic_deform(image, displacement, labels=labels)

    def copy():
        copies[0].copy_(image)
        copies[1].copy_(labels)

    functions = [
        ("copy of the same bytes", copy),
        ("torch grid_sample", lambda: torch_deform(image, displacement, labels)),
    ]
    kornia = interleave.optional("kornia.geometry.transform")
    if kornia is not None:
        noise = torch.rand(BATCH, 2, SIDE, SIDE, device=device) * 2 - 1
        functions.append(
            (
                "kornia elastic_transform2d, image only",
                lambda: kornia.elastic_transform2d(image, noise, (63, 63), (32.0, 32.0)),
            )
        )
    monai = interleave.optional("monai.transforms")
    if monai is not None:
        transform = monai.Rand2DElastic(
            spacing=(SIDE / 2, SIDE / 2), magnitude_range=(10, 10), prob=1, device=device
        )
        functions.append(
            (
                "MONAI Rand2DElastic, image only",
                lambda: [transform(plane) for plane in image],
            )
        )
    for name, rival in functions:
        compared = interleave.compare(ours, rival, device, rounds)
        yield row(device, f"{BATCH} of {SIDE}x{SIDE} and labels", name, compared)


def main():
    arguments = interleave.arguments_of(__doc__)
    device = arguments.device
    check(device)
    image, displacement, labels = sample(device=device)
    results = (image.numel() + labels.numel()) * 4 / 1e6
    peak = interleave.peak_megabytes(
        lambda: elastic_deform(image, displacement, labels=labels), device
    )
    print(f"memory beside the results: {peak - results:.3f} MB")
    measure = measure_cpu if device.type == "cpu" else lambda r: measure_cuda(device, r)
    rows = list(measure(arguments.rounds))
    columns = ["case", "rival", "ours ms", "rival ms"]
    interleave.print_table(rows, [*columns, "ratio p20", "ratio p50", "ratio p80"])
    if arguments.csv:
        interleave.write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
