"""nnU-Net v2: deformation on the device, border weights, weighted cross-entropy beside its Dice."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import (
    Convert2DTo3DTransform,
    Convert3DTo2DTransform,
)
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .._files import replace_file
from ..augment import Augmentation
from ..contracts.border_weight_map import IGNORED
from ..objects import label_components
from ..ops import weighted_ce
from ..weights import BorderWeights

TRAINERS = Path(__file__).parent / "nnunet_trainers"
"""The folder that `nnUNet_extTrainer` names, so that nnU-Net finds the trainer."""
INSTANCES = "instancesTr"
"""Folder of instance maps in a raw data set, beside labelsTr, whose files have the same names."""
PLANS = "nnUNetPlansInstances"
"""Name of plans made of nnU-Net's default ones: `nnUNetv2_train ... -p nnUNetPlansInstances`."""
_MARK = "unet_fast_instances"
_HIGHEST = np.iinfo(np.int16).max
"""Largest number of an instance: nnU-Net stores labels in 16 bits."""


class nnUNetTrainerUNetFast(nnUNetTrainer):
    """Trains as nnU-Net does, but deforms batches on the device and weights borders in the loss.

    - Its loader delivers plain patches, large enough to be rotated. The whole batch is deformed on
      the device in one call, images and labels together (:attr:`augmentation`). Its other
      transforms, of grey values, follow there, its spatial one is left out.
    - Objects are those of the deformed instances, where the data were preprocessed with them
      (:func:`preprocess`); else the connected components of each class.
    - Weights and the ridge between touching objects are made of the deformed objects
      (:attr:`border_weights`). Under deep supervision the lower resolutions take the targets and
      weights of the pixels that they keep.
    - The loss is its own, with :func:`unet_fast.weighted_ce` as cross-entropy.

    Networks, plans, validation, checkpoints and inference are those of nnU-Net. To change a
    setting, derive a class and set the attribute.

    Region-based labels and cascades are not supported.
    """

    border_weights = BorderWeights(class_weight=None)
    """How labels become weights; Dice balances the classes already."""
    augmentation: Augmentation | None = None
    """The deformation, of which grey values are left out; None: that of the recipe, with the
    rotations and scales of nnU-Net."""

    def initialize(self) -> None:
        """Builds network, optimizer and loss. Raises ValueError for regions and cascades."""
        for there, what in (
            (self.label_manager.has_regions, "regions"),
            (self.is_cascaded, "a cascade"),
        ):
            if there:
                raise ValueError(f"{type(self).__name__}: labels must be classes, got {what}")
        super().initialize()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
        """Makes the deformation, too, from the ranges that nnU-Net chose."""
        chosen = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        rotation, self.in_planes, _, _ = chosen
        self.deformation = self.augmentation or recipe(
            self._voxel, float(np.rad2deg(rotation[1])), self.in_planes
        )
        return chosen

    @property
    def _voxel(self) -> tuple[float, ...]:
        """Size of a pixel along each axis, in multiples of the shortest."""
        sizes = self.configuration_manager.spacing
        return tuple(size / min(sizes) for size in sizes)

    def get_training_transforms(
        self, patch_size: Any, rotation: Any, scales: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps nnU-Net's transforms for the device, but the spatial one; the loader gets none."""
        stock = super().get_training_transforms(patch_size, rotation, None, *args, **kwargs)
        left_out = SpatialTransform, Convert3DTo2DTransform, Convert2DTo3DTransform
        kept = [x for x in stock.transforms if not isinstance(x, left_out)]
        for transform in kept:
            if isinstance(transform, RandomTransform):
                transform.transform = _OnDevice(transform.transform)
        self.transforms = ComposeTransforms(kept)

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> None:
        """The loader gets none: targets are made on the device."""

    def _build_loss(self) -> nn.Module:
        """Puts the weighted cross-entropy in the place of nnU-Net's."""
        loss: nn.Module = super()._build_loss()
        parts: Any = loss.loss if self.enable_deep_supervision else loss
        parts.ce = self.cross_entropy = _BorderLoss(self.label_manager.ignore_label)
        return loss

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Deforms a batch, makes its targets and weights, and trains on it."""
        return super().train_step(self.augmented(batch))  # type: ignore[no-any-return]

    def augmented(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch that nnU-Net's step takes, of one as the loader delivers it."""
        image, labels = self._loaded(batch)
        image, labels = deformed(
            self.deformation,
            image,
            labels,
            self.configuration_manager.patch_size,
            in_planes=self.in_planes,
        )
        rows = [
            self.transforms(image=x, segmentation=y) for x, y in zip(image, labels, strict=True)
        ]
        image = torch.stack([row["image"] for row in rows])
        labels = torch.stack([row["segmentation"] for row in rows])
        return {"data": image, "target": self._targets(labels)}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes targets and weights of a batch, and validates with it."""
        image, labels = self._loaded(batch)
        return super().validation_step({"data": image, "target": self._targets(labels)})  # type: ignore[no-any-return]

    def _loaded(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns images, (N, C, *S), and classes [and instances], (N, 1 or 2, *S), on the device.

        Raises ValueError if the plans promise instances and the data have none.
        """
        image, labels = (batch[x].to(self.device, non_blocking=True) for x in ("data", "target"))
        maps = 1 + bool(self.plans_manager.plans.get(_MARK))
        if labels.shape[1] != maps:
            raise ValueError(
                f"{type(self).__name__}: data must hold {maps} map{'s' * (maps > 1)} of labels "
                f"with plans {self.plans_manager.plans_name}, got {labels.shape[1]}: preprocess "
                "them again (unet-fast nnunet DATASET CONFIGURATION)"
            )
        return image, labels

    @torch.no_grad()
    def _targets(self, labels: Tensor) -> list[Tensor] | Tensor:
        """Returns the target of each resolution, (N, 1, *S), and hands the loss their weights."""
        target, weights = targets_of(
            labels,
            replace(self.border_weights, spacing=self.border_weights.spacing or self._voxel),
            num_classes=self.label_manager.num_segmentation_heads,
            ignore_label=self.label_manager.ignore_label,
        )
        sides = target.shape[2:]
        scales = self._get_deep_supervision_scales() or [[1.0] * len(sides)]
        shapes = [[round(s * f) for s, f in zip(sides, scale, strict=True)] for scale in scales]
        both = [(_smaller(target, shape), _smaller(weights, shape)) for shape in shapes]
        self.cross_entropy.weights = {x.shape[2:]: w for x, w in both}
        return [x for x, _ in both] if self.enable_deep_supervision else target


class _BorderLoss(nn.Module):
    """Weighted cross-entropy, whose weights are set with the targets, for each resolution."""

    def __init__(self, ignore_label: int | None) -> None:
        super().__init__()
        self.ignore_index = -100 if ignore_label is None else ignore_label
        self.weights: dict[torch.Size, Tensor] = {}

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Returns the weighted mean of scores, (N, C, *S), and classes, (N, *S)."""
        weights = self.weights[target.shape[1:]]
        return weighted_ce(scores, target, weights, ignore_index=self.ignore_index)


class _OnDevice(BasicTransform):
    """Makes what a transform needs, as the kernel of a blur, where its image is."""

    def __init__(self, transform: BasicTransform) -> None:
        super().__init__()
        self.transform = transform

    def get_parameters(self, **data: Any) -> dict[str, Any]:
        parameters: dict[str, Any] = self.transform.get_parameters(**data)
        return parameters

    def apply(self, data: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        with torch.device(data["image"].device):
            result: dict[str, Any] = self.transform.apply(data, **parameters)
        return result


def recipe(voxel: tuple[float, ...], rotation: float, in_planes: bool) -> Augmentation:
    """The deformation for patches of nnU-Net.

    Args:
        voxel: Size of a pixel along each axis.
        rotation: Largest angle, in degrees.
        in_planes: Whether slices are so far apart that each is deformed in itself.

    Returns:
        That of the recipe, with magnifications as nnU-Net draws them.
    """
    settings = Augmentation.paper_2015() if len(voxel) == 2 else Augmentation.cicek_2016()
    return replace(
        settings,
        rotation=(rotation, 0.0, 0.0) if in_planes else rotation,
        voxel_size=None if in_planes else voxel,
        scale=(1 / 1.4, 1 / 0.7),
    )


@torch.no_grad()
def deformed(
    augmentation: Augmentation,
    image: Tensor,
    labels: Tensor,
    shape: Sequence[int],
    *,
    in_planes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Deforms a batch, and cuts out its middle.

    Args:
        augmentation: The ranges of the deformation; grey values stay, as nnU-Net has transforms for
            them, and they are no shares of white.
        image: (N, C, *S), floating point.
        labels: (N, K, *S), integer.
        shape: Spatial shape of the result.
        in_planes: Whether each slice of volumes is made of itself alone.

    Returns:
        Image and labels, (N, C, *shape) and (N, K, *shape).
    """
    n, channels, *sides = image.shape
    offset = torch.tensor([[(a - b) / 2 for a, b in zip(sides, shape, strict=True)]])
    drawn = replace(augmentation.draw(n, (channels, *shape)), gray_curve=None)
    if in_planes:
        drawn.displacement[:, 0] = 0
        drawn.affine[:, 0] = drawn.affine.new_tensor([1, 0, 0, 0])
    return augmentation.apply(
        image, labels, drawn, output_shape=shape, offset=offset.expand(n, -1).contiguous()
    )


@torch.no_grad()
def targets_of(
    labels: Tensor, weigh: BorderWeights, *, num_classes: int, ignore_label: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns target classes, uint8, and weights, float32, both (N, 1, *S), of labels of nnU-Net.

    Args:
        labels: (N, 1, *S) or (N, 2, *S), integer: classes, where numbers < 0 are background (of
            cropped images); and instances. Pixels of a class without instance are objects by their
            connected components.
        weigh: Settings of the weights.
        num_classes: Number of classes, background included.
        ignore_label: Label of pixels that do not count, or None; it is in the target, too.
    """
    dims = labels.dim() - 2
    classes = labels[:, 0].clamp(min=0)
    if ignore_label is not None:
        classes = classes.masked_fill(classes == ignore_label, IGNORED)
    objects = (classes > 0) & (classes < IGNORED)
    ids = (labels[:, 1] if labels.shape[1] > 1 else torch.zeros_like(classes)).int() * objects
    bare = objects & (ids == 0)
    for value in classes[bare].unique():
        parts = label_components(bare & (classes == value), dims=dims)
        ids += torch.where(parts > 0, parts + ids.max(), 0)
    target, weights = weigh(ids, classes, num_classes=num_classes, dims=dims)
    if ignore_label is not None:
        target = target.masked_fill(target == IGNORED, ignore_label)
    return target[:, None], weights[:, None]


def _smaller(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns maps, (N, 1, *S), at a lower resolution, as nnU-Net does it with labels."""
    if list(x.shape[2:]) == list(shape):
        return x
    return interpolate(x.float(), shape, mode="nearest-exact").to(x.dtype)


class InstancePreprocessor(DefaultPreprocessor):
    """Preprocesses cases as nnU-Net does, with their instances as a second map of labels."""

    def run_case(
        self,
        image_files: list[str],
        seg_file: str | None,
        plans: Any,
        configuration: Any,
        *args: Any,
    ) -> tuple[NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Returns data, labels, (2, *S), and properties of a case.

        Raises ValueError if its instances are missing, of another size or no whole numbers.
        """
        data, seg, properties = super().run_case(image_files, seg_file, plans, configuration, *args)
        if seg_file is None:
            return data, seg, properties
        file = instances_of(Path(seg_file))
        ids, classes = (self._as_read(x, plans, properties) for x in (file, Path(seg_file)))
        if not (ids.min() >= 0 and ids.max() <= _HIGHEST) or (ids != ids.round()).any():
            raise ValueError(f"{file}: must hold whole numbers in [0, {_HIGHEST}], got others")
        known = np.where((classes > 0) & (ids == 0), -1, ids)  # -1: an object without number
        maps = torch.from_numpy(known.astype(np.float32))[None]
        ids = interpolate(maps, seg.shape[1:], mode="nearest-exact")[0, 0].numpy()
        objects = seg[0] > 0
        if (objects & (ids == 0)).any() and ids.any():  # along outlines, which resampling smooths
            nearest = ndimage.distance_transform_edt(
                ids == 0, return_distances=False, return_indices=True
            )
            ids = ids[tuple(nearest)]
        ids = np.where(objects, ids, 0).clip(0).astype(np.int16)
        return data, np.concatenate([seg.astype(np.int16), ids[None]]), properties

    def _as_read(self, file: Path, plans: Any, properties: dict[str, Any]) -> NDArray[Any]:
        """Returns labels of a file, (1, *S), transposed and cropped as the image was."""
        read, _ = plans.image_reader_writer_class().read_seg(str(file))
        labels = np.asarray(read).transpose(0, *(axis + 1 for axis in plans.transpose_forward))
        whole = tuple(properties["shape_before_cropping"])
        if labels.shape != (1, *whole):
            got = labels.shape[1:]
            raise ValueError(f"{file}: must be of shape {whole} as its image, got {got}")
        box = tuple(slice(*side) for side in properties["bbox_used_for_cropping"])
        cropped: NDArray[Any] = labels[(slice(None), *box)]
        return cropped


def instances_of(labels: Path) -> Path:
    """Returns the file of instances of a file of labels. Raises ValueError if it is missing."""
    file = labels.parents[1] / INSTANCES / labels.name
    if not file.is_file():
        raise ValueError(f"{file}: must hold the instances of {labels}, but is missing")
    return file


def preprocess(
    dataset: int | str,
    configurations: Sequence[str],
    plans: str = "nnUNetPlans",
    processes: int = 4,
) -> str:
    """Preprocesses a data set that nnU-Net has planned, with its instances.

    Writes plans with `Instances` behind their name, which differ by names only, and the data of
    each configuration in folders of their own beside nnU-Net's.

    Args:
        dataset: Number or name of the data set. Its raw folder holds `instancesTr`.
        configurations: As "2d" or "3d_fullres".
        plans: Plans to start from.
        processes: Processes at once.

    Returns:
        The name of the plans.

    Raises:
        ValueError: If a folder of nnU-Net is not set, there are no such plans or configuration, or
            instances are missing.
    """
    for place in (nnUNet_raw, nnUNet_preprocessed):
        if not place.is_set():
            raise ValueError(f"{place.env_var_name} must name a folder, but is not set")
    name = maybe_convert_to_dataset_name(dataset)
    folder = Path(nnUNet_preprocessed) / name
    file = folder / f"{plans}.json"
    if not file.is_file():
        raise ValueError(f"{file}: must hold plans: run nnUNetv2_plan_and_preprocess first")
    raw = Path(nnUNet_raw) / name / INSTANCES
    if not raw.is_dir():
        raise ValueError(f"{raw}: must hold the instances of {name}, but is missing")
    described = json.loads(file.read_text())
    known = described["configurations"]
    for configuration in configurations:
        if configuration not in known:
            raise ValueError(
                f"configuration must be one of {', '.join(known)}, got {configuration}"
            )
    ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
    for labels in raw.with_name("labelsTr").glob(f"*{ending}"):
        instances_of(labels)
    made = f"{plans}Instances"
    described |= {"plans_name": made, _MARK: True}
    for configuration, settings in known.items():
        if "data_identifier" in settings:
            settings["data_identifier"] = f"{made}_{configuration}"
    replace_file(folder / f"{made}.json", json.dumps(described, indent=4).encode())
    for configuration in configurations:
        InstancePreprocessor(verbose=False).run(name, configuration, made, processes)
    return made
