"""The house: what each room may import, and how little `import unet_fast` loads."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import unet_fast

ROOT = Path(__file__).parents[1]


def drawn():
    """The script that draws the rooms: it knows the floors, and finds the imports."""
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs" / "draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rooms_import_from_the_floors_below():
    script = drawn()
    floor_of = {room: i for i, floor in enumerate(script.FLOORS) for room in floor}
    arrows = script.arrows()
    assert set(arrows) == set(floor_of)
    for room, others in arrows.items():
        above = [x for x in others if floor_of[x] >= floor_of[room]]
        assert not above, f"{room} imports {above}"


def test_no_file_is_long():
    sources = [*(ROOT / "unet_fast").rglob("*.py"), *(ROOT / "csrc").glob("*/*")]
    assert len(sources) > 90
    for path in sources:
        assert len(path.read_text().splitlines()) <= 450, path


def test_no_module_has_the_name_of_a_function_beside_it():
    for folder in {path.parent for path in (ROOT / "unet_fast").rglob("*.py")}:
        tree = ast.parse((folder / "__init__.py").read_text())
        from_ = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        names = {a.name for n in from_ for a in n.names}
        assert not {p.stem for p in folder.glob("*.py")} & names, folder


def loaded(code):
    command = [sys.executable, "-c", f"import sys, torch, numpy\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light():
    new = loaded("import unet_fast") - loaded("")
    assert {name.split(".")[0] for name in new} == {"numpy", "unet_fast"}  # numpy.typing


@pytest.mark.parametrize("name", sorted(unet_fast.__all__))
def test_public_names(name):
    assert name in dir(unet_fast)
    assert getattr(unet_fast, name) is getattr(unet_fast, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unet_fast.nothing  # noqa: B018
