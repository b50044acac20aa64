"""Packages of unet_fast.integrations, which need not be there."""

import importlib
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"


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
