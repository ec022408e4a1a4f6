// Packed maps (N, P), level after level, as a source of the write pass' numbers per pixel.
#pragma once

#include <algorithm>

#include "bands.h"

namespace kd {

class PackedMaps {
 public:
  PackedMaps(const float* values, const Pyramid& x) : values_(values), x_(x), places_(x) {}

  // Copies the numbers of the band's pixels.
  void copy(const Band& band, float* to) const {
    std::copy_n(values_ + places_.map[band.level] + band.image * x_[band.level].pixels + band.first, band.pixels, to);
  }

 private:
  const float* values_;
  const Pyramid& x_;
  const Places places_;
};

}  // namespace kd
