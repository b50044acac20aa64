#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "common/layout.h"
#include "common/tensors.h"
#include "common/types.h"
#include "weighted_ce/numerics.h"

// The tensors of both operators as pointers and strides, shared by the CPU and CUDA
// implementations.
namespace unet_fast::weighted_ce {

using torch::headeronly::ScalarType;

/// The layout of `x`, or nullopt if its spatial axes cannot be seen as one evenly spaced axis.
inline std::optional<Layout> layout_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "weighted_ce: logits must be (N, C, ...), got ", x.dim(), " axes");
  if (x.numel() == 0) return Layout{x.size(0), x.size(1), 0, 0, 0, 1};
  Layout layout{x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 1};
  for (int64_t axis = x.dim() - 1; axis >= 2; --axis) {
    if (x.size(axis) == 1) continue;
    if (layout.pixels == 1) {
      layout.pixel_stride = x.stride(axis);
    } else if (x.stride(axis) != layout.pixel_stride * layout.pixels) {
      return std::nullopt;
    }
    layout.pixels *= x.size(axis);
  }
  return layout;
}

/// The dtype of losses and weights in the kernels: float64 for float64 logits, else float32.
inline ScalarType accumulator(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Operands {
  Operands(const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& weight_in,
           int64_t reduction)
      : logits(layout_of(logits_in) ? logits_in : as_contiguous(logits_in)),
        target(as_contiguous(target_in)),
        layout(layout_of(logits).value()) {
    const int64_t n = layout.images * layout.pixels;
    check_operand("weighted_ce: target", target, logits, target.scalar_type(), n);
    STD_TORCH_CHECK(reduction >= kNone && reduction <= kWeightedMean,
                    "weighted_ce: reduction must be in [0, 3], got ", reduction);
    if (!weight_in.has_value()) return;
    weight = as_contiguous(*weight_in);
    check_operand("weighted_ce: weight", *weight, logits, accumulator(logits), n);
  }

  // Raises unless there is an upstream gradient for each loss, and the divisor of them.
  void check_upstream(const Tensor& grad, const Tensor& divisor, int64_t reduction) const {
    const int64_t n = reduction == kNone ? target.numel() : 1;
    check_operand("weighted_ce: grad", grad, logits, accumulator(logits), n);
    check_operand("weighted_ce: normaliser", divisor, logits, ScalarType::Double, 1);
  }

  template <typename A>
  const A* weight_data() const {
    return weight.has_value() ? weight->const_data_ptr<A>() : nullptr;
  }

  Tensor logits, target;
  std::optional<Tensor> weight;
  Layout layout;
};

/// Where gradients are written: `gradient` itself or, if its strides are irregular, a contiguous
/// tensor that `finish` copies into it.
struct Output {
  explicit Output(const Tensor& gradient)
      : tensor(layout_of(gradient) ? gradient
                                   : torch::stable::new_empty(gradient, sizes(gradient))),
        layout(layout_of(tensor).value()) {}

  void finish(Tensor& gradient) const {
    if (tensor.data_ptr() != gradient.data_ptr()) torch::stable::copy_(gradient, tensor);
  }

  Tensor tensor;
  Layout layout;
};

inline Tensor new_loss(const Tensor& logits, const Tensor& target, int64_t reduction) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  return new_tensor(logits, reduction == kNone ? sizes(target) : std::vector<int64_t>{},
                    wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

/// Makes the tensor for the divisor of the loss; float64, so that a count of pixels is exact.
inline Tensor new_normaliser(const Tensor& logits) {
  return new_tensor(logits, {}, aoti_torch_dtype_float64());
}

}  // namespace unet_fast::weighted_ce
