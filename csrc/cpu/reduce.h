// The read pass: every sum over channels and over pixels that a loss takes of a pyramid, from one read of it.
#pragma once

#include "../include/reading.h"
#include "bands.h"

namespace kd {

// Reads these images of x.
void reduce(const Pyramid& x, const Reading& wanted, Images images);
inline void reduce(const Pyramid& x, const Reading& wanted) { reduce(x, wanted, all_images(x)); }

}  // namespace kd
