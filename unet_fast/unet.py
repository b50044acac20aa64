"""The U-Net."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .objects import ObjectRule

Norm = Literal["none", "batch", "group", "instance"]
"""Kinds of normalisation, by the names of settings."""
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


class UNet(nn.Module):
    r"""The U-Net of 2015: two 3x3 convolutions per level, `depth` levels down and up again.

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
    2^depth and stays.

    Args:
        in_channels: Channels of the image, in [1, 65536].
        num_classes: Classes, background included, in [1, 65536].
        base_channels: Channels of the uppermost level, in [1, 65536].
        depth: Number of poolings, in [1, 12].
        padding: ``"valid"`` (the paper) or ``"same"`` (zero padding).
        norm: None (the paper), ``"batch"``, ``"group"`` (32 groups or what divides the channels) or
            ``"instance"``, between each 3x3 convolution and its ReLU.
        bottleneck_norm: None or ``"batch"``: at the bottom 3x3, ReLU, batch norm, twice.
        dropout: Probability of dropout after the last block before the bottom (before both its
            pooling and its skip) and after the bottom; in [0, 1).
        upsampling: ``"transpose"`` (2x2 transposed convolution, the paper); ``"release_2015"``
            (the same, as in the network the authors released: a ReLU behind each, and the last
            keeps its channels); or ``"bilinear"`` (bilinear interpolation, then a 1x1 convolution
            that halves the channels).

    Raises:
        ValueError: If an argument breaks a rule above.

    Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, figure 1 and section 3; the
    places of dropout are those of the authors' published networks.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        base_channels: int = 64,
        depth: int = 4,
        padding: str = "valid",
        norm: str | None = None,
        bottleneck_norm: str | None = None,
        dropout: float = 0.5,
        upsampling: str = "transpose",
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
            ("padding", padding, ("valid", "same")),
            ("norm", norm, (None, *_NORMS)),
            ("bottleneck_norm", bottleneck_norm, (None, "batch")),
            ("upsampling", upsampling, ("transpose", "release_2015", "bilinear")),
        ):
            if choice not in allowed:
                raise ValueError(f"UNet: {name} must be one of {allowed}, got {choice!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"UNet: dropout must be in [0, 1), got {dropout}")
        self.depth = depth
        self.padding = padding
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
            "base_channels": base_channels,
            "depth": depth,
            "padding": padding,
            "norm": norm,
            "bottleneck_norm": bottleneck_norm,
            "dropout": dropout,
            "upsampling": upsampling,
        }

        widths = [base_channels * 2**level for level in range(depth + 1)]
        inputs = [in_channels, *widths]
        self.down = nn.ModuleList(
            _block(inputs[level], widths[level], padding, norm) for level in range(depth)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = _block(widths[-2], widths[-1], padding, norm, bottleneck_norm)
        raised = list(widths[:-1])  # channels behind each up-convolution
        if upsampling == "release_2015":
            raised[0] = widths[1]
        self.up = nn.ModuleList(
            _upsampling(widths[level + 1], raised[level], upsampling) for level in range(depth)
        )
        self.merge = nn.ModuleList(
            _block(raised[level] + widths[level], widths[level], padding, norm)
            for level in range(depth)
        )
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        self.dropout = nn.Dropout(dropout)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the scores before softmax.

        Args:
            x: Images, (N, in_channels, H, W).

        Returns:
            Scores, (N, num_classes, H', W') with (H', W') = output_shape((H, W)).

        Raises:
            ValueError: If `x` has another number of channels or a size the network cannot take.
        """
        if x.dim() != 4 or x.shape[1] != self.config["in_channels"]:
            raise ValueError(
                f"UNet: input must be (N, {self.config['in_channels']}, H, W), got {tuple(x.shape)}"
            )
        self.output_shape(x.shape[2:])
        skips = []
        for level, block in enumerate(self.down):
            x = block(x)
            if level == self.depth - 1:
                x = self.dropout(x)
            skips.append(x)
            x = self.pool(x)
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
        for side in input:
            below, above = self._nearest_inputs(side)
            if side != above:
                known = f"{above}" if below is None else f"{below} and {above}"
                raise ValueError(
                    f"UNet: input sides must be {self._rule()}, got {tuple(input)}; "
                    f"nearest to {side}: {known}"
                )
        return tuple(side - self.shrink for side in input)

    def input_shape(self, output: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the smallest input whose output covers `output` (sides >= 1)."""
        if any(side < 1 for side in output):
            raise ValueError(f"UNet: output sides must be >= 1, got {tuple(output)}")
        return tuple(self._nearest_inputs(side + self.shrink)[1] for side in output)

    @property
    def shrink(self) -> int:
        """Pixels by which the output is smaller than the input, both sides together."""
        return 12 * 2**self.depth - 8 if self.padding == "valid" else 0

    def _nearest_inputs(self, side: int) -> tuple[int | None, int]:
        """Returns the largest valid side <= `side`, or None, and the smallest one >= `side`."""
        step = 2**self.depth
        rest = 4 * (step - 1) if self.padding == "valid" else 0
        smallest = rest + step * ((self.shrink - rest) // step + 1)
        steps = (side - smallest) / step
        below = None if steps < 0 else smallest + step * math.floor(steps)
        return below, smallest + step * max(0, math.ceil(steps))

    def _rule(self) -> str:
        step = 2**self.depth
        if self.padding == "same":
            return f"multiples of {step} (depth {self.depth}, padding 'same')"
        smallest = self._nearest_inputs(0)[1]
        return (
            f"{step} b + {4 * (step - 1)} and >= {smallest} (depth {self.depth}, padding 'valid')"
        )


def _block(
    inputs: int, outputs: int, padding: str, norm: str | None, norm_behind: str | None = None
) -> nn.Sequential:
    """Two 3x3 convolutions, each [, norm], ReLU [, norm behind]."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv2d(channels, outputs, 3, padding=1 if padding == "same" else 0))
        if norm is not None:
            layers.append(_NORMS[norm](outputs))
        layers.append(nn.ReLU(inplace=True))
        if norm_behind is not None:
            layers.append(_NORMS[norm_behind](outputs))
    return nn.Sequential(*layers)


def _upsampling(inputs: int, outputs: int, kind: str) -> nn.Module:
    if kind == "transpose":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    if kind == "release_2015":
        return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, stride=2), nn.ReLU())
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Conv2d(inputs, outputs, 1),
    )


def _crop(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Crops the central part of `x`; sizes differ by even numbers."""
    rims = [(side - size) // 2 for side, size in zip(x.shape[2:], shape, strict=True)]
    if not any(rims):
        return x
    # Not by slices, whose gradient is channels-first whatever the memory layout: everything before
    # it in the network would then mix both layouts, which takes a tenth of a training step.
    return nn.functional.pad(x, [-rim for rim in reversed(rims) for _ in range(2)])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        inputs = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    elif isinstance(module, nn.ConvTranspose2d):  # stride = kernel: each output has one input pixel
        inputs = module.in_channels
    else:
        return
    nn.init.normal_(module.weight, std=math.sqrt(2 / inputs))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
