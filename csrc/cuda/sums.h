// Sums over the threads of a warp and of a block, each in an order that only the number of threads decides.
#pragma once

#include "../include/device.h"

namespace kd {

template <class Me>
KD_DEVICE float warp_sum(Me& me, float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += me.across(x, mask);
  return x;
}

// Four sums at the price of one and a half: thread `lane` gets that of x[lane / 8].
template <class Me>
KD_DEVICE float warp_sums(Me& me, const float (&x)[4]) {
  const bool second = (me.lane() & 16) != 0;
  // Each half keeps two and hands over its share of the others.
  const float a = (second ? x[2] : x[0]) + me.across(second ? x[0] : x[2], 16);
  const float b = (second ? x[3] : x[1]) + me.across(second ? x[1] : x[3], 16);
  const bool odd = (me.lane() & 8) != 0;
  float total = (odd ? b : a) + me.across(odd ? a : b, 8);
  for (int mask = 4; mask > 0; mask /= 2) total += me.across(total, mask);
  return total;
}

// The threads' values brought together by `join`, the same for all threads. of_warp: room for a number a warp, free again afterwards.
template <class Me, class Join>
KD_DEVICE float block_join(Me& me, float x, float* of_warp, int warps, const Join& join) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = join(x, me.across(x, mask));
  if (me.lane() == 0) of_warp[me.warp()] = x;
  me.sync();
  float total = of_warp[0];
  for (int warp = 1; warp < warps; ++warp) total = join(total, of_warp[warp]);
  me.sync();
  return total;
}

template <class Me>
KD_DEVICE float block_sum(Me& me, float x, float* of_warp, int warps) {
  return block_join(me, x, of_warp, warps, [](float a, float b) { return a + b; });
}

}  // namespace kd
