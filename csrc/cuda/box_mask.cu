// `box_mask` on CUDA. The host looks at neither boxes nor counts.
#include "box_mask.h"

namespace kd {
namespace {

Tensor box_mask(Tensor boxes, Tensor counts, std::vector<double> image_size, std::vector<int64_t> sizes, std::string kind, double expand,
                bool released, bool inner_ones, bool area_norm) {
  const OnDeviceOf device(boxes);
  const BoxRequest request(boxes, counts, image_size, sizes, kind, expand, released, inner_ones, area_norm);
  const Tensor masks = new_floats(boxes, {request.cells()});
  if (request.cells() == 0) return masks;
  std::vector<Sheet> sheets;
  for (const Grid& grid : request.grids()) {
    const int64_t tiles = ceil_div<int64_t>(grid.height, kTileHeight) * ceil_div<int64_t>(grid.width, kTileWidth);
    sheets.push_back({grid.height, grid.width, grid.begin, 0, tiles, static_cast<int>(sheets.size())});
  }
  DrawBoxes pass{};
  pass.options = request.options();
  pass.boxes = request.boxes(), pass.most = request.most();
  pass.counts = request.counts().const_data_ptr();
  pass.wide = request.counts().element_size() == sizeof(int64_t);
  pass.masks = floats(masks);
  in_launches(request.images(), sheets, [&](const PlacesOf<Sheet>& places) {
    pass.places = places;
    const Tensor empty = new_floats(boxes, {request.options().kind == Kind::background ? places.blocks() : 0});
    pass.empty = floats(empty);
    device.launch(pass, places.blocks());
    if (empty.numel() > 0) device.launch(ShareEmpty{places, pass.empty, pass.masks}, places.blocks());
  });
  return masks;
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) { m.impl("box_mask", TORCH_BOX(&kd::box_mask)); }
