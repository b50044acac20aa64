#pragma once

#include <algorithm>

#include "border_weight_map/envelope.h"
#include "border_weight_map/far_search.h"

// Searches along a line for the nearest objects; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

constexpr int64_t kMargin = 2 * kMostLanes;  // empty pixels at each end of a row

// Row stride in pixels: whole vectors and a margin, so that searches need no bounds checks; no
// multiple of 4 kMostLanes, so that a column's pixels fall into different sets of the cache.
int64_t row_pitch(int64_t width) {
  const int64_t pitch = groups(width, kMostLanes) * kMostLanes + kMargin;
  return pitch % (4 * kMostLanes) == 0 ? pitch + kMostLanes : pitch;
}

// The squared distance below which further objects can still change the result of any of kLanes
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

// Searches outward from kLanes pixels, `lanes`, which lie at `from`, until no farther object can
// change their result. Pixels along the line are `stride` apart; it has `before` and `after` steps
// on both sides, past which the last pixels are met again at too large a distance, which does no
// harm. `row`: summary for skipping blocks, with the lanes at its pixel x, or null. kLast: no later
// axis needs the second labels.
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
      // In a row only the first step is clamped, as there is a margin: the other steps are at
      // constant offsets from it.
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

// Finds the two nearest objects of the pixels of rows, in the way that takes least time.
template <typename D>
struct RowSearch {
  // `far`: whether objects beyond kFarSearch pixels count; `all`: whether those at any distance do.
  RowSearch(int64_t width, D scale, Reach<D> reach, bool far, bool all)
      : width(width), scale(scale), reach(reach), far(far), summary(width), envelopes(width) {
    by_envelopes = far && all && std::is_integral_v<D>;  // which has pixels of size 1
  }

  template <bool kLast>
  void find(View<D> row, View<D> found) {
    if (!by_envelopes || !envelopes.find(row, found)) by_steps<kLast>(row, found);
    if (by_envelopes) envelopes.learn(found.second);
  }

  template <bool kLast>
  void by_steps(View<D> row, View<D> found) {
    const int objects = far ? summary.of(row) : 2;
    if (objects == 0) return;
    Reach<D> wanted = reach;
    if (objects == 1) wanted.second = -1;
    for (int64_t x = 0; x < width; x += kLanes<D>) {
      search<kLast, true>(row.from(x), 1, x + kLanes<D> - 1, width - 1 - x, scale, wanted,
                          far ? &summary : nullptr, x, found.from(x));
    }
  }

  int64_t width;
  D scale;
  Reach<D> reach;
  bool far, by_envelopes;
  Summary<D> summary;
  Envelopes<D> envelopes;
};

}  // namespace
}  // namespace unet_fast::border_weight_map
