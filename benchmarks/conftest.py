"""Benchmarks: `pytest benchmarks`. Each checks the result first, then times it."""

import pytest
import torch

import unet_fast


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Devices that are here; timings need no promise of a GPU."""
    if request.param == "cuda" and not (torch.cuda.is_available() and unet_fast.HAS_CUDA):
        pytest.skip("needs a GPU and a CUDA build")
    return torch.device(request.param)


@pytest.fixture
def timed(benchmark, device):
    """Times a function until its work is done; what takes long, three times."""

    def run(function, rounds=None):
        def whole():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        if rounds is None:
            benchmark(whole)
        else:
            benchmark.pedantic(whole, rounds=rounds, warmup_rounds=1)

    return run
