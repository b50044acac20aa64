#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "border_weight_map/kernels.cuh"
#include "border_weight_map/operands.h"
#include "common/dispatch.h"
#include "common/stream.h"

namespace unet_fast::border_weight_map {
namespace {

using torch::stable::accelerator::DeviceGuard;

Labels labels_of(const Shape& shape, const Tensor& labels, const std::optional<Tensor>& classes,
                 std::optional<int64_t> ignore_label) {
  IntegerType type = IntegerType::kInt64;
  dispatch_labels(labels.scalar_type(), "labels", [&]<typename Id>() { type = kIntegerType<Id>; });
  return {shape.images,
          shape.depth,
          shape.height,
          shape.width,
          labels.data_ptr(),
          type,
          classes ? classes->const_data_ptr<uint8_t>() : nullptr,
          ignore_label.has_value(),
          ignore_label.value_or(0)};
}

// Scratch memory for n values, on the device of a tensor.
template <typename T>
struct Array {
  Array(const Tensor& like, int64_t n)
      : memory(new_tensor(like, {n, static_cast<int64_t>(sizeof(T))}, aoti_torch_dtype_uint8())),
        data(static_cast<T*>(memory.data_ptr())) {}

  Tensor memory;
  T* data;
};

// The nearest objects of all pixels; volumes need room for two per pixel.
template <typename D>
struct Scratch {
  Scratch(const Tensor& like, const Shape& shape)
      : nearest(like, shape.pixels()), spare(like, shape.depth > 1 ? shape.pixels() : 0) {}

  Array<Nearest<D>> nearest, spare;
};

template <typename D>
void distances(const Labels& labels, const Tensor& like, const Shape& shape, const Spacing& spacing,
               const Distances& sink) {
  const Scratch<D> scratch(like, shape);
  const double sizes[3] = {spacing.z, spacing.y, spacing.x};
  launch_transform<D>(labels, 0, sizes, Reaches<D>::unlimited(), scratch.nearest.data,
                      scratch.spare.data, sink, current_stream(like));
}

std::tuple<Tensor, Tensor> two_nearest(const Tensor& labels_in,
                                       const std::vector<double>& spacing_in) {
  const DeviceGuard guard(labels_in.get_device_index());
  const Tensor input = as_contiguous(labels_in);
  const Shape shape(input);
  const Spacing spacing(spacing_in);
  Tensor first = new_tensor(input, sizes(input), aoti_torch_dtype_float32());
  Tensor second = new_tensor(input, sizes(input), aoti_torch_dtype_float32());
  if (shape.pixels() == 0) return {first, second};
  const Labels labels = labels_of(shape, input, std::nullopt, std::nullopt);
  const Distances sink{first.mutable_data_ptr<float>(), second.mutable_data_ptr<float>()};
  if (fits_int32(shape, spacing)) {
    distances<int32_t>(labels, input, shape, spacing, sink);
  } else {
    distances<double>(labels, input, shape, spacing, sink);
  }
  return {first, second};
}

Tensor separate_touching(const Tensor& labels_in, int64_t ridge) {
  const DeviceGuard guard(labels_in.get_device_index());
  const Tensor input = as_contiguous(labels_in);
  const Shape shape(input);
  check_ridge(ridge);
  Tensor result = new_like(input);
  if (shape.pixels() == 0) return result;
  const Labels labels = labels_of(shape, input, std::nullopt, std::nullopt);
  const cudaStream_t stream = current_stream(input);
  dispatch_labels(input.scalar_type(), "separate_touching", [&]<typename Id>() {
    launch(&separate<Id>, blocks_of(shape.pixels()), kThreads, stream, labels, ridge,
           static_cast<Id*>(result.data_ptr()));
  });
  return result;
}

std::tuple<Tensor, Tensor> border_weights(
    const Tensor& labels_in, const std::optional<Tensor>& classes_in,
    const std::optional<Tensor>& foreground_in, const std::optional<Tensor>& class_weight_in,
    int64_t classes, int64_t ridge, std::optional<int64_t> ignore_label, double w0, double sigma,
    bool everywhere, double halo, double halo_sigma, const std::vector<double>& spacing_in) {
  const DeviceGuard guard(labels_in.get_device_index());
  const Operands in(labels_in, classes_in, foreground_in, class_weight_in);
  const Shape shape(in.labels);
  const Spacing spacing(spacing_in);
  const Settings settings{classes,    ridge, ignore_label, w0,     sigma,
                          everywhere, halo,  halo_sigma,   spacing};
  settings.check(shape, in);
  Tensor target = new_tensor(in.labels, sizes(in.labels), aoti_torch_dtype_uint8());
  Tensor weights = new_tensor(in.labels, sizes(in.labels), aoti_torch_dtype_float32());
  if (shape.pixels() == 0) return {target, weights};
  const bool given_on_host = in.class_weight && in.class_weight->device().is_cpu();
  MapSettings map{static_cast<int32_t>(classes),     ridge, settings.terms(), everywhere,
                  {spacing.z, spacing.y, spacing.x}, {},    nullptr,          !in.class_weight};
  if (given_on_host) {
    const float* const values = in.class_weight->const_data_ptr<float>();
    for (int64_t c = 0; c < classes; ++c) map.class_weights.at[c] = values[c];
  } else if (in.class_weight) {
    map.given = in.class_weight->const_data_ptr<float>();
  }
  const Labels labels = labels_of(shape, in.labels, in.classes, ignore_label);
  const bool* const foreground = in.foreground ? in.foreground->const_data_ptr<bool>() : nullptr;
  uint8_t* const to_target = target.mutable_data_ptr<uint8_t>();
  float* const to_weights = weights.mutable_data_ptr<float>();
  const cudaStream_t stream = current_stream(in.labels);
  if (packs(labels, map)) {
    const Array<Notes> notes(in.labels, shape.images);
    const Array<Keys<uint32_t>> nearest(in.labels, shape.pixels());
    launch_packed(labels, foreground, map, notes.data, nearest.data, to_target, to_weights, stream);
    return {target, weights};
  }
  const Array<unsigned long long> counts(in.labels, map.balanced ? shape.images * classes : 0);
  const Array<float> of_classes(in.labels, shape.images * classes);
  const auto run = [&]<typename D>() {
    const Scratch<D> scratch(in.labels, shape);
    launch_map<D>(labels, foreground, map, counts.data, of_classes.data, scratch.nearest.data,
                  scratch.spare.data, to_target, to_weights, stream);
  };
  if (fits_int32(shape, spacing)) {
    run.template operator()<int32_t>();
  } else {
    run.template operator()<float>();
  }
  return {target, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CUDA, m) {
  m.impl("two_nearest", TORCH_BOX(&two_nearest));
  m.impl("separate_touching", TORCH_BOX(&separate_touching));
  m.impl("border_weights", TORCH_BOX(&border_weights));
}

}  // namespace unet_fast::border_weight_map
