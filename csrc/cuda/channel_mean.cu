// `channel_mean` on CUDA: the spatial mean of x or of |x|, and its gradient.
#include "gradient.h"
#include "reduce.h"

namespace kd {
namespace {

Tensor channel_mean(std::vector<Tensor> x, bool absolute) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  const Tensor means = new_floats(x[0], {levels.vectors()});
  Reading wanted;
  wanted.sums = absolute ? ChannelSums::of_magnitudes : ChannelSums::of_values;
  wanted.channel = floats(means);
  reduce(device, x[0], levels, wanted, true);
  return means;
}

std::vector<Tensor> channel_mean_backward(std::vector<Tensor> x, Tensor grad, bool absolute) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  Results out(x, levels);
  Writing wanted;
  wanted.product = {floats_beside(x[0], grad, levels.vectors()), nullptr, true};
  wanted.mean = true;
  wanted.absolute = absolute;
  gradient(device, x[0], levels, wanted, out);
  return out.finish();
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("channel_mean", TORCH_BOX(&kd::channel_mean));
  m.impl("channel_mean_backward", TORCH_BOX(&kd::channel_mean_backward));
}
