// `terms` on CUDA: the read pass, and one small launch for all rows; for a gradient a small launch and the write pass.
#include "terms.h"

#include "../include/terms.h"
#include "gradient.h"
#include "reduce.h"

namespace kd {
namespace {

class Terms : public TermsCall {
 public:
  Terms(const TermsOperands& operands, const TermsOptions& options) : TermsCall(operands, options), device_(operands.s[0]) {
    STD_TORCH_CHECK(options.imitations <= kImitations, "expected at most ", kImitations, " imitations, got ", options.imitations);
  }

  // Rows and what the backward needs, without a gradient.
  std::vector<Tensor> forward() {
    const std::vector<Tensor> results = new_results();
    const Saved saved = saved_of({results.begin() + 1, results.end()});
    const Tensor error = new_floats({options_.imitations > 0 ? s_.maps() : 0});
    read(saved, floats(error));
    evaluate(results[0], saved, floats(error), options_.imitations);
    return results;
  }

  // The same of at most one imitation, and the gradients for upstream gradients of 1: the imitation's values come with these.
  std::vector<Tensor> forward_with_gradient() {
    std::vector<Tensor> results = new_results();
    Writing wanted;
    wanted.values = imitation_row_of(results[0]);
    const Saved saved = saved_of({results.begin() + 1, results.end()});
    read(saved, nullptr);
    evaluate(results[0], saved, nullptr, 0);
    Results out(operands_.s, s_);
    write(nullptr, saved, wanted, out);
    for (Tensor& gradient : out.finish()) results.push_back(std::move(gradient));
    return results;
  }

  // Gradients for the upstream gradients grad (rows, L, N), with `arriving` added, which may be none.
  std::vector<Tensor> backward(const Tensor& grad, const std::vector<Tensor>& saved, const std::vector<Tensor>& arriving) {
    const Pyramid added(arriving, arriving.empty() ? nullptr : &s_);
    Writing wanted;
    wanted.arriving = arriving.empty() ? nullptr : &added;
    Results out(operands_.s, s_);
    write(upstream_of(grad), saved_of(saved), wanted, out);
    return out.finish();
  }

  // Makes those for upstream gradients of 1 right for `grad`, in place. Whether they are already is seen on the device.
  void correct(const std::vector<Tensor>& gradients, const Tensor& grad, const std::vector<Tensor>& saved) {
    const float* const d = upstream_of(grad);
    const Tensor right = torch::stable::new_empty(grad, {1}, torch::headeronly::ScalarType::Int);
    Writing wanted;
    wanted.unless = static_cast<const int*>(right.const_data_ptr());
    Results out = Results::again(gradients, s_);
    device_.launch(AllOnes{d, rows() * images_, static_cast<int*>(right.mutable_data_ptr())}, 1);
    write(d, saved_of(saved), wanted, out);
    out.finish();
  }

 private:
  void read(const Saved& saved, float* error) const {
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
    if (error != nullptr && options_.imitations > 0) {
      wanted.target = &t_;
      wanted.error = error;
      wanted.error_channel = channel_;
    }
    if (has_map() || attends() || wanted.error != nullptr) reduce(device_, operands_.s[0], s_, wanted);
  }

  // The rows of the map and of the attention and of so many imitations, and all of the state.
  void evaluate(const Tensor& result, const Saved& saved, const float* error, int64_t imitations) const {
    EvaluateTerms kernel{numbers(saved), error, floats(result)};
    in_launches(s_, [&](const Level&) { return kKinds + imitations; }, [&](const Places& places) {
      place(kernel.terms, places);
      device_.launch(kernel, places.blocks());
    });
  }

  // wanted: what there is besides the terms' own
  void write(const float* grad, const Saved& saved, Writing wanted, const Results& out) const {
    const bool imitates = options_.imitations > 0;
    // In one tensor, of which a part that is not wanted is empty.
    const int64_t map = has_map() ? s_.maps() : 0, sign = attends() ? s_.maps() : 0, vector = attends() ? s_.vectors() : 0;
    const Tensor slopes = new_floats({map + sign + vector + (imitates ? s_.maps() : 0)});
    TermSlopes kernel{numbers(saved), grad, nullptr, nullptr, nullptr, nullptr, wanted.unless};
    float* const first = floats(slopes);
    if (has_map()) kernel.product = first;
    if (attends()) kernel.sign = first + map, kernel.sign_channel = first + map + sign;
    if (imitates) kernel.error = first + map + sign + vector;
    const auto blocks = [&](const Level& level) {
      return channel_tiles(level.channels, TermSlopes::kThreads, attends()) + ceil_div<int64_t>(level.pixels, TermSlopes::kThreads);
    };
    in_launches(s_, blocks, [&](const Places& places) {
      place(kernel.terms, places);
      device_.launch(kernel, places.blocks());
    });
    wanted.target = &t_;
    wanted.product = {weights_, kernel.product, has_map()};
    wanted.sign = {kernel.sign_channel, kernel.sign, attends()};
    wanted.error = {channel_, kernel.error, imitates};
    wanted.absolute = options_.absolute;
    gradient(device_, operands_.s[0], s_, wanted, out);
  }

  TermNumbers numbers(const Saved& saved) const {
    TermNumbers made{};
    made.options = options_.map;
    if (has_map()) made.raw = saved.raw, made.map_t = map_t_, made.map_spatial = map_spatial_;
    if (attends()) {
      made.magnitude = saved.magnitude, made.attention_spatial = attention_spatial_;
      made.channel_sums = saved.channel_sums, made.attention_channel = attention_channel_;
    }
    for (size_t k = 0; k < spatial_.size(); ++k) made.spatial[k] = spatial_[k];
    made.factors = factors_, made.state = saved.state, made.images = images_;
    for (int64_t row = 0; row < rows(); ++row) made.scales[row] = static_cast<float>(options_.scales[row]);
    made.imitations = static_cast<int>(options_.imitations);
    return made;
  }

  void place(TermNumbers& made, const Places& places) const {
    made.places = places;
    for (int i = 0; i < places.count; ++i) {
      const Place& level = places.place[i];
      made.divisor[i] = divisors_[level.index];
      made.spatial_factor[i] = logit_factor(level.channels, options_.temperature);
      made.channel_factor[i] = logit_factor(level.pixels, options_.temperature);
    }
  }

  const OnDeviceOf device_;
};

}  // namespace
}  // namespace kd

KD_OPERATORS(m) { kd::TermsOperators<kd::Terms>::add_to(m); }
