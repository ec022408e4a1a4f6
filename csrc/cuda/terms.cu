// `terms` on CUDA: the read pass, and one small launch for all rows; for a gradient the write pass.
#include "terms.h"

#include "../include/terms.h"
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
    WritePass wanted{};
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
    WritePass wanted{};
    wanted.arriving = arriving.empty() ? nullptr : &added;
    Results out(operands_.s, s_);
    write(upstream_of(grad), saved_of(saved), wanted, out);
    return out.finish();
  }

  // Makes those for upstream gradients of 1 right for `grad`, in place. Whether they are already is seen on the device.
  void correct(const std::vector<Tensor>& gradients, const Tensor& grad, const std::vector<Tensor>& saved) {
    const float* const d = upstream_of(grad);
    const Tensor right = torch::stable::new_empty(grad, {1}, torch::headeronly::ScalarType::Int);
    WritePass wanted{};
    wanted.unless = static_cast<const int*>(right.const_data_ptr());
    Results out = Results::again(gradients, s_);
    device_.launch(AllOnes{d, rows() * images_, static_cast<int*>(right.mutable_data_ptr())}, 1);
    write(d, saved_of(saved), wanted, out);
    out.finish();
  }

 private:
  void read(const Saved& saved, float* error) const {
    if (const std::optional<Reading> wanted = reading(saved, error)) reduce(device_, operands_.s[0], s_, *wanted);
  }

  // The rows of the map and of the attention and of so many imitations, and all of the state.
  void evaluate(const Tensor& result, const Saved& saved, const float* error, int64_t imitations) const {
    in_launches(s_, [&](const Level&) { return kKinds + imitations; }, [&](const Places& places) {
      device_.launch(EvaluateTerms{places, numbers(saved, places), error, floats(result)}, places.blocks());
    });
  }

  // wanted: what there is besides the terms' own
  void write(const float* grad, const Saved& saved, WritePass wanted, const Results& out) const {
    if (images_ == 0) return;
    const bool imitates = options_.imitations > 0;
    wanted.terms = (has_map() ? kProduct : 0u) | (attends() ? kSign : 0u) | (imitates ? kSquares : 0u) |
                   (wanted.arriving != nullptr ? kArriving : 0u);
    wanted.target = &t_;
    wanted.absolute = options_.absolute;
    wanted.reads = options_.absolute || attends() || imitates;
    const auto slopes_of = [&](const Places& places) { return TermSlopes{numbers(saved, places), weights_, channel_, grad}; };
    by_type({&s_, imitates ? &t_ : nullptr, wanted.arriving}, [&](auto type) {
      using X = decltype(type);
      constexpr unsigned kMaps = kProduct | kSign, kWhole = kMaps | kSquares;
      const Tensor& like = operands_.s[0];
      // Of mixed types, which are rare, fewer: each of them takes time to compile.
      if constexpr (std::is_same_v<X, Any>) {
        write_by<X, kMaps, kWhole, kMaps | kArriving, kWhole | kArriving>(device_, like, s_, wanted, slopes_of, out);
      } else {
        write_by<X, kSquares, kMaps, kWhole, kMaps | kArriving, kWhole | kArriving>(device_, like, s_, wanted, slopes_of, out);
      }
    });
  }

  // Of a launch of these levels.
  TermNumbers numbers(const Saved& saved, const Places& places) const {
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
    for (int i = 0; i < places.count; ++i) {
      const Place& level = places.place[i];
      made.divisor[i] = divisors_[level.index];
      made.spatial_factor[i] = logit_factor(level.channels, options_.temperature);
      made.channel_factor[i] = logit_factor(level.pixels, options_.temperature);
    }
    return made;
  }

  const OnDeviceOf device_;
};

}  // namespace
}  // namespace kd

KD_OPERATORS(m) { kd::TermsOperators<kd::Terms>::add_to(m); }
