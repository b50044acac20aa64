#include <torch/csrc/stable/library.h>

// Every operator of the library. Implementations register beside their kernels,
// fake kernels and derivatives in unet_fast/ops/.
STABLE_TORCH_LIBRARY(unet_fast, m) {
  // reduction: 0 none, 1 sum, 2 mean, 3 weighted mean. Returns (loss, normaliser).
  m.def(
      "weighted_ce(Tensor logits, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "weighted_ce_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor normaliser, int reduction, int ignore_index) -> Tensor");
  // labels (N, D, H, W), int32 >= 0; size of a pixel along the axes. Returns the distances to the
  // nearest and the second nearest object; those above `reach` may be too large.
  m.def(
      "two_nearest(Tensor labels, float depth, float height, float width, float reach) -> "
      "(Tensor, Tensor)");
}
