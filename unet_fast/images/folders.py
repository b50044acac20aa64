"""Folders of images: which files are there, under which names."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")

_TIFF = "must be exported as TIFF (e.g. in Fiji: File > Save As > Tiff)"
_WAYS_OUT = {
    "_seg.npy": "must be saved as PNG or TIFF in Cellpose (File > Save masks as PNG/tif, or "
    "--save_png): pickled objects are never opened",
    ".npy .npz": "must be saved as TIFF (e.g. in Python: tifffile.imwrite('a.tif', "
    "numpy.load('a.npy')))",
    ".gif .webp .jp2 .j2k .heic .avif": "must be converted to PNG or TIFF (e.g. in Fiji: File > "
    "Save As > PNG)",
    ".czi .lif .lof .nd2 .oib .oif .oir .vsi .lsm .zvi .stk .dv .ims .dm3 .dm4 .mrc .ser": _TIFF,
    ".svs .ndpi .scn .mrxs .qptiff .dcm .nii .nrrd .h5 .hdf5 .ilastik .mat .zarr": _TIFF,
}
"""What to do with files of images that are not read, by the ends of their names."""


def find_files(
    folder: Path, suffixes: tuple[str, ...] = SUFFIXES, *, recursive: bool = False
) -> list[Path]:
    """Finds the files of a folder that have one of these suffixes, sorted, without hidden ones.

    Args:
        folder: The folder.
        suffixes: Suffixes in lower case.
        recursive: Whether files of nested folders count.

    Raises:
        ValueError: If there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing there"
        raise ValueError(f"{folder}: must be a folder of images, got {kind}")
    seen = contents(folder, recursive=recursive)
    files = [f for f in seen if f.suffix.lower() in suffixes]
    if not files:
        hints = [*_foreign(seen)]
        nested = set() if recursive else {*contents(folder, recursive=True)} - {*seen}
        if any(f.suffix.lower() in (*suffixes, ".zarr") for f in nested):
            hints.append("there are images in nested folders, which --recursive takes")
        got = ": ".join(["none", "; ".join(hints)] if hints else ["none"])
        raise ValueError(f"{folder}: must hold images ({', '.join(suffixes)}), got {got}")
    return files


def outside(files: list[Path], folder: Path, of: Path) -> list[Path]:
    """Returns the files of one folder that are not in another one that lies within it."""
    inner, outer = folder.absolute(), of.absolute()
    if outer not in inner.parents:
        return files
    return [file for file in files if inner not in file.absolute().parents]


def way_out(file: Path) -> str | None:
    """Says what must be done with a file of a format that is not read; None: nobody knows."""
    name = file.name.lower()
    return next((text for ends, text in _WAYS_OUT.items() if name.endswith((*ends.split(),))), None)


def left_out(folder: Path, files: Iterable[Path]) -> list[str]:
    """Tells of those files of a folder whose formats are not read, a line for each format."""
    return [f"{folder}: {text}; left out" for text in _foreign(files)]


def _foreign(files: Iterable[Path]) -> Iterator[str]:
    names = [f.name.lower() for f in files]
    for ends, way_out in _WAYS_OUT.items():
        counts = {end: sum(name.endswith(end) for name in names) for end in ends.split()}
        names = [name for name in names if not name.endswith((*counts,))]
        found = [f"{n} {end} file{'s' * (n > 1)}" for end, n in counts.items() if n]
        if found:
            yield f"found {', '.join(found)}, which {way_out}"


def contents(folder: Path, *, recursive: bool = False) -> list[Path]:
    """Lists what a folder holds, or a tree of folders, sorted; hidden files do not count."""
    if not recursive:
        return sorted(f for f in folder.iterdir() if f.name[0] != ".")
    found: list[Path] = []
    for top, folders, names in os.walk(folder, onerror=_fail):
        arrays = [d for d in folders if d.lower().endswith(".zarr")]
        found += [Path(top, name) for name in [*names, *arrays] if name[0] != "."]
        folders[:] = [d for d in folders if d[0] != "." and d not in arrays]
    return sorted(found)


def _fail(error: OSError) -> NoReturn:
    raise error


def stem_of(path: Path) -> str:
    """Returns a name without image suffixes: .png, .tif, .ome.tif, .zarr, .ome.zarr."""
    stem = path.name.removesuffix(".zarr") if path.is_dir() else path.stem
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def name_of(folder: Path, file: Path) -> str:
    """Returns the path of a file below a folder, without image suffixes; its name elsewhere."""
    if folder not in file.parents:
        return stem_of(file)
    return (file.parent.relative_to(folder) / stem_of(file)).as_posix()


def unique(folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Returns the files of a folder by name, after checking that no two differ in suffix only.

    Raises:
        ValueError: If two do, or a name is no text, as one that is not UTF-8.
    """
    named: dict[str, Path] = {}
    for file in files:
        if not file.name.isprintable():
            raise ValueError(f"{folder}: names must be printable text, got {file.name!r}")
        other = named.setdefault(name_of(folder, file), file)
        if other != file:
            raise ValueError(
                f"{folder}: names must be unique without suffix, got {other.name} and {file.name}"
            )
    return named


def unpaired(one: dict[str, Path], other: dict[str, Path]) -> list[Path]:
    """Returns the files of one folder, given by name, without a partner in the other."""
    return [one[name] for name in sorted(one.keys() - other.keys())]


def check_size(
    image: Path, shape: tuple[int, ...], other: Path, other_shape: tuple[int, ...]
) -> None:
    """Raises ValueError if a file that belongs to an image differs in size."""
    if shape != other_shape:
        raise ValueError(
            f"{other}: must have the size of {image}, {_size(shape)}, got {_size(other_shape)} "
            "(crop or scale one of them; labels by nearest neighbour)"
        )


def label_type_of(
    labels: Iterable[NDArray[np.int32]], ignore_label: int | None
) -> Literal["instances", "semantic"]:
    """Guesses what label files hold: semantic if all together have one value beside 0."""
    values: set[int] = set()
    for image in labels:
        values.update(np.unique(image).tolist())
        if len(values - {0, ignore_label}) > 1:
            return "instances"  # the other maps need not be read
    return "semantic" if values - {0, ignore_label} else "instances"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
