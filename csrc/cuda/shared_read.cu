// `shared_read` on CUDA: attention and weighted channel sum of the same features, from one read of them.
#include "attention.h"

namespace kd {
namespace {

std::tuple<Tensor, Tensor, Tensor> shared_read(std::vector<Tensor> x, Tensor w, bool absolute, double temperature) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  const Tensor raw = new_floats(x[0], {levels.maps()});
  Reading wanted;
  wanted.weights = floats_beside(x[0], w, levels.vectors());
  wanted.absolute = absolute;
  wanted.raw = floats(raw);
  const AttentionSums sums(x[0], levels, wanted);
  reduce(device, x[0], levels, wanted);
  const auto [spatial, channel] = attention_of_sums(device, x[0], levels, sums, temperature);
  return {raw, spatial, channel};
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) { m.impl("shared_read", TORCH_BOX(&kd::shared_read)); }
