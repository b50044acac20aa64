"""Draws docs/look.png and docs/label.png from the bundled nuclei: `python docs/draw_pages.py RUN`.

RUN is a training run on the bundled images, such as unet_fast_demo/model.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import roifile
import torch
from PIL import Image
from scipy import ndimage

from unet_fast import BorderWeights
from unet_fast.cli import main
from unet_fast.images.files import read_image, read_labels
from unet_fast.plots import instance_colours

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "unet_fast" / "sample"


def draw(path, panels):
    """Draws pictures in a row, each with its title."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.7), layout="constrained"
    )
    for place, (title, picture) in zip(axes, panels, strict=True):
        place.imshow(picture, cmap="gray", interpolation="nearest")
        place.set(xticks=[], yticks=[])
        place.set_title(title, fontsize=9)
    return figure, axes, path


def look(run, stem="046_2b50b1e3fa5c"):
    """What the files of a result look like."""
    image = SAMPLE / "test" / "images" / f"{stem}.png"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if main(["predict", str(run), str(image), "--out", folder, "--rois"]):
            raise SystemExit("predict failed")
        labels = read_labels(out / f"{stem}.png")
        overlay = np.asarray(Image.open(out / "overlays" / f"{stem}.png"))
        rois = roifile.roiread(out / "rois" / f"{stem}_rois.zip")
    grey = read_image(image)[0] ** 0.5
    panels = [
        ("the image", grey),
        ("results/NAME.png\nin Fiji: grey values are numbers", labels),
        ("results/NAME.png\nin napari: a colour for each", instance_colours(labels)),
        ("results/overlays/NAME.png", overlay),
        ("results/rois/NAME_rois.zip\nalong the edges of pixels", grey),
    ]
    figure, axes, path = draw(HERE / "look.png", panels)
    for roi in rois:
        corners = roi.coordinates()
        axes[-1].plot(*np.vstack([corners, corners[:1]]).T - 0.5, color="gold", lw=1)
    largest = np.bincount(labels[labels > 0]).argmax()
    rows, columns = ndimage.find_objects(labels)[largest - 1]
    axes[-1].set(
        xlim=(columns.start - 12, columns.stop + 12), ylim=(rows.stop + 12, rows.start - 12)
    )
    figure.savefig(path, dpi=80, bbox_inches="tight")


def label(stem="004_0402a81e7526"):
    """Why touching cells need numbers of their own."""
    labels = read_labels(SAMPLE / "test" / "labels" / f"{stem}.png")[:110, :110]
    labels = np.unique(labels, return_inverse=True)[1]  # 0, 1, 2, ...: neighbours differ in colour
    image = read_image(SAMPLE / "test" / "images" / f"{stem}.png")[0, :110, :110] ** 0.5
    weigh = BorderWeights(class_weight=None)
    joined = ndimage.label(labels)[0]
    weights = [weigh(torch.from_numpy(ids.astype(np.int32)))[1] for ids in (labels, joined)]
    panels = [
        ("the image", image),
        (f"a number for each cell: {len(np.unique(labels)) - 1}", instance_colours(labels)),
        ("weights: high between cells", weights[0]),
        (f"a mask: {joined.max()} connected parts", instance_colours(joined)),
        ("weights of the mask", weights[1]),
    ]
    figure, axes, path = draw(HERE / "label.png", panels)
    for place in (axes[2], axes[4]):
        place.images[0].set(cmap="magma", clim=(0, 11))
    figure.savefig(path, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    look(Path(sys.argv[1]))
    label()
