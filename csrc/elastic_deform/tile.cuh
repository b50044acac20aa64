#pragma once

#include "elastic_deform/prepare.cuh"

// Where the pixels of a block's tile read: part of kernels.cuh, and of backward.cuh.
namespace unet_fast::elastic_deform {

// A block covers kHigh x kWide output pixels of a plane, which is an image or, in a volume, one
// place along the first axis. A warp takes kWide columns side by side, and each thread kMarch rows
// of its column, along which the field stays one polynomial for long.
constexpr int kWide = kWarp;
constexpr int kMarch = 16;
constexpr int kWarps = 4;
constexpr int kHigh = kMarch * kWarps;

// Kernels come in two kinds. The lean ones, for usual calls, interpolate all channels with one
// order, 0 or 1, hold the field of a tile in shared memory, and count pixels from the start of
// their channel in 32 bits; the general ones take any call. lean_order() chooses.
constexpr int kGeneral = -1;
// Blocks that a multiprocessor should hold at once, to hide how long memory takes. Those before
// compute capability 8 hold four at most.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kLeanBlocks = 8;
#else
constexpr int kLeanBlocks = 9;
#endif
template <typename A, int axes, int lean>
constexpr int kBlocks = sizeof(A) > 4 || axes > 2 ? 2
                        : lean == kGeneral        ? 6
                                                  : kLeanBlocks;
// Over a lean tile the field has at most kWindow coefficients along each axis.
constexpr int kWindow = 8;
// The difference of two integers below this is exact in float.
constexpr int32_t kExact = 1 << 23;
template <int lean>
using Offset = std::conditional_t<lean == kGeneral, int64_t, int32_t>;

__host__ __device__ inline unsigned tiles_along(int64_t side, int tile) {
  return static_cast<unsigned>((side + tile - 1) / tile);
}

// Data shared by the threads of a block.
template <typename A, int axes, int lean>
struct Tile {
  struct Mark {
    int32_t cell;
    A t;
  };
  static constexpr int kHeld = lean == kGeneral ? 1 : kWindow;

  int64_t image, plane;  // its plane, counted over all images
  int32_t place[axes];   // its first pixel in the output
  double origin[axes];   // the field near it
  int32_t anchor[axes];
  A base[axes], down[axes], right[axes];  // first position less anchor and field, and its steps
  A low[axes], high[axes];  // the ends of the input less anchor; low is infinite if not exact
  Mark rows[kHigh], columns[kWide];
  // If lean, the coefficients less origin, and the field along their rows.
  A window[axes][kHeld][kWindow], along[axes][kHeld][kWide];

  // A component of the field, less its origin, down a column of the tile within a cell.
  __device__ Cubic<A> field(const Movement<axes>& m, int axis, int32_t down, int column) const {
    A c[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (lean != kGeneral) {
        c[i] = along[axis][down - rows[0].cell + i][column];
      } else {
        const Mark at = columns[column];
        const double* const four = m.coefficient(plane, axis, down + i, at.cell);
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
    const double pixel = static_cast<double>(place[axis] + i) + motion.shift[axis];
    const Spot<A> spot = spot_of<A>(m.field[axis], pixel);
    (is_row ? tile.rows : tile.columns)[i] = {static_cast<int32_t>(spot.cell), spot.t};
    if (thread == 0) {
      tile.image = image;
      tile.plane = plane;
      start(image, motion.source);
      for (int axis = 0; axis < axes; ++axis) tile.place[axis] = place[axis];
    }
  }
  __syncthreads();
  const int32_t first_row = tile.rows[0].cell, first_column = tile.columns[0].cell;
  const auto origin_of = [&](int axis) {
    const double field = *m.coefficient(tile.plane, axis, first_row + 1, first_column + 1);
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
    const int32_t anchor = tile.anchor[axis], last = static_cast<int32_t>(m.input[axis] - 1);
    const bool exact = anchor > -kExact && anchor < kExact && last < kExact;
    tile.low[axis] = exact ? -static_cast<A>(anchor) : static_cast<A>(INFINITY);
    tile.high[axis] = static_cast<A>(last - anchor);
  }
  if constexpr (lean != kGeneral) {
    for (int i = thread; i < axes * kWindow * kWindow; i += kWide * kWarps) {
      const int axis = i / (kWindow * kWindow);
      const int row = i / kWindow % kWindow, column = i % kWindow;
      const int64_t down = first_row + row, right = first_column + column;
      if (down < m.field[kDown].size() && right < m.field[kAcross].size()) {
        tile.window[axis][row][column] =
            static_cast<A>(*m.coefficient(tile.plane, axis, down, right) - origin_of(axis));
      }
    }
    __syncthreads();
    const auto at = tile.columns[threadIdx.x];
    const int rows = tile.rows[kHigh - 1].cell - first_row + 4;  // of coefficients
    for (int row = threadIdx.y; row < rows; row += kWarps) {
      for (int axis = 0; axis < axes; ++axis) {
        const A* const c = tile.window[axis][row] + at.cell - first_column;
        tile.along[axis][row][threadIdx.x] = cubic(m.field.grid, c[0], c[1], c[2], c[3])(at.t);
      }
    }
  }
  __syncthreads();
}

// An output pixel.
template <typename A, int axes>
struct Pixel {
  int row;             // in the tile
  A local[axes];       // its position in the input less the tile's anchor
  Site<A> site[axes];  // what to read; set by `locate`
  int state;           // a State

  template <int order>
  __device__ void weigh(Weights<order, axes, A>& w) const {
    for (int axis = 0; axis < axes; ++axis) tap_weights<order>(site[axis].t, w[axis]);
  }
};

// Finds what pixels read. In most, all of it lies in the input, and none needs to be folded.
template <typename A, int axes, int lean, int count>
__device__ void locate(const Movement<axes>& m, const Tile<A, axes, lean>& tile,
                       Pixel<A, axes> (&pixels)[count]) {
  bool within = true;  // false for NaN
  for (const auto& p : pixels) {
    for (int axis = 0; axis < axes; ++axis) {
      within &= p.local[axis] >= tile.low[axis] && p.local[axis] < tile.high[axis];
    }
  }
  if (within) [[likely]] {
    for (auto& p : pixels) {
      p.state = kRead;
      for (int axis = 0; axis < axes; ++axis) {
        const A whole = std::floor(p.local[axis]);
        p.site[axis] = {static_cast<int32_t>(whole) + tile.anchor[axis], p.local[axis] - whole};
      }
    }
    return;
  }
  for (auto& p : pixels) {
    p.state = kRead;
    for (int axis = 0; axis < axes; ++axis) {
      p.site[axis] = site(p.local[axis], tile.anchor[axis]);
      const int along = state_of(p.site[axis], static_cast<int32_t>(m.input[axis] - 1), m.boundary);
      p.state = along > p.state ? along : p.state;
    }
    for (int axis = 0; axis < axes; ++axis) {
      const int32_t last = static_cast<int32_t>(m.input[axis] - 1);
      p.site[axis] = p.state == kRead ? fold(p.site[axis], last, m.boundary) : Site<A>{0, 0};
    }
  }
}

// The place in the output of a pixel of this thread.
template <typename A, int axes, int lean>
__device__ void place_of(const Tile<A, axes, lean>& tile, int row, int32_t (&place)[axes]) {
  for (int axis = 0; axis < axes; ++axis) place[axis] = tile.place[axis];
  place[axes - 2] += row;
  place[axes - 1] += static_cast<int>(threadIdx.x);
}

// Calls `work(pixels)` for the output pixels of this thread, `together` in a column at a time, the
// first of them in the output, before they are located.
template <int together, typename A, int axes, int lean, typename Work>
__device__ void march(const Movement<axes>& m, const Tile<A, axes, lean>& tile, Work&& work) {
  constexpr int kDown = axes - 2, kAcross = axes - 1;
  const int column = threadIdx.x, first = static_cast<int>(threadIdx.y) * kMarch;
  if (column >= m.output[kAcross] - tile.place[kAcross]) return;
  const int left = static_cast<int>(m.output[kDown]) - tile.place[kDown];
  const int end = left < first + kMarch ? left : first + kMarch;
  Cubic<A> field[axes];  // and the position in the tile's first row
  int32_t cell = -1;
  for (int row = first; row < end; row += together) {
    Pixel<A, axes> pixels[together];
    for (int j = 0; j < together; ++j) {
      const auto down = tile.rows[row + j];
      if (down.cell != cell) {
        cell = down.cell;
        for (int axis = 0; axis < axes; ++axis) {
          field[axis] = tile.field(m, axis, cell, column);
          field[axis].at[0] += tile.base[axis] + tile.right[axis] * static_cast<A>(column);
        }
      }
      pixels[j].row = row + j;
      for (int axis = 0; axis < axes; ++axis) {
        const A way = tile.down[axis] * static_cast<A>(row + j);
        pixels[j].local[axis] = field[axis](down.t) + way;
      }
    }
    work(pixels);
  }
}

}  // namespace unet_fast::elastic_deform
