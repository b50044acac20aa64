#pragma once

#include <vector>

#include "testing/cuda_on_host.h"
// The stand-ins for CUDA, above, must come first.
#include "elastic_deform/backward.cuh"
#include "elastic_deform/kernels.cuh"

namespace unet_fast::elastic_deform {

/// A movement that owns the memory it points to.
struct HostMovement {
  HostMovement(int64_t images, Sides input, Sides output, Sides points, int32_t grid,
               bool spans_input, double row_scale, double column_scale, int32_t boundary,
               Values displacement, Values affine, Values offset, const int64_t* source = nullptr,
               int64_t sources = 0)
      : motions(images) {
    const GridAxis rows =
        displacement ? GridAxis::of(grid, points.rows, row_scale) : GridAxis::none();
    const GridAxis columns =
        displacement ? GridAxis::of(grid, points.columns, column_scale) : GridAxis::none();
    coefficients.resize(images * 2 * rows.size() * columns.size());
    knots.resize(images * 2 * points.pixels());
    movement = {images,         input,
                output,         points,
                rows,           columns,
                grid,           boundary,
                spans_input,    displacement,
                affine,         offset,
                source,         source ? sources : images,
                motions.data(), coefficients.data(),
                knots.data()};
  }

  Movement movement;
  std::vector<Motion> motions;
  std::vector<double> coefficients, knots;
};

/// An image and, once constructed, its spline coefficients.
template <typename T>
struct HostImage {
  using A = Accumulator<T>;

  HostImage(const T* data, const Strides& strides, const Movement& m, int64_t channels,
            const std::vector<int64_t>& orders, const Curves<A>& curves, double cval)
      : image{{data, strides}, {nullptr, smooth_strides(m.input, channels)},
              channels,        {},
              curves,          static_cast<A>(cval)} {
    for (int64_t c = 0; c < channels; ++c) image.orders.set(c, orders[c]);
    const Strides& s = image.smooth.strides;
    memory.resize(image.any_smooth() ? m.sources * s.image : 0);
    if (image.any_smooth()) image.smooth.data = smooth = memory.data() + s.row + s.column;
    launch_prepare(m, image, smooth, cuda_on_host::Stream{});
  }

  Image<T, A> image;
  std::vector<A> memory;
  A* smooth = nullptr;
};

template <typename T>
void host_image_gradient(const Movement& m, const Image<T, Accumulator<T>>& image,
                         const Source<T>& grad, const Strides& to, T* out) {
  std::vector<unsigned long long> sums(m.images * (image.channels * m.input.pixels() + 1), 7);
  launch_image_gradient(m, image, grad, sums.data(), to, out, cuda_on_host::Stream{});
}

template <typename T>
void host_displacement_gradient(const Movement& m, const Image<T, Accumulator<T>>& image,
                                const Source<T>& grad, double* out) {
  std::vector<double> scratch(displacement_scratch(m));
  launch_displacement_gradient(m, image, grad, scratch.data(), out, cuda_on_host::Stream{});
}

}  // namespace unet_fast::elastic_deform
