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

/// Height and width of a tensor, or of a shape.
inline Sides sides_of(const Tensor& x) { return {x.size(x.dim() - 2), x.size(x.dim() - 1)}; }
inline Sides sides_of(const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(shape.size() == 2, "elastic_deform takes two spatial axes");
  for (const int64_t side : shape) {
    STD_TORCH_CHECK(side >= 0 && side < kFarthest / 2, "output_shape must be below 2^29, got ",
                    side);
  }
  return {shape[0], shape[1]};
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
struct Operands {
  Operands(const Tensor& image, const std::optional<Tensor>& displacement,
           const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
           const std::optional<Tensor>& gray_curve, const Settings& settings,
           const std::optional<Tensor>& source = std::nullopt)
      : images(source ? source->size(0) : image.size(0)),
        sources(image.size(0)),
        channels(image.size(1)),
        input(sides_of(image)),
        displacement(parameter(displacement, 4)),
        affine(parameter(affine, 3)),
        offset(parameter(offset, 2)),
        gray_curve(gray_curve),
        source(source) {
    STD_TORCH_CHECK(!source || (source->dim() == 1 && source->is_contiguous() &&
                                source->scalar_type() == ScalarType::Long),
                    "elastic_deform takes a contiguous source (N,) in int64");
    STD_TORCH_CHECK(image.dim() == 4 && settings.scales.size() == 2 &&
                        static_cast<int64_t>(settings.orders.size()) == channels,
                    "elastic_deform takes an image (N, C, H, W), two scales, C orders");
    STD_TORCH_CHECK(settings.grid >= kInterpolating && settings.grid <= kKeys &&
                        settings.boundary >= kMirror && settings.boundary <= kWrap,
                    "elastic_deform takes grids 0 to 2 and boundaries 0 to 3");
    STD_TORCH_CHECK(!affine || affine->size(2) == 3, "affine must be (N, 2, 3)");
    for (const auto& x : {displacement, affine, offset, gray_curve, source}) {
      STD_TORCH_CHECK(!x || x->device() == image.device(),
                      "elastic_deform takes tensors on one device");
    }
    for (const int64_t side : {input.rows, input.columns}) {
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
    points = this->displacement ? Sides{this->displacement->size(2), this->displacement->size(3)}
                                : Sides{1, 1};
    STD_TORCH_CHECK(!displacement || settings.grid != kApproximating ||
                        (points.rows >= 4 && points.columns >= 4),
                    "displacement must have at least 4 points along each axis");
    for (const int64_t order : settings.orders) {
      STD_TORCH_CHECK(order == 0 || order == 1 || order == 3, "order must be 0, 1 or 3, got ",
                      order);
    }
    if (!displacement) return;
    rows = GridAxis::of(settings.grid, points.rows, settings.scales[0]);
    columns = GridAxis::of(settings.grid, points.columns, settings.scales[1]);
  }

  Values values(const std::optional<Tensor>& x) const {
    return {x ? x->data_ptr() : nullptr, x && x->scalar_type() == ScalarType::Float};
  }
  template <typename T>
  Curves<Accumulator<T>> curves() const {
    using A = Accumulator<T>;
    const auto unit = static_cast<A>(kUnit<T>);
    if (!gray_curve) return {nullptr, 0, 0, unit};
    return {gray_curve->const_data_ptr<A>(), gray_curve->size(1), gray_curve->size(2), unit};
  }
  /// Number of coefficients of one component of the field of an image.
  int64_t coefficients() const { return rows.size() * columns.size(); }

  int64_t images;   // output images
  int64_t sources;  // input images
  int64_t channels;
  Sides input, points;
  GridAxis rows = GridAxis::none(), columns = GridAxis::none();
  std::optional<Tensor> displacement, affine, offset, gray_curve, source;

 private:
  std::optional<Tensor> parameter(const std::optional<Tensor>& x, int64_t axes) const {
    if (!x) return std::nullopt;
    STD_TORCH_CHECK(
        x->dim() == axes && x->size(0) == images && x->size(1) == 2 &&
            (x->scalar_type() == ScalarType::Float || x->scalar_type() == ScalarType::Double),
        "elastic_deform takes parameters in float32 or float64, two rows an image");
    return as_contiguous(*x);
  }
};

/// Whether the channels of a pixel lie side by side.
inline bool channels_last(const Tensor& image) {
  return image.size(1) > 1 && image.stride(1) == 1 && image.stride(3) == image.size(1);
}

/// Makes `n` images of another spatial shape, with the dtype and memory format of `image`.
inline Tensor new_image(const Tensor& image, int64_t n, Sides sides) {
  const int64_t c = image.size(1);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(image.get(), &dtype));
  const std::vector<int64_t> shape{n, c, sides.rows, sides.columns};
  if (!channels_last(image)) return new_tensor(image, shape, dtype);
  return new_empty_strided(image, shape, {c * sides.rows * sides.columns, 1, c * sides.columns, c},
                           dtype);
}

/// Makes the labels of a window for `n` images; empty without labels.
inline Tensor new_labels(const Tensor& image, const std::optional<Tensor>& labels, int64_t n,
                         Sides output, Sides window) {
  STD_TORCH_CHECK(window.rows <= output.rows && window.columns <= output.columns,
                  "label_shape must fit into output_shape");
  if (!labels) return new_tensor(image, {0}, aoti_torch_dtype_uint8());
  STD_TORCH_CHECK(labels->dim() == 3 && labels->size(0) == image.size(0) &&
                      labels->size(1) == image.size(2) && labels->size(2) == image.size(3) &&
                      labels->device() == image.device(),
                  "elastic_deform takes labels (N, H, W) on the device of the image");
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(labels->get(), &dtype));
  return new_tensor(*labels, {n, window.rows, window.columns}, dtype);
}

/// Makes tensors for the derivatives with respect to image and displacement; empty if not
/// requested.
inline std::tuple<Tensor, Tensor> new_gradients(const Tensor& image,
                                                const std::optional<Tensor>& displacement,
                                                bool of_image, bool of_displacement) {
  return {of_image ? new_image(image, image.size(0), sides_of(image))
                   : new_tensor(image, {0}, aoti_torch_dtype_float32()),
          new_tensor(image, of_displacement ? sizes(*displacement) : std::vector<int64_t>{0},
                     aoti_torch_dtype_float64())};
}

/// Strides of an image or of labels.
inline Strides strides_of(const Tensor& x) {
  return x.dim() == 3 ? Strides{x.stride(0), 0, x.stride(1), x.stride(2)}
                      : Strides{x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

/// The strides of a tensor to read, 0 along an axis of one pixel. Neighbouring pixels must be so
/// close that offsets within one interpolation fit 32 bits.
inline Strides strides_to_read(const Tensor& x, const char* name) {
  Strides s = strides_of(x);
  const Sides sides = sides_of(x);
  if (sides.rows == 1) s.row = 0;
  if (sides.columns == 1) s.column = 0;
  for (const int64_t stride : {s.row, s.column}) {
    STD_TORCH_CHECK(stride < kFarthest / 4, name,
                    " must be of neighbouring pixels less than 2^28 elements apart, got ", stride);
  }
  return s;
}

/// The operator elastic_deform; `run` fills the images and labels of the result on a device.
/// Besides the schema, this is the only list of its arguments.
template <auto run>
std::tuple<Tensor, Tensor> forward(
    const Tensor& image, const std::optional<Tensor>& displacement,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& gray_curve,
    const std::vector<int64_t>& orders, int64_t grid, bool spans_input,
    const std::vector<double>& scales, int64_t boundary, double cval,
    const std::vector<int64_t>& output_shape, const std::vector<int64_t>& label_shape,
    const std::optional<Tensor>& source) {
  const Settings settings(orders, grid, spans_input, scales, boundary, cval);
  const Operands in(image, displacement, affine, offset, gray_curve, settings, source);
  const Sides output = sides_of(output_shape), window = sides_of(label_shape);
  Tensor out = new_image(image, in.images, output);
  Tensor moved = new_labels(image, labels, in.images, output, window);
  if (out.numel() > 0 || moved.numel() > 0) {
    run(image, labels, in, settings, window, out, moved);
  }
  return {out, moved};
}

/// The operator elastic_deform_backward; `run` fills the requested derivatives on a device.
template <auto run>
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& image, const std::optional<Tensor>& displacement,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& gray_curve, const std::vector<int64_t>& orders, int64_t grid,
    bool spans_input, const std::vector<double>& scales, int64_t boundary, double cval,
    bool of_image, bool of_displacement) {
  const Settings settings(orders, grid, spans_input, scales, boundary, cval);
  const Operands in(image, displacement, affine, offset, gray_curve, settings);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == in.images && grad.size(1) == in.channels &&
                      in.channels >= 1,
                  "elastic_deform_backward: grad must be (N, C, H, W) as the result, with C >= 1");
  check_operand("elastic_deform_backward: grad", grad, image, image.scalar_type(), grad.numel());
  STD_TORCH_CHECK(displacement || !of_displacement,
                  "elastic_deform_backward: there is no displacement to take derivatives in");
  auto results = new_gradients(image, displacement, of_image, of_displacement);
  auto& [by_image, by_displacement] = results;
  if (grad.numel() == 0) {
    return {torch::stable::zero_(by_image), torch::stable::zero_(by_displacement)};
  }
  run(grad, image, in, settings, of_image ? &by_image : nullptr,
      of_displacement ? &by_displacement : nullptr);
  return results;
}

}  // namespace unet_fast::elastic_deform
