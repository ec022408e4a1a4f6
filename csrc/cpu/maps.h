// Arithmetic on one map (P,) or vector (C,) of one level and image: normalised maps and their distance, attention and its distance.
// The formulas and the states that a forward leaves for its backward are those of kdkernels/triton/map_distance.py and attention.py.
#pragma once

#include "../include/map_options.h"

namespace kd {

// Maps and vectors have at least one element. A value that is not finite makes all results NaN; without normaliser as the formulas say.
struct MapKernels {
  // The distance of a student's map, which is rectified here, and a teacher's, over divisor; fills state. spatial: (pixels,) or null.
  float (*map_forward)(const float* source, const float* target, const float* spatial, float* state, int64_t pixels, float divisor,
                       const MapOptions& options);
  // Its gradient with respect to the unrectified map, times cotangent, at `count` pixels from which the pointers begin.
  void (*map_gradient)(const float* source, const float* target, const float* spatial, const float* state, float cotangent, int64_t count,
                       float divisor, const MapOptions& options, float* out);
  // out = count * softmax(sums * factor) of sums >= 0; out may be sums.
  void (*attention)(const float* sums, float* out, int64_t count, float factor);
  // out = own * (grad - sum(grad * own) / count) * factor, own being what `attention` gave; out may be own or grad.
  void (*attention_backward)(const float* own, const float* grad, float* out, int64_t count, float factor);
  // sum |attention(sums) - target|; fills state.
  float (*attention_distance)(const float* sums, const float* target, float* state, int64_t count, float factor);
  // Its gradient with respect to the sums, times cotangent, at `size` of the `count` elements, from which the pointers begin.
  void (*attention_gradient)(const float* sums, const float* target, const float* state, float cotangent, int64_t size, int64_t count,
                             float factor, float* out);
  // out = softmax(a), or a / sum(a) and 0 where that is 0.
  void (*pool_weights)(const float* a, float* out, int64_t count, bool softmax);
  // out: the gradient of a for `grad`, that of the weights which were made of it.
  void (*pool_weights_backward)(const float* weights, const float* grad, const float* a, float* out, int64_t count, bool softmax);
  // sum(spatial * error); spatial null is 1.
  float (*weighted_sum)(const float* error, const float* spatial, int64_t count);
};

const MapKernels& map_kernels();

}  // namespace kd
