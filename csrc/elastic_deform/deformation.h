#pragma once

#include <algorithm>
#include <atomic>
#include <span>
#include <vector>

#include "elastic_deform/block.h"

// Deformation of images, one block at a time; part of cpu.cpp.
namespace unet_fast::elastic_deform {
namespace {

// The spline coefficients of all channels of all images, each with a border of mirrored pixels.
template <typename A, int axes>
struct Coefficients {
  Tensor memory;  // (N, C, sides + 2)
  Sides<axes> sides;

  Plane<A, axes> plane(int64_t index) const {
    const Strides<axes> s = smooth_strides(sides, 1);
    const A* const data = memory.template const_data_ptr<A>() + index * s.channel;
    return Plane<A, axes>::of(data + border_of(s), s, sides);
  }
};

template <typename T, int axes>
struct Deformation {
  using A = Accumulator<T>;
  using Block = elastic_deform::Block<A, axes>;

  const Operands<axes>& in;
  const Settings& settings;
  const Field<axes> field;
  const Sides<axes> output;

  Deformation(const Operands<axes>& in, const Settings& settings, const Sides<axes>& output)
      : in(in), settings(settings), field(in, settings, output[axes - 1], kBlock), output(output) {}

  // Calls `work(image, pieces, block)` for all blocks of output pixels, located but not folded.
  // Each thread takes whole lines.
  template <typename Work>
  void run(Work&& work) const {
    const int64_t lines_of_task = std::max<int64_t>(1, kPixelsOfTask / output[axes - 1]);
    const int64_t lines = in.images * output.lines();
    const int64_t tasks = (lines + lines_of_task - 1) / lines_of_task;
    // Threads take tasks one by one, so that a thread that starts late leaves more to the others.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
      for (int64_t task = next++; task < tasks; task = next++) {
        walk(task * lines_of_task, std::min((task + 1) * lines_of_task, lines), work);
      }
    });
  }

  // Calls `work` as `run` does, in order, for the output lines [begin, end), counted over all
  // images.
  template <typename Work>
  void walk(int64_t begin, int64_t end, Work&& work) const {
    Block block;
    Strip<axes> strip;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / output.lines();
      block.place = output.place_of(unit % output.lines() * output[axes - 1]);
      field.move_to(image, block.place, strip);
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
  size_t position(int64_t image, const Strip<axes>& strip, const std::vector<Piece>& pieces,
                  size_t p, Block& block) const {
    block.begin() = pieces[p].begin;
    const int64_t end = std::min(block.begin() + kBlock, output[axes - 1]);
    block.size = end - block.begin();
    const Motion<axes>& motion = field.motion(image);
    for (Extent& extent : block.extents.along) extent = {INT32_MAX, INT32_MIN};
    for (; p < pieces.size() && pieces[p].begin < end; ++p) {
      const Piece& piece = pieces[p];
      Sides<axes> middle = block.place;
      middle[axes - 1] = piece.middle();
      for (int axis = 0; axis < axes; ++axis) {
        Cubic<double> c = strip.patches[axis][p].at(strip.t);
        c.at[0] += motion.at(axis, middle);
        c.at[1] += motion.linear[axis][axes - 1];
        const int32_t anchor = anchor_of(c.at[0]);
        c.at[0] -= anchor;
        const Cubic<A> rounded{{static_cast<A>(c.at[0]), static_cast<A>(c.at[1]),
                                static_cast<A>(c.at[2]), static_cast<A>(c.at[3])}};
        const int64_t at = piece.begin - block.begin();
        block.extents[axis].add(
            locate(rounded, anchor, static_cast<int32_t>(piece.begin - piece.middle()),
                   piece.end - piece.begin, block.pixel[axis] + at, block.t[axis] + at));
      }
    }
    return p;
  }

  // Folds the positions of a block into the image.
  void find(Block& block) const {
    block.all_read = true;
    for (int axis = 0; axis < axes; ++axis) block.extents[axis] = fold_axis(axis, block);
  }

  Extent fold_axis(int axis, Block& block) const {
    const Extent extent = block.extents[axis];
    const int32_t last = static_cast<int32_t>(in.input[axis] - 1);
    if (extent.low >= 0 && extent.high < last) return extent;
    if (settings.boundary == kMirror && extent.low >= -last && extent.high < 2 * last) {
      return reflect_all(last, block.size, block.pixel[axis], block.t[axis]);
    }
    if (block.all_read) std::fill_n(block.state, block.size, kRead);
    block.all_read = false;
    return fold_all(last, settings.boundary, axis, block);
  }

  // Reads the values of one channel of a block, before the grey curve.
  void values(const T* image, const Strides<axes>& strides, const Coefficients<A, axes>& smooth,
              int64_t plane_index, int64_t order, const Block& block, A* out) const {
    const auto interpolated = [&](const auto& plane, auto&& sampler) {
      prefetch(plane, block);
      for_parts(plane, block, block.extents, 0, block.size,
                [&](const Extents<axes>& extents, int64_t begin, int64_t end) {
                  sampler(plane, extents, Sites<A, axes>(block), begin, end, out);
                });
    };
    if (order == 3) {
      interpolated(smooth.plane(plane_index), sample<3, A, A, axes>);
    } else {
      const auto plane = Plane<T, axes>::of(image, strides, in.input);
      interpolated(plane, order == 0 ? sample<0, T, A, axes> : linear_sampler(plane));
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
template <typename T, int axes>
Coefficients<Accumulator<T>, axes> coefficients(const Tensor& image, const Operands<axes>& in,
                                                const Settings& settings, bool wanted = true) {
  using A = Accumulator<T>;
  const auto& orders = settings.orders;
  const bool none = !wanted || std::find(orders.begin(), orders.end(), 3) == orders.end();
  const Sides<axes>& sides = in.input;
  const Strides<axes> to = smooth_strides(sides, 1);
  const int64_t size = none ? 0 : to.channel;
  Coefficients<A, axes> result{new_tensor(image, {in.sources * in.channels * size},
                                          std::is_same_v<A, double> ? aoti_torch_dtype_float64()
                                                                    : aoti_torch_dtype_float32()),
                               sides};
  if (none) return result;
  A* const inside = result.memory.template mutable_data_ptr<A>() + border_of(to);
  const Strides<axes> from = strides_to_read<axes>(image, "image");
  const T* const data = image.const_data_ptr<T>();
  const int64_t columns = sides[axes - 1], pitch = to.along[axes - 2];
  // Calls `work(plane, place, lanes, scratch)` for up to kLines lines side by side along an axis,
  // which start at a place and follow each other along `beside`; there is scratch for a bundle.
  const auto for_lines = [&](int axis, int beside, auto&& work) {
    Sides<axes> bundles = sides;
    bundles[axis] = 1;
    bundles[beside] = (sides[beside] + kLines - 1) / kLines;
    const int64_t units = in.sources * in.channels * bundles.pixels();
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(axis == axes - 1 ? columns * kLines : 0);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t plane = unit / bundles.pixels();
        if (orders[plane % in.channels] != 3) continue;
        Sides<axes> place = bundles.place_of(unit % bundles.pixels());
        place[beside] *= kLines;
        work(plane, place, std::min<int64_t>(kLines, sides[beside] - place[beside]),
             scratch.data());
      }
    });
  };
  // Filter along all axes but the last; along the first reading straight from the image.
  for (int axis = 0; axis < axes - 1; ++axis) {
    for_lines(axis, axes - 1, [&](int64_t plane, const Sides<axes>& place, int64_t lanes, A*) {
      A* const line = inside + plane * size + to.offset(place);
      const T* const pixels = data + plane / in.channels * from.image +
                              plane % in.channels * from.channel + from.offset(place);
      const int64_t step = to.along[axis];
      for (int64_t y = 0; axis == 0 && y < sides[0]; ++y) {
        for (int64_t l = 0; l < lanes; ++l) {
          line[y * step + l] = static_cast<A>(pixels[y * from.along[0] + l * from.along[axes - 1]]);
        }
      }
      if (lanes == kLines) {
        prefilter_lines(line, sides[axis], step);
      } else {
        for (int64_t l = 0; l < lanes; ++l) prefilter(line + l, sides[axis], step);
      }
    });
  }
  // Filter along the last axis, kLines at a time transposed; then fill the border.
  for_lines(axes - 1, axes - 2,
            [&](int64_t plane, const Sides<axes>& place, int64_t lanes, A* turned) {
              A* const line = inside + plane * size + to.offset(place);
              transpose(line, lanes, columns, pitch, kLines, turned);
              prefilter_lines(turned, columns, kLines);
              transpose(turned, columns, lanes, kLines, pitch, line);
              for (int64_t l = 0; l < lanes; ++l) mirror_ends(line + l * pitch, columns, 1, 1);
            });
  for (int64_t plane = 0; plane < in.sources * in.channels; ++plane) {
    if (orders[plane % in.channels] != 3) continue;
    for (int axis = axes - 2; axis >= 0; --axis) {
      // What lies beside each other is copied with the border that it has by now.
      int64_t before = 0;
      for (int i = axis + 1; i < axes; ++i) before += to.along[i];
      for (int64_t i = 0; i < sides.pixels() / sides.step(axis) / sides[axis]; ++i) {
        const Sides<axes> place = sides.place_of(i * sides.step(axis) * sides[axis]);
        mirror_ends(inside + plane * size + to.offset(place) - before, sides[axis], to.along[axis],
                    to.along[axis]);
      }
    }
  }
  return result;
}

// Reads the labels of those pixels of a block that lie in the label window, the centre of the
// output.
template <typename Id, typename A, int axes>
void take_labels(const Plane<Id, axes>& plane, const Block<A, axes>& block,
                 const Sides<axes>& output, const Sides<axes>& window, Id* to) {
  constexpr int across = axes - 1;
  const Sides<axes> margin = margin_of(window, output);
  Sides<axes> place = block.place;
  for (int axis = 0; axis < axes; ++axis) place[axis] -= margin[axis];
  const int64_t begin = std::max<int64_t>(-place[across], 0);
  const int64_t end = std::min(window[across] - place[across], block.size);
  for (int axis = 0; axis < across; ++axis) {
    if (place[axis] < 0 || place[axis] >= window[axis]) return;
  }
  if (begin >= end) return;
  Id* const out = to + window.index_of(place);
  for_parts(plane, block, block.extents, begin, end,
            [&](const Extents<axes>& extents, int64_t b, int64_t e) {
              take(plane, extents, Sites<A, axes>(block), b, e, out);
            });
  for (int64_t k = begin; !block.all_read && k < end; ++k) {
    if (block.state[k] != kRead) out[k] = 0;
  }
}

}  // namespace
}  // namespace unet_fast::elastic_deform
