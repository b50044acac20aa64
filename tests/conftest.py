import os

import budget
import numpy as np
import pytest
import torch
from host import cuda_compiler, host_module, ptx_of_module
from hypothesis import settings
from ptx.device import Device

import unet_fast

# The same examples in every run of CI, new ones in those of people.
settings.register_profile("unet_fast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("unet_fast")


def pytest_addoption(parser):
    help = "all examples, all variants, sanitizers and compilations, as CI does"
    parser.addoption("--thorough", action="store_true", help=help)


def pytest_configure(config):
    budget.thorough = config.getoption("--thorough")
    config.addinivalue_line("markers", "thorough: run with --thorough only")
    config.addinivalue_line("markers", "long: run on PTX with --thorough only")


def pytest_collection_modifyitems(config, items):
    if budget.thorough:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    on_ptx = [i for i in items if "host_kernels" in i.fixturenames and "[ptx" in i.name]
    left_out += [item for item in on_ptx if item.get_closest_marker("long")]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


REQUIRE_CUDA = os.environ.get("UNET_FAST_REQUIRE_CUDA") == "1"  # set where a skip would hide a bug


def usable_device(name):
    if name == "cuda" and not (torch.cuda.is_available() and unet_fast.HAS_CUDA):
        if REQUIRE_CUDA:
            pytest.fail("UNET_FAST_REQUIRE_CUDA=1, but there is no GPU or no CUDA build")
        pytest.skip("needs a GPU and a CUDA build")
    return torch.device(name)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return usable_device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session", params=["host", "ptx"])
def host_kernels(request):
    """The CUDA kernels without a GPU: a module of functions on NumPy arrays.

    They run as C++, or as the PTX that nvcc makes of them. Compiled once for each state of the
    sources, and kept in pytest's cache.
    """
    as_ptx = request.param == "ptx"
    if as_ptx and cuda_compiler() is None:
        pytest.skip("needs nvcc")
    folder = request.config.cache.mkdir("cuda_on_host")
    module = host_module(folder)
    module.run_as_ptx = as_ptx
    if as_ptx:
        Device(module, ptx_of_module(folder, 90).read_text())
    yield module
    module.use_interpreter(None, None, None)
