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

// Bytes of student and teacher that stay in a last-level cache between the passes: images are taken in groups of no more, if they fit.
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
  Tensor raw, magnitude, channel_sums, state;
};

class Terms {
 public:
  Terms(const Operands& operands, const Options& options)
      : operands_(operands),
        options_(options),
        s_(operands.s),
        t_(operands.t, &s_),
        places_(s_),
        attention_row_(operands.weights.has_value()),
        imitation_row_(attention_row_ + (attends() ? 2 : 0)) {}

  // Rows and what the backward needs, without a gradient.
  std::vector<Tensor> forward() {
    const Tensor rows = new_rows();
    const Saved saved = new_saved();
    const int64_t images = all_images(s_).last;
    const Tensor error = new_floats({options_.imitations > 0 ? s_.images() * s_.pixels() : 0});
    read(saved, floats(error), {0, images});
    evaluate(rows, saved, floats(error), {0, images});
    return {rows, saved.raw, saved.magnitude, saved.channel_sums, saved.state};
  }

  // The same of at most one imitation, and the gradients for upstream gradients of 1: the imitation's values come with these.
  std::vector<Tensor> forward_with_gradient() {
    const Tensor rows = new_rows();
    const Saved saved = new_saved();
    Results out(operands_.s, s_);
    const int64_t last_row = static_cast<int64_t>(options_.scales.size()) - 1;
    float* values = options_.imitations > 0 ? floats(rows) + last_row * all_images(s_).last : nullptr;
    for (const Images& group : groups()) {
      read(saved, nullptr, group);
      evaluate(rows, saved, nullptr, group);
      write(nullptr, saved, nullptr, out, values, group);
    }
    std::vector<Tensor> results = {rows, saved.raw, saved.magnitude, saved.channel_sums, saved.state};
    for (Tensor& gradient : out.finish()) results.push_back(std::move(gradient));
    return results;
  }

  // Gradients for the upstream gradients grad (rows, L, N), with `arriving` added.
  void backward(const float* grad, const Saved& saved, const Pyramid* arriving, const Results& out) {
    write(grad, saved, arriving, out, nullptr, all_images(s_));
  }

  const Pyramid& s() const { return s_; }

 private:
  bool attends() const { return operands_.attention_spatial.has_value(); }

  Tensor new_rows() const {
    return new_floats({static_cast<int64_t>(options_.scales.size()), static_cast<int64_t>(s_.size()), s_.images()});
  }

  Saved new_saved() const {
    const int64_t maps = s_.images() * s_.pixels(), vectors = s_.images() * s_.channels();
    Tensor state = new_floats({3, static_cast<int64_t>(s_.size()), s_.images(), STATE});
    // Each row uses some of it; the rest is not to differ from run to run.
    torch::stable::zero_(state);
    return {new_floats({attention_row_ > 0 ? maps : 0}), new_floats({attends() ? maps : 0}),
            new_floats({attends() ? vectors : 0}), state};
  }

  // Runs of images whose features stay in the cache from their read to their write.
  std::vector<Images> groups() const {
    std::vector<Images> found;
    int64_t held = 0;
    for (int64_t place = 0; place < all_images(s_).last; ++place) {
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
    if (attention_row_ > 0) {
      wanted.weights = floats(operands_.weights);
      wanted.raw = floats(saved.raw);
      wanted.absolute = options_.absolute;
    }
    if (attends()) {
      wanted.sums = ChannelSums::of_magnitudes;
      wanted.magnitude = floats(saved.magnitude);
      wanted.channel = floats(saved.channel_sums);
    }
    if (error != nullptr && options_.imitations > 0) {
      wanted.target = &t_;
      wanted.error = error;
      wanted.error_channel = floats(operands_.channel);
    }
    if (wanted.raw != nullptr || wanted.magnitude != nullptr || wanted.error != nullptr) reduce(s_, wanted, images);
  }

  // The rows that need no gradient pass: all, or all but the imitation where there is no map of errors.
  void evaluate(const Tensor& rows, const Saved& saved, const float* error, Images images) const {
    const int64_t count = imitation_row_ + (error != nullptr ? options_.imitations : 0);
    const int64_t group = images.last - images.first, all = all_images(s_).last;
    for_each(count * group, [&](int64_t i) {
      const int64_t row = i / group, place = images.first + i % group;
      floats(rows)[row * all + place] = value(row, place, saved, error) * factor(row, place);
    });
  }

  float value(int64_t row, int64_t place, const Saved& saved, const float* error) const {
    const Level& level = s_[place / s_.images()];
    const int64_t map = map_place(place), vector = vector_place(place);
    const MapKernels& kernels = map_kernels();
    if (row < attention_row_) {
      return kernels.map_forward(floats(saved.raw) + map, floats(operands_.map_t) + map, from(operands_.map_spatial, map),
                                 state(saved, 0, place), level.pixels, divisor(level), options_.map);
    }
    if (row == attention_row_ && attends()) {
      return kernels.attention_distance(floats(saved.magnitude) + map, floats(operands_.attention_spatial) + map, state(saved, 1, place),
                                        level.pixels, logit_factor(level.channels, options_.temperature));
    }
    if (row < imitation_row_) {
      return kernels.attention_distance(floats(saved.channel_sums) + vector, floats(operands_.attention_channel) + vector,
                                        state(saved, 2, place), level.channels, logit_factor(level.pixels, options_.temperature));
    }
    const float* spatial = operands_.spatial.empty() ? nullptr : floats(operands_.spatial[row - imitation_row_]) + map;
    return kernels.weighted_sum(error + map, spatial, level.pixels);
  }

  // The gradients of these images. values: as in `Writing`, or null
  void write(const float* grad, const Saved& saved, const Pyramid* arriving, const Results& out, float* values, Images images) const {
    // The gradients with respect to the channels' sums of magnitudes.
    const Tensor by_channel = new_floats({attends() ? s_.images() * s_.channels() : 0});
    for (int64_t place = images.first; attends() && place < images.last; ++place) {
      const Level& level = s_[place / s_.images()];
      const int64_t vector = vector_place(place);
      map_kernels().attention_gradient(floats(saved.channel_sums) + vector, floats(operands_.attention_channel) + vector,
                                       state(saved, 2, place), upstream(grad, attention_row_ + 1, place), level.channels, level.channels,
                                       logit_factor(level.pixels, options_.temperature), floats(by_channel) + vector);
    }
    Writing wanted;
    wanted.target = &t_;
    wanted.arriving = arriving;
    wanted.has_product = wanted.product_by_pixel = attention_row_ > 0;
    wanted.has_sign = wanted.sign_by_pixel = attends();
    wanted.has_error = wanted.error_by_pixel = options_.imitations > 0;
    wanted.product_channel = floats(operands_.weights);
    wanted.sign_channel = attends() ? floats(by_channel) : nullptr;
    wanted.error_channel = floats(operands_.channel);
    wanted.absolute = wanted.has_product && options_.absolute;
    wanted.values = values;
    gradient(
        s_, wanted, out, [&](const Band& band, const PixelFactors& factors) { fill(grad, saved, band, factors); }, images);
  }

  // The numbers of a band's pixels in each term's gradient.
  void fill(const float* grad, const Saved& saved, const Band& band, const PixelFactors& factors) const {
    const Level& level = s_[band.level];
    const int64_t place = static_cast<int64_t>(band.level) * s_.images() + band.image;
    const int64_t map = map_place(place) + band.first;
    const MapKernels& kernels = map_kernels();
    if (factors.product != nullptr) {
      kernels.map_gradient(floats(saved.raw) + map, floats(operands_.map_t) + map, from(operands_.map_spatial, map),
                           state(saved, 0, place), upstream(grad, 0, place), band.pixels, divisor(level), options_.map, factors.product);
    }
    if (factors.sign != nullptr) {
      kernels.attention_gradient(floats(saved.magnitude) + map, floats(operands_.attention_spatial) + map, state(saved, 1, place),
                                 upstream(grad, attention_row_, place), band.pixels, level.pixels,
                                 logit_factor(level.channels, options_.temperature), factors.sign);
    }
    if (factors.error == nullptr) return;
    std::fill_n(factors.error, band.pixels, 0.0f);
    for (int64_t k = 0; k < options_.imitations; ++k) {
      // The 2 of a square's derivative.
      const float d = 2.0f * upstream(grad, imitation_row_ + k, place);
      const float* spatial = operands_.spatial.empty() ? nullptr : floats(operands_.spatial[k]) + map;
      for (int64_t p = 0; p < band.pixels; ++p) factors.error[p] += spatial != nullptr ? d * spatial[p] : d;
    }
  }

  // What multiplies a row at one level and image: a number a row, and a tensor if there is one.
  float factor(int64_t row, int64_t place) const {
    const float scale = static_cast<float>(options_.scales[row]);
    return operands_.factors ? scale * floats(operands_.factors)[row * all_images(s_).last + place] : scale;
  }

  float upstream(const float* grad, int64_t row, int64_t place) const {
    const float own = factor(row, place);
    return grad != nullptr ? own * grad[row * all_images(s_).last + place] : own;
  }

  float divisor(const Level& level) const { return divisor_of(options_.average, s_.images(), level.pixels); }

  float* state(const Saved& saved, int64_t kind, int64_t place) const {
    return floats(saved.state) + (kind * all_images(s_).last + place) * STATE;
  }

  // Where the map and the vector of an image begin in packed buffers.
  int64_t map_place(int64_t place) const {
    const size_t level = place / s_.images();
    return places_.map[level] + place % s_.images() * s_[level].pixels;
  }

  int64_t vector_place(int64_t place) const {
    const size_t level = place / s_.images();
    return places_.vector[level] + place % s_.images() * s_[level].channels;
  }

  static const float* from(const std::optional<Tensor>& packed, int64_t place) {
    return packed ? floats(*packed) + place : nullptr;
  }

  const Operands& operands_;
  const Options& options_;
  const Pyramid s_, t_;
  const Places places_;
  // The attention's first row, behind that of the map, and the first imitation's.
  const int64_t attention_row_, imitation_row_;
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
  const Pyramid added(arriving, &made.s());
  Results out(s, made.s());
  made.backward(floats(grad), {saved[0], saved[1], saved[2], saved[3]}, arriving.empty() ? nullptr : &added, out);
  return out.finish();
}

void terms_correct_gradient(std::vector<Tensor> gradients, Tensor grad, std::vector<Tensor> saved, KD_PARAMETERS) {
  KD_PARSED;
  const float* d = floats(grad);
  // Right already.
  if (std::all_of(d, d + grad.numel(), [](float x) { return x == 1.0f; })) return;
  Results out(gradients, made.s(), true);
  made.backward(d, {saved[0], saved[1], saved[2], saved[3]}, nullptr, out);
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
