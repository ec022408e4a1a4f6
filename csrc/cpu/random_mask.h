// What `random_mask` does to the rows of a level.
#pragma once

#include "../include/random_pixels.h"

namespace kd {

struct RandomMaskKernels {
  // kept[i] = all bits where pixel first + i of an image is kept, else none.
  void (*choose)(const RandomPixels& pixels, int64_t first, int64_t image, int64_t level, int64_t count, uint32_t* kept);
  // Elements of four and of two bytes, those of pixels that are not kept as 0. None of these overlap.
  void (*select[2])(const char* from, const uint32_t* kept, int64_t count, char* to);
};

}  // namespace kd
