// The write pass: a pyramid's gradient, from vectors per channel and per pixel and one more read of the pyramid.
#pragma once

#include <functional>

#include "../include/pyramid.h"
#include "bands.h"

namespace kd {

// The numbers of one band's pixels in a term, or nothing where the term is not there or each is the neutral one.
struct PixelFactors {
  float *product, *sign, *error;
};

// dx = product_c * product_p * (sgn(x) if absolute else 1) + sgn(x) * (sign_c + sign_p) + error_c * error_p * (x - target) + arriving
// ..._channel: packed vectors (N, C), null for the neutral 1, 0 and 1.  has_...: which terms there are, of which pixels have numbers.
// values: (L, N), filled with the sum of error_c * error_p * (x - target)^2 / 2, of which the error's part is the gradient; or null.
struct Writing {
  const Pyramid* target = nullptr;
  const Pyramid* arriving = nullptr;
  bool has_product = false, has_sign = false, has_error = false;
  bool product_by_pixel = false, sign_by_pixel = false, error_by_pixel = false;
  const float* product_channel = nullptr;
  const float* sign_channel = nullptr;
  const float* error_channel = nullptr;
  bool absolute = false;
  float* values = nullptr;
};

// Fills the numbers of a band's pixels that Writing says there are.
using PixelsOf = std::function<void(const Band& band, const PixelFactors& factors)>;

// Writes the gradient of these images of x.
void gradient(const Pyramid& x, const Writing& wanted, const Results& out, const PixelsOf& by_pixel, Images images);
inline void gradient(const Pyramid& x, const Writing& wanted, const Results& out, const PixelsOf& by_pixel) {
  gradient(x, wanted, out, by_pixel, all_images(x));
}

}  // namespace kd
