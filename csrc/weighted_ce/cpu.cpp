#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/first_bad.h"
#include "common/simd.h"
#include "weighted_ce/numerics.h"
#include "weighted_ce/operands.h"
#include "weighted_ce/planes.h"

namespace unet_fast::weighted_ce {
namespace {

// Pixels per partial sum. Fixed, so that the order of additions does not depend on the number of
// threads.
constexpr int64_t kChunk = 4096;
// Pixels processed together: their data stays in the L1 cache between passes.
constexpr int64_t kBlock = 256;
constexpr int64_t kLeastBlock = 64;  // smallest block, for very many classes
constexpr int64_t kValues = 16384;   // target for classes x pixels of a block
constexpr int64_t kLanes = 16;       // partial sums side by side

// Data of a block of pixels; structure of arrays, so that loops over pixels vectorise.
template <typename A>
struct Block {
  int64_t size;                        // pixels in use
  alignas(64) int32_t target[kBlock];  // -1 where ignored or out of range
  alignas(64) A weight[kBlock];        // 0 where target is -1
  alignas(64) A largest[kBlock], rest[kBlock], ties[kBlock], target_logit[kBlock], scale[kBlock];
  struct alignas(64) Lanes {
    A data[kLanes];
  };
  // Of all classes: logits, unless used in place; then terms exp(x - m); then gradients.
  std::vector<Lanes> values;

  Softmax<A> softmax(int64_t i) const { return {largest[i], rest[i]}; }
};

// Reads targets and weights (null: 1); targets that are ignored or out of range become -1. Returns
// whether all pixels count.
template <bool kWeighted, typename Id, typename A>
UNET_FAST_SIMD bool load_targets(const Id* target, const A* weight, int64_t classes,
                                 int64_t ignore_index, Block<A>& block) {
  for (int64_t i = 0; i < block.size; ++i) {
    const int64_t t = target[i];
    const bool in_range = static_cast<uint64_t>(t) < static_cast<uint64_t>(classes);
    block.target[i] = in_range && t != ignore_index ? static_cast<int32_t>(t) : -1;
  }
  int32_t least = 0;
  for (int64_t i = 0; i < block.size; ++i) {
    least = std::min(least, block.target[i]);
    block.weight[i] = block.target[i] < 0 ? A(0) : kWeighted ? weight[i] : A(1);
  }
  return least == 0;
}

// Adds the logits of n classes, from class c on, to the softmax of each pixel.
template <int64_t n, bool first, typename A>
UNET_FAST_SIMD void add_classes(Planes<const A> planes, int64_t c, Block<A>& block) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < block.size; ++i) {
    Softmax<A> softmax = first ? Softmax<A>::of(planes[c][i]) : block.softmax(i);
    A target_logit = first ? planes[c][i] : block.target_logit[i];
    for (int64_t k = first; k < n; ++k) {
      const A x = planes[c + k][i];
      softmax.add(x);
      target_logit = block.target[i] == static_cast<int32_t>(c + k) ? x : target_logit;
    }
    block.largest[i] = softmax.largest;
    block.rest[i] = softmax.rest;
    block.target_logit[i] = target_logit;
  }
}

// Updates the largest logit of each pixel with n more classes.
template <int64_t n, bool first, typename A>
UNET_FAST_SIMD void add_largest(Planes<const A> planes, int64_t c, Block<A>& block) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < block.size; ++i) {
    A largest = first ? Softmax<A>::of(planes[c][i]).largest : block.largest[i];
    for (int64_t k = first; k < n; ++k) {
      const A x = planes[c + k][i];
      largest = x > largest ? x : largest;
    }
    block.largest[i] = largest;
  }
}

// Adds the terms of n classes to the sums, and keeps them, maybe in the place of the logits.
template <int64_t n, bool first, typename A>
UNET_FAST_SIMD void add_terms(Planes<const A> planes, int64_t c, Block<A>& block, Planes<A> kept) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < block.size; ++i) {
    Terms<A> terms = first ? Terms<A>{} : Terms<A>{block.rest[i], block.ties[i]};
    const A largest = block.largest[i];
    for (int64_t k = 0; k < n; ++k) kept[c + k][i] = terms.add(planes[c + k][i], largest);
    block.rest[i] = terms.rest;
    block.ties[i] = terms.largest;
  }
}

template <typename A>
UNET_FAST_SIMD void finish_terms(Block<A>& block) {
  for (int64_t i = 0; i < block.size; ++i) {
    block.rest[i] = Terms<A>{block.rest[i], block.ties[i]}.softmax(block.largest[i]).rest;
  }
}

// Sums the losses and weights of the block in type S.
template <typename S, typename A>
UNET_FAST_SIMD Sums sums(const Block<A>& block) {
  S loss[kLanes] = {}, weight[kLanes] = {};
  for (int64_t i = 0; i < block.size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const S w = static_cast<S>(block.weight[i + lane]);
      const S ce = cross_entropy<S>(block.softmax(i + lane), block.target_logit[i + lane]);
      loss[lane] += weighted(w, ce);
      weight[lane] += w;
    }
  }
  Sums total;
  for (int64_t lane = 0; lane < kLanes; ++lane) total.add({loss[lane], weight[lane], 0});
  return total;
}

// Adds the losses and weights of the block.
template <typename A>
void add_losses(Block<A>& block, Sums& total) {
  std::fill(block.weight + block.size, std::end(block.weight), A(0));  // fills up the last lanes
  total.add(accurate_sums<A>([&]<typename S>() { return sums<S>(block); }));
}

// Writes the loss of each pixel.
template <typename A>
UNET_FAST_SIMD void write_losses(const Block<A>& block, A* loss) {
  for (int64_t i = 0; i < block.size; ++i) {
    loss[i] = pixel_loss(block.weight[i], block.softmax(i), block.target_logit[i]);
  }
}

// Computes the factor of the gradients of each pixel, from its upstream gradient or, if `upstream`
// is null, from the one common to all.
template <typename A>
UNET_FAST_SIMD void scales(const A* upstream, double common, Block<A>& block) {
  const Upstream<A> shared = Upstream<A>::of(common);
  for (int64_t i = 0; i < block.size; ++i) {
    const Softmax<A> softmax = block.softmax(i);
    const A weight = block.weight[i];
    block.scale[i] = upstream == nullptr ? shared.scale(softmax, weight)
                                         : gradient_scale(softmax, weight, upstream[i]);
  }
}

// Gradients of n classes from class c on: from the terms or, for at most two classes, the logits.
template <int64_t n, bool of_two, typename A>
UNET_FAST_SIMD void gradients(Planes<const A> from, int64_t c, const Block<A>& block,
                              Planes<A> out) {
  UNET_FAST_INDEPENDENT
  for (int64_t i = 0; i < block.size; ++i) {
    const Softmax<A> softmax = block.softmax(i);
    const int32_t target = block.target[i];
    const A scale = block.scale[i];
    for (int64_t k = 0; k < n; ++k) {
      const A e = of_two ? term_of_two(softmax, from[c + k][i]) : from[c + k][i];
      out[c + k][i] = gradient(softmax, e, target == static_cast<int32_t>(c + k), scale);
    }
  }
}

template <typename Id>
void report_bad(const FirstBad& bad, const Id* target, int64_t classes, int64_t ignore_index) {
  if (!bad.any()) return;
  const int64_t p = bad.index.load();
  const int64_t value = target[p];
  STD_TORCH_CHECK(false, "weighted_ce: target must be in [0, ", classes - 1, "] or ignore_index (",
                  ignore_index, "), got ", value, " at flat index ", p);
}

// Traverses all pixels, chunks in parallel.
template <typename T, typename Id>
struct Traversal {
  using A = Accumulator<T>;
  static constexpr bool kConverts = !std::is_same_v<T, A>;

  const Layout layout;
  const T* const logits;
  const Id* const target;
  const A* const weight;  // or null: weight 1
  const int64_t ignore_index;
  // A multiple of the lanes, so that few pixels are left over.
  const int64_t block_pixels =
      std::clamp(kValues / std::max<int64_t>(layout.classes, 1), kLeastBlock, kBlock) / kLanes *
      kLanes;
  FirstBad bad = {};

  int64_t chunks_per_image() const { return (layout.pixels + kChunk - 1) / kChunk; }
  int64_t chunks() const { return layout.images * chunks_per_image(); }

  // Calls `work(block, chunk, image, p, counted)` for each block, which starts at pixel p of an
  // image, once its targets and weights are loaded; `counted` of its pixels are not ignored.
  template <typename Work>
  void run(Work&& work) {
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      Block<A> block{};
      block.values.resize(layout.classes * block_pixels / kLanes);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t image = chunk / chunks_per_image();
        const int64_t first = chunk % chunks_per_image() * kChunk;
        const int64_t last = std::min(first + kChunk, layout.pixels);
        for (int64_t p = first; p < last; p += block_pixels) {
          block.size = std::min(block_pixels, last - p);
          const int64_t counted = read_targets(block, image, p);
          work(block, chunk, image, p, counted);
        }
      }
    });
    report_bad(bad, target, layout.classes, ignore_index);
  }

  // Whether planes of `x` are read or written where they lie.
  static bool in_place(const Layout& x) { return !kConverts && x.pixel_stride == 1; }

  Planes<A> planes_of(Block<A>& block) const { return {block.values.data()->data, block_pixels}; }

  // The logits of a block as planes, in place if possible, else as `copy_logits` left them.
  Planes<const A> logits_of(Block<A>& block, int64_t image, int64_t p) const {
    if constexpr (!kConverts) {
      if (in_place(layout)) return {logits + layout.offset(image, p), layout.class_stride};
    }
    return planes_of(block);
  }

  void copy_logits(Block<A>& block, int64_t image, int64_t p) const {
    if (in_place(layout)) return;
    copy_to_planes(logits, layout, image, p, block.size, planes_of(block));
  }

  // Loads targets and weights of a block. Returns how many pixels count.
  int64_t read_targets(Block<A>& block, int64_t image, int64_t p) {
    const int64_t flat = image * layout.pixels + p;
    const Id* const t = target + flat;
    const bool all =
        weight == nullptr
            ? load_targets<false>(t, weight, layout.classes, ignore_index, block)
            : load_targets<true>(t, weight + flat, layout.classes, ignore_index, block);
    int64_t counted = block.size;
    for (int64_t i = 0; i < (all ? 0 : block.size); ++i) {
      counted -= block.target[i] < 0;
      if (block.target[i] < 0 && t[i] != ignore_index) bad.found(flat + i);
    }
    return counted;
  }

  // Computes the softmax of a block, reading each logit once.
  void read_logits(Block<A>& block, int64_t image, int64_t p) const {
    copy_logits(block, image, p);
    const Planes<const A> x = logits_of(block, image, p);
    for_groups(layout.classes, [&]<int64_t n>(int64_t c) {
      c == 0 ? add_classes<n, true>(x, c, block) : add_classes<n, false>(x, c, block);
    });
  }

  // Computes the softmax of a block and keeps its terms: one exponential per logit, not two.
  void read_terms(Block<A>& block, int64_t image, int64_t p) const {
    copy_logits(block, image, p);
    const Planes<const A> x = logits_of(block, image, p);
    for_groups(layout.classes, [&]<int64_t n>(int64_t c) {
      c == 0 ? add_largest<n, true>(x, c, block) : add_largest<n, false>(x, c, block);
    });
    const Planes<A> terms = planes_of(block);
    for_groups(layout.classes, [&]<int64_t n>(int64_t c) {
      c == 0 ? add_terms<n, true>(x, c, block, terms) : add_terms<n, false>(x, c, block, terms);
    });
    finish_terms(block);
  }

  // Writes the gradients of a block whose scales are known.
  void write_gradients(Block<A>& block, int64_t image, int64_t p, T* out, const Layout& to) const {
    Planes<A> planes = planes_of(block);
    const Planes<const A> logits_or_terms =
        layout.classes > 2 ? planes : logits_of(block, image, p);
    if constexpr (!kConverts) {
      if (in_place(to)) planes = {out + to.offset(image, p), to.class_stride};
    }
    for_groups(layout.classes, [&]<int64_t n>(int64_t c) {
      layout.classes > 2 ? gradients<n, false>(logits_or_terms, c, block, planes)
                         : gradients<n, true>(logits_or_terms, c, block, planes);
    });
    if (!in_place(to)) copy_from_planes(planes, out, to, image, p, block.size);
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                   const std::optional<Tensor>& weight, int64_t reduction,
                                   int64_t ignore_index) {
  const Operands in(logits, target, weight, reduction);
  Tensor loss = new_loss(logits, target, reduction);
  Tensor divisor = new_normaliser(logits);
  dispatch_floating(logits.scalar_type(), "weighted_ce", [&]<typename T>() {
    using A = Accumulator<T>;
    dispatch_ids(target.scalar_type(), "weighted_ce", [&]<typename Id>() {
      Traversal<T, Id> traversal{in.layout, in.logits.const_data_ptr<T>(),
                                 in.target.const_data_ptr<Id>(), in.weight_data<A>(), ignore_index};
      A* const out = loss.mutable_data_ptr<A>();
      std::vector<Sums> partial(reduction == kNone ? 0 : traversal.chunks());
      traversal.run([&](Block<A>& block, int64_t chunk, int64_t image, int64_t p, int64_t counted) {
        traversal.read_logits(block, image, p);
        if (reduction == kNone) {
          write_losses(block, out + image * in.layout.pixels + p);
        } else {
          add_losses(block, partial[chunk]);
          partial[chunk].pixels += static_cast<double>(counted);
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
  const Operands in(logits, target, weight, reduction);
  const Tensor upstream = as_contiguous(grad);
  in.check_upstream(upstream, divisor, reduction);
  Tensor out = new_like(logits);
  if (out.numel() == 0) return out;
  Output result(out);
  dispatch_floating(logits.scalar_type(), "weighted_ce_backward", [&]<typename T>() {
    using A = Accumulator<T>;
    dispatch_ids(target.scalar_type(), "weighted_ce_backward", [&]<typename Id>() {
      Traversal<T, Id> traversal{in.layout, in.logits.const_data_ptr<T>(),
                                 in.target.const_data_ptr<Id>(), in.weight_data<A>(), ignore_index};
      const A* const g = upstream.const_data_ptr<A>();
      const double common =
          reduction == kNone ? 0.0 : normalised(*g, *divisor.const_data_ptr<double>());
      T* const to = result.tensor.mutable_data_ptr<T>();
      traversal.run([&](Block<A>& block, int64_t, int64_t image, int64_t p, int64_t) {
        if (in.layout.classes > 2) {
          traversal.read_terms(block, image, p);
        } else {
          traversal.read_logits(block, image, p);
        }
        scales(reduction == kNone ? g + image * in.layout.pixels + p : nullptr, common, block);
        traversal.write_gradients(block, image, p, to, result.layout);
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
