#include "gradient.h"

namespace kd {
namespace {

template <class X>
void gradient_as(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out) {
  Gradient<X> pass{};
  pass.product = wanted.product, pass.sign = wanted.sign, pass.error = wanted.error;
  pass.absolute = wanted.absolute, pass.mean = wanted.mean, pass.unless = wanted.unless;
  pass.reads = wanted.sign.there || wanted.error.there || (wanted.product.there && wanted.absolute);
  pass.has_arriving = wanted.arriving != nullptr;
  const auto blocks = [](const Level& level) {
    const int64_t length = level.last ? level.channels : level.pixels, height = level.last ? level.pixels : level.channels;
    return ceil_div<int64_t>(length, kSpan<X>) * ceil_div<int64_t>(height, kRowsOfBlock);
  };
  in_launches(x, blocks, [&](const Places& places) {
    pass.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.x[i] = memory_of(x[level]);
      if (pass.error.there) pass.target[i] = memory_of((*wanted.target)[level]);
      if (pass.has_arriving) pass.arriving[i] = memory_of((*wanted.arriving)[level]);
      pass.out[i] = memory_of(out[level]);
    }
    const Tensor parts = new_floats(like, {wanted.values != nullptr ? places.blocks() : 0});
    pass.parts = wanted.values != nullptr ? floats(parts) : nullptr;
    device.launch(pass, places.blocks());
    if (wanted.values == nullptr) return;
    device.launch(SumSquares{places, floats(parts), wanted.values}, places.count * places.images);
  });
}

}  // namespace

void gradient(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out) {
  if (x.images() == 0) return;
  by_type({&x, wanted.error.there ? wanted.target : nullptr, wanted.arriving},
          [&](auto type) { gradient_as<decltype(type)>(device, like, x, wanted, out); });
}

}  // namespace kd
