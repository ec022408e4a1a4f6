// Work in pieces that do not depend on the number of threads, so that neither do results.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kd {

// Calls run(piece) for 0 <= piece < count, each by the next thread that is free. Of what it throws the message is lost.
template <class Run>
void for_each(int64_t count, const Run& run) {
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t piece = next.fetch_add(1); piece < count; piece = next.fetch_add(1)) run(piece);
  });
}

}  // namespace kd
