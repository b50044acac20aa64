#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "elastic_deform/block.h"

// Deformation of images, one block at a time; part of cpu.cpp.
namespace unet_fast::elastic_deform {
namespace {

// The spline coefficients of all planes of all images, each with a border of mirrored pixels.
template <typename A>
struct Coefficients {
  Tensor memory;  // (N, C, rows + 2, columns + 2)
  Sides sides;

  Plane<A> plane(int64_t index) const {
    const Strides s = smooth_strides(sides, 1);
    const A* const data = memory.template const_data_ptr<A>() + index * s.channel;
    return Plane<A>::of(data + s.row + s.column, s.row, s.column, sides);
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

  // Calls `work(image, pieces, block)` for all blocks of output pixels, located but not folded.
  // Each thread takes whole rows.
  template <typename Work>
  void run(Work&& work) const {
    const int64_t rows_of_task = std::max<int64_t>(1, kPixelsOfTask / output.columns);
    const int64_t rows = in.images * output.rows;
    const int64_t tasks = (rows + rows_of_task - 1) / rows_of_task;
    // Threads take tasks one by one, so that a thread that starts late leaves more to the others.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
      for (int64_t task = next++; task < tasks; task = next++) {
        walk(task * rows_of_task, std::min((task + 1) * rows_of_task, rows), work);
      }
    });
  }

  // Calls `work` as `run` does, in order, for the output rows [begin, end), counted over all
  // images.
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

  // Computes the positions of the block that starts with piece p. Returns the first piece of the
  // next block.
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

  // Folds the positions of a block into the image.
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

  // Reads the values of one channel of a block, before the grey curve.
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
};

// Computes the spline coefficients of channels of order 3; those of other channels are left unset.
// Empty if no channel has order 3 or if not `wanted`.
template <typename T>
Coefficients<Accumulator<T>> coefficients(const Tensor& image, const Operands& in,
                                          const Settings& settings, bool wanted = true) {
  using A = Accumulator<T>;
  const auto& orders = settings.orders;
  const bool none = !wanted || std::find(orders.begin(), orders.end(), 3) == orders.end();
  const Sides sides = in.input;
  const Strides to_strides = smooth_strides(sides, 1);
  const int64_t pitch = to_strides.row, size = none ? 0 : to_strides.channel;
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
  // Filter along columns, kLines side by side, reading straight from the image.
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
  // Filter along rows, kLines at a time transposed into columns; then fill the border.
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

// Reads the labels of those pixels of a block that lie in the label window, the centre of the
// output.
template <typename Id, typename A>
void take_labels(const Plane<Id>& plane, const Block<A>& block, Sides output, Sides window,
                 Id* to) {
  const auto [top, left] = margin_of(window, output);
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

}  // namespace
}  // namespace unet_fast::elastic_deform
