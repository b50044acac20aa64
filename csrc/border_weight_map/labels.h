#pragma once

#include <algorithm>
#include <cstdint>

#include "border_weight_map/numerics.h"
#include "border_weight_map/operands.h"
#include "common/dispatch.h"
#include "common/first_bad.h"
#include "common/simd.h"
#include "common/tensors.h"

// Label maps, read row by row; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

constexpr int64_t kRows = 8;  // least number of rows per task
int64_t groups(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Copies ids, ignored ones as 0. Returns the greatest id, or -1 if one is out of range.
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

  // The objects of class `c` (of any class without a class map) in n pixels from pixel `from` on,
  // for labels that the sweeps along whole columns have checked. Plain int32_t labels are not
  // copied.
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

  // Whether there is a label to ignore that type Id can hold.
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

  // Raises if any label that was read is out of range.
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
  mutable std::atomic<int32_t> highest{0};  // greatest label that was read
};

}  // namespace
}  // namespace unet_fast::border_weight_map
