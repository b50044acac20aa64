#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "common/dispatch.h"
#include "common/stream.h"
#include "weighted_ce/kernels.cuh"
#include "weighted_ce/operands.h"

namespace unet_fast::weighted_ce {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <typename T>
Problem<T, Accumulator<T>> problem(const Operands& in, int64_t reduction, int64_t ignore_index) {
  IntegerType type = IntegerType::kInt64;
  dispatch_ids(in.target.scalar_type(), "weighted_ce",
               [&]<typename Id>() { type = kIntegerType<Id>; });
  return {in.layout, in.logits.const_data_ptr<T>(),    in.target.data_ptr(),
          type,      in.weight_data<Accumulator<T>>(), ignore_index,
          reduction};
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "weighted_ce: ", cudaGetErrorString(error));
}

constexpr size_t kStreams = 256;
__device__ unsigned arrived[kStreams];  // all 0 at first

/// Where the blocks of a launch count their arrivals: 0 before the launch, and after it. Launches
/// on one stream follow each other, so each stream has one count, and nothing need be launched to
/// clear it. A captured launch may run beside any stream: it counts in `own`, which the graph
/// clears, and so do streams past kStreams.
unsigned* arrivals(int32_t device, cudaStream_t stream, void* own) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, unsigned long long>, size_t> places;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture));
  if (capture == cudaStreamCaptureStatusNone) {
    unsigned long long id = 0;  // unlike the handle, never used again for another stream
    check(cudaStreamGetId(stream, &id));
    const std::lock_guard lock(mutex);
    const std::pair key(device, id);
    if (places.size() < kStreams) places.try_emplace(key, places.size());
    if (const auto place = places.find(key); place != places.end()) {
      void* counts = nullptr;
      check(cudaGetSymbolAddress(&counts, arrived));
      return static_cast<unsigned*>(counts) + place->second;
    }
  }
  check(cudaMemsetAsync(own, 0, sizeof(unsigned), stream));
  return static_cast<unsigned*>(own);
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                   const std::optional<Tensor>& weight, int64_t reduction,
                                   int64_t ignore_index) {
  const DeviceGuard guard(logits.get_device_index());
  const Operands in(logits, target, weight, reduction);
  Tensor loss = new_loss(logits, target, reduction);
  Tensor divisor = new_normaliser(logits);
  const cudaStream_t stream = current_stream(logits);
  dispatch_floating(logits.scalar_type(), "weighted_ce", [&]<typename T>() {
    const auto p = problem<T>(in, reduction, ignore_index);
    Results<Accumulator<T>> results{loss.mutable_data_ptr<Accumulator<T>>(),
                                    divisor.mutable_data_ptr<double>(), nullptr, nullptr};
    if (reduction == kNone) return launch_forward(p, results, stream);
    // Each Partial is two doubles; one more row for a count.
    const Tensor scratch = new_tensor(logits, {p.blocks() + 1, 2}, aoti_torch_dtype_float64());
    results.partial = reinterpret_cast<Partial*>(scratch.mutable_data_ptr<double>());
    results.arrived = arrivals(logits.get_device_index(), stream, results.partial + p.blocks());
    launch_forward(p, results, stream);
  });
  return {loss, divisor};
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                const std::optional<Tensor>& weight, const Tensor& divisor, int64_t reduction,
                int64_t ignore_index) {
  const DeviceGuard guard(logits.get_device_index());
  const Operands in(logits, target, weight, reduction);
  const Tensor upstream = as_contiguous(grad);
  in.check_upstream(upstream, divisor, reduction);
  Tensor out = new_like(logits);
  if (out.numel() == 0) return out;
  Output result(out);
  const cudaStream_t stream = current_stream(logits);
  dispatch_floating(logits.scalar_type(), "weighted_ce_backward", [&]<typename T>() {
    launch_backward(problem<T>(in, reduction, ignore_index),
                    upstream.const_data_ptr<Accumulator<T>>(), divisor.const_data_ptr<double>(),
                    result.layout, result.tensor.mutable_data_ptr<T>(), stream);
  });
  result.finish(out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CUDA, m) {
  m.impl("weighted_ce", TORCH_BOX(&forward));
  m.impl("weighted_ce_backward", TORCH_BOX(&backward));
}

}  // namespace unet_fast::weighted_ce
