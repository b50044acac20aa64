#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "border_weight_map/numerics.h"
#include "common/simd.h"
#include "common/tensors.h"

namespace unet_fast::border_weight_map {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kLanes = 16;    // pixels of a row searched together
constexpr int64_t kColumns = 64;  // columns swept together
constexpr int64_t kSteps = 8;     // of a search between looks at whether it may end

// A batch of volumes, (N, D, H, W); images have D = 1.
struct Shape {
  int64_t images, depth, height, width;
  int64_t pixels() const { return images * depth * height * width; }
};

// Nearest objects of a run of pixels, structure of arrays.
template <typename D>
struct View {
  D *first, *second;
  int32_t *label, *second_label;

  Nearest<D> at(int64_t i) const { return {first[i], second[i], label[i], second_label[i]}; }
  void set(int64_t i, const Nearest<D>& nearest) const {
    first[i] = nearest.first;
    second[i] = nearest.second;
    label[i] = nearest.label;
    second_label[i] = nearest.second_label;
  }
  View from(int64_t i) const { return {first + i, second + i, label + i, second_label + i}; }
};

template <typename D>
struct Rows {
  explicit Rows(int64_t n) : first(n, kFar<D>), second(n, kFar<D>), label(n), second_label(n) {}
  View<D> view() { return {first.data(), second.data(), label.data(), second_label.data()}; }

  std::vector<D> first, second;
  std::vector<int32_t> label, second_label;
};

// Where the sweep along some columns last met its object and, before it, another one.
struct Met {
  int32_t label[kColumns] = {}, other[kColumns] = {};
  int32_t at[kColumns] = {}, other_at[kColumns] = {};

  void meet(int64_t i, int32_t object, int32_t y) {
    const bool here = object != 0;
    const bool changes = here && object != label[i];
    other[i] = changes ? label[i] : other[i];
    other_at[i] = changes ? at[i] : other_at[i];
    label[i] = here ? object : label[i];
    at[i] = here ? y : at[i];
  }
};

template <typename D>
D squared(int32_t step, D scale) {
  return static_cast<D>(step) * static_cast<D>(step) * scale;
}

// Sweeps down and up along `n` columns of one slice: the two nearest objects within each column.
// `scale` is the squared spacing. Returns the least label.
template <typename D>
UNET_FAST_SIMD int32_t sweep(const int32_t* labels, int64_t height, int64_t width, int64_t n,
                             D scale, View<D> rows) {
  int32_t least = 0;
  Met down;
  for (int64_t y = 0; y < height; ++y) {
    const int32_t row = static_cast<int32_t>(y);
    UNET_FAST_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const int32_t object = labels[y * width + i];
      least = std::min(least, object);
      down.meet(i, object, row);
      rows.set(y * width + i,
               {down.label[i] == 0 ? kFar<D> : squared(row - down.at[i], scale),
                down.other[i] == 0 ? kFar<D> : squared(row - down.other_at[i], scale),
                down.label[i], down.other[i]});
    }
  }
  Met up;
  for (int64_t y = height - 1; y >= 0; --y) {
    const int32_t row = static_cast<int32_t>(y);
    UNET_FAST_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      up.meet(i, labels[y * width + i], row);
      Nearest<D> nearest = rows.at(y * width + i);
      nearest.add(up.label[i] == 0 ? kFar<D> : squared(up.at[i] - row, scale), up.label[i]);
      nearest.add(up.other[i] == 0 ? kFar<D> : squared(up.other_at[i] - row, scale), up.other[i]);
      rows.set(y * width + i, nearest);
    }
  }
  return least;
}

// One line of pixels with room on both sides, so that no search tests bounds.
template <typename D>
struct Line {
  explicit Line(int64_t length)
      : length(length),
        margin((length / kLanes + 2) * kLanes),
        rows(length + 2 * margin),
        least(rows.first.size() / kLanes + 1, kFar<D>),
        only(least.size()) {}

  // How many objects the line knows of: 0, 1 or at least 2. Finds what each block holds.
  int prepare() {
    int32_t low = std::numeric_limits<int32_t>::max(), high = 0;
    for (int64_t from = margin; from < margin + length; from += kLanes) {
      D nearest = kFar<D>;
      int32_t block_low = std::numeric_limits<int32_t>::max(), block_high = 0;
      for (int64_t i = from; i < std::min(from + kLanes, margin + length); ++i) {
        nearest = std::min(nearest, rows.first[i]);
        for (const auto& [d, object] : {std::pair{rows.first[i], rows.label[i]},
                                        std::pair{rows.second[i], rows.second_label[i]}}) {
          block_low = d < kFar<D> ? std::min(block_low, object) : block_low;
          block_high = d < kFar<D> ? std::max(block_high, object) : block_high;
        }
      }
      least[from / kLanes] = nearest;
      only[from / kLanes] = block_low == block_high ? block_low : 0;
      low = std::min(low, block_low);
      high = std::max(high, block_high);
    }
    return high == 0 ? 0 : low < high ? 2 : 1;
  }

  // Whether [from, to], a squared distance `near` away along the line, may hold anything nearer
  // than `first` or, of objects other than `label` (0: no such one), than `second`.
  bool matters(int64_t from, int64_t to, D near, D first, D second, int32_t label) const {
    for (int64_t block = from / kLanes; block <= to / kLanes; ++block) {
      const bool same = label != 0 && only[block] == label;
      if (least[block] + near < (same ? first : second)) return true;
    }
    return false;
  }

  int64_t length, margin;  // the margin is a multiple of kLanes
  Rows<D> rows;
  std::vector<D> least;       // distance in each block of kLanes pixels
  std::vector<int32_t> only;  // the object of the block, 0 if there are several
};

// Searches outward from kLanes pixels of the line until nothing nearer can come: a step farther
// than the second nearest so far (the nearest, where there is one object) adds nothing. Stretches
// that hold nothing nearer are skipped. `reach`: the squared distance at which it ends anyway.
template <typename D>
UNET_FAST_SIMD void search(const Line<D>& line, int64_t x, bool two, D scale, D reach,
                           View<D> out) {
  D first[kLanes], second[kLanes];
  int32_t label[kLanes], second_label[kLanes];
  const int64_t at = line.margin + x;
  for (int64_t i = 0; i < kLanes; ++i) {
    first[i] = line.rows.first[at + i];
    second[i] = line.rows.second[at + i];
    label[i] = line.rows.label[at + i];
    second_label[i] = line.rows.second_label[at + i];
  }
  for (int64_t step = 1; step < line.length; step += kSteps) {
    D most_first = 0, most_second = 0;  // what the pixel that waits for the most has so far
    int32_t low = label[0], high = label[0];
    for (int64_t i = 0; i < kLanes; ++i) {
      most_first = std::max(most_first, first[i]);
      most_second = std::max(most_second, second[i]);
      low = std::min(low, label[i]);
      high = std::max(high, label[i]);
    }
    const D near = squared(static_cast<int32_t>(step), scale);
    if (near >= (two ? most_second : most_first) || near > reach) break;
    for (const int64_t sign : {-1, 1}) {
      const int64_t here = at + sign * step, there = at + sign * (step + kSteps - 1);
      if (!line.matters(std::min(here, there), std::max(here, there) + kLanes - 1, near, most_first,
                        most_second, low == high ? low : 0)) {
        continue;
      }
      for (int64_t k = 0; k < kSteps; ++k) {
        const D far = squared(static_cast<int32_t>(step + k), scale);
        const int64_t side = at + sign * (step + k);
        for (int64_t i = 0; i < kLanes; ++i) {
          Nearest<D> nearest{first[i], second[i], label[i], second_label[i]};
          nearest.add(line.rows.first[side + i] + far, line.rows.label[side + i]);
          nearest.add(line.rows.second[side + i] + far, line.rows.second_label[side + i]);
          first[i] = nearest.first;
          second[i] = nearest.second;
          label[i] = nearest.label;
          second_label[i] = nearest.second_label;
        }
      }
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) out.set(i, {first[i], second[i], label[i], second_label[i]});
}

// The search along all lines of one axis: `count` lines of `length` pixels `stride` apart; `start`
// gives the first pixel of a line.
template <typename D, typename Start>
void search_lines(int64_t count, int64_t length, int64_t stride, D scale, D reach, Start&& start,
                  View<D> rows) {
  if (length == 1) return;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Line<D> line(length);
    Rows<D> found(kLanes);
    for (int64_t l = begin; l < end; ++l) {
      const int64_t from = start(l);
      for (int64_t i = 0; i < length; ++i) {
        line.rows.view().set(line.margin + i, rows.at(from + i * stride));
      }
      const int objects = line.prepare();
      if (objects == 0) continue;
      for (int64_t x = 0; x < length; x += kLanes) {
        search(line, x, objects == 2, scale, reach, found.view());
        for (int64_t i = 0; i < std::min(kLanes, length - x); ++i) {
          rows.set(from + (x + i) * stride, found.view().at(i));
        }
      }
    }
  });
}

template <typename D>
UNET_FAST_SIMD void roots(const D* squares, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float root = static_cast<float>(std::sqrt(static_cast<double>(squares[i])));
    out[i] = squares[i] >= kFar<D> ? INFINITY : root;
  }
}

template <typename D>
void distances(const std::vector<D>& squares, float* out) {
  constexpr int64_t kChunk = 16384;
  const int64_t n = static_cast<int64_t>(squares.size());
  torch::stable::parallel_for(0, (n + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kChunk;
    roots(squares.data() + from, std::min(n, end * kChunk) - from, out + from);
  });
}

template <typename D>
void transform(const int32_t* labels, const Shape& shape, const double (&spacing)[3], double reach,
               float* first, float* second) {
  const auto scale = [&](int axis) { return static_cast<D>(spacing[axis] * spacing[axis]); };
  const D limit = static_cast<D>(std::min(reach * reach, static_cast<double>(kFar<D>)));
  const int64_t slice = shape.height * shape.width;
  const int64_t slices = shape.images * shape.depth;
  const int64_t groups = (shape.width + kColumns - 1) / kColumns;
  Rows<D> nearest(shape.pixels());
  const View<D> rows = nearest.view();
  std::atomic<int32_t> least{0};
  torch::stable::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t x = task % groups * kColumns;
      const int64_t offset = task / groups * slice + x;
      const int32_t found = sweep(labels + offset, shape.height, shape.width,
                                  std::min(kColumns, shape.width - x), scale(1), rows.from(offset));
      int32_t seen = least.load();
      while (found < seen && !least.compare_exchange_weak(seen, found)) {
      }
    }
  });
  STD_TORCH_CHECK(least.load() == 0, "two_nearest: labels must be >= 0, got ", least.load());
  search_lines(
      slices * shape.height, shape.width, 1, scale(2), limit,
      [&](int64_t line) { return line * shape.width; }, rows);
  search_lines(
      shape.images * slice, shape.depth, slice, scale(0), limit,
      [&](int64_t line) { return line / slice * slice * shape.depth + line % slice; }, rows);
  distances(nearest.first, first);
  distances(nearest.second, second);
}

// labels (N, D, H, W), int32, spacing of the three axes. Objects farther than `reach` may be
// missed.
std::tuple<Tensor, Tensor> two_nearest(const Tensor& labels_in, double z, double y, double x,
                                       double reach) {
  const Tensor labels = as_contiguous(labels_in);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Int && labels.dim() == 4,
                  "two_nearest: the operator takes int32 labels (N, D, H, W)");
  const Tensor first = new_tensor(labels, sizes(labels), aoti_torch_dtype_float32());
  const Tensor second = new_tensor(labels, sizes(labels), aoti_torch_dtype_float32());
  const Shape shape{labels.size(0), labels.size(1), labels.size(2), labels.size(3)};
  if (shape.pixels() == 0) return {first, second};
  const double spacing[3] = {z, y, x};
  const int32_t* const in = labels.const_data_ptr<int32_t>();
  float* const out = first.mutable_data_ptr<float>();
  float* const out2 = second.mutable_data_ptr<float>();
  // The longest distance must stay well below kFar: to be told from it, and added to it.
  const double longest =
      std::pow(shape.depth, 2) + std::pow(shape.height, 2) + std::pow(shape.width, 2);
  if (z == 1 && y == 1 && x == 1 && longest < kFar<int32_t> / 2) {
    transform<int32_t>(in, shape, spacing, reach, out, out2);
  } else {
    transform<double>(in, shape, spacing, reach, out, out2);
  }
  return {first, second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) { m.impl("two_nearest", TORCH_BOX(&two_nearest)); }

}  // namespace unet_fast::border_weight_map
