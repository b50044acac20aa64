#pragma once

#include <algorithm>
#include <vector>

#include "border_weight_map/columns.h"

// Row summaries that let searches of more than kFarSearch pixels skip blocks; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

// Pixels of a row searched together; with 32-bit distances, one AVX-512 vector.
template <typename D>
constexpr int64_t kLanes = sizeof(D) == 2 ? 32 : 16;
constexpr int64_t kMostLanes = 32;
constexpr int64_t kSteps = 8;  // search steps between checks for an early end
// Searches that may go farther than this many pixels skip blocks that cannot change the result.
constexpr int64_t kFarSearch = 64;

// Summary of a row in blocks of `size` pixels: the least distance and the range of ids in each, by
// which a far search skips blocks.
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
  // Whether pixels [from, to], at least a squared distance `near` away along the row, cannot change
  // the result: blocks that hold no object but `label` (0: none) have nothing nearer than `first`,
  // the others nothing nearer than `second`.
  bool skips(int64_t from, int64_t to, D near, D first, D second, int32_t label) const {
    const int64_t last = std::min(to / size, static_cast<int64_t>(least.size()) - 1);
    for (int64_t b = std::max<int64_t>(from, 0) / size; b <= last; ++b) {
      const bool same = low[b] == label && high[b] == label;
      if (least[b] + near < (same ? first : second)) return false;
    }
    return true;
  }

  int64_t size;
  std::vector<D> least;            // least squared distance
  std::vector<int32_t> low, high;  // range of ids; INT32_MAX and 0 if there is none
};

// The least squared distance and the range of ids among the nearest objects of kLanes pixels.
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

// Summary of a row in blocks of two sizes.
template <typename D>
struct Summary {
  explicit Summary(int64_t width)
      : width(width), blocks(width, kLanes<D>), superblocks(width, 16 * kLanes<D>) {}

  // Summarises `row`. Returns its number of objects: 0, 1 or, for two and more, 2.
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

// The number of steps, from `step` on, that can be skipped because the pixels they reach on both
// sides of the kLanes pixels at x cannot change the result.
template <typename D>
inline __attribute__((always_inline)) int64_t steps_to_skip(const Summary<D>& row, int64_t x,
                                                            int64_t step, D near, View<D> lanes) {
  D most_first = 0, most_second = 0;  // the largest ones found so far among the lanes
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

}  // namespace
}  // namespace unet_fast::border_weight_map
