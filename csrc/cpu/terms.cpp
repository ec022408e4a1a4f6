// `terms`: a map's distance, an attention's distance and imitations of one target, from one read of the student and one gradient write.
// Rows of the result, those that are wanted: the map's, the attention's over pixels and over channels, one an imitation.
#include <algorithm>
#include <string>
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

// The operators' arguments besides the options. t: empty without imitations;   factors: (rows, L, N);   the others: packed fp32
struct Operands {
  std::vector<Tensor> s, t;
  std::optional<Tensor> weights, map_t, map_spatial, attention_spatial, attention_channel, channel;
  std::vector<Tensor> spatial;
  std::optional<Tensor> factors;
};

struct Options {
  bool absolute;
  MapOptions map;
  std::string average;
  double temperature;
  int64_t imitations;
  std::vector<double> scales;
};

// What the backward reads again: packed maps and vectors, empty when not wanted, and (3, L, N, STATE).
struct Saved {
  float *raw, *magnitude, *channel_sums, *state;
};

class Terms {
 public:
  Terms(const Operands& operands, const Options& options)
      : operands_(operands),
        options_(options),
        s_(operands.s),
        t_(operands.t, operands.t.empty() ? nullptr : &s_),
        places_(s_),
        images_(all_images(s_).last),
        weights_(floats(operands.weights, s_.vectors())),
        map_t_(floats(operands.map_t, s_.maps())),
        map_spatial_(floats(operands.map_spatial, s_.maps())),
        attention_spatial_(floats(operands.attention_spatial, s_.maps())),
        attention_channel_(floats(operands.attention_channel, s_.vectors())),
        channel_(floats(operands.channel, s_.vectors())),
        factors_(floats(operands.factors, rows() * images_)),
        attention_row_(has_map()),
        imitation_row_(attention_row_ + (attends() ? 2 : 0)) {
    STD_TORCH_CHECK(options.imitations == 0 || (options.imitations > 0 && t_.size() > 0), "imitations need a target");
    STD_TORCH_CHECK(operands.map_t.has_value() == has_map() && operands.attention_channel.has_value() == attends() &&
                        rows() == imitation_row_ + options.imitations,
                    "operands and scales do not fit");
    for (const Tensor& spatial : operands.spatial) spatial_.push_back(floats(spatial, s_.maps()));
    STD_TORCH_CHECK(spatial_.empty() || static_cast<int64_t>(spatial_.size()) == options.imitations, "spatial weights: one an imitation");
    for (size_t level = 0; level < s_.size(); ++level) divisors_.push_back(divisor_of(options.average, s_.images(), s_[level].pixels));
  }

  // Rows and what the backward needs, without a gradient.
  std::vector<Tensor> forward() {
    const std::vector<Tensor> results = new_results();
    const Saved saved = saved_of({results.begin() + 1, results.end()});
    const Tensor error = new_floats({options_.imitations > 0 ? s_.maps() : 0});
    read(saved, floats(error), {0, images_});
    evaluate(floats(results[0]), saved, floats(error), options_.imitations, {0, images_});
    return results;
  }

  // The same of at most one imitation, and the gradients for upstream gradients of 1: the imitation's values come with these.
  std::vector<Tensor> forward_with_gradient() {
    STD_TORCH_CHECK(options_.imitations <= 1, "values of several imitations do not come with their gradient");
    std::vector<Tensor> results = new_results();
    const Saved saved = saved_of({results.begin() + 1, results.end()});
    Results out(operands_.s, s_);
    float* const values = floats(results[0]);
    for (const Images& group : groups()) {
      read(saved, nullptr, group);
      evaluate(values, saved, nullptr, 0, group);
      write(nullptr, saved, nullptr, out, options_.imitations > 0 ? values + imitation_row_ * images_ : nullptr, group);
    }
    for (Tensor& gradient : out.finish()) results.push_back(std::move(gradient));
    return results;
  }

  // Gradients for the upstream gradients grad (rows, L, N), with `arriving` added.
  void backward(const Tensor& grad, const std::vector<Tensor>& saved, const Pyramid* arriving, const Results& out) {
    write(floats(grad, rows() * images_), saved_of(saved), arriving, out, nullptr, {0, images_});
  }

  const Pyramid& s() const { return s_; }

 private:
  // Not by their pointers, which are null where there are no images.
  bool has_map() const { return operands_.weights.has_value(); }
  bool attends() const { return operands_.attention_spatial.has_value(); }
  int64_t rows() const { return static_cast<int64_t>(options_.scales.size()); }

  std::vector<Tensor> new_results() const {
    const int64_t levels = static_cast<int64_t>(s_.size());
    Tensor state = new_floats({3, levels, s_.images(), STATE});
    // Each row uses some of it; the rest is not to differ from run to run.
    torch::stable::zero_(state);
    return {new_floats({rows(), levels, s_.images()}), new_floats({has_map() ? s_.maps() : 0}),
            new_floats({attends() ? s_.maps() : 0}), new_floats({attends() ? s_.vectors() : 0}), state};
  }

  Saved saved_of(const std::vector<Tensor>& tensors) const {
    STD_TORCH_CHECK(tensors.size() == 4, "expected four saved tensors");
    const int64_t counts[] = {has_map() ? s_.maps() : 0, attends() ? s_.maps() : 0, attends() ? s_.vectors() : 0, 3 * images_ * STATE};
    for (int k = 0; k < 4; ++k) floats(tensors[k], counts[k]);
    return {floats(tensors[0]), floats(tensors[1]), floats(tensors[2]), floats(tensors[3])};
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
    if (wanted.raw != nullptr || wanted.magnitude != nullptr || wanted.error != nullptr) reduce(s_, wanted, images);
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

  const Operands& operands_;
  const Options& options_;
  const Pyramid s_, t_;
  const Places places_;
  // Images of all levels.
  const int64_t images_;
  const float *const weights_, *const map_t_, *const map_spatial_, *const attention_spatial_, *const attention_channel_, *const channel_,
      *const factors_;
  // The attention's first row, behind that of the map, and the first imitation's.
  const int64_t attention_row_, imitation_row_;
  std::vector<const float*> spatial_;
  // Of the map's distance, a level.
  std::vector<float> divisors_;
};

// The arguments that all four operators end with.
#define KD_PARAMETERS                                                                                                                    \
  std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weights, std::optional<Tensor> map_t,                              \
      std::optional<Tensor> map_spatial, std::optional<Tensor> attention_spatial, std::optional<Tensor> attention_channel,               \
      std::optional<Tensor> channel, std::vector<Tensor> spatial, std::optional<Tensor> factors, bool absolute, std::string rectify,     \
      std::string normalize, std::string normalize_t, std::string distance, double eps, bool relative, double map_temperature,           \
      std::string average, double temperature, int64_t imitations, std::vector<double> scales
#define KD_PARSED                                                                                                                        \
  const Operands operands{s, t, weights, map_t, map_spatial, attention_spatial, attention_channel, channel, spatial, factors};           \
  const Options options{absolute,                                                                                                        \
                        {rectify_of(rectify), normalize_of(normalize), normalize_of(normalize_t), distance_of(distance),                 \
                         static_cast<float>(eps), relative, static_cast<float>(map_temperature)},                                        \
                        average,                                                                                                         \
                        temperature,                                                                                                     \
                        imitations,                                                                                                      \
                        scales};                                                                                                         \
  Terms made(operands, options)

std::vector<Tensor> terms(KD_PARAMETERS) {
  KD_PARSED;
  return made.forward();
}

std::vector<Tensor> terms_with_gradient(KD_PARAMETERS) {
  KD_PARSED;
  return made.forward_with_gradient();
}

std::vector<Tensor> terms_backward(Tensor grad, std::vector<Tensor> saved, std::vector<Tensor> arriving, KD_PARAMETERS) {
  KD_PARSED;
  const Pyramid added(arriving, arriving.empty() ? nullptr : &made.s());
  Results out(s, made.s());
  made.backward(grad, saved, arriving.empty() ? nullptr : &added, out);
  return out.finish();
}

void terms_correct_gradient(std::vector<Tensor> gradients, Tensor grad, std::vector<Tensor> saved, KD_PARAMETERS) {
  KD_PARSED;
  const float* d = floats(grad, grad.numel());
  // Right already.
  if (std::all_of(d, d + grad.numel(), [](float x) { return x == 1.0f; })) return;
  Results out = Results::again(gradients, made.s());
  made.backward(grad, saved, nullptr, out);
  out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("terms", TORCH_BOX(&kd::terms));
  m.impl("terms_with_gradient", TORCH_BOX(&kd::terms_with_gradient));
  m.impl("terms_backward", TORCH_BOX(&kd::terms_backward));
  m.impl("terms_correct_gradient", TORCH_BOX(&kd::terms_correct_gradient));
}
