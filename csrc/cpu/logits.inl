#include "vector.inl"

namespace kd {
namespace KD_ISA {

// Elements that are added up in fp32, each lane for itself, before they meet a sum in double.
constexpr int64_t SUMMED = 1024;
constexpr float TINY = std::numeric_limits<float>::min();

// log(x) of a normal number above 0, within 2 units of the last place, and NaN of NaN. Cephes' polynomial.
KD_INLINE Floats log(const Floats& x) {
  Floats result;
  KD_PARTS {
    const Register a = x.part[part];
    // x = m * 2^e with m from sqrt(1/2) to sqrt(2).
    const Integers bits = bits_of(a) - 0x3f3504f3;
    const Integers exponent = bits >> 23;
    const Register m = from_bits((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
#if KD_WIDTH == 1
    const Register e = static_cast<float>(exponent);
#else
    const Register e = __builtin_convertvector(exponent, Register);
#endif
    const Register square = m * m;
    Register p = Register{} + 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Register rest = (p * m * square + e * -2.12194440e-4f) - 0.5f * square;
    const Register found = (m + rest) + e * 0.693359375f;
    result.part[part] = a == a ? found : a;
  }
  return result;
}

// log(1 + e) of 0 <= e <= 1 to all its digits: 2 artanh(e / (2 + e)), whose argument is 1/3 at the most.
KD_INLINE Floats log_1_plus(const Floats& e) {
  const Floats z = e / (2.0f + e), y = z * z;
  Floats series = all(1.0f / 15);
  series = series * y + 1.0f / 13;
  series = series * y + 1.0f / 11;
  series = series * y + 1.0f / 9;
  series = series * y + 1.0f / 7;
  series = series * y + 1.0f / 5;
  series = series * y + 1.0f / 3;
  return 2.0f * (z + z * y * series);
}

// sigma of |x| and of -|x|, and exp(-|x|).
struct Sigmas {
  Floats large, small, e;
};

KD_INLINE Sigmas sigmas(const Floats& x) {
  Sigmas s;
  s.e = exp(0.0f - abs(x));
  s.large = 1.0f / (1.0f + s.e);
  s.small = s.e * s.large;
  return s;
}

struct Term {
  Floats value, slope;
};

// |d|^beta * BCE(s, sigma(t)) with d = sigma(s) - sigma(t), and its derivative.
KD_INLINE Term cross_entropy_term(const Floats& s, const Floats& t, float beta) {
  const Sigmas a = sigmas(s), b = sigmas(t);
  const Mask above = s > 0.0f, other = t > 0.0f;
  const Floats own = where(above, a.large, a.small), none = where(above, a.small, a.large);
  const Floats wanted = where(other, b.large, b.small), unwanted = where(other, b.small, b.large);
  Term term;
  term.value = log_1_plus(a.e) + abs(s) * where(above, unwanted, wanted);
  // Of what is nearly equal the difference comes from that of the logits: sigma(s) * sigma(-t) * (1 - exp(-x)) for x > 0.
  const Floats x = s - t, step = abs(x);
  const Floats near = where(x > 0.0f, own * unwanted, 0.0f - none * wanted) * (step - second_order(step));
  const Floats apart = where(above & other, unwanted - none, own - wanted);
  const Floats d = where(step < 0.5f, near, apart);
  if (beta == 0.0f) {
    term.slope = d;
    return term;
  }
  // Of sigma(s), times the loss.
  const Floats rise = a.large * a.small * term.value, size = abs(d);
  Floats power = all(1.0f);
  if (beta == 2.0f) {
    power = size;
  } else if (beta != 1.0f) {
    const Mask zero = size == 0.0f;
    power = where(zero, all(0.0f), exp((beta - 1.0f) * log(where(size < TINY, all(TINY), size))));
  }
  term.value *= power * size;
  term.slope = power * (size * d + beta * sign(d) * rise);
  return term;
}

// The sum of a tile, or its gradient.
struct Gathered {
  Floats lanes;
  int64_t added;
  double total;
};

KD_INLINE void add(Gathered& g, const Floats& x) {
  g.lanes += x;
  if (++g.added < SUMMED / LANES) return;
  g.total += sum(g.lanes);
  g.lanes = all(0.0f);
  g.added = 0;
}

// Takes the term of `count` elements at `at`. weight: of the column
KD_INLINE void take(const LogitTile& tile, Gathered& g, int64_t at, int64_t count, const Term& term, const Floats& weight) {
  if (tile.out != nullptr) return store(tile.out + at, term.slope * weight * tile.scale, count);
  const Floats value = term.value * weight;
  add(g, count < LANES ? where(first_lanes(count), value, all(0.0f)) : value);
}

static double cross_entropy(const LogitTile& given, float beta) {
  const LogitTile tile = given;
  Gathered g{all(0.0f), 0, 0};
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.count; i += LANES) {
      const int64_t at = row * tile.stride + i, count = tile.count - i;
      const Term term = cross_entropy_term(load(tile.s + at, count), load(tile.t + at, count), beta);
      take(tile, g, at, count, term, tile.weight != nullptr ? load(tile.weight + i, count) : all(1.0f));
    }
  }
  return g.total + sum(g.lanes);
}

struct Softmax {
  Floats highest, sum;
};

// The largest of each column, and the sum of exp((x - largest) * scale), which `room` keeps.
KD_INLINE Softmax softmax(const LogitTile& tile, const float* x, int64_t i, int64_t count, float scale, float* room) {
  Softmax of{load(x + i, count), all(0.0f)};
  for (int64_t row = 1; row < tile.rows; ++row) of.highest = larger(of.highest, load(x + row * tile.stride + i, count));
  for (int64_t row = 0; row < tile.rows; ++row) {
    const Floats e = exp((load(x + row * tile.stride + i, count) - of.highest) * scale);
    store(room + row * LANES, e);
    of.sum += e;
  }
  return of;
}

static double divergence(const LogitTile& given, float temperature) {
  const LogitTile tile = given;
  const float scale = 1.0f / temperature;
  float* const room_s = tile.room;
  float* const room_t = tile.room + tile.rows * LANES;
  Gathered g{all(0.0f), 0, 0};
  for (int64_t i = 0; i < tile.count; i += LANES) {
    const int64_t count = tile.count - i;
    const Softmax a = softmax(tile, tile.s, i, count, scale, room_s), b = softmax(tile, tile.t, i, count, scale, room_t);
    const Floats weight = tile.weight != nullptr ? load(tile.weight + i, count) : all(1.0f);
    const Floats logs = log(b.sum) - log(a.sum);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t at = row * tile.stride + i;
      const Floats p = load(room_s + row * LANES) / a.sum, q = load(room_t + row * LANES) / b.sum;
      // A bin that the teacher rules out adds p alone, also where its logit is -inf.
      const Mask ruled_out = q == 0.0f;
      const Floats x = load(tile.s + at, count) - a.highest, y = load(tile.t + at, count) - b.highest;
      const Floats r = where(ruled_out, all(0.0f), (y - x) * scale - logs);
      // Of distributions that differ little nothing is left but second-order terms.
      const Floats second = second_order(r);
      const Mask near = (abs(r) < 0.5f) & (q > 0.0f);
      Term term;
      // q * (log q - log p) + p - q, whose sum is the divergence.
      term.value = where(near, q * second, (p - q) + q * r);
      term.slope = where(near, q * (second - r), p - q) * scale;
      take(tile, g, at, count, term, weight);
    }
  }
  return g.total + sum(g.lanes);
}

static const LogitKernels kernels = {cross_entropy, divergence};

}  // namespace KD_ISA
}  // namespace kd
