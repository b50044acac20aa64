#pragma once

#include "common/cuda.cuh"
#include "elastic_deform/numerics.h"

namespace unet_fast::elastic_deform {

// A block covers kTile x kTile output pixels. A warp takes kTile columns side by side, and each
// thread kMarch rows of its column, along which the field stays one polynomial for long.
constexpr int kTile = 32;
constexpr int kMarch = 4;
constexpr int kMostChannels = 256;

// How a batch moves. All pointers are to device memory.
struct Movement {
  int64_t images;
  Sides input, output, points;
  GridAxis rows, columns;
  int32_t grid, boundary;
  bool spans_input;
  Values displacement, affine, offset;
  const int64_t* source;  // index of the image that each sample reads, or null for its own
  int64_t sources;        // number of images to read from
  Motion* motions;        // (images), made by launch_prepare
  double* coefficients;   // (images, 2, rows.size(), columns.size()), made by launch_prepare
  double* knots;          // scratch memory for the displacements

  __host__ __device__ int64_t component() const { return rows.size() * columns.size(); }
};

// Strided images: pixels, gradients or, for order 3, spline coefficients with a 1-pixel border.
template <typename T>
struct Source {
  const T* data;
  Strides strides;
};

// The interpolation order of each channel, 0, 1 or 3, in two bits.
struct Orders {
  uint64_t bits[kMostChannels / 32];

  void set(int64_t channel, int64_t order) {
    bits[channel / 32] |= static_cast<uint64_t>(order) << (2 * (channel % 32));
  }
  __host__ __device__ int at(int64_t channel) const {
    return static_cast<int>(bits[channel / 32] >> (2 * (channel % 32)) & 3);
  }
};

// The image, how it is interpolated, and the grey curves applied to its values.
template <typename T, typename A>
struct Image {
  Source<T> pixels;
  Source<A> smooth;  // spline coefficients, for channels of order 3
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
struct LabelWindow {
  const void* data;  // or null
  int64_t bytes;     // size of a label
  Strides strides;
  Sides window;
  void* out;  // (N, window)
};

// --- Preparation -------------------------------------------------------------------------------

// Makes the motion, the knots and the coefficients of each image; one block per image.
__global__ void prepare(Movement m) {
  const int64_t n = blockIdx.x;
  const int64_t points = m.points.pixels();
  double* const knots = m.knots + n * 2 * points;
  Motion motion = Motion::of(m.affine, m.offset, m.spans_input, n);
  motion.source = m.source != nullptr ? m.source[n] : n;
  assert(motion.source >= 0 && motion.source < m.sources);
  if (threadIdx.x == 0) m.motions[n] = motion;
  double* const coefficients = m.coefficients + n * 2 * m.component();
  if (!m.displacement) {  // the same for all threads
    for (int64_t i = threadIdx.x; i < 2 * m.component(); i += blockDim.x) coefficients[i] = 0;
    return;
  }
  for (int64_t i = threadIdx.x; i < 2 * points; i += blockDim.x) {
    knots[i] = m.displacement[n * 2 * points + i];
  }
  __syncthreads();
  if (m.grid == kInterpolating) {
    for (int64_t i = threadIdx.x; i < 2 * m.points.rows; i += blockDim.x) {
      prefilter(knots + i * m.points.columns, m.points.columns, 1);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < 2 * m.points.columns; i += blockDim.x) {
      prefilter(knots + i / m.points.columns * points + i % m.points.columns, m.points.rows,
                m.points.columns);
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < 2 * m.component(); i += blockDim.x) {
    const int64_t at = i % m.component();
    const int64_t from = knot_of(m.grid, at / m.columns.size(), at % m.columns.size(), m.points);
    coefficients[i] = motion.moved(m.grid, static_cast<int>(i / m.component()), knots[from],
                                   knots[points + from]);
  }
}

// Converts channels of order 3 to A, leaving room for a border, and filters them along columns.
template <typename T, typename A>
__global__ void filter_columns(Image<T, A> image, int64_t images, Sides sides, A* out) {
  const int64_t unit = thread_index();
  const int64_t plane = unit / sides.columns, x = unit % sides.columns;
  if (plane >= images * image.channels) return;
  const int64_t n = plane / image.channels, c = plane % image.channels;
  if (image.orders.at(c) != 3) return;
  const Strides& from = image.pixels.strides;
  const T* const source = image.pixels.data + n * from.image + c * from.channel + x * from.column;
  const Strides& to = image.smooth.strides;
  A* const line = out + n * to.image + c * to.channel + x;
  for (int64_t y = 0; y < sides.rows; ++y) {
    line[y * to.row] = static_cast<A>(source[y * from.row]);
  }
  prefilter(line, sides.rows, to.row);
}

// Filters channels of order 3 along rows, and fills the mirrored columns of the border.
template <typename T, typename A>
__global__ void filter_rows(Image<T, A> image, int64_t images, Sides sides, A* out) {
  const int64_t unit = thread_index();
  const int64_t plane = unit / sides.rows, y = unit % sides.rows;
  if (plane >= images * image.channels || image.orders.at(plane % image.channels) != 3) return;
  const Strides& to = image.smooth.strides;
  A* const line = out + plane * to.channel + y * to.row;
  prefilter(line, sides.columns, 1);
  line[-1] = line[sides.columns > 1 ? 1 : 0];
  line[sides.columns] = line[sides.columns > 1 ? sides.columns - 2 : 0];
}

// Fills the mirrored rows of the border of channels of order 3.
template <typename T, typename A>
__global__ void border_rows(Image<T, A> image, int64_t images, Sides sides, A* out) {
  const int64_t unit = thread_index();
  const int64_t width = sides.columns + 2;
  const int64_t plane = unit / width, x = unit % width - 1;
  if (plane >= images * image.channels || image.orders.at(plane % image.channels) != 3) return;
  const Strides& to = image.smooth.strides;
  A* const top = out + plane * to.channel + x;
  top[-to.row] = top[sides.rows > 1 ? to.row : 0];
  top[sides.rows * to.row] = top[(sides.rows > 1 ? sides.rows - 2 : 0) * to.row];
}

// --- Positions ---------------------------------------------------------------------------------

// Where a pixel lies on the grid along one axis.
template <typename A>
struct Place {
  int64_t cell;
  A t;
};

template <typename A>
__device__ Place<A> place(const GridAxis& axis, double pixel) {
  const double g = axis.coordinate(pixel);
  const int64_t cell = axis.cell(g);
  return {cell, static_cast<A>(g - static_cast<double>(cell))};
}

// One component of the field along a column, within one cell of the rows, less `origin`.
template <typename A>
__device__ Cubic<A> field_of(const Movement& m, int64_t image, int axis, int64_t cell,
                             const Place<A>& across, double origin) {
  const double* const c =
      m.coefficients + (image * 2 + axis) * m.component() + cell * m.columns.size() + across.cell;
  A along[4];
  for (int i = 0; i < 4; ++i) {
    const double* const four = c + i * m.columns.size();
    along[i] = cubic(m.grid, static_cast<A>(four[0] - origin), static_cast<A>(four[1] - origin),
                     static_cast<A>(four[2] - origin), static_cast<A>(four[3] - origin))(across.t);
  }
  return cubic(m.grid, along[0], along[1], along[2], along[3]);
}

// Data shared by the threads of a block.
template <typename A>
struct Tile {
  int64_t image, row, column;  // its image, and its first pixel in the output
  int64_t source;              // the image that is read
  int32_t anchor[2];
  double corner[2];              // the field at the first pixel
  A base[2], down[2], right[2];  // first position relative to the anchor, and its steps
  Place<A> rows[kTile], columns[kTile];
};

// Fills `tile`. Every thread of a block must call it before it looks at its own pixels.
template <typename A>
__device__ void set_up(const Movement& m, Tile<A>& tile) {
  const int64_t across = (m.output.columns + kTile - 1) / kTile;
  const int64_t down = (m.output.rows + kTile - 1) / kTile;
  const int64_t block = blockIdx.x;
  const int64_t image = block / (across * down);
  const int64_t row = block / across % down * kTile, column = block % across * kTile;
  const Motion& motion = m.motions[image];
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  if (thread < kTile) {
    tile.columns[thread] =
        place<A>(m.columns, static_cast<double>(column + thread) + motion.shift[1]);
  } else if (thread < 2 * kTile) {
    const int i = thread - kTile;
    tile.rows[i] = place<A>(m.rows, static_cast<double>(row + i) + motion.shift[0]);
  } else if (thread < 2 * kTile + 2) {
    const int axis = thread - 2 * kTile;
    const Place<double> across = place<double>(m.columns, column + motion.shift[1]);
    const Place<double> along = place<double>(m.rows, row + motion.shift[0]);
    const double field = field_of<double>(m, image, axis, along.cell, across, 0.0)(along.t);
    const double corner = std::fabs(field) < kFarthest ? field : 0.0;  // 0 for NaN
    const double first =
        motion.at(axis, static_cast<double>(row), static_cast<double>(column)) + corner;
    tile.corner[axis] = corner;
    tile.anchor[axis] = anchor_of(first);
    tile.base[axis] = static_cast<A>(first - tile.anchor[axis]);
    tile.down[axis] = static_cast<A>(motion.linear[axis][0]);
    tile.right[axis] = static_cast<A>(motion.linear[axis][1]);
  } else if (thread == 2 * kTile + 2) {
    tile.image = image;
    tile.source = motion.source;
    tile.row = row;
    tile.column = column;
  }
  __syncthreads();
}

// An output pixel. Holds the sites of its position first, then, once folded, those to read.
template <typename A>
struct Pixel {
  int64_t row, column;  // in the output
  Site<A> y, x;
  State state;

  __device__ void fold_into(Sides input, int32_t boundary) {
    const int32_t last_row = static_cast<int32_t>(input.rows - 1);
    const int32_t last_column = static_cast<int32_t>(input.columns - 1);
    const State of_row = state_of(y, last_row, boundary);
    const State of_column = state_of(x, last_column, boundary);
    state = of_row > of_column ? of_row : of_column;
    y = state == kRead ? fold(y, last_row, boundary) : Site<A>{0, 0};
    x = state == kRead ? fold(x, last_column, boundary) : Site<A>{0, 0};
  }
};

// Calls `work(image, pixel)` for the output pixels of this thread; the sites are not folded.
template <typename A, typename Work>
__device__ void march(const Movement& m, const Tile<A>& tile, Work&& work) {
  const int64_t column = tile.column + threadIdx.x;
  if (column >= m.output.columns) return;
  const Place<A> across = tile.columns[threadIdx.x];
  Cubic<A> field[2];
  int64_t cell = -1;
  for (int k = 0; k < kMarch; ++k) {
    const int local = static_cast<int>(threadIdx.y) * kMarch + k;
    const int64_t row = tile.row + local;
    if (row >= m.output.rows) return;
    const Place<A> down = tile.rows[local];
    if (down.cell != cell) {
      cell = down.cell;
      for (int axis = 0; axis < 2; ++axis) {
        field[axis] = field_of<A>(m, tile.image, axis, cell, across, tile.corner[axis]);
      }
    }
    const auto position = [&](int axis) {
      const A affine = tile.base[axis] + tile.down[axis] * static_cast<A>(local) +
                       tile.right[axis] * static_cast<A>(threadIdx.x);
      return site(affine + field[axis](down.t), tile.anchor[axis]);
    };
    work(tile.image, Pixel<A>{row, column, position(0), position(1), kRead});
  }
}

// --- Values ------------------------------------------------------------------------------------

// Calls `fn.operator()<order>()`.
template <typename Fn>
__device__ void with_order(int order, Fn&& fn) {
  if (order == 3) {
    fn.template operator()<3>();
  } else if (order == 1) {
    fn.template operator()<1>();
  } else {
    fn.template operator()<0>();
  }
}

// The values around a pixel of a plane, for `interpolate`.
template <int order, typename A, typename T>
struct Around {
  const T* from;
  int64_t down, right;

  __device__ Around(const T* plane, const Strides& strides, Sides sides, const Pixel<A>& p)
      : down(sides.rows > 1 ? strides.row : 0), right(sides.columns > 1 ? strides.column : 0) {
    const int32_t row = order == 0 ? nearest(p.y) : p.y.pixel;
    const int32_t column = order == 0 ? nearest(p.x) : p.x.pixel;
    from = plane + row * strides.row + column * strides.column - kBefore<order> * (down + right);
  }
  __device__ A operator()(int i, int j) const { return static_cast<A>(from[i * down + j * right]); }
};

// Calls `fn.operator()<order>(around)` with the order of a channel and the values around a pixel.
template <typename T, typename A, typename Fn>
__device__ void with_channel(const Image<T, A>& image, int64_t n, int64_t c, Sides sides,
                             const Pixel<A>& p, Fn&& fn) {
  with_order(image.orders.at(c), [&]<int order>() {
    if constexpr (order == 3) {
      const Strides& s = image.smooth.strides;
      const A* const plane = image.smooth.data + n * s.image + c * s.channel;
      fn.template operator()<order>(Around<order, A, A>(plane, s, sides, p));
    } else {
      const Strides& s = image.pixels.strides;
      const T* const plane = image.pixels.data + n * s.image + c * s.channel;
      fn.template operator()<order>(Around<order, A, T>(plane, s, sides, p));
    }
  });
}

// The value of a channel at a pixel, before the grey curve.
template <typename T, typename A>
__device__ A value_of(const Image<T, A>& image, int64_t n, int64_t c, Sides sides,
                      const Pixel<A>& p) {
  if (p.state == kLost) return static_cast<A>(kNoNumber);
  if (p.state == kOutside) return image.cval;
  A value = 0;
  with_channel(image, n, c, sides, p, [&]<int order>(const auto& around) {
    A y[kTaps<order>], x[kTaps<order>];
    tap_weights<order>(p.y.t, y);
    tap_weights<order>(p.x.t, x);
    value = interpolate<order>(y, x, around);
  });
  return value;
}

template <typename Id, typename A>
__device__ void take_label(const LabelWindow& labels, int64_t source, int64_t at, const Pixel<A>& p,
                           Sides sides) {
  const Id* const from = static_cast<const Id*>(labels.data) + source * labels.strides.image;
  static_cast<Id*>(labels.out)[at] =
      p.state == kRead ? Around<0, A, Id>(from, labels.strides, sides, p).from[0] : Id(0);
}

template <typename A>
__device__ void take_label(const LabelWindow& labels, int64_t source, int64_t n, const Pixel<A>& p,
                           Sides input, Sides output) {
  const Sides margin = margin_of(labels.window, output);
  const int64_t row = p.row - margin.rows, column = p.column - margin.columns;
  if (row < 0 || row >= labels.window.rows || column < 0 || column >= labels.window.columns) return;
  const int64_t at = (n * labels.window.rows + row) * labels.window.columns + column;
  switch (labels.bytes) {
    case 1:
      return take_label<int8_t>(labels, source, at, p, input);
    case 2:
      return take_label<int16_t>(labels, source, at, p, input);
    case 4:
      return take_label<int32_t>(labels, source, at, p, input);
    default:
      return take_label<int64_t>(labels, source, at, p, input);
  }
}

// Bytes per pixel: sizeof(T) for each channel and the label, read (mostly once, as neighbours share
// what they read) and written.
template <typename T, typename A>
__global__ void deform(Movement m, Image<T, A> image, Strides to, T* out, LabelWindow labels) {
  __shared__ Tile<A> tile;
  set_up(m, tile);
  march(m, tile, [&](int64_t n, Pixel<A> p) {
    p.fold_into(m.input, m.boundary);
    for (int64_t c = 0; c < image.channels; ++c) {
      A value = value_of(image, tile.source, c, m.input, p);
      if (image.curves) value = image.curves.at(n, c)(value);
      out[n * to.image + c * to.channel + p.row * to.row + p.column * to.column] = stored<T>(value);
    }
    if (labels.data != nullptr) take_label(labels, tile.source, n, p, m.input, m.output);
  });
}

// --- Launchers ---------------------------------------------------------------------------------

inline dim3 tiles(const Movement& m) {
  const int64_t across = (m.output.columns + kTile - 1) / kTile;
  const int64_t down = (m.output.rows + kTile - 1) / kTile;
  return dim3(static_cast<unsigned>(m.images * across * down));
}
inline const dim3 kTileThreads(kTile, kTile / kMarch);

/// Fills motions and coefficients and, unless `smooth` is null, the spline coefficients there,
/// which image.smooth points to.
template <typename T, typename A, typename Stream>
void launch_prepare(const Movement& m, const Image<T, A>& image, A* smooth, Stream stream) {
  launch(&prepare, dim3(static_cast<unsigned>(m.images)), dim3(kThreads), stream, m);
  if (smooth == nullptr) return;
  const int64_t planes = m.sources * image.channels;
  launch(&filter_columns<T, A>, blocks_of(planes * m.input.columns), dim3(kThreads), stream, image,
         m.sources, m.input, smooth);
  launch(&filter_rows<T, A>, blocks_of(planes * m.input.rows), dim3(kThreads), stream, image,
         m.sources, m.input, smooth);
  launch(&border_rows<T, A>, blocks_of(planes * (m.input.columns + 2)), dim3(kThreads), stream,
         image, m.sources, m.input, smooth);
}

/// Deforms images and labels; to be called after launch_prepare.
template <typename T, typename A, typename Stream>
void launch_deform(const Movement& m, const Image<T, A>& image, const Strides& to, T* out,
                   const LabelWindow& labels, Stream stream) {
  launch(&deform<T, A>, tiles(m), kTileThreads, stream, m, image, to, out, labels);
}

}  // namespace unet_fast::elastic_deform
