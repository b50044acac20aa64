#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "border_weight_map/numerics.h"
#include "common/tensors.h"

// Checked arguments of the operators, shared by the CPU and CUDA implementations.
namespace unet_fast::border_weight_map {

using torch::headeronly::ScalarType;

/// A batch of volumes, (N, D, H, W); images have D = 1.
struct Shape {
  int64_t images, depth, height, width;

  explicit Shape(const Tensor& labels) : images(0), depth(0), height(0), width(0) {
    STD_TORCH_CHECK(labels.dim() == 4, "the operators take labels (N, D, H, W)");
    images = labels.size(0);
    depth = labels.size(1);
    height = labels.size(2);
    width = labels.size(3);
    for (const int64_t side : {depth, height, width}) {
      STD_TORCH_CHECK(side < kNever, "labels must be shorter than 2^30 along each axis, got ",
                      side);
    }
  }
  int64_t volume() const { return depth * height * width; }
  int64_t pixels() const { return images * volume(); }
};

/// Size of a pixel along depth, height and width.
struct Spacing {
  double z, y, x;

  explicit Spacing(const std::vector<double>& sizes) : z(0), y(0), x(0) {
    STD_TORCH_CHECK(sizes.size() == 3, "spacing must be three sizes");
    for (const double size : sizes) {
      STD_TORCH_CHECK(size > 0 && std::isfinite(size), "spacing must be > 0 and finite, got ",
                      size);
    }
    z = sizes[0];
    y = sizes[1];
    x = sizes[2];
  }
  bool unit() const { return z == 1 && y == 1 && x == 1; }
};

/// An upper bound of all squared distances.
inline double longest_square(const Shape& shape, const Spacing& spacing) {
  const auto square = [](int64_t side, double size) { return side * size * (side * size); };
  return square(shape.depth, spacing.z) + square(shape.height, spacing.y) +
         square(shape.width, spacing.x);
}

/// Whether all squared distances are integers that fit int32_t and can be added without overflow.
inline bool fits_int32(const Shape& shape, const Spacing& spacing) {
  return spacing.unit() && longest_square(shape, spacing) < kFar<int32_t> / 2;
}

inline void check_ridge(int64_t ridge) {
  STD_TORCH_CHECK(ridge >= kNone && ridge <= kTwoSided, "ridge must be 0, 1 or 2, got ", ridge);
}

/// The tensors of a weight map, made contiguous.
struct Operands {
  Operands(const Tensor& labels, const std::optional<Tensor>& classes,
           const std::optional<Tensor>& foreground, const std::optional<Tensor>& class_weight)
      : labels(as_contiguous(labels)),
        classes(contiguous(classes)),
        foreground(contiguous(foreground)),
        class_weight(contiguous(class_weight)) {}

  static std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
    return x ? std::optional(as_contiguous(*x)) : std::nullopt;
  }

  Tensor labels;
  std::optional<Tensor> classes, foreground, class_weight;
};

/// Settings of the weight map.
struct Settings {
  int64_t classes, ridge;
  std::optional<int64_t> ignore_label;
  double w0, sigma;
  bool everywhere;
  double halo, halo_sigma;
  Spacing spacing;

  Terms terms() const { return {Term::of(w0, sigma), Term::of(halo, halo_sigma)}; }
  /// Raises if a setting is out of range or the tensors do not match.
  void check(const Shape& shape, const Operands& in) const {
    check_ridge(ridge);
    STD_TORCH_CHECK(sigma > 0 && halo_sigma > 0 && w0 >= 0 && halo >= 0,
                    "sigma must be > 0, w0 and halo >= 0");
    STD_TORCH_CHECK(classes >= 2 && classes <= kMaxClasses, "num_classes must be in [2, ",
                    kMaxClasses, "], got ", classes);
    STD_TORCH_CHECK(in.classes || classes == 2, "more than one class of objects needs `classes`");
    const int64_t n = shape.pixels();
    if (in.classes) check_operand("classes", *in.classes, in.labels, ScalarType::Byte, n);
    if (in.foreground) check_operand("foreground", *in.foreground, in.labels, ScalarType::Bool, n);
    if (in.class_weight) {  // on the host or on the device of the labels
      const bool on_host = in.class_weight->device().is_cpu();
      check_operand("class_weight", *in.class_weight, on_host ? *in.class_weight : in.labels,
                    ScalarType::Float, classes);
    }
  }
};

}  // namespace unet_fast::border_weight_map
