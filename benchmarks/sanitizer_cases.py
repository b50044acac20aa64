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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    # Around a warp, a block of threads and a block of pixels; 2052 can be read four at once.
    for pixels in (1, 257, 2049, 2052):
        for classes, channels_last in ((2, False), (5, True)):
            for dtype in (torch.float32, torch.bfloat16):
                weighted_ce(device, pixels, classes, channels_last, dtype)
    print("all results right")


if __name__ == "__main__":
    main()
