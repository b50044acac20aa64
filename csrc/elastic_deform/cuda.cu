#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/stream.h"
#include "elastic_deform/backward.cuh"
#include "elastic_deform/operands.h"

namespace unet_fast::elastic_deform {
namespace {

using torch::stable::accelerator::DeviceGuard;

// The movement, and the memory it needs on the device.
template <int axes>
struct Prepared {
  Prepared(const Tensor& image, const Operands<axes>& in, const Settings& settings,
           const Sides<axes>& output)
      : memory(new_tensor(
            image, {in.images * kMotion + Movement<axes>::scratch(in.images, in.field, output)},
            aoti_torch_dtype_float64())) {
    double* const start = memory.mutable_data_ptr<double>();
    movement = {in.images,
                in.input,
                output,
                in.field,
                settings.boundary,
                settings.spans_input,
                in.values(in.displacement),
                in.values(in.affine),
                in.values(in.offset),
                in.source ? in.source->template const_data_ptr<int64_t>() : nullptr,
                in.sources,
                reinterpret_cast<Motion<axes>*>(start),
                nullptr,
                nullptr,
                nullptr};
    movement.set_scratch(start + in.images * kMotion);
  }

  static constexpr int64_t kMotion = sizeof(Motion<axes>) / sizeof(double);
  Tensor memory;
  Movement<axes> movement;
};

// The image, with its spline coefficients if a channel has order 3.
template <typename T, int axes>
struct Channels {
  using A = Accumulator<T>;

  // `reads`: whether the values of the image are needed.
  Channels(const Tensor& tensor, const Operands<axes>& in, const Settings& settings,
           bool reads = true)
      : image{{tensor.const_data_ptr<T>(), strides_to_read<axes>(tensor, "image")},
              {nullptr, coefficient_strides(in.input, in.channels)},
              in.channels,
              {},
              in.template curves<T>(),
              static_cast<A>(settings.cval)},
        memory(tensor) {
    STD_TORCH_CHECK(in.channels <= kMostChannels, "image must be of at most ", kMostChannels,
                    " channels on CUDA, got ", in.channels);
    for (int64_t c = 0; c < in.channels; ++c) image.orders.set(c, settings.orders[c]);
    if (!reads || !image.any_smooth()) return;
    const Strides<axes>& s = image.smooth.strides;
    memory = new_tensor(
        tensor, {in.sources * s.image},
        std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
    smooth = memory.template mutable_data_ptr<A>() + border_of(s);
    image.smooth.data = smooth;
  }

  Image<T, A, axes> image;
  Tensor memory;
  A* smooth = nullptr;
};

struct OnCuda {
  template <int axes>
  static void deform(const Tensor& image, const std::optional<Tensor>& labels,
                     const Operands<axes>& in, const Settings& settings, const Sides<axes>& window,
                     Tensor& out, Tensor& moved) {
    const DeviceGuard guard(image.get_device_index());
    const Prepared<axes> prepared(image, in, settings, sides_of<axes>(out));
    LabelWindow<axes> taken{};
    if (labels) {
      taken = {labels->data_ptr(), static_cast<int64_t>(labels->element_size()),
               strides_to_read<axes>(*labels, "labels"), window, moved.data_ptr()};
    }
    const cudaStream_t stream = current_stream(image);
    dispatch_image(image.scalar_type(), [&]<typename T>() {
      const Channels<T, axes> channels(image, in, settings);
      launch_prepare(prepared.movement, channels.image, channels.smooth, stream);
      launch_deform(prepared.movement, channels.image, strides_of<axes>(out),
                    out.mutable_data_ptr<T>(), taken, stream);
    });
  }

  template <int axes>
  static void gradients(const Tensor& grad, const Tensor& image, const Operands<axes>& in,
                        const Settings& settings, Tensor* by_image, Tensor* by_displacement) {
    const DeviceGuard guard(image.get_device_index());
    const Prepared<axes> prepared(image, in, settings, sides_of<axes>(grad));
    const Movement<axes>& m = prepared.movement;
    const cudaStream_t stream = current_stream(image);
    dispatch_floating(image.scalar_type(), "elastic_deform_backward", [&]<typename T>() {
      const Channels<T, axes> channels(image, in, settings, by_displacement || in.gray_curve);
      const Source<T, axes> upstream{grad.const_data_ptr<T>(), strides_of<axes>(grad)};
      launch_prepare(m, channels.image, channels.smooth, stream);
      if (by_image && by_image->numel() > 0) {
        const Tensor sums =
            new_tensor(image, {by_image->numel() + in.images}, aoti_torch_dtype_int64());
        launch_image_gradient(m, channels.image, upstream,
                              static_cast<unsigned long long*>(sums.data_ptr()),
                              strides_of<axes>(*by_image), by_image->mutable_data_ptr<T>(), stream);
      }
      if (by_displacement) {
        const Tensor scratch =
            new_tensor(image, {displacement_scratch(m)}, aoti_torch_dtype_float64());
        launch_displacement_gradient(m, channels.image, upstream,
                                     scratch.mutable_data_ptr<double>(),
                                     by_displacement->mutable_data_ptr<double>(), stream);
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CUDA, m) {
  m.impl("elastic_deform", TORCH_BOX(&forward<OnCuda>));
  m.impl("elastic_deform_backward", TORCH_BOX(&backward<OnCuda>));
}

}  // namespace unet_fast::elastic_deform
