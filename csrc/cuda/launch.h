// Launches: the thread that a kernel's functor runs in, and the device and stream that a launch goes to. In the tests' emulator the same
// names stand for the CPU.
#pragma once

#include "../include/pyramid.h"
#include "../include/device.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>

// The operators of a file: what csrc/ops.cpp declares, for CUDA.
#define KD_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CUDA, m)

namespace kd {

// A thread of a kernel whose blocks have so many.
template <int kOfBlock>
class Thread {
 public:
  static constexpr int kThreads = kOfBlock;

  __device__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ int64_t block() const { return blockIdx.x; }
  __device__ int64_t blocks() const { return gridDim.x; }

  // Wait for the threads of the block.
  __device__ void sync() { __syncthreads(); }

  // What the thread whose lane differs by `mask`, or is `by` less, passes at the same call; all threads of the warp take part. For the
  // first `by` lanes of `up`: their own.
  template <class T>
  __device__ T across(T x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
  }
  template <class T>
  __device__ T up(T x, int by) {
    return __shfl_up_sync(~0u, x, by);
  }

  // Counters in global memory that several blocks of a launch go by. What a thread wrote before `add`, and those of its block before a
  // `sync`, is seen by those that found the sum by `add` or `wait_for`, and by their blocks after one.
  __device__ int add(int* counter, int x) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
    return before;
  }
  // Until the counter is at least `sum`. One fence behind loads that order nothing: one that does empties the L1 cache each time, also of
  // the other blocks that share it.
  __device__ void wait_for(const int* counter, int sum) {
    for (;;) {
      int found;
      asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
      if (found >= sum) break;
      __nanosleep(64);
    }
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  // As `add`, of a number that says nothing about what others wrote.
  __device__ int take(int* counter) { return atomicAdd(counter, 1); }
};

// Kernels take what they need as parameters, of which there may be so many bytes from CUDA 12.1 on, and 4096 before.
constexpr size_t kParameterBytes = 32764;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResident) run(const __grid_constant__ Kernel kernel) {
  static_assert(sizeof(Kernel) <= kParameterBytes, "more parameters than a kernel can have");
  __shared__ typename Kernel::Shared shared;
  Thread<Kernel::kThreads> me;
  kernel(me, shared);
}

// Raises for an error, and clears it: torch's own check asks its CUDA runtime, but this library has one to itself, in which the error would
// be taken for that of a later launch.
inline void check(cudaError_t found) {
  if (found != cudaSuccess) static_cast<void>(cudaGetLastError());
  STD_CUDA_CHECK(found);
}

// Makes the tensor's device the current one for as long as this lives, and knows its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // So many blocks of a kernel; none of none.
  template <class Kernel>
  void launch(const Kernel& kernel, int64_t blocks) const {
    if (blocks == 0) return;
    run<<<blocks_of(blocks), Kernel::kThreads, 0, stream_>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // As many blocks as run at the same time, but no more than `most`.
  template <class Kernel>
  void launch_together(Kernel kernel, int64_t most) const {
    void* arguments[] = {&kernel};
    const int64_t blocks = std::min<int64_t>(most, resident<Kernel>());
    check(cudaLaunchCooperativeKernel(run<Kernel>, blocks_of(blocks), Kernel::kThreads, arguments, 0, stream_));
  }

 private:
  static dim3 blocks_of(int64_t count) {
    STD_TORCH_CHECK(count < int64_t{1} << 31, "a pass over so many elements takes more blocks than a launch can have: ", count);
    return dim3(static_cast<unsigned>(count));
  }

  // Blocks that the current device holds at the same time. Asked once a device, since the answer takes microseconds.
  template <class Kernel>
  static int resident() {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];
    int device = 0, processors = 0, each = 0;
    check(cudaGetDevice(&device));
    if (device < kDevices && known[device] > 0) return known[device];
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, run<Kernel>, Kernel::kThreads, 0));
    if (device < kDevices) known[device] = processors * each;
    return processors * each;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace kd

#else

#include "emulator.h"

#endif

namespace kd {

// An uninitialised fp32 tensor of this shape on x's device.
inline Tensor new_floats(const Tensor& x, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(x, shape, torch::headeronly::ScalarType::Float);
}

}  // namespace kd
