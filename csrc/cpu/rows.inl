#include "vector.inl"

namespace kd {
namespace KD_ISA {

// Asks for what lies `bytes` behind `row`, which need not be memory of anybody's.
KD_INLINE void fetch(const char* row, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + bytes), 0, 2);
}

// The steps' arguments are copies that nothing points to, so that no store makes the compiler read them again.
template <class T, int ROWS>
KD_INLINE void down_step(const Down& a, int64_t i, int64_t count, Floats* sums) {
  Floats x[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    x[r] = load(reinterpret_cast<const T*>(a.x[r]) + i, count);
    fetch(a.x[r], i * sizeof(T) + a.ahead);
  }
  if (a.error != nullptr) {
    Floats total = load(a.error + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats d = x[r] - load(reinterpret_cast<const T*>(a.target[r]) + i, count);
      fetch(a.target[r], i * sizeof(T) + a.ahead);
      total += (d * a.error_weight[r]) * d;
    }
    store(a.error + i, total, count);
  }
  if (a.raw != nullptr) {
    Floats total = load(a.raw + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) total += (a.absolute ? abs(x[r]) : x[r]) * a.weight[r];
    store(a.raw + i, total, count);
  }
  if (a.of_magnitudes) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) x[r] = abs(x[r]);
  }
  if (a.magnitude != nullptr) {
    Floats total = load(a.magnitude + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) total += a.of_magnitudes ? x[r] : abs(x[r]);
    store(a.magnitude + i, total, count);
  }
  if (a.pixel_weights != nullptr) {
    const Floats weights = load(a.pixel_weights + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) x[r] *= weights;
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) sums[r] += x[r];
}

template <class T, int ROWS>
static void down(const Down& given) {
  const Down a = given;
  Floats sums[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) sums[r] = all(0.0f);
  int64_t i = 0;
  for (; i + LANES <= a.count; i += LANES) down_step<T, ROWS>(a, i, LANES, sums);
  if (i < a.count) down_step<T, ROWS>(a, i, a.count - i, sums);
  if (a.sums == nullptr) return;
  for (int r = 0; r < ROWS; ++r) a.sums[r] = sum(sums[r]);
}

template <class T, int ROWS>
KD_INLINE void across_step(const Across& a, int64_t i, int64_t count, Floats* raw, Floats* magnitude, Floats* error) {
  Floats x[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    x[r] = load(reinterpret_cast<const T*>(a.x[r]) + i, count);
    fetch(a.x[r], i * sizeof(T) + a.ahead);
  }
  if (a.error != nullptr) {
    const Floats weights = a.error_weights != nullptr ? load(a.error_weights + i, count) : all(1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats d = x[r] - load(reinterpret_cast<const T*>(a.target[r]) + i, count);
      fetch(a.target[r], i * sizeof(T) + a.ahead);
      error[r] += (d * weights) * d;
    }
  }
  if (a.raw != nullptr) {
    const Floats weights = load(a.weights + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) raw[r] += (a.absolute ? abs(x[r]) : x[r]) * weights;
  }
  if (a.magnitude != nullptr) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) magnitude[r] += abs(x[r]);
  }
  if (a.channel != nullptr) {
    Floats total = load(a.channel + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats value = a.of_magnitudes ? abs(x[r]) : x[r];
      total += a.pixel_weights != nullptr ? value * a.pixel_weights[r] : value;
    }
    store(a.channel + i, total, count);
  }
}

template <class T, int ROWS>
static void across(const Across& given) {
  const Across a = given;
  Floats raw[ROWS], magnitude[ROWS], error[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) raw[r] = magnitude[r] = error[r] = all(0.0f);
  int64_t i = 0;
  for (; i + LANES <= a.count; i += LANES) across_step<T, ROWS>(a, i, LANES, raw, magnitude, error);
  if (i < a.count) across_step<T, ROWS>(a, i, a.count - i, raw, magnitude, error);
  for (int r = 0; r < ROWS; ++r) {
    if (a.raw != nullptr) a.raw[r] = sum(raw[r]);
    if (a.magnitude != nullptr) a.magnitude[r] = sum(magnitude[r]);
    if (a.error != nullptr) a.error[r] = sum(error[r]);
  }
}

template <class T>
KD_INLINE void gradient_step(const Gradient& a, int64_t i, int64_t count, Floats& values) {
  Floats made = all(0.0f), x = made;
  if (a.x != nullptr) {
    x = load(reinterpret_cast<const T*>(a.x) + i, count);
    fetch(a.x, i * sizeof(T) + a.ahead);
  }
  if (a.has_product) {
    made = a.product != nullptr ? load(a.product + i, count) * a.by_product : all(a.by_product);
    if (a.absolute) made *= sign(x);
  }
  if (a.has_sign) made += sign(x) * (a.sign != nullptr ? load(a.sign + i, count) + a.by_sign : all(a.by_sign));
  if (a.has_error) {
    const Floats d = x - load(reinterpret_cast<const T*>(a.target) + i, count);
    fetch(a.target, i * sizeof(T) + a.ahead);
    const Floats slope = (a.error != nullptr ? load(a.error + i, count) * a.by_error : all(a.by_error)) * d;
    made += slope;
    values += slope * d;
  }
  if (a.arriving != nullptr) {
    made += load(reinterpret_cast<const T*>(a.arriving) + i, count);
    fetch(a.arriving, i * sizeof(T) + a.ahead);
  }
  store(a.made + i, made, count);
}

template <class T>
static void gradient(const Gradient& given) {
  const Gradient a = given;
  Floats values = a.values != nullptr ? load(a.values) : all(0.0f);
  int64_t i = 0;
  for (; i + LANES <= a.count; i += LANES) gradient_step<T>(a, i, LANES, values);
  if (i < a.count) gradient_step<T>(a, i, a.count - i, values);
  if (a.values != nullptr) store(a.values, values);
}

template <class T>
static void widen(const char* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load(reinterpret_cast<const T*>(from) + i, count - i), count - i);
}

template <class T>
static void narrow(const float* from, char* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(reinterpret_cast<T*>(to) + i, load(from + i, count - i), count - i);
}

static void stream(char* to, const char* from, int64_t bytes) {
#if KD_WIDTH > 1
  constexpr int64_t LINE = 64;
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (LINE - 1));
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + LINE <= bytes; i += LINE) {
#if KD_WIDTH == 16
    _mm512_stream_si512((__m512i*)(to + i), _mm512_loadu_si512(from + i));
#else
    _mm256_stream_si256((__m256i*)(to + i), _mm256_loadu_si256((const __m256i*)(from + i)));
    _mm256_stream_si256((__m256i*)(to + i + 32), _mm256_loadu_si256((const __m256i*)(from + i + 32)));
#endif
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

static const RowKernels kernels = {
    {{down<float, 1>, down<float, MOST_ROWS>}, {down<Half, 1>, down<Half, MOST_ROWS>}, {down<BFloat16, 1>, down<BFloat16, MOST_ROWS>}},
    {{across<float, 1>, across<float, MOST_ROWS>},
     {across<Half, 1>, across<Half, MOST_ROWS>},
     {across<BFloat16, 1>, across<BFloat16, MOST_ROWS>}},
    {gradient<float>, gradient<Half>, gradient<BFloat16>},
    {widen<float>, widen<Half>, widen<BFloat16>},
    {narrow<float>, narrow<Half>, narrow<BFloat16>},
    stream,
};

}  // namespace KD_ISA
}  // namespace kd
