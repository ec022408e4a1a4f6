// The levels of one launch, as a kernel takes them by value, and the blocks that each of them gets.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../include/device.h"
#include "elements.h"

namespace kd {

// Levels of one launch. A pyramid with more takes several.
constexpr int kLevels = 8;

// A level among those of a launch.
//   index             its place in the pyramid
//   map, vector       where it begins in packed maps (N, P) and vectors (N, C)
//   first, blocks     its first block, and its blocks for one image
struct Place {
  int64_t channels, pixels, map, vector, first, blocks;
  int index;
  bool last;
};

// The levels of a launch, each by a P, whose `first` and `blocks` are those of Place.
template <class P>
struct PlacesOf {
  P place[kLevels];
  int64_t images;
  int count;

  // The level that a block belongs to.
  KD_DEVICE int of(int64_t block) const {
    int level = 0;
    while (level + 1 < count && block >= place[level + 1].first) ++level;
    return level;
  }
  int64_t blocks() const { return count == 0 ? 0 : place[count - 1].first + images * place[count - 1].blocks; }
};

using Places = PlacesOf<Place>;

// Calls run(places) for these, at most kLevels at a time, and sets `first` of each. Nothing is run where there are no images.
template <class P, class Run>
void in_launches(int64_t images, const std::vector<P>& all, const Run& run) {
  for (size_t begin = 0; begin < all.size() && images > 0; begin += kLevels) {
    PlacesOf<P> places{};
    places.images = images;
    for (size_t i = begin; i < std::min(begin + kLevels, all.size()); ++i) {
      const int64_t first = places.blocks();
      places.place[places.count] = all[i];
      places.place[places.count++].first = first;
    }
    run(places);
  }
}

// Calls run(places) for the levels of a pyramid, at most kLevels at a time, the largest first: what comes last should be small.
// blocks: (level) -> blocks for one image of it.   Nothing is run where there are no images.
template <class Blocks, class Run>
void in_launches(const Pyramid& x, const Blocks& blocks, const Run& run) {
  std::vector<int64_t> maps{0}, vectors{0};
  std::vector<size_t> order;
  for (size_t i = 0; i < x.size(); ++i) {
    order.push_back(i);
    maps.push_back(maps.back() + x[i].images * x[i].pixels);
    vectors.push_back(vectors.back() + x[i].images * x[i].channels);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return x[a].channels * x[a].pixels > x[b].channels * x[b].pixels; });
  std::vector<Place> places;
  for (const size_t i : order) {
    STD_TORCH_CHECK(x[i].channels < int64_t{1} << 30, "level ", i, ": ", x[i].channels, " channels, which kernels count in 32 bits");
    places.push_back({x[i].channels, x[i].pixels, maps[i], vectors[i], 0, blocks(x[i]), static_cast<int>(i), x[i].last});
  }
  in_launches(x.images(), places, run);
}

// Where a level's rows lie: the pixels of a channel of a contiguous level, the channels of a pixel of a channels_last one.
inline Memory memory_of(const Level& level) {
  const int64_t bytes = level.images * level.image_bytes();
  const bool aligned = misalignment(level.data) == 0 && level.row_bytes() % 16 == 0;
  return {level.data, level.data + bytes, level.type, aligned};
}

// Calls run(X()) with the type of all levels of these pyramids, or with Any() where they differ.
template <class Run>
void by_type(std::initializer_list<const Pyramid*> pyramids, const Run& run) {
  bool same = true;
  const Type type = (**pyramids.begin())[0].type;
  for (const Pyramid* levels : pyramids) {
    for (size_t i = 0; levels != nullptr && i < levels->size(); ++i) same = same && (*levels)[i].type == type;
  }
  if (!same) return run(Any());
  switch (type) {
    case Type::fp32:
      return run(float());
    case Type::fp16:
      return run(Half());
    case Type::bf16:
      return run(BFloat16());
  }
}

}  // namespace kd
