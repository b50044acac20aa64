#pragma once

#include <vector>

#include "border_weight_map/labels.h"

// The two nearest objects of each pixel, and the column sweeps that find them; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

// A view of the two nearest objects of each pixel in a run; structure of arrays.
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

// What the sweep of each column has met so far (see Met); structure of arrays.
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
  // Copies n columns of `source`, from column `from` on, to the columns of this view from `to` on.
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

// One row of the downward sweep: writes the squared distances to the objects met so far.
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

// One row of the upward sweep, after the downward one; `y` counts rows from the bottom.
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

}  // namespace
}  // namespace unet_fast::border_weight_map
