// Results that are written past the caches, by `RowKernels::stream`.
#pragma once

#include <cstdint>

#include "../include/pyramid.h"
#include "isa.h"

#if KD_X86
#include <immintrin.h>
#endif

namespace kd {

// Bytes of a result above which it does not stay in the caches until somebody reads it.
constexpr int64_t STREAMED = int64_t{8} << 20;

// Whether a result like x is to be streamed.
inline bool is_streamed(const Pyramid& x) {
  int64_t bytes = 0;
  for (size_t level = 0; level < x.size(); ++level) bytes += x.images() * x[level].image_bytes();
  return bytes >= STREAMED;
}

// What was streamed is to be seen by whoever comes after this piece of work.
inline void end_streams() {
#if KD_X86
  _mm_sfence();
#endif
}

}  // namespace kd
