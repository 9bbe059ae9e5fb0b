// The only door to torch: everything in csrc/ that touches a tensor comes through here.
//
// Only torch's stable ABI is used (torch/csrc/stable, target 2.10), so one binary serves torch 2.10
// and newer and every Python. Kernels see raw pointers; this header turns tensors into them and
// wrong arguments into errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtypes.h"

// The host emulation compiles the sources of csrc/cuda once more, for CPU tensors and under a name
// of its own.
#ifndef FASTSEL_NAMESPACE
#define FASTSEL_NAMESPACE fastsel
#endif
#ifndef FASTSEL_DEVICE
#define FASTSEL_DEVICE CUDA
#endif

namespace fastsel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// "[4, 10]"
inline std::string shape(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i > 0 ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// An uninitialised, contiguous tensor on the device of `like`. Straight to the allocator: through
// the dispatcher an empty tensor costs ten times as much, which shows in an op of a few
// microseconds.
inline Tensor empty(const std::vector<int64_t>& size, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t d = size.size(); d-- > 0; stride *= std::max<int64_t>(size[d], 1))
    strides[d] = stride;
  int32_t device_type = 0;
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(size.size()), size.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      like.get_device_index(), &tensor));
  return Tensor(tensor);
}

// The tensor itself where it is contiguous already.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Calls f with a value-less tag of the element type: f(Type<float>{}).
template <class T>
struct Type {
  using type = T;
};

template <class F>
void dispatch_floating(const char* op, const char* argument, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Half: return f(Type<Half>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    default:
      throw std::runtime_error(message(
          op, ": ", argument, " must be float32, float16 or bfloat16, got ", dtype_name(type)));
  }
}

// aten::sort(self, *, stable, dim, descending), of which only the permutation is wanted.
inline Tensor stable_argsort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

// The device of the tensors an op works on, made current while the op runs; nothing where that is
// the host.
class DeviceGuard {
 public:
  explicit DeviceGuard([[maybe_unused]] const Tensor& tensor)
#ifdef USE_CUDA
      : guard_(tensor.get_device_index())
#endif
  {
  }

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// The stream that torch works on, as a cudaStream_t; null on the host, where kernels run at once.
inline void* current_stream([[maybe_unused]] const Tensor& tensor) {
  void* stream = nullptr;
#ifdef USE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#endif
  return stream;
}

// The same with float64, which the CPU takes for checking.
template <class F>
void dispatch_floating_and_double(const char* op, const char* argument, ScalarType type, F&& f) {
  if (type == ScalarType::Double) return f(Type<double>{});
  dispatch_floating(op, argument, type, std::forward<F>(f));
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastsel

// Raises RuntimeError, with the parts as its text: "op: argument must be ..., got ...". The Python
// wrappers check first and raise TypeError, ValueError or IndexError; this guards
// torch.ops.fastsel.* itself.
#define FASTSEL_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::fastsel::message(__VA_ARGS__))
