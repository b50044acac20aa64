"""How much the tests try: all with `pytest --thorough`, else what a newcomer waits for."""

import pytest
from hypothesis import settings

thorough = False
"""Set before tests are collected."""


def examples(count, **more):
    """Settings of a test that tries many inputs: a tenth of them, if not all."""
    return settings(max_examples=count if thorough else max(10, count // 10), **more)


def first(value, *others):
    """Values of a parameter: the first one always, the others with `--thorough`."""
    return [value, *(pytest.param(x, marks=pytest.mark.thorough) for x in others)]


def rounds(count, kernels):
    """How often a test of `host_kernels` repeats: less where PTX runs, if it does not try all."""
    return count if thorough or not kernels.run_as_ptx else max(3, count // 5)
