// `attention` from the sums of |x| that the read pass leaves.
#pragma once

#include <tuple>

#include "reduce.h"

namespace kd {

// The sums that a read pass is to make for `attention`: over channels, packed maps, and over pixels, packed vectors.
struct AttentionSums {
  Tensor spatial, channel;

  AttentionSums(const Tensor& like, const Pyramid& x, Reading& wanted);
};

// S and Ch, packed.
std::tuple<Tensor, Tensor> attention_of_sums(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const AttentionSums& sums,
                                             double temperature);

}  // namespace kd
