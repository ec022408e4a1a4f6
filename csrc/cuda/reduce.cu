#include "reduce.h"

namespace kd {
namespace {

template <class X, unsigned kMade>
void reduce_as(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted, bool mean) {
  std::vector<int64_t> part{0};
  for (size_t i = 0; i < x.size(); ++i) part.push_back(part.back() + x[i].images * read_blocks<X>(x[i]) * x[i].channels);
  const bool sums = wanted.sums != ChannelSums::none;
  const Tensor parts = new_floats(like, {sums ? part.back() : 0});
  Reduce<X, kMade> pass{};
  pass.weights = wanted.weights, pass.error_channel = wanted.error_channel, pass.pixel_weights = wanted.pixel_weights;
  pass.raw = wanted.raw, pass.magnitude = wanted.magnitude, pass.error = wanted.error;
  pass.parts = sums ? floats(parts) : nullptr;
  in_launches(x, read_blocks<X>, [&](const Places& places) {
    pass.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.x[i] = memory_of(x[level]);
      if constexpr (Reduce<X, kMade>::kErrors) pass.target[i] = memory_of((*wanted.target)[level]);
      pass.part[i] = part[level];
    }
    device.launch(pass, places.blocks());
  });
  if (!sums) return;
  SumParts second{};
  second.parts = floats(parts), second.channel = wanted.channel, second.mean = mean;
  in_launches(x, [](const Level& level) { return ceil_div<int64_t>(level.channels, kWarp); }, [&](const Places& places) {
    second.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      second.part[i] = part[level];
      second.count[i] = read_blocks<X>(x[level]);
    }
    device.launch(second, places.blocks());
  });
}

unsigned bits_of(const Reading& wanted) {
  return (wanted.raw != nullptr ? kRaw | (wanted.absolute ? kOfMagnitudes : 0u) : 0u) | (wanted.magnitude != nullptr ? kMagnitude : 0u) |
         (wanted.error != nullptr ? kError : 0u) |
         (wanted.sums != ChannelSums::of_values ? 0u : wanted.pixel_weights != nullptr ? kWeightedSums : kValueSums) |
         (wanted.sums == ChannelSums::of_magnitudes ? kMagnitudeSums : 0u);
}

// Calls the first of the kernels that makes all that is wanted, and nothing else of the same sums.
template <class X, unsigned kMade, unsigned... kOthers>
void reduce_by(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted, bool mean, unsigned bits) {
  const bool fits = (bits & ~kMade) == 0 && ((bits ^ kMade) & kOfMagnitudes & (bits & kRaw ? ~0u : 0u)) == 0;
  if (fits) return reduce_as<X, kMade>(device, like, x, wanted, mean);
  if constexpr (sizeof...(kOthers) > 0) {
    reduce_by<X, kOthers...>(device, like, x, wanted, mean, bits);
  } else {
    STD_TORCH_CHECK(false, "no read pass makes ", bits);
  }
}

constexpr unsigned kAttention = kMagnitude | kMagnitudeSums, kAll = kRaw | kAttention | kError;

}  // namespace

void reduce(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted, bool mean) {
  if (x.images() == 0) return;
  by_type({&x, wanted.error != nullptr ? wanted.target : nullptr}, [&](auto type) {
    using X = decltype(type);
    const unsigned bits = bits_of(wanted);
    // Of mixed types, which are rare, fewer: each of them takes time to compile.
    if constexpr (std::is_same_v<X, Any>) {
      reduce_by<X, kValueSums, kWeightedSums, kRaw | kAttention, kRaw | kAttention | kOfMagnitudes, kAll, kAll | kOfMagnitudes>(
          device, like, x, wanted, mean, bits);
    } else {
      reduce_by<X, kValueSums, kWeightedSums, kMagnitudeSums, kRaw, kAttention, kRaw | kAttention, kRaw | kAttention | kOfMagnitudes,
                kError, kAll, kAll | kOfMagnitudes>(device, like, x, wanted, mean, bits);
    }
  });
}

}  // namespace kd
