"""Signs in labels, and in images beside them, that labels are not what they are taken for."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .._progress import listed

Ids = NDArray[np.int32]

INTERPOLATED = (
    "look interpolated, or were once saved as JPEG: values in between lie along the edges, and "
    "count as objects; export them anew, without loss, and resize by nearest neighbour"
)
"""What to say of labels for which :func:`interpolated` holds."""
FEW = 4
"""Values of a map that may be one of classes."""
LABELS_HINT = (
    "is it the folder of the images, or are labels among them, and --label-suffix tells which?"
)
"""What else may have been read as labels."""


@dataclass
class Background:
    """Collects signs that something else than 0 is the background, map by map."""

    ignore_label: int | None
    """Value of pixels that do not count, or None."""
    values: set[int] = field(default_factory=set)
    edges: Counter[int] = field(default_factory=Counter)
    ignored: bool = False
    """Whether some pixels do not count."""
    maps: int = 0
    inverted: int = 0

    def look(self, ids: Ids) -> None:
        """Looks at a map, (H, W)."""
        self.maps += 1
        edge = edge_of(ids)
        values, counts = np.unique(edge[edge != self.ignore_label], return_counts=True)
        self.edges.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        found = {*np.unique(ids).tolist()}
        self.ignored |= self.ignore_label in found
        self.values |= found - {self.ignore_label}
        if len(found - {0, self.ignore_label}) == 1:
            self.inverted += inverted((ids != 0) & (ids != self.ignore_label))

    def doubts(self) -> list[str]:
        """Returns a line for each sign."""
        lines = []
        along, count = self.edges.most_common(1)[0] if self.edges else (0, 0)
        if 0 not in self.values and len(self.values) > 1 and 2 * count > self.edges.total():
            lines.append(
                "no pixel is 0, which stands for the background, but most along the edges of the "
                f"images are {along}: if that is the background, make it 0"
            )
        if len(self.values - {0}) == 1 and 2 * self.inverted > self.maps:
            lines.append(
                f"masks look inverted: {max(self.values)} surrounds places of 0, which count as "
                "background; if those are the objects, invert the masks (Fiji: Edit > Invert)"
            )
        if self.maps and self.ignore_label is not None and not self.ignored:
            lines.append("no pixel has the label to ignore")
        return lines


@dataclass
class Doubts:
    """Collects signs that maps of objects are something else, map by map."""

    subject: str
    """What is read: "evaluate: labels"."""
    hint: str
    """What else may have been read: "is it the folder of the images?"."""
    seen: int = 0
    pictures: int = 0
    blurred: list[str] = field(default_factory=list)
    background: Background = field(default_factory=lambda: Background(None))

    def look(self, name: str, ids: Ids, masks: bool = False) -> None:
        """Looks at a map, (H, W), of objects or a mask."""
        self.background.look(ids)
        if masks:
            return
        self.seen += 1
        self.pictures += is_picture(ids)
        if interpolated(ids):
            self.blurred.append(name)

    def tell(self, refuse: bool) -> None:
        """Warns of doubtful maps; if half of them look like images, it may refuse them.

        Raises:
            ValueError: If it refuses them.
        """
        if self.pictures and 2 * self.pictures >= self.seen:
            text = (
                f"{self.subject}: objects must be numbered, got what looks like images (grey "
                f"values that differ from pixel to pixel): {self.hint}"
            )
            if refuse:
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)
        doubts = [f"{self.subject}: {text}" for text in self.background.doubts()]
        if self.blurred:
            doubts.append(f"{self.subject} {INTERPOLATED}: {listed(self.blurred)}")
        for text in doubts:
            warnings.warn(text, stacklevel=2)


def flatness(plane: NDArray[np.generic]) -> float:
    """Returns the share of pixels that equal their right neighbour: most in a map of labels."""
    if plane.shape[1] < 2:
        return 1.0
    return float(np.mean(plane[:, 1:] == plane[:, :-1]))


def is_picture(labels: Ids) -> bool:
    """Whether labels have many values that change every 3 pixels, as grey values of images do."""
    return len(np.unique(labels)) > 20 and flatness(labels) < 2 / 3


def outlines(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Marks pixels of objects that have a neighbour of another value along an axis."""
    edge = np.zeros(labels.shape, dtype=bool)
    rows, columns = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    return edge & (labels > 0)


def parts_of(labels: Ids, ignore_label: int | None = None) -> dict[int, int]:
    """Returns the number of connected components, also along diagonals, of each object."""
    parts: dict[int, int] = {}
    for value, box in boxes_of(labels, ignore_label):
        parts[value] = int(ndimage.label(labels[box] == value, np.ones((3,) * labels.ndim))[1])
    return parts


def interpolated(labels: Ids) -> bool:
    """Whether labels seem resized with interpolation: values in between lie along the edges.

    Such a pixel has no neighbour of its own value, but a smaller one on one side and a larger one
    on the other. A map of objects has few such pixels. Maps of a few classes may have many.
    """
    if len(np.unique(labels)) <= FEW:
        return False
    middle = labels[1:-1, 1:-1]
    if middle.size == 0:
        return False
    around = labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:]
    alone = np.all([middle != x for x in around], axis=0)
    between = [
        (np.minimum(a, b) < middle) & (middle < np.maximum(a, b))
        for a, b in (around[:2], around[2:])
    ]
    count = np.count_nonzero(alone & (between[0] | between[1]) & (middle > 0))
    return bool(count > max(10, 0.05 * np.count_nonzero(outlines(labels))))


def merged_parts(mask: NDArray[np.bool_]) -> int:
    """Counts the connected components of a mask with several thick places and thin ones between."""
    parts, count = ndimage.label(mask)
    if count == 0:
        return 0
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[(slice(1, -1),) * mask.ndim]
    most = ndimage.maximum(depth, parts, np.arange(count + 1))
    most[0] = 0
    cores, cores_count = ndimage.label(mask & (depth > 0.6 * most[parts]) & (most[parts] >= 3))
    if cores_count == 0:
        return 0
    owner = ndimage.maximum(parts, cores, np.arange(1, cores_count + 1)).astype(int)
    return int(np.count_nonzero(np.bincount(owner) > 1))


def ids_of(labels: Ids, ignore_label: int | None) -> NDArray[np.int32]:
    """Returns the values of the objects, in ascending order."""
    values = np.unique(labels)
    kept: NDArray[np.int32] = values[(values != 0) & (values != ignore_label)]
    return kept


def restarted(labels: Ids, ignore_label: int | None) -> bool:
    """Whether the objects of a volume, (D, H, W), seem to be numbered anew in each plane.

    Where objects of one annotated plane lie over those of the next one, most have another number
    then; of planes that do not touch this is normal, but not that each holds the first numbers.
    """
    inside = (labels != 0) & (labels != ignore_label)
    planes = np.flatnonzero(inside.any((1, 2)))
    pairs = np.column_stack([planes[:-1], planes[1:]])
    touching = pairs[np.diff(pairs)[:, 0] == 1]
    if len(touching):
        pairs = touching
    else:
        ids = [ids_of(labels[z], ignore_label) for z in planes]
        first = min((int(x[0]) for x in ids), default=0)
        if any(len(x) < 3 or int(x[-1]) != first + len(x) - 1 for x in ids):
            return False
    over = [inside[a] & inside[b] for a, b in pairs]
    same = sum(
        int((labels[a] == labels[b])[both].sum()) for (a, b), both in zip(pairs, over, strict=True)
    )
    return 2 * same < sum(int(both.sum()) for both in over)


def boxes_of(labels: Ids, ignore_label: int | None) -> list[tuple[int, tuple[slice, ...]]]:
    """Returns each object's value and bounding box."""
    values, dense = np.unique(labels, return_inverse=True)
    boxes = ndimage.find_objects(dense.reshape(labels.shape) + 1)
    pairs = zip(values.tolist(), boxes, strict=True)
    return [(v, box) for v, box in pairs if v not in (0, ignore_label)]


def edge_of(labels: Ids) -> Ids:
    """Returns the pixels along the edges of an image."""
    return np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])


def inverted(mask: NDArray[np.bool_]) -> bool:
    """Whether most of a mask is one part that surrounds several parts of the background.

    Objects in a mask are surrounded by background instead; the borders between objects that fill
    an image, such as cells in EM, are one part of background that surrounds them.
    """
    places, _ = ndimage.label(~mask)
    large = np.count_nonzero(np.bincount(places.ravel())[1:] >= 9)
    return bool(2 * mask.sum() > mask.size and large >= 2 * ndimage.label(mask)[1])


def cut_by_edges(labels: Ids, ignore_label: int | None = None) -> tuple[int, int]:
    """Returns the number of objects that touch the edge of the image, and that of all objects."""
    return len(ids_of(edge_of(labels), ignore_label)), len(ids_of(labels, ignore_label))


def hollow(labels: Ids, ignore_label: int | None = None) -> tuple[int, int]:
    """Returns the number of objects that are thin closed curves, and that of all objects.

    Such an object takes less than a third of what it encloses, itself included.
    """
    boxes = boxes_of(labels, ignore_label)
    count = 0
    for value, box in boxes:
        mask = labels[box] == value
        count += int(3 * mask.sum() < ndimage.binary_fill_holes(mask).sum())
    return count, len(boxes)


def thin(labels: Ids) -> int:
    """Counts the objects that are lines: all pixels have a neighbour of another value."""
    inner = np.where(outlines(labels), 0, labels)
    return len(np.setdiff1d(np.unique(labels), np.unique(inner)))


def misplaced(grey: NDArray[np.float32], labels: Ids, others: Sequence[Ids]) -> bool:
    """Whether labels of other images, or these ones flipped, fit an image much better.

    What tells is the difference of the mean inside and outside of objects, in units of the standard
    deviation; without a clear one nothing is told.

    Args:
        grey: (H, W).
        labels: (H, W).
        others: Labels of other images; those of another size do not count.
    """
    step = -(-max(labels.shape) // 256)
    few = grey[::step, ::step]

    def contrast(ids: Ids) -> float:
        inside = ids[::step, ::step] > 0
        if inside.shape != few.shape or inside.all() or not inside.any():
            return 0.0
        return float(abs(few[inside].mean() - few[~inside].mean()) / max(few.std(), 1e-9))

    turned = (labels[::-1], labels[:, ::-1], labels[::-1, ::-1], labels.T, labels.T[::-1])
    best = max(contrast(ids) for ids in (*turned, labels.T[:, ::-1], *others))
    return best > 1 and best > 2 * contrast(labels)


def unlabelled(image: NDArray[np.float32], labels: Ids, ignored: NDArray[np.bool_]) -> int:
    """Counts regions without label that are as bright as the labelled objects, and as large.

    Where objects do not stand out of the background by their grey values, these tell nothing,
    and the count is 0. Objects may be darker than the background, too.

    Args:
        image: (C, H, W).
        labels: (H, W), 0 where there is no label.
        ignored: (H, W), the pixels that do not count.
    """
    grey = ndimage.gaussian_filter(image.mean(0), 1.0)
    inside = labels > 0
    outside = ~inside & ~ignored
    if not inside.any() or not outside.any():
        return 0
    own, rest = grey[inside], grey[outside]
    # The lower half of what is around objects is background, even where many lack a label.
    sign = 1.0 if np.median(own) > np.median(rest) else -1.0
    own, rest, grey = sign * own, sign * rest, sign * grey
    low, ground, spread = np.percentile(rest, [5, 25, 50])
    typical, weak = np.percentile(own, [50, 25])
    if typical - ground < 4 * max(spread - low, 1e-6):
        return 0
    bright = ~ndimage.binary_dilation(~outside, iterations=3)
    bright &= grey > max(weak, (typical + ground) / 2)
    parts, _ = ndimage.label(bright)
    areas = np.bincount(parts.ravel())[1:]
    of_objects = np.bincount(labels[inside])
    least = 0.5 * np.percentile(of_objects[of_objects > 0], 25)
    return int(np.count_nonzero(areas >= max(least, 9)))
