#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "border_weight_map/columns.h"

// Distances along a row by lower envelopes, for rows whose objects are far; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

// The lower envelope of the parabolas f(c) + (x - c)^2 over the pixels c of a row: of each x it
// tells the c of the least value (P. Felzenszwalb, D. Huttenlocher, "Distance Transforms of Sampled
// Functions", 2012). D is an integer type, so that all comparisons are exact.
template <typename D>
class Envelope {
 public:
  explicit Envelope(int64_t width) : width(width), parts(width) {}

  // A run of pixels, up to that of the next part, that have one c in common.
  struct Part {
    int64_t from, at;
    D value;  // f(at)
  };

  // Makes the envelope of value(c), kFar where there is none.
  template <typename Value>
  void make(const Value& value) {
    count = 0;
    for (int64_t c = 0; c < width; ++c) {
      const D here = value(c);
      if (here >= kFar<D>) continue;
      int64_t from = 0;
      for (; count > 0; --count) {
        from = first_nearer(parts[count - 1], c, here);
        if (from > parts[count - 1].from) break;
      }
      if (count == 0) from = 0;
      if (from < width) parts[count++] = {from, c, here};
    }
  }

  int64_t size() const { return count; }
  const Part& operator[](int64_t i) const { return parts[i]; }
  int64_t end_of(int64_t i) const { return i + 1 < count ? parts[i + 1].from : width; }
  // The part that pixel x belongs to.
  int64_t part_of(int64_t x) const {
    const auto after = std::upper_bound(parts.begin(), parts.begin() + count, x,
                                        [](int64_t x, const Part& part) { return x < part.from; });
    return after - parts.begin() - 1;
  }
  // Writes the values of pixels [from, to), all of part i.
  void fill(int64_t i, int64_t from, int64_t to, D* out) const {
    const auto at = static_cast<D>(parts[i].at);
    const D value = parts[i].value;
    for (int64_t x = from; x < to; ++x) {
      const D step = static_cast<D>(x) - at;
      out[x] = value + step * step;
    }
  }

 private:
  // The first pixel nearer to c than to an earlier part. Exact: a quotient that is no integer is at
  // least 1 / (2 width) away from one, much more than a rounding.
  int64_t first_nearer(const Part& part, int64_t c, D here) const {
    const double more = static_cast<double>(here) - static_cast<double>(part.value);
    const auto steps = static_cast<double>(c - part.at), sum = static_cast<double>(c + part.at);
    const double x = (more + steps * sum) / (2 * steps);
    return x < 0 ? 0 : static_cast<int64_t>(std::min(x, static_cast<double>(width))) + 1;
  }

  int64_t width, count = 0;
  std::vector<Part> parts;
};

// Finds the two nearest objects of all pixels of a row, in a time that does not depend on how far
// they are: one envelope tells the nearest, and one for each object that is nearest somewhere tells
// the nearest other one.
template <typename D>
class Envelopes {
 public:
  explicit Envelopes(int64_t width) : width(width), first(width), second(width), steps(width) {}

  // Returns whether it did; it leaves rows to the search where that takes less time.
  bool find(View<D> row, View<D> found) {
    const auto most = static_cast<int64_t>(steps / kCost) - 1;
    if (most < 1) return false;
    first.make([&](int64_t c) { return row.first[c]; });
    nearest.clear();
    for (int64_t i = 0; i < first.size(); ++i) {
      const int32_t label = row.label[first[i].at];
      if (std::find(nearest.begin(), nearest.end(), label) != nearest.end()) continue;
      if (static_cast<int64_t>(nearest.size()) == most) return false;
      nearest.push_back(label);
    }
    for (const int32_t label : nearest) find_of(label, row, found);
    return true;
  }

  // Takes the distances of a row as an estimate of those of the next one.
  void learn(const D* second) {
    double sum = 0;
    for (int64_t x = 0; x < width; x += kSample) sum += std::sqrt(static_cast<double>(second[x]));
    steps = sum / static_cast<double>(groups(width, kSample));
  }

 private:
  static constexpr int64_t kCost = 6;  // steps of a search that take as long as an envelope
  static constexpr int64_t kSample = 16;

  // Finds the two nearest objects of the pixels to which object `label` is nearest.
  void find_of(int32_t label, View<D> row, View<D> found) {
    second.make([&](int64_t c) { return row.label[c] == label ? row.second[c] : row.first[c]; });
    for (int64_t i = 0; i < first.size(); ++i) {
      if (row.label[first[i].at] != label) continue;
      const int64_t from = first[i].from, to = first.end_of(i);
      first.fill(i, from, to, found.first);
      std::fill(found.label + from, found.label + to, label);
      if (second.size() == 0) std::fill(found.second + from, found.second + to, kFar<D>);
      for (int64_t x = from, j = second.part_of(from); x < to && j >= 0; ++j) {
        const int64_t end = std::min(to, second.end_of(j)), at = second[j].at;
        const bool other = row.label[at] == label;
        second.fill(j, x, end, found.second);
        std::fill(found.second_label + x, found.second_label + end,
                  other ? row.second_label[at] : row.label[at]);
        x = end;
      }
    }
  }

  int64_t width;
  Envelope<D> first, second;
  std::vector<int32_t> nearest;  // the objects that are nearest somewhere
  double steps;                  // that a search of a pixel takes, about
};

}  // namespace
}  // namespace unet_fast::border_weight_map
