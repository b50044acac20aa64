#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

// The memory that kernels may use in tests. Where an interpreter runs their PTX, it is told of it,
// so that it finds reads of memory that nobody wrote and accesses outside of it.
namespace cuda_on_host {

/// Runs kernels in place of this process: see tests/ptx/device.py.
struct Interpreter {
  std::function<void(size_t address, size_t bytes, bool written)> add;
  std::function<void(size_t address)> remove;
  std::function<void(const std::string& kernel, std::vector<unsigned> grid,
                     std::vector<unsigned> block,
                     std::vector<std::vector<unsigned char>> arguments)>
      launch;

  explicit operator bool() const { return launch != nullptr; }
};
// Empty: kernels run here. Never destroyed, because Python, which it calls, ends before.
inline Interpreter& interpreter = *new Interpreter;

/// Lets kernels use memory while this lives. `written`: it holds values already.
class Visible {
 public:
  Visible(const void* data, size_t bytes, bool written) : address_(reinterpret_cast<size_t>(data)) {
    if (interpreter) interpreter.add(address_, bytes, written);
  }
  ~Visible() {
    if (interpreter) interpreter.remove(address_);
  }
  Visible(const Visible&) = delete;
  Visible& operator=(const Visible&) = delete;

 private:
  size_t address_;
};

/// Memory as cudaMalloc gives it: values that nobody wrote, unless they are given.
template <typename T>
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t n) { resize(n); }
  DeviceMemory(size_t n, const T& value) {
    resize(n);
    std::fill_n(data(), n, value);
    visible_.emplace(bytes_.get(), n * sizeof(T), true);
  }

  void resize(size_t n) {
    visible_.reset();
    bytes_.reset(new unsigned char[n * sizeof(T)]);
    std::memset(bytes_.get(), 0xA5, n * sizeof(T));  // that nobody takes it for zeros
    visible_.emplace(bytes_.get(), n * sizeof(T), false);
  }
  T* data() { return reinterpret_cast<T*>(bytes_.get()); }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
  std::optional<Visible> visible_;
};

}  // namespace cuda_on_host
