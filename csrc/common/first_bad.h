#pragma once

#include <atomic>
#include <cstdint>

namespace unet_fast {

/// The index of the first element that is out of range, whichever thread finds it. Kernels record
/// it while they work, and the operator raises afterwards.
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
