"""Targets and weights of the recipe."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy import ndimage
from torch import Tensor

from .ops.border_weight_map import border_weight_map
from .reference import separate_touching

IGNORED = 255
"""The target value of pixels that do not count."""


_RIDGE_RULE = "be two_sided, one_sided or none"
_CLASS_RULE = "be two weights >= 0 or balanced"


@dataclass(frozen=True)
class BorderWeights:
    """How instance labels become the target classes and pixel weights of the loss.

    Call it on labels: `target, weights = BorderWeights.paper_2015()(labels)`.

    Raises ValueError if a value is out of range.
    """

    w0: float = 10.0
    """Height of the border term, >= 0."""
    sigma: float = 5.0
    """Width of the border term, > 0, in pixels."""
    class_weight: tuple[float, float] | Literal["balanced"] | None = "balanced"
    """Weights of background and foreground, >= 0; or "balanced" (see balanced()); None for 1."""
    ridge: Literal["two_sided", "one_sided", "none"] = "two_sided"
    """Background between touching objects: two_sided, one_sided (Falk et al. 2019) or none."""
    halo: tuple[float, float] | None = None
    """(v, s): on background, (1 - v) exp(-d1^2 / (2 s^2)) more, as Falk et al. 2019; or None."""
    ignore_label: int | None = None
    """Label value of pixels that do not count, or None."""

    def __post_init__(self) -> None:
        """Checks the values; one wrong raises ValueError."""
        rules = [
            ("w0", 0 <= self.w0 < math.inf, "be >= 0"),
            ("sigma", 0 < self.sigma < math.inf, "be > 0"),
            ("ridge", self.ridge in ("two_sided", "one_sided", "none"), _RIDGE_RULE),
        ]
        if isinstance(self.class_weight, str):
            rules.append(("class_weight", self.class_weight == "balanced", _CLASS_RULE))
        elif self.class_weight is not None:
            pair = self.class_weight
            holds = len(pair) == 2 and all(0 <= w < math.inf for w in pair)
            rules.append(("class_weight", holds, _CLASS_RULE))
        if self.halo is not None:
            v, s = self.halo
            rules.append(("halo", 0 <= v <= 1 and 0 < s < math.inf, "be (v in [0, 1], s > 0)"))
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"BorderWeights: {name} must {rule}, got {getattr(self, name)}")

    @classmethod
    def paper_2015(cls) -> "BorderWeights":
        """The paper: w0 = 10, sigma = 5; touching objects parted, class weights balanced.

        The paper balances the class frequencies of the training data set, which :meth:`balanced`
        counts, but has no formula for it, and names no morphological operation; the ridge here is
        the two-sided one, which turns with the image.
        """
        return cls()

    @classmethod
    def falk_2019(cls) -> "BorderWeights":
        """Falk et al. 2019 as in their code: w0 = 50, sigma = 6, halo of 10 px, ratio 0.1."""
        return cls(w0=50.0, sigma=6.0, class_weight=(0.1, 1.0), ridge="one_sided", halo=(0.1, 10.0))

    def balanced(self, labels: Iterable[Tensor]) -> "BorderWeights":
        """Counts the class weights ``"balanced"`` over a whole data set instead of each image.

        Args:
            labels: All instance maps of the data set, each as in a call.

        Returns:
            The same settings with `class_weight` = pixels / (classes present x pixels of the
            class); unchanged if `class_weight` is not ``"balanced"``.
        """
        if self.class_weight != "balanced":
            return self
        counts = torch.zeros(2, dtype=torch.float64)
        for image in labels:
            _, target = self._objects_and_target(image)
            counts += torch.tensor([(target == 0).sum().item(), (target == 1).sum().item()])
        present = (counts > 0).sum()
        pair = torch.where(counts > 0, counts.sum() / (present * counts), 0)
        return replace(self, class_weight=(pair[0].item(), pair[1].item()))

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and weights.

        Args:
            labels: Instance maps, integer, 0 background; (H, W), (N, H, W) or (N, D, H, W).

        Returns:
            target: uint8, 0 background, 1 object, 255 ignored; the ridge between touching objects
                is background.
            weights: float32, 0 where ignored. Distances are those to the whole objects.

        Raises:
            TypeError: If `labels` is not an integer tensor.
            ValueError: If its number of axes or a setting is wrong.
        """
        if self.class_weight == "balanced":
            images = labels[None] if labels.dim() == 2 else labels
            pairs = [self.balanced([image])(image) for image in images.split(1)]
            target, weights = (torch.cat(maps) for maps in zip(*pairs, strict=True))
            return target.reshape(labels.shape), weights.reshape(labels.shape)
        objects, target = self._objects_and_target(labels)
        weights = border_weight_map(
            objects,
            w0=self.w0,
            sigma=self.sigma,
            class_weight=self.class_weight,
            foreground=target == 1,
            halo=self.halo,
        )
        return target, torch.where(target == IGNORED, 0, weights)

    def _objects_and_target(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels without the ignored pixels; classes: 0 background and ridge, 1 object, 255."""
        if labels.dtype != torch.bool and not labels.dtype.is_floating_point:
            # Few operations know uint16, and a comparison in 8 bits would wrap the label. What is
            # no integer stays as it is for separate_touching to refuse.
            labels = labels.to(torch.int64)
        ignored = torch.zeros_like(labels, dtype=torch.bool)
        if self.ignore_label is not None:
            ignored = labels == self.ignore_label
        objects = labels.masked_fill(ignored, 0)
        target = (separate_touching(objects, self.ridge) != 0).to(torch.uint8)
        return objects, torch.where(ignored, IGNORED, target)


def label_components(mask: Tensor) -> Tensor:
    """Numbers the connected parts of a mask, from 1; touching objects become one.

    Args:
        mask: (H, W), bool or integer; everything not 0 is foreground. Pixels are connected along
            the axes, not diagonally.

    Returns:
        int32 labels, of the shape and device of `mask`.
    """
    labels, _ = ndimage.label(mask.cpu().numpy() != 0)
    return torch.from_numpy(labels).to(device=mask.device, dtype=torch.int32)
