#include "vector.inl"

namespace kd {
namespace KD_ISA {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Sums of the exponentials of both, and of their differences times that of t, less the largest values top_s and top_t.
struct Exponentials {
  Floats s, t, differences;
};

template <Comparison KIND>
KD_INLINE void add(Exponentials& sums, const Floats& s, const Floats& t, const Floats& top_s, const Floats& top_t, float k,
                   int64_t count) {
  const Floats zero = all(0.0f);
  const Floats d_s = inside(count, (s - top_s) * k, zero), d_t = inside(count, (t - top_t) * k, zero);
  const Floats e_s = inside(count, exp(d_s), zero), e_t = inside(count, exp(d_t), zero);
  sums.s += e_s;
  sums.t += e_t;
  sums.differences += e_t * (KIND == Comparison::kl ? d_t - d_s : zero - d_s);
}

struct Products {
  Floats s, t, both, difference;
};

KD_INLINE void add(Products& sums, const Floats& x, const Floats& y) {
  sums.s += x * x;
  sums.t += y * y;
  sums.both += x * y;
  sums.difference += (x - y) * (x - y);
}

template <Comparison KIND>
static void row(const ComparedRow& given) {
  const ComparedRow a = given;
  if (KIND == Comparison::correlation) {
    Floats sum_s = all(0.0f), sum_t = all(0.0f);
    const Floats zero = all(0.0f);
    for (int64_t i = 0; i < a.count; i += LANES) {
      sum_s += inside(a.count - i, load(a.s + i, a.count - i) - a.origin_s, zero);
      sum_t += inside(a.count - i, load(a.t + i, a.count - i) - a.origin_t, zero);
    }
    const float mean_s = sum(sum_s) / a.count, mean_t = sum(sum_t) / a.count;
    Products sums{zero, zero, zero, zero};
    for (int64_t i = 0; i < a.count; i += LANES) {
      add(sums, inside(a.count - i, (load(a.s + i, a.count - i) - a.origin_s) - mean_s, zero),
          inside(a.count - i, (load(a.t + i, a.count - i) - a.origin_t) - mean_t, zero));
    }
    const float numbers[] = {mean_s, mean_t, sum(sums.s), sum(sums.t), sum(sums.both), sum(sums.difference)};
    for (int k = 0; k < 6; ++k) a.numbers[k * a.apart] = numbers[k];
    return;
  }
  const Floats lowest = all(LOWEST), zero = all(0.0f);
  Floats high_s = lowest, high_t = lowest;
  for (int64_t i = 0; i < a.count; i += LANES) {
    high_s = larger(high_s, inside(a.count - i, load(a.s + i, a.count - i), lowest));
    high_t = larger(high_t, inside(a.count - i, load(a.t + i, a.count - i), lowest));
  }
  const float top_s = largest(high_s), top_t = largest(high_t);
  Exponentials sums{zero, zero, zero};
  for (int64_t i = 0; i < a.count; i += LANES) {
    const int64_t left = a.count - i;
    add<KIND>(sums, load(a.s + i, left), load(a.t + i, left), all(top_s), all(top_t), a.k, left);
  }
  const float numbers[] = {top_s, sum(sums.s), top_t, sum(sums.t), sum(sums.differences)};
  for (int k = 0; k < 5; ++k) a.numbers[k * a.apart] = numbers[k];
}

// Sixteen channels of a tile, or those that are left.
KD_INLINE void tile_moments(const ComparedTile& a, int64_t i) {
  const int64_t left = a.count - i;
  const Floats origin_s = load(a.origin_s + i, left), origin_t = load(a.origin_t + i, left);
  Floats mean_s = all(0.0f), mean_t = all(0.0f);
  for (int64_t p = 0; p < a.pixels; ++p) {
    mean_s += load(a.s + p * a.row + i, left) - origin_s;
    mean_t += load(a.t + p * a.row + i, left) - origin_t;
  }
  const float pixels = static_cast<float>(a.pixels), before = static_cast<float>(a.before);
  mean_s = mean_s / pixels, mean_t = mean_t / pixels;
  Products sums{all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
  for (int64_t p = 0; p < a.pixels; ++p) {
    add(sums, (load(a.s + p * a.row + i, left) - origin_s) - mean_s, (load(a.t + p * a.row + i, left) - origin_t) - mean_t);
  }
  Floats numbers[] = {mean_s, mean_t, sums.s, sums.t, sums.both, sums.difference};
  if (a.before > 0) {
    Floats found[6];
    for (int k = 0; k < 6; ++k) found[k] = load(a.numbers + k * a.apart + i, left);
    const float share = pixels / (before + pixels), weight = before * share;
    const Floats s = mean_s - found[0], t = mean_t - found[1];
    numbers[0] = found[0] + s * share;
    numbers[1] = found[1] + t * share;
    numbers[2] += found[2] + s * s * weight;
    numbers[3] += found[3] + t * t * weight;
    numbers[4] += found[4] + s * t * weight;
    numbers[5] += found[5] + (s - t) * (s - t) * weight;
  }
  for (int k = 0; k < 6; ++k) store(a.numbers + k * a.apart + i, numbers[k], left);
}

template <Comparison KIND>
KD_INLINE void tile_exponentials(const ComparedTile& a, int64_t i) {
  const int64_t left = a.count - i;
  Floats found[5];
  if (a.before > 0) {
    for (int k = 0; k < 5; ++k) found[k] = load(a.numbers + k * a.apart + i, left);
  } else {
    found[0] = load(a.s + i, left), found[2] = load(a.t + i, left);
    found[1] = found[3] = found[4] = all(0.0f);
  }
  Floats top_s = found[0], top_t = found[2];
  for (int64_t p = 0; p < a.pixels; ++p) {
    top_s = larger(top_s, load(a.s + p * a.row + i, left));
    top_t = larger(top_t, load(a.t + p * a.row + i, left));
  }
  const Floats s = (found[0] - top_s) * a.k, t = (found[2] - top_t) * a.k, carried = exp(t);
  Exponentials sums{found[1] * exp(s), found[3] * carried, all(0.0f)};
  sums.differences = carried * (found[4] + found[3] * (KIND == Comparison::kl ? t - s : all(0.0f) - s));
  for (int64_t p = 0; p < a.pixels; ++p) {
    add<KIND>(sums, load(a.s + p * a.row + i, left), load(a.t + p * a.row + i, left), top_s, top_t, a.k, LANES);
  }
  const Floats numbers[] = {top_s, sums.s, top_t, sums.t, sums.differences};
  for (int k = 0; k < 5; ++k) store(a.numbers + k * a.apart + i, numbers[k], left);
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
