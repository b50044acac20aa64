#pragma once

#include <algorithm>

#include "border_weight_map/far_search.h"

// Searches along a line for the nearest objects; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

constexpr int64_t kMargin = 2 * kMostLanes;  // empty pixels at each end of a row

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

}  // namespace
}  // namespace unet_fast::border_weight_map
