"""Checks what a wheel contains and asks for: `python packaging/audit.py WHEEL [OUT]`.

The files are those of the package and no others, it is for every Python, its libraries use the
stable ABI of torch only, and ask for nothing that a Linux of some age lacks. With OUT it writes the
wheel there, under the name of the oldest Linux that it is for.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = ("py.typed", "_build.py", "sample/README.md", "sample_volume/README.md")
KINDS = {".py", ".pyi", ".typed", ".so", ".md", ".png", ".tif", ".txt"}


def check_files(names: list[str]) -> None:
    """Exits unless files are those of an installed package."""
    files = [name for name in names if not name.endswith("/") and "dist-info/" not in name]
    inside = [Path(name).relative_to("unet_fast") for name in files]
    missing = [name for name in NEEDED if Path(name) not in inside]
    strange = [str(path) for path in inside if path.suffix not in KINDS or "tests" in path.parts]
    if missing or strange:
        sys.exit(f"the wheel lacks {missing}, and must not have {strange}")


def audit(wheel: Path, out: Path | None) -> None:
    """Exits with a line if something is wrong, else prints size and platform."""
    if not (wheel.match("unet_fast-*-py3-none-*.whl") and wheel.exists()):
        sys.exit(f"the wheel must be unet_fast-*-py3-none-*.whl, got {wheel.name}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        check_files(archive.namelist())
        archive.extractall(folder)
        subprocess.run(["torch-abi-audit", "--check", "torch", f"{folder}/unet_fast"], check=True)
    if out is not None:
        command = ["auditwheel", "repair", "--exclude", "libtorch*", "--wheel-dir", out, wheel]
        subprocess.run(command, check=True)
        wheel = max(out.glob("unet_fast-*.whl"), key=lambda path: path.stat().st_mtime)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    audit(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
