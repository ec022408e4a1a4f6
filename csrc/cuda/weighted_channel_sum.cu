// `weighted_channel_sum` on CUDA: the maps before they are rectified, and their gradient.
#include "gradient.h"
#include "reduce.h"

namespace kd {
namespace {

Tensor weighted_channel_sum(std::vector<Tensor> x, Tensor w, bool absolute) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  const Tensor raw = new_floats(x[0], {levels.maps()});
  Reading wanted;
  wanted.weights = floats_beside(x[0], w, levels.vectors());
  wanted.absolute = absolute;
  wanted.raw = floats(raw);
  reduce(device, x[0], levels, wanted);
  return raw;
}

std::vector<Tensor> weighted_channel_sum_backward(std::vector<Tensor> x, Tensor w, Tensor grad, bool absolute) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  Writing wanted;
  wanted.product = {floats_beside(x[0], w, levels.vectors()), floats_beside(x[0], grad, levels.maps()), true};
  wanted.absolute = absolute;
  Results out(x, levels);
  gradient(device, x[0], levels, wanted, out);
  return out.finish();
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("weighted_channel_sum", TORCH_BOX(&kd::weighted_channel_sum));
  m.impl("weighted_channel_sum_backward", TORCH_BOX(&kd::weighted_channel_sum_backward));
}
