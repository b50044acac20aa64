"""What several files of a release say is the same."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECIPE = yaml.safe_load((ROOT / "packaging/recipe.yaml").read_text())


def test_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest, day = re.search(r"^## (\d\S*) - (\S+)$", changes, re.MULTILINE).groups()
    assert PROJECT["version"] == citation["version"] == RECIPE["context"]["version"] == newest
    assert str(citation["date-released"]) == day


def test_requirements_of_the_recipe():
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    needed = [line.partition(">=") for line in PROJECT["dependencies"]]
    needed = [f"{names.get(name, name)} >={version}" for name, _, version in needed]
    assert RECIPE["requirements"]["run"] == [f"python {PROJECT['requires-python']}", *needed]
