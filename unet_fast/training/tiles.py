"""Training data on the device, where tiles are drawn, cut and deformed, and targets made."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from .._device import data_device, torchrun_number
from .._progress import listed
from ..augment import Augmentation, AugmentationParameters
from ..contracts.border_weight_map import IGNORED
from ..images.folders import label_type_of
from ..images.intensity import normalise, range_of
from ..images.sections import Cut, cut_of
from ..images.source import Stored
from ..weights import BorderWeights
from .config import SPLIT, TrainConfig
from .looks import warn_of
from .samples import NumberedLabels, Sample, counts, load_samples, number_objects, split_names
from .volumes import box_around, box_of, with_voxels


def generator_of(*key: int) -> Generator:
    """Returns a source of random numbers for a key of integers >= 0.

    Every random number of a step comes from the seed and the number of the step, so a run can be
    resumed at any step.
    """
    return Generator().manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """Returns a seed for a key of integers >= 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


EVALUATED = 2**25
"""Most voxels of a volume that are evaluated."""
Part = tuple[Tensor, Tensor, Tensor]
"""A part of a volume, (C, d, h, w), its labels, and the position of its first voxel."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of a step, and how they are deformed."""

    files: list[int]
    offset: Tensor
    """Position in the image of the first pixel of each tile, (N, 2) or (N, 3)."""
    parameters: AugmentationParameters

    def __getitem__(self, samples: slice) -> "Tiles":
        """Selects some of the tiles."""
        return Tiles(self.files[samples], self.offset[samples], self.parameters[samples])

    def describe(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns file, offset and parameters of each tile, for a JSON file."""
        whole = asdict(self.parameters)
        rows = []
        for i, file in enumerate(self.files):
            numbers = {k: None if x is None else x[i].tolist() for k, x in whole.items()}
            rows.append({"file": names[file], "offset": self.offset[i].tolist(), **numbers})
        return rows


class Dataset:
    """Annotated images, or volumes, on a device that has kernels.

    Args:
        samples: The images.
        objects: Their labels, numbered.
        weights: Rule that makes targets and weights of labels; "balanced" is still to be counted.
        device: Where tiles, targets and weights are made; see :func:`data_device`.
        budget: Bytes that images and labels may take on the device; if they take more, they stay in
            pinned memory of the host, and each image goes to the GPU when a tile of it is drawn.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        objects: NumberedLabels,
        weights: BorderWeights,
        device: torch.device,
        budget: float,
    ) -> None:
        self.names = [s.name for s in samples]
        self.shapes = [x.shape for x in objects.labels]
        self.dims = len(self.shapes[0]) if samples else 2
        self.channels = len(samples[0].image) if samples else 1
        self.device = device
        self.num_classes = objects.num_classes
        self.class_values = objects.class_values
        self.table = None if objects.table is None else torch.from_numpy(objects.table).to(device)
        # With a table, object numbers tell which pixels are ignored; no ignore_label is needed.
        self.weights = weights if self.table is None else replace(weights, ignore_label=None)
        self.readers = [_reader(s.image) for s in samples]
        """Of files whose pixels are read as tiles are drawn: what reads them, normalised."""
        values = ((0 if read else self.channels) + 1 for read in self.readers)
        self.size = sum(4 * n * math.prod(x) for n, x in zip(values, self.shapes, strict=True))
        self.resident = self.size <= budget
        # Images of one size form a stack, from which a single pass cuts the tiles of a step.
        # Streamed images, and volumes, form a stack each.
        self.places: list[tuple[int, int]] = []
        stacked = self.resident and self.dims == 2
        keys = [shape if stacked else i for i, shape in enumerate(self.shapes)]
        stacks = {key: (list[Tensor](), list[Tensor]()) for key in keys}
        order = {key: k for k, key in enumerate(stacks)}
        for key, sample, ids in zip(keys, samples, objects.labels, strict=True):
            self.places.append((order[key], len(stacks[key][0])))
            stored = isinstance(sample.image, Stored)
            image = torch.empty(0) if stored else torch.from_numpy(normalise(sample.image))
            stacks[key][0].append(image)
            stacks[key][1].append(torch.from_numpy(ids))
        self.known = [self._known(ids) for ids in objects.labels]
        """Of files with pixels that are ignored: the flat indices of the others."""
        self.stacks = [(self._placed(x), self._placed(y)) for x, y in stacks.values()]
        self.boxes = [self._box(i) for i in range(len(self))]
        """The part of each file that is evaluated: the whole, but of very large volumes."""

    def _box(self, i: int) -> tuple[slice, ...]:
        shape, known = self.shapes[i], self.known[i]
        if math.prod(shape) <= EVALUATED:
            return (slice(None),) * self.dims
        mask = np.full(shape, known is None)
        if known is not None:
            mask.ravel()[known.numpy()] = True
        return box_around(mask, EVALUATED)

    @property
    def evaluated(self) -> list[tuple[int, ...]]:
        """Sizes of what is evaluated of each file."""
        sizes = zip(self.boxes, self.shapes, strict=True)
        return [
            tuple(len(range(side)[part]) for part, side in zip(box, shape, strict=True))
            for box, shape in sizes
        ]

    def _known(self, ids: NDArray[np.int32]) -> Tensor | None:
        value = self.weights.ignore_label
        if self.table is not None:
            known = self.table.cpu().numpy()[ids] != IGNORED
        elif value is not None:
            known = ids != value
        else:
            return None
        if known.all():
            return None
        kind = np.int32 if known.size < 2**31 else np.int64
        return torch.from_numpy(np.flatnonzero(known).astype(kind))

    def _placed(self, parts: list[Tensor]) -> Tensor:
        stack = torch.stack(parts)
        if self.device.type != "cuda":
            return stack
        return stack.to(self.device) if self.resident else stack.pin_memory()

    def __len__(self) -> int:
        return len(self.names)

    def _stack(self, k: int) -> tuple[Tensor, Tensor]:
        """Returns images, (M, C, H, W), and labels, (M, H, W), of a stack, on the device."""
        images, labels = self.stacks[k]
        return (
            images.to(self.device, non_blocking=True),
            labels.to(self.device, non_blocking=True),
        )

    def sample(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns an image, (C, *S), and its labels, (*S), or what of them is evaluated."""
        if self.dims == 3:
            return self._image(i)(*self.boxes[i]).to(self.device), self._labels(i)
        stack, row = self.places[i]
        images, labels = self._stack(stack)
        return images[row], labels[row]

    def _image(self, i: int) -> Callable[..., Tensor]:
        """Returns what reads parts of a volume."""
        stack, row = self.places[i]
        return self.readers[i] or (lambda *part: self.stacks[stack][0][row][:, *part])

    def _labels(self, i: int) -> Tensor:
        stack, row = self.places[i]
        return self.stacks[stack][1][row][self.boxes[i]].to(self.device)

    def truth(self, i: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Returns an image's classes, 255 ignored, and its objects, 0 where none is."""
        labels = self._labels(i)
        classes = self.classes(labels).cpu().numpy()
        inside = (classes > 0) & (classes != IGNORED)
        return classes, np.where(inside, labels.cpu().numpy(), np.int32(0))

    def cut_of(self, labels: NDArray[np.int32]) -> Cut:
        """Returns what draws images, or sections of volumes, to scale; see :func:`cut_of`."""
        depth, *_, width = self.weights.spacing or (1.0, 1.0)
        return cut_of(labels, depth / width)

    def areas(self) -> NDArray[np.integer]:
        """Returns the number of pixels of each object in all images."""
        areas = []
        for i in range(len(self)):
            sums: Counter[int] = Counter()
            for labels in self._slabs(i):
                kinds = self.classes(labels)
                ids = labels[(kinds > 0) & (kinds != IGNORED)].cpu().numpy()
                numbers, sizes = np.unique(ids, return_counts=True)
                sums.update(dict(zip(numbers.tolist(), sizes.tolist(), strict=True)))
            areas += [sums[number] for number in sorted(sums)]
        return np.array(areas, np.int64)

    def _slabs(self, i: int) -> Iterator[Tensor]:
        """Yields the labels of an image, of a very large volume in parts along the depth."""
        stack, row = self.places[i]
        labels = self.stacks[stack][1][row]
        plane = max(1, math.prod(self.shapes[i][1:]))
        for part in labels.split(max(1, EVALUATED // plane) if self.dims == 3 else len(labels)):
            yield part.to(self.device)

    def classes(self, labels: Tensor) -> Tensor:
        """Returns the class of every pixel: 0 background, 255 ignored; without ridge."""
        if self.table is not None:
            return self.table[labels]
        result = (labels > 0).to(torch.uint8)
        if self.weights.ignore_label is not None:
            result[labels == self.weights.ignore_label] = 255
        return result

    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns target and weight of every pixel of labels, (N, H, W) or (N, D, H, W)."""
        if self.table is None:
            return self.weights(labels, dims=self.dims)
        classes = self.table[labels]
        return self.weights(labels, classes, num_classes=self.num_classes, dims=self.dims)

    def balanced(self) -> None:
        """Sets class weights that are "balanced" by counting over all labels."""
        labels = (part for i in range(len(self)) for part in self._slabs(i))
        classes = None
        if self.table is not None:
            parts = (part for i in range(len(self)) for part in self._slabs(i))
            classes = (self.table[part] for part in parts)
        self.weights = self.weights.balanced(labels, classes, dims=self.dims)
        table = self.weights.class_weight
        if isinstance(table, tuple) and len(table) < self.num_classes:  # the last classes have none
            table = (*table, *[0.0] * (self.num_classes - len(table)))
            self.weights = replace(self.weights, class_weight=table)

    def draw(
        self,
        augmentation: Augmentation,
        count: int,
        input_shape: Sequence[int],
        label_shape: Sequence[int],
        *,
        seed: int,
        step: int,
    ) -> Tiles:
        """Draws the tiles of a step.

        Each pass over the files has a new random order. A label tile lies inside its image or, if
        the image is smaller, around it, so that it can reach every pixel; pixels outside are
        mirrored. In a file with pixels that are ignored, it holds a random one of the others.

        Args:
            augmentation: The ranges of the deformation.
            count: Number of tiles, those of all processes together.
            input_shape: Spatial shape of the image tiles.
            label_shape: Spatial shape of the label tiles, which lie in the centre of the image
                tiles.
            seed: Seed of the run.
            step: Number of the step, from 1.
        """
        total = len(self)
        files: list[int] = []
        for i in range((step - 1) * count, step * count):
            if not files or i % total == 0:
                order = torch.randperm(total, generator=generator_of(seed, 0, i // total)).tolist()
            files.append(order[i % total])
        generator = generator_of(seed, 1, step)
        offset = torch.empty(count, self.dims)
        for n, file in enumerate(files):
            shape, known = self.shapes[file], self.known[file]
            if known is not None:
                one = known[torch.randint(len(known), (), generator=generator)]
                pixel = np.unravel_index(int(one), shape)
            for axis, side in enumerate(shape):
                room = side - label_shape[axis]
                low, high = min(room, 0), max(room, 0)
                if known is not None:
                    low = max(low, int(pixel[axis]) - label_shape[axis] + 1)
                    high = max(low, min(high, int(pixel[axis])))
                position = torch.randint(low, high + 1, (), generator=generator)
                offset[n, axis] = position - (input_shape[axis] - label_shape[axis]) // 2
        shape = (self.channels, *input_shape)
        return Tiles(files, offset, augmentation.draw(count, shape, generator=generator))

    def cut(
        self,
        augmentation: Augmentation,
        tiles: Tiles,
        input_shape: Sequence[int],
        label_shape: Sequence[int],
        parts: Sequence[Part] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cuts tiles out of their images and deforms them, in one pass for images of the same size.

        Args:
            augmentation: The ranges of the deformation.
            tiles: The tiles.
            input_shape: As for :meth:`draw`.
            label_shape: As for :meth:`draw`.
            parts: Of volumes: what :meth:`read` returned for these tiles; None: it is read here.

        Returns:
            The image tiles, (N, C, *input_shape), and the labels of their centres,
            (N, *label_shape).
        """
        if self.dims == 3:
            pairs = [
                augmentation.apply(
                    image[None].to(self.device),
                    labels[None].to(self.device),
                    tiles.parameters[n : n + 1],
                    output_shape=input_shape,
                    label_shape=label_shape,
                    offset=tiles.offset[n : n + 1] - first,
                )
                for n, (image, labels, first) in enumerate(
                    parts or self.read(augmentation, tiles, input_shape)
                )
            ]
            return torch.cat([image for image, _ in pairs]), torch.cat([ids for _, ids in pairs])
        groups: dict[int, list[int]] = {}
        for n, file in enumerate(tiles.files):
            groups.setdefault(self.places[file][0], []).append(n)
        cuts = []
        for stack, members in groups.items():
            images, labels = self._stack(stack)
            rows = [self.places[tiles.files[n]][1] for n in members]
            cut = augmentation.apply(
                images,
                labels,
                tiles.parameters[members],
                output_shape=input_shape,
                label_shape=label_shape,
                offset=tiles.offset[members],
                source=torch.tensor(rows),
            )
            cuts.append(cut)
        tiles_of, labels_of = zip(*cuts, strict=True)
        if len(cuts) == 1:
            return tiles_of[0], labels_of[0]
        back = torch.tensor([n for members in groups.values() for n in members]).argsort()
        return torch.cat(tiles_of)[back], torch.cat(labels_of)[back]

    def read(
        self, augmentation: Augmentation, tiles: Tiles, input_shape: Sequence[int]
    ) -> list[Part]:
        """Reads the parts of volumes that tiles are made of; see :meth:`cut`."""
        parts = []
        for n, file in enumerate(tiles.files):
            one = tiles[n : n + 1]
            sides = self.shapes[file]
            box = box_of(augmentation.grid, one.parameters, one.offset[0], input_shape, sides)
            stack, row = self.places[file]
            first = torch.tensor([part.start for part in box])
            parts.append((self._image(file)(*box), self.stacks[stack][1][row][box], first))
        return parts


def _reader(image: Any) -> Callable[..., Tensor] | None:
    if not isinstance(image, Stored):
        return None
    values = range_of(image.parts)
    return lambda *part: torch.from_numpy(values.apply(image[slice(None), *part]))


def load_sets(
    config: TrainConfig, resumed: bool, device: torch.device
) -> tuple[TrainConfig, Dataset, Dataset]:
    """Returns settings with the type of the labels, and the sets for training and validation."""
    device = data_device(device)
    samples = load_samples(config.images, config.labels, config.classes, config.reading)
    ignored = config.reading.ignored
    unknown = [s.name for s in samples if not counts(s, ignored)]
    if unknown and torchrun_number("RANK", 0) == 0:
        text = f"files without a pixel that counts, left out: {listed(unknown)}"
        warnings.warn(text, stacklevel=2)
    samples = [s for s in samples if s.name not in unknown]
    config = with_voxels(config, samples)
    config = replace(config, weights=replace(config.weights, ignore_label=ignored))
    if config.label_type == "auto":
        maps = [] if config.classes else [s.labels for s in samples]
        config = replace(config, label_type=label_type_of(maps, ignored))
    objects = number_objects(samples, config.label_type, ignored)
    if not resumed and torchrun_number("RANK", 0) == 0:
        warn_of(
            samples,
            validated=config.split is None and config.validation > 0,
            label_type=config.label_type,
            ignore_label=ignored,
        )
    names = [s.name for s in samples]
    split = config.out / SPLIT if resumed else config.split
    parts = split_names(
        names, config.validation, config.seed, split, [s.file or s.name for s in samples]
    )
    budget = math.inf
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        budget = 0.5 * free if config.data_budget is None else 1e9 * config.data_budget
    sets = []
    for part in parts:
        index = [names.index(name) for name in part]
        chosen = replace(objects, labels=[objects.labels[i] for i in index])
        data = Dataset([samples[i] for i in index], chosen, config.weights, device, budget)
        budget -= data.size if data.resident else 0
        sets.append(data)
    train_set, validation_set = sets
    train_set.balanced()
    validation_set.weights = train_set.weights
    return config, train_set, validation_set
