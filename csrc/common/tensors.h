#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <vector>

// Helpers for tensors. Where possible they call the C functions of PyTorch's stable ABI directly,
// because its dispatcher took half the time of a small call.
namespace unet_fast {

using torch::stable::Tensor;

inline std::vector<int64_t> sizes(const Tensor& x) {
  std::vector<int64_t> result(x.dim());
  for (int64_t axis = 0; axis < x.dim(); ++axis) result[axis] = x.size(axis);
  return result;
}

inline std::vector<int64_t> strides(const Tensor& x) {
  std::vector<int64_t> result(x.dim());
  for (int64_t axis = 0; axis < x.dim(); ++axis) result[axis] = x.stride(axis);
  return result;
}

/// `x`, or a contiguous copy.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

/// Requests 2 MiB pages for the memory of a large new CPU tensor, and returns the tensor. From 32
/// MiB on (DEFAULT_MMAP_THRESHOLD_MAX), glibc maps fresh memory for each tensor, and creating its 4
/// KiB pages takes longer than filling them; smaller tensors mostly reuse pages.
inline Tensor with_large_pages(Tensor x) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  if (x.is_cpu() && bytes >= (int64_t{32} << 20)) {
    const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    // Only a hint: where the kernel has no such pages, nothing changes.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return x;
}

/// A new tensor on the device of `like`. `dtype` is the value of an aoti_torch_dtype_* function.
inline Tensor new_empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                                const std::vector<int64_t>& strides, int32_t dtype) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device, like.get_device_index(), &result);
  if (error != AOTI_TORCH_SUCCESS) {  // says only where it was called
    int64_t elements = 1;
    for (const int64_t size : sizes) elements *= size;
    STD_TORCH_CHECK(false, "can't allocate memory: for a tensor of ", elements, " elements");
  }
  return with_large_pages(Tensor(result));
}

/// Raises if the elements of a tensor cannot be counted in bytes, of at most 16 each.
inline void check_sizes(const std::vector<int64_t>& sizes) {
  int64_t bytes = 16;
  for (const int64_t size : sizes) {
    const bool counted = size >= 0 && !__builtin_mul_overflow(bytes, size > 0 ? size : 1, &bytes);
    STD_TORCH_CHECK(counted, "sizes must be >= 0 and of at most 2^59 elements, got ", size,
                    " among them");
  }
}

/// Raises unless `x` is a tensor of `type` with n elements, on the device of `like`.
inline void check_operand(const char* name, const Tensor& x, const Tensor& like,
                          torch::headeronly::ScalarType type, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.numel() == n, name, " must be of ", n,
                  " elements in ", torch::headeronly::toString(type), ", got ", x.numel(), " in ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on the device of the others");
}

/// A new contiguous tensor on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  check_sizes(sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t axis = static_cast<int64_t>(sizes.size()) - 2; axis >= 0; --axis) {
    strides[axis] = strides[axis + 1] * (sizes[axis + 1] > 0 ? sizes[axis + 1] : 1);
  }
  return new_empty_strided(like, sizes, strides, dtype);
}

/// An uninitialised tensor of the same shape, dtype and memory layout.
inline Tensor new_like(const Tensor& x) {
  if (!x.is_contiguous()) return with_large_pages(torch::stable::empty_like(x));
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return new_empty_strided(x, sizes(x), strides(x), dtype);
}

}  // namespace unet_fast
