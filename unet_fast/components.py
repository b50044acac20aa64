"""Connected components: of a whole mask, and of one that is seen block by block."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, sparse
from torch import Tensor

from .reference.border_weight_map import spatial_axes


def label_components(mask: Tensor, connectivity: int = 1) -> Tensor:
    """Numbers the connected parts of a mask, from 1; touching objects become one.

    Args:
        mask: (H, W), (N, H, W) or (N, D, H, W), bool or integer; everything not 0 is foreground.
            Each image is numbered by itself.
        connectivity: How many axes a step between connected pixels may take at once: 1 along the
            axes only (4 neighbours in 2D, 6 in 3D), 2 diagonally too, up to the number of axes.

    Returns:
        int32 labels, of the shape and device of `mask`.

    Raises:
        ValueError: If `mask` has another number of axes or `connectivity` is out of range.
    """
    if mask.dim() not in (2, 3, 4):
        raise ValueError(
            "label_components: mask must be (H, W), (N, H, W) or (N, D, H, W), "
            f"got {tuple(mask.shape)}"
        )
    axes = spatial_axes(mask)
    if not 1 <= connectivity <= axes:
        raise ValueError(
            f"label_components: connectivity must be in [1, {axes}], got {connectivity}"
        )
    structure = ndimage.generate_binary_structure(axes, connectivity)
    images = mask.reshape(-1, *mask.shape[-axes:]).cpu().numpy() != 0
    labels = [ndimage.label(image, structure)[0] for image in images]
    numbered = np.stack(labels) if labels else images
    result = torch.from_numpy(numbered.astype(np.int32)).reshape(mask.shape)
    return result.to(mask.device)


Region = Callable[[slice, slice], NDArray[np.integer]]


def label_in_blocks(
    size: tuple[int, int],
    block: tuple[int, int],
    mask: Region,
    labels: Region,
    write: Callable[[slice, slice, NDArray[np.integer]], None],
) -> None:
    """Numbers the parts of a mask that are connected along the axes, a block at a time.

    Each block by itself first; parts that meet where blocks meet are one. They are numbered in the
    order of their first pixels, row by row: as :func:`label_components` does.

    Args:
        size: Of the mask, (H, W).
        block: Sides of a block.
        mask: Reads rows and columns of the mask; what is not 0 is foreground.
        labels: Reads what was written.
        write: Writes rows and columns of the labels, int32; each block twice.
    """
    rows, columns = (
        [slice(start, min(start + side, n)) for start in range(0, n, side)]
        for n, side in zip(size, block, strict=True)
    )
    first = [np.zeros(1, np.int64)]  # of each part, its first pixel; of the background any
    pairs: list[NDArray[np.int64]] = []
    count = 0
    above = np.zeros(size[1], np.int64)
    for row in rows:
        left = np.zeros(row.stop - row.start, np.int64)
        for column in columns:
            parts, found = ndimage.label(mask(row, column))
            values, at = np.unique(parts, return_index=True)
            pixel = np.unravel_index(at[values > 0], parts.shape)
            first.append((pixel[0] + row.start) * size[1] + pixel[1] + column.start)
            ids = np.where(parts > 0, parts.astype(np.int64) + count, 0)
            count += found
            write(row, column, ids.astype(np.int32))
            for mine, others in ((ids[0], above[column]), (ids[:, 0], left)):
                met = (mine > 0) & (others > 0)
                pairs.append(np.unique(np.stack([mine[met], others[met]]), axis=1))
            left, above[column] = ids[:, -1], ids[-1]
    one, other = np.concatenate(pairs, axis=1)
    links = sparse.coo_array((np.ones(len(one)), (one, other)), (count + 1, count + 1))
    _, group = sparse.csgraph.connected_components(links, directed=False)
    start = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(start, group, np.concatenate(first))
    start[group[0]] = -1  # background becomes 0
    number = np.argsort(np.argsort(start)).astype(np.int32)[group]
    for row in rows:
        for column in columns:
            write(row, column, number[labels(row, column)])
