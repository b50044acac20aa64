"""torchvision: the deformation as a transform of its version 2."""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..augment import Augmentation

_WRONG = tuple(
    getattr(tv_tensors, name)
    for name in ("BoundingBoxes", "KeyPoints", "Video")
    if hasattr(tv_tensors, name)
)


class ElasticDeform(v2.Transform):  # type: ignore[misc,unused-ignore]
    """Deforms an image and its masks by the same random field.

    Takes samples of any structure with one `tv_tensors.Image`, (C, H, W), of floats about [0, 1] or
    of uint8, and any number of `tv_tensors.Mask`, (H, W) or (K, H, W), integer or bool: instance
    maps, class maps, or a mask for each object. Masks keep their values (nearest neighbour). All
    else is passed on. Random numbers come from torch.

    Args:
        augmentation: The ranges of the deformation; None: the paper's.

    Raises:
        TypeError: If there are boxes, key points or videos, which it cannot move.
        ValueError: If there is not exactly one image, or a mask has another size.
    """

    def __init__(self, augmentation: Augmentation | None = None) -> None:
        super().__init__()
        self.augmentation = augmentation or Augmentation.paper_2015()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the parameters of a sample."""
        images = [x for x in flat_inputs if isinstance(x, tv_tensors.Image)]
        if len(images) != 1 or images[0].dim() != 3:
            got = [tuple(x.shape) for x in images]
            raise ValueError(f"ElasticDeform: sample must hold one Image (C, H, W), got {got}")
        for x in flat_inputs:
            if isinstance(x, _WRONG):
                raise TypeError(f"ElasticDeform: sample must hold no {type(x).__name__}, got one")
            if isinstance(x, tv_tensors.Mask) and x.shape[-2:] != images[0].shape[-2:]:
                raise ValueError(
                    f"ElasticDeform: masks must be of size {tuple(images[0].shape[-2:])} as the "
                    f"image, got {tuple(x.shape)}"
                )
        return {"drawn": self.augmentation.draw(1, images[0].shape)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Deforms an image or a mask; passes on all else."""
        plain = inpt.as_subclass(torch.Tensor) if isinstance(inpt, torch.Tensor) else inpt
        if isinstance(inpt, tv_tensors.Image):
            moved, _ = self.augmentation.apply(plain[None], None, params["drawn"])
        elif isinstance(inpt, tv_tensors.Mask) and inpt.numel() > 0:  # of an object or more
            maps = plain.view(1, -1, *plain.shape[-2:])
            maps = maps.to(torch.uint8) if plain.dtype == torch.bool else maps
            _, moved = self.augmentation.apply(None, maps, params["drawn"])
        else:
            return inpt
        return tv_tensors.wrap(moved.view(plain.shape).to(plain.dtype), like=inpt)
