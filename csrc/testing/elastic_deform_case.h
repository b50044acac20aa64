#pragma once

#include <vector>

#include "testing/cuda_on_host.h"
// The stand-ins for CUDA, above, must come first.
#include "elastic_deform/backward.cuh"
#include "elastic_deform/kernels.cuh"

namespace unet_fast::elastic_deform {

/// A movement that owns the memory it points to.
template <int axes>
struct HostMovement {
  HostMovement(int64_t images, const Sides<axes>& input, const Sides<axes>& output,
               const Sides<axes>& points, int32_t grid, bool spans_input, const double* scales,
               int32_t boundary, Values displacement, Values affine, Values offset,
               const int64_t* source = nullptr, int64_t sources = 0)
      : motions(images) {
    const auto field =
        displacement ? GridAxes<axes>::of(grid, points, scales) : GridAxes<axes>::none(grid);
    scratch.resize(Movement<axes>::scratch(images, field, output));
    movement = {images,
                input,
                output,
                field,
                boundary,
                spans_input,
                displacement,
                affine,
                offset,
                source,
                source ? sources : images,
                motions.data(),
                nullptr,
                nullptr,
                nullptr};
    movement.set_scratch(scratch.data());
  }

  Movement<axes> movement;
  cuda_on_host::DeviceMemory<Motion<axes>> motions;
  cuda_on_host::DeviceMemory<double> scratch;
};

/// An image and, once constructed, its spline coefficients.
template <typename T, int axes>
struct HostImage {
  using A = Accumulator<T>;

  HostImage(const T* data, const Strides<axes>& strides, const Movement<axes>& m, int64_t channels,
            const std::vector<int64_t>& orders, const Curves<A>& curves, double cval)
      : image{{data, strides}, {nullptr, coefficient_strides(m.input, channels)},
              channels,        {},
              curves,          static_cast<A>(cval)} {
    for (int64_t c = 0; c < channels; ++c) image.orders.set(c, orders[c]);
    const Strides<axes>& s = image.smooth.strides;
    memory.resize(image.any_smooth() ? m.sources * s.image : 0);
    if (image.any_smooth()) image.smooth.data = smooth = memory.data() + border_of(s);
    launch_prepare(m, image, smooth, cuda_on_host::Stream{});
  }

  Image<T, A, axes> image;
  cuda_on_host::DeviceMemory<A> memory;
  A* smooth = nullptr;
};

template <typename T, int axes>
void host_image_gradient(const Movement<axes>& m, const Image<T, Accumulator<T>, axes>& image,
                         const Source<T, axes>& grad, const Strides<axes>& to, T* out) {
  cuda_on_host::DeviceMemory<unsigned long long> sums(m.images *
                                                      (image.channels * m.input.pixels() + 1));
  launch_image_gradient(m, image, grad, sums.data(), to, out, cuda_on_host::Stream{});
}

template <typename T, int axes>
void host_displacement_gradient(const Movement<axes>& m,
                                const Image<T, Accumulator<T>, axes>& image,
                                const Source<T, axes>& grad, double* out) {
  cuda_on_host::DeviceMemory<double> scratch(displacement_scratch(m));
  launch_displacement_gradient(m, image, grad, scratch.data(), out, cuda_on_host::Stream{});
}

}  // namespace unet_fast::elastic_deform
