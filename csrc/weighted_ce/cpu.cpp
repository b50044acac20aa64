#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/simd.h"
#include "weighted_ce/numerics.h"
#include "weighted_ce/operands.h"

namespace unet_fast::weighted_ce {
namespace {

// Pixels of one partial sum. Fixed, so that the sums are added in one order for any number of
// threads.
constexpr int64_t kChunk = 8192;
// Pixels worked on together: the logits of a block as planes of `kBlock` values stay in the L1
// cache for few classes. More classes take blocks of fewer pixels (block_size).
constexpr int64_t kBlock = 256;
constexpr int64_t kBlockValues = 16384;  // C x pixels of a block: 64 KiB in float
constexpr int64_t kLanes = 16;           // partial sums side by side; divides every block size

int64_t block_size(int64_t classes) {
  return std::clamp(kBlockValues / classes / kLanes * kLanes, kLanes, kBlock);
}

// One block: structure of arrays, so that the loops over pixels vectorise.
template <typename A>
struct Block {
  explicit Block(int64_t classes) : size(block_size(classes)), logits(classes * size) {}
  A* plane(int64_t c) { return logits.data() + c * size; }

  const int64_t size;
  std::vector<A> logits;  // (C, size); holds exp(x - m) after softmax_terms
  alignas(64) A largest[kBlock], sum[kBlock], target_logit[kBlock], weight[kBlock], loss[kBlock];
  alignas(64) int32_t target[kBlock];   // 0 where ignored or out of range
  alignas(64) int32_t counted[kBlock];  // 1, or 0 where ignored or out of range
};

// Reads `n` values `stride` elements apart.
template <typename T, typename A>
UNET_FAST_SIMD void load(const T* source, int64_t stride, int64_t n, A* values) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<A>(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<A>(source[i * stride]);
  }
}

template <typename T, typename A>
UNET_FAST_SIMD void store(const A* values, int64_t stride, int64_t n, T* destination) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) destination[i] = static_cast<T>(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) destination[i * stride] = static_cast<T>(values[i]);
  }
}

// Reads targets and sets the weight of ignored pixels to 0. Returns whether one is out of range.
template <typename Id, typename A>
UNET_FAST_SIMD bool load_targets(const Id* source, int64_t n, int64_t classes, int64_t ignore_index,
                                 Block<A>& block) {
  int32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = source[i];
    const bool ignored = t == ignore_index;
    const bool valid = t >= 0 && t < classes && !ignored;
    bad |= !valid && !ignored;
    block.target[i] = valid ? static_cast<int32_t>(t) : 0;
    block.counted[i] = valid;
    block.weight[i] = valid ? block.weight[i] : A(0);
  }
  return bad != 0;
}

// x -> exp(x - m), with m, s and x_t of each pixel.
template <typename A>
UNET_FAST_SIMD void softmax_terms(int64_t classes, Block<A>& block) {
  const int64_t n = block.size;
  std::copy_n(block.plane(0), n, block.largest);
  for (int64_t c = 1; c < classes; ++c) {
    const A* const x = block.plane(c);
    for (int64_t i = 0; i < n; ++i) block.largest[i] = larger(block.largest[i], x[i]);
  }
  std::fill_n(block.sum, n, A(0));
  for (int64_t c = 0; c < classes; ++c) {
    A* const x = block.plane(c);
    for (int64_t i = 0; i < n; ++i) {
      block.target_logit[i] = block.target[i] == c ? x[i] : block.target_logit[i];
      x[i] = shifted_exp(x[i], block.largest[i]);
      block.sum[i] += x[i];
    }
  }
}

template <typename A>
UNET_FAST_SIMD void losses(Block<A>& block) {
  for (int64_t i = 0; i < block.size; ++i) {
    const A ce = cross_entropy(block.largest[i], block.sum[i], block.target_logit[i]);
    block.loss[i] = weighted(block.weight[i], ce);
  }
}

template <typename A>
UNET_FAST_SIMD Sums sums(const Block<A>& block) {
  double loss[kLanes] = {}, weight[kLanes] = {};
  int64_t pixels = 0;
  for (int64_t i = 0; i < block.size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) loss[lane] += block.loss[i + lane];
    for (int64_t lane = 0; lane < kLanes; ++lane) weight[lane] += block.weight[i + lane];
    for (int64_t lane = 0; lane < kLanes; ++lane) pixels += block.counted[i + lane];
  }
  Sums total;
  for (int64_t lane = 0; lane < kLanes; ++lane) total.add({loss[lane], weight[lane], 0});
  total.pixels = static_cast<double>(pixels);
  return total;
}

// exp(x - m) -> d loss / d x of one class. `sum` holds 1 / s, `loss` the coefficient.
template <typename A>
UNET_FAST_SIMD void gradients(int64_t c, Block<A>& block) {
  A* const x = block.plane(c);
  for (int64_t i = 0; i < block.size; ++i) {
    x[i] = gradient(x[i], block.sum[i], block.target[i] == c, block.loss[i]);
  }
}

// The first target that is neither a class nor ignore_index, found in the kernel's own pass.
struct FirstBad {
  std::atomic<int64_t> pixel{INT64_MAX};

  void found(int64_t p) {
    int64_t seen = pixel.load();
    while (p < seen && !pixel.compare_exchange_weak(seen, p)) {
    }
  }
};

template <typename Id>
void report_bad(const FirstBad& bad, const Id* target, int64_t classes, int64_t ignore_index) {
  const int64_t p = bad.pixel.load();
  if (p == INT64_MAX) return;
  const int64_t value = target[p];
  STD_TORCH_CHECK(false, "weighted_ce: target must be in [0, ", classes - 1, "] or ignore_index (",
                  ignore_index, "), got ", value, " at flat index ", p);
}

// Walks over all pixels, chunks in parallel, and calls `work(block, chunk, image, first pixel, n)`
// with the logits, targets and weights of each block loaded.
template <typename T, typename Id>
struct Traversal {
  using A = Accumulator<T>;
  const Layout layout;
  const T* const logits;
  const Id* const target;
  const A* const weight;  // or null: weight 1
  const int64_t ignore_index;
  FirstBad bad = {};

  int64_t chunks_per_image() const { return (layout.pixels + kChunk - 1) / kChunk; }
  int64_t chunks() const { return layout.images * chunks_per_image(); }

  template <typename Work>
  void run(Work&& work) {
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      Block<A> block(layout.classes);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t image = chunk / chunks_per_image();
        const int64_t first = chunk % chunks_per_image() * kChunk;
        const int64_t last = std::min(first + kChunk, layout.pixels);
        for (int64_t p = first; p < last; p += block.size) {
          const int64_t n = std::min(block.size, last - p);
          load_block(block, image, p, n);
          work(block, chunk, image, p, n);
        }
      }
    });
    report_bad(bad, target, layout.classes, ignore_index);
  }

  void load_block(Block<A>& block, int64_t image, int64_t p, int64_t n) {
    const T* const source = logits + layout.offset(image, p);
    for (int64_t c = 0; c < layout.classes; ++c) {
      load(source + c * layout.class_stride, layout.pixel_stride, n, block.plane(c));
      std::fill(block.plane(c) + n, block.plane(c) + block.size, A(0));
    }
    const int64_t flat = image * layout.pixels + p;
    if (weight != nullptr) {
      std::copy_n(weight + flat, n, block.weight);
    } else {
      std::fill_n(block.weight, n, A(1));
    }
    std::fill(block.weight + n, block.weight + block.size, A(0));
    std::fill(block.target + n, block.target + block.size, 0);
    std::fill(block.counted + n, block.counted + block.size, 0);
    if (load_targets(target + flat, n, layout.classes, ignore_index, block)) {
      for (int64_t i = 0; i < n; ++i) {
        if (!block.counted[i] && target[flat + i] != ignore_index) {
          bad.found(flat + i);
          break;
        }
      }
    }
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                   const std::optional<Tensor>& weight, int64_t reduction,
                                   int64_t ignore_index) {
  const Operands in(logits, target, weight);
  Tensor loss = new_loss(logits, target, reduction);
  Tensor divisor = new_normaliser(logits);
  dispatch_floating(logits.scalar_type(), "weighted_ce", [&]<typename T>() {
    using A = Accumulator<T>;
    dispatch_ids(target.scalar_type(), "weighted_ce", [&]<typename Id>() {
      Traversal<T, Id> traversal{in.layout, in.logits.const_data_ptr<T>(),
                                 in.target.const_data_ptr<Id>(), in.weight_data<A>(), ignore_index};
      A* const out = loss.mutable_data_ptr<A>();
      std::vector<Sums> partial(reduction == kNone ? 0 : traversal.chunks());
      traversal.run([&](Block<A>& block, [[maybe_unused]] int64_t chunk, int64_t image, int64_t p,
                        int64_t n) {
        softmax_terms(in.layout.classes, block);
        losses(block);
        if (reduction == kNone) {
          std::copy_n(block.loss, n, out + image * in.layout.pixels + p);
        } else {
          partial[chunk].add(sums(block));
        }
      });
      Sums total;
      for (const Sums& part : partial) total.add(part);
      const double denominator = normaliser(total, reduction);
      *divisor.mutable_data_ptr<double>() = denominator;
      if (reduction != kNone) *out = static_cast<A>(normalised(total.loss, denominator));
    });
  });
  return {loss, divisor};
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                const std::optional<Tensor>& weight, const Tensor& divisor, int64_t reduction,
                int64_t ignore_index) {
  const Operands in(logits, target, weight);
  const Tensor upstream = torch::stable::contiguous(grad);
  Tensor out = torch::stable::empty_like(logits);
  if (out.numel() == 0) return out;
  Output result(out);
  dispatch_floating(logits.scalar_type(), "weighted_ce_backward", [&]<typename T>() {
    using A = Accumulator<T>;
    dispatch_ids(target.scalar_type(), "weighted_ce_backward", [&]<typename Id>() {
      Traversal<T, Id> traversal{in.layout, in.logits.const_data_ptr<T>(),
                                 in.target.const_data_ptr<Id>(), in.weight_data<A>(), ignore_index};
      const A* const g = upstream.const_data_ptr<A>();
      const A scale = reduction == kNone
                          ? A(0)
                          : static_cast<A>(normalised(*g, *divisor.const_data_ptr<double>()));
      T* const to = result.tensor.mutable_data_ptr<T>();
      traversal.run([&](Block<A>& block, [[maybe_unused]] int64_t chunk, int64_t image, int64_t p,
                        int64_t n) {
        softmax_terms(in.layout.classes, block);
        const A* const pixel_grad = g + image * in.layout.pixels + p;
        for (int64_t i = 0; i < block.size; ++i) {
          block.sum[i] = inverse_sum(block.sum[i]);
          const A upstream_grad = reduction == kNone ? (i < n ? pixel_grad[i] : A(0)) : scale;
          block.loss[i] = weighted(block.weight[i], upstream_grad);
        }
        T* const destination = to + result.layout.offset(image, p);
        for (int64_t c = 0; c < in.layout.classes; ++c) {
          gradients(c, block);
          store(block.plane(c), result.layout.pixel_stride, n,
                destination + c * result.layout.class_stride);
        }
      });
    });
  });
  result.finish(out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CPU, m) {
  m.impl("weighted_ce", TORCH_BOX(&forward));
  m.impl("weighted_ce_backward", TORCH_BOX(&backward));
}

}  // namespace unet_fast::weighted_ce
