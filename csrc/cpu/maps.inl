#include "vector.inl"

namespace kd {
namespace KD_ISA {

// Elements that are added up in fp32, each lane for itself, before they meet a sum in double.
constexpr int64_t BLOCK = 4096;
constexpr float TINY = std::numeric_limits<float>::min();

struct Sum {
  Floats lanes = {};
  double blocks = 0;
};

KD_INLINE bool ends_block(int64_t i) { return (i + LANES) % BLOCK == 0; }

KD_INLINE void flush(Sum& s) {
  s.blocks += sum(s.lanes);
  s.lanes = all(0.0f);
}

KD_INLINE double total(Sum& s) {
  flush(s);
  return s.blocks;
}

// relu keeps the NaN that -inf * 0 is: a sum of -inf, which an overflow brings, is no innocent 0.
KD_INLINE Floats rectified(const Floats& raw, Rectify how) {
  if (how == Rectify::abs) return abs(raw);
  if (how == Rectify::relu) return where(raw > 0.0f, raw, raw * 0.0f);
  return raw;
}

struct Extremes {
  float low, high;
  double total;
};

// Smallest and largest value of a map and the sum; the extremes are NaN where any value is NaN or infinite.
static Extremes extremes(const float* source, int64_t count, Rectify rectify) {
  const Floats first = rectified(all(source[0]), rectify);
  Floats low = first, high = first;
  Sum values;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats r = rectified(load(source + i, count - i), rectify);
    values.lanes += r;
    const Floats known = inside(count - i, r, first);
    low = smaller(low, known);
    high = larger(high, known);
    if (ends_block(i)) flush(values);
  }
  const float smallest_value = smallest(low), largest_value = largest(high);
  const float poison = (smallest_value - smallest_value) + (largest_value - largest_value);
  return {smallest_value + poison, largest_value + poison, total(values)};
}

// What `normalised` takes from a map, with the spread m of which its scale is made:
//   minmax:  min r, max r, 1 / D and the range;   zscore: min r, mean of r - min r, 1 / D and the standard deviation
//   softmax: max r, 0, P / sum exp and 0;   none: zeros
// The scale is 0 where the map is constant, NaN where it is not finite.
struct Statistics {
  Normalize how;
  float shift = 0, centre = 0, scale = 0, spread = 0;
};

// Centre and spread of zscore from the extremes: 0 and 0 where they are equal.
static void moments(const float* source, int64_t count, const Extremes& of, Rectify rectify, Statistics& s) {
  const float span = of.high - of.low;
  if (span == 0.0f) return;
  // In units of the range, so that squares neither underflow nor overflow, and around the rounded mean, so that nothing cancels.
  const float pivot = static_cast<float>(of.total / count - of.low);
  Sum first, second;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats r = rectified(load(source + i, count - i), rectify);
    const Floats u = inside(count - i, ((r - of.low) - pivot) / span, all(0.0f));
    first.lanes += u;
    second.lanes += u * u;
    if (!ends_block(i)) continue;
    flush(first);
    flush(second);
  }
  const double rest = total(first) / count;
  s.centre = static_cast<float>(pivot + span * rest);
  s.spread = static_cast<float>(span * std::sqrt(total(second) / count - rest * rest));
}

// P / sum exp((r - high) * factor).
static float softmax_scale(const float* source, int64_t count, float high, float factor, Rectify rectify) {
  Sum exponentials;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats r = rectified(load(source + i, count - i), rectify);
    exponentials.lanes += inside(count - i, exp((r - high) * factor), all(0.0f));
    if (ends_block(i)) flush(exponentials);
  }
  return static_cast<float>(count / total(exponentials));
}

static Statistics statistics(const float* source, int64_t count, const MapOptions& options, Normalize how, Rectify rectify) {
  Statistics s{how};
  if (how == Normalize::none) return s;
  const Extremes of = extremes(source, count, rectify);
  if (how == Normalize::softmax) {
    s.shift = of.high;
    s.scale = softmax_scale(source, count, of.high, 1.0f / options.temperature, rectify);
    return s;
  }
  s.shift = of.low;
  if (how == Normalize::minmax) {
    s.centre = of.high;
    s.spread = of.high - of.low;
  } else {
    moments(source, count, of, rectify, s);
  }
  if (s.spread == 0.0f) return s;
  const float denominator = options.eps_relative ? s.spread * (1.0f + options.eps) + TINY : s.spread + options.eps;
  // The reciprocal of what is smaller is infinite.
  s.scale = 1.0f / (denominator < TINY ? TINY : denominator);
  return s;
}

// M of r, given what `statistics` says of its map.
KD_INLINE Floats normalised(const Floats& r, const Statistics& s, float inverse_temperature) {
  if (s.how == Normalize::minmax) return (r - s.shift) * s.scale;
  if (s.how == Normalize::zscore) return ((r - s.shift) - s.centre) * s.scale;
  if (s.how == Normalize::softmax) return exp((r - s.shift) * inverse_temperature) * s.scale;
  return r;
}

// M of the student, the distances and their derivatives with respect to M.
struct Compared {
  Floats m, value, slope;
};

KD_INLINE Compared compared(const Floats& r, const float* target, const float* spatial, int64_t count, const Statistics& student,
                            const Statistics& teacher, float inverse_temperature, Distance distance) {
  Compared c;
  c.m = normalised(r, student, inverse_temperature);
  Floats d = c.m - normalised(load(target, count), teacher, inverse_temperature);
  const Floats weight = spatial != nullptr ? load(spatial, count) : all(1.0f);
  if (spatial != nullptr) d *= weight;
  if (distance == Distance::l1) {
    c.value = abs(d);
    c.slope = sign(d);
  } else if (distance == Distance::mse) {
    c.value = d * d;
    c.slope = 2.0f * d;
  } else {
    const Mask small = abs(d) < 1.0f;
    c.value = where(small, 0.5f * d * d, abs(d) - 0.5f);
    c.slope = where(small, d, sign(d));
  }
  if (spatial != nullptr) c.slope *= weight;
  return c;
}

static float map_forward(const float* source, const float* target, const float* spatial, float* state, int64_t pixels, float divisor,
                         const MapOptions& options) {
  const float inverse_temperature = 1.0f / options.temperature;
  const Statistics student = statistics(source, pixels, options, options.normalize, options.rectify);
  const Statistics teacher = statistics(target, pixels, options, options.normalize_target, Rectify::none);
  const bool ties = options.normalize == Normalize::minmax;
  Sum values, slopes, products, highest, lowest;
  for (int64_t i = 0; i < pixels; i += LANES) {
    const int64_t count = pixels - i;
    const Floats r = rectified(load(source + i, count), options.rectify), zero = all(0.0f);
    const Compared c = compared(r, target + i, spatial != nullptr ? spatial + i : nullptr, count, student, teacher, inverse_temperature,
                                options.distance);
    values.lanes += inside(count, c.value, zero);
    slopes.lanes += inside(count, c.slope, zero);
    products.lanes += inside(count, c.slope * c.m, zero);
    if (ties) {
      highest.lanes += inside(count, where(r == student.centre, 1.0f, 0.0f), zero);
      lowest.lanes += inside(count, where(r == student.shift, 1.0f, 0.0f), zero);
    }
    if (!ends_block(i)) continue;
    flush(values);
    flush(slopes);
    flush(products);
    flush(highest);
    flush(lowest);
  }
  const float result = static_cast<float>(total(values) / divisor);
  double product = total(products) / divisor, a = 0, b = 0;
  if (options.normalize == Normalize::softmax) {
    a = product / pixels;
  } else if (options.normalize != Normalize::none) {
    const double slope = total(slopes) / divisor;
    if (options.eps_relative) product *= 1.0f + options.eps;
    if (ties) {
      a = -product * student.scale / total(highest);
      b = (product - slope) * student.scale / total(lowest);
    } else {
      a = -slope / pixels * student.scale;
      b = student.spread == 0.0f ? 0.0 : product / pixels / student.spread;
    }
  }
  // sgn(NaN) is 0: a map of the teacher's that is not finite would give the student an innocent gradient.
  const float scale = student.scale + result * 0.0f;
  const float left[STATE] = {student.shift, student.centre, scale,
                             teacher.shift, teacher.centre, teacher.scale,
                             static_cast<float>(a), static_cast<float>(b)};
  std::memcpy(state, left, sizeof left);
  return result;
}

static void map_gradient(const float* source, const float* target, const float* spatial, const float* state, float cotangent, int64_t count,
                         float divisor, const MapOptions& options, float* out) {
  const float inverse_temperature = 1.0f / options.temperature, a = state[6], b = state[7];
  const Statistics student{options.normalize, state[0], state[1], state[2]};
  const Statistics teacher{options.normalize_target, state[3], state[4], state[5]};
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats raw = load(source + i, count - i), r = rectified(raw, options.rectify);
    const Compared c = compared(r, target + i, spatial != nullptr ? spatial + i : nullptr, count - i, student, teacher,
                                inverse_temperature, options.distance);
    Floats gradient = c.slope / divisor;
    if (options.normalize == Normalize::minmax) {
      gradient = gradient * student.scale + where(r == student.centre, a, 0.0f) + where(r == student.shift, b, 0.0f);
    } else if (options.normalize == Normalize::zscore) {
      gradient = gradient * student.scale + a - b * c.m;
    } else if (options.normalize == Normalize::softmax) {
      gradient = (gradient - a) * c.m * inverse_temperature;
    } else {
      // The scale is 0, or NaN where the value is not finite.
      gradient = gradient + student.scale;
    }
    if (options.rectify == Rectify::abs) {
      gradient *= sign(raw);
    } else if (options.rectify == Rectify::relu) {
      gradient = where(raw > 0.0f, gradient, gradient * 0.0f);
    }
    store(out + i, gradient * cotangent, count - i);
  }
}

// The largest of numbers that are not below 0, and NaN where one is.
static float maximum_of(const float* sums, int64_t count) {
  Floats high = all(0.0f);
  for (int64_t i = 0; i < count; i += LANES) high = larger(high, load(sums + i, count - i));
  return largest(high);
}

static void attention(const float* sums, float* out, int64_t count, float factor) {
  const float maximum = maximum_of(sums, count);
  Sum exponentials;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats e = exp((load(sums + i, count - i) - maximum) * factor);
    store(out + i, e, count - i);
    exponentials.lanes += inside(count - i, e, all(0.0f));
    if (ends_block(i)) flush(exponentials);
  }
  const float scale = static_cast<float>(count / total(exponentials));
  for (int64_t i = 0; i < count; i += LANES) store(out + i, load(out + i, count - i) * scale, count - i);
}

static void attention_backward(const float* own, const float* grad, float* out, int64_t count, float factor) {
  Sum products;
  for (int64_t i = 0; i < count; i += LANES) {
    products.lanes += load(own + i, count - i) * load(grad + i, count - i);
    if (ends_block(i)) flush(products);
  }
  const float mean = static_cast<float>(total(products) / count);
  for (int64_t i = 0; i < count; i += LANES) {
    store(out + i, load(own + i, count - i) * (load(grad + i, count - i) - mean) * factor, count - i);
  }
}

static float attention_distance(const float* sums, const float* target, float* state, int64_t count, float factor) {
  const float maximum = maximum_of(sums, count);
  const float scale = softmax_scale(sums, count, maximum, factor, Rectify::none);
  Sum values, signed_own;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats own = exp((load(sums + i, count - i) - maximum) * factor) * scale;
    const Floats difference = own - load(target + i, count - i), zero = all(0.0f);
    values.lanes += inside(count - i, abs(difference), zero);
    signed_own.lanes += inside(count - i, sign(difference) * own, zero);
    if (!ends_block(i)) continue;
    flush(values);
    flush(signed_own);
  }
  state[0] = maximum;
  state[1] = scale;
  state[2] = static_cast<float>(total(signed_own));
  return static_cast<float>(total(values));
}

static void attention_gradient(const float* sums, const float* target, const float* state, float cotangent, int64_t size, int64_t count,
                               float factor, float* out) {
  const float maximum = state[0], scale = state[1], mean = state[2] / static_cast<float>(count);
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats own = exp((load(sums + i, size - i) - maximum) * factor) * scale;
    const Floats difference = own - load(target + i, size - i);
    store(out + i, cotangent * own * (sign(difference) - mean) * factor, size - i);
  }
}

// sum(a * b); b null is 1.
static double sum_of(const float* a, const float* b, int64_t count) {
  Sum values;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats mine = load(a + i, count - i);
    values.lanes += b != nullptr ? mine * load(b + i, count - i) : mine;
    if (ends_block(i)) flush(values);
  }
  return total(values);
}

static void pool_weights(const float* a, float* out, int64_t count, bool softmax) {
  // Not infinite: the difference of -inf from it is to be none.
  constexpr float LOWEST = std::numeric_limits<float>::lowest();
  Floats high = all(LOWEST);
  for (int64_t i = 0; softmax && i < count; i += LANES) high = larger(high, inside(count - i, load(a + i, count - i), all(LOWEST)));
  const float maximum = largest(high);
  for (int64_t i = 0; softmax && i < count; i += LANES) store(out + i, exp(load(a + i, count - i) - maximum), count - i);
  const float* const from = softmax ? out : a;
  const float divisor = static_cast<float>(sum_of(from, nullptr, count));
  const bool none = !softmax && divisor == 0.0f;
  for (int64_t i = 0; i < count; i += LANES) store(out + i, none ? all(0.0f) : load(from + i, count - i) / divisor, count - i);
}

static void pool_weights_backward(const float* weights, const float* grad, const float* a, float* out, int64_t count, bool softmax) {
  const float mean = static_cast<float>(sum_of(weights, grad, count));
  const float divisor = softmax ? 1.0f : static_cast<float>(sum_of(a, nullptr, count));
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats over = load(grad + i, count - i) - mean;
    const Floats of_mean = divisor == 0.0f ? all(0.0f) : over / divisor;
    store(out + i, softmax ? load(weights + i, count - i) * over : of_mean, count - i);
  }
}

static float weighted_sum(const float* error, const float* spatial, int64_t count) {
  return static_cast<float>(sum_of(error, spatial, count));
}

static const MapKernels kernels = {
    map_forward, map_gradient, attention, attention_backward, attention_distance, attention_gradient, pool_weights,
    pool_weights_backward, weighted_sum,
};

}  // namespace KD_ISA
}  // namespace kd
