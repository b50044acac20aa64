#pragma once

#include <algorithm>
#include <vector>

#include "elastic_deform/deformation.h"

// Derivatives. They are needed less often than the deformation, so the loops are plain; part of
// cpu.cpp.
namespace unet_fast::elastic_deform {
namespace {

// The derivatives of a block's folded positions with respect to its positions: 1, -1 or 0.
template <typename A>
struct Slopes {
  Slopes(const Block<A>& block, Sides input, int32_t boundary) {
    const int32_t last_row = static_cast<int32_t>(input.rows - 1);
    const int32_t last_column = static_cast<int32_t>(input.columns - 1);
    for (int64_t k = 0; k < block.size; ++k) {
      y[k] = fold_slope(Site<A>{block.row_of[k], block.y[k]}, last_row, boundary);
      x[k] = fold_slope(Site<A>{block.column_of[k], block.x[k]}, last_column, boundary);
    }
  }
  A y[kBlock], x[kBlock];
};

// The inputs of the backward pass: the operands of the forward pass, and the derivatives of the
// loss with respect to its result.
template <typename T>
struct Upstream {
  using A = Accumulator<T>;

  const Deformation<T>& deformation;
  const T* const image;
  const Strides strides;
  const Coefficients<A> smooth;  // empty if the image's values are not needed
  const T* const grad;
  const Strides grad_strides;

  Upstream(const Deformation<T>& deformation, const Tensor& image, const Tensor& grad,
           bool reads_image)
      : deformation(deformation),
        image(image.const_data_ptr<T>()),
        strides(strides_to_read(image, "image")),
        smooth(coefficients<T>(image, deformation.in, deformation.settings, reads_image)),
        grad(grad.const_data_ptr<T>()),
        grad_strides(strides_of(grad)) {}

  const T* plane(int64_t n, int64_t c) const {
    return image + n * strides.image + c * strides.channel;
  }

  // The derivatives of the loss with respect to the values that a block read from a channel; 0 for
  // pixels that read none.
  void of_values(int64_t n, int64_t c, const Block<A>& block, A* out) const {
    const Operands& in = deformation.in;
    const Strides& s = grad_strides;
    const T* const g =
        grad + n * s.image + c * s.channel + block.row * s.row + block.begin * s.column;
    if (in.gray_curve) {
      const Curve<A> curve = in.curves<T>().at(n, c);
      deformation.values(plane(n, c), strides, smooth, n * in.channels + c,
                         deformation.settings.orders[c], block, out);
      for (int64_t k = 0; k < block.size; ++k) out[k] = curve.slope(out[k]);
    } else {
      std::fill_n(out, block.size, A(1));
    }
    for (int64_t k = 0; k < block.size; ++k) {
      out[k] *= static_cast<A>(g[k * s.column]);
      if (!block.all_read && block.state[k] != kRead) out[k] = 0;
    }
  }
};

// Adds the derivatives of a block to the pixels that it read in rows [top, bottom) of a plane.
template <int order, typename A>
void scatter(const Block<A>& block, const A* upstream, Sides sides, int64_t top, int64_t bottom,
             A* plane) {
  if (block.rows.high + order + 1 < top || block.rows.low - order > bottom) return;
  for (int64_t k = 0; k < block.size; ++k) {
    const Site<A> row{block.row_of[k], block.y[k]}, column{block.column_of[k], block.x[k]};
    A y[kTaps<order>], x[kTaps<order>];
    tap_weights<order>(row.t, y);
    tap_weights<order>(column.t, x);
    for (int i = 0; i < kTaps<order>; ++i) {
      const int32_t r = tap<order>(row, i, static_cast<int32_t>(sides.rows - 1));
      if (r < top || r >= bottom) continue;
      for (int j = 0; j < kTaps<order>; ++j) {
        const int32_t s = tap<order>(column, j, static_cast<int32_t>(sides.columns - 1));
        plane[r * sides.columns + s] += y[i] * x[j] * upstream[k];
      }
    }
  }
}

// Bands of input rows per image. Each gathers what was read from it, in output order: sums are the
// same for any number of threads, and no two threads write to the same pixel.
constexpr int64_t kBands = 4;

template <typename T>
void image_gradient(const Upstream<T>& upstream, Tensor& result) {
  using A = Accumulator<T>;
  const Deformation<T>& deformation = upstream.deformation;
  const Operands& in = deformation.in;
  const Sides sides = in.input;
  const int64_t pixels = sides.rows * sides.columns;
  std::vector<A> sums(in.images * in.channels * pixels);
  torch::stable::parallel_for(0, in.images * kBands, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> g(kBlock);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / kBands, band = unit % kBands;
      const int64_t top = sides.rows * band / kBands, bottom = sides.rows * (band + 1) / kBands;
      const int64_t rows = deformation.output.rows;
      deformation.walk(n * rows, (n + 1) * rows,
                       [&](int64_t, std::span<const Piece>, Block<A>& block) {
                         deformation.find(block);
                         for (int64_t c = 0; c < in.channels; ++c) {
                           A* const plane = sums.data() + (n * in.channels + c) * pixels;
                           upstream.of_values(n, c, block, g.data());
                           dispatch_order(deformation.settings.orders[c], [&]<int order>() {
                             scatter<order>(block, g.data(), sides, top, bottom, plane);
                           });
                         }
                       });
    }
  });
  const Strides to = strides_of(result);
  T* const out = result.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, in.images * in.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      A* const plane = sums.data() + unit * pixels;
      if (deformation.settings.orders[unit % in.channels] == 3) {
        for (int64_t x = 0; x < sides.columns; ++x) {
          prefilter_transposed(plane + x, sides.rows, sides.columns);
        }
        for (int64_t y = 0; y < sides.rows; ++y) {
          prefilter_transposed(plane + y * sides.columns, sides.columns, 1);
        }
      }
      T* const destination = out + unit / in.channels * to.image + unit % in.channels * to.channel;
      for (int64_t y = 0; y < sides.rows; ++y) {
        for (int64_t x = 0; x < sides.columns; ++x) {
          destination[y * to.row + x * to.column] = static_cast<T>(plane[y * sides.columns + x]);
        }
      }
    }
  });
}

// Adds the derivatives with respect to the row and column positions of a block, for one channel.
template <int order, typename T, typename A>
void position_gradient(const Plane<T>& plane, Sides sides, const Block<A>& block, const A* upstream,
                       double* dy, double* dx) {
  for (int64_t k = 0; k < block.size; ++k) {
    if (!block.all_read && block.state[k] != kRead) continue;
    const Site<A> row{block.row_of[k], block.y[k]}, column{block.column_of[k], block.x[k]};
    A y[kTaps<order>], x[kTaps<order>], slope_y[kTaps<order>], slope_x[kTaps<order>];
    tap_weights<order>(row.t, y);
    tap_weights<order>(column.t, x);
    tap_slopes<order>(row.t, slope_y);
    tap_slopes<order>(column.t, slope_x);
    const T* const at = plane.data + row.pixel * plane.row + column.pixel * plane.column -
                        kBefore<order> * (plane.row_step + plane.column_step);
    const auto fetch = [&](int i, int j) {
      return static_cast<A>(at[int64_t{i} * plane.row_step + int64_t{j} * plane.column_step]);
    };
    if (sides.rows > 1) dy[k] += upstream[k] * interpolate<order>(slope_y, x, fetch);
    if (sides.columns > 1) dx[k] += upstream[k] * interpolate<order>(y, slope_x, fetch);
  }
}

template <typename T>
void displacement_gradient(const Upstream<T>& upstream, Tensor& result) {
  using A = Accumulator<T>;
  const Deformation<T>& deformation = upstream.deformation;
  const Operands& in = deformation.in;
  const int32_t grid = deformation.settings.grid;
  const Strides& strides = upstream.strides;
  const int64_t columns = in.columns.size();
  // Derivatives with respect to the coefficients along each output row, (N, rows, 2, columns). No
  // two threads write to the same row, and the order of the sums is fixed.
  std::vector<double> along(in.images * deformation.output.rows * 2 * columns);
  deformation.run([&](int64_t n, std::span<const Piece> pieces, Block<A>& block) {
    const Slopes<A> slopes(block, in.input, deformation.settings.boundary);
    deformation.find(block);
    A g[kBlock];
    double dy[kBlock] = {}, dx[kBlock] = {};
    for (int64_t c = 0; c < in.channels; ++c) {
      upstream.of_values(n, c, block, g);
      const auto add = [&]<int order>(const auto& plane) {
        position_gradient<order>(plane, in.input, block, g, dy, dx);
      };
      const auto plane = Plane<T>::of(upstream.plane(n, c), strides.row, strides.column, in.input);
      if (deformation.settings.orders[c] == 1) add.template operator()<1>(plane);
      if (deformation.settings.orders[c] == 3) {
        add.template operator()<3>(upstream.smooth.plane(n * in.channels + c));
      }
    }
    double* const to = along.data() + (n * deformation.output.rows + block.row) * 2 * columns;
    for (const Piece& piece : pieces) {
      for (int64_t x = piece.begin; x < piece.end; ++x) {
        const double t = piece.t + static_cast<double>(x - piece.middle()) * piece.scale;
        const int64_t k = x - block.begin;
        for (int i = 0; i < 4; ++i) {
          const double weight = cubic_weight(grid, i, t);
          to[piece.cell + i] += weight * dy[k] * slopes.y[k];
          to[columns + piece.cell + i] += weight * dx[k] * slopes.x[k];
        }
      }
    }
  });
  deformation.field.gradient(along, deformation.output.rows, result.mutable_data_ptr<double>());
}

}  // namespace
}  // namespace unet_fast::elastic_deform
