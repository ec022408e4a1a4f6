// `attention`, for passes that read more than it from the same features.
#pragma once

#include "reduce.h"

namespace kd {

// Asks `reduce` for the sums of |x| over channels and over pixels, in the buffers (packed fp32) that are to hold S and Ch.
void want_attention(Reading& wanted, const Tensor& spatial, const Tensor& channel);

// Makes S and Ch in place of those sums.
void attention_of_sums(const Pyramid& x, const Tensor& spatial, const Tensor& channel, double temperature);

}  // namespace kd
