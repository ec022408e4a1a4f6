// Arithmetic on one map (P,) or vector (C,) of one level and image: normalised maps and their distance, attention and its distance.
// The formulas and the states that a forward leaves for its backward are those of kdkernels/triton/map_distance.py and attention.py.
#pragma once

#include <cstdint>
#include <string>

namespace kd {

enum class Rectify { none, abs, relu };
enum class Normalize { none, minmax, zscore, softmax };
enum class Distance { l1, mse, smooth_l1 };

// Floats of a state: eight of a map's distance, of which an attention's takes three.
constexpr int64_t STATE = 8;

// eps_relative: D = m * (1 + eps) + tiny, not m + eps.   rectify: of the student's map; the teacher's is rectified already.
struct MapOptions {
  Rectify rectify;
  Normalize normalize, normalize_target;
  Distance distance;
  float eps;
  bool eps_relative;
  float temperature;
};

// Raise for names that are not options.
Rectify rectify_of(const std::string& name);
Normalize normalize_of(const std::string& name);
Distance distance_of(const std::string& name);
// What a distance is divided by: N*H*W (`nhw`) or N (`n`). Raises for other names.
float divisor_of(const std::string& average, int64_t images, int64_t pixels);

// 1 / (summed * temperature): from a sum of `summed` magnitudes to the softmax's argument.
inline float logit_factor(int64_t summed, double temperature) {
  return 1.0f / (static_cast<float>(summed) * static_cast<float>(temperature));
}

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
  // sum(spatial * error); spatial null is 1.
  float (*weighted_sum)(const float* error, const float* spatial, int64_t count);
};

const MapKernels& map_kernels();

}  // namespace kd
