import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"


def compiler():
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def compile_host(source, output, *flags):
    """Compiles a file of csrc/testing, in which the CUDA kernels are plain C++."""
    common = ["-std=c++20", "-Wall", "-Wextra", "-pthread", "-DUNET_FAST_CUDA_ON_HOST"]
    command = [compiler(), *common, f"-I{SOURCES}", str(SOURCES / "testing" / source), *flags]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output
