"""Benchmarks; `python -m benchmarks.run` is the whole suite."""

import sys
from pathlib import Path

# `python -m` looks for modules in the checkout first, where the package has no compiled libraries:
# what is measured is the package that is installed.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [place for place in sys.path if Path(place).resolve() != _ROOT]
