// Where an op's kernels run: on the device of its tensors and on torch's current stream there. The
// first line of every CUDA op: `const LaunchScope scope(tensor);`, then LaunchConfig{...,
// scope.stream()}.
#pragma once

#include "torch_api.h"

namespace fastsel {

#ifdef __CUDACC__

class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;  // back to the caller's device at the end
  void* stream_ = nullptr;
};

#else

// The host emulation has one device and no streams.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#endif

}  // namespace fastsel
