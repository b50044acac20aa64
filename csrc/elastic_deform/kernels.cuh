#pragma once

#include "elastic_deform/prepare.cuh"

// CUDA kernels and launchers of the deformation.
namespace unet_fast::elastic_deform {

// A block covers kHigh x kWide output pixels of a plane, which is an image or, in a volume, one
// place along the first axis. A warp takes kWide columns side by side, and each thread kMarch rows
// of its column, along which the field stays one polynomial for long.
constexpr int kWide = kWarp;
constexpr int kMarch = 8;
constexpr int kWarps = 8;
constexpr int kHigh = kMarch * kWarps;

// Kernels come in two kinds. The lean ones, for usual calls, interpolate all channels with one
// order, 0 or 1, hold the field of a tile in shared memory, and count pixels from the start of
// their channel in 32 bits; the general ones take any call. lean_order() chooses.
constexpr int kGeneral = -1;
// Blocks that a multiprocessor should hold at once, to hide how long memory takes. Those before
// compute capability 8 hold four at most.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kLeanBlocks = 4;
#else
constexpr int kLeanBlocks = 5;
#endif
template <typename A, int axes, int lean>
constexpr int kBlocks = sizeof(A) > 4 || axes > 2 ? 1
                        : lean == kGeneral        ? 3
                                                  : kLeanBlocks;
// Over a lean tile the field has at most kWindow coefficients along each axis.
constexpr int kWindow = kWarps;
template <int lean>
using Offset = std::conditional_t<lean == kGeneral, int64_t, int32_t>;

__host__ __device__ inline unsigned tiles_along(int64_t side, int tile) {
  return static_cast<unsigned>((side + tile - 1) / tile);
}

// --- Positions ---------------------------------------------------------------------------------

// Data shared by the threads of a block.
template <typename A, int axes, int lean>
struct Tile {
  struct Mark {
    int32_t cell;  // counted from that of the first pixel
    A t;
  };
  static constexpr int kHeld = lean == kGeneral ? 1 : kWindow;

  int64_t image, plane;  // its plane, counted over all images
  int32_t place[axes];   // its first pixel in the output
  int64_t cell[2];       // of that pixel, down and across
  double origin[axes];   // the field near it
  int32_t anchor[axes];
  A base[axes], down[axes], right[axes];  // first position less anchor and field, and its steps
  Mark rows[kHigh], columns[kWide];
  // If lean, the coefficients less origin, and the field along their rows.
  A window[axes][kHeld][kWindow], along[axes][kHeld][kWide];

  // A component of the field, less its origin, down a column of the tile within a cell.
  __device__ Cubic<A> field(const Movement<axes>& m, int axis, int32_t down, int column) const {
    A c[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (lean != kGeneral) {
        c[i] = along[axis][down + i][column];
      } else {
        const Mark at = columns[column];
        const double* const four =
            m.coefficient(plane, axis, cell[0] + down + i, cell[1] + at.cell);
        const auto less = [&](int k) { return static_cast<A>(four[k] - origin[axis]); };
        c[i] = cubic(m.field.grid, less(0), less(1), less(2), less(3))(at.t);
      }
    }
    return cubic(m.field.grid, c[0], c[1], c[2], c[3]);
  }
};

// Fills `tile`. Every thread of a block must call it before it looks at its own pixels.
// Calls `start(image, source)` in one of them.
template <typename A, int axes, int lean, typename Start>
__device__ void set_up(const Movement<axes>& m, Tile<A, axes, lean>& tile, Start&& start) {
  constexpr int kDown = axes - 2, kAcross = axes - 1;
  const int thread = static_cast<int>(threadIdx.y * kWide + threadIdx.x);
  if (thread < kWide + kHigh) {
    const unsigned across = tiles_along(m.output[kAcross], kWide);
    const unsigned down = tiles_along(m.output[kDown], kHigh);
    const unsigned row = blockIdx.x / across, plane = row / down;
    const int64_t image = plane / m.depth();
    const Motion<axes>& motion = m.motions[image];
    int32_t place[axes];
    place[0] = plane - image * m.depth();
    place[kDown] = (row - plane * down) * kHigh;
    place[kAcross] = (blockIdx.x - row * across) * kWide;
    const bool is_row = thread >= kWide;
    const int axis = is_row ? kDown : kAcross, i = is_row ? thread - kWide : thread;
    const GridAxis& along = m.field[axis];
    const auto pixel = [&](int k) {
      return static_cast<double>(place[axis] + k) + motion.shift[axis];
    };
    const int64_t first = along.cell(along.coordinate(pixel(0)));
    const Spot<A> spot = spot_of<A>(along, pixel(i));
    (is_row ? tile.rows : tile.columns)[i] = {static_cast<int32_t>(spot.cell - first), spot.t};
    if (i == 0) tile.cell[is_row ? 0 : 1] = first;
    if (thread == 0) {
      tile.image = image;
      tile.plane = plane;
      start(image, motion.source);
      for (int axis = 0; axis < axes; ++axis) tile.place[axis] = place[axis];
    }
  }
  __syncthreads();
  const auto origin_of = [&](int axis) {
    const double field = *m.coefficient(tile.plane, axis, tile.cell[0] + 1, tile.cell[1] + 1);
    return std::fabs(field) < kFarthest ? field : 0.0;  // 0 for NaN
  };
  if (thread >= kWide * kWarps - axes) {
    const int axis = kWide * kWarps - 1 - thread;
    const Motion<axes>& motion = m.motions[tile.image];
    tile.origin[axis] = origin_of(axis);
    const double first = motion.at(axis, tile.place) + tile.origin[axis];
    tile.anchor[axis] = anchor_of(first);
    tile.base[axis] = static_cast<A>(first - tile.anchor[axis]);
    tile.down[axis] = static_cast<A>(motion.linear[axis][kDown]);
    tile.right[axis] = static_cast<A>(motion.linear[axis][kAcross]);
  }
  if constexpr (lean != kGeneral) {
    if (thread < axes * kWindow * kWindow) {
      const int axis = thread / (kWindow * kWindow);
      const int row = thread / kWindow % kWindow, column = thread % kWindow;
      const int64_t down = tile.cell[0] + row, right = tile.cell[1] + column;
      if (down < m.field[kDown].size() && right < m.field[kAcross].size()) {
        tile.window[axis][row][column] =
            static_cast<A>(*m.coefficient(tile.plane, axis, down, right) - origin_of(axis));
      }
    }
    __syncthreads();
    const int row = threadIdx.y;  // of coefficients
    if (row < tile.rows[kHigh - 1].cell + 4) {
      const auto at = tile.columns[threadIdx.x];
      for (int axis = 0; axis < axes; ++axis) {
        const A* const c = tile.window[axis][row] + at.cell;
        tile.along[axis][row][threadIdx.x] = cubic(m.field.grid, c[0], c[1], c[2], c[3])(at.t);
      }
    }
  }
  __syncthreads();
}

// An output pixel. Holds the sites of its position first, then, once folded, those to read.
template <typename A, int axes>
struct Pixel {
  int32_t place[axes];  // in the output
  Site<A> site[axes];
  int state;  // a State

  __device__ void fold_into(const Sides<axes>& input, int32_t boundary) {
    bool whole = true;  // as most are: all that is read lies in the image
    for (int axis = 0; axis < axes; ++axis) {
      whole &= static_cast<uint32_t>(site[axis].pixel) < static_cast<uint32_t>(input[axis] - 1);
    }
    state = kRead;
    if (whole) [[likely]]
      return;
    for (int axis = 0; axis < axes; ++axis) {
      const int along = state_of(site[axis], static_cast<int32_t>(input[axis] - 1), boundary);
      state = along > state ? along : state;
    }
    for (int axis = 0; axis < axes; ++axis) {
      const int32_t last = static_cast<int32_t>(input[axis] - 1);
      site[axis] = state == kRead ? fold(site[axis], last, boundary) : Site<A>{0, 0};
    }
  }
  template <int order>
  __device__ void weigh(Weights<order, axes, A>& w) const {
    for (int axis = 0; axis < axes; ++axis) tap_weights<order>(site[axis].t, w[axis]);
  }
};

// Calls `work(pixels)` for the output pixels of this thread, `together` in a column at a time, the
// first of them in the output; the sites are not folded.
template <int together, typename A, int axes, int lean, typename Work>
__device__ void march(const Movement<axes>& m, const Tile<A, axes, lean>& tile, Work&& work) {
  constexpr int kDown = axes - 2, kAcross = axes - 1;
  const int rows = static_cast<int>(m.output[kDown] - tile.place[kDown]);
  const int column = static_cast<int>(threadIdx.x);
  if (column >= m.output[kAcross] - tile.place[kAcross]) return;
  A start[axes];
  int32_t anchor[axes];
  for (int axis = 0; axis < axes; ++axis) {
    start[axis] = tile.base[axis] + tile.right[axis] * static_cast<A>(column);
    anchor[axis] = tile.anchor[axis];
  }
  Cubic<A> field[axes];
  int32_t cell = -1;
  for (int k = 0; k < kMarch; k += together) {
    const int first = static_cast<int>(threadIdx.y) * kMarch + k;
    if (first >= rows) return;
    Pixel<A, axes> pixels[together];
    for (int j = 0; j < together; ++j) {
      const int row = first + j;
      const auto down = tile.rows[row];
      if (down.cell != cell) {
        cell = down.cell;
        for (int axis = 0; axis < axes; ++axis) {
          field[axis] = tile.field(m, axis, cell, column);
        }
      }
      Pixel<A, axes>& pixel = pixels[j];
      for (int axis = 0; axis < axes; ++axis) pixel.place[axis] = tile.place[axis];
      pixel.place[kDown] += row;
      pixel.place[kAcross] += column;
      for (int axis = 0; axis < axes; ++axis) {
        const A affine = start[axis] + tile.down[axis] * static_cast<A>(row);
        pixel.site[axis] = site(affine + field[axis](down.t), anchor[axis]);
      }
    }
    work(pixels);
  }
}

// --- Values ------------------------------------------------------------------------------------

// Calls `fn.operator()<order>()` with the order of a channel.
template <int lean, typename Fn>
__device__ void with_order(const Orders& orders, int c, Fn&& fn) {
  if constexpr (lean != kGeneral) {
    fn.template operator()<lean>();
  } else if (orders.at(c) == 3) {
    fn.template operator()<3>();
  } else if (orders.at(c) == 1) {
    fn.template operator()<1>();
  } else {
    fn.template operator()<0>();
  }
}

// Elements between neighbours along an axis; in lean kernels the pixels of a line lie side by side.
template <int lean, int axes>
__device__ Offset<lean> step_of(const Strides<axes>& strides, int axis) {
  return lean != kGeneral && axis == axes - 1 ? 1 : static_cast<Offset<lean>>(strides.along[axis]);
}

// The distance of a place from the first pixel of its channel.
template <int lean, int axes>
__device__ Offset<lean> offset_of(const Strides<axes>& strides, const int32_t (&place)[axes]) {
  Offset<lean> result = 0;
  for (int axis = 0; axis < axes; ++axis) result += place[axis] * step_of<lean>(strides, axis);
  return result;
}

// The values around a pixel of a channel, for `interpolate`.
template <int order, int lean, typename T, int axes>
struct Around {
  const T* from;
  Offset<lean> step[axes];

  template <typename A>
  __device__ Around(const T* channel, const Strides<axes>& strides, const Pixel<A, axes>& p) {
    int32_t first[axes];
    for (int axis = 0; axis < axes; ++axis) {
      first[axis] = order == 0 ? nearest(p.site[axis]) : p.site[axis].pixel - kBefore<order>;
      step[axis] = step_of<lean>(strides, axis);
    }
    from = channel + offset_of<lean>(strides, first);
  }
  template <typename... Places>
  __device__ T operator()(Places... places) const {
    const int at[]{places...};
    const T* value = from;
    for (int axis = 0; axis < axes; ++axis) value += at[axis] * step[axis];
    return *value;
  }
};

// What a channel has at the site of a pixel.
template <int order, int lean, typename T, typename A, int axes>
__device__ A value_at(const T* channel, const Strides<axes>& strides, const Pixel<A, axes>& p) {
  Weights<order, axes, A> w;
  p.template weigh<order>(w);
  const Around<order, lean, T, axes> values(channel, strides, p);
  return interpolate<order, axes>(
      w, w, [&](auto... places) { return static_cast<A>(values(places...)); });
}

// Calls `fn.operator()<order>(channel, strides)` with the order of a channel and what it reads:
// `pixels`, a channel of image `n`, or spline coefficients.
template <int lean, typename T, typename A, int axes, typename Fn>
__device__ void with_channel(const Image<T, A, axes>& image, const T* pixels, int64_t n, int c,
                             Fn&& fn) {
  with_order<lean>(image.orders, c, [&]<int order>() {
    if constexpr (order == 3) {
      fn.template operator()<order>(image.smooth.channel(n, c), image.smooth.strides);
    } else {
      fn.template operator()<order>(pixels, image.pixels.strides);
    }
  });
}

// Calls `fn.operator()<Id>()` with an integer type of so many bytes; not for 0 bytes.
template <typename Fn>
__device__ void with_width(int64_t bytes, Fn&& fn) {
  const int width = static_cast<int>(bytes);
  if (width & 4) {
    fn.template operator()<uint32_t>();
  } else if (width & 8) {
    fn.template operator()<uint64_t>();
  } else if (width & 2) {
    fn.template operator()<uint16_t>();
  } else if (width & 1) {
    fn.template operator()<uint8_t>();
  }
}

// What lies some bytes behind the start of an array.
template <typename T>
__device__ T* behind(std::conditional_t<std::is_const_v<T>, const void, void>* start,
                     int64_t bytes) {
  using Char = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(static_cast<Char*>(start) + bytes);
}

// Bytes per pixel: sizeof(T) for each channel and the label, read (mostly once, as neighbours share
// what they read) and written.
template <typename T, typename A, int axes, int lean>
__global__ void __launch_bounds__(kWide* kWarps, kBlocks<A, axes, lean>)
    deform(Movement<axes> m, Image<T, A, axes> image, Strides<axes> to, T* out,
           LabelWindow<axes> labels) {
  __shared__ Tile<A, axes, lean> tile;
  // Where this image and its labels start; from memory, so that the loop does not compute it anew.
  __shared__ int64_t starts[5];
  set_up(m, tile, [&](int64_t n, int64_t source) {
    starts[0] = source;
    starts[1] = source * image.pixels.strides.image * sizeof(T);
    starts[2] = n * to.image * sizeof(T);
    starts[3] = source * labels.strides.image * labels.bytes;
    starts[4] = n * labels.window.pixels() * labels.bytes;
  });
  const int64_t source = starts[0];
  const auto* const from = behind<const T>(image.pixels.data, starts[1]);
  auto* const made = behind<T>(out, starts[2]);
  const auto* const ids = behind<const char>(labels.data, starts[3]);
  auto* const moved = behind<char>(labels.out, starts[4]);
  // What is read waits for memory: labels, and values of two pixels, do so at the same time.
  constexpr int kPair = 2;
  march<kPair>(m, tile, [&](Pixel<A, axes>(&pixels)[kPair]) {
    for (auto& p : pixels) p.fold_into(m.input, m.boundary);
    bool all_read = true;
    for (const auto& p : pixels) all_read &= p.state == kRead;
    uint64_t id[kPair];
    with_width(labels.bytes, [&]<typename Id>() {
      for (int j = 0; j < kPair; ++j) {
        const auto* const channel = reinterpret_cast<const Id*>(ids);
        id[j] = *Around<0, lean, Id, axes>(channel, labels.strides, pixels[j]).from;
      }
    });
    const auto take = [&](int c) {
      A values[kPair];
      const T* const channel = from + c * static_cast<Offset<lean>>(image.pixels.strides.channel);
      with_channel<lean>(image, channel, source, c,
                         [&]<int order>(const auto* of, const auto& strides) {
                           for (int j = 0; j < kPair; ++j)
                             values[j] = value_at<order, lean>(of, strides, pixels[j]);
                         });
      if (!all_read) [[unlikely]] {
        for (int j = 0; j < kPair; ++j) {
          if (pixels[j].state != kRead)
            values[j] = pixels[j].state == kOutside ? image.cval : static_cast<A>(kNoNumber);
        }
      }
      if (image.curves) {
        for (A& value : values) value = image.curves.at(tile.image, c)(value);
      }
      T* const to_channel = made + c * static_cast<Offset<lean>>(to.channel);
      for (int j = 0; j < kPair; ++j) {
        if (pixels[j].place[axes - 2] < static_cast<int32_t>(m.output[axes - 2])) {
          to_channel[offset_of<lean>(to, pixels[j].place)] = stored<T>(values[j]);
        }
      }
    };
    if (static_cast<int>(image.channels) == 1) {
      take(0);  // without a loop
    } else {
      for (int c = 0; c < image.channels; ++c) take(c);
    }
    with_width(labels.bytes, [&]<typename Id>() {
      for (int j = 0; j < kPair; ++j) {
        bool taken = true;
        Offset<lean> at = 0;
        for (int axis = 0; axis < axes; ++axis) {
          const auto place = pixels[j].place[axis] - static_cast<int32_t>(labels.margin[axis]);
          const auto side = static_cast<int32_t>(labels.window[axis]);
          taken &= static_cast<uint32_t>(place) < static_cast<uint32_t>(side);
          at = at * side + place;
        }
        if (!all_read && pixels[j].state != kRead) id[j] = 0;
        if (taken) reinterpret_cast<Id*>(moved)[at] = static_cast<Id>(id[j]);
      }
    });
  });
}

// --- Launchers ---------------------------------------------------------------------------------

template <int axes>
dim3 tiles(const Movement<axes>& m) {
  return dim3(static_cast<unsigned>(m.images * m.depth()) * tiles_along(m.output[axes - 2], kHigh) *
              tiles_along(m.output[axes - 1], kWide));
}
inline const dim3 kTileThreads(kWide, kWarps);

// Whether the lines of images are contiguous, and the pixels of a channel less than 2^31 elements
// from its first one, as the channel behind it.
template <int axes>
bool is_near(const Strides<axes>& strides, const Sides<axes>& sides) {
  double farthest = 0;
  for (int axis = 0; axis < axes; ++axis) {
    farthest += static_cast<double>(sides[axis]) * static_cast<double>(strides.along[axis]);
  }
  return strides.along[axes - 1] == 1 && farthest < INT32_MAX && strides.channel < INT32_MAX;
}

// The order of the lean kernels, if they can work on an image and what is made of it, or kGeneral.
template <typename T, typename A, int axes>
int lean_order(const Movement<axes>& m, const Image<T, A, axes>& image, const Strides<axes>& made) {
  const int order = image.orders.at(0);
  for (int c = 1; c < image.channels; ++c) {
    if (image.orders.at(c) != order) return kGeneral;
  }
  const bool lean = order < 3 && kWide * m.field[axes - 1].scale <= kWindow - 4 &&
                    kHigh * m.field[axes - 2].scale <= kWindow - 4 &&
                    is_near(image.pixels.strides, m.input) && is_near(made, m.output);
  return lean ? order : kGeneral;
}

/// Deforms images and labels; to be called after launch_prepare.
template <typename T, typename A, int axes, typename Stream>
void launch_deform(const Movement<axes>& m, const Image<T, A, axes>& image, const Strides<axes>& to,
                   T* out, LabelWindow<axes> labels, Stream stream) {
  labels.margin = margin_of(labels.window, m.output);
  const bool near = labels.bytes == 0 || is_near(labels.strides, m.input);
  const int lean = near ? lean_order(m, image, to) : kGeneral;
  launch(lean == 1   ? &deform<T, A, axes, 1>
         : lean == 0 ? &deform<T, A, axes, 0>
                     : &deform<T, A, axes, kGeneral>,
         tiles(m), kTileThreads, stream, m, image, to, out, labels);
}

}  // namespace unet_fast::elastic_deform
