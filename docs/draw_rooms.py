"""Draws docs/rooms.png: the rooms of the package and what each imports, as the code has it."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unet_fast"
FLOORS = [
    ("_files", "_memory", "_progress", "_library", "_program", "contracts"),
    ("_device", "_gray_curves", "_layers", "objects", "ops", "reference"),
    ("augment", "images", "unet", "weights"),
    ("_undo", "plots", "model_file"),
    ("prediction",),
    ("scores",),
    ("training", "metrics"),
    ("demo", "integrations"),
    ("cli",),
]
"""Rooms, the lower ones first. A room imports from floors below its own, and from itself."""


def room_of(path):
    """The room that a file is in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """The other rooms that a file imports from, in its functions too."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [a.name for a in node.names]


def arrows():
    """From each room to the rooms that it imports from."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room not in ("__init__", "__main__"):
            found.setdefault(room, set()).update({*imports_of(path)} - {room, "_build"})
    return found


def main():
    """Writes the picture beside this file."""
    place = {
        room: ((column + 0.5) / len(floor), height)
        for height, floor in enumerate(FLOORS)
        for column, room in enumerate(floor)
    }
    figure, axes = plt.subplots(figsize=(10, 8.5), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for i, (room, others) in enumerate(arrows().items()):
        for other in others:
            (x0, y0), (x1, y1) = place[room], place[other]
            style = {"arrowstyle": "->", "color": colours[i % 20], "lw": 1.1, "shrinkB": 14}
            bend = "arc3,rad=0.08"
            axes.annotate(
                "", (x1, y1), (x0, y0), arrowprops=style | {"connectionstyle": bend, "shrinkA": 14}
            )
    for room, (x, y) in place.items():
        folder = (PACKAGE / room).is_dir()
        files = sorted(PACKAGE.glob(f"{room}/*.py" if folder else f"{room}.py"))
        lines = sum(len(file.read_text().splitlines()) for file in files)
        name = f"{room}/" if folder else f"{room}.py"
        box = {"boxstyle": "round,pad=0.4", "fc": "#e8eef7" if folder else "white", "ec": "#456"}
        axes.text(x, y, f"{name}\n{lines} lines", ha="center", va="center", fontsize=9, bbox=box)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(FLOORS) - 0.5))
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "rooms.png", dpi=90)


if __name__ == "__main__":
    main()
