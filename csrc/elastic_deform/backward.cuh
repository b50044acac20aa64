#pragma once

#include "elastic_deform/kernels.cuh"

// CUDA kernels and launchers of the derivatives.
namespace unet_fast::elastic_deform {

// The derivative of the loss with respect to the value that a pixel read from a channel.
template <typename T, typename A, int axes, int lean>
__device__ A upstream(const Image<T, A, axes>& image, const Source<T, axes>& grad, int64_t n, int c,
                      const Tile<A, axes, lean>& tile, const Pixel<A, axes>& p) {
  if (p.state != kRead) return 0;
  int32_t place[axes];
  place_of(tile, p.row, place);
  A result = static_cast<A>(grad.channel(n, c)[offset_of<lean>(grad.strides, place)]);
  if (image.curves) {
    with_channel<lean>(image, image.pixels.channel(n, c), n, c,
                       [&]<int order>(const auto* from, const auto& strides) {
                         const A value = value_at<order, lean>(from, strides, p);
                         result *= image.curves.at(n, c).slope(value);
                       });
  }
  return result;
}

// The unit of the integers in which an image's gradient is summed, chosen by its greatest
// derivative. Integer sums do not depend on the order of additions, so results repeat bit for bit
// although threads add in any order.
struct Unit {
  double scale;  // units per 1.0
  bool finite;

  // The bits of a sum of so many integers that one of them may take.
  static int bits_of(int64_t terms) {
    int headroom = 0;
    while ((int64_t{1} << headroom) < terms) ++headroom;
    return 61 - headroom;
  }
  // `largest`: bits of the greatest absolute derivative, which becomes an integer of `bits` bits.
  __device__ static Unit of(unsigned long long largest, int bits) {
    double value;
    static_assert(sizeof(value) == sizeof(largest));
    memcpy(&value, &largest, sizeof(value));
    int exponent = 0;
    frexp(value, &exponent);  // value < 2^exponent
    const int shift = bits - exponent;
    return {ldexp(1.0, shift < 1000 ? shift : 1000), value < INFINITY};
  }
};

template <typename T, typename A, int axes, int lean>
__global__ void find_largest(Movement<axes> m, Image<T, A, axes> image, Source<T, axes> grad,
                             unsigned long long* largest) {
  __shared__ Tile<A, axes, lean> tile;
  __shared__ unsigned long long in_block;
  if (threadIdx.x == 0 && threadIdx.y == 0) in_block = 0;
  set_up(m, tile, [](int64_t, int64_t) {});
  unsigned long long most = 0;
  const int64_t n = tile.image;
  march<1>(m, tile, [&](Pixel<A, axes>(&pixels)[1]) {
    Pixel<A, axes>& p = pixels[0];
    locate(m, tile, pixels);
    for (int c = 0; c < image.channels; ++c) {
      const double value = fabs(static_cast<double>(upstream(image, grad, n, c, tile, p)));
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

// Adds `g` units, times the weights of an interpolation, to the sums at the pixels that it read.
// `weight` and `at` are those of the axes before `axis`.
template <int order, int axis, typename A, int axes>
__device__ void scatter_along(const Pixel<A, axes>& p, const Weights<order, axes, A>& w, double g,
                              const Sides<axes>& sides, A weight, unsigned long long* at) {
  for (int i = 0; i < kTaps<order>; ++i) {
    const A product = axis == 0 ? w[axis][i] : weight * w[axis][i];
    const int64_t pixel = tap<order>(p.site[axis], i, static_cast<int32_t>(sides[axis] - 1));
    if constexpr (axis < axes - 1) {
      scatter_along<order, axis + 1>(p, w, g, sides, product, at + pixel * sides.step(axis));
    } else {
      // Negative numbers wrap around as unsigned integers, and so do their sums.
      const int64_t units = llrint(static_cast<double>(product) * g);
      atomicAdd(at + pixel, static_cast<unsigned long long>(units));
    }
  }
}

template <typename T, typename A, int axes, int lean>
__global__ void scatter(Movement<axes> m, Image<T, A, axes> image, Source<T, axes> grad,
                        const unsigned long long* largest, int bits, unsigned long long* sums) {
  __shared__ Tile<A, axes, lean> tile;
  __shared__ Unit unit;
  set_up(m, tile, [&](int64_t n, int64_t) { unit = Unit::of(largest[n], bits); });
  if (!unit.finite) return;
  const int64_t n = tile.image;
  march<1>(m, tile, [&](Pixel<A, axes>(&pixels)[1]) {
    Pixel<A, axes>& p = pixels[0];
    locate(m, tile, pixels);
    for (int c = 0; c < image.channels; ++c) {
      const double g = static_cast<double>(upstream(image, grad, n, c, tile, p)) * unit.scale;
      unsigned long long* const channel = sums + (n * image.channels + c) * m.input.pixels();
      with_order<lean>(image.orders, c, [&]<int order>() {
        Weights<order, axes, A> w;
        p.template weigh<order>(w);
        scatter_along<order, 0>(p, w, g, m.input, A(1), channel);
      });
    }
  });
}

// The sum at a pixel, from units; `values` sums belong to an image.
__device__ inline double sum_of(const unsigned long long* largest, int bits, int64_t values,
                                const unsigned long long* sums, int64_t i) {
  const Unit unit = Unit::of(largest[i / values], bits);
  return unit.finite ? static_cast<double>(static_cast<int64_t>(sums[i])) / unit.scale : kNoNumber;
}

// Converts sums from units to doubles, in place.
__global__ void to_doubles(const unsigned long long* largest, int bits, int64_t images,
                           int64_t values, unsigned long long* sums) {
  const int64_t i = thread_index();
  if (i >= images * values) return;
  const double value = sum_of(largest, bits, values, sums, i);
  memcpy(&sums[i], &value, sizeof(value));
}

// Applies the transposed prefilter along an axis to channels of order 3.
template <typename T, typename A, int axes>
__global__ void filter_transposed(Image<T, A, axes> image, int64_t images, Sides<axes> sides,
                                  int axis, double* sums) {
  const int64_t line = thread_index();
  const int64_t channel = line / sides.lines_along(axis);
  if (channel >= images * image.channels || image.orders.at(channel % image.channels) != 3) return;
  prefilter_transposed(sums + sides.first_of_line(axis, line), sides[axis], sides.step(axis));
}

// Stores sums, of doubles if `filtered` and else of units, as the gradient of an image.
template <typename T, int axes>
__global__ void store_gradient(const unsigned long long* largest, int bits, bool filtered,
                               const unsigned long long* sums, int64_t images, int64_t channels,
                               Sides<axes> sides, Strides<axes> to, T* out) {
  const int64_t i = thread_index();
  if (i >= images * channels * sides.pixels()) return;
  const int64_t channel = i / sides.pixels();
  double value;
  if (filtered) {
    memcpy(&value, &sums[i], sizeof(value));
  } else {
    value = sum_of(largest, bits, channels * sides.pixels(), sums, i);
  }
  out[channel / channels * to.image + channel % channels * to.channel +
      to.offset(sides.place_of(i % sides.pixels()))] = static_cast<T>(value);
}

// Writes the derivatives with respect to the position of each output pixel, (N, axes, output).
template <typename T, typename A, int axes, int lean>
__global__ void position_gradient(Movement<axes> m, Image<T, A, axes> image, Source<T, axes> grad,
                                  double* out) {
  __shared__ Tile<A, axes, lean> tile;
  set_up(m, tile, [](int64_t, int64_t) {});
  const int64_t n = tile.image;
  march<1>(m, tile, [&](Pixel<A, axes>(&pixels)[1]) {
    Pixel<A, axes>& p = pixels[0];
    int32_t place[axes];
    place_of(tile, p.row, place);
    int64_t index = 0;  // in the output
    for (int axis = 0; axis < axes; ++axis) index = index * m.output[axis] + place[axis];
    A along[axes];
    for (int axis = 0; axis < axes; ++axis) {
      along[axis] = fold_slope(site(p.local[axis], tile.anchor[axis]),
                               static_cast<int32_t>(m.input[axis] - 1), m.boundary);
    }
    locate(m, tile, pixels);
    double sums[axes] = {};
    for (int c = 0; c < image.channels && p.state == kRead; ++c) {
      const A g = upstream(image, grad, n, c, tile, p);
      with_channel<lean>(
          image, image.pixels.channel(n, c), n, c,
          [&]<int order>(const auto* from, const auto& strides) {
            if constexpr (order > 0) {
              const Around<order, lean, std::remove_cvref_t<decltype(*from)>, axes> values(
                  from, strides, p);
              Weights<order, axes, A> w, slopes;
              p.template weigh<order>(w);
              for (int axis = 0; axis < axes; ++axis)
                tap_slopes<order>(p.site[axis].t, slopes[axis]);
              for_axes<axes>([&]<int axis>() {
                sums[axis] += static_cast<double>(
                    g * along[axis] * interpolate<order, axes, axis>(w, slopes, values));
              });
            }
          });
    }
    double* const to = out + n * axes * m.output.pixels() + index;
    for (int axis = 0; axis < axes; ++axis) to[axis * m.output.pixels()] = sums[axis];
  });
}

// The pixels of an axis, [begin, end), that may depend on a coefficient of the field.
struct Reach {
  int64_t begin, end;

  __device__ static Reach of(const GridAxis& axis, int64_t coefficient, int64_t pixels,
                             double shift) {
    // Where a cell begins, up to the rounding.
    const auto pixel = [&](int64_t cell) {
      const double at = static_cast<double>(cell) / axis.scale - shift;
      return static_cast<int64_t>(fmin(fmax(at, 0.0), static_cast<double>(pixels)));
    };
    const int64_t begin = coefficient > 3 ? pixel(coefficient - 3) : 0;
    const int64_t end = coefficient < axis.cells - 1 ? pixel(coefficient + 1) + 2 : pixels;
    return {begin > 0 ? begin - 1 : 0, end < pixels ? end : pixels};
  }
};

// Sums derivatives along an axis, of pixels so far, into those with respect to the coefficients
// along it, in a fixed order: from (N, axes, .., output[axis], ..) to (N, axes, .., size, ..). The
// axes before it are coefficients already, those behind it pixels. A block makes `blockDim.x` of
// the `tiles` times that many results that lie side by side.
template <int axes, int axis>
__global__ void gather(Movement<axes> m, unsigned tiles, const double* from, double* out) {
  __shared__ double weights[kThreads], sums[kThreads];
  const GridAxis& along = m.field[axis];
  const unsigned size = static_cast<unsigned>(along.size());
  const unsigned line = blockIdx.x / tiles, outer = line / size, q = line - outer * size;
  unsigned of_image = axes;
  for (int before = 0; before < axis; ++before) of_image *= m.field[before].size();
  const double shift = m.motions[outer / of_image].shift[axis];
  const int64_t n = m.output[axis], step = m.output.step(axis);
  const int64_t column = static_cast<int64_t>(blockIdx.x - line * tiles) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const Reach reach = Reach::of(along, q, n, shift);
  double sum = 0;
  for (int64_t begin = reach.begin; begin < reach.end; begin += threads) {
    const int count = static_cast<int>(reach.end - begin < threads ? reach.end - begin : threads);
    if (thread < count) {
      const Spot<double> at = spot_of<double>(along, static_cast<double>(begin + thread) + shift);
      const int64_t k = q - at.cell;
      weights[thread] = k >= 0 && k < 4 ? cubic_weight(m.field.grid, static_cast<int>(k), at.t) : 0;
    }
    __syncthreads();
    const double* value = from + (outer * n + begin + threadIdx.y) * step + column;
    for (int i = threadIdx.y; i < count && column < step; i += blockDim.y) {
      sum += *value * weights[i];
      value += blockDim.y * step;
    }
    __syncthreads();
  }
  sums[thread] = sum;
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) sums[thread] += sums[thread + half * blockDim.x];
  }
  if (threadIdx.y == 0 && column < step) out[line * step + column] = sums[thread];
}

// The sum, over the coefficients that are made from a displacement at a place, of one component.
// `at` counts the coefficients before, along the axes before `axis`.
template <int axes, int axis = 0>
__device__ double sum_of_knot(const Movement<axes>& m, const Motion<axes>& motion, int component,
                              const Sides<axes>& place, const double* from, int64_t at = 0) {
  const int64_t size = m.field[axis].size();
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (source_point(m.field.grid, i, m.field.points[axis]) != place[axis]) continue;
    if constexpr (axis < axes - 1) {
      sum += sum_of_knot<axes, axis + 1>(m, motion, component, place, from,
                                         (at + i) * m.field[axis + 1].size());
    } else {
      sum += motion.moved_transposed(m.field.grid, component, from + at + i, m.component());
    }
  }
  return sum;
}

// The transpose of `prepare`: from coefficients back to displacements. One block per image.
template <int axes>
__global__ void collect(Movement<axes> m, const double* coefficients, double* out) {
  const Sides<axes>& points = m.field.points;
  const int64_t n = blockIdx.x;
  const double* const from = coefficients + n * axes * m.component();
  double* const to = out + n * axes * points.pixels();
  const Motion<axes> motion = m.motions[n];
  for (int64_t i = threadIdx.x; i < axes * points.pixels(); i += blockDim.x) {
    const int component = static_cast<int>(i / points.pixels());
    to[i] = sum_of_knot(m, motion, component, points.place_of(i % points.pixels()), from);
  }
  __syncthreads();
  for (int axis = 0; axis < axes && m.field.grid == kInterpolating; ++axis) {
    for (int64_t i = threadIdx.x; i < axes * points.lines_along(axis); i += blockDim.x) {
      prefilter_transposed(to + points.first_of_line(axis, i), points[axis], points.step(axis));
    }
    __syncthreads();
  }
}

/// Writes the derivative with respect to the image. `sums` has room for all values of the images,
/// and one more per image.
template <typename T, typename A, int axes, typename Stream>
void launch_image_gradient(const Movement<axes>& m, const Image<T, A, axes>& image,
                           const Source<T, axes>& grad, unsigned long long* sums,
                           const Strides<axes>& to, T* out, Stream stream) {
  const int64_t pixels = m.images * image.channels * m.input.pixels();
  unsigned long long* const largest = sums + pixels;
  launch(&clear<unsigned long long>, blocks_of(pixels + m.images), dim3(kThreads), stream, sums,
         pixels + m.images);
  const bool lean = lean_order(m, image, grad.strides) == 1;
  launch(lean ? &find_largest<T, A, axes, 1> : &find_largest<T, A, axes, kGeneral>, tiles(m),
         kTileThreads, stream, m, image, grad, largest);
  const int bits = Unit::bits_of(m.output.pixels());
  const auto* const found = static_cast<const unsigned long long*>(largest);
  launch(lean ? &scatter<T, A, axes, 1> : &scatter<T, A, axes, kGeneral>, tiles(m), kTileThreads,
         stream, m, image, grad, found, bits, sums);
  const bool filtered = image.any_smooth();
  if (filtered) {
    launch(&to_doubles, blocks_of(pixels), dim3(kThreads), stream, found, bits, m.images,
           pixels / m.images, sums);
  }
  for (int axis = 0; axis < axes && filtered; ++axis) {
    const int64_t lines = m.images * image.channels * m.input.lines_along(axis);
    launch(&filter_transposed<T, A, axes>, blocks_of(lines), dim3(kThreads), stream, image,
           m.images, m.input, axis, reinterpret_cast<double*>(sums));
  }
  launch(&store_gradient<T, axes>, blocks_of(pixels), dim3(kThreads), stream, found, bits, filtered,
         static_cast<const unsigned long long*>(sums), m.images, image.channels, m.input, to, out);
}

/// The number of values that `gather` begins with along an axis; along `axes`, what it ends with.
template <int axes>
int64_t gathered(const Movement<axes>& m, int axis) {
  int64_t result = axes * m.images;
  for (int i = 0; i < axes; ++i) result *= i < axis ? m.field[i].size() : m.output[i];
  return result;
}

/// Number of doubles in the scratch memory of launch_displacement_gradient.
template <int axes>
int64_t displacement_scratch(const Movement<axes>& m) {
  int64_t result = 0;
  for (int axis = 0; axis <= axes; ++axis) result += gathered(m, axis);
  return result;
}

// Gathers along all axes from `axis` on. Returns where the results are, behind `values`.
template <int axes, int axis = 0, typename Stream>
const double* launch_gather(const Movement<axes>& m, double* values, Stream stream) {
  double* const to = values + gathered(m, axis);
  const int64_t step = m.output.step(axis);
  // A block of at least a warp, in which a thread adds at least some values.
  int columns = 1, rows = 1;
  while (columns < step && columns < 2 * kWarp) columns *= 2;
  while (columns * rows < kWarp || (columns * rows < kThreads && 8 * rows < m.output[axis])) {
    rows *= 2;
  }
  const unsigned tiles = tiles_along(step, columns);
  launch(&gather<axes, axis>, dim3(static_cast<unsigned>(gathered(m, axis + 1) / step) * tiles),
         dim3(columns, rows), stream, m, tiles, static_cast<const double*>(values), to);
  if constexpr (axis + 1 < axes) return launch_gather<axes, axis + 1>(m, to, stream);
  return to;
}

/// Writes the derivative with respect to the displacement, (N, axes, points).
template <typename T, typename A, int axes, typename Stream>
void launch_displacement_gradient(const Movement<axes>& m, const Image<T, A, axes>& image,
                                  const Source<T, axes>& grad, double* scratch, double* out,
                                  Stream stream) {
  const bool lean = lean_order(m, image, grad.strides) == 1;
  launch(lean ? &position_gradient<T, A, axes, 1> : &position_gradient<T, A, axes, kGeneral>,
         tiles(m), kTileThreads, stream, m, image, grad, scratch);
  const double* const sums = launch_gather(m, scratch, stream);
  launch(&collect<axes>, dim3(static_cast<unsigned>(m.images)), dim3(kThreads), stream, m, sums,
         out);
}

}  // namespace unet_fast::elastic_deform
