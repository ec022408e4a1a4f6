// What the two passes do to rows of a level: the pixels of a channel where a level is contiguous, the channels of a pixel where it is
// channels_last. The numbers that belong to the elements of a row are vectors, those that belong to a row as a whole are scalars.
#pragma once

#include <cstdint>

#include "../include/pyramid.h"
#include "isa.h"

namespace kd {

constexpr int MOST_ROWS = 4;

// Rows of a contiguous level, each with a weight, added up element by element; and their own sums.
//   x, target      rows of `count` elements of one type;   target: null without error
//   raw, ...       (count,) that are added to, or null
//   sums           sum of each row's values or, with `of_magnitudes`, of their magnitudes; null if not wanted
//   pixel_weights  (count,) of the terms of these sums, or null for 1
struct Down {
  const char* x[MOST_ROWS];
  const char* target[MOST_ROWS];
  int64_t count;
  float weight[MOST_ROWS], error_weight[MOST_ROWS];
  float *raw, *magnitude, *error;
  float* sums;
  const float* pixel_weights;
  bool absolute, of_magnitudes;
  int64_t ahead;
};

// Rows of a channels_last level whose elements have weights: the sums of each row, and of the rows element by element.
//   weights, error_weights   (count,), null for 1
//   raw, magnitude, error    one number a row, or null;   channel: (count,) that are added to, or null
//   pixel_weights            one number a row, by which it is multiplied where it is added to `channel`, or null for 1
struct Across {
  const char* x[MOST_ROWS];
  const char* target[MOST_ROWS];
  int64_t count;
  const float *weights, *error_weights;
  float *raw, *magnitude, *error;
  float* channel;
  const float* pixel_weights;
  bool absolute, of_magnitudes;
  int64_t ahead;
};

// One row of a gradient, in fp32:
//   made = product * by_product * (sgn(x) if absolute else 1) + sgn(x) * (sign + by_sign) + error * by_error * (x - target) + arriving
// product, sign, error: (count,), null for the neutral 1, 0 and 1;   by_...: the row's own;   has_...: what there is of the sum
// values: (LANES,) added to, the sums of error * by_error * (x - target)^2; null if not wanted
// ahead, here and above: bytes to what is read next and is asked for meanwhile
struct Gradient {
  const char *x, *target, *arriving;
  int64_t count;
  const float *product, *sign, *error;
  float by_product, by_sign, by_error;
  bool has_product, has_sign, has_error, absolute;
  float* values;
  float* made;
  int64_t ahead;
};

struct RowKernels {
  // By Type, and by rows at once: 1 and MOST_ROWS.
  void (*down[3][2])(const Down&);
  void (*across[3][2])(const Across&);
  void (*gradient[3])(const Gradient&);
  // A row of any type to fp32, and back.
  void (*widen[3])(const char* from, float* to, int64_t count);
  void (*narrow[3])(const float* from, char* to, int64_t count);
  // memcpy past the caches, where the instructions have such a store.
  void (*stream)(char* to, const char* from, int64_t bytes);
};

const RowKernels& row_kernels();

}  // namespace kd
