"""Random choices of a case: the same number gives the same ones on every machine."""

import functools
import zlib

import numpy as np
import torch

OPS = torch.ops.unet_fast
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
REDUCTIONS = ["none", "sum", "mean", "weighted_mean"]
RIDGES = ["none", "one_sided", "two_sided"]
BOUNDARIES = ["mirror", "constant", "nearest", "wrap"]
GRIDS = ["interpolating", "approximating", "keys"]
POSITION = 5e-5  # error of positions in float32, in pixels at scale 1
NEGLIGIBLE = 2.0**-28  # terms of weight maps below it are left out

CASES = {}
"""Functions of a case number, by name."""


def case(function):
    """Registers a function of random choices as one of a number."""

    @functools.wraps(function)
    def run(number):
        function(Choices([zlib.crc32(function.__name__.encode()), number]))

    CASES[function.__name__.strip("_")] = run
    return run


class Choices:
    """Random choices."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def chance(self, share=0.5):
        return self.rng.random() < share

    def some(self, like, share):
        """Marks a share of the elements."""
        return torch.from_numpy(np.asarray(self.rng.random(like.shape) < share))

    def normal(self, *shape, scale=1.0):
        return torch.from_numpy(np.asarray(self.rng.normal(size=shape) * scale))

    def sides(self, axes, empty=True):
        """Of an image: small, long and thin, or empty."""
        if axes and self.chance(0.1):
            sides = [1] * axes
            sides[self.rng.integers(axes)] = 300
        else:
            sides = self.rng.integers(1, (21, 21, 21, 7)[axes], axes).tolist()
        if axes and empty and self.chance(0.03):
            sides[self.rng.integers(axes)] = 0
        return tuple(sides)

    def layout(self, x):
        """The same values in other memory."""
        kind = self.rng.integers(6)
        if kind == 0 and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if kind == 1 and x.dim() > 1:
            i, j = self.rng.choice(x.dim(), 2, replace=False).tolist()
            return x.transpose(i, j).contiguous().transpose(i, j)
        if kind == 2:
            return torch.stack([x, x], -1)[..., 1]
        if kind == 3:
            return torch.stack([x, x], min(1, x.dim())).select(min(1, x.dim()), 1)
        return x

    def ids(self, shape, dtype, top=2**31 - 1):
        """Labels: sparse to full, of few or many objects, with ids of any size."""
        top = min(torch.iinfo(dtype).max, top)
        ids = self.rng.integers(1, self.pick(4, top) + 1, self.pick(1, 2, 8, 30))
        filled = self.rng.random(shape) < self.pick(0.02, 0.2, 0.9)
        return torch.from_numpy(np.where(filled, self.rng.choice(ids, shape), 0)).to(dtype)
