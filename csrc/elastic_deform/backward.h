#pragma once

#include <algorithm>
#include <vector>

#include "elastic_deform/deformation.h"

// Derivatives. They are needed less often than the deformation, so the loops are plain; part of
// cpu.cpp.
namespace unet_fast::elastic_deform {
namespace {

// The derivatives of a block's folded positions with respect to its positions: 1, -1 or 0.
template <typename A, int axes>
struct Slopes {
  Slopes(const Block<A, axes>& block, const Sides<axes>& input, int32_t boundary) {
    for (int axis = 0; axis < axes; ++axis) {
      const int32_t last = static_cast<int32_t>(input[axis] - 1);
      for (int64_t k = 0; k < block.size; ++k) {
        along[axis][k] = fold_slope(block.site(axis, k), last, boundary);
      }
    }
  }
  A along[axes][kBlock];
};

// The inputs of the backward pass: the operands of the forward pass, and the derivatives of the
// loss with respect to its result.
template <typename T, int axes>
struct Upstream {
  using A = Accumulator<T>;

  const Deformation<T, axes>& deformation;
  const T* const image;
  const Strides<axes> strides;
  const Coefficients<A, axes> smooth;  // empty if the image's values are not needed
  const T* const grad;
  const Strides<axes> grad_strides;

  Upstream(const Deformation<T, axes>& deformation, const Tensor& image, const Tensor& grad,
           bool reads_image)
      : deformation(deformation),
        image(image.const_data_ptr<T>()),
        strides(strides_to_read<axes>(image, "image")),
        smooth(coefficients<T, axes>(image, deformation.in, deformation.settings, reads_image)),
        grad(grad.const_data_ptr<T>()),
        grad_strides(strides_of<axes>(grad)) {}

  const T* plane(int64_t n, int64_t c) const {
    return image + n * strides.image + c * strides.channel;
  }

  // The derivatives of the loss with respect to the values that a block read from a channel; 0 for
  // pixels that read none.
  void of_values(int64_t n, int64_t c, const Block<A, axes>& block, A* out) const {
    const Operands<axes>& in = deformation.in;
    const Strides<axes>& s = grad_strides;
    const T* const g = grad + n * s.image + c * s.channel + s.offset(block.place);
    if (in.gray_curve) {
      const Curve<A> curve = in.template curves<T>().at(n, c);
      deformation.values(plane(n, c), strides, smooth, n * in.channels + c,
                         deformation.settings.orders[c], block, out);
      for (int64_t k = 0; k < block.size; ++k) out[k] = curve.slope(out[k]);
    } else {
      std::fill_n(out, block.size, A(1));
    }
    for (int64_t k = 0; k < block.size; ++k) {
      out[k] *= static_cast<A>(g[k * s.along[axes - 1]]);
      if (!block.all_read && block.state[k] != kRead) out[k] = 0;
    }
  }
};

// Adds `upstream`, times the weights of an interpolation, to the pixels that lie `steps` behind
// `at`; `weight` is that of the axes before `axis`.
template <int order, int axis, int axes, typename A>
void scatter_along(const Weights<order, axes, A>& w, const int64_t (&steps)[axes][kTaps<order>],
                   const A& upstream, A weight, A* at) {
  for (int i = 0; i < kTaps<order>; ++i) {
    if constexpr (axis < axes - 1) {
      scatter_along<order, axis + 1>(w, steps, upstream, weight * w[axis][i], at + steps[axis][i]);
    } else {
      at[steps[axis][i]] += weight * w[axis][i] * upstream;
    }
  }
}

// Adds the derivatives of a block to the pixels that it read, of places [begin, end) along the
// first axis.
template <int order, typename A, int axes>
void scatter(const Block<A, axes>& block, const A* upstream, const Sides<axes>& sides,
             int64_t begin, int64_t end, A* plane) {
  if (block.extents[0].high + order + 1 < begin || block.extents[0].low - order > end) return;
  for (int64_t k = 0; k < block.size; ++k) {
    Weights<order, axes, A> w;
    int64_t steps[axes][kTaps<order>];
    for (int axis = 0; axis < axes; ++axis) {
      const Site<A> site = block.site(axis, k);
      tap_weights<order>(site.t, w[axis]);
      for (int i = 0; i < kTaps<order>; ++i) {
        const int32_t last = static_cast<int32_t>(sides[axis] - 1);
        steps[axis][i] = tap<order>(site, i, last) * sides.step(axis);
      }
    }
    for (int i = 0; i < kTaps<order>; ++i) {
      if (steps[0][i] < begin * sides.step(0) || steps[0][i] >= end * sides.step(0)) continue;
      scatter_along<order, 1>(w, steps, upstream[k], w[0][i], plane + steps[0][i]);
    }
  }
}

// Bands of input along the first axis, per image. Each gathers what was read from it, in output
// order: sums are the same for any number of threads, and no two threads write to the same pixel.
constexpr int64_t kBands = 4;

template <typename T, int axes>
void image_gradient(const Upstream<T, axes>& upstream, Tensor& result) {
  using A = Accumulator<T>;
  const Deformation<T, axes>& deformation = upstream.deformation;
  const Operands<axes>& in = deformation.in;
  const Sides<axes>& sides = in.input;
  const int64_t pixels = sides.pixels();
  std::vector<A> sums(in.images * in.channels * pixels);
  torch::stable::parallel_for(0, in.images * kBands, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> g(kBlock);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / kBands, band = unit % kBands;
      const int64_t first = sides[0] * band / kBands, last = sides[0] * (band + 1) / kBands;
      const int64_t lines = deformation.output.lines();
      deformation.walk(n * lines, (n + 1) * lines,
                       [&](int64_t, std::span<const Piece>, Block<A, axes>& block) {
                         deformation.find(block);
                         for (int64_t c = 0; c < in.channels; ++c) {
                           A* const plane = sums.data() + (n * in.channels + c) * pixels;
                           upstream.of_values(n, c, block, g.data());
                           dispatch_order(deformation.settings.orders[c], [&]<int order>() {
                             scatter<order>(block, g.data(), sides, first, last, plane);
                           });
                         }
                       });
    }
  });
  const Strides<axes> to = strides_of<axes>(result);
  T* const out = result.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, in.images * in.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      A* const plane = sums.data() + unit * pixels;
      for (int axis = 0; axis < axes && deformation.settings.orders[unit % in.channels] == 3;
           ++axis) {
        for (int64_t line = 0; line < sides.lines_along(axis); ++line) {
          prefilter_transposed(plane + sides.first_of_line(axis, line), sides[axis],
                               sides.step(axis));
        }
      }
      T* const destination = out + unit / in.channels * to.image + unit % in.channels * to.channel;
      const int64_t columns = sides[axes - 1];
      for (int64_t line = 0; line < sides.lines(); ++line) {
        T* const there = destination + to.offset(sides.place_of(line * columns));
        for (int64_t x = 0; x < columns; ++x) {
          there[x * to.along[axes - 1]] = static_cast<T>(plane[line * columns + x]);
        }
      }
    }
  });
}

// Adds the derivatives with respect to the positions of a block, for one channel.
template <int order, typename T, typename A, int axes>
void position_gradient(const Plane<T, axes>& plane, const Sides<axes>& sides,
                       const Block<A, axes>& block, const A* upstream, double (*out)[kBlock]) {
  for (int64_t k = 0; k < block.size; ++k) {
    if (!block.all_read && block.state[k] != kRead) continue;
    const T* at = plane.data;
    Weights<order, axes, A> w, slopes;
    for (int axis = 0; axis < axes; ++axis) {
      tap_weights<order>(block.t[axis][k], w[axis]);
      at += block.pixel[axis][k] * plane.stride[axis] - kBefore<order> * plane.step[axis];
    }
    for (int axis = 0; axis < axes; ++axis) tap_slopes<order>(block.t[axis][k], slopes[axis]);
    const auto fetch = [&](auto... places) {
      return static_cast<A>(at[step_to(plane.step, places...)]);
    };
    for_axes<axes>([&]<int axis>() {
      if (sides[axis] > 1) {
        out[axis][k] += upstream[k] * interpolate<order, axes, axis>(w, slopes, fetch);
      }
    });
  }
}

template <typename T, int axes>
void displacement_gradient(const Upstream<T, axes>& upstream, Tensor& result) {
  using A = Accumulator<T>;
  const Deformation<T, axes>& deformation = upstream.deformation;
  const Operands<axes>& in = deformation.in;
  const int32_t grid = deformation.settings.grid;
  const Sides<axes>& output = deformation.output;
  const int64_t columns = in.field[axes - 1].size();
  // Derivatives with respect to the coefficients along each output line, (N, lines, axes, columns).
  // No two threads write to the same line, and the order of the sums is fixed.
  std::vector<double> along(in.images * output.lines() * axes * columns);
  deformation.run([&](int64_t n, std::span<const Piece> pieces, Block<A, axes>& block) {
    const Slopes<A, axes> slopes(block, in.input, deformation.settings.boundary);
    deformation.find(block);
    A g[kBlock];
    double positions[axes][kBlock] = {};
    for (int64_t c = 0; c < in.channels; ++c) {
      upstream.of_values(n, c, block, g);
      const auto add = [&]<int order>(const auto& plane) {
        position_gradient<order>(plane, in.input, block, g, positions);
      };
      const auto plane = Plane<T, axes>::of(upstream.plane(n, c), upstream.strides, in.input);
      if (deformation.settings.orders[c] == 1) add.template operator()<1>(plane);
      if (deformation.settings.orders[c] == 3) {
        add.template operator()<3>(upstream.smooth.plane(n * in.channels + c));
      }
    }
    const int64_t line = output.index_of(block.place) / output[axes - 1];
    double* const to = along.data() + (n * output.lines() + line) * axes * columns;
    for (const Piece& piece : pieces) {
      for (int64_t x = piece.begin; x < piece.end; ++x) {
        const double t = piece.t + static_cast<double>(x - piece.middle()) * piece.scale;
        const int64_t k = x - block.begin();
        for (int i = 0; i < 4; ++i) {
          const double weight = cubic_weight(grid, i, t);
          for (int axis = 0; axis < axes; ++axis) {
            to[axis * columns + piece.cell + i] +=
                weight * positions[axis][k] * slopes.along[axis][k];
          }
        }
      }
    }
  });
  deformation.field.gradient(along, output, result.mutable_data_ptr<double>());
}

}  // namespace
}  // namespace unet_fast::elastic_deform
