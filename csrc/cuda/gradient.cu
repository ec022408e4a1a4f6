#include "gradient.h"

namespace kd {
namespace {

template <class X, bool kArriving>
void gradient_as(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out) {
  Gradient<X, kArriving> pass{};
  pass.product = wanted.product, pass.sign = wanted.sign, pass.error = wanted.error;
  pass.absolute = wanted.absolute, pass.mean = wanted.mean, pass.unless = wanted.unless;
  pass.reads = wanted.sign.there || wanted.error.there || (wanted.product.there && wanted.absolute);
  in_launches(x, write_blocks<X>, [&](const Places& places) {
    pass.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.x[i] = memory_of(x[level]);
      if (pass.error.there) pass.target[i] = memory_of((*wanted.target)[level]);
      if (kArriving) pass.arriving[i] = memory_of((*wanted.arriving)[level]);
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
  by_type({&x, wanted.error.there ? wanted.target : nullptr, wanted.arriving}, [&](auto type) {
    const auto run = wanted.arriving != nullptr ? gradient_as<decltype(type), true> : gradient_as<decltype(type), false>;
    run(device, like, x, wanted, out);
  });
}

}  // namespace kd
