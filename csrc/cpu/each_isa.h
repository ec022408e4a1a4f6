// Compiles the file KD_KERNELS once an instruction set, in the namespaces kd::scalar, kd::avx2 and kd::avx512 (KD_ISA within it), as
// Highway does. KD_WIDTH is the number of floats of a register. Kernels must not be lambdas, to which the pragmas do not apply, and must
// include nothing but vector.inl: what is included here is compiled without the instructions.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../include/pyramid.h"
#include "isa.h"

#if KD_X86
#include <immintrin.h>
#endif

#define KD_ISA scalar
#define KD_WIDTH 1
#include KD_KERNELS
#undef KD_ISA
#undef KD_WIDTH

#if KD_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define KD_ISA avx2
#define KD_WIDTH 8
#include KD_KERNELS
#undef KD_ISA
#undef KD_WIDTH
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")
#endif
#define KD_ISA avx512
#define KD_WIDTH 16
#include KD_KERNELS
#undef KD_ISA
#undef KD_WIDTH
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

// The other two namespaces are the scalar one: `isa()` never asks for them.
namespace kd {
namespace avx2 = scalar;
namespace avx512 = scalar;
}  // namespace kd

#endif
