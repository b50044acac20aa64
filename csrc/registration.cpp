#include <torch/csrc/stable/library.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/// The best of the levels in CMakeLists.txt that this processor has: 0 baseline, 1 AVX2, 2 AVX-512.
extern "C" EXPORT int unet_fast_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

// Schemas of all operators of the library. Implementations are registered beside their kernels,
// fake kernels and derivatives in unet_fast/ops/.
STABLE_TORCH_LIBRARY(unet_fast, m) {
  // reduction: 0 none, 1 sum, 2 mean, 3 weighted mean. Returns (loss, normaliser).
  m.def(
      "weighted_ce(Tensor logits, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "weighted_ce_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor normaliser, int reduction, int ignore_index) -> Tensor");
  // In the next three operators, labels are integers, (N, D, H, W), 0 background; ridge: 0 none, 1
  // one-sided, 2 two-sided; spacing: size of a pixel along depth, height and width.
  m.def("two_nearest(Tensor labels, float[] spacing) -> (Tensor, Tensor)");
  m.def("separate_touching(Tensor labels, int ridge) -> Tensor");
  // classes: uint8, the class of each pixel, or None for background and objects; foreground: bool,
  // overrides which pixels are objects; class_weight: float32, one for each class, or None for
  // balanced. Returns (target, weights).
  m.def(
      "border_weights(Tensor labels, Tensor? classes, Tensor? foreground, Tensor? class_weight, "
      "int num_classes, int ridge, int? ignore_label, float w0, float sigma, bool everywhere, "
      "float halo, float halo_sigma, float[] spacing) -> (Tensor, Tensor)");
  // image (N, C, H, W), or (N, C, D, H, W) with one more axis, component and row in what follows;
  // displacement (N, 2, P, Q), affine (N, 2, 3), offset (N, 2): float32 or float64; gray_curve:
  // float64 for float64 images, else float32; orders: one for each channel; grid and boundary:
  // values of the enums in elastic_deform/numerics.h; scales: grid cells per pixel along each axis;
  // source (N,): int64, the image that each sample reads, or None for its own. Returns (image,
  // labels).
  m.def(
      "elastic_deform(Tensor image, Tensor? displacement, Tensor? affine, Tensor? offset, "
      "Tensor? labels, Tensor? gray_curve, int[] orders, int grid, bool spans_input, "
      "float[] scales, int boundary, float cval, int[] output_shape, int[] label_shape, "
      "Tensor? source) -> (Tensor, Tensor)");
  // Returns the derivatives with respect to image and displacement (float64); empty if not
  // requested.
  m.def(
      "elastic_deform_backward(Tensor grad, Tensor image, Tensor? displacement, Tensor? affine, "
      "Tensor? offset, Tensor? gray_curve, int[] orders, int grid, bool spans_input, "
      "float[] scales, int boundary, float cval, bool of_image, bool of_displacement) "
      "-> (Tensor, Tensor)");
}
