"""A device that the operators have no kernels for: the network computes on it, the CPU the rest.

Such a device cannot be taken out of a process again: each test runs in one of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host import compiler, run
from PIL import Image
from runs import discs_in
from torch.utils import cpp_extension

PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])

class module:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda *_: None)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])

torch.utils.rename_privateuse1_backend("away")
torch._register_device_module("away", module)
torch.utils.generate_methods_for_privateuse1_backend()
"""


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """Runs a program with the device "away"."""
    library = tmp_path_factory.mktemp("accelerator") / "device.so"
    flags = [f"-isystem{place}" for place in cpp_extension.include_paths()]
    flags += [f"-L{place}" for place in cpp_extension.library_paths()]
    source = Path(__file__).with_name("accelerator.cpp")
    command = [compiler(), "-std=c++20", "-shared", "-fPIC", "-Wall", source, *flags]
    run([*command, "-ltorch_cpu", "-lc10", "-o", library])

    def call(text, *arguments, **options):
        command = [sys.executable, "-c", PROGRAM + text, library, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    return call


COMMAND = "from unet_fast.cli import main; sys.exit(main(sys.argv[2:]))"


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_and_prediction(away, tmp_path):
    """Both give what they give on the CPU."""
    images, labels = discs_in(tmp_path / "discs")
    options = "--steps 4 --validation 0.4 --base-channels 2 --depth 2 --dropout 0 --previews 0"
    told, masks = {}, {}
    for device in ("cpu", "away"):
        out = tmp_path / device
        settings = [*options.split(), "--precision", "float32", "--device", device]
        for command in (
            ["train", images, labels, "--out", out, *settings],
            ["predict", out, images, "--out", out / "found", "--device", device],
        ):
            done = away(COMMAND, *command)
            assert done.returncode == 0, done.stderr
            told[device] = told.get(device, "") + done.stderr
        masks[device] = [Image.open(p).tobytes() for p in sorted((out / "found").glob("*.png"))]
    assert losses(tmp_path / "away") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    assert len(masks["cpu"]) == 3
    assert masks["away"] == masks["cpu"]
    assert told["cpu"].count("there are no kernels") == 0
    assert told["away"].count("there are no kernels for away") == 2  # once for each command


def test_operators(away):
    text = """
import unet_fast
try:
    print(unet_fast.border_weight_map(torch.eye(9, dtype=torch.int32).to("away")).device)
except RuntimeError as error:
    print(error)
"""
    done = away(text)
    assert "kernels for cpu and cuda only, got a tensor on away:0 (unet_fast.use_ref" in done.stdout
    done = away("import unet_fast; unet_fast.use_reference()" + text)
    assert done.stdout == "away:0\n", done.stderr


def test_processes_need_kernels(away, tmp_path):
    images, labels = discs_in(tmp_path / "discs")
    command = ["train", images, labels, "--out", tmp_path / "run", "--device", "away"]
    done = away("import os; os.environ['WORLD_SIZE'] = '2'; " + COMMAND, *command)
    assert done.returncode == 2
    line = "train: a device without kernels must have one process, got away"
    assert done.stderr.splitlines()[-1] == f"unet-fast: {line}"


@pytest.mark.parametrize("name", ["mps", "meta", "nowhere", "cuda:7"])
def test_devices_that_are_not_there(away, name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    done = away("from unet_fast._device import find_device; find_device(sys.argv[2])", name)
    assert f"got '{name}'" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ValueError: device must be ")
