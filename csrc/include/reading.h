// What a read pass is asked for, the same for the CPU and for CUDA.
#pragma once

#include "pyramid.h"

namespace kd {

enum class ChannelSums { none, of_values, of_magnitudes };

// What a read pass is to make. Maps are packed (N, P) level after level, vectors packed (N, C); a null pointer is not wanted.
//   raw       sum_c weights * x, of |x| with `absolute`
//   magnitude sum_c |x|
//   error     sum_c error_channel * (x - target)^2;   error_channel null is 1
//   channel   sums over the pixels of |x| or x, by `sums`, of x times pixel_weights, packed (N, P), where there are any
struct Reading {
  const Pyramid* target = nullptr;
  const float* weights = nullptr;
  const float* error_channel = nullptr;
  const float* pixel_weights = nullptr;
  bool absolute = false;
  ChannelSums sums = ChannelSums::none;
  float* raw = nullptr;
  float* magnitude = nullptr;
  float* error = nullptr;
  float* channel = nullptr;
};

}  // namespace kd
