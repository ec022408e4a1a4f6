// The language of the kernels: what nvcc compiles for a GPU, and any C++ compiler for the emulator of the tests.
//
// A kernel is a functor of its parameters:
//   struct Name {
//     static constexpr int kThreads = 256;        // of a block, a multiple of 32
//     static constexpr int kResident = 2;         // blocks that a multiprocessor is to hold: the compiler keeps to registers for so many
//     struct Shared { float sums[8]; };           // what a block shares
//     template <class Me> KD_DEVICE void operator()(Me& me, Shared& shared) const;
//   };
// and `me` is the thread that runs it: see Thread in launch.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KD_BOTH __host__ __device__ __forceinline__
#define KD_DEVICE __device__ __forceinline__
#else
#define KD_BOTH inline
#define KD_DEVICE inline
#endif
#ifdef __CUDA_ARCH__
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_UNROLL
#endif

namespace kd {

constexpr int kWarp = 32;

// The product and the sum rounded each by itself, where one rounding of both would decide otherwise, as for boxes.
KD_BOTH float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

KD_BOTH float sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// -1, 0 or 1; 0 for NaN, as torch.sgn.
KD_BOTH float sign(float x) { return static_cast<float>(x > 0) - static_cast<float>(x < 0); }

// exp(-x) - 1 + x of |x| <= 1/2. Differences of what is nearly equal, sigmas or distributions, come from it, so that they keep their digits.
KD_BOTH float second_order(float x) {
  float h = -1.0f / 362880;
  h = h * x + 1.0f / 40320;
  h = h * x - 1.0f / 5040;
  h = h * x + 1.0f / 720;
  h = h * x - 1.0f / 120;
  h = h * x + 1.0f / 24;
  h = h * x - 1.0f / 6;
  return x * x * (h * x + 0.5f);
}

// The smaller and the larger one; NaN if either is.
KD_BOTH float smaller(float a, float b) { return a < b || a != a ? a : b; }
KD_BOTH float larger(float a, float b) { return a > b || a != a ? a : b; }

template <class T>
KD_BOTH T ceil_div(T count, T size) {
  return (count + size - 1) / size;
}

// The bits of one type as another of the same size.
template <class To, class From>
KD_BOTH To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "of the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace kd
