"""Packages of unet_fast.integrations, which need not be there."""

import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"

if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    # The wheels of torchvision on package indices are built with CUDA. Beside a torch for CPUs
    # their library is not loaded, and without its operators Python cannot import them.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")


def needs(name):
    """Imports a package; without it the tests of a file are skipped, or fail where CI has it."""
    if os.environ.get("UNET_FAST_REQUIRE_PEERS") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


def run_page(name):
    """Runs the Python code of a page of the documentation; returns the names that it defines."""
    names = {}
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE
    )
    for code in blocks:
        exec(compile(code, name, "exec"), names)
    assert blocks
    return names
