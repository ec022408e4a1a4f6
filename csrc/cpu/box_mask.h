// What `box_mask` does to the rows of a mask.
#pragma once

#include <cstdint>

namespace kd {

// Cells u of one axis with from <= u - start < to, all in fp32. A profile of `length` cells begins at `start`.
struct Span {
  float start, from, to, length;
};

enum class Profile { ones, gaussian, exponential };

struct BoxMaskKernels {
  // By Profile. values[i] = by * profile at cell first + i, 0 outside of the span; made in sixteens, so there must be room for that many.
  void (*profile[3])(const Span& span, float by, int64_t first, int64_t count, float* values);
  // mask[r * stride + i] = max(mask[r * stride + i], y[r] * x[i]) for r < rows, i < columns;   columns: a multiple of sixteen
  void (*raise)(float* mask, int64_t stride, const float* y, int64_t rows, const float* x, int64_t columns);
};

}  // namespace kd
