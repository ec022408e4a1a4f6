#include "reduce.h"

namespace kd {
namespace {

template <class X, bool kError>
void reduce_as(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted) {
  std::vector<int64_t> part{0};
  for (size_t i = 0; i < x.size(); ++i) part.push_back(part.back() + x[i].images * read_blocks<X>(x[i]) * x[i].channels);
  const bool sums = wanted.sums != ChannelSums::none;
  const Tensor parts = new_floats(like, {sums ? part.back() : 0});
  Reduce<X, kError> pass{};
  pass.weights = wanted.weights, pass.error_channel = wanted.error_channel;
  pass.raw = wanted.raw, pass.magnitude = wanted.magnitude, pass.error = wanted.error;
  pass.parts = sums ? floats(parts) : nullptr;
  pass.absolute = wanted.absolute, pass.of_magnitudes = wanted.sums == ChannelSums::of_magnitudes;
  in_launches(x, read_blocks<X>, [&](const Places& places) {
    pass.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.x[i] = memory_of(x[level]);
      if (kError) pass.target[i] = memory_of((*wanted.target)[level]);
      pass.part[i] = part[level];
    }
    device.launch(pass, places.blocks());
  });
  if (!sums) return;
  SumParts second{};
  second.parts = floats(parts), second.channel = wanted.channel, second.mean = wanted.mean;
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

}  // namespace

void reduce(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted) {
  if (x.images() == 0) return;
  by_type({&x, wanted.error != nullptr ? wanted.target : nullptr}, [&](auto type) {
    const auto run = wanted.error != nullptr ? reduce_as<decltype(type), true> : reduce_as<decltype(type), false>;
    run(device, like, x, wanted);
  });
}

}  // namespace kd
