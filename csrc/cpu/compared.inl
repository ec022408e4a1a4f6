#include "vector.inl"

namespace kd {
namespace KD_ISA {

// Where no pixel was seen: finite, so that values of -inf are smaller and differ from it by no NaN.
constexpr float LOWEST = std::numeric_limits<float>::lowest();

// Sums of the exponentials of both, and with d, the difference of their exponents, of e_t d and e_t (exp(-d) - 1 + d).
struct Exponentials {
  Floats s, t, differences, second;
};

// Adds the first `count` of these pixels, less the largest values top_s and top_t.
template <Comparison KIND>
KD_INLINE void add(Exponentials& sums, const Floats& s, const Floats& t, const Floats& top_s, const Floats& top_t, float k,
                   int64_t count) {
  const Floats zero = all(0.0f);
  const Floats from_s = inside(count, s - top_s, zero), from_t = inside(count, t - top_t, zero);
  const Floats e_s = inside(count, exp(from_s * k), zero), e_t = inside(count, exp(from_t * k), zero);
  sums.s += e_s;
  sums.t += e_t;
  const Floats d = (KIND == Comparison::kl ? from_t - from_s : zero - from_s) * k;
  sums.differences += e_t * d;
  if (KIND == Comparison::kl) {
    sums.second += where((abs(d) < 0.5f) & (e_t > 0.0f), e_t * second_order(d), (e_s - e_t) + e_t * d);
  }
}

// The sums of the same pixels less larger values, which exceed the former ones by -s and -t, as exponents.
template <Comparison KIND>
KD_INLINE Exponentials raised(const Exponentials& a, const Floats& s, const Floats& t) {
  const Floats zero = all(0.0f), e = exp(t);
  const Floats more = where(a.t == 0.0f, zero, KIND == Comparison::kl ? t - s : zero - s);
  Exponentials made{a.s * exp(s), a.t * e, e * (a.differences + a.t * more), zero};
  if (KIND == Comparison::kl) {
    const Floats near = (a.t - a.differences + a.second) * second_order(more) + a.differences * more + a.second * (1.0f - more);
    made.second = where((abs(more) < 0.5f) & (a.t > 0.0f), e * near, (made.s - made.t) + made.differences);
  }
  return made;
}

// Numbers of `correlation`.
struct Moments {
  Floats mean_s, mean_t, of_s, slope, rest;
};

KD_INLINE Floats slope_of(const Floats& of_s, const Floats& of_both) { return where(of_s > 0.0f, of_both / of_s, all(0.0f)); }

// Of the pixels of both; share: the second's of all;   weight: of its distance from the first
KD_INLINE Moments joined(const Moments& a, const Moments& b, float share, float weight) {
  const Floats s = b.mean_s - a.mean_s, t = b.mean_t - a.mean_t;
  Moments made;
  made.mean_s = a.mean_s + s * share;
  made.mean_t = a.mean_t + t * share;
  made.of_s = a.of_s + b.of_s + s * s * weight;
  made.slope = slope_of(made.of_s, a.slope * a.of_s + b.slope * b.of_s + s * t * weight);
  const Floats of_a = a.slope - made.slope, of_b = b.slope - made.slope, between = t - made.slope * s;
  made.rest = a.rest + b.rest + of_a * a.of_s * of_a + of_b * b.of_s * of_b + between * between * weight;
  return made;
}

KD_INLINE void row_moments(const ComparedRow& a) {
  const Floats zero = all(0.0f);
  Floats sum_s = zero, sum_t = zero;
  for (int64_t i = 0; i < a.count; i += LANES) {
    sum_s += inside(a.count - i, load(a.s + i, a.count - i) - a.origin_s, zero);
    sum_t += inside(a.count - i, load(a.t + i, a.count - i) - a.origin_t, zero);
  }
  const float mean_s = sum(sum_s) / a.count, mean_t = sum(sum_t) / a.count;
  const auto from_mean_s = [&](int64_t i) { return inside(a.count - i, (load(a.s + i, a.count - i) - a.origin_s) - mean_s, zero); };
  const auto from_mean_t = [&](int64_t i) { return inside(a.count - i, (load(a.t + i, a.count - i) - a.origin_t) - mean_t, zero); };
  Floats squares = zero, products = zero, rests = zero;
  for (int64_t i = 0; i < a.count; i += LANES) {
    const Floats x = from_mean_s(i);
    squares += x * x;
    products += x * from_mean_t(i);
  }
  const float of_s = sum(squares), slope = of_s > 0 ? sum(products) / of_s : 0.0f;
  for (int64_t i = 0; i < a.count; i += LANES) {
    const Floats rest = from_mean_t(i) - slope * from_mean_s(i);
    rests += rest * rest;
  }
  const float numbers[] = {mean_s, mean_t, of_s, slope, sum(rests)};
  for (int k = 0; k < 5; ++k) a.numbers[k * a.apart] = numbers[k];
}

template <Comparison KIND>
static void row(const ComparedRow& given) {
  const ComparedRow a = given;
  if (KIND == Comparison::correlation) return row_moments(a);
  const Floats lowest = all(LOWEST), zero = all(0.0f);
  Floats high_s = lowest, high_t = lowest;
  for (int64_t i = 0; i < a.count; i += LANES) {
    high_s = larger(high_s, inside(a.count - i, load(a.s + i, a.count - i), lowest));
    high_t = larger(high_t, inside(a.count - i, load(a.t + i, a.count - i), lowest));
  }
  const float top_s = largest(high_s), top_t = largest(high_t);
  Exponentials sums{zero, zero, zero, zero};
  for (int64_t i = 0; i < a.count; i += LANES) {
    const int64_t left = a.count - i;
    add<KIND>(sums, load(a.s + i, left), load(a.t + i, left), all(top_s), all(top_t), a.k, left);
  }
  const float numbers[] = {top_s, sum(sums.s), top_t, sum(sums.t), sum(sums.differences), sum(sums.second)};
  for (int k = 0; k < numbers_of(KIND); ++k) a.numbers[k * a.apart] = numbers[k];
}

// Sixteen channels of a tile, or those that are left.
KD_INLINE void tile_moments(const ComparedTile& a, int64_t i) {
  const int64_t left = a.count - i;
  const Floats origin_s = load(a.origin_s + i, left), origin_t = load(a.origin_t + i, left), zero = all(0.0f);
  Moments m{zero, zero, zero, zero, zero};
  for (int64_t p = 0; p < a.pixels; ++p) {
    m.mean_s += load(a.s + p * a.row + i, left) - origin_s;
    m.mean_t += load(a.t + p * a.row + i, left) - origin_t;
  }
  const float pixels = static_cast<float>(a.pixels), before = static_cast<float>(a.before);
  m.mean_s = m.mean_s / pixels, m.mean_t = m.mean_t / pixels;
  const auto from_mean_s = [&](int64_t p) { return (load(a.s + p * a.row + i, left) - origin_s) - m.mean_s; };
  const auto from_mean_t = [&](int64_t p) { return (load(a.t + p * a.row + i, left) - origin_t) - m.mean_t; };
  Floats products = zero;
  for (int64_t p = 0; p < a.pixels; ++p) {
    const Floats x = from_mean_s(p);
    m.of_s += x * x;
    products += x * from_mean_t(p);
  }
  m.slope = slope_of(m.of_s, products);
  for (int64_t p = 0; p < a.pixels; ++p) {
    const Floats rest = from_mean_t(p) - m.slope * from_mean_s(p);
    m.rest += rest * rest;
  }
  const auto number = [&](int k) { return load(a.numbers + k * a.apart + i, left); };
  const float share = pixels / (before + pixels);
  if (a.before > 0) m = joined({number(0), number(1), number(2), number(3), number(4)}, m, share, before * share);
  const Floats numbers[] = {m.mean_s, m.mean_t, m.of_s, m.slope, m.rest};
  for (int k = 0; k < 5; ++k) store(a.numbers + k * a.apart + i, numbers[k], left);
}

template <Comparison KIND>
KD_INLINE void tile_exponentials(const ComparedTile& a, int64_t i) {
  const int64_t left = a.count - i;
  Floats found[6] = {all(LOWEST), all(0.0f), all(LOWEST), all(0.0f), all(0.0f), all(0.0f)};
  for (int k = 0; k < numbers_of(KIND) && a.before > 0; ++k) found[k] = load(a.numbers + k * a.apart + i, left);
  Floats top_s = found[0], top_t = found[2];
  for (int64_t p = 0; p < a.pixels; ++p) {
    top_s = larger(top_s, load(a.s + p * a.row + i, left));
    top_t = larger(top_t, load(a.t + p * a.row + i, left));
  }
  Exponentials sums = raised<KIND>({found[1], found[3], found[4], found[5]}, (found[0] - top_s) * a.k, (found[2] - top_t) * a.k);
  for (int64_t p = 0; p < a.pixels; ++p) {
    add<KIND>(sums, load(a.s + p * a.row + i, left), load(a.t + p * a.row + i, left), top_s, top_t, a.k, LANES);
  }
  const Floats numbers[] = {top_s, sums.s, top_t, sums.t, sums.differences, sums.second};
  for (int k = 0; k < numbers_of(KIND); ++k) store(a.numbers + k * a.apart + i, numbers[k], left);
}

template <Comparison KIND>
static void tile(const ComparedTile& given) {
  const ComparedTile a = given;
  for (int64_t i = 0; i < a.count; i += LANES) {
    if (KIND == Comparison::correlation) {
      tile_moments(a, i);
    } else {
      tile_exponentials<KIND>(a, i);
    }
  }
}

template <bool CORRELATION, bool ONE>
static void slopes(const ComparedSlopes& given) {
  const ComparedSlopes a = given;
  Floats planes[5];
  constexpr int COUNT = CORRELATION ? 5 : 4;
  if (ONE) {
    for (int k = 0; k < COUNT; ++k) planes[k] = all(a.planes[k][0]);
  }
  for (int64_t i = 0; i < a.count; i += LANES) {
    const int64_t left = a.count - i;
    for (int k = 0; k < COUNT && !ONE; ++k) planes[k] = load(a.planes[k] + i, left);
    const Floats s = load(a.s + i, left) - planes[0], t = load(a.t + i, left) - planes[2];
    const Floats u = planes[1] * a.by, v = planes[3] * a.by;
    store(a.made + i, CORRELATION ? u * s + v * t + planes[4] * a.by : u * exp(s * a.k) - v * exp(t * a.k), left);
  }
}

static const ComparedKernels kernels = {
    {row<Comparison::kl>, row<Comparison::cross_entropy>, row<Comparison::correlation>},
    {tile<Comparison::kl>, tile<Comparison::cross_entropy>, tile<Comparison::correlation>},
    {{slopes<false, false>, slopes<false, true>}, {slopes<true, false>, slopes<true, true>}},
};

}  // namespace KD_ISA
}  // namespace kd
