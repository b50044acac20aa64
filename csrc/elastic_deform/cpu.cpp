#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "common/simd.h"
#include "elastic_deform/field.h"
#include "elastic_deform/operands.h"

namespace unet_fast::elastic_deform {
namespace {

// Pixels of an output row that are located, then sampled, at once: what is known of them stays in
// the first-level cache.
constexpr int64_t kBlock = 256;
// Output pixels that are worth a thread.
constexpr int64_t kPixelsOfTask = 8192;
// Rows or columns that the prefilter of an image takes side by side.
constexpr int kLines = 16;

// The least and the greatest pixel of a block along an axis.
struct Extent {
  int32_t low, high;

  void add(Extent other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
};

// A run of pixels of one output row: first their positions, then the sites to read.
template <typename A>
struct Block {
  int64_t row, begin, size;  // in the output
  Extent rows, columns;
  bool all_read;
  A y[kBlock], x[kBlock];
  int32_t row_of[kBlock], column_of[kBlock];
  A value[kBlock];
  State state[kBlock];
};

// The sites of a block as pointers, which compilers see through.
template <typename A>
struct Sites {
  const int32_t *row, *column;
  const A *y, *x;

  explicit Sites(const Block<A>& block)
      : row(block.row_of), column(block.column_of), y(block.y), x(block.x) {}
};

// A plane of pixels. `row_step`: from a pixel to the next that an interpolation reads.
template <typename T>
struct Plane {
  const T* data;
  int64_t row, column;  // strides
  int32_t row_step, column_step;

  static Plane of(const T* data, int64_t row, int64_t column, Sides sides) {
    return {data, row, column, sides.rows > 1 ? static_cast<int32_t>(row) : 0,
            sides.columns > 1 ? static_cast<int32_t>(column) : 0};
  }
};

// Sites of n pixels whose positions along an axis are a polynomial, from pixel `from` of it on.
template <typename A>
UNET_FAST_SIMD Extent locate(Cubic<A> position, int32_t anchor, int32_t from, int32_t n,
                             int32_t* pixel, A* t) {
  Extent extent{INT32_MAX, INT32_MIN};
  UNET_FAST_INDEPENDENT
  for (int32_t k = 0; k < n; ++k) {
    const Site<A> s = site(position(static_cast<A>(from + k)), anchor);
    pixel[k] = s.pixel;
    t[k] = s.t;
    extent.low = std::min(extent.low, s.pixel);
    extent.high = std::max(extent.high, s.pixel);
  }
  return extent;
}

template <typename A>
UNET_FAST_SIMD Extent reflect_all(int32_t last, int64_t n, int32_t* pixel, A* t) {
  Extent extent{INT32_MAX, INT32_MIN};
  UNET_FAST_INDEPENDENT
  for (int64_t k = 0; k < n; ++k) {
    const Site<A> s = reflect(Site<A>{pixel[k], t[k]}, last);
    pixel[k] = s.pixel;
    t[k] = s.t;
    extent.low = std::min(extent.low, s.pixel);
    extent.high = std::max(extent.high, s.pixel);
  }
  return extent;
}

// Folds positions that are anywhere.
template <typename A>
Extent fold_all(int32_t last, int32_t boundary, Block<A>& block, int32_t* pixel, A* t) {
  Extent extent{INT32_MAX, INT32_MIN};
  for (int64_t k = 0; k < block.size; ++k) {
    const Site<A> before{pixel[k], t[k]};
    const State state = state_of(before, last, boundary);
    block.state[k] = std::max(block.state[k], state);
    const Site<A> s = state == kRead ? fold(before, last, boundary) : Site<A>{0, 0};
    pixel[k] = s.pixel;
    t[k] = s.t;
    extent.low = std::min(extent.low, s.pixel);
    extent.high = std::max(extent.high, s.pixel);
  }
  return extent;
}

// The interpolated values of the pixels [begin, end) of a block, whose sites span less than 2^31
// elements of the plane.
template <int order, typename T, typename A>
UNET_FAST_SIMD void sample(Plane<T> plane, Extent rows, Extent columns, Sites<A> sites,
                           int64_t begin, int64_t end, A* out) {
  const T* const from = plane.data + rows.low * plane.row + columns.low * plane.column -
                        kBefore<order> * (plane.row_step + plane.column_step);
  const int32_t row = static_cast<int32_t>(plane.row), column = static_cast<int32_t>(plane.column);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    A y[kTaps<order>], x[kTaps<order>];
    tap_weights<order>(sites.y[k], y);
    tap_weights<order>(sites.x[k], x);
    int32_t at = (sites.row[k] - rows.low) * row + (sites.column[k] - columns.low) * column;
    if constexpr (order == 0) {
      at += (sites.y[k] >= A(0.5) ? plane.row_step : 0) +
            (sites.x[k] >= A(0.5) ? plane.column_step : 0);
    }
    out[k] = interpolate<order>(y, x, [&](int i, int j) {
      return static_cast<A>(from[at + i * plane.row_step + j * plane.column_step]);
    });
  }
}

// The same of order 1 where neighbours in a row lie side by side: both are gathered at once.
typedef uint64_t Pair __attribute__((may_alias, aligned(alignof(float))));
UNET_FAST_SIMD void sample_pairs(Plane<float> plane, Extent rows, Extent columns,
                                 Sites<float> sites, int64_t begin, int64_t end, float* out) {
  static_assert(std::endian::native == std::endian::little);
  const float* const from = plane.data + rows.low * plane.row + columns.low;
  const int32_t row = static_cast<int32_t>(plane.row);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    float y[2], x[2];
    tap_weights<1>(sites.y[k], y);
    tap_weights<1>(sites.x[k], x);
    const int32_t at = (sites.row[k] - rows.low) * row + sites.column[k] - columns.low;
    const uint64_t above = *reinterpret_cast<const Pair*>(from + at);
    const uint64_t below = *reinterpret_cast<const Pair*>(from + at + plane.row_step);
    out[k] = interpolate<1>(y, x, [&](int i, int j) {
      return std::bit_cast<float>(static_cast<uint32_t>((i == 0 ? above : below) >> (32 * j)));
    });
  }
}

template <typename T>
auto linear_sampler(const Plane<T>& plane) {
  if constexpr (std::is_same_v<T, float>) {
    if (plane.column_step == 1) return sample_pairs;
  }
  return sample<1, T, Accumulator<T>>;
}

// The nearest labels.
template <typename Id, typename A>
UNET_FAST_SIMD void take(Plane<Id> plane, Extent rows, Extent columns, Sites<A> sites,
                         int64_t begin, int64_t end, Id* out) {
  const Id* const from = plane.data + rows.low * plane.row + columns.low * plane.column;
  const int32_t row = static_cast<int32_t>(plane.row), column = static_cast<int32_t>(plane.column);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    const int32_t at = (sites.row[k] - rows.low) * row + (sites.column[k] - columns.low) * column +
                       (sites.y[k] >= A(0.5) ? plane.row_step : 0) +
                       (sites.x[k] >= A(0.5) ? plane.column_step : 0);
    out[k] = from[at];
  }
}

template <typename A>
UNET_FAST_SIMD void apply(Curve<A> curve, int64_t n, A* value) {
  for (int64_t k = 0; k < n; ++k) value[k] = curve(value[k]);
}

template <typename T, typename A>
UNET_FAST_SIMD void store(const A* value, int64_t n, T* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = stored<T>(value[k]);
}

template <typename A>
UNET_FAST_SIMD void prefilter_lines(A* x, int64_t n, int64_t stride) {
  prefilter<kLines>(x, n, stride);
}

template <typename A>
UNET_FAST_SIMD void transpose(const A* from, int64_t rows, int64_t columns, int64_t pitch,
                              int64_t to_pitch, A* to) {
  for (int64_t x = 0; x < columns; ++x) {
    for (int64_t y = 0; y < rows; ++y) to[x * to_pitch + y] = from[y * pitch + x];
  }
}

// Asks for the lines of memory that a block reads, all at once: gathers alone wait for one after
// the other.
template <typename T, typename A>
void prefetch(const Plane<T>& plane, const Block<A>& block) {
  constexpr int64_t step = 64 / sizeof(T) < kBlock ? 64 / sizeof(T) : kBlock;
  for (int64_t k = 0; k < block.size; k += step) {
    const T* const at =
        plane.data + block.row_of[k] * plane.row + block.column_of[k] * plane.column;
    __builtin_prefetch(at);
    __builtin_prefetch(at + plane.row_step);
  }
}

// Calls `fn.operator()<order>()`.
template <typename Fn>
void dispatch_order(int64_t order, Fn&& fn) {
  order == 3   ? fn.template operator()<3>()
  : order == 1 ? fn.template operator()<1>()
               : fn.template operator()<0>();
}

// Calls `work(rows, columns, begin, end)` for parts of a block that span less than 2^31 elements of
// a plane, with the extents of their pixels: nearly always the whole.
template <typename T, typename A, typename Work>
void for_parts(const Plane<T>& plane, const Block<A>& block, Extent rows, Extent columns,
               int64_t begin, int64_t end, Work&& work) {
  const int64_t span = (int64_t{rows.high} - rows.low + 4) * plane.row +
                       (int64_t{columns.high} - columns.low + 4) * plane.column;
  if (span <= INT32_MAX) return work(rows, columns, begin, end);
  if (end - begin == 1) {
    const int32_t row = block.row_of[begin], column = block.column_of[begin];
    return work(Extent{row, row}, Extent{column, column}, begin, end);
  }
  const int64_t middle = begin + (end - begin) / 2;
  for (const auto& [b, e] : {std::pair{begin, middle}, std::pair{middle, end}}) {
    const auto [top, bottom] = std::minmax_element(block.row_of + b, block.row_of + e);
    const auto [left, right] = std::minmax_element(block.column_of + b, block.column_of + e);
    for_parts(plane, block, Extent{*top, *bottom}, Extent{*left, *right}, b, e, work);
  }
}

// The spline coefficients of one plane of an image, with a border of mirrored pixels.
template <typename A>
struct Coefficients {
  Tensor memory;  // (N, C, rows + 2, columns + 2)
  Sides sides;

  Plane<A> plane(int64_t index) const {
    const int64_t pitch = sides.columns + 2;
    const A* const data = memory.template const_data_ptr<A>() + index * (sides.rows + 2) * pitch;
    return Plane<A>::of(data + pitch + 1, pitch, 1, sides);
  }
};

template <typename T>
struct Deformation {
  using A = Accumulator<T>;

  const Operands& in;
  const Settings& settings;
  const Field field;
  const Sides output;

  Deformation(const Operands& in, const Settings& settings, Sides output)
      : in(in), settings(settings), field(in, settings, output.columns, kBlock), output(output) {}

  // Calls `work(image, pieces, block)` for all blocks of output pixels, located but not folded;
  // threads take whole rows.
  template <typename Work>
  void run(Work&& work) const {
    const int64_t rows_of_task = std::max<int64_t>(1, kPixelsOfTask / output.columns);
    const int64_t rows = in.images * output.rows;
    const int64_t tasks = (rows + rows_of_task - 1) / rows_of_task;
    // Threads take tasks one by one: one that wakes late leaves more to the others.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
      for (int64_t task = next++; task < tasks; task = next++) {
        walk(task * rows_of_task, std::min((task + 1) * rows_of_task, rows), work);
      }
    });
  }

  // The same for the output rows [begin, end) of all images, in order.
  template <typename Work>
  void walk(int64_t begin, int64_t end, Work&& work) const {
    Block<A> block;
    Strip strip;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / output.rows;
      block.row = unit % output.rows;
      field.move_to(image, block.row, strip);
      const std::vector<Piece>& pieces = field.pieces(image);
      for (size_t p = 0; p < pieces.size();) {
        const size_t first = p;
        p = position(image, strip, pieces, p, block);
        work(image, std::span(pieces).subspan(first, p - first), block);
      }
    }
  }

  // The positions of a block, which starts with piece p. Returns the first piece of the next.
  size_t position(int64_t image, const Strip& strip, const std::vector<Piece>& pieces, size_t p,
                  Block<A>& block) const {
    block.begin = pieces[p].begin;
    const int64_t end = std::min(block.begin + kBlock, output.columns);
    block.size = end - block.begin;
    const Motion& motion = field.motion(image);
    const double row = static_cast<double>(block.row);
    Extent extents[2] = {{INT32_MAX, INT32_MIN}, {INT32_MAX, INT32_MIN}};
    for (; p < pieces.size() && pieces[p].begin < end; ++p) {
      const Piece& piece = pieces[p];
      for (int axis = 0; axis < 2; ++axis) {
        Cubic<double> c = strip.patches[axis][p].at(strip.t);
        c.at[0] += motion.at(axis, row, static_cast<double>(piece.middle()));
        c.at[1] += motion.linear[axis][1];
        const int32_t anchor = anchor_of(c.at[0]);
        c.at[0] -= anchor;
        const Cubic<A> rounded{{static_cast<A>(c.at[0]), static_cast<A>(c.at[1]),
                                static_cast<A>(c.at[2]), static_cast<A>(c.at[3])}};
        const int64_t at = piece.begin - block.begin;
        extents[axis].add(
            locate(rounded, anchor, static_cast<int32_t>(piece.begin - piece.middle()),
                   piece.end - piece.begin, (axis == 0 ? block.row_of : block.column_of) + at,
                   (axis == 0 ? block.y : block.x) + at));
      }
    }
    block.rows = extents[0];
    block.columns = extents[1];
    return p;
  }

  // From positions to the sites that stand for them.
  void find(Block<A>& block) const {
    const int32_t last_row = static_cast<int32_t>(in.input.rows - 1);
    const int32_t last_column = static_cast<int32_t>(in.input.columns - 1);
    block.all_read = true;
    block.rows = fold_axis(last_row, block, block.rows, block.row_of, block.y);
    block.columns = fold_axis(last_column, block, block.columns, block.column_of, block.x);
  }

  Extent fold_axis(int32_t last, Block<A>& block, Extent extent, int32_t* pixel, A* t) const {
    if (extent.low >= 0 && extent.high < last) return extent;
    if (settings.boundary == kMirror && extent.low >= -last && extent.high < 2 * last) {
      return reflect_all(last, block.size, pixel, t);
    }
    if (block.all_read) std::fill_n(block.state, block.size, kRead);
    block.all_read = false;
    return fold_all(last, settings.boundary, block, pixel, t);
  }

  // The values of one channel of a block, before the grey curve.
  void values(const T* image, const Strides& strides, const Coefficients<A>& smooth,
              int64_t plane_index, int64_t order, const Block<A>& block, A* out) const {
    const auto interpolated = [&](const auto& plane, auto&& sampler) {
      prefetch(plane, block);
      for_parts(plane, block, block.rows, block.columns, 0, block.size,
                [&](Extent rows, Extent columns, int64_t begin, int64_t end) {
                  sampler(plane, rows, columns, Sites<A>(block), begin, end, out);
                });
    };
    if (order == 3) {
      interpolated(smooth.plane(plane_index), sample<3, A, A>);
    } else {
      const auto plane = Plane<T>::of(image, strides.row, strides.column, in.input);
      interpolated(plane, order == 0 ? sample<0, T, A> : linear_sampler(plane));
    }
    if (block.all_read) return;
    for (int64_t k = 0; k < block.size; ++k) {
      if (block.state[k] == kOutside) out[k] = static_cast<A>(settings.cval);
      if (block.state[k] == kLost) out[k] = static_cast<A>(kNoNumber);
    }
  }

  Curve<A> curve(int64_t image, int64_t channel) const {
    const Tensor& table = *in.gray_curve;
    const int64_t of = image * table.size(1) + (table.size(1) > 1 ? channel : 0);
    return {table.const_data_ptr<A>() + of * table.size(2), static_cast<int32_t>(table.size(2) - 1),
            static_cast<A>(kUnit<T>)};
  }
};

// The spline coefficients of all channels of order 3; of the others, nothing is written. Empty if
// they are not wanted.
template <typename T>
Coefficients<Accumulator<T>> coefficients(const Tensor& image, const Operands& in,
                                          const Settings& settings, bool wanted = true) {
  using A = Accumulator<T>;
  const auto& orders = settings.orders;
  const bool none = !wanted || std::find(orders.begin(), orders.end(), 3) == orders.end();
  const Sides sides = in.input;
  const int64_t pitch = sides.columns + 2, size = none ? 0 : (sides.rows + 2) * pitch;
  Coefficients<A> result{new_tensor(image, {in.sources * in.channels * size},
                                    std::is_same_v<A, double> ? aoti_torch_dtype_float64()
                                                              : aoti_torch_dtype_float32()),
                         sides};
  if (none) return result;
  A* const memory = result.memory.template mutable_data_ptr<A>();
  const Strides strides = strides_to_read(image, "image");
  const T* const data = image.const_data_ptr<T>();
  const auto smooth = [&](int64_t plane) { return orders[plane % in.channels] == 3; };
  const auto planes = in.sources * in.channels;
  // Along columns of pixels, kLines side by side, straight from the image.
  const int64_t strips = (sides.columns + kLines - 1) / kLines;
  torch::stable::parallel_for(0, planes * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t plane = unit / strips, first = unit % strips * kLines;
      if (!smooth(plane)) continue;
      const int64_t lanes = std::min<int64_t>(kLines, sides.columns - first);
      A* const to = memory + plane * size + pitch + 1 + first;
      const T* const from = data + plane / in.channels * strides.image +
                            plane % in.channels * strides.channel + first * strides.column;
      for (int64_t y = 0; y < sides.rows; ++y) {
        for (int64_t l = 0; l < lanes; ++l) {
          to[y * pitch + l] = static_cast<A>(from[y * strides.row + l * strides.column]);
        }
      }
      if (lanes == kLines) {
        prefilter_lines(to, sides.rows, pitch);
      } else {
        for (int64_t l = 0; l < lanes; ++l) prefilter(to + l, sides.rows, pitch);
      }
    }
  });
  // Along rows, kLines of them turned into columns; then the border.
  const int64_t bands = (sides.rows + kLines - 1) / kLines;
  torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> turned(sides.columns * kLines);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t plane = unit / bands, first = unit % bands * kLines;
      if (!smooth(plane)) continue;
      const int64_t lanes = std::min<int64_t>(kLines, sides.rows - first);
      A* const to = memory + plane * size + (first + 1) * pitch + 1;
      transpose(to, lanes, sides.columns, pitch, kLines, turned.data());
      prefilter_lines(turned.data(), sides.columns, kLines);
      transpose(turned.data(), sides.columns, lanes, kLines, pitch, to);
      for (int64_t l = 0; l < lanes; ++l) {
        A* const row = to + l * pitch;
        row[-1] = row[std::min<int64_t>(1, sides.columns - 1)];
        row[sides.columns] = row[std::max<int64_t>(sides.columns - 2, 0)];
      }
    }
  });
  for (int64_t plane = 0; plane < planes; ++plane) {
    A* const top = memory + plane * size;
    const auto row = [&](int64_t y) { return top + (y + 1) * pitch; };
    std::copy_n(row(std::min<int64_t>(1, sides.rows - 1)), pitch, row(-1));
    std::copy_n(row(std::max<int64_t>(sides.rows - 2, 0)), pitch, row(sides.rows));
  }
  return result;
}

// Labels of the pixels of a block that lie in their window, the centre of the output.
template <typename Id, typename A>
void take_labels(const Plane<Id>& plane, const Block<A>& block, Sides output, Sides window,
                 Id* to) {
  const int64_t top = (output.rows - window.rows) / 2, left = (output.columns - window.columns) / 2;
  const int64_t row = block.row - top;
  const int64_t begin = std::max<int64_t>(left - block.begin, 0);
  const int64_t end = std::min(left + window.columns - block.begin, block.size);
  if (row < 0 || row >= window.rows || begin >= end) return;
  Id* const out = to + row * window.columns + (block.begin - left);
  for_parts(plane, block, block.rows, block.columns, begin, end,
            [&](Extent rows, Extent columns, int64_t b, int64_t e) {
              take(plane, rows, columns, Sites<A>(block), b, e, out);
            });
  for (int64_t k = begin; !block.all_read && k < end; ++k) {
    if (block.state[k] != kRead) out[k] = 0;
  }
}

template <typename T, typename Id>
void deform(const Tensor& image, const std::optional<Tensor>& labels, const Operands& in,
            const Settings& settings, Sides window, Tensor& out, Tensor& labels_out) {
  using A = Accumulator<T>;
  const Deformation<T> deformation(in, settings, sides_of(out));
  const Coefficients<A> smooth = coefficients<T>(image, in, settings);
  const Strides from = strides_to_read(image, "image"), to = strides_of(out);
  const T* const data = image.const_data_ptr<T>();
  T* const result = out.mutable_data_ptr<T>();
  const Strides ids = labels ? strides_to_read(*labels, "labels") : Strides{};
  const int64_t* const source = in.source ? in.source->const_data_ptr<int64_t>() : nullptr;
  deformation.run([&](int64_t n, std::span<const Piece>, Block<A>& block) {
    deformation.find(block);
    const int64_t s = source != nullptr ? source[n] : n;
    const auto label_plane =
        Plane<Id>::of(labels ? static_cast<const Id*>(labels->data_ptr()) + s * ids.image : nullptr,
                      ids.row, ids.column, in.input);
    if (labels) prefetch(label_plane, block);
    for (int64_t c = 0; c < in.channels; ++c) {
      T* const destination =
          result + n * to.image + c * to.channel + block.row * to.row + block.begin * to.column;
      A* value = block.value;
      if constexpr (std::is_same_v<T, A>) {
        if (to.column == 1) value = destination;
      }
      deformation.values(data + s * from.image + c * from.channel, from, smooth,
                         s * in.channels + c, settings.orders[c], block, value);
      if (in.gray_curve) apply(deformation.curve(n, c), block.size, value);
      if constexpr (std::is_same_v<T, A>) {
        if (to.column == 1) continue;
      }
      if (to.column == 1) {
        store(value, block.size, destination);
      } else {
        for (int64_t k = 0; k < block.size; ++k) destination[k * to.column] = stored<T>(value[k]);
      }
    }
    if (labels) {
      Id* const moved = static_cast<Id*>(labels_out.data_ptr()) + n * window.rows * window.columns;
      take_labels(label_plane, block, deformation.output, window, moved);
    }
  });
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& image, const std::optional<Tensor>& displacement,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& gray_curve,
    const std::vector<int64_t>& orders, int64_t grid, bool spans_input,
    const std::vector<double>& scales, int64_t boundary, double cval,
    const std::vector<int64_t>& output_shape, const std::vector<int64_t>& label_shape,
    const std::optional<Tensor>& source) {
  const Settings settings(orders, grid, spans_input, scales, boundary, cval);
  const Operands in(image, displacement, affine, offset, gray_curve, settings, source);
  const Sides window = sides_of(label_shape);
  Tensor out = new_image(image, in.images, sides_of(output_shape));
  Tensor moved = new_labels(image, labels, in.images, sides_of(output_shape), window);
  if (in.images * window.rows * window.columns == 0) return {out, moved};
  for (int64_t n = 0; source && n < in.images; ++n) {
    const int64_t s = source->const_data_ptr<int64_t>()[n];
    STD_TORCH_CHECK(s >= 0 && s < in.sources, "source must be of images from 0 to ", in.sources - 1,
                    ", got ", s);
  }
  dispatch_image(image.scalar_type(), [&]<typename T>() {
    if (!labels) return deform<T, int8_t>(image, labels, in, settings, window, out, moved);
    dispatch_width(*labels, [&]<typename Id>() {
      deform<T, Id>(image, labels, in, settings, window, out, moved);
    });
  });
  return {out, moved};
}

// --- Derivatives. Rarer than the deformation itself, so these loops are plain.

// By how much the folded positions of a block change with the positions.
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

// What the derivatives are made of: the operands of the forward pass, and the derivatives of the
// loss in its result.
template <typename T>
struct Upstream {
  using A = Accumulator<T>;

  const Deformation<T>& deformation;
  const T* const image;
  const Strides strides;
  const Coefficients<A> smooth;  // empty where nobody reads the image
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

  // The derivatives in the values that a block read from a channel; 0 where it read none.
  void of_values(int64_t n, int64_t c, const Block<A>& block, A* out) const {
    const Operands& in = deformation.in;
    const Strides& s = grad_strides;
    const T* const g =
        grad + n * s.image + c * s.channel + block.row * s.row + block.begin * s.column;
    if (in.gray_curve) {
      const Curve<A> curve = deformation.curve(n, c);
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

// Adds what a block took from rows [top, bottom) of a plane of gradients (rows, columns).
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

// Every band of input rows collects what was read from it, in the order of the output: the sums are
// the same for any number of threads, and no two threads write to one pixel.
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

// Derivatives in the positions of a block, rows and columns, of one channel; added.
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
  // The derivatives in the coefficients along each output row, (N, rows, 2, columns): no two
  // threads write to one, and the order of the sums is fixed.
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

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& image, const std::optional<Tensor>& displacement,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& offset,
    const std::optional<Tensor>& gray_curve, const std::vector<int64_t>& orders, int64_t grid,
    bool spans_input, const std::vector<double>& scales, int64_t boundary, double cval,
    bool of_image, bool of_displacement) {
  const Settings settings(orders, grid, spans_input, scales, boundary, cval);
  const Operands in(image, displacement, affine, offset, gray_curve, settings);
  auto results = new_gradients(image, displacement, of_image, of_displacement);
  if (in.images == 0) return results;
  dispatch_floating(image.scalar_type(), "elastic_deform_backward", [&]<typename T>() {
    const Deformation<T> deformation(in, settings, sides_of(grad));
    const Upstream<T> upstream(deformation, image, grad, of_displacement || gray_curve);
    auto& [by_image, by_displacement] = results;
    if (of_image) image_gradient(upstream, by_image);
    if (of_displacement) displacement_gradient(upstream, by_displacement);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) {
  m.impl("elastic_deform", TORCH_BOX(&forward));
  m.impl("elastic_deform_backward", TORCH_BOX(&backward));
}

}  // namespace unet_fast::elastic_deform
