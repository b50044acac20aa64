import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch

import unet_fast

REQUIRE_CUDA = os.environ.get("UNET_FAST_REQUIRE_CUDA") == "1"  # set where a skip would hide a bug
SOURCES = Path(__file__).parent.parent / "csrc"


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not (torch.cuda.is_available() and unet_fast.HAS_CUDA):
        if REQUIRE_CUDA:
            pytest.fail("UNET_FAST_REQUIRE_CUDA=1, but there is no GPU or no CUDA build")
        pytest.skip("needs a GPU and a CUDA build")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def compile_host(source, output, *flags):
    """Compiles a file of csrc/testing, in which the CUDA kernels are plain C++."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    common = ["-std=c++20", "-Wall", "-Wextra", "-pthread", "-DUNET_FAST_CUDA_ON_HOST"]
    command = [compiler, *common, f"-I{SOURCES}", str(SOURCES / "testing" / source), *flags]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output


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
