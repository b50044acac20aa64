#pragma once

#include "common/cuda.cuh"
#include "elastic_deform/numerics.h"

// What the kernels work on, and its preparation: motions, coefficients of the field and of splines.
namespace unet_fast::elastic_deform {

constexpr int kMostChannels = 256;

// How a batch moves. All pointers are to device memory.
template <int axes>
struct Movement {
  static constexpr int kDown = axes - 2, kAcross = axes - 1;  // the axes of a plane

  int64_t images;
  Sides<axes> input, output;
  GridAxes<axes> field;
  int32_t boundary;
  bool spans_input;
  Values displacement, affine, offset;
  const int64_t* source;  // index of the image that each sample reads, or null for its own
  int64_t sources;        // number of images to read from
  Motion<axes>* motions;  // (images), made by launch_prepare
  double* coefficients;   // (images, axes, field.sizes()), made by launch_prepare
  double* knots;          // scratch memory for the displacements
  double* planes;         // (images, planes, axes, rows, columns): coefficients of each plane

  // Output planes of an image.
  __host__ __device__ int64_t depth() const { return axes == 3 ? output[0] : 1; }
  // Numbers of coefficients of a component, and of one in a plane.
  __host__ __device__ int64_t component() const { return field.sizes().pixels(); }
  __host__ __device__ int64_t in_plane() const {
    return field[kDown].size() * field[kAcross].size();
  }
  // A coefficient of a component of the field in a plane, counted over all images.
  __device__ const double* coefficient(int64_t plane, int axis, int64_t down,
                                       int64_t across) const {
    return planes + (plane * axes + axis) * in_plane() + down * field[kAcross].size() + across;
  }
  // The doubles that `coefficients`, `knots` and `planes` need in one piece.
  static int64_t scratch(int64_t images, const GridAxes<axes>& field, const Sides<axes>& output) {
    const Sides<axes> sizes = field.sizes();
    const int64_t planes = axes == 3 ? output[0] * sizes.step(0) : 0;
    return images * axes * (sizes.pixels() + field.points.pixels() + planes);
  }
  void set_scratch(double* memory) {
    coefficients = memory;
    knots = coefficients + images * axes * component();
    planes = axes == 3 ? knots + images * axes * field.points.pixels() : coefficients;
  }
};

// Strided images, of stride 0 along axes of one pixel: pixels, gradients or, for order 3, spline
// coefficients with a 1-pixel border.
template <typename T, int axes>
struct Source {
  const T* data;
  Strides<axes> strides;

  __device__ const T* channel(int64_t image, int64_t c) const {
    return data + image * strides.image + c * strides.channel;
  }
};

// The interpolation order of each channel: 0, 1 or 3.
struct Orders {
  uint8_t of_channel[kMostChannels];

  void set(int64_t channel, int64_t order) { of_channel[channel] = static_cast<uint8_t>(order); }
  __host__ __device__ int at(int64_t channel) const { return of_channel[channel]; }
};

// The image, how it is interpolated, and the grey curves applied to its values.
template <typename T, typename A, int axes>
struct Image {
  Source<T, axes> pixels;
  Source<A, axes> smooth;  // spline coefficients, for channels of order 3
  int64_t channels;
  Orders orders;
  Curves<A> curves;
  A cval;

  bool any_smooth() const {
    for (int64_t c = 0; c < channels; ++c) {
      if (orders.at(c) == 3) return true;
    }
    return false;
  }
};

// Labels of any integer type, to be read for a window in the centre of the output.
template <int axes>
struct LabelWindow {
  const void* data;  // or null
  int64_t bytes;     // size of a label, or 0 without labels
  Strides<axes> strides;
  Sides<axes> window;
  void* out;             // (N, window)
  Sides<axes> margin{};  // of the output before the window; set by launch_deform
};

// --- Preparation -------------------------------------------------------------------------------

// So many displacements of an image are filtered in shared memory.
constexpr int kFewKnots = 1024;

// Makes the motion, the knots and the coefficients of each image; one block per image.
template <int axes>
__global__ void prepare(Movement<axes> m) {
  const int64_t n = blockIdx.x;
  const int32_t grid = m.field.grid;
  const Sides<axes>& points = m.field.points;
  const Sides<axes> sizes = m.field.sizes();
  __shared__ double few[kFewKnots];
  double* const knots =
      axes * points.pixels() <= kFewKnots ? few : m.knots + n * axes * points.pixels();
  Motion<axes> motion = Motion<axes>::of(m.affine, m.offset, m.spans_input, n);
  motion.source = m.source != nullptr ? m.source[n] : n;
  assert(motion.source >= 0 && motion.source < m.sources);
  if (threadIdx.x == 0) m.motions[n] = motion;
  double* const coefficients = m.coefficients + n * axes * sizes.pixels();
  if (!m.displacement) {  // the same for all threads
    for (int64_t i = threadIdx.x; i < axes * sizes.pixels(); i += blockDim.x) coefficients[i] = 0;
    return;
  }
  for (int64_t i = threadIdx.x; i < axes * points.pixels(); i += blockDim.x) {
    knots[i] = m.displacement[n * axes * points.pixels() + i];
  }
  __syncthreads();
  for (int axis = axes - 1; axis >= 0 && grid == kInterpolating; --axis) {
    for (int64_t i = threadIdx.x; i < axes * points.lines_along(axis); i += blockDim.x) {
      prefilter(knots + points.first_of_line(axis, i), points[axis], points.step(axis));
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < axes * sizes.pixels(); i += blockDim.x) {
    const int64_t from = m.field.knot_of(sizes.place_of(i % sizes.pixels()));
    const int axis = static_cast<int>(i / sizes.pixels());
    coefficients[i] = motion.moved(grid, axis, knots + from, points.pixels());
  }
}

// Where a pixel lies on the grid along one axis.
template <typename A>
struct Spot {
  int64_t cell;
  A t;
};

template <typename A>
__device__ Spot<A> spot_of(const GridAxis& axis, double pixel) {
  const double g = axis.coordinate(pixel);
  const int64_t cell = axis.cell(g);
  return {cell, static_cast<A>(g - static_cast<double>(cell))};
}

// Makes the coefficients of each output plane of volumes; one block per plane.
__global__ void evaluate_planes(Movement<3> m) {
  const int64_t n = blockIdx.x / m.depth(), z = blockIdx.x % m.depth();
  const Spot<double> at =
      spot_of<double>(m.field[0], static_cast<double>(z) + m.motions[n].shift[0]);
  const int64_t step = m.in_plane();
  double* const to = m.planes + blockIdx.x * 3 * step;
  for (int64_t i = threadIdx.x; i < 3 * step; i += blockDim.x) {
    const double* const c =
        m.coefficients + (n * 3 + i / step) * m.component() + at.cell * step + i % step;
    to[i] = cubic(m.field.grid, c[0], c[step], c[2 * step], c[3 * step])(at.t);
  }
}

/// Strides of spline coefficients; 0 along an axis of one pixel, whose value counts everywhere.
template <int axes>
Strides<axes> coefficient_strides(const Sides<axes>& sides, int64_t channels) {
  Strides<axes> result = smooth_strides(sides, channels);
  for (int axis = 0; axis < axes; ++axis) {
    if (sides[axis] == 1) result.along[axis] = 0;
  }
  return result;
}

// Copies what lies one step inside the ends of a line of n values to one step outside.
template <typename A>
__device__ void mirror_ends(A* x, int64_t n, int64_t step) {
  x[-step] = x[n > 1 ? step : 0];
  x[n * step] = x[(n > 1 ? n - 2 : 0) * step];
}

// Filters channels of order 3 along an axis. Along the first, converts them to A first, leaving
// room for a border; along the last, fills the mirrored ends of the lines.
template <typename T, typename A, int axes>
__global__ void filter(Image<T, A, axes> image, int64_t images, Sides<axes> sides, int axis,
                       A* out) {
  const int64_t unit = thread_index();
  const int64_t lines = sides.lines_along(axis), n = sides[axis];
  const int64_t plane = unit / lines, c = plane % image.channels;
  if (plane >= images * image.channels || image.orders.at(c) != 3) return;
  const Sides<axes> place = sides.place_of(sides.first_of_line(axis, unit % lines));
  const Strides<axes>&from = image.pixels.strides, &to = image.smooth.strides;
  const int64_t step = to.along[axis];
  A* const line = out + plane * to.channel + to.offset(place);
  if (axis == 0) {
    const T* const source = image.pixels.data + plane / image.channels * from.image +
                            c * from.channel + from.offset(place);
    for (int64_t i = 0; i < n; ++i) line[i * step] = static_cast<A>(source[i * from.along[0]]);
  }
  prefilter(line, n, step);
  if (axis == axes - 1) mirror_ends(line, n, step);
}

// Fills the mirrored border of channels of order 3 along an axis, between the borders of the axes
// behind it.
template <typename T, typename A, int axes>
__global__ void border(Image<T, A, axes> image, int64_t images, Sides<axes> sides, int axis,
                       A* out) {
  const Strides<axes>& to = image.smooth.strides;
  int64_t rest = thread_index(), at = 0;
  for (int i = axes - 1; i >= 0; --i) {
    if (i == axis) continue;
    const int64_t side = sides[i] + (i > axis ? 2 : 0);
    at += (rest % side - (i > axis ? 1 : 0)) * to.along[i];
    rest /= side;
  }
  if (rest >= images * image.channels || image.orders.at(rest % image.channels) != 3) return;
  mirror_ends(out + rest * to.channel + at, sides[axis], to.along[axis]);
}

/// Fills motions and coefficients and, unless `smooth` is null, the spline coefficients there,
/// which image.smooth points to.
template <typename T, typename A, int axes, typename Stream>
void launch_prepare(const Movement<axes>& m, const Image<T, A, axes>& image, A* smooth,
                    Stream stream) {
  launch(&prepare<axes>, dim3(static_cast<unsigned>(m.images)), dim3(kThreads), stream, m);
  if constexpr (axes == 3) {
    launch(&evaluate_planes, dim3(static_cast<unsigned>(m.images * m.depth())), dim3(kThreads),
           stream, m);
  }
  if (smooth == nullptr) return;
  const int64_t channels = m.sources * image.channels;
  for (int axis = 0; axis < axes; ++axis) {
    launch(&filter<T, A, axes>, blocks_of(channels * m.input.lines_along(axis)), dim3(kThreads),
           stream, image, m.sources, m.input, axis, smooth);
  }
  for (int axis = axes - 2; axis >= 0; --axis) {
    int64_t lines = channels;
    for (int i = 0; i < axes; ++i) lines *= i == axis ? 1 : m.input[i] + (i > axis ? 2 : 0);
    launch(&border<T, A, axes>, blocks_of(lines), dim3(kThreads), stream, image, m.sources, m.input,
           axis, smooth);
  }
}

}  // namespace unet_fast::elastic_deform
