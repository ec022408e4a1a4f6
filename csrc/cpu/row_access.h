// Rows of a band: where they lie, as fp32, and put where they belong.
#pragma once

#include <algorithm>
#include <vector>

#include "../include/pyramid.h"
#include "bands.h"
#include "rows.h"
#include "streams.h"

namespace kd {

// Room for so many floats, which stays the buffer's.
inline float* sized(std::vector<float>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// A band's row: of a contiguous level its pixels of a channel, of a channels_last one the channels of one of its pixels.
inline char* place_of(const Level& level, const Band& band, int64_t row) {
  const int64_t first = band.first * (level.last ? level.row_bytes() : bytes_of(level.type));
  return level.data + band.image * level.image_bytes() + first + row * level.row_bytes();
}

// Writes rows of fp32 into a pyramid's gradient.
class RowsOut {
 public:
  explicit RowsOut(const Pyramid& like) : streamed_(is_streamed(like)) {}

  // narrow: room that stays the caller's
  void put(char* to, Type type, const float* made, int64_t count, std::vector<char>& narrow) const {
    const char* from = reinterpret_cast<const char*>(made);
    const int64_t bytes = count * bytes_of(type);
    if (type != Type::fp32) {
      if (static_cast<int64_t>(narrow.size()) < bytes) narrow.resize(bytes);
      row_kernels().narrow[static_cast<int>(type)](made, narrow.data(), count);
      from = narrow.data();
    }
    if (streamed_) {
      row_kernels().stream(to, from, bytes);
    } else {
      std::copy_n(from, bytes, to);
    }
  }

 private:
  const bool streamed_;
};

}  // namespace kd
