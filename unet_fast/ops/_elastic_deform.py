"""Elastic and affine deformation of images and labels in one pass."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from .._library import bad_value, require_kernels
from ..contracts.elastic_deform import (
    check,
    kinds_of,
    number,
    numbers,
    whole_numbers,
    without_image,
)
from ..contracts.types import takes_arrays
from ._call import call as call_native
from ._call import call_in_backward, function_of, or_reference, refuse_forward_mode, register_vmap

_OP = "elastic_deform"
_DEFORM = torch.ops.unet_fast.elastic_deform.default
_GRADIENT = torch.ops.unet_fast.elastic_deform_backward.default


_Array = Tensor | NDArray[Any]
_Same = TypeVar("_Same", Tensor, NDArray[Any])  # NumPy in, NumPy out


class _Settings(TypedDict, total=False):
    """The settings of the operator, with their types, for all overloads."""

    affine: _Array | None
    gray_curve: _Array | None
    order: int | Sequence[int]
    grid: str
    grid_extent: str
    grid_spacing: float | Sequence[float] | None
    boundary: str
    cval: float
    output_shape: Sequence[int] | None
    label_shape: Sequence[int] | None
    offset: _Array | None
    source: _Array | None


@overload
def elastic_deform(
    image: _Same,
    displacement: _Array | None = None,
    *,
    labels: None = None,
    **settings: Unpack[_Settings],
) -> _Same: ...
@overload
def elastic_deform(
    image: _Same,
    displacement: _Array | None = None,
    *,
    labels: _Array,
    **settings: Unpack[_Settings],
) -> tuple[_Same, _Same]: ...
@overload
def elastic_deform(
    image: None,
    displacement: _Array | None = None,
    *,
    labels: _Same,
    **settings: Unpack[_Settings],
) -> _Same: ...
@takes_arrays("image", "labels", "displacement", "affine", "gray_curve", "offset", "source")
@or_reference
def elastic_deform(
    image: Any,
    displacement: Any = None,
    *,
    labels: Any = None,
    affine: Tensor | None = None,
    gray_curve: Tensor | None = None,
    order: int | Sequence[int] = 1,
    grid: str = "interpolating",
    grid_extent: str = "output",
    grid_spacing: float | Sequence[float] | None = None,
    boundary: str = "mirror",
    cval: float = 0.0,
    output_shape: Sequence[int] | None = None,
    label_shape: Sequence[int] | None = None,
    offset: Tensor | None = None,
    source: Tensor | None = None,
) -> Any:
    """Deforms images and their labels in one pass.

    Arguments, result and errors as in :func:`unet_fast.reference.elastic_deform`. Channels-last
    images are read in place, and give channels-last results. The displacement field is never
    stored; only order 3 needs memory beyond the result: a copy of the image in float32, or float64
    for float64 images. Positions are computed in float64 for float64 images, else in float32
    relative to a nearby pixel, with errors below 5e-5 pixels at scale 1, whatever the size of the
    image and the displacements.

    Differentiable once with respect to `image` and `displacement`, with results that repeat bit for
    bit. On CUDA, sums of an image's gradient have a resolution of the greatest derivative times
    pixels / 2^61, and one derivative that is not finite makes the image's whole gradient NaN. The
    backward pass needs a float32 copy of the image (on CUDA 8 bytes per pixel, and 8 per output
    pixel and axis for `displacement`). On CUDA, where the host does not wait for values, a `source`
    out of range stops the kernel.

    Raises:
        TypeError: As the reference.
        ValueError: As the reference, or if sides exceed 2^29, neighbouring pixels lie 2^28 elements
            apart, or on CUDA there are more than 256 channels.
        RuntimeError: If the build has no kernels for the device.
        NotImplementedError: If an argument other than `image` and `displacement` requires a
            gradient, the displacement of an integer image does, or any does with `source`; in
            second derivatives and in forward-mode differentiation.
    """
    alone = image is None
    image = without_image(labels) if alone else image
    check_call = check
    if not torch.compiler.is_compiling():
        order = whole_numbers("order", order)
        output_shape = whole_numbers("output_shape", output_shape)
        label_shape = whole_numbers("label_shape", label_shape)
        grid_spacing, cval = numbers("grid_spacing", grid_spacing), number("cval", cval)
        if isinstance(grid, str) and isinstance(grid_extent, str) and isinstance(boundary, str):
            check_call = _remembered  # all its arguments can be hashed
    checked = check_call(
        kinds_of(image, displacement, labels, affine, gray_curve, offset, source),
        order,
        grid,
        grid_extent,
        grid_spacing,
        boundary,
        output_shape,
        label_shape,
    )
    require_kernels(_OP, image)
    if torch.is_grad_enabled():
        _refuse_gradients(image, displacement, source, affine, offset, gray_curve)
    if gray_curve is not None:
        accumulator = torch.float64 if image.dtype == torch.float64 else torch.float32
        gray_curve = gray_curve.to(accumulator).contiguous()
    several = labels is not None and labels.dim() == image.dim()
    call = _Call(
        image,
        _parameter(displacement),
        _parameter(affine),
        _parameter(offset),
        labels[:, 0] if several else labels,
        gray_curve,
        *checked[:5],
        cval,
        *checked[5:],
        None if source is None else source.to(torch.int64).contiguous(),
    )
    deformed, moved = _run(call)
    if labels is None:
        return deformed
    if several:
        moved = torch.stack([moved, *(_run(call.of(x))[1] for x in labels.unbind(1)[1:])], 1)
    return moved if alone else (deformed, moved)


class _Call(NamedTuple):
    """The arguments of the native operator, as in its schema; the only list of them here."""

    image: Tensor
    displacement: Tensor | None
    affine: Tensor | None
    offset: Tensor | None
    labels: Tensor | None
    gray_curve: Tensor | None
    orders: Sequence[int]
    grid: int
    spans_input: bool
    scales: Sequence[float]
    boundary: int
    cval: float
    output_shape: Sequence[int]
    label_shape: Sequence[int]
    source: Tensor | None

    def of(self, labels: Tensor) -> "_Call":
        """Returns a call that deforms other labels alone."""
        image, field = self.image[:, :0].detach(), self.displacement
        field = None if field is None else field.detach()
        return self._replace(
            image=image, displacement=field, labels=labels, gray_curve=None, orders=()
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that the gradient depends on."""
        return self.image, self.displacement, self.affine, self.offset, self.gray_curve

    @property
    def settings(self) -> tuple[Any, ...]:
        """The settings that the gradient depends on."""
        return self.orders, self.grid, self.spans_input, self.scales, self.boundary, self.cval


_remembered = functools.lru_cache(maxsize=256)(check)
"""Cached checks, for calls with tensors of the same kinds."""


def _run(call: _Call) -> Any:
    """Calls the native operator, through autograd only if there is something to differentiate."""
    if torch.compiler.is_compiling():
        return _DEFORM(*call)
    needs_grad = any(x is not None and x.requires_grad for x in call[:2])
    refuse_forward_mode(_OP, *call.tensors)
    try:
        if needs_grad and torch.is_grad_enabled():
            return _Deform.apply(*call)
        return call_native(_DEFORM, *call, differentiated=False)
    except RuntimeError as error:
        wrong = [bad_value(_OP, error, name) for name in ("image", "labels", "source")]
        raise next(filter(None, wrong), error) from None


def _refuse_gradients(
    image: Tensor, displacement: Tensor | None, source: Tensor | None, *constants: Tensor | None
) -> None:
    """Raises NotImplementedError if an argument without a derivative requires a gradient."""
    for name, tensor in (("image", image), ("displacement", displacement)):
        if source is not None and tensor is not None and tensor.requires_grad:
            raise NotImplementedError(f"{_OP}: {name} must not require a gradient with source")
    for name, tensor in zip(("affine", "offset", "gray_curve"), constants, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{_OP}: {name} must not require a gradient; image and displacement may"
            )
    if displacement is None or image.dtype.is_floating_point or not displacement.requires_grad:
        return
    raise NotImplementedError(
        f"{_OP}: displacement must not require a gradient with an image of {image.dtype}"
    )


def _parameter(x: Tensor | None) -> Tensor | None:
    """Converts to float32, except for float32 and float64, which are read as they are."""
    return x if x is None or x.dtype in (torch.float32, torch.float64) else x.float()


@torch.library.register_fake("unet_fast::elastic_deform")
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*inputs)
    n = len(call.image) if call.source is None else len(call.source)
    deformed = _new_image(call.image, n, call.output_shape)
    if call.labels is None:
        return deformed, call.image.new_empty(0, dtype=torch.uint8)
    return deformed, call.labels.new_empty(n, *call.label_shape)


@torch.library.register_fake("unet_fast::elastic_deform_backward")
def _(
    grad: Tensor, image: Tensor, displacement: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    of_image, of_displacement = settings[-2:]
    image_gradient = (
        _new_image(image, len(image), image.shape[2:])
        if of_image
        else image.new_empty(0, dtype=torch.float32)
    )
    shape = displacement.shape if of_displacement and displacement is not None else (0,)
    return image_gradient, image.new_empty(shape, dtype=torch.float64)


def _new_image(image: Tensor, n: int, shape: Sequence[int]) -> Tensor:
    """Returns n images of another spatial shape, in the memory format of `image`."""
    channels = image.shape[1]
    if channels > 1 and image.stride(1) == 1 and image.stride(-1) == channels:
        return image.new_empty(n, *shape, channels).movedim(-1, 1)
    return image.new_empty(n, channels, *shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = _Call(*inputs)
    ctx.save_for_backward(*call.tensors)
    ctx.settings = call.settings
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    of_image, of_displacement = ctx.needs_input_grad[:2]
    by_image = by_displacement = None
    if grad is not None:
        inputs = grad, *ctx.saved_tensors, *ctx.settings, of_image, of_displacement
        by_image, by_displacement = call_in_backward(_Gradient, _GRADIENT, *inputs)
    if of_displacement and by_displacement is not None:
        by_displacement = by_displacement.to(ctx.saved_tensors[1].dtype)
    none = (None,) * (len(_Call._fields) - 2)
    return by_image if of_image else None, by_displacement if of_displacement else None, *none


def _no_second_derivatives(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(f"{_OP}: second derivatives are not available")


torch.library.register_autograd("unet_fast::elastic_deform", _backward, setup_context=_setup)
torch.library.register_autograd("unet_fast::elastic_deform_backward", _no_second_derivatives)
register_vmap("elastic_deform", "elastic_deform_backward")

_Deform = function_of(_DEFORM, _setup, _backward)
_Gradient = function_of(_GRADIENT, lambda *_: None, _no_second_derivatives)
