// Sixteen floats at a time, in as many registers as that takes: the order of every sum is the same for all instruction sets.
// To be included by kernels, once an instruction set.

namespace kd {
namespace KD_ISA {

constexpr int PARTS = LANES / KD_WIDTH;

#if KD_WIDTH == 1
typedef float Register;
typedef int32_t Integers;
typedef int32_t Truth;
#else
typedef float Register __attribute__((vector_size(4 * KD_WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * KD_WIDTH)));
typedef Integers Truth;
typedef uint32_t Bits __attribute__((vector_size(4 * KD_WIDTH)));
typedef uint16_t Shorts __attribute__((vector_size(2 * KD_WIDTH)));
#endif

#define KD_INLINE static inline __attribute__((always_inline))
#define KD_PARTS _Pragma("GCC unroll 16") for (int part = 0; part < PARTS; ++part)

struct Floats {
  Register part[PARTS];
};

// Of every lane whether something holds.
struct Mask {
  Truth part[PARTS];
};

KD_INLINE Floats all(float value) {
  Floats result;
  KD_PARTS result.part[part] = value - Register{};
  return result;
}

#define KD_BINARY(op)                                                                  \
  KD_INLINE Floats operator op(const Floats& a, const Floats& b) {                     \
    Floats result;                                                                     \
    KD_PARTS result.part[part] = a.part[part] op b.part[part];                         \
    return result;                                                                     \
  }                                                                                    \
  KD_INLINE Floats operator op(const Floats& a, float b) { return a op all(b); }       \
  KD_INLINE Floats operator op(float a, const Floats& b) { return all(a) op b; }
KD_BINARY(+)
KD_BINARY(-)
KD_BINARY(*)
KD_BINARY(/)
#undef KD_BINARY

KD_INLINE Floats& operator+=(Floats& a, const Floats& b) { return a = a + b; }
KD_INLINE Floats& operator*=(Floats& a, const Floats& b) { return a = a * b; }

// False where either is NaN, but `!=`.
#define KD_COMPARE(op)                                                                 \
  KD_INLINE Mask operator op(const Floats& a, const Floats& b) {                       \
    Mask result;                                                                       \
    KD_PARTS result.part[part] = a.part[part] op b.part[part];                         \
    return result;                                                                     \
  }                                                                                    \
  KD_INLINE Mask operator op(const Floats& a, float b) { return a op all(b); }
KD_COMPARE(<)
KD_COMPARE(>)
KD_COMPARE(<=)
KD_COMPARE(>=)
KD_COMPARE(==)
KD_COMPARE(!=)
#undef KD_COMPARE

KD_INLINE Floats where(const Mask& mask, const Floats& a, const Floats& b) {
  Floats result;
  KD_PARTS result.part[part] = mask.part[part] ? a.part[part] : b.part[part];
  return result;
}
KD_INLINE Floats where(const Mask& mask, float a, float b) { return where(mask, all(a), all(b)); }

KD_INLINE Mask operator&(const Mask& a, const Mask& b) {
  Mask result;
  KD_PARTS result.part[part] = a.part[part] & b.part[part];
  return result;
}

#if KD_WIDTH == 1
KD_INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
KD_INLINE float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
KD_INLINE int32_t to_integers(float x) { return static_cast<int32_t>(x); }
#else
KD_INLINE Integers bits_of(Register x) { return (Integers)x; }
KD_INLINE Register from_bits(Integers bits) { return (Register)bits; }
KD_INLINE Integers to_integers(Register x) { return __builtin_convertvector(x, Integers); }
#endif

KD_INLINE Floats abs(const Floats& x) {
  Floats result;
  KD_PARTS result.part[part] = from_bits(bits_of(x.part[part]) & 0x7fffffff);
  return result;
}

// -1, 0 or 1; 0 for NaN, as torch.sgn and the gradient of torch.abs have it.
KD_INLINE Floats sign(const Floats& x) { return where(x > 0.0f, 1.0f, 0.0f) - where(x < 0.0f, 1.0f, 0.0f); }

// The larger, and NaN where a is NaN or b is.
KD_INLINE Floats larger(const Floats& a, const Floats& b) { return where(a > b, a, where(a == a, b, a)); }
KD_INLINE Floats smaller(const Floats& a, const Floats& b) { return where(a < b, a, where(a == a, b, a)); }

KD_INLINE Floats load(const float* from) {
  // Register by register: g++ copies a whole `Floats` in sixteen bytes at a time.
  Floats result;
  KD_PARTS std::memcpy(&result.part[part], from + KD_WIDTH * part, sizeof(Register));
  return result;
}

KD_INLINE void store(float* to, const Floats& x) {
  KD_PARTS std::memcpy(to + KD_WIDTH * part, &x.part[part], sizeof(Register));
}

// 0, 1, 2, ...
KD_INLINE Floats lane_numbers() {
  static const float numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(numbers);
}

KD_INLINE Mask first_lanes(int64_t count) { return lane_numbers() < static_cast<float>(std::min(count, LANES)); }

// x where there are that many elements, `other` in the lanes behind them.
KD_INLINE Floats inside(int64_t count, const Floats& x, const Floats& other) {
  return count < LANES ? where(first_lanes(count), x, other) : x;
}

// Halves added to each other until one is left, whatever the width of a register.
KD_INLINE float sum(const Floats& x) {
#if KD_WIDTH == 1
  float lanes[LANES];
  store(lanes, x);
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#else
#if KD_WIDTH == 16
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof halves);
  const __m256 eight = halves[0] + halves[1];
#else
  const __m256 eight = (__m256)(x.part[0] + x.part[1]);
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
#endif
}

KD_INLINE float largest(const Floats& x) {
  alignas(64) float lanes[LANES];
  store(lanes, x);
  float result = lanes[0];
  for (int64_t i = 1; i < LANES; ++i) result = result > lanes[i] || result != result ? result : lanes[i];
  return result;
}

KD_INLINE float smallest(const Floats& x) {
  alignas(64) float lanes[LANES];
  store(lanes, x);
  float result = lanes[0];
  for (int64_t i = 1; i < LANES; ++i) result = result < lanes[i] || result != result ? result : lanes[i];
  return result;
}

// exp(x) within 2 units of the last place, down to the smallest number above 0; infinite above 88.8. Cephes' polynomial.
KD_INLINE Floats exp(const Floats& x) {
  Floats result;
  KD_PARTS {
    Register a = x.part[part];
    // Written so that NaN stays what it is.
    a = a < -104.0f ? Register{} - 104.0f : a;
    a = a > 89.0f ? Register{} + 89.0f : a;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const Register whole = (a * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    const Register rest = (a - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Register p = Register{} + 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = (p * (rest * rest) + rest) + 1.0f;
    // By two powers of 2, as one alone would not reach below the normal numbers. NaN has no whole number.
    const Integers power = to_integers(whole == whole ? whole : Register{});
    const Integers first = power >> 1;
    result.part[part] = (p * from_bits((first + 127) << 23)) * from_bits((power - first + 127) << 23);
  }
  return result;
}

// exp(-x) - 1 + x of |x| <= 1/2. Differences of what is nearly equal, sigmas or distributions, come from it, so that they keep their
// digits.
KD_INLINE Floats second_order(const Floats& x) {
  Floats h = all(-1.0f / 362880);
  h = h * x + 1.0f / 40320;
  h = h * x - 1.0f / 5040;
  h = h * x + 1.0f / 720;
  h = h * x - 1.0f / 120;
  h = h * x + 1.0f / 24;
  h = h * x - 1.0f / 6;
  return x * x * (h * x + 0.5f);
}

// Elements of 16 bits, read and written by memcpy: rows begin anywhere.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

KD_INLINE Floats load(const BFloat16* from) {
  Floats result;
#if KD_WIDTH == 1
  KD_PARTS result.part[part] = from_bits(static_cast<int32_t>(static_cast<uint32_t>(from[part].bits) << 16));
#elif KD_WIDTH == 8
  KD_PARTS result.part[part] = from_bits((Integers)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + KD_WIDTH * part))) << 16);
#else
  // Masked forms, here and below: the others' headers make g++ warn of uninitialised numbers.
  result.part[0] = from_bits((Integers)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)from)) << 16);
#endif
  return result;
}

KD_INLINE Floats load(const Half* from) {
  Floats result;
#if KD_WIDTH == 16
  result.part[0] = (Register)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#elif KD_WIDTH == 8
  KD_PARTS result.part[part] = (Register)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + KD_WIDTH * part)));
#else
  KD_PARTS result.part[part] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[part].bits);
#endif
  return result;
}

// The first `count` lanes, 0 in the others.
template <class T>
KD_INLINE Floats load(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T padded[LANES] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

// Rounded to the nearest, ties to even.
KD_INLINE void store(BFloat16* to, const Floats& x) {
#if KD_WIDTH == 1
  KD_PARTS {
    const uint32_t bits = static_cast<uint32_t>(bits_of(x.part[part]));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[part].bits = static_cast<uint16_t>(x.part[part] == x.part[part] ? rounded : 0x7fc0);
  }
#else
  KD_PARTS {
    const Bits bits = (Bits)x.part[part];
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Shorts narrow = __builtin_convertvector(x.part[part] == x.part[part] ? rounded : Bits{} + 0x7fc0, Shorts);
    std::memcpy(to + KD_WIDTH * part, &narrow, sizeof narrow);
  }
#endif
}

// NaN becomes one and the same: how its bits are shortened differs.
KD_INLINE void store(Half* to, const Floats& given) {
  const Floats x = where(given == given, given, all(std::numeric_limits<float>::quiet_NaN()));
#if KD_WIDTH == 16
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif KD_WIDTH == 8
  KD_PARTS _mm_storeu_si128((__m128i*)(to + KD_WIDTH * part),
                            _mm256_cvtps_ph((__m256)x.part[part], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  KD_PARTS to[part].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(x.part[part]);
#endif
}

template <class T>
KD_INLINE void store(T* to, const Floats& x, int64_t count) {
  if (count >= LANES) return store(to, x);
  T padded[LANES];
  store(padded, x);
  std::memcpy(to, padded, count * sizeof(T));
}

}  // namespace KD_ISA
}  // namespace kd
