// Rows of fp32, fp16 or bf16 in vectors of 16 bytes, whatever address a row begins at: a thread's elements come from the aligned 16 bytes
// around them, and go to them together with those of the neighbouring thread.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../include/pyramid.h"
#include "../include/device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kd {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// Elements whose type is known when the kernel runs, level by level.
struct Any {};

// Elements that a thread takes of a row at a time: 16 bytes, 32 of fp32 that may lie beside 16-bit elements.
template <class X>
constexpr int kWidth = sizeof(X) == 4 ? 4 : 8;

// Elements that a warp takes of a row at a time.
template <class X>
constexpr int kSpan = kWarp * kWidth<X>;

struct alignas(16) Bits {
  uint32_t word[4];
};

#ifndef __CUDACC__
// The emulator counts what kernels move, and raises where a GPU would, for an address that is not aligned.
void count_read(const char* at, int64_t bytes);
void count_written(const char* at, int64_t bytes);
#endif

// kOnce: nobody reads them again, so that the caches need not keep them.
template <bool kOnce>
KD_DEVICE Bits load_bits(const char* at) {
#ifdef __CUDACC__
  const uint4* const from = reinterpret_cast<const uint4*>(at);
  const uint4 bits = kOnce ? __ldcs(from) : __ldg(from);
  return {{bits.x, bits.y, bits.z, bits.w}};
#else
  Bits bits;
  count_read(at, sizeof(bits));
  memcpy(&bits, at, sizeof(bits));
  return bits;
#endif
}

// Past the caches as far as they go: nobody reads it soon.
KD_DEVICE void store_bits(char* at, Bits bits) {
#ifdef __CUDACC__
  __stcs(reinterpret_cast<uint4*>(at), make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]));
#else
  count_written(at, sizeof(bits));
  memcpy(at, &bits, sizeof(bits));
#endif
}

// The elements of a row of `length` from a column on, none or less behind its end; as many as a warp takes at the most, for a small number.
KD_BOTH int left_of(int64_t length, int64_t column) {
  constexpr int64_t kMost = 1024;
  const int64_t left = length - column;
  return static_cast<int>(left > kMost ? kMost : left < -kMost ? -kMost : left);
}

// Where a pointer lies within its 16 bytes.
KD_BOTH int misalignment(const void* at) { return static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16); }

// The 32 bits that begin `shift` bits, less than 32, within the first of two words.
KD_BOTH uint32_t funnel(uint32_t first, uint32_t second, int shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(first, second, shift);
#else
  return static_cast<uint32_t>(((static_cast<uint64_t>(second) << 32) | first) >> shift);
#endif
}

// words[0..kKept) becomes words[bytes / 4 ...] with the bytes in place. bytes: 0 to 15, even; without an index that only the run knows, for
// which the words would have to lie in memory.
template <int kKept, int kCount>
KD_BOTH void shift_down(uint32_t (&words)[kCount], int bytes) {
  static_assert(kCount >= kKept + 4, "a shift may take four words");
  KD_UNROLL
  for (int i = 0; i < kCount - 2; ++i) words[i] = (bytes & 8) != 0 ? words[i + 2] : words[i];
  KD_UNROLL
  for (int i = 0; i < kKept + 1; ++i) words[i] = (bytes & 4) != 0 ? words[i + 1] : words[i];
  KD_UNROLL
  for (int i = 0; i < kKept; ++i) words[i] = funnel(words[i], words[i + 1], (bytes & 3) * 8);
}

KD_BOTH float half_to_float(uint16_t bits) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(bits));
#else
  return static_cast<float>(Half(bits, Half::from_bits()));
#endif
}

KD_BOTH uint16_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  return Half(x).x;
#endif
}

KD_BOTH uint16_t float_to_bfloat16(float x) {
#ifdef __CUDA_ARCH__
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  return BFloat16(x).x;
#endif
}

// How elements of a type lie in words.
template <class X>
struct Codec;

template <>
struct Codec<float> {
  static constexpr int kBytes = 4;
  KD_BOTH static float wide(const uint32_t* words, int i) { return bits_as<float>(words[i]); }
  KD_BOTH static uint32_t narrow(const float* x, int word) { return bits_as<uint32_t>(x[word]); }
};

template <>
struct Codec<Half> {
  static constexpr int kBytes = 2;
  KD_BOTH static float wide(const uint32_t* words, int i) { return half_to_float(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))); }
  KD_BOTH static uint32_t narrow(const float* x, int word) {
    return float_to_half(x[2 * word]) | static_cast<uint32_t>(float_to_half(x[2 * word + 1])) << 16;
  }
};

template <>
struct Codec<BFloat16> {
  static constexpr int kBytes = 2;
  KD_BOTH static float wide(const uint32_t* words, int i) {
    return bits_as<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  }
  KD_BOTH static uint32_t narrow(const float* x, int word) {
    return float_to_bfloat16(x[2 * word]) | static_cast<uint32_t>(float_to_bfloat16(x[2 * word + 1])) << 16;
  }
};

// The memory of a level, from `begin` to `end`, which a vector must not leave. aligned: rows begin and end between 16 bytes.
struct Memory {
  const char *begin, *end;
  Type type;
  bool aligned;
};

// One element of a level.
KD_DEVICE float element_at(const Memory& memory, int64_t index) {
  if (memory.type == Type::fp32) return reinterpret_cast<const float*>(memory.begin)[index];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(memory.begin)[index];
  return memory.type == Type::fp16 ? half_to_float(bits) : bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

// A thread's elements as they lie in memory, of the widest type that they may have.
template <class X>
struct Words {
  static constexpr int kWords = kWidth<X> * (sizeof(X) == 2 ? 2 : 4) / 4;
  uint32_t word[kWords];
};

// The words of kCount elements at `at`, 0 where there are none. left: elements of the row from `at` on, which may be none or less
template <class X, int kCount, bool kOnce, bool kAligned>
KD_DEVICE void load(const Memory& memory, const char* at, int left, uint32_t* into) {
  constexpr int kBytes = Codec<X>::kBytes, kPerWord = 4 / kBytes, kWords = kCount / kPerWord, kVectors = kWords / 4;
  if (left <= 0) {
    KD_UNROLL
    for (int i = 0; i < kWords; ++i) into[i] = 0;
    return;
  }
  if (kAligned) {
    KD_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      // A row may end between a thread's vectors.
      const Bits bits = 4 * v * kPerWord < left ? load_bits<kOnce>(at + 16 * v) : Bits{};
      KD_UNROLL
      for (int k = 0; k < 4; ++k) into[4 * v + k] = bits.word[k];
    }
    return;
  }
  const char* from = at - misalignment(at);
  if (from >= memory.begin && from + 16 * (kVectors + 1) <= memory.end) {
    uint32_t words[kWords + 4];
    KD_UNROLL
    for (int v = 0; v < kVectors + 1; ++v) {
      const Bits bits = load_bits<kOnce>(from + 16 * v);
      KD_UNROLL
      for (int k = 0; k < 4; ++k) words[4 * v + k] = bits.word[k];
    }
    shift_down<kWords>(words, misalignment(at));
    const uint32_t half = kBytes == 2 ? 0xffffu : 0;
    KD_UNROLL
    for (int i = 0; i < kWords; ++i) {
      into[i] = words[i] & (kPerWord * (i + 1) <= left ? ~0u : kPerWord * i < left ? half : 0);
    }
    return;
  }
  KD_UNROLL
  for (int i = 0; i < kWords; ++i) {
    into[i] = 0;
    KD_UNROLL
    for (int k = 0; k < kPerWord; ++k) {
      if (i * kPerWord + k >= left) continue;
      if (kBytes == 4) {
        into[i] = *reinterpret_cast<const uint32_t*>(at + 4 * i);
      } else {
        into[i] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at + 4 * i + 2 * k)) << (16 * k);
      }
    }
  }
}

// Stores a thread's elements, wherever they begin: see `store_words`.
template <int kBytes, class Me, int kWords>
KD_DEVICE void store_anywhere(Me& me, char* at, int left, const uint32_t (&mine)[kWords]) {
  constexpr int kVectors = kWords / 4, kPerVector = 16 / kBytes, kCount = kWords * 4 / kBytes;
  // The last words of the thread before, and this one's.
  uint32_t words[4 * kVectors + 8];
  KD_UNROLL
  for (int i = 0; i < 4 * kVectors; ++i) words[4 + i] = mine[i];
  KD_UNROLL
  for (int k = 0; k < 4; ++k) words[k] = me.up(words[4 * kVectors + k], 1);
  KD_UNROLL
  for (int k = 0; k < 4; ++k) words[4 * kVectors + 4 + k] = 0;
  const int bytes = misalignment(at), before = bytes / kBytes;
  // From here on `words` begins with the aligned 16 bytes that `at` lies in; the last vector goes on with the thread behind.
  if (bytes != 0) {
    const int shift = 16 - bytes;
    shift_down<4 * kVectors + 4>(words, shift);
  } else {
    KD_UNROLL
    for (int k = 0; k < 4 * kVectors; ++k) words[k] = words[k + 4];
  }
  const int first = me.lane() == 0 ? 0 : -before;
  // The thread behind stores what the last vector shares with it, but for the last thread's.
  const int vectors = kVectors + (me.lane() == kWarp - 1 && bytes != 0 ? 1 : 0);
  KD_UNROLL
  for (int v = 0; v < kVectors + 1; ++v) {
    if (v >= vectors) continue;
    const int begin = v * kPerVector - before, end = begin + kPerVector;
    char* const to = at - bytes + 16 * v;
    if (begin >= first && end <= left && end <= kCount) {
      store_bits(to, {{words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]}});
      continue;
    }
    KD_UNROLL
    for (int i = 0; i < kPerVector; ++i) {
      if (begin + i < first || begin + i >= left || begin + i >= kCount) continue;
      if (kBytes == 4) {
        *reinterpret_cast<uint32_t*>(to + 4 * i) = words[4 * v + i];
      } else {
        *reinterpret_cast<uint16_t*>(to + 2 * i) = static_cast<uint16_t>(words[4 * v + i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

// Stores a thread's elements of kBytes each; all threads of the warp take part, each with the elements that follow those of the one before.
template <int kBytes, bool kAligned, class Me, int kWords>
KD_DEVICE void store_words(Me& me, char* at, int left, const uint32_t (&mine)[kWords]) {
  if constexpr (kAligned) {
    KD_UNROLL
    for (int v = 0; v < kWords / 4; ++v) {
      if (v * 16 / kBytes >= left) return;
      store_bits(at + 16 * v, {{mine[4 * v], mine[4 * v + 1], mine[4 * v + 2], mine[4 * v + 3]}});
    }
  } else {
    store_anywhere<kBytes>(me, at, left, mine);
  }
}

// The same of numbers, which are rounded.
template <class X, bool kAligned, class Me, int kCount>
KD_DEVICE void store(Me& me, char* at, int left, const float (&x)[kCount]) {
  uint32_t words[kCount * Codec<X>::kBytes / 4];
  KD_UNROLL
  for (int i = 0; i < kCount * Codec<X>::kBytes / 4; ++i) words[i] = Codec<X>::narrow(x, i);
  store_words<Codec<X>::kBytes, kAligned>(me, at, left, words);
}

template <class X, int kCount>
KD_DEVICE void widen(const uint32_t* words, float (&x)[kCount]) {
  KD_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = Codec<X>::wide(words, i);
}

// Rows of X, or of the type that the level has.
template <class X>
struct Elements {
  static constexpr int kCount = kWidth<X>;

  KD_DEVICE static int64_t bytes(const Memory&) { return sizeof(X); }
  template <bool kOnce, bool kAligned>
  KD_DEVICE static void get(const Memory& memory, const char* at, int left, Words<X>& packed) {
    load<X, kCount, kOnce, kAligned>(memory, at, left, packed.word);
  }
  KD_DEVICE static void unpack(const Memory&, const Words<X>& packed, float (&x)[kCount]) { widen<X>(packed.word, x); }
  KD_DEVICE static float one(const Memory&, const Words<X>& packed, int i) { return Codec<X>::wide(packed.word, i); }
  template <bool kAligned, class Me>
  KD_DEVICE static void put(Me& me, const Memory&, char* at, int left, const float (&x)[kCount]) {
    store<X, kAligned>(me, at, left, x);
  }
  // Elements as `get` found them.
  template <bool kAligned, class Me>
  KD_DEVICE static void put_words(Me& me, const Memory&, char* at, int left, const Words<X>& packed) {
    store_words<sizeof(X), kAligned>(me, at, left, packed.word);
  }
};

template <>
struct Elements<Any> {
  static constexpr int kCount = kWidth<Any>;

  KD_DEVICE static int64_t bytes(const Memory& memory) { return memory.type == Type::fp32 ? 4 : 2; }
  template <bool kOnce, bool kAligned>
  KD_DEVICE static void get(const Memory& memory, const char* at, int left, Words<Any>& packed) {
    if (memory.type == Type::fp32) return load<float, kCount, kOnce, kAligned>(memory, at, left, packed.word);
    // Of either 16-bit type, whose bits are the same to a load.
    load<Half, kCount, kOnce, kAligned>(memory, at, left, packed.word);
  }
  KD_DEVICE static void unpack(const Memory& memory, const Words<Any>& packed, float (&x)[kCount]) {
    if (memory.type == Type::fp32) return widen<float>(packed.word, x);
    if (memory.type == Type::fp16) return widen<Half>(packed.word, x);
    widen<BFloat16>(packed.word, x);
  }
  KD_DEVICE static float one(const Memory& memory, const Words<Any>& packed, int i) {
    if (memory.type == Type::fp32) return Codec<float>::wide(packed.word, i);
    return memory.type == Type::fp16 ? Codec<Half>::wide(packed.word, i) : Codec<BFloat16>::wide(packed.word, i);
  }
  template <bool kAligned, class Me>
  KD_DEVICE static void put(Me& me, const Memory& memory, char* at, int left, const float (&x)[kCount]) {
    if (memory.type == Type::fp32) return store<float, kAligned>(me, at, left, x);
    if (memory.type == Type::fp16) return store<Half, kAligned>(me, at, left, x);
    store<BFloat16, kAligned>(me, at, left, x);
  }
  template <bool kAligned, class Me>
  KD_DEVICE static void put_words(Me& me, const Memory& memory, char* at, int left, const Words<Any>& packed) {
    if (memory.type == Type::fp32) return store_words<4, kAligned>(me, at, left, packed.word);
    const uint32_t narrow[] = {packed.word[0], packed.word[1], packed.word[2], packed.word[3]};
    store_words<2, kAligned>(me, at, left, narrow);
  }
};

}  // namespace kd
