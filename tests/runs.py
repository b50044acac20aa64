"""Small training runs."""

import numpy as np
from PIL import Image

from unet_fast import TrainConfig


def discs_in(folder, count=3, size=48):
    """Bright discs on a noisy ground, with labels."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        labels = np.zeros((size, size), np.uint8)
        for number in range(1, 5):
            r, c = rng.integers(6, size - 6, 2)
            labels[np.hypot(rows - r, columns - c) < 6] = number
        image = 40 + 100 * (labels > 0) + rng.normal(0, 8, labels.shape)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(labels).save(folder / f"labels/{i}.png")
    return folder / "images", folder / "labels"


SMALL = {"steps": 3, "base_channels": 4, "depth": 2, "tile": 40, "previews": 0}


def config(discs, out, **changes):
    return TrainConfig(*discs, out=out, **SMALL | changes)


def options(changes):
    """The same settings as words of the command line."""
    settings = {"base_channels": 2, "depth": 1, "tile": 16} | changes
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
