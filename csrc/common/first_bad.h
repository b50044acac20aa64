#pragma once

#include <atomic>
#include <cstdint>

namespace unet_fast {

/// The first element with a value out of range, whichever thread meets it: kernels look in their
/// own pass, and the operator raises after it.
struct FirstBad {
  std::atomic<int64_t> index{INT64_MAX};

  void found(int64_t i) {
    int64_t seen = index.load();
    while (i < seen && !index.compare_exchange_weak(seen, i)) {
    }
  }
  bool any() const { return index.load() != INT64_MAX; }
};

}  // namespace unet_fast
