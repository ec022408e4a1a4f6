// Pixels that Philox chooses, the same for the CPU and for CUDA.
#pragma once

#include "device.h"
#include "pyramid.h"

namespace kd {

// The first word of Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) of a counter and a key.
KD_BOTH uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  constexpr int kRounds = 10;
  KD_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c0, second = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(second);
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return c0;
}

// Which pixels `random_mask` keeps: those whose word is at least the threshold.
struct RandomPixels {
  uint32_t low, high, call;
  int64_t threshold;

  // state: the seed and the number of the call
  KD_BOTH RandomPixels(const int64_t* state, int64_t least)
      : low(static_cast<uint32_t>(state[0])),
        high(static_cast<uint32_t>(static_cast<uint64_t>(state[0]) >> 32)),
        call(static_cast<uint32_t>(state[1])),
        threshold(least) {}

  KD_BOTH bool keeps(int64_t pixel, int64_t image, int64_t level) const {
    const uint32_t word =
        philox(static_cast<uint32_t>(pixel), static_cast<uint32_t>(image), static_cast<uint32_t>(level), call, low, high);
    return static_cast<int64_t>(word) >= threshold;
  }
};

// The numbers of a state. Raises unless it is int64 (2,), contiguous and on x's device.
inline const int64_t* state_beside(const Tensor& x, const Tensor& state) {
  STD_TORCH_CHECK(state.device() == x.device() && state.scalar_type() == torch::headeronly::ScalarType::Long && state.numel() == 2 &&
                      state.is_contiguous(),
                  "expected a state of 2 contiguous int64 on the device of the levels, got ", state.numel(), " of ",
                  toString(state.scalar_type()));
  return static_cast<const int64_t*>(state.const_data_ptr());
}

}  // namespace kd
