// What every launch needs: the device and stream of the tensors, and the levels as an argument that kernels take by value.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../include/pyramid.h"

namespace kd {

// Makes the tensor's device the current one for as long as this lives, and knows its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// An uninitialised fp32 tensor of this shape on x's device.
inline Tensor new_floats(const Tensor& x, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(x, shape, torch::headeronly::ScalarType::Float);
}

// The elements of a packed tensor on x's device. Raises unless it is fp32, contiguous and of `count` elements.
inline float* floats_beside(const Tensor& x, const Tensor& packed, int64_t count) {
  STD_TORCH_CHECK(packed.device() == x.device() && packed.scalar_type() == torch::headeronly::ScalarType::Float &&
                      packed.is_contiguous() && packed.numel() == count,
                  "expected ", count, " contiguous fp32 elements on the device of the levels");
  return floats(packed);
}

// A grid's extent in x for `count` blocks' work; kernels go round where it is less than the count.
inline unsigned grid_of(int64_t count) { return static_cast<unsigned>(std::min<int64_t>(count, 1 << 20)); }

}  // namespace kd
