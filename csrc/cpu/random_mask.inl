namespace kd {
namespace KD_ISA {

static void choose(const RandomPixels& pixels, int64_t first, int64_t image, int64_t level, int64_t count, uint32_t* kept) {
  // A copy that nothing points to, so that no store makes the compiler read it again.
  const RandomPixels mine = pixels;
  for (int64_t i = 0; i < count; ++i) kept[i] = mine.keeps(first + i, image, level) ? ~0u : 0u;
}

// Bits, not numbers: what is masked may be NaN. Rows begin anywhere.
template <class Word>
static void select(const char* __restrict__ from, const uint32_t* __restrict__ kept, int64_t count, char* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, from + i * sizeof(Word), sizeof(Word));
    word &= static_cast<Word>(kept[i]);
    std::memcpy(to + i * sizeof(Word), &word, sizeof(Word));
  }
}

static const RandomMaskKernels kernels = {choose, {select<uint32_t>, select<uint16_t>}};

}  // namespace KD_ISA
}  // namespace kd
