import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11

SOURCES = Path(__file__).parent.parent / "csrc"
INCLUDES = [f"-I{SOURCES}"]
for place in sysconfig.get_path("include"), pybind11.get_include():
    INCLUDES += ["-isystem", place]


def compiler():
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def cuda_compiler():
    """nvcc, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def compile_host(source, output, *flags):
    """Compiles a file of csrc/testing, in which the CUDA kernels are plain C++."""
    common = ["-std=c++20", "-Wall", "-Wextra", "-pthread", "-DUNET_FAST_CUDA_ON_HOST"]
    run([compiler(), *common, *INCLUDES, SOURCES / "testing" / source, *flags, "-o", output])
    return output


def compile_ptx(source, output, *flags):
    """Compiles the kernels that a file of csrc/testing launches, as the package does."""
    common = ["-ptx", "-x=cu", "-std=c++20", "-O3", "--extended-lambda"]
    run([cuda_compiler(), *common, *INCLUDES, SOURCES / "testing" / source, *flags, "-o", output])
    return output


def cached(folder, name, compile, version, *flags):
    """What `compile` makes of csrc/testing/module.cpp, kept for each state of the sources."""
    key = hashlib.sha256(repr(flags).encode())
    key.update(subprocess.check_output([version, "--version"]))
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        key.update(path.read_bytes())
    path = Path(folder) / name.format(key.hexdigest())
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")  # another process may be at it, too
        compile("module.cpp", made, *flags)
        made.replace(path)
    return path


def host_module(folder):
    """The Python module of csrc/testing/module.cpp: the kernels, functions on NumPy arrays."""
    flags = ["-O1", "-shared", "-fPIC"]
    path = cached(folder, "{}.so", compile_host, compiler(), *flags)
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ptx_of_module(folder, architecture, *flags):
    """The path of its kernels' PTX."""
    flags = [f"-arch=compute_{architecture}", *flags]
    return cached(folder, "{}.ptx", compile_ptx, cuda_compiler(), *flags)
