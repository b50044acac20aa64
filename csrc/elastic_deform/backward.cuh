#pragma once

#include "elastic_deform/kernels.cuh"

// CUDA kernels and launchers of the derivatives.
namespace unet_fast::elastic_deform {

// The derivative of the loss with respect to the value that a pixel read from a channel.
template <typename T, typename A>
__device__ A upstream(const Image<T, A>& image, const Source<T>& grad, int64_t n, int64_t c,
                      Sides sides, const Pixel<A>& p) {
  if (p.state != kRead) return 0;
  const Strides& s = grad.strides;
  A result =
      static_cast<A>(grad.data[n * s.image + c * s.channel + p.row * s.row + p.column * s.column]);
  if (image.curves) {
    result *= image.curves.at(n, c).slope(value_of(image, n, c, sides, p));
  }
  return result;
}

// The unit of the integers in which an image's gradient is summed, chosen by its greatest
// derivative. Integer sums do not depend on the order of additions, so results repeat bit for bit
// although threads add in any order.
struct Unit {
  double scale;  // units per 1.0
  bool finite;

  // `largest`: bits of the greatest absolute derivative; at most `terms` are added to one pixel.
  __device__ static Unit of(unsigned long long largest, int64_t terms) {
    double value;
    static_assert(sizeof(value) == sizeof(largest));
    memcpy(&value, &largest, sizeof(value));
    int exponent = 0, headroom = 0;
    frexp(value, &exponent);  // value < 2^exponent
    while ((int64_t{1} << headroom) < terms) ++headroom;
    const int bits = 61 - headroom - exponent;
    return {ldexp(1.0, bits < 1000 ? bits : 1000), value < INFINITY};
  }
};

template <typename T, typename A>
__global__ void find_largest(Movement m, Image<T, A> image, Source<T> grad,
                             unsigned long long* largest) {
  __shared__ Tile<A> tile;
  __shared__ unsigned long long in_block;
  if (threadIdx.x == 0 && threadIdx.y == 0) in_block = 0;
  set_up(m, tile);
  unsigned long long most = 0;
  march(m, tile, [&](int64_t n, Pixel<A> p) {
    p.fold_into(m.input, m.boundary);
    for (int64_t c = 0; c < image.channels; ++c) {
      const double value = fabs(static_cast<double>(upstream(image, grad, n, c, m.input, p)));
      unsigned long long bits;
      memcpy(&bits, &value, sizeof(bits));  // ordered like the values; NaN is the greatest
      most = bits > most ? bits : most;
    }
  });
  // One atomic operation per warp, then one per block: all blocks of an image share one address.
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const unsigned long long other = __shfl_down_sync(~0u, most, offset);
    most = other > most ? other : most;
  }
  if (threadIdx.x == 0) atomicMax(&in_block, most);
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) atomicMax(largest + tile.image, in_block);
}

template <typename T, typename A>
__global__ void scatter(Movement m, Image<T, A> image, Source<T> grad,
                        const unsigned long long* largest, unsigned long long* sums) {
  __shared__ Tile<A> tile;
  set_up(m, tile);
  const Unit unit = Unit::of(largest[tile.image], m.output.pixels());
  if (!unit.finite) return;
  const int32_t last_row = static_cast<int32_t>(m.input.rows - 1);
  const int32_t last_column = static_cast<int32_t>(m.input.columns - 1);
  march(m, tile, [&](int64_t n, Pixel<A> p) {
    p.fold_into(m.input, m.boundary);
    for (int64_t c = 0; c < image.channels; ++c) {
      const double g = static_cast<double>(upstream(image, grad, n, c, m.input, p)) * unit.scale;
      unsigned long long* const plane = sums + (n * image.channels + c) * m.input.pixels();
      with_order(image.orders.at(c), [&]<int order>() {
        A y[kTaps<order>], x[kTaps<order>];
        tap_weights<order>(p.y.t, y);
        tap_weights<order>(p.x.t, x);
        for (int i = 0; i < kTaps<order>; ++i) {
          const int64_t row = tap<order>(p.y, i, last_row) * m.input.columns;
          for (int j = 0; j < kTaps<order>; ++j) {
            // Negative numbers wrap around as unsigned integers, and so do their sums.
            const int64_t units = llrint(static_cast<double>(y[i] * x[j]) * g);
            atomicAdd(plane + row + tap<order>(p.x, j, last_column),
                      static_cast<unsigned long long>(units));
          }
        }
      });
    }
  });
}

// Converts sums from units to doubles, in place.
__global__ void to_doubles(const unsigned long long* largest, int64_t terms, int64_t images,
                           int64_t values, unsigned long long* sums) {
  const int64_t i = thread_index();
  if (i >= images * values) return;
  const Unit unit = Unit::of(largest[i / values], terms);
  const double value =
      unit.finite ? static_cast<double>(static_cast<int64_t>(sums[i])) / unit.scale : kNoNumber;
  memcpy(&sums[i], &value, sizeof(value));
}

// Applies the transposed prefilter along columns (`along_rows`: rows) to channels of order 3.
template <typename T, typename A>
__global__ void filter_transposed(Image<T, A> image, int64_t images, Sides sides, bool along_rows,
                                  double* sums) {
  const int64_t unit = thread_index();
  const int64_t lines = along_rows ? sides.rows : sides.columns;
  const int64_t plane = unit / lines, line = unit % lines;
  if (plane >= images * image.channels || image.orders.at(plane % image.channels) != 3) return;
  double* const data = sums + plane * sides.pixels();
  if (along_rows) {
    prefilter_transposed(data + line * sides.columns, sides.columns, 1);
  } else {
    prefilter_transposed(data + line, sides.rows, sides.columns);
  }
}

template <typename T>
__global__ void store_gradient(const double* sums, int64_t images, int64_t channels, Sides sides,
                               Strides to, T* out) {
  const int64_t i = thread_index();
  if (i >= images * channels * sides.pixels()) return;
  const int64_t plane = i / sides.pixels(), pixel = i % sides.pixels();
  out[plane / channels * to.image + plane % channels * to.channel + pixel / sides.columns * to.row +
      pixel % sides.columns * to.column] = static_cast<T>(sums[i]);
}

// Writes the derivatives with respect to the position of each output pixel, (N, 2, output).
template <typename T, typename A>
__global__ void position_gradient(Movement m, Image<T, A> image, Source<T> grad, double* out) {
  __shared__ Tile<A> tile;
  set_up(m, tile);
  march(m, tile, [&](int64_t n, Pixel<A> p) {
    const int32_t last_row = static_cast<int32_t>(m.input.rows - 1);
    const int32_t last_column = static_cast<int32_t>(m.input.columns - 1);
    const A along_y = fold_slope(p.y, last_row, m.boundary);
    const A along_x = fold_slope(p.x, last_column, m.boundary);
    p.fold_into(m.input, m.boundary);
    double dy = 0, dx = 0;
    for (int64_t c = 0; c < image.channels && p.state == kRead; ++c) {
      const A g = upstream(image, grad, n, c, m.input, p);
      with_channel(image, n, c, m.input, p, [&]<int order>(const auto& around) {
        if constexpr (order > 0) {
          A y[kTaps<order>], x[kTaps<order>], slope_y[kTaps<order>], slope_x[kTaps<order>];
          tap_weights<order>(p.y.t, y);
          tap_weights<order>(p.x.t, x);
          tap_slopes<order>(p.y.t, slope_y);
          tap_slopes<order>(p.x.t, slope_x);
          dy += static_cast<double>(g * along_y * interpolate<order>(slope_y, x, around));
          dx += static_cast<double>(g * along_x * interpolate<order>(y, slope_x, around));
        }
      });
    }
    double* const to = out + n * 2 * m.output.pixels() + p.row * m.output.columns + p.column;
    to[0] = dy;
    to[m.output.pixels()] = dx;
  });
}

// Sums the position derivatives of each output row into derivatives with respect to the
// coefficients along it, (N, 2, output.rows, columns.size()), in a fixed order. One block per row
// of each image and component.
__global__ void along_rows(Movement m, const double* positions, double* out) {
  __shared__ double shared[kThreads / kWarp];
  const int64_t line = blockIdx.x;
  const double shift = m.motions[line / (2 * m.output.rows)].shift[1];
  const double* const from = positions + line * m.output.columns;
  for (int64_t q = 0; q < m.columns.size(); ++q) {
    double sum = 0;
    for (int64_t x = threadIdx.x; x < m.output.columns; x += blockDim.x) {
      const Place<double> at = place<double>(m.columns, static_cast<double>(x) + shift);
      const int64_t k = q - at.cell;
      if (k >= 0 && k < 4) sum += from[x] * cubic_weight(m.grid, static_cast<int>(k), at.t);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) out[line * m.columns.size() + q] = sum;
  }
}

// Sums the result of along_rows down the columns into derivatives with respect to the coefficients,
// (N, 2, rows.size(), columns.size()), in a fixed order. One block per coefficient.
__global__ void along_columns(Movement m, const double* along, double* out) {
  __shared__ double shared[kThreads / kWarp];
  const int64_t i = blockIdx.x;
  const int64_t component = i / m.component(), p = i % m.component() / m.columns.size();
  const int64_t q = i % m.columns.size();
  const double shift = m.motions[component / 2].shift[0];
  double sum = 0;
  for (int64_t y = threadIdx.x; y < m.output.rows; y += blockDim.x) {
    const Place<double> at = place<double>(m.rows, static_cast<double>(y) + shift);
    const int64_t k = p - at.cell;
    if (k >= 0 && k < 4) {
      sum += along[(component * m.output.rows + y) * m.columns.size() + q] *
             cubic_weight(m.grid, static_cast<int>(k), at.t);
    }
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) out[i] = sum;
}

// The transpose of `prepare`: from coefficients back to displacements. One block per image.
__global__ void collect(Movement m, const double* coefficients, double* out) {
  const int64_t n = blockIdx.x, points = m.points.pixels();
  const double* const from = coefficients + n * 2 * m.component();
  double* const to = out + n * 2 * points;
  const Motion motion = m.motions[n];
  for (int64_t i = threadIdx.x; i < 2 * points; i += blockDim.x) {
    const int64_t row = i % points / m.points.columns, column = i % m.points.columns;
    double sum = 0;
    for (int64_t y = 0; y < m.rows.size(); ++y) {
      if (source_point(m.grid, y, m.points.rows) != row) continue;
      for (int64_t x = 0; x < m.columns.size(); ++x) {
        if (source_point(m.grid, x, m.points.columns) != column) continue;
        const int64_t at = y * m.columns.size() + x;
        sum += motion.moved_transposed(m.grid, static_cast<int>(i / points), from[at],
                                       from[m.component() + at]);
      }
    }
    to[i] = sum;
  }
  __syncthreads();
  if (m.grid != kInterpolating) return;  // the same for all threads
  for (int64_t i = threadIdx.x; i < 2 * m.points.columns; i += blockDim.x) {
    prefilter_transposed(to + i / m.points.columns * points + i % m.points.columns, m.points.rows,
                         m.points.columns);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 2 * m.points.rows; i += blockDim.x) {
    prefilter_transposed(to + i * m.points.columns, m.points.columns, 1);
  }
}

/// Writes the derivative with respect to the image. `sums` has room for all values of the images,
/// and one more per image.
template <typename T, typename A, typename Stream>
void launch_image_gradient(const Movement& m, const Image<T, A>& image, const Source<T>& grad,
                           unsigned long long* sums, const Strides& to, T* out, Stream stream) {
  const int64_t pixels = m.images * image.channels * m.input.pixels();
  unsigned long long* const largest = sums + pixels;
  launch(&clear<unsigned long long>, blocks_of(pixels + m.images), dim3(kThreads), stream, sums,
         pixels + m.images);
  launch(&find_largest<T, A>, tiles(m), kTileThreads, stream, m, image, grad, largest);
  const auto* const found = static_cast<const unsigned long long*>(largest);
  launch(&scatter<T, A>, tiles(m), kTileThreads, stream, m, image, grad, found, sums);
  launch(&to_doubles, blocks_of(pixels), dim3(kThreads), stream, found, m.output.pixels(), m.images,
         pixels / m.images, sums);
  double* const values = reinterpret_cast<double*>(sums);
  const int64_t planes = m.images * image.channels;
  for (int along_rows = 0; along_rows < 2 && image.any_smooth(); ++along_rows) {
    const int64_t lines = planes * (along_rows ? m.input.rows : m.input.columns);
    launch(&filter_transposed<T, A>, blocks_of(lines), dim3(kThreads), stream, image, m.images,
           m.input, along_rows != 0, values);
  }
  launch(&store_gradient<T>, blocks_of(pixels), dim3(kThreads), stream,
         static_cast<const double*>(values), m.images, image.channels, m.input, to, out);
}

/// Number of doubles in the scratch memory of launch_displacement_gradient.
inline int64_t displacement_scratch(const Movement& m) {
  return 2 * m.images * (m.output.pixels() + m.output.rows * m.columns.size() + m.component());
}

/// Writes the derivative with respect to the displacement, (N, 2, points).
template <typename T, typename A, typename Stream>
void launch_displacement_gradient(const Movement& m, const Image<T, A>& image,
                                  const Source<T>& grad, double* scratch, double* out,
                                  Stream stream) {
  double* const positions = scratch;
  double* const along = positions + 2 * m.images * m.output.pixels();
  double* const coefficients = along + 2 * m.images * m.output.rows * m.columns.size();
  launch(&position_gradient<T, A>, tiles(m), kTileThreads, stream, m, image, grad, positions);
  launch(&along_rows, dim3(static_cast<unsigned>(2 * m.images * m.output.rows)), dim3(kThreads),
         stream, m, static_cast<const double*>(positions), along);
  launch(&along_columns, dim3(static_cast<unsigned>(2 * m.images * m.component())), dim3(2 * kWarp),
         stream, m, static_cast<const double*>(along), coefficients);
  launch(&collect, dim3(static_cast<unsigned>(m.images)), dim3(kThreads), stream, m,
         static_cast<const double*>(coefficients), out);
}

}  // namespace unet_fast::elastic_deform
