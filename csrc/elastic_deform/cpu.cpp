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

template <typename T, typename Id>
void deform(const Tensor& image, const std::optional<Tensor>& labels, const Operands& in,
            const Settings& settings, Sides window, Tensor& out, Tensor& labels_out) {
  using A = Accumulator<T>;
  const Deformation<T> deformation(in, settings, sides_of(out));
  const Coefficients<A> smooth = coefficients<T>(image, in, settings);
  const Strides from = strides_to_read(image, "image"), to = strides_of(out);
  const T* const data = image.const_data_ptr<T>();
  T* const result = out.mutable_data_ptr<T>();
  const Strides ids = labels ? strides_to_read(*labels, "labels") : Strides{};
  const int64_t* const source = in.source ? in.source->const_data_ptr<int64_t>() : nullptr;
  deformation.run([&](int64_t n, std::span<const Piece>, Block<A>& block) {
    deformation.find(block);
    const int64_t s = source != nullptr ? source[n] : n;
    const auto label_plane =
        Plane<Id>::of(labels ? static_cast<const Id*>(labels->data_ptr()) + s * ids.image : nullptr,
                      ids.row, ids.column, in.input);
    if (labels) prefetch(label_plane, block);
    for (int64_t c = 0; c < in.channels; ++c) {
      T* const destination =
          result + n * to.image + c * to.channel + block.row * to.row + block.begin * to.column;
      A* value = block.value;
      if constexpr (std::is_same_v<T, A>) {
        if (to.column == 1) value = destination;
      }
      deformation.values(data + s * from.image + c * from.channel, from, smooth,
                         s * in.channels + c, settings.orders[c], block, value);
      if (in.gray_curve) apply(in.curves<T>().at(n, c), block.size, value);
      if constexpr (std::is_same_v<T, A>) {
        if (value == destination) continue;
      }
      store(value, block.size, destination, to.column);
    }
    if (labels) {
      Id* const moved = static_cast<Id*>(labels_out.data_ptr()) + n * window.rows * window.columns;
      take_labels(label_plane, block, deformation.output, window, moved);
    }
  });
}

void deform_on_cpu(const Tensor& image, const std::optional<Tensor>& labels, const Operands& in,
                   const Settings& settings, Sides window, Tensor& out, Tensor& moved) {
  for (int64_t n = 0; in.source && n < in.images; ++n) {
    const int64_t s = in.source->const_data_ptr<int64_t>()[n];
    STD_TORCH_CHECK(s >= 0 && s < in.sources, "source must be of images from 0 to ", in.sources - 1,
                    ", got ", s);
  }
  dispatch_image(image.scalar_type(), [&]<typename T>() {
    if (!labels) return deform<T, int8_t>(image, labels, in, settings, window, out, moved);
    dispatch_width(*labels, [&]<typename Id>() {
      deform<T, Id>(image, labels, in, settings, window, out, moved);
    });
  });
}

void gradients_on_cpu(const Tensor& grad, const Tensor& image, const Operands& in,
                      const Settings& settings, Tensor* by_image, Tensor* by_displacement) {
  dispatch_floating(image.scalar_type(), "elastic_deform_backward", [&]<typename T>() {
    const Deformation<T> deformation(in, settings, sides_of(grad));
    const Upstream<T> upstream(deformation, image, grad, by_displacement || in.gray_curve);
    if (by_image) image_gradient(upstream, *by_image);
    if (by_displacement) displacement_gradient(upstream, *by_displacement);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) {
  m.impl("elastic_deform", TORCH_BOX(&forward<&deform_on_cpu>));
  m.impl("elastic_deform_backward", TORCH_BOX(&backward<&gradients_on_cpu>));
}

}  // namespace unet_fast::elastic_deform
