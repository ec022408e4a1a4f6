// `terms`: a map's distance, an attention's distance and imitations of one target, from one read of the student and one gradient write.
#include "../include/terms.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "gradient.h"
#include "maps.h"
#include "parallel.h"
#include "reduce.h"

namespace kd {
namespace {

// Bytes of student and teacher that stay in a last-level cache between the passes: images are taken in groups of no more, larger ones
// alone.
constexpr int64_t CACHED = int64_t{16} << 20;

class Terms : public TermsCall {
 public:
  Terms(const TermsOperands& operands, const TermsOptions& options) : TermsCall(operands, options), places_(s_) {}

  // Rows and what the backward needs, without a gradient.
  std::vector<Tensor> forward() {
    const std::vector<Tensor> results = new_rows();
    const Saved saved = saved_of({results.begin() + 1, results.end()});
    const Tensor error = new_floats({options_.imitations > 0 ? s_.maps() : 0});
    read(saved, floats(error), {0, images_});
    evaluate(floats(results[0]), saved, floats(error), options_.imitations, {0, images_});
    return results;
  }

  // The same of at most one imitation, and the gradients for upstream gradients of 1: the imitation's values come with these.
  std::vector<Tensor> forward_with_gradient() {
    std::vector<Tensor> results = new_rows();
    float *const values = floats(results[0]), *const imitation = imitation_row_of(results[0]);
    const Saved saved = saved_of({results.begin() + 1, results.end()});
    Results out(operands_.s, s_);
    for (const Images& group : groups()) {
      read(saved, nullptr, group);
      evaluate(values, saved, nullptr, 0, group);
      write(nullptr, saved, nullptr, out, imitation, group);
    }
    for (Tensor& gradient : out.finish()) results.push_back(std::move(gradient));
    return results;
  }

  // Gradients for the upstream gradients grad (rows, L, N), with `arriving` added, which may be none.
  std::vector<Tensor> backward(const Tensor& grad, const std::vector<Tensor>& saved, const std::vector<Tensor>& arriving) {
    const Pyramid added(arriving, arriving.empty() ? nullptr : &s_);
    Results out(operands_.s, s_);
    write(upstream_of(grad), saved_of(saved), arriving.empty() ? nullptr : &added, out, nullptr, {0, images_});
    return out.finish();
  }

  // Makes those for upstream gradients of 1 right for `grad`, in place.
  void correct(const std::vector<Tensor>& gradients, const Tensor& grad, const std::vector<Tensor>& saved) {
    const float* const d = upstream_of(grad);
    // Right already.
    if (std::all_of(d, d + grad.numel(), [](float x) { return x == 1.0f; })) return;
    Results out = Results::again(gradients, s_);
    write(d, saved_of(saved), nullptr, out, nullptr, {0, images_});
    out.finish();
  }

 private:
  std::vector<Tensor> new_rows() const {
    const std::vector<Tensor> results = new_results();
    // Each row uses some of the state; the rest is not to differ from run to run.
    Tensor state = results.back();
    torch::stable::zero_(state);
    return results;
  }

  // Runs of images whose features stay in the cache from their read to their write.
  std::vector<Images> groups() const {
    std::vector<Images> found;
    int64_t held = 0;
    for (int64_t place = 0; place < images_; ++place) {
      const size_t level = place / s_.images();
      const int64_t bytes = s_[level].image_bytes() + (t_.size() > 0 ? t_[level].image_bytes() : 0);
      if (found.empty() || held + bytes > CACHED) {
        found.push_back({place, place});
        held = 0;
      }
      found.back().last = place + 1;
      held += bytes;
    }
    return found;
  }

  void read(const Saved& saved, float* error, Images images) const {
    if (const std::optional<Reading> wanted = reading(saved, error)) reduce(s_, *wanted, images);
  }

  // The values of the map's and the attention's rows and of so many imitations'.
  void evaluate(float* values, const Saved& saved, const float* error, int64_t imitations, Images images) const {
    const int64_t group = images.last - images.first;
    for_each((imitation_row_ + imitations) * group, [&](int64_t i) {
      const int64_t row = i / group, place = images.first + i % group;
      values[row * images_ + place] = value(row, place, saved, error) * factor(row, place);
    });
  }

  float value(int64_t row, int64_t place, const Saved& saved, const float* error) const {
    const Level& level = level_of(place);
    const int64_t map = map_place(place), vector = vector_place(place);
    const MapKernels& kernels = map_kernels();
    if (row < attention_row_) {
      return kernels.map_forward(saved.raw + map, map_t_ + map, from(map_spatial_, map), state(saved, 0, place), level.pixels,
                                 divisor(place), options_.map);
    }
    if (row == attention_row_ && attends()) {
      return kernels.attention_distance(saved.magnitude + map, attention_spatial_ + map, state(saved, 1, place), level.pixels,
                                        logit_factor(level.channels, options_.temperature));
    }
    if (row < imitation_row_) {
      return kernels.attention_distance(saved.channel_sums + vector, attention_channel_ + vector, state(saved, 2, place), level.channels,
                                        logit_factor(level.pixels, options_.temperature));
    }
    const float* spatial = spatial_.empty() ? nullptr : spatial_[row - imitation_row_] + map;
    return kernels.weighted_sum(error + map, spatial, level.pixels);
  }

  // The gradients of these images. values: as in `Writing`, or null
  void write(const float* grad, const Saved& saved, const Pyramid* arriving, const Results& out, float* values, Images images) const {
    // The gradients with respect to the channels' sums of magnitudes.
    const Tensor by_channel = new_floats({attends() ? s_.vectors() : 0});
    float* const sign_channel = floats(by_channel);
    for (int64_t place = images.first; attends() && place < images.last; ++place) {
      const Level& level = level_of(place);
      const int64_t vector = vector_place(place);
      map_kernels().attention_gradient(saved.channel_sums + vector, attention_channel_ + vector, state(saved, 2, place),
                                       upstream(grad, attention_row_ + 1, place), level.channels, level.channels,
                                       logit_factor(level.pixels, options_.temperature), sign_channel + vector);
    }
    Writing wanted;
    wanted.target = &t_;
    wanted.arriving = arriving;
    wanted.has_product = wanted.product_by_pixel = has_map();
    wanted.has_sign = wanted.sign_by_pixel = attends();
    wanted.has_error = wanted.error_by_pixel = options_.imitations > 0;
    wanted.product_channel = weights_;
    wanted.sign_channel = attends() ? sign_channel : nullptr;
    wanted.error_channel = channel_;
    wanted.absolute = wanted.has_product && options_.absolute;
    wanted.values = values;
    gradient(s_, wanted, out, [&](const Band& band, const PixelFactors& factors) { fill(grad, saved, band, factors); }, images);
  }

  // The numbers of a band's pixels in each term's gradient.
  void fill(const float* grad, const Saved& saved, const Band& band, const PixelFactors& factors) const {
    const int64_t place = static_cast<int64_t>(band.level) * s_.images() + band.image;
    const Level& level = level_of(place);
    const int64_t map = map_place(place) + band.first;
    const MapKernels& kernels = map_kernels();
    if (factors.product != nullptr) {
      kernels.map_gradient(saved.raw + map, map_t_ + map, from(map_spatial_, map), state(saved, 0, place), upstream(grad, 0, place),
                           band.pixels, divisor(place), options_.map, factors.product);
    }
    if (factors.sign != nullptr) {
      kernels.attention_gradient(saved.magnitude + map, attention_spatial_ + map, state(saved, 1, place),
                                 upstream(grad, attention_row_, place), band.pixels, level.pixels,
                                 logit_factor(level.channels, options_.temperature), factors.sign);
    }
    if (factors.error == nullptr) return;
    std::fill_n(factors.error, band.pixels, 0.0f);
    for (int64_t k = 0; k < options_.imitations; ++k) {
      // The 2 of a square's derivative.
      const float d = 2.0f * upstream(grad, imitation_row_ + k, place);
      const float* spatial = spatial_.empty() ? nullptr : spatial_[k] + map;
      for (int64_t p = 0; p < band.pixels; ++p) factors.error[p] += spatial != nullptr ? d * spatial[p] : d;
    }
  }

  // What multiplies a row at one level and image: a number a row, and a tensor if there is one.
  float factor(int64_t row, int64_t place) const {
    const float scale = static_cast<float>(options_.scales[row]);
    return factors_ != nullptr ? scale * factors_[row * images_ + place] : scale;
  }

  float upstream(const float* grad, int64_t row, int64_t place) const {
    const float own = factor(row, place);
    return grad != nullptr ? own * grad[row * images_ + place] : own;
  }

  const Level& level_of(int64_t place) const { return s_[place / s_.images()]; }
  float divisor(int64_t place) const { return divisors_[place / s_.images()]; }
  float* state(const Saved& saved, int64_t kind, int64_t place) const { return saved.state + (kind * images_ + place) * STATE; }

  // Where the map and the vector of an image begin in packed buffers.
  int64_t map_place(int64_t place) const { return places_.map[place / s_.images()] + place % s_.images() * level_of(place).pixels; }
  int64_t vector_place(int64_t place) const { return places_.vector[place / s_.images()] + place % s_.images() * level_of(place).channels; }

  static const float* from(const float* packed, int64_t place) { return packed != nullptr ? packed + place : nullptr; }

  const Places places_;
};

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { kd::TermsOperators<kd::Terms>::add_to(m); }
