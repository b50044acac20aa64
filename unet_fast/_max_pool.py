"""Max pooling of volumes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaxPool3d(nn.Module):
    """Max pooling whose gradient repeats bit for bit on CUDA, if that is asked for.

    torch's own adds gradients there in any order, and refuses to where deterministic algorithms
    are asked for.
    """

    def __init__(self, window: tuple[int, ...]) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Pools a volume, (N, C, D, H, W)."""
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return max_pool_by_selection(x, self.window)
        return F.max_pool3d(x, self.window)


def max_pool_by_selection(x: Tensor, window: Sequence[int]) -> Tensor:
    """Pools by the maximum of each window, the first of equal ones, without scattered gradients.

    Args:
        x: (N, C, *S); each side a multiple of its window.
        window: Size of the window along each spatial axis.
    """
    n, channels, *sides = x.shape
    parts = [k for side, size in zip(sides, window, strict=True) for k in (side // size, size)]
    inner, outer = range(3, 2 + len(parts), 2), range(2, 2 + len(parts), 2)
    x = x.reshape(n, channels, *parts).permute(0, 1, *outer, *inner).flatten(2 + len(sides))
    chosen = torch.arange(x.shape[-1], device=x.device) == x.argmax(-1, keepdim=True)
    return torch.where(chosen, x, 0).sum(-1)
