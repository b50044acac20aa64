"""Targets and weights of the recipe."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from scipy import ndimage
from torch import Tensor

from .reference import border_weight_map, separate_touching

IGNORED = 255
"""The target value of pixels that do not count."""


@dataclass(frozen=True)
class BorderWeights:
    """How instance labels become the target classes and pixel weights of the loss.

    Call it on labels: `target, weights = BorderWeights.paper_2015()(labels)`.

    Args:
        w0: Height of the border term, >= 0.
        sigma: Width of the border term, > 0, in pixels.
        class_weight: None for 1; (background, foreground); or ``"balanced"``; see
            :func:`border_weight_map`.
        ridge: How touching objects are separated: ``"two_sided"``, ``"one_sided"`` or ``"none"``;
            see :func:`separate_touching`.
        halo: None, or (v, s): an extra term around single objects; see :func:`border_weight_map`.
        ignore_label: Label value of pixels that do not count, or None.
    """

    w0: float = 10.0
    """Height of the border term."""
    sigma: float = 5.0
    """Width of the border term, in pixels."""
    class_weight: tuple[float, float] | str | None = None
    """Weights of background and foreground, or "balanced"."""
    ridge: str = "two_sided"
    """Background between touching objects: two_sided, one_sided or none."""
    halo: tuple[float, float] | None = None
    """(v, s): the extra term of Falk et al. 2019 around every object."""
    ignore_label: int | None = None
    """Label value of pixels that do not count."""

    @classmethod
    def paper_2015(cls) -> "BorderWeights":
        """The paper: w0 = 10, sigma = 5; touching objects parted, class weights balanced.

        The paper balances the class frequencies of the training data set, which :meth:`balanced`
        counts, but has no formula for it, and names no morphological operation; the ridge here is
        the two-sided one, which turns with the image.
        """
        return cls(class_weight="balanced")

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
        labels = labels.to(torch.int64) if labels.dtype == torch.uint16 else labels  # few ops there
        if self.ignore_label is None:
            ignored = torch.zeros_like(labels, dtype=torch.bool)
        else:
            ignored = labels == self.ignore_label
        objects = torch.where(ignored, 0, labels)
        target = (separate_touching(objects, self.ridge) > 0).to(torch.uint8)
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
