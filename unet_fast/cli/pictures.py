"""Commands that show what the recipe does to images and labels."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..weights import BorderWeights
from .entry import app


@app.command
def weights(
    labels: Path,
    /,
    *,
    out: Path,
    preset: Literal["paper-2015", "falk-2019"] = "paper-2015",
    ignore_label: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weight maps of instance labels, and pictures of them.

    For NAME.png the map is NAME.tif (float32), the picture NAME.png. Balanced class weights
    (paper-2015) are counted over all files, as in training.

    Parameters
    ----------
    labels:
        An instance map, or a folder of instance maps.
    out:
        Folder for the results, made if it is missing; not the folder of the labels.
    preset:
        paper-2015 (w0 10, sigma 5) or falk-2019 (w0 50, sigma 6, halo).
    ignore_label:
        Label of pixels that do not count.
    overwrite:
        Replace files of the same names in the output folder.
    """
    import torch

    from .._progress import bar
    from ..images.files import read_labels, write_tiff
    from ..plots import draw_weights

    presets = {"paper-2015": BorderWeights.paper_2015(), "falk-2019": BorderWeights.falk_2019()}
    files = _files(labels)
    maps = [torch.from_numpy(read_labels(file)) for file in files]
    results = _results(out, files, (".tif", ".png"), overwrite)
    weigh = replace(presets[preset], ignore_label=ignore_label).balanced(maps)
    with bar(len(files), "weights", "image") as shown:
        for file, image, (tiff, png) in zip(files, maps, results, strict=True):
            target, weight_map = (x.numpy() for x in weigh(image))
            write_tiff(tiff, weight_map)
            draw_weights(
                png,
                labels=image.numpy(),
                target=target,
                weights=weight_map,
                title=f"{file.stem}, {preset}",
            )
            shown.update()
    print(f"{len(files)} weight maps: {out}")


@app.command
def augment(
    images: Path,
    labels: Path,
    /,
    *,
    out: Path,
    preset: Literal["paper-2015", "falk-2019"] = "paper-2015",
    samples: int = 7,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Draw what random deformation does to images and their labels.

    For NAME.png the contact sheet NAME.png shows the image as it is and deformed versions, with the
    outlines of its objects and a grid that was straight.

    Parameters
    ----------
    images:
        Folder of images.
    labels:
        Folder of instance labels of the same names.
    out:
        Folder for the pictures, made if it is missing; not a folder of the input.
    preset:
        paper-2015 (displacements of 10 px on a 3 x 3 grid) or falk-2019 (spline coefficients 150 px
        apart).
    samples:
        Deformed versions of each image, 1 to 100.
    seed:
        Seed of the random numbers.
    overwrite:
        Replace files of the same names in the output folder.
    """
    import torch

    from ..augment import Augmentation
    from ..images.folders import find_pairs
    from ..images.intensity import normalise
    from ..plots import draw_augmentation
    from ..training.samples import load_samples

    if not 1 <= samples <= 100:
        raise ValueError(f"samples must be from 1 to 100, got {samples}")
    aug = {"paper-2015": Augmentation.paper_2015(), "falk-2019": Augmentation.falk_2019()}[preset]
    still = Augmentation(
        sigma=0, rotation=0, gray_black=(0, 0), gray_white=(1, 1), gray_slope=(1, 1)
    )
    files = [file for pair in find_pairs(images, labels) for file in pair]
    results = _results(out, files, (".png",), overwrite)[::2]
    generator = torch.Generator().manual_seed(seed)
    loaded = load_samples(images, labels)
    for sample, (path,) in zip(loaded, results, strict=True):
        gray = torch.from_numpy(normalise(sample.image)).mean(0, keepdim=True)
        ids = torch.from_numpy(sample.labels)
        panels = []
        for change, count in ((still, 1), (aug, samples)):
            drawn = change.draw(count, gray.shape, generator=generator)
            many = gray.expand(count, -1, -1, -1), ids.expand(count, -1, -1)
            moved = zip(*change.with_grid(*many, drawn), strict=True)
            panels += [(m[0].numpy(), i.numpy(), lines.numpy()) for m, i, lines in moved]
        title = f"{sample.name}, {preset}, seed {seed}"
        draw_augmentation(path, samples=panels, title=title)
    print(f"{len(loaded)} contact sheets: {out}")


def _files(path: Path) -> list[Path]:
    """Lists the images of a folder, or the one image."""
    from ..images.folders import list_images

    return list_images(path) if path.is_dir() or not path.exists() else [path]


def _results(
    out: Path, files: list[Path], suffixes: tuple[str, ...], overwrite: bool
) -> list[list[Path]]:
    """Returns the files to write; refuses those of the input, and old ones unless `overwrite`."""
    from .._files import make_folder

    make_folder(out)
    results = [[out / (file.stem + suffix) for suffix in suffixes] for file in files]
    taken = [path for paths in results for path in paths if path.exists()]
    for path in taken:
        if any(path.samefile(file) for file in files if file.exists()):
            raise ValueError(f"out must not be the folder of the input, got {out}")
    if taken and not overwrite:
        raise ValueError(f"out must not hold files of the results' names, got {taken[0]}")
    return results
