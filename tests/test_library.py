import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from host import compile_host, compiler

import unet_fast
from unet_fast import _build, _device, _library

LIBRARIES = sorted(Path(_build.__file__).parent.glob("libunet_fast*.so"))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_uses_only_the_stable_abi(library):
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    unstable = [line for line in symbols.splitlines() if "at::" in line or "c10::" in line]
    assert not unstable


def test_build_info():
    info = unet_fast.build_info()
    assert info["min_torch"] == "2.10"
    assert info["simd"] in _library.simd_levels()


@pytest.mark.parametrize("level", _library.simd_levels()[:-1])
def test_kernels_of_lower_levels(level):
    """A process loads those of one; all other tests run the best."""
    program = """if True:
        import torch
        import unet_fast
        from unet_fast import reference
        logits, target = torch.randn(2, 5, 40, 41), torch.randint(0, 5, (2, 40, 41))
        labels = torch.randint(0, 9, (2, 40, 41)) * (torch.rand(2, 40, 41) < 0.1)
        displacement = 4 * torch.randn(2, 2, 3, 3)
        for op, *inputs in [
            ("weighted_ce", logits, target),
            ("border_weight_map", labels),
            ("elastic_deform", logits, displacement),
        ]:
            ours, theirs = (getattr(where, op)(*inputs) for where in (unet_fast, reference))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        print(unet_fast.build_info()["simd"])
    """
    environment = os.environ | {"UNET_FAST_SIMD": level}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, env=environment, text=True) == f"{level}\n"


def test_levels_that_are_not_there(monkeypatch):
    monkeypatch.setenv("UNET_FAST_SIMD", "MMX")
    levels = ", ".join(_library.simd_levels())
    with pytest.raises(ImportError, match=f"UNET_FAST_SIMD must be one of {levels} here, got MMX"):
        _library._simd_level()


def test_sources_of_another_version(tmp_path):
    project = tmp_path / "pyproject.toml"
    _library.check_clone(project, "0.2.0")  # installed: there is none
    for name, version in (("unet_fast", "0.2.0"), ("another", "0.1.0")):
        project.write_text(f'[project]\nname = "{name}"\nversion = "{version}"\n')
        _library.check_clone(project, "0.2.0")
    project.write_text('[project]\nname = "unet_fast"\nversion = "0.1.0"\n')
    message = "are of version 0.1.0, the installed libraries of 0.2.0: run `pip install .` there"
    with pytest.raises(ImportError, match=message):
        _library.check_clone(project, "0.2.0")


def test_nothing_depends_on_the_version_of_python():
    """One wheel serves all: no library asks for a symbol of the interpreter."""
    assert not [*Path(_build.__file__).parent.glob("*.cpython-*")]
    for library in LIBRARIES:
        command = ["nm", "-D", "--undefined-only", library]
        assert " Py" not in subprocess.check_output(command, text=True)


def test_a_build_without_cuda(monkeypatch):
    """Beside a GPU: tensors on it are refused, as a device for a network it is taken."""
    x = types.SimpleNamespace(device=torch.device("cuda"), is_cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _device._tell_of.cache_clear()
    kinds = {"cpu"}
    for module in (_library, _device):
        monkeypatch.setattr(module, "DEVICES", kinds)
    with pytest.raises(RuntimeError, match="op: unet_fast was built without CUDA kernels"):
        _library.require_kernels("op", x)
    with pytest.warns(UserWarning, match="there are no kernels for cuda: it computes the network"):
        device = _device.find_device("auto")
    assert device == torch.device("cuda")
    assert _device.data_device(device) == torch.device("cpu")
    kinds.add("cuda")
    _library.require_kernels("op", x)
    assert _device.find_device("cuda:0") == torch.device("cuda", 0)
    assert _device.data_device(device) == device
    with pytest.raises(ValueError, match="must be present, got 'cuda:1' with 1 CUDA device "):
        _device.find_device("cuda:1")


@pytest.mark.parametrize(
    ("number", "major", "said"),
    [
        (12080, 12, "the kernels need a driver for CUDA 13.1.80, got one for CUDA 12"),
        (13000, 13, ""),
        (14020, 14, ""),
        (None, None, ""),
    ],
)
def test_a_driver_that_is_too_old(number, major, said, monkeypatch):
    """Kernels of a CUDA run with a driver for the same or a newer one, whatever its minor one."""

    def library(name):
        if number is None:
            raise OSError
        return types.SimpleNamespace(cuDriverGetVersion=lambda x: setattr(x._obj, "value", number))

    monkeypatch.setattr(_library.ctypes, "CDLL", library)
    assert _library._cuda_of_driver() == major
    assert _library._refused_by_driver("13.1.80", major) == said


def test_the_reference_where_there_are_no_kernels(monkeypatch):
    calls = {
        "weighted_ce": [torch.randn(1, 3, 9, 9), torch.randint(0, 3, (1, 9, 9))],
        "two_nearest": [torch.eye(9, dtype=torch.int32)],
        "separate_touching": [torch.eye(9, dtype=torch.int32)],
        "border_weight_map": [torch.eye(9, dtype=torch.int32)],
        "elastic_deform": [torch.rand(1, 1, 9, 9), torch.randn(1, 2, 3, 3)],
    }
    monkeypatch.setattr(_library, "DEVICES", {"cuda"})
    for op, inputs in calls.items():
        with pytest.raises(RuntimeError, match=f"{op}: there are kernels for cpu and cuda only"):
            getattr(unet_fast, op)(*inputs)
    unet_fast.use_reference()
    try:
        for op, inputs in calls.items():
            found = getattr(unet_fast, op)(*inputs)
            expected = getattr(unet_fast.reference, op)(*inputs)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        with pytest.raises(TypeError, match="weighted_ce: target must be"):  # checked all the same
            unet_fast.weighted_ce(torch.randn(1, 3, 9, 9), None)
    finally:
        unet_fast.use_reference(False)


MISSING = """if True:
    import sys
    {hide}
    import torch
    import unet_fast
    print(unet_fast.build_info()["missing"])
    try:
        unet_fast.two_nearest(torch.eye(3, dtype=torch.int32))
    except RuntimeError as error:
        print(error)
    unet_fast.use_reference()
    print(unet_fast.two_nearest(torch.eye(3, dtype=torch.int32))[0][0, 1])
    from unet_fast.cli import main
    print(main(["info"]))
"""


@pytest.mark.parametrize(
    ("hide", "reason"),
    [
        ("sys.modules['unet_fast._build'] = None", "is missing: run `pip install .`"),
        (
            "import torch; torch.ops.load_library = lambda path: open('/none/x.so')",
            "does not load: ",
        ),
    ],
    ids=["never built", "of another system"],
)
def test_a_package_without_libraries(hide, reason):
    command = [sys.executable, "-c", MISSING.format(hide=hide)]
    said = subprocess.check_output(command, text=True).splitlines()
    assert said[0].startswith(f"the compiled part {reason}")
    assert said[1].startswith("two_nearest: the compiled part ")
    assert said[1].endswith("(unet_fast.use_reference() runs the slow reference there)")
    assert said[2] == "tensor(1.)"
    assert said[-1] == "0"


def test_an_old_torch():
    program = "import torch; torch.__version__ = '2.9.1'; import unet_fast"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.endswith(
        "ImportError: unet_fast: must have torch 2.10 or newer, got 2.9.1\n"
    )


def test_the_gpu_of_a_process(monkeypatch):
    """Under torchrun each has its own, unless one is said."""
    named = [torch.device(name) for name in ("cpu", "cuda", "cuda:1")]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [_device.local_device(x) for x in named] == named
    monkeypatch.setenv("LOCAL_RANK", "3")
    cpu, mine, said = (_device.local_device(x) for x in named)
    assert (cpu, mine, said) == (named[0], torch.device("cuda", 3), named[2])


def test_exp_is_accurate_on_host(host_kernels):
    x = -np.logspace(-8, np.log10(87), 20001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(host_kernels.exp_nonpositive(x), exact, rtol=1.5e-7)
    edges = np.float32([0, -0.0, -88, -1e30, -np.inf, np.nan])
    expected = np.float32([1, 1, 0, 0, 0, np.nan])
    np.testing.assert_array_equal(host_kernels.exp_nonpositive(edges), expected)


def test_log1p_is_accurate_on_host(host_kernels):
    x = np.concatenate([[1e-38, 1e-20], np.logspace(-8, 9, 40001)]).astype(np.float32)
    exact = np.log1p(x.astype(np.float64))
    np.testing.assert_allclose(host_kernels.log1p_nonnegative(x), exact, rtol=2e-7)
    assert host_kernels.log1p_nonnegative(0) == 0
    assert np.isnan(host_kernels.log1p_nonnegative(np.nan))


def links_with(flags, folder):
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    command = [compiler(), *flags, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.thorough
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_cuda_kernels_under_sanitizers(tmp_path, sanitizer):
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if sanitizer == "thread":
        flags.append("-DUNET_FAST_HOST_THREADS")
    if "CI" not in os.environ and not links_with(flags, tmp_path):
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    program = compile_host("sanitize.cpp", tmp_path / "sanitize", *flags)
    # The thread sanitizer cannot start where addresses are too random.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    result = subprocess.run([*fixed, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
