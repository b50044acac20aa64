"""Layers that torch lacks: repeatable pooling of volumes, batch renorm, fused convolutions."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1000
"""Steps in which the limits rise from those of batch norm to :data:`SCALE` and `SHIFT`."""
SCALE, SHIFT = 3.0, 5.0
"""Limits of the corrections, those of the paper."""


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
        with torch.autocast("cpu", enabled=False):  # under which it would pool in float32
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


class BatchRenorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm that corrects the statistics of a batch towards the running ones in training.

    With few samples in a batch the statistics of a batch are far from the running ones, and so is
    what batch norm does in training from what it does in evaluation.

    Takes (N, C, ...) and the arguments of :class:`torch.nn.BatchNorm2d`.

    Source: S. Ioffe, "Batch Renormalization", NeurIPS 2017, algorithm 1, arXiv 1702.03275.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes any number of axes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises a batch."""
        if not self.training:
            return super().forward(input)
        mean, variance, steps = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert steps is not None
        with torch.no_grad():
            axes = [axis for axis in range(input.dim()) if axis != 1]
            batch_variance, batch_mean = torch.var_mean(input.float(), axes, correction=0)
            share = (steps / STEPS).clamp_max(1.0)
            most, width = 1 + (SCALE - 1) * share, (variance + self.eps).sqrt()
            scale = (batch_variance + self.eps).sqrt() / width
            scale = torch.minimum(torch.maximum(scale, 1 / most), most)
            shift = (batch_mean - mean) / width
            shift = torch.minimum(torch.maximum(shift, -SHIFT * share), SHIFT * share)
            momentum = 0.1 if self.momentum is None else self.momentum
            count = input.numel() / input.shape[1]
            mean.lerp_(batch_mean.to(mean), momentum)
            unbiased = batch_variance * (count / max(count - 1, 1))
            variance.lerp_(unbiased.to(variance), momentum)
            steps += 1
        # The corrections are constants: they act as another weight and bias.
        weight, bias = self.weight * scale, self.bias + self.weight * shift
        return F.batch_norm(input, None, None, weight, bias, training=True, eps=self.eps)


class FusedConvolution(nn.Module):
    """A convolution and the ReLU behind it in one pass of oneDNN, without derivatives."""

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """Convolves (N, C, *S), whose type becomes that of the weights."""
        c = self.convolution
        x = x.to(c.weight.dtype)
        where = c.padding, c.stride, c.dilation, c.groups
        fused = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = fused(x, c.weight, c.bias, *where, "relu", [], "")
        return result


def fused_in_bfloat16(model: nn.Module) -> nn.Module:
    """Returns a copy for prediction on the CPU under autocast: the same bits in less time.

    Its convolutions have weights of bfloat16, which autocast would convert for each tile, and are
    fused with their ReLUs. Where oneDNN has no bfloat16, the model itself.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return model
    convolutions = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    converted = {
        id(weight): nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        for layer in model.modules()
        if isinstance(layer, convolutions)
        for weight in layer.parameters()
    }
    result = copy.deepcopy(model, converted)
    for block in result.modules():
        if isinstance(block, nn.Sequential):
            for i, layer in enumerate([*block][:-1]):
                if isinstance(layer, nn.Conv2d | nn.Conv3d) and isinstance(block[i + 1], nn.ReLU):
                    block[i], block[i + 1] = FusedConvolution(layer), nn.Identity()
    return result
