import importlib.util
import os
import sysconfig

import numpy as np
import pybind11
import pytest
import torch
from host import compile_host
from hypothesis import settings

import unet_fast

# The same examples in every run of CI, new ones in those of people.
settings.register_profile("unet_fast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("unet_fast")

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


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    """The CUDA kernels, run on the host: a module of functions on NumPy arrays."""
    path = tmp_path_factory.mktemp("cuda_on_host") / "_cuda_on_host.so"
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    flags = ["-O1", "-shared", "-fPIC", *(f"-isystem{i}" for i in includes)]
    compile_host("module.cpp", path, *flags)
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
