// `channel_mean` on CUDA: the spatial mean of x or of |x|, and its gradient. Sums are fp32, in an order that only the shapes decide.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace kd {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
// Levels of one launch: a grid's y.
constexpr size_t kLevels = 16;
// Pixels that one block sums where the channels lie behind the pixels.
constexpr int64_t kPiece = 512;

// channel: (N, C) of each level: means that are written, or the gradient that arrives.
// partial: (N, pieces, C) of each level whose channels lie behind its pixels: sums of pieces.
// out:     a level's gradient, in the level's layout.
struct Work {
  Level level[kLevels];
  float* channel[kLevels];
  float* partial[kLevels];
  char* out[kLevels];
  bool absolute;
};

__host__ __device__ int64_t pieces_of(const Level& level) { return (level.pixels + kPiece - 1) / kPiece; }

template <class T>
__device__ float value(T x, bool absolute) {
  const float wide = static_cast<float>(x);
  return absolute ? fabsf(wide) : wide;
}

// The sum over the threads of a block, in its first thread.
__device__ float block_sum(float sum) {
  __shared__ float of_warp[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += of_warp[warp];
  }
  __syncthreads();
  return sum;
}

// This thread's share of a row's sum. 16 bytes at a time, but for the ends: a row of an odd length begins at any element.
template <class T>
__device__ float row_sum(const T* row, int64_t count, bool absolute) {
  constexpr int64_t width = 16 / sizeof(T);
  const int64_t unaligned = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
  const int64_t head = unaligned < count ? unaligned : count;
  const int64_t vectors = (count - head) / width;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < head; i += kThreads) sum += value(row[i], absolute);
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 bits = reinterpret_cast<const uint4*>(row + head)[i];
    const T* of_vector = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int64_t k = 0; k < width; ++k) sum += value(of_vector[k], absolute);
  }
  for (int64_t i = head + vectors * width + threadIdx.x; i < count; i += kThreads) sum += value(row[i], absolute);
  return sum;
}

// A block a row (image, channel) of pixels.
template <class T>
__device__ void mean_rows(const Level& level, float* channel, bool absolute) {
  for (int64_t row = blockIdx.x; row < level.images * level.channels; row += gridDim.x) {
    const float sum = block_sum(row_sum(reinterpret_cast<const T*>(level.data) + row * level.pixels, level.pixels, absolute));
    if (threadIdx.x == 0) channel[row] = sum / static_cast<float>(level.pixels);
  }
}

// A block a piece of pixels, of all channels: neighbouring threads read neighbouring channels.
template <class T>
__device__ void sum_pieces(const Level& level, float* partial, bool absolute) {
  const int64_t pieces = pieces_of(level);
  for (int64_t piece = blockIdx.x; piece < level.images * pieces; piece += gridDim.x) {
    const int64_t begin = piece % pieces * kPiece;
    const int64_t count = begin + kPiece < level.pixels ? kPiece : level.pixels - begin;
    const T* data = reinterpret_cast<const T*>(level.data) + (piece / pieces * level.pixels + begin) * level.channels;
    for (int64_t c = threadIdx.x; c < level.channels; c += kThreads) {
      float sum = 0;
#pragma unroll 8
      for (int64_t p = 0; p < count; ++p) sum += value(data[p * level.channels + c], absolute);
      partial[piece * level.channels + c] = sum;
    }
  }
}

template <class T>
__device__ void reduce_as(const Level& level, float* channel, float* partial, bool absolute) {
  if (level.last) {
    sum_pieces<T>(level, partial, absolute);
  } else {
    mean_rows<T>(level, channel, absolute);
  }
}

__global__ void __launch_bounds__(kThreads) reduce(const __grid_constant__ Work work) {
  const Level& level = work.level[blockIdx.y];
  float* channel = work.channel[blockIdx.y];
  float* partial = work.partial[blockIdx.y];
  switch (level.type) {
    case Type::fp32:
      return reduce_as<float>(level, channel, partial, work.absolute);
    case Type::fp16:
      return reduce_as<__half>(level, channel, partial, work.absolute);
    case Type::bf16:
      return reduce_as<__nv_bfloat16>(level, channel, partial, work.absolute);
  }
}

// The pieces' sums, in order, of levels whose channels lie behind their pixels.
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Work work) {
  const Level& level = work.level[blockIdx.y];
  if (!level.last) return;
  const int64_t pieces = pieces_of(level), step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < level.images * level.channels; i += step) {
    const float* partial = work.partial[blockIdx.y] + i / level.channels * pieces * level.channels + i % level.channels;
    float sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[piece * level.channels];
    work.channel[blockIdx.y][i] = sum / static_cast<float>(level.pixels);
  }
}

// share: the gradient that one pixel gets. The sign of NaN is 0, as torch.sgn and the gradient of torch.abs have it.
template <class T>
__device__ T gradient_of(const T* x, float share, bool absolute) {
  if (!absolute) return static_cast<T>(share);
  const float wide = static_cast<float>(*x);
  const float sign = static_cast<float>(wide > 0) - static_cast<float>(wide < 0);
  return static_cast<T>(share * sign);
}

// A block a row: of pixels, all of one channel, or of channels, all of one pixel.
template <class T>
__device__ void gradient_rows(const Level& level, const float* grad, char* to, bool absolute) {
  const T* x = reinterpret_cast<const T*>(level.data);
  T* out = reinterpret_cast<T*>(to);
  const int64_t length = level.last ? level.channels : level.pixels;
  const int64_t rows = level.images * (level.last ? level.pixels : level.channels);
  const float pixels = static_cast<float>(level.pixels);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* channel = level.last ? grad + row / level.pixels * level.channels : grad + row;
    for (int64_t i = threadIdx.x; i < length; i += kThreads) {
      const float share = channel[level.last ? i : 0] / pixels;
      out[row * length + i] = gradient_of(x + row * length + i, share, absolute);
    }
  }
}

__global__ void __launch_bounds__(kThreads) gradient(const __grid_constant__ Work work) {
  const Level& level = work.level[blockIdx.y];
  const float* grad = work.channel[blockIdx.y];
  char* out = work.out[blockIdx.y];
  switch (level.type) {
    case Type::fp32:
      return gradient_rows<float>(level, grad, out, work.absolute);
    case Type::fp16:
      return gradient_rows<__half>(level, grad, out, work.absolute);
    case Type::bf16:
      return gradient_rows<__nv_bfloat16>(level, grad, out, work.absolute);
  }
}

// Calls run(work, levels), whose grid's y is `levels`, for the levels in groups that an argument can hold. `channel` is packed: (N, C)
// level by level, and so is `partial`.  out: null where no gradient is asked for.
template <class Run>
void in_groups(const Pyramid& levels, float* channel, float* partial, const Results* out, bool absolute, const Run& run) {
  for (size_t first = 0; first < levels.size(); first += kLevels) {
    const size_t count = std::min(kLevels, levels.size() - first);
    Work work{};
    work.absolute = absolute;
    for (size_t i = 0; i < count; ++i) {
      const Level& level = levels[first + i];
      work.level[i] = level;
      work.channel[i] = channel;
      work.partial[i] = partial;
      work.out[i] = out == nullptr ? nullptr : (*out)[first + i].data;
      channel += level.images * level.channels;
      if (level.last) partial += level.images * pieces_of(level) * level.channels;
    }
    run(work, static_cast<unsigned>(count));
  }
}

// The most of count(level) over the levels.
template <class Count>
int64_t most(const Pyramid& levels, const Count& count) {
  int64_t found = 0;
  for (size_t i = 0; i < levels.size(); ++i) found = std::max<int64_t>(found, count(levels[i]));
  return found;
}

Tensor channel_mean(std::vector<Tensor> x, bool absolute) {
  const OnDeviceOf device(x[0]);
  const Pyramid levels(x);
  const Tensor means = new_floats(x[0], {levels.vectors()});
  int64_t sums = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    if (levels[i].last) sums += levels[i].images * pieces_of(levels[i]) * levels[i].channels;
  }
  const Tensor partial = new_floats(x[0], {sums});
  const int64_t rows = most(levels, [](const Level& x) { return x.images * (x.last ? pieces_of(x) : x.channels); });
  const int64_t behind = most(levels, [](const Level& x) { return x.last ? x.images * x.channels : 0; });
  in_groups(levels, floats(means), floats(partial), nullptr, absolute, [&](const Work& work, unsigned count) {
    if (rows > 0) reduce<<<dim3(grid_of(rows), count), kThreads, 0, device.stream()>>>(work);
    if (behind > 0) finish<<<dim3(grid_of((behind + kThreads - 1) / kThreads), count), kThreads, 0, device.stream()>>>(work);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return means;
}

std::vector<Tensor> channel_mean_backward(std::vector<Tensor> x, Tensor grad, bool absolute) {
  const OnDeviceOf device(x[0]);
  const Pyramid levels(x);
  Results out(x, levels);
  const int64_t rows = most(levels, [](const Level& x) { return x.images * (x.last ? x.pixels : x.channels); });
  in_groups(levels, floats_beside(x[0], grad, levels.vectors()), nullptr, &out, absolute, [&](const Work& work, unsigned count) {
    if (rows > 0) gradient<<<dim3(grid_of(rows), count), kThreads, 0, device.stream()>>>(work);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CUDA, m) {
  m.impl("channel_mean", TORCH_BOX(&kd::channel_mean));
  m.impl("channel_mean_backward", TORCH_BOX(&kd::channel_mean_backward));
}
