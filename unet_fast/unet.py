"""The U-Net."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ._layers import BatchRenorm, MaxPool3d
from .contracts.types import unbatched

if TYPE_CHECKING:
    from .objects import ObjectRule

Norm = Literal["none", "batch", "batch_renorm", "group", "instance"]
"""Kinds of normalisation, by the names of settings."""

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORMS: dict[int, Callable[..., nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class UNet(nn.Module):
    r"""The U-Net of 2015 and its 3D form of 2016: two convolutions per level, down and up again.

    ====================  ============================================================
    down, level i         3x3, 3x3 -> base 2^i channels; 2x2 max pooling
    bottom                3x3, 3x3 -> base 2^depth channels
    up, level i           2x2 up-convolution to base 2^i channels; central crop of the level's
                          skip, concatenated behind it; 3x3, 3x3
    head                  1x1 -> `num_classes` scores
    ====================  ============================================================

    Every convolution but the head and the up-convolutions is followed by a ReLU. Weights start
    from N(0, 2 / n) with n the inputs of one output value (He initialisation), biases at 0.

    With ``padding="valid"`` an input side must be 2^depth b + 4 (2^depth - 1) for an integer b and
    shrinks by 12 2^depth - 8: 572 -> 388 at depth 4. With ``"same"`` it must be a multiple of
    2^depth and stays. Other kernels and poolings have other rules, for each axis by itself:
    :meth:`input_shape` and :meth:`output_shape` know them.

    Args:
        in_channels: Channels of the image, in [1, 65536].
        num_classes: Classes, background included, in [1, 65536].
        dims: Spatial axes: 2, or 3 for volumes, whose kernels and poolings have three axes.
        base_channels: Channels of the uppermost level, in [1, 65536].
        depth: Number of poolings, in [1, 12].
        kernels: Size of the convolutions of each level along each axis, odd, in [1, 7]; from the
            uppermost level to the bottom, `depth` + 1 times `dims` numbers. None: 3.
        poolings: Factor of each pooling along each axis, in [1, 4]; from above, `depth` times
            `dims` numbers. None: 2. The up-convolution of a level has the size of its pooling.
        padding: ``"valid"`` (the papers) or ``"same"`` (zero padding).
        widening: Where channels double: ``"after_pooling"`` (2015), in the first convolution of a
            level; or ``"before_pooling"`` (2016): the first convolution of the uppermost level has
            `base_channels`, the second of each level doubles them, up-convolutions keep them.
        norm: None (2015), ``"batch"`` (2016, with running statistics in evaluation),
            ``"batch_renorm"`` (`BatchRenorm`, for batches of few tiles), ``"group"`` (32
            groups or what divides the channels) or ``"instance"``, between each convolution of a
            level and its ReLU. The statistics of 2016, of the one volume that the network sees, are
            those of ``"instance"``.
        bottleneck_norm: None or ``"batch"``: at the bottom convolution, ReLU, batch norm, twice.
        dropout: Probability of dropout after the last block before the bottom (before both its
            pooling and its skip) and after the bottom; in [0, 1).
        upsampling: ``"transpose"`` (transposed convolution, the papers); ``"release_2015"``
            (the same, as in the network the authors released: a ReLU behind each, and the last
            keeps its channels); or ``"bilinear"`` (linear interpolation along each axis, then a 1x1
            convolution to the channels of the level).
        up_bias: Whether up-convolutions have a bias.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If an argument breaks a rule above.

    Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, figure 1 and section 3; the
    places of dropout are those of the authors' published networks. O. Cicek et al., "3D U-Net",
    MICCAI 2016, figure 2.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        dims: int = 2,
        base_channels: int = 64,
        depth: int = 4,
        kernels: Sequence[Sequence[int]] | None = None,
        poolings: Sequence[Sequence[int]] | None = None,
        padding: str = "valid",
        widening: str = "after_pooling",
        norm: str | None = None,
        bottleneck_norm: str | None = None,
        dropout: float = 0.5,
        upsampling: str = "transpose",
        up_bias: bool = True,
    ) -> None:
        super().__init__()
        for name, count, most in (
            ("in_channels", in_channels, 65536),
            ("num_classes", num_classes, 65536),
            ("base_channels", base_channels, 65536),
            ("depth", depth, 12),
        ):
            if not isinstance(count, Integral):
                raise TypeError(f"UNet: {name} must be an integer, got {count!r}")
            if not 1 <= count <= most:
                raise ValueError(f"UNet: {name} must be in [1, {most}], got {count}")
        for name, choice, allowed in (
            ("dims", dims, (2, 3)),
            ("padding", padding, ("valid", "same")),
            ("widening", widening, ("after_pooling", "before_pooling")),
            ("norm", norm, (None, "batch", "batch_renorm", "group", "instance")),
            ("bottleneck_norm", bottleneck_norm, (None, "batch")),
            ("upsampling", upsampling, ("transpose", "release_2015", "bilinear")),
        ):
            if choice not in allowed:
                raise ValueError(f"UNet: {name} must be one of {allowed}, got {choice!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"UNet: dropout must be in [0, 1), got {dropout}")
        self.dims = dims
        self.depth = depth
        self.padding = padding
        self.kernels = _numbers_of("kernels", kernels, (depth + 1, dims), 3, range(1, 8, 2))
        """Size of the convolutions of each level along each axis, from above."""
        self.poolings = _numbers_of("poolings", poolings, (depth, dims), 2, range(1, 5))
        """Factor of each pooling along each axis, from above."""
        self.normalisation: str | None = None
        """How images are normalised before they enter: None or "percentile"."""
        self.class_values: list[int] | None = None
        """Values of the classes in the class maps of training; None: 0, 1, ..."""
        self.ridge_width = 0
        """Pixels that training carved from touching objects; predicted ones grow back by as
        many."""
        self.objects: ObjectRule | None = None
        """Object rule fitted in training; None: all foreground makes objects."""
        # Stored by save_model: UNet(**config) is a network like this one.
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "dims": dims,
            "base_channels": base_channels,
            "depth": depth,
            "kernels": None if kernels is None else self.kernels,
            "poolings": None if poolings is None else self.poolings,
            "padding": padding,
            "widening": widening,
            "norm": norm,
            "bottleneck_norm": bottleneck_norm,
            "dropout": dropout,
            "upsampling": upsampling,
            "up_bias": up_bias,
        }

        early = widening == "before_pooling"
        # Channels behind each level on the way down, and on the way up.
        widths = [base_channels * 2 ** (level + early) for level in range(depth + 1)]
        inputs = [in_channels, *widths]
        first = [base_channels * 2**level for level in range(depth + 1)]
        build = partial(_block, padding=padding, norm=norm)
        self.down = nn.ModuleList(
            build((inputs[i], first[i], widths[i]), self.kernels[i]) for i in range(depth)
        )
        pooling: Callable[[Any], nn.Module] = nn.MaxPool2d if dims == 2 else MaxPool3d
        self.pool = nn.ModuleList(pooling(window) for window in self.poolings)
        self.bottom = build(
            (widths[-2], first[-1], widths[-1]), self.kernels[-1], norm_behind=bottleneck_norm
        )
        # Channels behind each up-convolution.
        raised = list(widths[1:] if early else widths[:-1])
        if upsampling == "release_2015":
            raised[0] = widths[1]
        self.up = nn.ModuleList(
            _upsampling(widths[i + 1], raised[i], self.poolings[i], upsampling, up_bias)
            for i in range(depth)
        )
        self.merge = nn.ModuleList(
            build((raised[i] + widths[i], widths[i], widths[i]), self.kernels[i])
            for i in range(depth)
        )
        self.head = _CONVOLUTIONS[dims](widths[0], num_classes, 1)
        self.dropout = nn.Dropout(dropout)
        self.apply(_initialise)

    @classmethod
    def cicek_2016(cls, in_channels: int = 3, num_classes: int = 3, **changes: Any) -> "UNet":
        """Returns the 3D U-Net of 2016: 19,069,955 parameters, 132 x 132 x 116 -> 44 x 44 x 28.

        Batch norm adds 4,672 more. The paper has neither dropout nor a bias in up-convolutions.

        Args:
            in_channels: Channels of the volume.
            num_classes: Classes, background included.
            changes: Other arguments of :class:`UNet` than the paper's.
        """
        paper: dict[str, Any] = {
            "dims": 3,
            "base_channels": 32,
            "depth": 3,
            "widening": "before_pooling",
            "norm": "batch",
            "dropout": 0.0,
            "up_bias": False,
        }
        return cls(in_channels, num_classes, **paper | changes)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the scores before softmax.

        Args:
            x: Images, (N, in_channels, H, W), or volumes, (N, in_channels, D, H, W).

        Returns:
            Scores, (N, num_classes, *S) with S = output_shape(x.shape[2:]).

        Raises:
            TypeError: If `x` is not a tensor.
            ValueError: If `x` has another number of channels or a size the network cannot take.
        """
        if not isinstance(x, Tensor):
            raise TypeError(
                "UNet: input must be a tensor (torch.from_numpy makes one of an array), got "
                f"{type(x).__name__}"
            )
        if x.dim() != self.dims + 2 or x.shape[1] != self.config["in_channels"]:
            axes = "D, H, W"[-3 * self.dims + 2 :]
            raise ValueError(
                f"UNet: input must be (N, {self.config['in_channels']}, {axes}), got "
                f"{tuple(x.shape)}{unbatched('input', x.shape, self.dims + 1)}"
            )
        self.output_shape(x.shape[2:])
        skips = []
        for level, block in enumerate(self.down):
            x = block(x)
            if level == self.depth - 1:
                x = self.dropout(x)
            skips.append(x)
            x = self.pool[level](x)
        x = self.dropout(self.bottom(x))
        for level in reversed(range(self.depth)):
            x = self.up[level](x)
            x = torch.cat([x, _crop(skips.pop(), x.shape[2:])], dim=1)
            x = self.merge[level](x)
        scores: Tensor = self.head(x)
        return scores

    def output_shape(self, input: Sequence[int]) -> tuple[int, ...]:
        """Returns the spatial shape of the output.

        Args:
            input: Spatial shape of the input, in pixels.

        Raises:
            ValueError: If the network cannot take that size; the message names the nearest ones.
        """
        self._check_axes("input", input)
        for axis, side in enumerate(input):
            below, above = self._nearest_inputs(axis, side)
            if side != above:
                known = f"{above}" if below is None else f"{below} and {above}"
                where = "" if self._uniform else f" along axis {axis}"
                raise ValueError(
                    f"UNet: input sides{where} must be {self._rule(axis)}, got {tuple(input)}; "
                    f"nearest to {side}: {known}"
                )
        return tuple(side - less for side, less in zip(input, self.shrinkage, strict=True))

    def input_shape(self, output: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the smallest input whose output covers `output` (sides >= 1)."""
        self._check_axes("output", output)
        if any(side < 1 for side in output):
            raise ValueError(f"UNet: output sides must be >= 1, got {tuple(output)}")
        return tuple(
            self._nearest_inputs(axis, side + self.shrinkage[axis])[1]
            for axis, side in enumerate(output)
        )

    @property
    def alignment(self) -> tuple[int, ...]:
        """Product of all pooling factors along each axis: shifts by it commute with the network."""
        return tuple(math.prod(factors) for factors in zip(*self.poolings, strict=True))

    @property
    def shrinkage(self) -> tuple[int, ...]:
        """Pixels by which the output is smaller than the input along each axis, both sides."""
        return tuple(self._lost(axis)[1] for axis in range(self.dims))

    @property
    def shrink(self) -> int:
        """Pixels by which the output is smaller than the input along the last axis."""
        return self.shrinkage[-1]

    @property
    def _uniform(self) -> bool:
        """Whether all axes have the same rule."""
        return all(len({*row}) == 1 for row in (*self.kernels, *self.poolings))

    def _check_axes(self, name: str, shape: Sequence[int]) -> None:
        if len(shape) != self.dims:
            raise ValueError(f"UNet: {name} must have {self.dims} sides, got {tuple(shape)}")

    def _lost(self, axis: int) -> tuple[int, int]:
        """Returns the pixels that unpadded convolutions drop along an axis: down, and in all.

        Counted in pixels of the input. A level drops as much on the way down as on the way up.
        """
        if self.padding == "same":
            return 0, 0
        down = whole = 0
        size = 1
        for level, kernel in enumerate(self.kernels):
            lost = 2 * (kernel[axis] - 1) * size
            at_bottom = level == self.depth
            whole += lost if at_bottom else 2 * lost
            if not at_bottom:
                down += lost
                size *= self.poolings[level][axis]
        return down, whole

    def _nearest_inputs(self, axis: int, side: int) -> tuple[int | None, int]:
        """Returns the largest valid side <= `side`, or None, and the smallest one >= `side`."""
        step, (rest, less) = self.alignment[axis], self._lost(axis)
        smallest = rest + step * ((less - rest) // step + 1)
        more = side - smallest  # divided as integers, which the tracers of torch can follow
        below = None if more < 0 else smallest + more // step * step
        return below, smallest + max(0, -(-more // step)) * step

    def _rule(self, axis: int) -> str:
        step = self.alignment[axis]
        if self.padding == "same":
            return f"multiples of {step} (depth {self.depth}, padding 'same')"
        smallest = self._nearest_inputs(axis, 0)[1]
        return (
            f"{step} b + {self._lost(axis)[0]} and >= {smallest} (depth {self.depth}, padding "
            "'valid')"
        )


def _numbers_of(
    name: str,
    numbers: Sequence[Sequence[int]] | None,
    shape: tuple[int, int],
    default: int,
    allowed: range,
) -> tuple[tuple[int, ...], ...]:
    """Returns a number for each level and axis, checked."""
    levels, axes = shape
    if numbers is None:
        return ((default,) * axes,) * levels
    rows = tuple(tuple(row) if isinstance(row, Sequence) else (row,) for row in numbers)
    if len(rows) != levels or any(len(row) != axes for row in rows):
        raise ValueError(f"UNet: {name} must be {levels} times {axes} numbers, got {numbers}")
    for number in (number for row in rows for number in row):
        if not isinstance(number, Integral):
            raise TypeError(f"UNet: {name} must be integers, got {number!r}")
        if number not in allowed:
            known = ", ".join(map(str, allowed))
            raise ValueError(f"UNet: {name} must be of {known}, got {number}")
    return rows


def _block(
    channels: Sequence[int],
    kernel: tuple[int, ...],
    *,
    padding: str,
    norm: str | None,
    norm_behind: str | None = None,
) -> nn.Sequential:
    """Two convolutions, each [, norm], ReLU [, norm behind]; channels before, between, behind."""
    layers: list[nn.Module] = []
    rim = tuple(side // 2 if padding == "same" else 0 for side in kernel)
    for inputs, outputs in pairwise(channels):
        layers.append(_CONVOLUTIONS[len(kernel)](inputs, outputs, kernel, padding=rim))
        if norm is not None:
            layers.append(_norm(norm, outputs, len(kernel)))
        layers.append(nn.ReLU(inplace=True))
        if norm_behind is not None:
            layers.append(_norm(norm_behind, outputs, len(kernel)))
    return nn.Sequential(*layers)


def _norm(kind: str, channels: int, dims: int) -> nn.Module:
    if kind == "batch":
        return _BATCH_NORMS[dims](channels)
    if kind == "batch_renorm":
        return BatchRenorm(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return _INSTANCE_NORMS[dims](channels, affine=True)


def _upsampling(
    inputs: int, outputs: int, window: tuple[int, ...], kind: str, bias: bool
) -> nn.Module:
    dims = len(window)
    if kind == "bilinear":
        mode = {2: "bilinear", 3: "trilinear"}[dims]
        return nn.Sequential(
            nn.Upsample(scale_factor=window, mode=mode, align_corners=False),
            _CONVOLUTIONS[dims](inputs, outputs, 1, bias=bias),
        )
    raise_ = _UP_CONVOLUTIONS[dims](inputs, outputs, window, stride=window, bias=bias)
    return nn.Sequential(raise_, nn.ReLU()) if kind == "release_2015" else raise_


def _crop(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Crops the central part of `x`; sizes differ by even numbers."""
    rims = [(side - size) // 2 for side, size in zip(x.shape[2:], shape, strict=True)]
    if not any(rims):
        return x
    # Not by slices, whose gradient is channels-first whatever the memory layout: everything before
    # it in the network would then mix both layouts, which takes a tenth of a training step.
    return nn.functional.pad(x, [-rim for rim in reversed(rims) for _ in range(2)])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        inputs = module.in_channels * math.prod(module.kernel_size)
    elif isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
        inputs = module.in_channels  # stride = kernel: each output has one input pixel
    else:
        return
    nn.init.normal_(module.weight, std=math.sqrt(2 / inputs))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
