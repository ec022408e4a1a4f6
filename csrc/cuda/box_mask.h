// The kernels of `box_mask`: boxes drawn on the grids of a pyramid, and the cells that they leave empty sharing 1.
#pragma once

#include "../include/boxes.h"
#include "launch.h"
#include "levels.h"
#include "sums.h"

namespace kd {

// The tile that a block draws: a column a lane, and so many rows.
constexpr int kTileWidth = kWarp, kTileHeight = 16;

// A level's masks among those of a launch. begin: where they begin in the packed ones; first, blocks, index: as a Place has them.
struct Sheet {
  int64_t height, width, begin, first, blocks;
  int index;
};

// The thread's part of its block's tile: the cells of column `u` in the rows v, v + kStep, ..., and where the image's mask begins.
struct Cells {
  static constexpr int kThreads = 128, kStep = kThreads / kWarp, kCount = kTileHeight / kStep;

  int level;
  int64_t image, tile, top, left, u, v, mask;

  template <class Me>
  KD_DEVICE Cells(Me& me, const PlacesOf<Sheet>& places) : level(places.of(me.block())) {
    const Sheet& sheet = places.place[level];
    const int64_t within = me.block() - sheet.first, across = ceil_div<int64_t>(sheet.width, kTileWidth);
    image = within / sheet.blocks, tile = within % sheet.blocks;
    top = tile / across * kTileHeight, left = tile % across * kTileWidth;
    u = left + me.lane(), v = top + me.warp();
    mask = sheet.begin + image * sheet.height * sheet.width;
  }

  // Calls run(r, cell) for each cell that the mask has, the r-th of the thread.
  template <class Run>
  KD_DEVICE void each(const Sheet& sheet, const Run& run) const {
    KD_UNROLL
    for (int r = 0; r < kCount; ++r) {
      const int64_t row = v + r * kStep;
      if (u < sheet.width && row < sheet.height) run(r, mask + row * sheet.width + u);
    }
  }
};

// The number of the lowest bit that is set.
KD_BOTH int lowest(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(bits) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// For which threads of the warp `yes` is true: a bit a lane.
template <class Me>
KD_DEVICE uint32_t lanes_of(Me& me, bool yes) {
  uint32_t bits = yes ? 1u << me.lane() : 0u;
  for (int mask = 1; mask < kWarp; mask *= 2) bits |= me.across(bits, mask);
  return bits;
}

// Whether a window's axis has any of the cells first..last: the distance from its start grows with the cell, however it is rounded.
KD_BOTH bool reaches(const Axis& axis, int64_t first, int64_t last) {
  return static_cast<float>(last) - axis.start >= 0 && static_cast<float>(first) - axis.start < axis.length;
}

// A window's profile at x cells from its start.
KD_BOTH float profile(Kind kind, float x, float length) {
  const float half = length / 2;
  if (kind == Kind::gaussian) {
    const float distance = (x - half) / half;
    return expf(distance * distance * -0.5f);
  }
  if (kind == Kind::exponential) {
    const float distance = x - half;
    return expf(distance * distance * -5e-5f);
  }
  return 1;
}

// A tile of one image's mask: the maximum over the image's boxes. They are taken in portions: each thread finds where one of them lies, for
// all threads, which then draw those that reach the tile. Of the background the cells that no box reaches become 1.
//
// boxes: (N, most, 4);   counts: (N,) int64 with `wide`, otherwise int32;   empty: a number a block, its empty cells
struct DrawBoxes {
  static constexpr int kThreads = Cells::kThreads, kResident = 8, kWarps = kThreads / kWarp;
  struct Shared {
    Window windows[kThreads];
    // Which windows reach the tile, a bit each.
    uint32_t reaching[kWarps];
    float of_warp[kWarps];
  };

  PlacesOf<Sheet> places;
  BoxOptions options;
  const float* boxes;
  const void* counts;
  int64_t most;
  float *masks, *empty;
  bool wide;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const Cells cells(me, places);
    const Sheet& sheet = places.place[cells.level];
    const int64_t wanted = wide ? static_cast<const int64_t*>(counts)[cells.image] : static_cast<const int32_t*>(counts)[cells.image];
    const int64_t count = wanted < most ? wanted : most;
    const float* const of_image = boxes + cells.image * most * 4;
    float values[Cells::kCount] = {};
    for (int64_t first = 0; first < count; first += kThreads) {
      const int64_t left = count - first;
      if (me.warp() * kWarp < left) {
        Window window;
        const bool there = me.index() < left && find(cells, of_image + (first + me.index()) * 4, window);
        if (there) shared.windows[me.index()] = window;
        const uint32_t bits = lanes_of(me, there);
        if (me.lane() == 0) shared.reaching[me.warp()] = bits;
      }
      me.sync();
      for (int warp = 0; warp < kWarps && warp * kWarp < left; ++warp) {
        for (uint32_t bits = shared.reaching[warp]; bits != 0; bits &= bits - 1) {
          draw(cells, shared.windows[warp * kWarp + lowest(bits)], values);
        }
      }
      me.sync();
    }
    const bool background = options.kind == Kind::background;
    float none = 0;
    cells.each(sheet, [&](int r, int64_t cell) {
      masks[cell] = !background ? values[r] : values[r] == 0 ? 1.0f : 0.0f;
      none += values[r] == 0 ? 1.0f : 0.0f;
    });
    if (!background) return;
    const float total = block_sum(me, none, shared.of_warp, kWarps);
    if (me.index() == 0) empty[me.block()] = total;
  }

 private:
  // Where a box lies; false where it does not reach the tile.
  KD_DEVICE bool find(const Cells& cells, const float* box, Window& window) const {
    const Sheet& sheet = places.place[cells.level];
    return window_of(options, box, sheet.index, sheet.height, sheet.width, window) &&
           reaches(window.y, cells.top, cells.top + kTileHeight - 1) && reaches(window.x, cells.left, cells.left + kTileWidth - 1);
  }

  KD_DEVICE void draw(const Cells& cells, const Window& window, float (&values)[Cells::kCount]) const {
    const float x = static_cast<float>(cells.u) - window.x.start;
    if (!(x >= 0 && x < window.x.length)) return;
    const float across = profile(options.kind, x, window.x.length);
    const bool ones = options.own_ones() && x >= window.x.from && x < window.x.to;
    KD_UNROLL
    for (int r = 0; r < Cells::kCount; ++r) {
      const float y = static_cast<float>(cells.v + r * Cells::kStep) - window.y.start;
      if (!(y >= 0 && y < window.y.length)) continue;
      const bool own = ones && y >= window.y.from && y < window.y.to;
      const float value = own ? window.weight : window.weight * profile(options.kind, y, window.y.length) * across;
      values[r] = larger(values[r], value);
    }
  }
};

// The empty cells of each image, marked by 1, divided by their number. The blocks are those of DrawBoxes.
struct ShareEmpty {
  static constexpr int kThreads = Cells::kThreads, kResident = 8, kWarps = kThreads / kWarp;
  struct Shared {
    float of_warp[kWarps];
  };

  PlacesOf<Sheet> places;
  const float* empty;
  float* masks;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const Cells cells(me, places);
    const Sheet& sheet = places.place[cells.level];
    const float* const of_image = empty + me.block() - cells.tile;
    float total = 0;
    for (int64_t i = me.index(); i < sheet.blocks; i += kThreads) total += of_image[i];
    const float share = 1 / larger(block_sum(me, total, shared.of_warp, kWarps), 1.0f);
    cells.each(sheet, [&](int, int64_t cell) { masks[cell] *= share; });
  }
};

}  // namespace kd
