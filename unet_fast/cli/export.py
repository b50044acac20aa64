"""The command that writes a network for other programs."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from .entry import SEVERAL, app


@app.command
def export(
    run: Path,
    /,
    *,
    to: Literal["onnx", "bioimageio"],
    out: Path,
    opset: int = 18,
    spacing: Annotated[tuple[float, ...] | None, SEVERAL] = None,
    name: str | None = None,
    author: Annotated[tuple[str, ...], SEVERAL] = (),
    license: str | None = None,
) -> None:
    """Write a trained network for other programs.

    ```
    unet-fast export run --to onnx --out exported
    ```

    onnx writes model.onnx, for any runtime, and model.json, which says how to normalise, tile and
    make objects. bioimageio writes bioimageio.zip, a model package of bioimage.io.

    Parameters
    ----------
    run:
        Folder of a training run, or a model.
    to:
        onnx (needs the extra onnx) or bioimageio (needs the extra bioimageio).
    out:
        Folder for the files; there must be none.
    opset:
        Version of ONNX's operators, 18 to 23.
    spacing:
        Size of a pixel along (Z,) Y and X in micrometres, which is written down. Default: the
        voxel size that training was given.
    name:
        Name of a bioimageio package. Default: U-Net and the name of the run.
    author:
        Who made the network, for a bioimageio package: one name or several.
    license:
        Licence of the network, for a bioimageio package: an SPDX identifier, as CC-BY-4.0.
    """
    from ..integrations.bioimageio import PACKAGE, export_bioimageio
    from ..integrations.onnx import DESCRIPTION, NETWORK, export_onnx
    from ..model_file import load_model
    from ..training.config import CONFIG, read_toml

    given = {"name": name, "author": author, "license": license}
    missing = [option for option in ("author", "license") if not all(given[option] or [""])]
    if to == "bioimageio" and missing:
        raise ValueError(f"export: --{missing[0]} must be given with --to bioimageio")
    if to == "onnx" and any(given.values()):
        first = next(option for option, value in given.items() if value)
        raise ValueError(f"export: --{first} must go with --to bioimageio, got --to onnx")
    model = load_model(run)
    settings = run / CONFIG
    if spacing is None and settings.exists():
        sizes = read_toml(settings).get("voxel_size")
        spacing = None if sizes == [1] * model.dims else sizes  # those say: as deep as wide
    common: dict[str, Any] = {"opset": opset, "spacing": spacing}
    if to == "onnx":
        export_onnx(model, out, **common)
        print(f"network: {out / NETWORK}")
        print(f"how to use it: {out / DESCRIPTION}")
    else:
        assert license is not None
        name = name or "U-Net " + re.sub(r"[^\w +()-]", "_", run.resolve().stem, flags=re.ASCII)
        export_bioimageio(model, out, name=name, authors=author, license=license, **common)
        print(f"package: {out / PACKAGE}")
