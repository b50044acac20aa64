"""The house: what each room may import, and how little `import unet_fast` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unet_fast

PACKAGE = Path(unet_fast.__file__).parent
FLOORS = [
    {"_files", "_progress", "_library", "contracts"},
    {"_device", "objects", "ops", "reference"},
    {"augment", "images", "unet", "weights"},
    {"plots", "model_file"},
    {"prediction"},
    {"scores"},
    {"training", "metrics"},
    {"demo"},
    {"cli"},
]
"""Rooms, the lower ones first. A room imports from floors below its own, and from itself."""


def rooms():
    floor_of = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    modules = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {module.parts[0] for module in modules} - {"__init__"}
    assert names == set(floor_of)
    return floor_of


def imports_of(path):
    """The rooms that a file imports from, with those of its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            up = len(path.relative_to(PACKAGE).parts) - node.level
            if up:  # inside its own room
                continue
            yield from [node.module.split(".")[0]] if node.module else [a.name for a in node.names]


def test_rooms_import_from_the_floors_below():
    floor_of = rooms()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for other in imports_of(path):
            if room in ("__init__", other) or other == "_C":
                continue
            assert floor_of[other] < floor_of[room], f"{path}: imports {other}"


def test_no_file_is_long():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_no_module_has_the_name_of_a_function_beside_it():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        tree = ast.parse((folder / "__init__.py").read_text())
        from_ = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        names = {a.name for n in from_ for a in n.names}
        assert not {p.stem for p in folder.glob("*.py")} & names, folder


def loaded(code):
    command = [sys.executable, "-c", f"import sys, torch, numpy\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light():
    new = loaded("import unet_fast") - loaded("")
    assert {name.split(".")[0] for name in new} == {"unet_fast"}


@pytest.mark.parametrize("name", sorted(unet_fast.__all__))
def test_public_names(name):
    assert name in dir(unet_fast)
    assert getattr(unet_fast, name) is getattr(unet_fast, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unet_fast.nothing  # noqa: B018
