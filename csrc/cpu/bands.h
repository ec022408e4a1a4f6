// Both passes go through a pyramid in bands: some neighbouring pixels of an image with all their channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../include/pyramid.h"

namespace kd {

// Where each level's maps (N, P) and vectors (N, C) begin in packed buffers.
struct Places {
  std::vector<int64_t> map, vector;

  explicit Places(const Pyramid& x) {
    int64_t pixels = 0, channels = 0;
    for (size_t level = 0; level < x.size(); ++level) {
      map.push_back(pixels * x.images());
      vector.push_back(channels * x.images());
      pixels += x[level].pixels;
      channels += x[level].channels;
    }
  }
};

// Some of the images of a pyramid, counted level after level: image n of level l is l * N + n.
struct Images {
  int64_t first, last;
};

inline Images all_images(const Pyramid& x) { return {0, static_cast<int64_t>(x.size()) * x.images()}; }

// first, pixels: of the image's map;   number: among the bands of the image;   index: among all bands
struct Band {
  size_t level;
  int64_t image, first, pixels, number, index;
};

class Bands {
 public:
  // Images of these levels one after the other.
  explicit Bands(const Pyramid& x) : images_(x.images()) {
    int64_t total = 0;
    for (size_t level = 0; level < x.size(); ++level) {
      firsts_.push_back(total);
      pixels_.push_back(x[level].pixels);
      // Long rows where a row is pixels; few where every pixel is one more term of the fp32 sum of a channel.
      most_.push_back(x[level].last ? 512 : 1024);
      total += images_ * of_image(level);
    }
    firsts_.push_back(total);
  }

  int64_t count() const { return firsts_.back(); }
  // The index of the first band of image `place` of `Images`, and behind the last image the number of bands.
  int64_t before(int64_t place) const {
    if (images_ == 0 || place == images_ * static_cast<int64_t>(pixels_.size())) return count();
    return first_of(place / images_, place % images_);
  }
  int64_t of_image(size_t level) const { return (pixels_[level] + most_[level] - 1) / most_[level]; }
  // The index of an image's first band.
  int64_t first_of(size_t level, int64_t image) const { return firsts_[level] + image * of_image(level); }

  Band operator[](int64_t index) const {
    size_t level = 0;
    while (index >= firsts_[level + 1]) ++level;
    const int64_t number = (index - firsts_[level]) % of_image(level);
    const int64_t first = number * most_[level];
    return {level, (index - firsts_[level]) / of_image(level), first, std::min(most_[level], pixels_[level] - first), number, index};
  }

 private:
  int64_t images_;
  std::vector<int64_t> firsts_, pixels_, most_;
};

}  // namespace kd
