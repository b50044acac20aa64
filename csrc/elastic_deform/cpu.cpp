#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "elastic_deform/backward.h"
#include "elastic_deform/deformation.h"
#include "elastic_deform/operands.h"

namespace unet_fast::elastic_deform {
namespace {

template <typename T, typename Id, int axes>
void deform(const Tensor& image, const std::optional<Tensor>& labels, const Operands<axes>& in,
            const Settings& settings, const Sides<axes>& window, Tensor& out, Tensor& labels_out) {
  using A = Accumulator<T>;
  const Deformation<T, axes> deformation(in, settings, sides_of<axes>(out));
  const Coefficients<A, axes> smooth = coefficients<T, axes>(image, in, settings);
  const auto from = strides_to_read<axes>(image, "image"), to = strides_of<axes>(out);
  const T* const data = image.const_data_ptr<T>();
  T* const result = out.mutable_data_ptr<T>();
  const auto ids = labels ? strides_to_read<axes>(*labels, "labels") : Strides<axes>{};
  const int64_t* const source = in.source ? in.source->template const_data_ptr<int64_t>() : nullptr;
  const int64_t step = to.along[axes - 1];
  deformation.run([&](int64_t n, std::span<const Piece>, Block<A, axes>& block) {
    deformation.find(block);
    const int64_t s = source != nullptr ? source[n] : n;
    const auto label_plane = Plane<Id, axes>::of(
        labels ? static_cast<const Id*>(labels->data_ptr()) + s * ids.image : nullptr, ids,
        in.input);
    if (labels) prefetch(label_plane, block);
    for (int64_t c = 0; c < in.channels; ++c) {
      T* const destination = result + n * to.image + c * to.channel + to.offset(block.place);
      A* value = block.value;
      if constexpr (std::is_same_v<T, A>) {
        if (step == 1) value = destination;
      }
      deformation.values(data + s * from.image + c * from.channel, from, smooth,
                         s * in.channels + c, settings.orders[c], block, value);
      if (in.gray_curve) apply(in.template curves<T>().at(n, c), block.size, value);
      if constexpr (std::is_same_v<T, A>) {
        if (value == destination) continue;
      }
      store(value, block.size, destination, step);
    }
    if (labels) {
      Id* const moved = static_cast<Id*>(labels_out.data_ptr()) + n * window.pixels();
      take_labels(label_plane, block, deformation.output, window, moved);
    }
  });
}

struct OnCpu {
  template <int axes>
  static void deform(const Tensor& image, const std::optional<Tensor>& labels,
                     const Operands<axes>& in, const Settings& settings, const Sides<axes>& window,
                     Tensor& out, Tensor& moved) {
    for (int64_t n = 0; in.source && n < in.images; ++n) {
      const int64_t s = in.source->template const_data_ptr<int64_t>()[n];
      STD_TORCH_CHECK(s >= 0 && s < in.sources, "source must be of images from 0 to ",
                      in.sources - 1, ", got ", s);
    }
    dispatch_image(image.scalar_type(), [&]<typename T>() {
      const auto run = [&]<typename Id>() {
        elastic_deform::deform<T, Id>(image, labels, in, settings, window, out, moved);
      };
      labels ? dispatch_width(*labels, run) : run.template operator()<int8_t>();
    });
  }

  template <int axes>
  static void gradients(const Tensor& grad, const Tensor& image, const Operands<axes>& in,
                        const Settings& settings, Tensor* by_image, Tensor* by_displacement) {
    dispatch_floating(image.scalar_type(), "elastic_deform_backward", [&]<typename T>() {
      const Deformation<T, axes> deformation(in, settings, sides_of<axes>(grad));
      const Upstream<T, axes> upstream(deformation, image, grad, by_displacement || in.gray_curve);
      if (by_image) image_gradient(upstream, *by_image);
      if (by_displacement) displacement_gradient(upstream, *by_displacement);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) {
  m.impl("elastic_deform", TORCH_BOX(&forward<OnCpu>));
  m.impl("elastic_deform_backward", TORCH_BOX(&backward<OnCpu>));
}

}  // namespace unet_fast::elastic_deform
