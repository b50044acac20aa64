import hashlib
import importlib.util
import os
import subprocess
import sysconfig

import budget
import numpy as np
import pybind11
import pytest
import torch
from host import SOURCES, compile_host, compiler
from hypothesis import settings

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


def pytest_collection_modifyitems(config, items):
    if budget.thorough:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
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


@pytest.fixture(scope="session")
def host_kernels(request):
    """The CUDA kernels, run on the host: a module of functions on NumPy arrays.

    Compiled once for each state of the sources, and kept in pytest's cache.
    """
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    flags = ["-O1", "-shared", "-fPIC", *(f"-isystem{i}" for i in includes)]
    key = hashlib.sha256(repr(flags).encode())
    key.update(subprocess.check_output([compiler(), "--version"]))
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        key.update(path.read_bytes())
    folder = request.config.cache.mkdir("cuda_on_host")
    path = folder / f"{key.hexdigest()}.so"
    if not path.exists():
        made = folder / f"{os.getpid()}.part"  # another process may be at it, too
        compile_host("module.cpp", made, *flags)
        made.replace(path)
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
