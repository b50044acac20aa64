"""Target classes and pixel weights of the recipe."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .contracts.border_weight_map import IGNORED
from .contracts.types import check_fields
from .ops import border_weights

_RIDGE_RULE = "be two_sided, one_sided or none"
_CLASS_RULE = "be weights >= 0, of the background first, or balanced"


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
    class_weight: tuple[float, ...] | Literal["balanced"] | None = "balanced"
    """Weight of the background and of each class, >= 0; "balanced" (see balanced()); None for 1."""
    ridge: Literal["two_sided", "one_sided", "none"] = "two_sided"
    """Background between touching objects: two_sided, one_sided (Falk et al. 2019) or none."""
    halo: tuple[float, float] | None = None
    """(v, s): adds (1 - v) exp(-d1^2 / (2 s^2)) on background, as Falk et al. 2019; or None."""
    ignore_label: int | None = None
    """Label value of pixels that do not count, or None."""
    spacing: tuple[float, ...] | None = None
    """Pixel size along each spatial axis, in the unit of sigma and of the halo; None for 1."""

    def __post_init__(self) -> None:
        """Checks the values. Raises ValueError if one is out of range."""
        check_fields("BorderWeights", self)
        rules = [
            ("w0", 0 <= self.w0 < math.inf, "be >= 0"),
            ("sigma", 0 < self.sigma < math.inf, "be > 0"),
            ("ridge", self.ridge in ("two_sided", "one_sided", "none"), _RIDGE_RULE),
        ]
        if isinstance(self.class_weight, str):
            rules.append(("class_weight", self.class_weight == "balanced", _CLASS_RULE))
        elif self.class_weight is not None:
            table = self.class_weight
            holds = len(table) >= 2 and all(0 <= w < math.inf for w in table)
            rules.append(("class_weight", holds, _CLASS_RULE))
        if self.halo is not None:
            holds = len(self.halo) == 2 and 0 <= self.halo[0] <= 1 and 0 < self.halo[1] < math.inf
            rules.append(("halo", holds, "be (v in [0, 1], s > 0)"))
        if self.spacing is not None:
            holds = all(1e-12 <= s <= 1e12 for s in self.spacing)
            rules.append(("spacing", holds, "be sizes in [1e-12, 1e12]"))
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"BorderWeights: {name} must {rule}, got {getattr(self, name)}")

    @property
    def ridge_width(self) -> int:
        """Pixels that the ridge takes from an object that touches another."""
        return 0 if self.ridge == "none" else 1

    @classmethod
    def paper_2015(cls) -> "BorderWeights":
        """The paper's settings: w0 = 10, sigma = 5; touching objects separated, balanced classes.

        The paper balances the class frequencies of the training data set, which :meth:`balanced`
        counts, but gives no formula, and names no morphological operation; the ridge here is the
        two-sided one, which turns with the image.
        """
        return cls()

    @classmethod
    def falk_2019(cls) -> "BorderWeights":
        """The settings of Falk et al. 2019's code: w0 = 50, sigma = 6, halo of 10 px, ratio 0.1."""
        return cls(w0=50.0, sigma=6.0, class_weight=(0.1, 1.0), ridge="one_sided", halo=(0.1, 10.0))

    def balanced(
        self,
        labels: Iterable[Any],
        classes: Iterable[Any] | None = None,
        *,
        dims: int | None = None,
    ) -> "BorderWeights":
        """Counts the class weights ``"balanced"`` over a whole data set instead of each image.

        Args:
            labels: All instance maps of the data set, each as in a call; or one tensor or array as
                in a call, of one map or of a batch.
            classes: The classes that belong to them, each as in a call, or None; with one tensor or
                array of labels, its classes.
            dims: As in a call.

        Returns:
            The same settings with `class_weight` = pixels / (classes present x pixels of the
            class); unchanged if `class_weight` is not ``"balanced"``.
        """
        if self.class_weight != "balanced":
            return self
        if isinstance(labels, Tensor | np.ndarray):  # whose rows are no maps
            labels, classes = [labels], None if classes is None else [classes]
        counts = torch.zeros(IGNORED + 1, dtype=torch.int64, device="cpu")
        pairs = (
            ((x, None) for x in labels) if classes is None else zip(labels, classes, strict=True)
        )
        for image, class_map in pairs:
            target = self(image, class_map, dims=dims)[0]
            target = torch.from_numpy(target) if isinstance(target, np.ndarray) else target
            target = target.flatten().cpu()
            counts += torch.bincount(target, minlength=IGNORED + 1)
        if not counts.any():
            raise ValueError("BorderWeights.balanced: labels must hold a pixel, got none")
        last = max(counts[:IGNORED].nonzero().flatten().tolist(), default=0)
        counts = counts[: max(2, last + 1)]
        present = (counts > 0).sum()
        table = torch.where(counts > 0, counts.sum() / (present * counts.double()), 0)
        return replace(self, class_weight=tuple(table.tolist()))

    @overload
    def __call__(
        self,
        labels: Tensor,
        classes: Tensor | Mapping[int, int] | None = None,
        *,
        num_classes: int | None = None,
        dims: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        labels: NDArray[Any],
        classes: NDArray[Any] | Mapping[int, int] | None = None,
        *,
        num_classes: int | None = None,
        dims: int | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]: ...
    def __call__(
        self,
        labels: Any,
        classes: Any = None,
        *,
        num_classes: int | None = None,
        dims: int | None = None,
    ) -> tuple[Any, Any]:
        """Computes targets and weights.

        Args:
            labels: Instance maps, a tensor or a NumPy array of integers, ids 1 to 2^31 - 1, 0
                background; (H, W), (N, H, W), (N, 1, H, W), (N, D, H, W) or (N, 1, D, H, W).
            classes: The class of every pixel, integer, of the shape of `labels`: 0 background,
                1... classes, 255 ignored; or the class of every id, as a mapping or as a vector
                that ids index; None for one class. Distances and ridge are those of the objects of
                each class by itself; their terms are added up.
            num_classes: Number of classes, background included, 2 to 254; None: as many as
                `class_weight` has weights, else, with `classes`, one more than the greatest (on
                CUDA the host waits for it), else 2.
            dims: Number of spatial axes; 3 takes (D, H, W) as a volume; see
                :func:`unet_fast.two_nearest`.

        Returns:
            target: uint8, 0 background, 1... classes, 255 ignored; the ridge between touching
                objects is background.
            weights: float32, 0 where ignored. Distances are to the whole objects, ridge included.
                With ``"balanced"``, weights of classes are counted in each image by itself; those
                of the data set, which training uses, come from :meth:`balanced`.

        Raises:
            TypeError: If `labels` or `classes` is not an integer tensor.
            ValueError: If shapes, ids or classes are out of range.
        """
        if num_classes is None and isinstance(self.class_weight, tuple):
            num_classes = len(self.class_weight)
        result: tuple[Any, Any] = border_weights(
            labels,
            classes,
            num_classes=num_classes,
            ridge=self.ridge,
            ignore_label=self.ignore_label,
            w0=self.w0,
            sigma=self.sigma,
            class_weight=self.class_weight,
            halo=self.halo,
            spacing=self.spacing,
            dims=dims,
        )
        return result


torch.serialization.add_safe_globals([BorderWeights])  # in checkpoints of other trainers
