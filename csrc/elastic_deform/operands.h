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

// The arguments of the operators, checked; shared by the CPU and the CUDA half.
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
  return {shape[0], shape[1]};
}

/// The settings of a call, as the schema has them.
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

/// The tensors that say how to move, contiguous and checked.
struct Operands {
  Operands(const Tensor& image, const std::optional<Tensor>& displacement,
           const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
           const std::optional<Tensor>& gray_curve, const Settings& settings)
      : images(image.size(0)),
        channels(image.size(1)),
        input(sides_of(image)),
        displacement(parameter(displacement, 4)),
        affine(parameter(affine, 3)),
        offset(parameter(offset, 2)),
        gray_curve(gray_curve) {
    STD_TORCH_CHECK(image.dim() == 4 && settings.scales.size() == 2 &&
                        static_cast<int64_t>(settings.orders.size()) == channels,
                    "elastic_deform takes an image (N, C, H, W), two scales, C orders");
    for (const int64_t side : {input.rows, input.columns}) {
      STD_TORCH_CHECK(side >= 1 && side < kFarthest / 2,
                      "image must have sides from 1 to 2^29 pixels, got ", side);
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
    points = this->displacement ? Sides{this->displacement->size(2), this->displacement->size(3)}
                                : Sides{1, 1};
    rows = axis(settings.grid, points.rows, settings.scales[0]);
    columns = axis(settings.grid, points.columns, settings.scales[1]);
  }

  Values values(const std::optional<Tensor>& x) const {
    return {x ? x->data_ptr() : nullptr, x && x->scalar_type() == ScalarType::Float};
  }
  /// Coefficients of one component of the field of one image.
  int64_t coefficients() const { return rows.size() * columns.size(); }

  int64_t images, channels;
  Sides input, points;
  GridAxis rows, columns;
  std::optional<Tensor> displacement, affine, offset, gray_curve;

 private:
  std::optional<Tensor> parameter(const std::optional<Tensor>& x, int64_t axes) const {
    if (!x) return std::nullopt;
    STD_TORCH_CHECK(
        x->dim() == axes && x->size(0) == images && x->size(1) == 2 &&
            (x->scalar_type() == ScalarType::Float || x->scalar_type() == ScalarType::Double),
        "elastic_deform takes parameters in float32 or float64, two rows an image");
    return as_contiguous(*x);
  }
  GridAxis axis(int32_t grid, int64_t size, double scale) const {
    if (!displacement) return {1, 0.0};
    return {grid == kApproximating ? size - 3 : size > 1 ? size - 1 : 1, scale};
  }
};

/// Whether the channels of a pixel lie side by side.
inline bool channels_last(const Tensor& image) {
  return image.size(1) > 1 && image.stride(1) == 1 && image.stride(3) == image.size(1);
}

/// An image with the dtype and the order of memory of `image`, of another spatial shape.
inline Tensor new_image(const Tensor& image, Sides sides) {
  const int64_t n = image.size(0), c = image.size(1);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(image.get(), &dtype));
  const std::vector<int64_t> shape{n, c, sides.rows, sides.columns};
  if (!channels_last(image)) return new_tensor(image, shape, dtype);
  return new_empty_strided(image, shape, {c * sides.rows * sides.columns, 1, c * sides.columns, c},
                           dtype);
}

/// For the labels of a window; empty without labels.
inline Tensor new_labels(const Tensor& image, const std::optional<Tensor>& labels, Sides window) {
  if (!labels) return new_tensor(image, {0}, aoti_torch_dtype_uint8());
  STD_TORCH_CHECK(labels->dim() == 3 && labels->size(0) == image.size(0) &&
                      labels->size(1) == image.size(2) && labels->size(2) == image.size(3),
                  "elastic_deform takes labels (N, H, W)");
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(labels->get(), &dtype));
  return new_tensor(*labels, {image.size(0), window.rows, window.columns}, dtype);
}

/// For the derivatives in image and displacement; empty where not asked for.
inline std::tuple<Tensor, Tensor> new_gradients(const Tensor& image,
                                                const std::optional<Tensor>& displacement,
                                                bool of_image, bool of_displacement) {
  return {of_image ? new_image(image, sides_of(image))
                   : new_tensor(image, {0}, aoti_torch_dtype_float32()),
          new_tensor(image, of_displacement ? sizes(*displacement) : std::vector<int64_t>{0},
                     aoti_torch_dtype_float64())};
}

/// Strides of an image or of labels.
inline Strides strides_of(const Tensor& x) {
  const Strides s = x.dim() == 3 ? Strides{x.stride(0), 0, x.stride(1), x.stride(2)}
                                 : Strides{x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  STD_TORCH_CHECK(s.row < kFarthest / 4 && s.column < kFarthest / 4,
                  "image and labels must have rows of less than 2^28 elements, got ", s.row);
  return s;
}

}  // namespace unet_fast::elastic_deform
