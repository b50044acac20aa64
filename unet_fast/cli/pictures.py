"""Commands that show what the recipe does to images and labels."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..weights import BorderWeights
from .entry import AS_FOUND, ReadingOptions, app


@app.command
def weights(
    labels: Path,
    /,
    *,
    out: Path,
    images: Path | None = None,
    preset: Literal["paper-2015", "falk-2019"] = "paper-2015",
    label_type: Literal["auto", "instances", "semantic"] = "auto",
    reading: ReadingOptions = AS_FOUND,
    overwrite: bool = False,
) -> None:
    """Write the weight maps of instance labels, and pictures of them.

    ```
    unet-fast weights labels --out maps
    ```

    For NAME.png the map is NAME.tif (float32), the picture NAME.png; of a stack the map is a stack,
    the picture its middle plane, or with --dims 3 its sections. Balanced class weights (paper-2015)
    are counted over all files, as in training.

    Parameters
    ----------
    labels:
        A file or a folder of instance labels: label images, stacks or outlines, as for training.
    out:
        Folder for the results, made if it is missing; not the folder of the labels.
    images:
        The image or folder of images of the labels. Outlines (ImageJ ROIs, GeoJSON) need it: they
        do not say how large the image is.
    preset:
        paper-2015 (w0 10, sigma 5) or falk-2019 (w0 50, sigma 6, halo).
    label_type:
        instances: the labels number the objects; semantic: the connected components of what is not
        0 are the objects; auto: by the values.
    overwrite:
        Replace files of the same names in the output folder.
    """
    import numpy as np
    import torch

    from .._progress import bar, counted
    from ..images.annotations import is_outlines
    from ..images.files import write_tiff
    from ..images.folders import label_type_of
    from ..images.pairing import find_labels, ratio_of
    from ..images.sections import cut_of
    from ..images.signs import LABELS_HINT, Background, Doubts
    from ..images.source import Plane, Source, open_labels, open_source, planes_of
    from ..objects import label_components
    from ..plots import draw_weights

    presets = {"paper-2015": BorderWeights.paper_2015(), "falk-2019": BorderWeights.falk_2019()}
    told: set[str] = set()
    found = find_labels(labels, images, reading, told.add)

    def opened(file: Path, image: Path | None) -> Source:
        like = None
        if image is not None and is_outlines(file):
            like = open_source(image, None, axes=reading.axes, dims=reading.dims)
        return open_labels(file, like, told.add, dims=reading.dims)

    def spacing_of(file: Path, image: Path | None, source: Source) -> tuple[float, ...]:
        if image is not None:  # as in training
            source = open_source(image, None, axes=reading.axes, dims=3)
        return ratio_of(image or file, reading.voxel_size or source.spacing)

    def read(plane: Plane) -> torch.Tensor:
        return torch.from_numpy(reading.marked(plane.path, plane.labels(told.add)))

    maps = {name: [read(x) for x in planes_of(opened(*pair))] for name, pair in found.items()}
    ignore_label = reading.ignored
    for text in sorted(told):
        warnings.warn(text, stacklevel=1)
    results = [[out / (name + end) for end in (".tif", ".png")] for name in found]
    inputs = [x for pair in found.values() for x in pair if x is not None]
    _check(out, [path for paths in results for path in paths], inputs, overwrite)
    every = [ids for planes in maps.values() for ids in planes]
    if label_type == "auto":
        label_type = label_type_of((ids.numpy() for ids in every), ignore_label)
    doubts = Doubts("weights: labels", LABELS_HINT, background=Background(ignore_label))
    for name, planes in maps.items():
        for ids in planes:
            if reading.dims == 2:  # what it looks for is seen in planes
                doubts.look(name, ids.numpy(), masks=label_type == "semantic")
            if label_type == "semantic":
                ignored = ids == (-1 if ignore_label is None else ignore_label)
                parts = label_components((ids != 0) & ~ignored, dims=reading.dims)
                if ignore_label is not None:  # no part is numbered as what is ignored
                    parts += (parts > 0) & (parts >= ignore_label)
                ids.copy_(torch.where(ignored, ids, parts))
    doubts.tell(refuse=True)
    weigh = replace(presets[preset], ignore_label=ignore_label).balanced(every, dims=reading.dims)
    with bar(len(found), "weights", "image") as shown:
        for name, (tiff, png) in zip(found, results, strict=True):
            source = opened(*found[name])  # not all at once: a mapped file counts as open
            axes, shape = source.layout(())
            stack = np.empty(shape, np.float32)
            for number, (plane, ids) in enumerate(zip(source.planes, maps[name], strict=True)):
                if reading.dims == 3:
                    weigh = replace(weigh, spacing=spacing_of(*found[name], source))
                target, weight_map = (x.numpy() for x in weigh(ids, dims=reading.dims))
                stack[source.place(stack, plane, *[slice(None)] * reading.dims)] = weight_map
                if number == len(source.planes) // 2:
                    depth = (weigh.spacing or (1.0,))[0]
                    cut = cut_of(np.where(ids == ignore_label, 0, ids.numpy()), depth)
                    draw_weights(
                        png,
                        labels=cut(ids.numpy()),
                        target=cut(target),
                        weights=cut(weight_map),
                        title=f"{Plane(source, plane).name}, {preset}",
                    )
            write_tiff(tiff, stack, axes, source.pixel_size)
            shown.update()
    print(f"{counted(len(found), 'weight map')}: {out}")


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
    reading: ReadingOptions = AS_FOUND,
    overwrite: bool = False,
) -> None:
    """Draw what random deformation does to images and their labels.

    ```
    unet-fast augment images labels --out sheets
    ```

    For NAME.png the contact sheet NAME.png shows the image as it is and deformed versions, with the
    outlines of its objects and a grid that was straight.

    Parameters
    ----------
    images:
        Folder of images.
    labels:
        Folder of instance labels of the same names, or names such as a_mask.png.
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
    import numpy as np
    import torch

    from .._progress import counted
    from ..augment import Augmentation
    from ..images.intensity import normalise
    from ..images.pairing import find_pairs
    from ..plots import draw_augmentation
    from ..training.looks import warn_of
    from ..training.samples import load_samples

    if not 1 <= samples <= 100:
        raise ValueError(f"samples must be from 1 to 100, got {samples}")
    if reading.dims == 3:
        raise ValueError("dims must be 2, because sheets show planes, got 3")
    aug = {"paper-2015": Augmentation.paper_2015(), "falk-2019": Augmentation.falk_2019()}[preset]
    still = Augmentation(
        sigma=0, rotation=0, gray_black=(0, 0), gray_white=(1, 1), gray_slope=(1, 1)
    )
    pairs = find_pairs(images, labels, reading).pairs
    files = [file for pair in pairs for file in (pair.image, pair.labels)]
    loaded = load_samples(images, labels, reading=reading)
    warn_of(loaded, validated=False, label_type="instances", ignore_label=reading.ignored)
    results = [out / f"{sample.name}.png" for sample in loaded]
    _check(out, results, files, overwrite)
    generator = torch.Generator().manual_seed(seed)
    for sample, path in zip(loaded, results, strict=True):
        gray = torch.from_numpy(normalise(sample.image)).mean(0, keepdim=True)
        ids = torch.from_numpy(np.where(sample.labels == reading.ignored, 0, sample.labels))
        panels = []
        for change, count in ((still, 1), (aug, samples)):
            drawn = change.draw(count, gray.shape, generator=generator)
            many = gray.expand(count, -1, -1, -1), ids.expand(count, -1, -1)
            moved = zip(*change.with_grid(*many, drawn), strict=True)
            panels += [(m[0].numpy(), i.numpy(), lines.numpy()) for m, i, lines in moved]
        title = f"{sample.name}, {preset}, seed {seed}"
        draw_augmentation(path, samples=panels, title=title)
    print(f"{counted(len(loaded), 'contact sheet')}: {out}")


def _check(out: Path, results: list[Path], files: list[Path], overwrite: bool) -> None:
    """Refuses to write files of the input, and old ones unless `overwrite`."""
    from .._files import make_folder

    taken = [path for path in results if path.exists()]
    for path in taken:
        if any(path.samefile(file) for file in files):
            raise ValueError(f"out must not be the folder of the input, got {out}")
    if taken and not overwrite:
        raise ValueError(f"out must not hold files of the results' names, got {taken[0]}")
    for folder in {out, *(path.parent for path in results)}:
        make_folder(folder)
