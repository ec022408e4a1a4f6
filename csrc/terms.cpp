#include "include/terms.h"

namespace kd {

using torch::headeronly::ScalarType;

TermsCall::TermsCall(const TermsOperands& operands, const TermsOptions& options)
    : operands_(operands),
      options_(options),
      s_(operands.s),
      t_(operands.t, operands.t.empty() ? nullptr : &s_),
      images_(static_cast<int64_t>(s_.size()) * s_.images()),
      weights_(packed(operands.weights, s_.vectors())),
      map_t_(packed(operands.map_t, s_.maps())),
      map_spatial_(packed(operands.map_spatial, s_.maps())),
      attention_spatial_(packed(operands.attention_spatial, s_.maps())),
      attention_channel_(packed(operands.attention_channel, s_.vectors())),
      channel_(packed(operands.channel, s_.vectors())),
      factors_(packed(operands.factors, rows() * images_)),
      attention_row_(has_map()),
      imitation_row_(attention_row_ + (attends() ? 2 : 0)) {
  STD_TORCH_CHECK(options.imitations == 0 || (options.imitations > 0 && t_.size() > 0), "imitations need a target");
  STD_TORCH_CHECK(operands.map_t.has_value() == has_map() && operands.attention_channel.has_value() == attends() &&
                      rows() == imitation_row_ + options.imitations,
                  "operands and scales do not fit");
  for (const Tensor& spatial : operands.spatial) spatial_.push_back(packed(spatial, s_.maps()));
  STD_TORCH_CHECK(spatial_.empty() || static_cast<int64_t>(spatial_.size()) == options.imitations, "spatial weights: one an imitation");
  for (size_t level = 0; level < s_.size(); ++level) divisors_.push_back(divisor_of(options.average, s_.images(), s_[level].pixels));
}

const float* TermsCall::packed(const std::optional<Tensor>& x, int64_t count) const {
  return floats_beside(first_of(operands_.s), x, count);
}

Tensor TermsCall::new_floats(const std::vector<int64_t>& shape) const {
  return torch::stable::new_empty(operands_.s[0], shape, ScalarType::Float);
}

std::vector<Tensor> TermsCall::new_results() const {
  const int64_t levels = static_cast<int64_t>(s_.size()), maps = attends() ? s_.maps() : 0, vectors = attends() ? s_.vectors() : 0;
  return {new_floats({rows(), levels, s_.images()}), new_floats({has_map() ? s_.maps() : 0}), new_floats({maps}), new_floats({vectors}),
          new_floats({3, levels, s_.images(), STATE})};
}

Saved TermsCall::saved_of(const std::vector<Tensor>& tensors) const {
  STD_TORCH_CHECK(tensors.size() == 4, "expected four saved tensors");
  const int64_t counts[] = {has_map() ? s_.maps() : 0, attends() ? s_.maps() : 0, attends() ? s_.vectors() : 0, 3 * images_ * STATE};
  for (int k = 0; k < 4; ++k) packed(tensors[k], counts[k]);
  return {floats(tensors[0]), floats(tensors[1]), floats(tensors[2]), floats(tensors[3])};
}

std::optional<Reading> TermsCall::reading(const Saved& saved, float* error) const {
  const bool imitates = error != nullptr && options_.imitations > 0;
  if (!has_map() && !attends() && !imitates) return std::nullopt;
  Reading wanted;
  if (has_map()) {
    wanted.weights = weights_;
    wanted.raw = saved.raw;
    wanted.absolute = options_.absolute;
  }
  if (attends()) {
    wanted.sums = ChannelSums::of_magnitudes;
    wanted.magnitude = saved.magnitude;
    wanted.channel = saved.channel_sums;
  }
  if (imitates) {
    wanted.target = &t_;
    wanted.error = error;
    wanted.error_channel = channel_;
  }
  return wanted;
}

const float* TermsCall::upstream_of(const Tensor& grad) const { return packed(grad, rows() * images_); }

float* TermsCall::imitation_row_of(const Tensor& rows) const {
  STD_TORCH_CHECK(options_.imitations <= 1, "values of several imitations do not come with their gradient");
  return options_.imitations > 0 ? floats(rows) + imitation_row_ * images_ : nullptr;
}

}  // namespace kd
