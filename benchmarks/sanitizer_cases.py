"""Small launches of every CUDA kernel, for compute-sanitizer; checks the results too.

`compute-sanitizer --tool memcheck python benchmarks/sanitizer_cases.py`
"""

import argparse

import torch

import unet_fast
from unet_fast import reference


def weighted_ce(device, pixels, classes, channels_last, dtype):
    logits = torch.randn(2, classes, pixels, 1, device=device).to(dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, classes, (2, pixels, 1), device=device)
    weight = torch.rand(2, pixels, 1, device=device)
    for reduction in ("weighted_mean", "none"):
        results = []
        for function in (unet_fast.weighted_ce, reference.weighted_ce):
            x = logits.detach().clone().requires_grad_()
            loss = function(x, target, weight, reduction=reduction)
            loss.sum().backward()
            results.append((loss.detach(), x.grad))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def border_weights(device, shape):
    labels = torch.randint(0, 12, shape) * (torch.rand(shape) < 0.3)
    moved = labels.to(torch.int16).to(device)
    for spacing in (None, (0.5,) * (len(shape) - 1)):  # squares in int32_t and not
        results = unet_fast.two_nearest(moved, spacing=spacing)
        for ours, theirs in zip(
            results, reference.two_nearest(labels, spacing=spacing), strict=True
        ):
            torch.testing.assert_close(ours.cpu(), theirs)
        ours = unet_fast.border_weight_map(moved, spacing=spacing, where="everywhere")
        theirs = reference.border_weight_map(labels, spacing=spacing, where="everywhere")
        torch.testing.assert_close(ours.cpu(), theirs)
    for ridge in ("one_sided", "two_sided"):
        separated = unet_fast.separate_touching(moved, ridge).cpu().long()
        assert torch.equal(separated, reference.separate_touching(labels, ridge))
    classes = torch.where(labels > 6, 2, 1).where(labels > 0, 0)
    options = {"class_weight": "balanced", "halo": (0.1, 10.0), "num_classes": 3}
    weigh = unet_fast.ops.border_weights
    theirs = reference.border_weights(labels, classes, **options)
    for ours, expected in zip(weigh(moved, classes.to(device), **options), theirs, strict=True):
        torch.testing.assert_close(ours.cpu(), expected)


def elastic_deform(device, shape, order, grid):
    image = torch.rand(2, 2, *shape)
    labels = torch.randint(0, 99, (2, *shape), dtype=torch.int16)
    axes = len(shape)
    displacement = torch.randn(2, axes, *(4, 5, 4)[:axes]) * 5
    options = {
        "affine": torch.eye(axes, axes + 1)[None] + 0.1 * torch.randn(2, axes, axes + 1),
        "gray_curve": torch.rand(2, 1, 5),
        "labels": labels,
        "order": (order, 1),
        "grid": grid,
    }
    results = []
    for function, where in ((unet_fast.elastic_deform, device), (reference.elastic_deform, "cpu")):
        moved = {k: v.to(where) if torch.is_tensor(v) else v for k, v in options.items()}
        x, d = (y.to(where, torch.float64).requires_grad_() for y in (image, displacement))
        out, ids = function(x, d, **moved)
        out.square().sum().backward()
        results.append([y.detach().cpu() for y in (out, ids, x.grad, d.grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    source = torch.tensor([1, 1, 0])  # three samples of two images
    for function, where in ((unet_fast.elastic_deform, device), (reference.elastic_deform, "cpu")):
        parts = [x.double().to(where) for x in (image, displacement[[0, 1, 0]])]
        ids = labels.to(where)
        out = function(*parts, labels=ids, source=source.to(where), order=(order, 1), grid=grid)
        results.append([y.cpu() for y in out])
    for ours, theirs in zip(*results[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    torch.manual_seed(0)
    # Around a warp, a block of threads and a block of pixels; 2052 can be read four at once.
    for pixels in (1, 257, 2049, 2052):
        for classes, channels_last in ((2, False), (5, True)):
            for dtype in (torch.float32, torch.bfloat16):
                weighted_ce(device, pixels, classes, channels_last, dtype)
    # Around a block of threads and a segment of a column; a volume.
    for shape in ((1, 1, 1), (2, 65, 5), (1, 5, 257), (1, 4, 9, 8)):
        border_weights(device, shape)
    # Around a tile; a volume.
    for shape in ((1, 1), (33, 5), (5, 65), (3, 33, 5)):
        for order, grid in ((0, "keys"), (1, "interpolating"), (3, "approximating")):
            elastic_deform(device, shape, order, grid)
    print("all results right")


if __name__ == "__main__":
    main()
