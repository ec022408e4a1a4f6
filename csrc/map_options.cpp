#include "include/map_options.h"

#include <torch/headeronly/util/Exception.h>

namespace kd {

Rectify rectify_of(const std::string& name) {
  if (name == "none") return Rectify::none;
  if (name == "abs") return Rectify::abs;
  STD_TORCH_CHECK(name == "relu", "unknown rectify '", name, "'");
  return Rectify::relu;
}

Normalize normalize_of(const std::string& name) {
  if (name == "none") return Normalize::none;
  if (name == "minmax") return Normalize::minmax;
  if (name == "zscore") return Normalize::zscore;
  STD_TORCH_CHECK(name == "softmax", "unknown normalize '", name, "'");
  return Normalize::softmax;
}

Distance distance_of(const std::string& name) {
  if (name == "l1") return Distance::l1;
  if (name == "mse") return Distance::mse;
  STD_TORCH_CHECK(name == "smooth_l1", "unknown distance '", name, "'");
  return Distance::smooth_l1;
}

float divisor_of(const std::string& average, int64_t images, int64_t pixels) {
  if (average == "n") return static_cast<float>(images);
  STD_TORCH_CHECK(average == "nhw", "unknown average '", average, "'");
  return static_cast<float>(images) * static_cast<float>(pixels);
}

}  // namespace kd
