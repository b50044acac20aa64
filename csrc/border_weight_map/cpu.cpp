#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "border_weight_map/numerics.h"
#include "border_weight_map/operands.h"
#include "common/dispatch.h"
#include "common/first_bad.h"
#include "common/simd.h"
#include "common/tensors.h"

namespace unet_fast::border_weight_map {
namespace {

// Pixels of a row searched together; of 32-bit distances, one vector of AVX-512.
template <typename D>
constexpr int64_t kLanes = sizeof(D) == 2 ? 32 : 16;
constexpr int64_t kMostLanes = 32;
constexpr int64_t kMargin = 2 * kMostLanes;  // of nothing at both ends of a row
constexpr int64_t kColumns = 64;             // columns swept together
constexpr int64_t kSteps = 8;                // of a search between looks at whether it may end
constexpr int64_t kRows = 8;                 // the least work of a thread
constexpr int64_t kBandBytes = 1 << 19;      // of the nearest objects that a thread works on
// Searches that go farther than this many pixels skip what cannot matter.
constexpr int64_t kFarSearch = 64;

int64_t groups(int64_t n, int64_t size) { return (n + size - 1) / size; }

// ---- Reading labels

// Copies ids; those ignored become 0. Returns the greatest, or -1 if one is out of range.
template <typename Id>
UNET_FAST_SIMD int32_t convert(const Id* in, int64_t n, bool ignores, Id ignored, int32_t* out) {
  int bad = 0;
  int32_t highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Id id = ignores && in[i] == ignored ? Id{0} : in[i];
    bad |= id < 0 || static_cast<int64_t>(id) > kMaxLabel;
    out[i] = static_cast<int32_t>(id);
    highest = std::max(highest, static_cast<int32_t>(id));
  }
  return bad != 0 ? -1 : highest;
}

template <typename Id>
UNET_FAST_SIMD void mark_ignored(const Id* in, int64_t n, Id ignored, uint8_t* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = in[i] == ignored ? kIgnored : target[i];
}

UNET_FAST_SIMD void keep_class(const uint8_t* classes, int64_t n, int32_t c, int32_t* objects) {
  for (int64_t i = 0; i < n; ++i) objects[i] = classes[i] == c ? objects[i] : 0;
}

// A label map of any integer type, with the label to ignore and the map of classes, if any.
struct Labels {
  Labels(const char* op, const Tensor& labels, const std::optional<Tensor>& class_map,
         std::optional<int64_t> ignore_label)
      : op(op),
        type(labels.scalar_type()),
        data(labels.data_ptr()),
        classes(class_map ? class_map->const_data_ptr<uint8_t>() : nullptr),
        ignore(ignore_label) {}

  // Objects of class `c` (of any class, if there is no map) in n pixels from pixel `from` on.
  // Where the sweeps along whole columns have checked them, int32_t labels are taken as they lie.
  const int32_t* read_checked(int64_t from, int64_t n, int32_t c, int32_t* objects) const {
    if (type == ScalarType::Int && classes == nullptr && !ignore) {
      return static_cast<const int32_t*>(data) + from;
    }
    read(from, n, c, objects);
    return objects;
  }

  void read(int64_t from, int64_t n, int32_t c, int32_t* objects) const {
    int32_t most = 0;
    dispatch_labels(type, op, [&]<typename Id>() {
      const Id ignored = static_cast<Id>(ignore.value_or(0));
      most = convert(static_cast<const Id*>(data) + from, n, ignores<Id>(), ignored, objects);
    });
    if (most < 0) find_bad(from, n);
    for (int32_t seen = highest.load(); most > seen;) {
      if (highest.compare_exchange_weak(seen, most)) break;
    }
    if (classes != nullptr) keep_class(classes + from, n, c, objects);
  }

  void mark(int64_t from, int64_t n, uint8_t* target) const {
    dispatch_labels(type, op, [&]<typename Id>() {
      if (!ignores<Id>()) return;
      mark_ignored(static_cast<const Id*>(data) + from, n, static_cast<Id>(*ignore), target);
    });
  }

  // Whether there is an ignored label, and an id can be equal to it.
  template <typename Id>
  bool ignores() const {
    return ignore.has_value() && *ignore == static_cast<int64_t>(static_cast<Id>(*ignore));
  }

  int64_t value(int64_t i) const {
    int64_t result = 0;
    dispatch_labels(type, op, [&]<typename Id>() { result = static_cast<const Id*>(data)[i]; });
    return result;
  }

  bool allowed(int64_t id) const { return id == ignore || (id >= 0 && id <= kMaxLabel); }

  void find_bad(int64_t from, int64_t n) const {
    for (int64_t i = from; i < from + n; ++i) {
      if (!allowed(value(i))) return bad.found(i);
    }
  }

  // Raises if anything read was out of range.
  void check() const {
    if (!bad.any()) return;
    const int64_t i = bad.index.load();
    STD_TORCH_CHECK(false, op, ": labels must be in [0, ", kMaxLabel, "], got ", value(i),
                    " at flat index ", i);
  }

  const char* op;
  ScalarType type;
  const void* data;
  const uint8_t* classes;
  std::optional<int64_t> ignore;
  mutable FirstBad bad;
  mutable std::atomic<int32_t> highest{0};  // label that was read
};

// ---- The ridge between touching objects, and what pixels are trained to be

UNET_FAST_SIMD void mark_touching(const int32_t* here, const int32_t* neighbours, int64_t n,
                                  uint8_t* ridge) {
  for (int64_t i = 0; i < n; ++i) ridge[i] |= touches(here[i], neighbours[i]) ? 1 : 0;
}

// A row of objects between two pixels of background.
struct PaddedRow {
  explicit PaddedRow(int64_t width) : pixels(width + 2) {}
  int32_t* at() { return pixels.data() + 1; }
  std::vector<int32_t> pixels;
};

// The ridge of one row after another.
class RidgeOfRows {
 public:
  RidgeOfRows(const Labels& labels, const Shape& shape, int64_t ridge)
      : labels_(labels), shape_(shape), ridge_(ridge), here_(shape.width), there_(shape.width) {}

  // Reads the objects of class `c` in row number `row` of the batch; `marks` gets 1 on the ridge.
  const int32_t* read(int64_t row, int32_t c, uint8_t* marks) {
    const int64_t width = shape_.width;
    const int64_t y = row % shape_.height, z = row / shape_.height % shape_.depth;
    labels_.read(row * width, width, c, here_.at());
    std::fill(marks, marks + width, 0);
    if (ridge_ == kNone) return here_.at();
    for (int dz = -1; dz <= 1; ++dz) {
      for (int dy = -1; dy <= 1; ++dy) {
        if (z + dz < 0 || z + dz >= shape_.depth || y + dy < 0 || y + dy >= shape_.height) continue;
        if (dz == 0 && dy == 0) {
          mark(dz, dy, here_, marks);
        } else if (in_ridge(ridge_, dz, dy, -1) || in_ridge(ridge_, dz, dy, 0)) {
          labels_.read((row + dz * shape_.height + dy) * width, width, c, there_.at());
          mark(dz, dy, there_, marks);
        }
      }
    }
    return here_.at();
  }

 private:
  void mark(int dz, int dy, PaddedRow& neighbours, uint8_t* marks) {
    for (int dx = -1; dx <= 1; ++dx) {
      if (!in_ridge(ridge_, dz, dy, dx)) continue;
      mark_touching(here_.at(), neighbours.at() + dx, shape_.width, marks);
    }
  }

  const Labels& labels_;
  const Shape& shape_;
  const int64_t ridge_;
  PaddedRow here_, there_;
};

template <typename Id>
UNET_FAST_SIMD void carve(const Id* in, const uint8_t* ridge, int64_t n, Id* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = ridge[i] != 0 ? Id{0} : in[i];
}

// labels (N, D, H, W). Returns them without the ridge.
Tensor separate_touching(const Tensor& labels_in, int64_t ridge) {
  const Tensor input = as_contiguous(labels_in);
  const Shape shape(input);
  Tensor result = new_like(input);
  const Labels labels("separate_touching", input, std::nullopt, std::nullopt);
  const int64_t rows = shape.pixels() == 0 ? 0 : shape.pixels() / shape.width;
  torch::stable::parallel_for(0, rows, kRows, [&](int64_t begin, int64_t end) {
    RidgeOfRows ridges(labels, shape, ridge);
    std::vector<uint8_t> marks(shape.width);
    for (int64_t row = begin; row < end; ++row) {
      ridges.read(row, 0, marks.data());
      const int64_t from = row * shape.width;
      dispatch_labels(labels.type, labels.op, [&]<typename Id>() {
        carve(static_cast<const Id*>(labels.data) + from, marks.data(), shape.width,
              static_cast<Id*>(result.data_ptr()) + from);
      });
    }
  });
  labels.check();
  return result;
}

UNET_FAST_SIMD void mark_objects(const int32_t* objects, const uint8_t* ridge, int64_t n,
                                 uint8_t* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = objects[i] != 0 && ridge[i] == 0 ? 1 : 0;
}

UNET_FAST_SIMD int64_t count(const uint8_t* target, int64_t n, int32_t c) {
  int32_t result = 0;
  for (int64_t i = 0; i < n; ++i) result += target[i] == c ? 1 : 0;
  return result;
}

// How many pixels of each image are of each class.
using Counts = std::vector<std::atomic<int64_t>>;

// The class of every pixel: `foreground` if given, else the map of classes or, without one, 1 for
// objects; 0 on the ridge, kIgnored where ignored.
void find_target(const Labels& labels, const Shape& shape, const bool* foreground,
                 const Settings& settings, uint8_t* target, Counts& counts) {
  const int64_t width = shape.width, classes = settings.classes;
  FirstBad bad;
  torch::stable::parallel_for(0, shape.pixels() / width, kRows, [&](int64_t begin, int64_t end) {
    RidgeOfRows ridges(labels, shape, settings.ridge);
    std::vector<uint8_t> marks(width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = row * width;
      uint8_t* const out = target + from;
      if (foreground != nullptr) {
        std::copy(foreground + from, foreground + from + width, out);
      } else if (labels.classes == nullptr) {
        const int32_t* const objects = ridges.read(row, 0, marks.data());
        mark_objects(objects, marks.data(), width, out);
      } else {
        std::copy(labels.classes + from, labels.classes + from + width, out);
        for (int32_t c = 1; c < classes; ++c) {
          ridges.read(row, c, marks.data());
          carve(out, marks.data(), width, out);
        }
      }
      labels.mark(from, width, out);
      int64_t counted = count(out, width, kIgnored);
      for (int32_t c = 0; c < classes; ++c) {
        const int64_t found = count(out, width, c);
        counts[from / shape.volume() * classes + c] += found;
        counted += found;
      }
      if (counted < width) bad.found(row);
    }
  });
  labels.check();
  if (!bad.any()) return;
  const uint8_t* wrong = target + bad.index.load() * width;
  while (*wrong < classes || *wrong == kIgnored) ++wrong;
  STD_TORCH_CHECK(false, labels.op, ": classes must be in [0, ", classes - 1,
                  "] or 255 (ignored), got ", static_cast<int>(*wrong));
}

// ---- Distances

// Nearest objects of a run of pixels, structure of arrays.
template <typename D>
struct View {
  D *first, *second;
  LabelOf<D>*label, *second_label;

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
struct Pixels {
  explicit Pixels(int64_t n, D distance = kFar<D>)
      : first(n, distance), second(n, distance), label(n), second_label(n) {}
  View<D> view() { return {first.data(), second.data(), label.data(), second_label.data()}; }

  std::vector<D> first, second;
  std::vector<LabelOf<D>> label, second_label;
};

template <typename D>
UNET_FAST_SIMD void copy(View<D> from, int64_t n, View<D> to) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) to.set(i, from.at(i));
}

// What sweeps along columns have met, structure of arrays.
struct ColumnView {
  int32_t *label, *other, *at, *other_at;

  Met meet(int64_t i, int32_t object, int32_t position) const {
    Met met{label[i], other[i], at[i], other_at[i]};
    met.meet(object, position);
    label[i] = met.label;
    other[i] = met.other;
    at[i] = met.at;
    other_at[i] = met.other_at;
    return met;
  }
  // The columns of `source` from `from` on become the n columns from `to` on.
  void copy(const ColumnView& source, int64_t from, int64_t n, int64_t to) const {
    std::copy_n(source.label + from, n, label + to);
    std::copy_n(source.other + from, n, other + to);
    std::copy_n(source.at + from, n, at + to);
    std::copy_n(source.other_at + from, n, other_at + to);
  }
};

struct Columns {
  explicit Columns(int64_t n) : label(n), other(n), at(n, -kNever), other_at(n, -kNever) {}
  ColumnView view() { return {label.data(), other.data(), at.data(), other_at.data()}; }

  std::vector<int32_t> label, other, at, other_at;
};

UNET_FAST_SIMD void meet(const int32_t* objects, int64_t n, int32_t y, ColumnView columns) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) columns.meet(i, objects[i], y);
}

// One row of a sweep down: the distances to what was met.
template <typename D>
UNET_FAST_SIMD void step_down(const int32_t* objects, int64_t n, int32_t y, D scale,
                              ColumnView columns, View<D> row) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Met met = columns.meet(i, objects[i], y);
    const auto label = static_cast<LabelOf<D>>(met.label),
               other = static_cast<LabelOf<D>>(met.other);
    row.set(i, {squared(y - met.at, scale), squared(y - met.other_at, scale), label, other});
  }
}

// One row of a sweep up, after the one down. `y` counts from below.
template <typename D>
UNET_FAST_SIMD void step_up(int64_t n, int32_t y, D scale, ColumnView columns, View<D> row) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    Nearest<D> nearest = row.at(i);
    const Met met = columns.meet(i, nearest.first == 0 ? nearest.label : 0, y);
    nearest.add(squared(y - met.at, scale), static_cast<LabelOf<D>>(met.label));
    nearest.add(squared(y - met.other_at, scale), static_cast<LabelOf<D>>(met.other));
    row.set(i, nearest);
  }
}

// What stretches of `size` pixels of a line hold, by which a far search skips them.
template <typename D>
struct Blocks {
  Blocks(int64_t n, int64_t size)
      : size(size), least(groups(n, size)), low(least.size()), high(least.size()) {}

  void clear() {
    std::fill(least.begin(), least.end(), kFar<D>);
    std::fill(low.begin(), low.end(), INT32_MAX);
    std::fill(high.begin(), high.end(), 0);
  }
  void add(int64_t i, D first, int32_t lowest, int32_t highest) {
    const int64_t b = i / size;
    least[b] = std::min(least[b], first);
    low[b] = std::min(low[b], lowest);
    high[b] = std::max(high[b], highest);
  }
  // Whether pixels [from, to], a squared distance `near` away along the line, hold nothing nearer
  // than `first` or, of objects other than `label` (0: no such one), than `second`.
  bool skips(int64_t from, int64_t to, D near, D first, D second, int32_t label) const {
    const int64_t last = std::min(to / size, static_cast<int64_t>(least.size()) - 1);
    for (int64_t b = std::max<int64_t>(from, 0) / size; b <= last; ++b) {
      const bool same = low[b] == label && high[b] == label;
      if (least[b] + near < (same ? first : second)) return false;
    }
    return true;
  }

  int64_t size;
  std::vector<D> least;            // squared distance
  std::vector<int32_t> low, high;  // ids; INT32_MAX and 0 for none
};

// The least distance and the range of ids that kLanes pixels know of.
template <typename D>
UNET_FAST_SIMD void summarise(View<D> pixels, D* first, int32_t* lowest, int32_t* highest) {
  D least = kFar<D>;
  int32_t low = INT32_MAX, high = 0;
  for (int64_t i = 0; i < kLanes<D>; ++i) {
    const int32_t label = pixels.label[i], second = pixels.second_label[i];
    const int32_t label_or_most = label == 0 ? INT32_MAX : label;
    const int32_t second_or_most = second == 0 ? INT32_MAX : second;
    least = std::min(least, pixels.first[i]);
    low = std::min(low, std::min(label_or_most, second_or_most));
    high = std::max(high, std::max(label, second));
  }
  *first = least;
  *lowest = low;
  *highest = high;
}

// What a row holds, in stretches of two lengths.
template <typename D>
struct Summary {
  explicit Summary(int64_t width)
      : width(width), blocks(width, kLanes<D>), superblocks(width, 16 * kLanes<D>) {}

  // Returns the number of objects: 0, 1 or, if there are more, 2.
  int of(View<D> row) {
    blocks.clear();
    superblocks.clear();
    int32_t low = INT32_MAX, high = 0;
    for (int64_t x = 0; x < width; x += kLanes<D>) {
      D first;
      int32_t lowest, highest;
      summarise(row.from(x), &first, &lowest, &highest);
      blocks.add(x, first, lowest, highest);
      superblocks.add(x, first, lowest, highest);
      low = std::min(low, lowest);
      high = std::max(high, highest);
    }
    return high == 0 ? 0 : low == high ? 1 : 2;
  }

  int64_t width;
  Blocks<D> blocks, superblocks;
};

// The squared distance below which objects can still change what matters for any of kLanes
// pixels.
template <typename D>
inline __attribute__((always_inline)) D bound(Reach<D> reach, D near, View<D> lanes) {
  D result = 0;
  for (int64_t i = 0; i < kLanes<D>; ++i) {
    const D wanted = reach.bound(near, lanes.first[i], lanes.second[i]);
    result = std::max(result, wanted);
  }
  return result;
}

// How many steps from `step` on can be skipped, because what they meet on both sides of kLanes
// pixels, from pixel x of the row on, changes nothing.
template <typename D>
inline __attribute__((always_inline)) int64_t steps_to_skip(const Summary<D>& row, int64_t x,
                                                            int64_t step, D near, View<D> lanes) {
  D most_first = 0, most_second = 0;  // what the pixel that waits for the most has so far
  int32_t low = INT32_MAX, high = 0;
  for (int64_t i = 0; i < kLanes<D>; ++i) {
    most_first = std::max(most_first, lanes.first[i]);
    most_second = std::max(most_second, lanes.second[i]);
    low = std::min<int32_t>(low, lanes.label[i]);
    high = std::max<int32_t>(high, lanes.label[i]);
  }
  const int32_t label = low == high ? low : 0;
  const auto skips = [&](const Blocks<D>& blocks, int64_t steps) {
    const int64_t last = step + steps - 1;
    return blocks.skips(x - last, x - step + kLanes<D> - 1, near, most_first, most_second, label) &&
           blocks.skips(x + step, x + last + kLanes<D> - 1, near, most_first, most_second, label);
  };
  if (skips(row.superblocks, row.superblocks.size)) return row.superblocks.size;
  return skips(row.blocks, kSteps) ? kSteps : 0;
}

// Searches outward from kLanes pixels, `lanes`, until nothing that matters can come. They lie at
// `from` in pixels `stride` apart; there are `before` and `after` steps to both sides, past which
// the last pixels are met again at too large a distance, which does no harm. `row`: whose blocks
// may be skipped, from its pixel x, or null. kLast: no later axis asks for second labels.
template <bool kLast, bool kInRow, typename D>
UNET_FAST_SIMD void search(View<D> from, int64_t stride, int64_t before, int64_t after, D scale,
                           const Reach<D>& reach, const Summary<D>* row, int64_t x, View<D> lanes) {
  const int64_t steps = std::max(before, after);
  for (int64_t step = 1; step <= steps;) {
    const D near = squared(static_cast<int32_t>(step), scale);
    if (near >= bound(reach, near, lanes)) break;
    if (row != nullptr) {
      const int64_t skipped = steps_to_skip(*row, x, step, near, lanes);
      step += skipped;
      if (skipped > 0) continue;
    }
    D far[kSteps];
    int64_t left[kSteps], right[kSteps];
    for (int64_t k = 0; k < kSteps; ++k) {
      far[k] = static_cast<D>(static_cast<D>(step + k) * static_cast<D>(step + k) * scale);
      // In a row only the first step is clamped, as there is a margin: the others are constants
      // away.
      left[k] = kInRow ? -std::min(step, before) - k : -std::min(step + k, before) * stride;
      right[k] = kInRow ? std::min(step, after) + k : std::min(step + k, after) * stride;
    }
    UNET_FAST_INDEPENDENT
    for (int64_t i = 0; i < kLanes<D>; ++i) {
      Nearest<D> nearest = lanes.at(i);
#pragma GCC unroll 8
      for (int64_t k = 0; k < kSteps; ++k) {
        nearest.add(from.at(left[k] + i), far[k]);
        nearest.add(from.at(right[k] + i), far[k]);
      }
      lanes.first[i] = nearest.first;
      lanes.second[i] = nearest.second;
      lanes.label[i] = nearest.label;
      if constexpr (!kLast) lanes.second_label[i] = nearest.second_label;
    }
    step += kSteps;
  }
}

// ---- What is made of the distances of a row

// Distances of squared ones. `exact`: all squares are exact in float.
template <typename D>
UNET_FAST_SIMD void roots(const D* squares, int64_t n, bool exact, float* out) {
  if (exact) {
    for (int64_t i = 0; i < n; ++i) {
      const float square = static_cast<float>(squares[i]);
      out[i] = root(squares[i] < kFar<D> ? square : kFar<float>);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = root(squares[i]);
  }
}

// The distances themselves.
struct Distances {
  static constexpr bool kOfAllPixels = true;
  float *first, *second;
  bool exact_in_float;  // the squares are

  template <typename D>
  Reaches<D> reaches() const {
    return Reaches<D>::unlimited();
  }
  // What the search along the last axis starts from.
  template <typename D>
  void start(View<D> pixels, int64_t, int64_t n, View<D> found) const {
    copy(pixels, n, found);
  }
  template <typename D>
  void finish(View<D> found, int64_t from, int64_t n) const {
    roots(found.first, n, exact_in_float, first + from);
    roots(found.second, n, exact_in_float, second + from);
  }
};

// Pixels that get no term have both objects at once, so that no search goes out for them.
template <typename D>
UNET_FAST_SIMD void copy_where_needed(View<D> pixels, const uint8_t* target, int64_t n,
                                      bool everywhere, View<D> found) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const bool gets_term = gets_border(target[i], everywhere);
    const D first = pixels.first[i], second = pixels.second[i];
    found.first[i] = gets_term ? first : 0;
    found.second[i] = gets_term ? second : 0;
    found.label[i] = pixels.label[i];
  }
}

UNET_FAST_SIMD void class_weights(const uint8_t* target, int64_t n, const float* of_class,
                                  int64_t classes, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  for (int32_t c = 0; c < classes; ++c) {
    const float weight = of_class[c];
    for (int64_t i = 0; i < n; ++i) out[i] = target[i] == c ? weight : out[i];
  }
}

UNET_FAST_SIMD void add_terms(const float* first, const float* second, const uint8_t* target,
                              int64_t n, bool everywhere, Terms terms, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const bool gets_term = gets_border(target[i], everywhere);
    const float term = terms.border(first[i] + second[i]);
    out[i] += gets_term ? term : 0.0f;
  }
  if (terms.halo.height == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    const float halo = terms.halo(first[i]);
    out[i] += target[i] == 0 ? halo : 0.0f;
  }
}

// The weights: those of the classes, and the terms of the distances.
struct Weights {
  static constexpr bool kOfAllPixels = false;
  const Settings& settings;
  Terms terms;
  const float* of_classes;  // of each image
  int64_t volume;           // pixels of an image
  bool adds;                // the terms of one more class
  const uint8_t* target;
  float* out;

  template <typename D>
  Reaches<D> reaches() const {
    return terms.reaches<D>();
  }
  template <typename D>
  void start(View<D> pixels, int64_t from, int64_t n, View<D> found) const {
    copy_where_needed(pixels, target + from, n, settings.everywhere, found);
  }
  template <typename D>
  void finish(View<D> found, int64_t from, int64_t n) const {
    float* const to = out + from;
    if (!adds) {
      class_weights(target + from, n, of_classes + from / volume * settings.classes,
                    settings.classes, to);
    }
    std::vector<float> first(n), second(n);
    roots(found.first, n, true, first.data());
    roots(found.second, n, true, second.data());
    add_terms(first.data(), second.data(), target + from, n, settings.everywhere, terms, to);
  }
};

// ---- The transform

template <typename D>
D squared_size(double size) {
  return static_cast<D>(size * size);
}

// How slices are cut into bands of rows, so that the nearest objects of a band stay in the cache.
// What sweeps along whole columns have met is known where they enter each band, so every band is
// computed by itself.
struct Bands {
  explicit Bands(const Shape& shape)
      : rows(std::clamp<int64_t>(kBandBytes / (16 * shape.width), 8, 64)),
        in_slice(groups(shape.height, rows)),
        count(shape.images * shape.depth * in_slice),
        above(count * shape.width),
        below(count * shape.width),
        from_above(above.view()),
        from_below(below.view()) {}
  Bands(const Bands&) = delete;

  int64_t rows, in_slice, count;
  // As the sweeps enter, the columns of one band after another.
  Columns above, below;
  ColumnView from_above, from_below;
};

// Sweeps down and up along n columns of slice number `slice`, from column x on, for what enters
// the bands.
void sweep(const Labels& labels, int32_t c, const Shape& shape, int64_t slice, int64_t x,
           const Bands& bands) {
  const int64_t n = std::min(kColumns, shape.width - x), height = shape.height;
  int32_t objects[kColumns];
  Columns down(n), up(n);
  const auto band = [&](int64_t y) { return (slice * bands.in_slice + y / bands.rows); };
  for (int64_t y = 0; y < height; ++y) {
    if (y % bands.rows == 0) bands.from_above.copy(down.view(), 0, n, band(y) * shape.width + x);
    labels.read((slice * height + y) * shape.width + x, n, c, objects);
    meet(objects, n, static_cast<int32_t>(y), down.view());
  }
  for (int64_t y = height - 1; y >= 0; --y) {
    if (y == height - 1 || (y + 1) % bands.rows == 0) {
      bands.from_below.copy(up.view(), 0, n, band(y) * shape.width + x);
    }
    const int64_t from = (slice * height + y) * shape.width + x;
    meet(labels.read_checked(from, n, c, objects), n, static_cast<int32_t>(height - 1 - y),
         up.view());
  }
}

// Pixels from one row to the next: whole vectors and a margin, so that no search tests bounds; not
// a power of two, so that the pixels of a column fall into different sets of the cache.
int64_t row_pitch(int64_t width) {
  const int64_t pitch = groups(width, kMostLanes) * kMostLanes + kMargin;
  return pitch % (4 * kMostLanes) == 0 ? pitch + kMostLanes : pitch;
}

// The nearest objects of whole volumes, between the searches along rows and along the depth. Pixels
// behind the width are zero, so that no search goes out for them.
template <typename D>
struct Volumes {
  Volumes(const Tensor& like, const Shape& shape)
      : pitch(row_pitch(shape.width)), rows(shape.images * shape.depth * shape.height) {
    const int64_t n = rows * pitch;
    memory = new_tensor(like, {n * static_cast<int64_t>(2 * sizeof(D) + 2 * sizeof(LabelOf<D>))},
                        aoti_torch_dtype_uint8());
    D* const squares = static_cast<D*>(memory.data_ptr());
    auto* const ids = reinterpret_cast<LabelOf<D>*>(squares + 2 * n);
    view = {squares, squares + n, ids, ids + n};
  }
  View<D> row(int64_t i) const { return view.from(i * pitch); }

  int64_t pitch, rows;
  Tensor memory;
  View<D> view;
};

// The squared distance that the second nearest object stays under, one row further: it changes by
// no more than the size of a pixel. Strictly under it, also after rounding.
template <typename D>
UNET_FAST_SIMD void limit_second(const D* before, int64_t n, double size, D* second) {
  for (int64_t i = 0; i < n; ++i) {
    const double distance = std::sqrt(static_cast<double>(before[i])) + size;
    const double limit = distance * distance * (1 + 1e-9) + (std::is_integral_v<D> ? 2 : 0);
    const D known = before[i] < kFar<D> ? static_cast<D>(limit) : kFar<D>;
    second[i] = known < second[i] ? known : second[i];
  }
}

// The two nearest objects within the columns of a band, from what enters it; n rows of slice number
// `slice` from row y on.
template <typename D>
void sweep_band(const Labels& labels, int32_t c, const Shape& shape, const Bands& bands,
                int64_t band, int64_t slice, int64_t y, int64_t n, D scale, int32_t* objects,
                ColumnView columns, View<D> rows, int64_t pitch) {
  const int64_t width = shape.width;
  columns.copy(bands.from_above, band * width, width, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t from = (slice * shape.height + y + i) * width;
    step_down(labels.read_checked(from, width, c, objects), width, static_cast<int32_t>(y + i),
              scale, columns, rows.from(i * pitch));
  }
  columns.copy(bands.from_below, band * width, width, 0);
  for (int64_t i = n - 1; i >= 0; --i) {
    step_up(width, static_cast<int32_t>(shape.height - 1 - y - i), scale, columns,
            rows.from(i * pitch));
  }
}

template <bool kLast, typename D>
void search_row(View<D> row, int64_t width, Summary<D>* summary, D scale, Reach<D> reach,
                View<D> found) {
  const int objects = summary != nullptr ? summary->of(row) : 2;
  if (objects == 0) return;
  if (objects == 1) reach.second = -1;
  for (int64_t x = 0; x < width; x += kLanes<D>) {
    search<kLast, true>(row.from(x), 1, x + kLanes<D> - 1, width - 1 - x, scale, reach, summary, x,
                        found.from(x));
  }
}

// Along columns and rows, band by band: the nearest objects in the slice of every pixel. Those of
// images go to `sink`, row by row, those of volumes to `volumes`.
template <typename D, typename Sink>
void search_bands(const Labels& labels, int32_t c, const Shape& shape, const Spacing& spacing,
                  const Bands& bands, const Volumes<D>* volumes, const Sink& sink) {
  const int64_t width = shape.width, pitch = row_pitch(width);
  const D down = squared_size<D>(spacing.y), across = squared_size<D>(spacing.x);
  const Reaches<D> reaches = sink.template reaches<D>();
  const Reach<D>& reach = volumes == nullptr ? reaches.last : reaches.other;
  const bool far = reaches.most > kFarSearch * spacing.x;
  torch::stable::parallel_for(0, bands.count, 1, [&](int64_t begin, int64_t end) {
    Columns columns(width);
    std::vector<int32_t> objects(width);
    Pixels<D> band(kMargin + bands.rows * pitch);  // nothing before, between and behind the rows
    Pixels<D> results(2 * pitch, 0);               // of this row and the one before
    Summary<D> summary(width);
    bool follows = false;  // whether the row before is in `results`
    for (int64_t b = begin; b < end; ++b) {
      const int64_t slice = b / bands.in_slice, y = b % bands.in_slice * bands.rows;
      const int64_t n = std::min(bands.rows, shape.height - y);
      const View<D> rows = band.view().from(kMargin);
      sweep_band(labels, c, shape, bands, b, slice, y, n, down, objects.data(), columns.view(),
                 rows, pitch);
      follows = follows && y > 0;
      for (int64_t i = 0; i < n; ++i) {
        const View<D> in_column = rows.from(i * pitch);
        const int64_t row = slice * shape.height + y + i;
        if (volumes != nullptr) {
          const View<D> found = volumes->row(row);
          copy(in_column, width, found);
          for (int64_t x = width; x < pitch; ++x) found.set(x, {0, 0, 0, 0});
          search_row<false>(in_column, width, far ? &summary : nullptr, across, reach, found);
          continue;
        }
        const View<D> found = results.view().from(row % 2 * pitch);
        sink.start(in_column, row * width, width, found);
        if (Sink::kOfAllPixels && far && follows) {
          limit_second(results.second.data() + (row + 1) % 2 * pitch, width, spacing.y,
                       found.second);
        }
        search_row<true>(in_column, width, far ? &summary : nullptr, across, reach, found);
        sink.finish(found, row * width, width);
        follows = true;
      }
    }
  });
}

// Through the slices of volumes.
template <typename D, typename Sink>
void search_depth(const Shape& shape, D scale, const Volumes<D>& nearest, const Sink& sink) {
  const Reach<D> reach = sink.template reaches<D>().last;
  torch::stable::parallel_for(0, nearest.rows, kRows, [&](int64_t begin, int64_t end) {
    Pixels<D> result(nearest.pitch, 0);
    const View<D> found = result.view();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t z = row / shape.height % shape.depth;
      sink.start(nearest.row(row), row * shape.width, shape.width, found);
      for (int64_t x = 0; x < shape.width; x += kLanes<D>) {
        search<true, false>(nearest.row(row).from(x), shape.height * nearest.pitch, z,
                            shape.depth - 1 - z, scale, reach,
                            static_cast<const Summary<D>*>(nullptr), x, found.from(x));
      }
      sink.finish(found, row * shape.width, shape.width);
    }
  });
}

// The sweeps along whole columns, of all slices; checks the labels.
void sweep_columns(const Labels& labels, int32_t c, const Shape& shape, const Bands& bands) {
  const int64_t in_slice = groups(shape.width, kColumns);
  torch::stable::parallel_for(
      0, shape.images * shape.depth * in_slice, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          sweep(labels, c, shape, task / in_slice, task % in_slice * kColumns, bands);
        }
      });
  labels.check();
}

// The two nearest objects of class `c` of every pixel go to `sink`, row by row.
template <typename D, typename Sink>
void search_all(const Tensor& like, const Labels& labels, int32_t c, const Shape& shape,
                const Spacing& spacing, const Bands& bands, const Sink& sink) {
  if (shape.depth == 1) {
    search_bands<D>(labels, c, shape, spacing, bands, nullptr, sink);
  } else {
    const Volumes<D> volumes(like, shape);
    search_bands<D>(labels, c, shape, spacing, bands, &volumes, sink);
    search_depth(shape, squared_size<D>(spacing.z), volumes, sink);
  }
}

// labels (N, D, H, W), spacing of the three axes.
std::tuple<Tensor, Tensor> two_nearest(const Tensor& labels_in,
                                       const std::vector<double>& spacing_in) {
  const Tensor input = as_contiguous(labels_in);
  const Shape shape(input);
  const Spacing spacing(spacing_in);
  const Tensor first = new_tensor(input, sizes(input), aoti_torch_dtype_float32());
  const Tensor second = new_tensor(input, sizes(input), aoti_torch_dtype_float32());
  if (shape.pixels() == 0) return {first, second};
  const Labels labels("two_nearest", input, std::nullopt, std::nullopt);
  const Distances sink{first.mutable_data_ptr<float>(), second.mutable_data_ptr<float>(),
                       spacing.unit() && longest_square(shape, spacing) <= 1 << 24};
  const Bands bands(shape);
  sweep_columns(labels, 0, shape, bands);
  if (fits_int32(shape, spacing)) {
    search_all<int32_t>(input, labels, 0, shape, spacing, bands, sink);
  } else {
    search_all<double>(input, labels, 0, shape, spacing, bands, sink);
  }
  return {first, second};
}

// The weight of each class in each image: as given or, if not, balanced, pixels / (classes present
// x pixels of the class).
std::vector<float> weights_of_classes(const std::optional<Tensor>& given, const Shape& shape,
                                      int64_t classes, const Counts& counts) {
  std::vector<float> result(shape.images * classes);
  for (int64_t image = 0; image < shape.images; ++image) {
    int64_t total = 0, present = 0;
    for (int64_t c = 0; c < classes; ++c) {
      total += counts[image * classes + c];
      present += counts[image * classes + c] > 0 ? 1 : 0;
    }
    for (int64_t c = 0; c < classes; ++c) {
      result[image * classes + c] =
          given ? given->const_data_ptr<float>()[c]
                : balanced_weight(counts[image * classes + c], total, present);
    }
  }
  return result;
}

std::tuple<Tensor, Tensor> border_weights(
    const Tensor& labels_in, const std::optional<Tensor>& classes_in,
    const std::optional<Tensor>& foreground_in, const std::optional<Tensor>& class_weight_in,
    int64_t classes, int64_t ridge, std::optional<int64_t> ignore_label, double w0, double sigma,
    bool everywhere, double halo, double halo_sigma, const std::vector<double>& spacing) {
  const Operands in(labels_in, classes_in, foreground_in, class_weight_in);
  const Shape shape(in.labels);
  const Settings settings{classes, ridge,      ignore_label,    w0, sigma, everywhere,
                          halo,    halo_sigma, Spacing(spacing)};
  settings.check(shape, in);
  const Tensor target = new_tensor(in.labels, sizes(in.labels), aoti_torch_dtype_uint8());
  const Tensor weights = new_tensor(in.labels, sizes(in.labels), aoti_torch_dtype_float32());
  if (shape.pixels() == 0) return {target, weights};
  const Labels labels("border_weight_map", in.labels, in.classes, ignore_label);
  Counts counts(shape.images * classes);
  find_target(labels, shape, in.foreground ? in.foreground->const_data_ptr<bool>() : nullptr,
              settings, target.mutable_data_ptr<uint8_t>(), counts);
  const std::vector<float> of_classes = weights_of_classes(in.class_weight, shape, classes, counts);
  const Terms terms = settings.terms();
  // So short that squares of it, and of a few steps more, fit int16_t twice.
  const bool reach_is_short =
      settings.spacing.unit() && terms.reaches<float>().most < kMostSteps<int16_t> - 27;
  for (int32_t c = 1; c < classes; ++c) {
    const Weights sink{settings,
                       terms,
                       of_classes.data(),
                       shape.volume(),
                       c > 1,
                       target.const_data_ptr<uint8_t>(),
                       weights.mutable_data_ptr<float>()};
    const Bands bands(shape);
    sweep_columns(labels, c, shape, bands);
    if (reach_is_short && labels.highest.load() <= INT16_MAX) {
      search_all<int16_t>(in.labels, labels, c, shape, settings.spacing, bands, sink);
    } else if (fits_int32(shape, settings.spacing)) {
      search_all<int32_t>(in.labels, labels, c, shape, settings.spacing, bands, sink);
    } else {
      search_all<float>(in.labels, labels, c, shape, settings.spacing, bands, sink);
    }
  }
  return {target, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) {
  m.impl("two_nearest", TORCH_BOX(&two_nearest));
  m.impl("separate_touching", TORCH_BOX(&separate_touching));
  m.impl("border_weights", TORCH_BOX(&border_weights));
}

}  // namespace unet_fast::border_weight_map
