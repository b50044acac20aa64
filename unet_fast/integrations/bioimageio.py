"""Packages of bioimage.io: the network in the format that programs for microscopy share."""

import io
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._files import new_folder
from ..images.intensity import HIGH, LOW, normalise
from ..prediction.tiling import Shape
from ..unet import UNet
from .onnx import describe, onnx_bytes, package, quiet, with_softmax

PACKAGE = "bioimageio.zip"
"""The file."""
PAPER = (
    "O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional Networks for Biomedical Image "
    "Segmentation, MICCAI 2015",
    "10.1007/978-3-319-24574-4_28",
)
"""What every such network has to cite, and its DOI."""
RULES = {
    "name": "of 5 to 128 letters, digits, spaces and _+-()",
    "author": "a name without slashes",
    "license": "an SPDX identifier, as CC-BY-4.0",
}
"""Rules of what people choose, which the package bioimageio.spec tells at length."""
TEXT = """# {name}

A U-Net with {axes} axes, trained with unet_fast. It takes {channels} and returns the probabilities
of {classes} classes; the first one is background.

## Input

{input} {sides}

## Output

Pixels within the halo depend on zeros behind the border and are to be dropped. Objects are made of
the probability of foreground by this rule of unet_fast: `{objects}`.

## Validation

No scores are stored with the network. Compare its output on a few annotated images of your own
with your annotations before you rely on it.
"""
SCALED = (
    "In `rdf.yaml`, percentiles {} and {} of each channel of an image become 0 and 1, as in "
    "training. Only where both are equal training took the range instead."
)
UNSCALED = "Values are taken as they are."
TILED = (
    "Larger images may be predicted in blocks that start at multiples of the step of the sides in "
    "`rdf.yaml`: with the halo they equal the whole, mirrored at its border."
)
WHOLE = "Images have to be predicted whole: a norm takes its statistics from all pixels."


def export_bioimageio(
    model: UNet,
    folder: Path | str,
    *,
    name: str,
    authors: Sequence[str],
    license: str,
    opset: int = 18,
    spacing: Sequence[float] | None = None,
) -> None:
    """Writes a package of bioimage.io, with the network as ONNX and TorchScript.

    Args:
        model: The network.
        folder: Folder for `bioimageio.zip`; there must be none.
        name: Name of the network: 5 to 128 letters, digits, spaces and `_+-()`.
        authors: Who made the network.
        license: SPDX identifier of its licence, as CC-BY-4.0.
        opset: Version of ONNX's operators, in [18, 23].
        spacing: Size of the pixels of training along each axis, in micrometres, if known.

    Raises:
        ValueError: If an argument breaks its rule, or a package is missing.
    """
    spec = package("bioimageio.spec", "bioimageio")
    v = package("bioimageio.spec.model.v0_5", "bioimageio")
    about = describe(model, spacing)
    # Files are packed into the zip; where they come from is no part of it.
    with new_folder(Path(folder)) as part, tempfile.TemporaryDirectory() as place, quiet():
        files = Path(place)
        (files / "model.onnx").write_bytes(onnx_bytes(model, opset))
        network, example = with_softmax(model)
        (files / "model.pt").write_bytes(_torchscript(network, example))
        image = _image(model, about["halo"])
        pixels = normalise(image[0])[None] if about["percentiles"] else image
        with torch.inference_mode():
            found = network(torch.from_numpy(pixels)).numpy()
        np.save(files / "image.npy", image)
        np.save(files / "probabilities.npy", found)
        (files / "README.md").write_text(_text(name, model, about))
        try:
            description = v.ModelDescr(
                name=name,
                description=f"U-Net of {len(about['classes'])} classes, trained with unet_fast",
                authors=[v.Author(name=author) for author in authors],
                license=license,
                cite=[v.CiteEntry(text=PAPER[0], doi=PAPER[1])],
                documentation=v.FileDescr(source=files / "README.md"),
                tags=["unet", "segmentation", f"{model.dims}d", "unet_fast"],
                inputs=[_input(v, model, about, files / "image.npy")],
                outputs=[_output(v, model, about, files / "probabilities.npy")],
                weights=v.WeightsDescr(
                    onnx=v.OnnxWeightsDescr(source=files / "model.onnx", opset_version=opset),
                    torchscript=v.TorchscriptWeightsDescr(
                        source=files / "model.pt",
                        pytorch_version=torch.__version__.partition("+")[0],
                        parent="onnx",
                    ),
                ),
                config={"unet_fast": about},
            )
        except ValueError as error:
            raise ValueError(_broken(error)) from None
        spec.save_bioimageio_package(description, output_path=part / PACKAGE)


def _broken(error: Any) -> str:
    """Returns the first of the rules that a description breaks, one line."""
    first = error.errors()[0]
    name = "author" if error.title == "Author" else str((*first["loc"], "")[0])
    if name in RULES:
        return f"export: {name} must be {RULES[name]}, got {first['input']}"
    return f"export: the package cannot be described: {first['msg'].splitlines()[0]}"


def _torchscript(network: nn.Module, example: Tensor) -> bytes:
    """Returns the network as TorchScript, without its traces, which have paths of this machine."""
    whole, bare = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.trace(network, example), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(bare, "w") as new:
        for name in old.namelist():
            if not name.endswith(".debug_pkl"):
                new.writestr(name, old.read(name))
    return bare.getvalue()


def _image(model: UNet, halo: Shape) -> NDArray[np.float32]:
    """Returns an image whose prediction has pixels inside the halo: noise, like 8 bits."""
    sides = model.input_shape([2 * h + step for h, step in zip(halo, model.alignment, strict=True)])
    shape = (1, model.config["in_channels"], *sides)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)


def _space(v: Any, about: dict[str, Any], axis: int) -> dict[str, Any]:
    """Returns what input and output say about an axis of space."""
    dims = len(about["halo"])
    size = about["spacing"] and {"unit": "micrometer", "scale": about["spacing"][axis]}
    return {"id": v.AxisId("zyx"[axis - dims]), **(size or {})}


def _input(v: Any, model: UNet, about: dict[str, Any], file: Path) -> Any:
    axes = [*"zyx"[-model.dims :]]
    sides = zip(np.load(file, mmap_mode="r").shape[2:], model.alignment, strict=True)
    percentiles = {"axes": axes, "min_percentile": LOW, "max_percentile": HIGH}
    scaling = v.ScaleRangeDescr(kwargs=v.ScaleRangeKwargs(**percentiles))
    return v.InputTensorDescr(
        id=v.TensorId("image"),
        axes=[
            v.BatchAxis(),
            v.ChannelAxis(channel_names=[f"channel{i}" for i in range(about["channels"])]),
            *(
                v.SpaceInputAxis(size=v.ParameterizedSize(min=n, step=s), **_space(v, about, i))
                for i, (n, s) in enumerate(sides)
            ),
        ],
        data=v.IntervalOrRatioDataDescr(type="float32"),
        test_tensor=v.FileDescr(source=file),
        pad=v.ReflectPadding(mode="reflect"),
        preprocessing=[scaling] if about["percentiles"] else [],
    )


def _output(v: Any, model: UNet, about: dict[str, Any], file: Path) -> Any:
    def axis(i: int) -> Any:
        space = _space(v, about, i)
        size = v.SizeReference(
            tensor_id=v.TensorId("image"), axis_id=space["id"], offset=-model.shrinkage[i]
        )
        if about["halo"][i]:
            return v.SpaceOutputAxisWithHalo(size=size, halo=about["halo"][i], **space)
        return v.SpaceOutputAxis(size=size, **space)

    return v.OutputTensorDescr(
        id=v.TensorId("probabilities"),
        axes=[
            v.BatchAxis(),
            v.ChannelAxis(channel_names=[f"class{value}" for value in about["classes"]]),
            *(axis(i) for i in range(model.dims)),
        ],
        data=v.IntervalOrRatioDataDescr(type="float32", range=(0.0, 1.0)),
        test_tensor=v.FileDescr(source=file),
    )


def _text(name: str, model: UNet, about: dict[str, Any]) -> str:
    channels = about["channels"]
    return TEXT.format(
        name=name,
        axes=model.dims,
        channels=f"images of {channels} channel{'s' * (channels > 1)}",
        classes=len(about["classes"]),
        input=SCALED.format(LOW, HIGH) if about["percentiles"] else UNSCALED,
        sides=TILED if about["tiles"] else WHOLE,
        objects=about["objects"],
    )
