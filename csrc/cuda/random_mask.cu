// `random_mask` on CUDA: pixels set to 0 that Philox chooses. The host does not look at the state.
#include "../include/random_pixels.h"
#include "gradient.h"

namespace kd {
namespace {

// What a block of the pass does: kSpan columns of some rows, as the write pass has them. The words that belong to its columns and rows are
// made once.
//
// x, out  levels of elements like X, of which only the size matters;   state: on the device
template <class X>
struct RandomMask {
  static constexpr int kThreads = 256, kResident = 3, kWarps = kThreads / kWarp, kRows = std::is_same_v<X, Any> ? 1 : 4;
  static constexpr int kCount = kWidth<X>, kColumns = kSpan<X>, kWords = Words<X>::kWords;
  struct Shared {
    // All bits where a pixel is kept, else none. With a gap after every eight columns, so that a warp's threads read from different banks.
    uint32_t columns[kColumns + kColumns / 8], rows[kRowsOfBlock];
  };

  Places places;
  Memory x[kLevels], out[kLevels];
  const int64_t* state;
  int64_t threshold;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks, tile = within % place.blocks;
    const int64_t length = place.last ? place.channels : place.pixels, height = place.last ? place.pixels : place.channels;
    const int64_t across = ceil_div<int64_t>(length, kColumns), first = tile % across * kColumns, begin = tile / across * kRowsOfBlock;
    const int rows = static_cast<int>(begin + kRowsOfBlock < height ? kRowsOfBlock : height - begin);
    const RandomPixels pixels(state, threshold);
    for (int i = me.index(); i < kColumns; i += kThreads) {
      shared.columns[i + i / 8] = place.last || pixels.keeps(first + i, n, place.index) ? ~0u : 0u;
    }
    for (int i = me.index(); i < kRowsOfBlock; i += kThreads) {
      shared.rows[i] = !place.last || pixels.keeps(begin + i, n, place.index) ? ~0u : 0u;
    }
    me.sync();
    const int64_t at = n * place.channels * place.pixels + begin * length + first;
    if (x[level].aligned && out[level].aligned) {
      select<true>(me, shared, level, at, rows, length, left_of(length, first));
    } else {
      select<false>(me, shared, level, at, rows, length, left_of(length, first));
    }
  }

 private:
  // at: the tile's first element;   length: of a row, of which `left` elements are from there on
  template <bool kAligned, class Me>
  KD_DEVICE void select(Me& me, const Shared& shared, int level, int64_t at, int rows, int64_t length, int left) const {
    const Memory &from = x[level], &to = out[level];
    const int64_t bytes = Elements<X>::bytes(from);
    const int column = me.lane() * kCount;
    uint32_t kept[kWords];
    KD_UNROLL
    for (int i = 0; i < kWords; ++i) kept[i] = of_word(shared, column, i, bytes == 2);
    left -= column;
    at += me.warp() * kRows * length + column;
    for (int row = me.warp() * kRows; row < rows; row += kWarps * kRows, at += kWarps * kRows * length) {
      Words<X> words[kRows];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // A row of a pixel that is not kept is zeros without being read.
        const int there = row + r < rows && shared.rows[row + r < rows ? row + r : 0] != 0 ? left : 0;
        Elements<X>::template get<true, kAligned>(from, from.begin + (at + r * length) * bytes, there, words[r]);
      }
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // The same for the whole warp, which stores together.
        if (row + r >= rows) continue;
        KD_UNROLL
        for (int i = 0; i < kWords; ++i) words[r].word[i] &= kept[i];
        Elements<X>::template put_words<kAligned>(me, to, const_cast<char*>(to.begin) + (at + r * length) * bytes, left, words[r]);
      }
    }
  }

  // The bits of a thread's word that are kept, of one column or of two.
  KD_DEVICE static uint32_t of_word(const Shared& shared, int column, int word, bool two) {
    const auto of = [&](int i) { return shared.columns[column + i + (column + i) / 8]; };
    if (!two) return of(word);
    // Of the widest type there are twice as many words as two bytes need.
    return 2 * word < kCount ? (of(2 * word) & 0xffffu) | (of(2 * word + 1) & 0xffff0000u) : 0;
  }
};

template <class X>
void random_mask_as(const OnDeviceOf& device, const Pyramid& x, const int64_t* state, int64_t threshold, const Results& out) {
  RandomMask<X> pass{};
  pass.state = state, pass.threshold = threshold;
  in_launches(x, write_blocks<X>, [&](const Places& places) {
    pass.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.x[i] = memory_of(x[level]), pass.out[i] = memory_of(out[level]);
    }
    device.launch(pass, places.blocks());
  });
}

std::vector<Tensor> random_mask(std::vector<Tensor> x, Tensor state, int64_t threshold) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  Results out(x, levels);
  const int64_t* const numbers = state_beside(x[0], state);
  by_type({&levels}, [&](auto type) {
    // Of either 16-bit type, whose bits are the same to this.
    using X = std::conditional_t<std::is_same_v<decltype(type), BFloat16>, Half, decltype(type)>;
    random_mask_as<X>(device, levels, numbers, threshold, out);
  });
  return out.finish();
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) { m.impl("random_mask", TORCH_BOX(&kd::random_mask)); }
