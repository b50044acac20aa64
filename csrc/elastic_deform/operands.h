#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/tensors.h"
#include "elastic_deform/numerics.h"

// Checked arguments of the operators, shared by the CPU and CUDA implementations.
namespace unet_fast::elastic_deform {

using torch::headeronly::ScalarType;

/// Calls `fn.operator()<T>()` with the C++ type of an image.
template <typename Fn>
void dispatch_image(ScalarType dtype, Fn&& fn) {
  switch (dtype) {
    case ScalarType::Byte:
      return std::forward<Fn>(fn).template operator()<uint8_t>();
    case ScalarType::UInt16:
      return std::forward<Fn>(fn).template operator()<uint16_t>();
    default:
      return dispatch_floating(dtype, "elastic_deform", std::forward<Fn>(fn));
  }
}

/// Calls `fn.operator()<T>()` with an integer type as wide as the labels.
template <typename Fn>
void dispatch_width(const Tensor& labels, Fn&& fn) {
  switch (labels.element_size()) {
    case 1:
      return std::forward<Fn>(fn).template operator()<int8_t>();
    case 2:
      return std::forward<Fn>(fn).template operator()<int16_t>();
    case 4:
      return std::forward<Fn>(fn).template operator()<int32_t>();
    default:
      return std::forward<Fn>(fn).template operator()<int64_t>();
  }
}

/// The shape of an image and of its labels, for messages.
template <int axes>
constexpr const char* kImageShape = axes == 2 ? "(N, C, H, W)" : "(N, C, D, H, W)";
template <int axes>
constexpr const char* kLabelShape = axes == 2 ? "(N, H, W)" : "(N, D, H, W)";

/// The last sizes of a tensor, or a shape.
template <int axes>
Sides<axes> sides_of(const Tensor& x) {
  Sides<axes> result;
  for (int axis = 0; axis < axes; ++axis) result[axis] = x.size(x.dim() - axes + axis);
  return result;
}
template <int axes>
Sides<axes> sides_of(const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(shape.size() == axes, "elastic_deform takes ", axes, " spatial axes, got ",
                  shape.size());
  Sides<axes> result;
  for (int axis = 0; axis < axes; ++axis) {
    STD_TORCH_CHECK(shape[axis] >= 0 && shape[axis] < kFarthest / 2,
                    "output_shape must be below 2^29, got ", shape[axis]);
    result[axis] = shape[axis];
  }
  return result;
}

/// The settings of a call, as in the schema.
struct Settings {
  std::vector<int64_t> orders;
  int32_t grid;
  bool spans_input;
  std::vector<double> scales;
  int32_t boundary;
  double cval;

  Settings(const std::vector<int64_t>& orders, int64_t grid, bool spans_input,
           const std::vector<double>& scales, int64_t boundary, double cval)
      : orders(orders),
        grid(static_cast<int32_t>(grid)),
        spans_input(spans_input),
        scales(scales),
        boundary(static_cast<int32_t>(boundary)),
        cval(cval) {}
};

/// The tensors that describe the deformation, contiguous and checked.
template <int axes>
struct Operands {
  Operands(const Tensor& image, const std::optional<Tensor>& displacement,
           const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
           const std::optional<Tensor>& gray_curve, const Settings& settings,
           const std::optional<Tensor>& source = std::nullopt)
      : images(source ? source->size(0) : image.size(0)),
        sources(image.size(0)),
        channels(image.size(1)),
        input(sides_of<axes>(image)),
        displacement(parameter(displacement, 2 + axes)),
        affine(parameter(affine, 3)),
        offset(parameter(offset, 2)),
        gray_curve(gray_curve),
        source(source),
        field(GridAxes<axes>::none(settings.grid)) {
    STD_TORCH_CHECK(!source || (source->dim() == 1 && source->is_contiguous() &&
                                source->scalar_type() == ScalarType::Long),
                    "elastic_deform takes a contiguous source (N,) in int64");
    STD_TORCH_CHECK(
        settings.scales.size() == axes && static_cast<int64_t>(settings.orders.size()) == channels,
        "elastic_deform takes an image ", kImageShape<axes>, ", ", axes, " scales, C orders");
    STD_TORCH_CHECK(settings.grid >= kInterpolating && settings.grid <= kKeys &&
                        settings.boundary >= kMirror && settings.boundary <= kWrap,
                    "elastic_deform takes grids 0 to 2 and boundaries 0 to 3");
    STD_TORCH_CHECK(!affine || affine->size(2) == axes + 1, "affine must be (N, ", axes, ", ",
                    axes + 1, ")");
    for (const auto& x : {displacement, affine, offset, gray_curve, source}) {
      STD_TORCH_CHECK(!x || x->device() == image.device(),
                      "elastic_deform takes tensors on one device");
    }
    for (const int64_t side : input.along) {
      STD_TORCH_CHECK(side >= 1 && side < kFarthest / 2,
                      "image must be of sides from 1 to 2^29 pixels, got ", side);
    }
    if (gray_curve) {
      const Tensor& curve = *gray_curve;
      const auto type =
          image.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
      STD_TORCH_CHECK(curve.dim() == 3 && curve.size(0) == images && curve.is_contiguous() &&
                          (curve.size(1) == channels || curve.size(1) == 1) && curve.size(2) >= 2 &&
                          curve.scalar_type() == type,
                      "elastic_deform takes a contiguous gray_curve (N, C or 1, K)");
    }
    STD_TORCH_CHECK(!displacement || displacement->numel() > 0 || images == 0,
                    "displacement must have at least one point along each axis");
    if (displacement) {
      const Sides<axes> points = sides_of<axes>(*displacement);
      for (const int64_t n : points.along) {
        STD_TORCH_CHECK(settings.grid != kApproximating || n >= 4,
                        "displacement must have at least 4 points along each axis");
      }
      field = GridAxes<axes>::of(settings.grid, points, settings.scales.data());
    }
    for (const int64_t order : settings.orders) {
      STD_TORCH_CHECK(order == 0 || order == 1 || order == 3, "order must be 0, 1 or 3, got ",
                      order);
    }
  }

  Values values(const std::optional<Tensor>& x) const {
    return {x ? x->data_ptr() : nullptr, x && x->scalar_type() == ScalarType::Float};
  }
  template <typename T>
  Curves<Accumulator<T>> curves() const {
    using A = Accumulator<T>;
    const auto unit = static_cast<A>(kUnit<T>);
    if (!gray_curve) return {};
    return Curves<A>::of(gray_curve->const_data_ptr<A>(), gray_curve->size(1), gray_curve->size(2),
                         unit);
  }
  int64_t images;   // output images
  int64_t sources;  // input images
  int64_t channels;
  Sides<axes> input;
  std::optional<Tensor> displacement, affine, offset, gray_curve, source;
  GridAxes<axes> field;

 private:
  std::optional<Tensor> parameter(const std::optional<Tensor>& x, int64_t dims) const {
    if (!x) return std::nullopt;
    STD_TORCH_CHECK(
        x->dim() == dims && x->size(0) == images && x->size(1) == axes &&
            (x->scalar_type() == ScalarType::Float || x->scalar_type() == ScalarType::Double),
        "elastic_deform takes parameters in float32 or float64, ", axes, " rows an image");
    return as_contiguous(*x);
  }
};

/// Whether the channels of a pixel lie side by side.
inline bool channels_last(const Tensor& image) {
  return image.size(1) > 1 && image.stride(1) == 1 &&
         image.stride(image.dim() - 1) == image.size(1);
}

/// Makes `n` images of another spatial shape, with the dtype and memory format of `image`.
template <int axes>
Tensor new_image(const Tensor& image, int64_t n, const Sides<axes>& sides) {
  const int64_t c = image.size(1);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(image.get(), &dtype));
  std::vector<int64_t> shape{n, c}, strides{c * sides.pixels(), 1};
  for (int axis = 0; axis < axes; ++axis) {
    shape.push_back(sides[axis]);
    strides.push_back(c * sides.step(axis));
  }
  return channels_last(image) ? new_empty_strided(image, shape, strides, dtype)
                              : new_tensor(image, shape, dtype);
}

/// Makes the labels of a window for `n` images; empty without labels.
template <int axes>
Tensor new_labels(const Tensor& image, const std::optional<Tensor>& labels, int64_t n,
                  const Sides<axes>& output, const Sides<axes>& window) {
  for (int axis = 0; axis < axes; ++axis) {
    STD_TORCH_CHECK(window[axis] <= output[axis], "label_shape must fit into output_shape");
  }
  if (!labels) return new_tensor(image, {0}, aoti_torch_dtype_uint8());
  std::vector<int64_t> shape = sizes(image);
  shape.erase(shape.begin() + 1);  // no channels
  STD_TORCH_CHECK(sizes(*labels) == shape && labels->device() == image.device(),
                  "elastic_deform takes labels ", kLabelShape<axes>,
                  " of the image's size, on its device");
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(labels->get(), &dtype));
  shape.assign(window.along, window.along + axes);
  shape.insert(shape.begin(), n);
  return new_tensor(*labels, shape, dtype);
}

/// Strides of an image or of labels.
template <int axes>
Strides<axes> strides_of(const Tensor& x) {
  const int64_t first = x.dim() - axes;  // 1 for labels, which have no channels
  Strides<axes> result{x.stride(0), first == 1 ? 0 : x.stride(1), {}};
  for (int axis = 0; axis < axes; ++axis) result.along[axis] = x.stride(first + axis);
  return result;
}

/// The strides of a tensor to read, 0 along an axis of one pixel. Neighbouring pixels must be so
/// close that offsets within one interpolation fit 32 bits.
template <int axes>
Strides<axes> strides_to_read(const Tensor& x, const char* name) {
  Strides<axes> s = strides_of<axes>(x);
  for (int axis = 0; axis < axes; ++axis) {
    if (x.size(x.dim() - axes + axis) == 1) s.along[axis] = 0;
    STD_TORCH_CHECK(s.along[axis] < kFarthest / 4, name,
                    " must be of neighbouring pixels less than 2^28 elements apart, got ",
                    s.along[axis]);
  }
  return s;
}

/// Whether an array has at most `most` pixels, of sides below 2^29.
template <int axes>
bool at_most(const Sides<axes>& sides, int64_t most) {
  int64_t pixels = 1;
  for (const int64_t side : sides.along) {
    if (__builtin_mul_overflow(pixels, side, &pixels)) return false;
  }
  return pixels <= most;
}

/// Calls `fn.operator()<axes>()` with the number of spatial axes of an image.
template <typename Fn>
auto dispatch_axes(const Tensor& image, Fn&& fn) {
  STD_TORCH_CHECK(image.dim() == 4 || image.dim() == 5, "elastic_deform takes an image ",
                  kImageShape<2>, " or ", kImageShape<3>, ", got ", image.dim(), " axes");
  return image.dim() == 4 ? fn.template operator()<2>() : fn.template operator()<3>();
}

/// The operator elastic_deform. `Device::deform` fills the images and labels of the result. Besides
/// the schema, this is the only list of its arguments.
template <typename Device>
std::tuple<Tensor, Tensor> forward(
    const Tensor& image, const std::optional<Tensor>& displacement,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& gray_curve,
    const std::vector<int64_t>& orders, int64_t grid, bool spans_input,
    const std::vector<double>& scales, int64_t boundary, double cval,
    const std::vector<int64_t>& output_shape, const std::vector<int64_t>& label_shape,
    const std::optional<Tensor>& source) {
  return dispatch_axes(image, [&]<int axes>() -> std::tuple<Tensor, Tensor> {
    const Settings settings(orders, grid, spans_input, scales, boundary, cval);
    const Operands<axes> in(image, displacement, affine, offset, gray_curve, settings, source);
    const Sides<axes> output = sides_of<axes>(output_shape);
    const Sides<axes> window = sides_of<axes>(label_shape);
    Tensor out = new_image(image, in.images, output);
    Tensor moved = new_labels(image, labels, in.images, output, window);
    // With channels, memory is the limit.
    STD_TORCH_CHECK(in.channels > 0 || at_most(output, int64_t{1} << 34),
                    "output_shape must have at most 2^34 pixels without channels");
    if (out.numel() > 0 || moved.numel() > 0) {
      Device::deform(image, labels, in, settings, window, out, moved);
    }
    return {out, moved};
  });
}

/// The operator elastic_deform_backward. `Device::gradients` fills the requested derivatives.
template <typename Device>
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& image, const std::optional<Tensor>& displacement,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& gray_curve, const std::vector<int64_t>& orders, int64_t grid,
    bool spans_input, const std::vector<double>& scales, int64_t boundary, double cval,
    bool of_image, bool of_displacement) {
  return dispatch_axes(image, [&]<int axes>() -> std::tuple<Tensor, Tensor> {
    const Settings settings(orders, grid, spans_input, scales, boundary, cval);
    const Operands<axes> in(image, displacement, affine, offset, gray_curve, settings);
    STD_TORCH_CHECK(grad.dim() == image.dim() && grad.size(0) == in.images &&
                        grad.size(1) == in.channels && in.channels >= 1,
                    "elastic_deform_backward: grad must be ", kImageShape<axes>,
                    " as the result, with C >= 1");
    check_operand("elastic_deform_backward: grad", grad, image, image.scalar_type(), grad.numel());
    STD_TORCH_CHECK(displacement || !of_displacement,
                    "elastic_deform_backward: there is no displacement to take derivatives in");
    Tensor by_image = of_image ? new_image(image, image.size(0), in.input)
                               : new_tensor(image, {0}, aoti_torch_dtype_float32());
    Tensor by_displacement =
        new_tensor(image, of_displacement ? sizes(*displacement) : std::vector<int64_t>{0},
                   aoti_torch_dtype_float64());
    if (grad.numel() == 0) {
      return {torch::stable::zero_(by_image), torch::stable::zero_(by_displacement)};
    }
    Device::gradients(grad, image, in, settings, of_image ? &by_image : nullptr,
                      of_displacement ? &by_displacement : nullptr);
    return {by_image, by_displacement};
  });
}

}  // namespace unet_fast::elastic_deform
