// The write pass: a pyramid's gradient, from numbers by channel and by pixel and one more read of the pyramid.
#pragma once

#include <type_traits>

#include "launch.h"
#include "levels.h"
#include "sums.h"

namespace kd {

// A packed vector (N, C) and a packed map (N, P) of which a term's factor is made; null for the neutral value.
struct Factors {
  const float *channel, *pixel;
  bool there;
};

// dx = product_c * product_p * (sgn(x) if absolute else 1) + sgn(x) * (sign_c + sign_p)
// A term that is not there contributes nothing; the neutral value is 1, of the sign's factors 0.
//   mean  the product is divided by the number of pixels
struct Writing {
  Factors product{}, sign{};
  bool absolute = false, mean = false;
};

void gradient(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out);

// Rows of a block: channels of a contiguous level, pixels of a channels_last one.
constexpr int kRowsOfBlock = 128;

// Blocks for one image of a level.
template <class X>
int64_t write_blocks(const Level& level) {
  const int64_t length = level.last ? level.channels : level.pixels, height = level.last ? level.pixels : level.channels;
  return ceil_div<int64_t>(length, kSpan<X>) * ceil_div<int64_t>(height, kRowsOfBlock);
}

// The factors that belong to a channel or to a pixel.
struct Numbers {
  float product, sign, error;
};

// The terms of a gradient, as they are known when it is compiled. One that is not there after all has factors of 0.
enum GradientTerms : unsigned { kProduct = 1, kSign = 2, kSquares = 4, kArriving = 8 };

// What a block of the write pass does: kSpan columns of some rows, which its warps take in turns. The numbers that belong to its columns
// and rows are made once and lie in shared memory; those of a thread's columns stay in its registers.
//
// dx = product_c * product_p * (sgn(x) if absolute else 1) + sgn(x) * (sign_c + sign_p) + error_c * error_p * (x - target) + arriving
// x, target, arriving, out  levels of type X, those in the middle where there are such terms
template <class X, unsigned kTerms>
struct GradientTiles {
  static constexpr bool kErrors = kTerms & kSquares, kAdds = kTerms & kArriving, kAlwaysReads = kErrors || !(kTerms & kProduct);
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = std::is_same_v<X, Any> ? 1 : 2;
  static constexpr int kCount = kWidth<X>, kColumns = kSpan<X>;
  struct Shared {
    // Of product, sign and error. With a gap after every eight columns, so that a warp's threads read from different banks.
    float columns[3][kColumns + kColumns / 8], rows[3][kRowsOfBlock];
    float of_warp[kWarps];
  };

  Places places;
  Memory x[kLevels], target[kErrors ? kLevels : 1], arriving[kAdds ? kLevels : 1], out[kLevels];
  // reads: whether x is looked at, as all terms but a product do
  bool absolute, reads;

  // One tile of an image; returns the thread's share of the sum of squared errors. of_channel, of_pixel: (index in the image) -> Numbers
  template <class Me, class OfChannel, class OfPixel>
  KD_DEVICE float write(Me& me, Shared& shared, int level, int64_t n, int64_t tile, const OfChannel& of_channel,
                        const OfPixel& of_pixel) const {
    const Place& place = places.place[level];
    const int64_t length = place.last ? place.channels : place.pixels, height = place.last ? place.pixels : place.channels;
    const int64_t across = ceil_div<int64_t>(length, kColumns), first = tile % across * kColumns, begin = tile / across * kRowsOfBlock;
    const int rows = static_cast<int>(begin + kRowsOfBlock < height ? kRowsOfBlock : height - begin);
    const auto keep = [&](float* of_term, int terms_apart, bool there, bool channel, int64_t index) {
      const Numbers made = !there ? Numbers{0, 0, 0} : channel ? of_channel(index) : of_pixel(index);
      of_term[0] = made.product, of_term[terms_apart] = made.sign, of_term[2 * terms_apart] = made.error;
    };
    for (int i = me.index(); i < kColumns; i += kThreads) {
      keep(&shared.columns[0][i + i / 8], kColumns + kColumns / 8, first + i < length, place.last, first + i);
    }
    for (int i = me.index(); i < kRowsOfBlock; i += kThreads) {
      keep(&shared.rows[0][i], kRowsOfBlock, i < rows, !place.last, begin + i);
    }
    me.sync();
    const bool aligned = (!reads || x[level].aligned) && (!kErrors || target[kErrors ? level : 0].aligned) &&
                         (!kAdds || arriving[kAdds ? level : 0].aligned) && out[level].aligned;
    const int64_t at = n * place.channels * place.pixels + begin * length + first;
    return aligned ? write_rows<true>(me, shared, level, at, rows, length, left_of(length, first))
                   : write_rows<false>(me, shared, level, at, rows, length, left_of(length, first));
  }

 private:
  // at: the tile's first element;   length: of a row, of which `left` elements are from there on
  template <bool kAligned, class Me>
  KD_DEVICE float write_rows(Me& me, const Shared& shared, int level, int64_t at, int rows, int64_t length, int left) const {
    // Of the 16 bytes of a thread all are there, or none.
    constexpr bool kWhole = kAligned && !std::is_same_v<X, Any>;
    const int column = me.lane() * kCount;
    left -= column;
    at += me.warp() * kRows * length + column;
    if (kWhole && left <= 0) return 0;
    Numbers columns[kCount];
    KD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int place = column + i + (column + i) / 8;
      columns[i] = {shared.columns[0][place], shared.columns[1][place], shared.columns[2][place]};
    }
    float squares = 0;
    for (int row = me.warp() * kRows; row < rows; row += kWarps * kRows, at += kWarps * kRows * length) {
      Words<X> read[kRows], goal[kErrors ? kRows : 1], add[kAdds ? kRows : 1];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int there = row + r < rows ? left : 0;
        const int64_t from = at + r * length;
        if (kAlwaysReads || reads) get<kAligned>(x[level], from, there, read[r]);
        if (kErrors) get<kAligned>(target[kErrors ? level : 0], from, there, goal[kErrors ? r : 0]);
        if (kAdds) get<kAligned>(arriving[kAdds ? level : 0], from, there, add[kAdds ? r : 0]);
      }
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // The same for the whole warp, which stores together.
        if (row + r >= rows) continue;
        float made[kCount], value[kCount] = {}, wanted[kCount], arrived[kCount];
        if (kAlwaysReads || reads) Elements<X>::unpack(x[level], read[r], value);
        if (kErrors) Elements<X>::unpack(target[kErrors ? level : 0], goal[kErrors ? r : 0], wanted);
        if (kAdds) Elements<X>::unpack(arriving[kAdds ? level : 0], add[kAdds ? r : 0], arrived);
        const float of_product = shared.rows[0][row + r], of_sign = shared.rows[1][row + r], of_error = shared.rows[2][row + r];
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const float sign_of = kd::sign(value[i]);
          made[i] = kAdds ? arrived[i] : 0.0f;
          if (kTerms & kProduct) made[i] += of_product * columns[i].product * (absolute ? sign_of : 1.0f);
          if (kTerms & kSign) made[i] += sign_of * (of_sign + columns[i].sign);
          if (kErrors) {
            const float difference = value[i] - wanted[i];
            const float slope = of_error * columns[i].error * difference;
            made[i] += slope;
            if (kWhole || i < left) squares += slope * difference;
          }
        }
        const Memory& to = out[level];
        char* const place = const_cast<char*>(to.begin) + (at + r * length) * Elements<X>::bytes(to);
        Elements<X>::template put<kAligned>(me, to, place, left, made);
      }
    }
    return squares;
  }

  // The last read of these for a while.
  template <bool kAligned>
  KD_DEVICE static void get(const Memory& memory, int64_t at, int left, Words<X>& to) {
    Elements<X>::template get<true, kAligned>(memory, memory.begin + at * Elements<X>::bytes(memory), left, to);
  }
};

// An image of a level.
//   number       among those of the whole pyramid
//   map, vector  where it begins in packed maps (N, P) and vectors (N, C)
struct ImageOfLevel {
  const Place& place;
  int level;
  int64_t number, map, vector;
};

// The write pass of one launch: the tiles with their numbers.
//
// slopes  of_channel<kTerms> and of_pixel<kTerms>: (ImageOfLevel, index in it) -> Numbers
// parts   a number a block, its sum of squared errors, or null
// unless  on the device: not 0 if `out` is right already, and is to stay as it is; or null
template <class X, unsigned kTerms, class Slopes>
struct Gradient {
  using Tiles = GradientTiles<X, kTerms>;
  using Shared = typename Tiles::Shared;
  // Elements of 16 bits take more registers, as do several of the terms that read.
  static constexpr int kThreads = Tiles::kThreads;
  static constexpr int kResident = !Tiles::kErrors ? 3 : !std::is_same_v<X, float> ? 2 : kTerms == kSquares ? 4 : 3;

  Tiles tiles;
  Slopes slopes;
  float* parts;
  const int* unless;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    if (unless != nullptr && *unless != 0) return;
    const int level = tiles.places.of(me.block());
    const Place& place = tiles.places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks;
    const ImageOfLevel image{place, level, place.index * tiles.places.images + n, place.map + n * place.pixels,
                             place.vector + n * place.channels};
    const float squares = tiles.write(
        me, shared, level, n, within % place.blocks, [&](int64_t c) { return slopes.template of_channel<kTerms>(image, c); },
        [&](int64_t p) { return slopes.template of_pixel<kTerms>(image, p); });
    if (!Tiles::kErrors || parts == nullptr) return;
    const float total = block_sum(me, squares, shared.of_warp, Tiles::kWarps);
    if (me.index() == 0) parts[me.block()] = total;
  }
};

// Of each level and image half the sum of what its blocks left.
struct SumSquares {
  static constexpr int kThreads = 128, kResident = 4, kWarps = kThreads / kWarp;
  struct Shared {
    float of_warp[kWarps];
  };

  // Those of the write pass.
  Places places;
  const float* parts;
  float* values;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const Place& place = places.place[me.block() / places.images];
    const int64_t n = me.block() % places.images;
    const float* mine = parts + place.first + n * place.blocks;
    float total = 0;
    for (int64_t i = me.index(); i < place.blocks; i += kThreads) total += mine[i];
    total = block_sum(me, total, shared.of_warp, kWarps);
    if (me.index() == 0) values[place.index * places.images + n] = 0.5f * total;
  }
};

// A write pass but for its slopes.
//   terms     of GradientTerms;   target, arriving: of those that have them
//   absolute  of the product;     reads: whether a term looks at x
//   values    (L, N), filled with the sum of error_c * error_p * (x - target)^2 / 2, of which the error's part is the gradient; or null
//   unless    as in Gradient
struct WritePass {
  unsigned terms;
  const Pyramid *target, *arriving;
  bool absolute, reads;
  float* values;
  const int* unless;
};

// slopes_of: (places) -> what a launch of these levels takes.
template <class X, unsigned kTerms, class SlopesOf>
void write_as(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const WritePass& wanted, const SlopesOf& slopes_of,
              const Results& out) {
  using Tiles = GradientTiles<X, kTerms>;
  in_launches(x, write_blocks<X>, [&](const Places& places) {
    Gradient<X, kTerms, decltype(slopes_of(places))> pass{{}, slopes_of(places), nullptr, wanted.unless};
    pass.tiles.places = places;
    pass.tiles.absolute = wanted.absolute, pass.tiles.reads = wanted.reads;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.tiles.x[i] = memory_of(x[level]);
      if constexpr (Tiles::kErrors) pass.tiles.target[i] = memory_of((*wanted.target)[level]);
      if constexpr (Tiles::kAdds) pass.tiles.arriving[i] = memory_of((*wanted.arriving)[level]);
      pass.tiles.out[i] = memory_of(out[level]);
    }
    const Tensor parts = new_floats(like, {wanted.values != nullptr ? places.blocks() : 0});
    if (wanted.values != nullptr) pass.parts = floats(parts);
    device.launch(pass, places.blocks());
    if (wanted.values == nullptr) return;
    device.launch(SumSquares{places, floats(parts), wanted.values}, places.count * places.images);
  });
}

// Calls the first of the kernels that has all of the terms; what else it has is 0, so that it must not read what is not there.
template <class X, unsigned kTerms, unsigned... kOthers, class SlopesOf>
void write_by(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const WritePass& wanted, const SlopesOf& slopes_of,
              const Results& out) {
  constexpr unsigned kRead = kSquares | kArriving;
  if ((wanted.terms & ~kTerms) == 0 && (wanted.terms & kRead) == (kTerms & kRead)) {
    return write_as<X, kTerms>(device, like, x, wanted, slopes_of, out);
  }
  if constexpr (sizeof...(kOthers) > 0) {
    write_by<X, kOthers...>(device, like, x, wanted, slopes_of, out);
  } else {
    STD_TORCH_CHECK(false, "no write pass has the terms ", wanted.terms);
  }
}

}  // namespace kd
