"""What an installed wheel must do: `python packaging/smoke.py` prints a line, or fails."""

import contextlib
import io
import platform
import sys
import tempfile
from pathlib import Path

import torch

import unet_fast
from unet_fast.cli import main

HERE = Path(__file__).resolve().parents[1]


def run(*command: str) -> str:
    """Runs a command of unet-fast in this process, and returns what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(command))
    if code:
        sys.exit(f"unet-fast {' '.join(command)}: exit code {code}\n{said.getvalue()}")
    return said.getvalue()


def smoke() -> None:
    """Runs each operator beside its reference, trains two steps, and predicts."""
    package = Path(unet_fast.__file__).parent
    if package.is_relative_to(HERE):
        sys.exit(f"smoke.py must test an installed package, got the sources in {package}")
    told = run("info")
    sample = package / "sample"
    with tempfile.TemporaryDirectory() as folder:
        small = ("--steps", "2", "--base-channels", "2", "--depth", "2", "--previews", "0")
        model, out = f"{folder}/run", Path(folder, "results")
        images, labels = (str(sample / "train" / kind) for kind in ("images", "labels"))
        run("train", images, labels, "--out", model, *small)
        run("predict", model, str(sample / "test" / "images"), "--out", str(out))
        count = len([*out.glob("*.png")])
        if not count:
            sys.exit("predict wrote nothing")
    simd = next(line.split()[-1] for line in told.splitlines() if line.startswith("simd"))
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    print(
        f"unet_fast {unet_fast.build_info()['version']}: ok, {system}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {simd} kernels"
    )


if __name__ == "__main__":
    smoke()
