// Arithmetic on one map (P,) or vector (C,) of one level and image: normalised maps and their distance, attention and its distance.
// The formulas and the states that a forward leaves for its backward are those of kdkernels/triton/map_distance.py and attention.py.
//
// Maps and vectors have at least one element. A value that is not finite makes all results NaN; without normaliser as the formulas say.
// What takes `me` is called by all threads of a block of kMapThreads, which add up in one order; every thread gets the result, and the
// state is the first one's to write: another one that is to read it has to wait.
#pragma once

#include <cfloat>

#include "../include/map_options.h"
#include "../include/device.h"

namespace kd {

// Threads of a block that has nothing else to do; those of other kernels may be fewer.
constexpr int kMapThreads = 1024;

// Numbers that the threads of a block bring together at a time.
constexpr int kMapSums = 5;

struct MapScratch {
  float of_warp[kMapSums][kMapThreads / kWarp];
};

// Elements of a map that a thread loads before it takes the first one, and of each of several maps.
constexpr int kInFlight = 8, kInFlightOfEach = 4;

// Calls take(first, left) for the thread's elements first, first + kMapThreads, ... of the `count` ones: kCount of them at a time, of which
// those at a distance of less than `left` from the first are there.
template <int kCount, class Me, class Take>
KD_DEVICE void in_turns(Me& me, int64_t count, const Take& take) {
  constexpr int kTurn = Me::kThreads * kCount;
  for (int64_t first = me.index(); first < count; first += kTurn) {
    const int64_t left = count - first;
    take(first, left < kTurn ? static_cast<int>(left) : kTurn);
  }
}

template <class Me, int kCount>
KD_DEVICE void load_turn(Me&, const float* from, int left, float other, float (&x)[kCount]) {
  KD_UNROLL
  for (int k = 0; k < kCount; ++k) x[k] = k * Me::kThreads < left ? from[k * Me::kThreads] : other;
}

// x[k] of the threads brought together by join(k, a, b), the same for all of them.
template <class Me, int kCount, class Join>
KD_DEVICE void join_all(Me& me, MapScratch& scratch, float (&x)[kCount], const Join& join) {
  static_assert(kCount <= kMapSums, "there is room for so many");
  KD_UNROLL
  for (int k = 0; k < kCount; ++k) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x[k] = join(k, x[k], me.across(x[k], mask));
    if (me.lane() == 0) scratch.of_warp[k][me.warp()] = x[k];
  }
  me.sync();
  KD_UNROLL
  for (int k = 0; k < kCount; ++k) {
    x[k] = scratch.of_warp[k][0];
    KD_UNROLL
    for (int warp = 1; warp < Me::kThreads / kWarp; ++warp) x[k] = join(k, x[k], scratch.of_warp[k][warp]);
  }
  me.sync();
}

template <class Me, int kCount>
KD_DEVICE void sum_all(Me& me, MapScratch& scratch, float (&x)[kCount]) {
  join_all(me, scratch, x, [](int, float a, float b) { return a + b; });
}

// relu keeps the NaN that -inf * 0 is: a sum of -inf, which an overflow brings, is no innocent 0.
KD_BOTH float rectified(float raw, Rectify how) {
  if (how == Rectify::abs) return fabsf(raw);
  if (how == Rectify::relu) return raw > 0 ? raw : raw * 0;
  return raw;
}

struct Extremes {
  float low, high, total;
};

// NaN where one is not finite, else 0.
KD_BOTH float poison_of(float low, float high) { return (low - low) + (high - high); }

// Smallest and largest value of a map and the sum; the extremes are NaN where any value is NaN or infinite.
template <class Me>
KD_DEVICE Extremes extremes_of(Me& me, MapScratch& scratch, const float* source, int64_t count, Rectify rectify) {
  const float first = rectified(source[0], rectify);
  float x[3] = {first, first, 0};
  in_turns<kInFlight>(me, count, [&](int64_t begin, int left) {
    float r[kInFlight], total = 0;
    load_turn(me, source + begin, left, source[0], r);
    KD_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      r[k] = rectified(r[k], rectify);
      x[0] = smaller(x[0], r[k]);
      x[1] = larger(x[1], r[k]);
      if (k * Me::kThreads < left) total += r[k];
    }
    x[2] += total;
  });
  join_all(me, scratch, x, [](int k, float a, float b) { return k == 0 ? smaller(a, b) : k == 1 ? larger(a, b) : a + b; });
  return {x[0] + poison_of(x[0], x[1]), x[1] + poison_of(x[0], x[1]), x[2]};
}

// What `normalised` takes from a map, with the spread m of which its scale is made:
//   minmax:  min r, max r, 1 / D and the range;   zscore: min r, mean of r - min r, 1 / D and the standard deviation
//   softmax: max r, 0, P / sum exp and 0;   none: zeros
// The scale is 0 where the map is constant, NaN where it is not finite.
struct MapStatistics {
  Normalize how;
  float shift, centre, scale, spread;
};

// 1 / D, 0 where the map is constant.
KD_BOTH float scale_of(float spread, const MapOptions& options) {
  if (spread == 0.0f) return 0;
  const float denominator = options.eps_relative ? spread * (1.0f + options.eps) + FLT_MIN : spread + options.eps;
  // The reciprocal of what is smaller is infinite.
  return 1.0f / (denominator < FLT_MIN ? FLT_MIN : denominator);
}

// Of a map with these extremes, which are NaN or infinite only if a value is.
KD_BOTH MapStatistics minmax_of(float low, float high, const MapOptions& options) {
  low += poison_of(low, high), high += poison_of(low, high);
  return {Normalize::minmax, low, high, scale_of(high - low, options), high - low};
}

// Centre and spread of zscore: 0 and 0 where the extremes are equal.
template <class Me>
KD_DEVICE void moments(Me& me, MapScratch& scratch, const float* source, int64_t count, const Extremes& of, Rectify rectify,
                       MapStatistics& s) {
  const float span = of.high - of.low, size = static_cast<float>(count);
  if (span == 0.0f) return;
  // In units of the range, so that squares neither underflow nor overflow, and around the rounded mean, so that nothing cancels.
  const float pivot = of.total / size - of.low;
  float x[2] = {};
  in_turns<kInFlight>(me, count, [&](int64_t begin, int left) {
    float r[kInFlight], first = 0, second = 0;
    load_turn(me, source + begin, left, 0, r);
    KD_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      const float u = ((rectified(r[k], rectify) - of.low) - pivot) / span;
      if (k * Me::kThreads >= left) continue;
      first += u;
      second += u * u;
    }
    x[0] += first;
    x[1] += second;
  });
  sum_all(me, scratch, x);
  const float rest = x[0] / size;
  s.centre = pivot + span * rest;
  s.spread = span * sqrtf(x[1] / size - rest * rest);
}

// P / sum exp((r - high) * factor).
template <class Me>
KD_DEVICE float softmax_scale(Me& me, MapScratch& scratch, const float* source, int64_t count, float high, float factor, Rectify rectify) {
  float x[1] = {};
  in_turns<kInFlight>(me, count, [&](int64_t begin, int left) {
    float r[kInFlight], total = 0;
    load_turn(me, source + begin, left, 0, r);
    KD_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (k * Me::kThreads < left) total += expf((rectified(r[k], rectify) - high) * factor);
    }
    x[0] += total;
  });
  sum_all(me, scratch, x);
  return static_cast<float>(count) / x[0];
}

template <class Me>
KD_DEVICE MapStatistics statistics_of(Me& me, MapScratch& scratch, const float* source, int64_t count, const MapOptions& options,
                                      Normalize how, Rectify rectify) {
  MapStatistics s{how, 0, 0, 0, 0};
  if (how == Normalize::none) return s;
  const Extremes of = extremes_of(me, scratch, source, count, rectify);
  if (how == Normalize::softmax) {
    s.shift = of.high;
    s.scale = softmax_scale(me, scratch, source, count, of.high, 1.0f / options.temperature, rectify);
    return s;
  }
  if (how == Normalize::minmax) return minmax_of(of.low, of.high, options);
  s.shift = of.low;
  moments(me, scratch, source, count, of, rectify, s);
  s.scale = scale_of(s.spread, options);
  return s;
}

// M of r, given what `statistics_of` says of its map. Rounded, so that the difference of equal maps is 0.
KD_BOTH float normalised(float r, const MapStatistics& s, float inverse_temperature) {
  if (s.how == Normalize::minmax) return product(r - s.shift, s.scale);
  if (s.how == Normalize::zscore) return product((r - s.shift) - s.centre, s.scale);
  if (s.how == Normalize::softmax) return product(expf((r - s.shift) * inverse_temperature), s.scale);
  return r;
}

// M of the student, the distance and its derivative with respect to M.
struct Compared {
  float m, value, slope;
};

KD_BOTH Compared compared(float r, float target, float weight, const MapStatistics& student, const MapStatistics& teacher,
                          float inverse_temperature, Distance distance) {
  const float m = normalised(r, student, inverse_temperature);
  const float d = (m - normalised(target, teacher, inverse_temperature)) * weight, size = fabsf(d);
  if (distance == Distance::l1) return {m, size, sign(d) * weight};
  if (distance == Distance::mse) return {m, d * d, 2.0f * d * weight};
  return size < 1.0f ? Compared{m, 0.5f * d * d, d * weight} : Compared{m, size - 0.5f, sign(d) * weight};
}

// Sums over the pixels that a distance and its gradient are made of: values, slopes, products of slope and M, and how many of the largest
// and of the smallest values there are.
constexpr int kComparedSums = 5;

template <int kCount>
KD_BOTH void add_compared(float (&x)[kCount], float mine, float target, float weight, const MapStatistics& student,
                          const MapStatistics& teacher, const MapOptions& options) {
  static_assert(kCount >= kComparedSums, "there is room for them");
  const Compared c = compared(mine, target, weight, student, teacher, 1.0f / options.temperature, options.distance);
  x[0] += c.value;
  x[1] += c.slope;
  x[2] += c.slope * c.m;
  x[3] += mine == student.centre ? 1.0f : 0.0f;
  x[4] += mine == student.shift ? 1.0f : 0.0f;
}

// The distance over divisor, from these sums; completes the state, of which the first six floats are there. spread: of zscore.
template <int kCount>
KD_BOTH float end_map(const float (&x)[kCount], float* state, int64_t pixels, float divisor, const MapOptions& options, float spread = 0) {
  const float value = x[0] / divisor, slope = x[1] / divisor, count = static_cast<float>(pixels), scale = state[2];
  float product = x[2] / divisor, a = 0, b = 0;
  if (options.normalize == Normalize::softmax) {
    a = product / count;
  } else if (options.normalize != Normalize::none) {
    if (options.eps_relative) product *= 1.0f + options.eps;
    if (options.normalize == Normalize::minmax) {
      a = -product * scale / x[3];
      b = (product - slope) * scale / x[4];
    } else {
      a = -slope / count * scale;
      b = spread == 0.0f ? 0.0f : product / count / spread;
    }
  }
  // sgn(NaN) is 0: a map of the teacher's that is not finite would give the student an innocent gradient.
  state[2] = scale + value * 0.0f;
  state[6] = a, state[7] = b;
  return value;
}

// The distance of a student's map, which is rectified here, and a teacher's, over divisor; fills state. spatial: (pixels,) or null.
template <class Me>
KD_DEVICE float map_forward(Me& me, MapScratch& scratch, const float* source, const float* target, const float* spatial, float* state,
                            int64_t pixels, float divisor, const MapOptions& options) {
  const MapStatistics student = statistics_of(me, scratch, source, pixels, options, options.normalize, options.rectify);
  const MapStatistics teacher = statistics_of(me, scratch, target, pixels, options, options.normalize_target, Rectify::none);
  float x[kComparedSums] = {};
  in_turns<kInFlightOfEach>(me, pixels, [&](int64_t begin, int left) {
    float r[kInFlightOfEach], goal[kInFlightOfEach], weight[kInFlightOfEach], turn[kComparedSums] = {};
    load_turn(me, source + begin, left, 0, r);
    load_turn(me, target + begin, left, 0, goal);
    if (spatial != nullptr) load_turn(me, spatial + begin, left, 1, weight);
    KD_UNROLL
    for (int k = 0; k < kInFlightOfEach; ++k) {
      if (k * Me::kThreads >= left) continue;
      const float mine = rectified(r[k], options.rectify);
      add_compared(turn, mine, goal[k], spatial != nullptr ? weight[k] : 1.0f, student, teacher, options);
    }
    KD_UNROLL
    for (int k = 0; k < kComparedSums; ++k) x[k] += turn[k];
  });
  sum_all(me, scratch, x);
  float left[STATE] = {student.shift, student.centre, student.scale, teacher.shift, teacher.centre, teacher.scale};
  const float value = end_map(x, left, pixels, divisor, options, student.spread);
  if (me.index() == 0) {
    KD_UNROLL
    for (int k = 0; k < STATE; ++k) state[k] = left[k];
  }
  return value;
}

// The gradient of that distance with respect to the unrectified map at pixel p, times cotangent.
KD_BOTH float map_gradient(const float* source, const float* target, const float* spatial, const float* state, float cotangent, int64_t p,
                           float divisor, const MapOptions& options) {
  const float inverse_temperature = 1.0f / options.temperature, a = state[6], b = state[7];
  const MapStatistics student{options.normalize, state[0], state[1], state[2], 0};
  const MapStatistics teacher{options.normalize_target, state[3], state[4], state[5], 0};
  const float raw = source[p], r = rectified(raw, options.rectify);
  const Compared c = compared(r, target[p], spatial != nullptr ? spatial[p] : 1.0f, student, teacher, inverse_temperature,
                              options.distance);
  float gradient = c.slope / divisor;
  if (options.normalize == Normalize::minmax) {
    gradient = gradient * student.scale + (r == student.centre ? a : 0.0f) + (r == student.shift ? b : 0.0f);
  } else if (options.normalize == Normalize::zscore) {
    gradient = gradient * student.scale + a - b * c.m;
  } else if (options.normalize == Normalize::softmax) {
    gradient = (gradient - a) * c.m * inverse_temperature;
  } else {
    // The scale is 0, or NaN where the value is not finite.
    gradient += student.scale;
  }
  if (options.rectify == Rectify::abs) {
    gradient *= sign(raw);
  } else if (options.rectify == Rectify::relu) {
    gradient = raw > 0 ? gradient : gradient * 0.0f;
  }
  return gradient * cotangent;
}

// Of sums >= 0: the largest, and count / sum exp((sum - maximum) * factor), NaN where one is not finite.
struct AttentionStatistics {
  float maximum, scale;
};

template <class Me>
KD_DEVICE AttentionStatistics attention_statistics(Me& me, MapScratch& scratch, const float* sums, int64_t count, float factor) {
  // Each thread adds up relative to the largest that it has met, so that one read does.
  float largest = 0, total[1] = {};
  in_turns<kInFlight>(me, count, [&](int64_t begin, int left) {
    float a[kInFlight], risen = largest, turn = 0;
    load_turn(me, sums + begin, left, 0, a);
    KD_UNROLL
    for (int k = 0; k < kInFlight; ++k) risen = larger(risen, a[k]);
    KD_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (k * Me::kThreads < left) turn += expf((a[k] - risen) * factor);
    }
    total[0] = total[0] * expf((largest - risen) * factor) + turn;
    largest = risen;
  });
  float maximum[1] = {largest};
  join_all(me, scratch, maximum, [](int, float a, float b) { return larger(a, b); });
  total[0] *= expf((largest - maximum[0]) * factor);
  sum_all(me, scratch, total);
  return {maximum[0], static_cast<float>(count) / total[0]};
}

// S of a sum over channels, or Ch of a sum over pixels. Rounded, so that the difference of equal attentions is 0.
KD_BOTH float attention_of(float sum, const AttentionStatistics& s, float factor) {
  return product(expf((sum - s.maximum) * factor), s.scale);
}

// sum |attention - target|; fills three floats of the state.
template <class Me>
KD_DEVICE float attention_distance(Me& me, MapScratch& scratch, const float* sums, const float* target, float* state, int64_t count,
                                   float factor) {
  const AttentionStatistics s = attention_statistics(me, scratch, sums, count, factor);
  // The distance, and the sum of own * sgn(own - target).
  float x[2] = {};
  in_turns<kInFlightOfEach>(me, count, [&](int64_t begin, int left) {
    float a[kInFlightOfEach], goal[kInFlightOfEach], value = 0, signed_own = 0;
    load_turn(me, sums + begin, left, 0, a);
    load_turn(me, target + begin, left, 0, goal);
    KD_UNROLL
    for (int k = 0; k < kInFlightOfEach; ++k) {
      if (k * Me::kThreads >= left) continue;
      const float own = attention_of(a[k], s, factor), difference = own - goal[k];
      value += fabsf(difference);
      signed_own += sign(difference) * own;
    }
    x[0] += value;
    x[1] += signed_own;
  });
  sum_all(me, scratch, x);
  if (me.index() == 0) {
    state[0] = s.maximum;
    state[1] = s.scale;
    state[2] = x[1];
  }
  return x[0];
}

// The gradient of that distance with respect to the sum at `index` of `count` ones, times cotangent.
KD_BOTH float attention_gradient(const float* sums, const float* target, const float* state, float cotangent, int64_t index, int64_t count,
                                 float factor) {
  const float own = attention_of(sums[index], {state[0], state[1]}, factor), mean = state[2] / static_cast<float>(count);
  return cotangent * own * (sign(own - target[index]) - mean) * factor;
}

// sum(a * b); b null is 1.
template <class Me>
KD_DEVICE float weighted_sum(Me& me, MapScratch& scratch, const float* a, const float* b, int64_t count) {
  float x[1] = {};
  in_turns<kInFlightOfEach>(me, count, [&](int64_t begin, int left) {
    float mine[kInFlightOfEach], weight[kInFlightOfEach], total = 0;
    load_turn(me, a + begin, left, 0, mine);
    if (b != nullptr) load_turn(me, b + begin, left, 0, weight);
    KD_UNROLL
    for (int k = 0; k < kInFlightOfEach; ++k) {
      if (k * Me::kThreads < left) total += b != nullptr ? mine[k] * weight[k] : mine[k];
    }
    x[0] += total;
  });
  sum_all(me, scratch, x);
  return x[0];
}

}  // namespace kd
