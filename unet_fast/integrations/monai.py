"""Dictionary transforms for MONAI: `pip install '.[monai]'`; docs/monai.md shows how they are used.

Samples are (C, H, W) or (C, D, H, W), batches (N, C, H, W) or (N, C, D, H, W); `spatial_dims` says
which is which. All work is done by the operators, on the device of the tensors.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, get_track_meta
from monai.transforms import InvertibleTransform, MapTransform, RandomizableTransform
from monai.utils import TraceKeys, convert_to_tensor, ensure_tuple
from torch import Generator, Tensor

from .._undo import INTERPOLATED, undo
from ..augment import Augmentation, AugmentationParameters
from ..weights import BorderWeights


class ElasticDeformd(RandomizableTransform, MapTransform, InvertibleTransform):
    """Deforms images and labels at random, all keys of a sample by the same field.

    Images are interpolated linearly, and each of their channels gets a grey curve of its own.
    Labels take the nearest pixel. Shapes, dtypes, devices and affines stay.

    `inverse` puts what has the shape of the deformed sample back in place, a prediction for
    instance: pixel for pixel as :class:`monai.transforms.Invertd` asks, nearest or linear. Grey
    values stay as they are. What the deformed sample does not show is 0. A field that folds cannot
    be undone: ValueError.

    Args:
        keys: Keys of images, floats about [0, 1], uint8 or uint16; may be empty with `label_keys`.
        label_keys: Keys of label maps, integer, of one channel.
        spatial_dims: 2 for images, 3 for volumes. An axis more is that of channels, two more are
            those of a batch and of channels.
        augmentation: Ranges of the deformation; None for :meth:`Augmentation.paper_2015`.
        prob: Probability that a sample is deformed, each of a batch by itself.
        allow_missing_keys: Whether a sample may lack some of the keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        *,
        spatial_dims: int,
        augmentation: Augmentation | None = None,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        self.label_keys = ensure_tuple(label_keys)
        MapTransform.__init__(self, (*ensure_tuple(keys), *self.label_keys), allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.spatial_dims = _checked_dims("ElasticDeformd", spatial_dims)
        self.augmentation = Augmentation.paper_2015() if augmentation is None else augmentation

    def randomize(self, n: int, shape: Sequence[int]) -> tuple[list[int], AugmentationParameters]:
        """Draws which of n samples of a shape, (C, H, W) or (C, D, H, W), are deformed, and how."""
        chosen = (self.R.rand(n) < self.prob).nonzero()[0].tolist()
        generator = Generator("cpu").manual_seed(int(self.R.randint(2**31)))
        return chosen, self.augmentation.draw(n, shape, generator=generator)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Deforms the items of the keys."""
        d, dims = dict(data), self.spatial_dims
        given = {key: _item("ElasticDeformd", d, key, dims) for key in self.key_iterator(d)}
        if not given:
            return d
        first = next(iter(given))
        for key, x in given.items():
            _check_same("ElasticDeformd", given, first, key, dims)
            if key in self.label_keys:
                _check_labels("ElasticDeformd", key, x, dims)
            elif x.dtype not in INTERPOLATED:
                raise TypeError(
                    f"ElasticDeformd: {key!r} must be floating point, uint8 or uint16, got "
                    f"{x.dtype} (EnsureTyped({key!r}, dtype=torch.float32) makes it so)"
                )
        batches = {key: _batch(x, dims) for key, x in given.items()}
        n, _, *sides = batches[first].shape
        channels = sum(x.shape[1] for key, x in batches.items() if key not in self.label_keys)
        chosen, parameters = self.randomize(n, (max(channels, 1), *sides))
        taken, start = parameters[chosen], 0
        for key, x in batches.items():
            is_image, moved = key not in self.label_keys, x.clone()
            part = taken
            if is_image and taken.gray_curve is not None:
                end = start + x.shape[1]
                part, start = replace(taken, gray_curve=taken.gray_curve[:, start:end]), end
            if chosen:
                image, labels = (x[chosen], None) if is_image else (None, x[chosen])
                made = self.augmentation.apply(image, labels, part)[0 if is_image else 1]
                for i, one in zip(chosen, made, strict=True):  # an index sets no uint16
                    moved[i] = one
            stacks = _stacks(given[key], n)
            for i, stack in enumerate(stacks):
                self._do_transform = i in chosen
                info = {
                    "mode": "bilinear" if is_image else "nearest",
                    "displacement": parameters.displacement[i],
                    "affine": parameters.affine[i],
                }
                traced = {key: moved[i], self.trace_key(key): stack}
                self.push_transform(traced, key=key, extra_info=info)
            d[key] = _like(given[key], moved, stacks)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Undoes the deformation of the items of the keys."""
        d = dict(data)
        for key in self.key_iterator(d):
            x = _item("ElasticDeformd.inverse", d, key, self.spatial_dims)
            back = _batch(x, self.spatial_dims).clone()
            stacks = _stacks(x, len(back))
            for one, stack in zip(back.split(1), stacks, strict=True):
                info = self.pop_transform({self.trace_key(key): stack}, key)
                if not info[TraceKeys.DO_TRANSFORM]:
                    continue
                deformed, shape = tuple(info[TraceKeys.ORIG_SIZE]), tuple(one.shape[2:])
                if shape != deformed:
                    raise ValueError(
                        f"ElasticDeformd.inverse: {key!r} must have the spatial shape that was "
                        f"deformed, {deformed}, got {shape}"
                    )
                drawn = info[TraceKeys.EXTRA_INFO]
                moved = AugmentationParameters(
                    drawn["displacement"][None], drawn["affine"][None], None
                )
                one.copy_(undo(one, self.augmentation, moved, nearest=drawn["mode"] == "nearest"))
            d[key] = _like(x, back, stacks)
        return d


class BorderWeightsd(MapTransform):
    """Makes targets and weights of label maps: `label` gives `label_target`, `label_weights`.

    Both have the shape of the labels, and their affine; target is uint8, weights are float32.

    Args:
        keys: Keys of instance maps, integer, of one channel.
        spatial_dims: 2 for images, 3 for volumes, as of :class:`ElasticDeformd`.
        weights: Settings; None for :meth:`BorderWeights.paper_2015`. Its `balanced` counts the
            class weights of a data set; without, they are those of each sample by itself.
        classes: The class of every id, as a mapping; or a key of class maps for each of `keys`;
            None for one class.
        num_classes: Number of classes, background included; see :class:`BorderWeights`.
        target_postfix: What follows `_` in the key of targets.
        weights_postfix: What follows `_` in the key of weights.
        allow_missing_keys: Whether a sample may lack some of the keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        spatial_dims: int,
        weights: BorderWeights | None = None,
        classes: Mapping[int, int] | KeysCollection | None = None,
        num_classes: int | None = None,
        target_postfix: str = "target",
        weights_postfix: str = "weights",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_dims = _checked_dims("BorderWeightsd", spatial_dims)
        self.weights = BorderWeights.paper_2015() if weights is None else weights
        shared = classes is None or isinstance(classes, Mapping)
        self.classes = (classes,) * len(self.keys) if shared else ensure_tuple(classes)
        if len(self.classes) != len(self.keys):
            raise ValueError(
                f"BorderWeightsd: classes must be a mapping or {len(self.keys)} keys, one for each "
                f"of {self.keys}, got {classes!r}"
            )
        self.num_classes = num_classes
        self.postfixes = target_postfix, weights_postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Adds targets and weights of the labels of the keys."""
        d, dims = dict(data), self.spatial_dims
        for key, classes in self.key_iterator(d, self.classes):
            given = {key: _item("BorderWeightsd", d, key, dims)}
            if not (classes is None or isinstance(classes, Mapping)):
                given[classes] = _item("BorderWeightsd", d, classes, dims)
            for other, x in given.items():
                _check_same("BorderWeightsd", given, key, other, dims)
                _check_labels("BorderWeightsd", other, x, dims)
            maps = {k: _batch(x, dims)[:, 0] for k, x in given.items()}
            made = self.weights(
                maps[key],
                maps[classes] if len(maps) > 1 else classes,
                num_classes=self.num_classes,
                dims=dims,
            )
            for x, postfix in zip(made, self.postfixes, strict=True):
                d[f"{key}_{postfix}"] = _like(given[key], x)
        return d


def _checked_dims(owner: str, spatial_dims: Any) -> int:
    if spatial_dims not in (2, 3):
        raise ValueError(f"{owner}: spatial_dims must be 2 or 3, got {spatial_dims!r}")
    return int(spatial_dims)


def _item(owner: str, data: Mapping[Hashable, Any], key: Hashable, dims: int) -> Tensor:
    """Returns an item as a tensor; a sample as a MetaTensor, as MONAI's transforms do."""
    x: Any = data[key]
    if not isinstance(x, Tensor) or x.dim() == dims + 1:
        x = convert_to_tensor(x, track_meta=get_track_meta())
    if not isinstance(x, Tensor) or x.dim() not in (dims + 1, dims + 2):
        sides = "H, W" if dims == 2 else "D, H, W"
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{owner}: {key!r} must be (C, {sides}) or a batch, (N, C, {sides}), got {got}"
        )
    return x


def _check_same(
    owner: str, given: Mapping[Hashable, Tensor], first: Hashable, key: Hashable, dims: int
) -> None:
    """Raises ValueError if two items differ in more than the number of channels."""
    shapes = [tuple(given[k].shape) for k in (first, key)]
    one, other = ([*shape[: -dims - 1], *shape[-dims:]] for shape in shapes)
    if one != other:
        raise ValueError(
            f"{owner}: {key!r} must have the shape of {first!r} except for channels, "
            f"{shapes[0]}, got {shapes[1]}"
        )


def _check_labels(owner: str, key: Hashable, x: Tensor, dims: int) -> None:
    """Raises ValueError or TypeError if an item is no map of whole numbers."""
    if x.shape[-dims - 1] != 1:
        raise ValueError(
            f"{owner}: {key!r} must have one channel, of a number for each object, got "
            f"{tuple(x.shape)} (AsDiscreted({key!r}, argmax=True, dtype=torch.int32) makes it of "
            "one-hot; give each of several maps a key)"
        )
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(
            f"{owner}: {key!r} must be integer, got {x.dtype} (EnsureTyped({key!r}, "
            "dtype=torch.int32) makes it so)"
        )


def _batch(x: Tensor, dims: int) -> Tensor:
    """Returns a plain tensor with the axis of the batch."""
    plain: Tensor = x.as_tensor() if isinstance(x, MetaTensor) else x
    return plain.reshape(-1, *plain.shape[-dims - 1 :])


def _stacks(x: Tensor, n: int) -> list[list[Any]]:
    """Returns copies of what was applied to each of n samples, as MONAI collates it."""
    applied: list[Any] = x.applied_operations if isinstance(x, MetaTensor) else []
    collated = any(not isinstance(one, Mapping) for one in applied)
    return [
        [*one] if isinstance(one, list) else [] for one in (applied if collated else [applied] * n)
    ]


def _like(x: Tensor, made: Tensor, stacks: list[list[Any]] | None = None) -> Tensor:
    """Returns a tensor of the shape of another, with its affine and all else that it knows."""
    made = made.reshape(x.shape)
    if not isinstance(x, MetaTensor):
        return made
    made = MetaTensor(made).copy_meta_from(x)
    if stacks is not None:
        made.applied_operations = stacks if len(stacks) > 1 or x.is_batch else stacks[0]  # type: ignore[attr-defined]
    return made
