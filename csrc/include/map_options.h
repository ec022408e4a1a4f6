// What is to be made of a map, and its parameters: the same for the CPU and for CUDA.
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

}  // namespace kd
