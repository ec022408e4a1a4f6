// The kernels' inner functions, for the tests. Floats come and go as the bytes of fp32 numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/levels.h"
#include "../../csrc/cuda/sums.h"
#include "guarded.h"

namespace py = pybind11;

namespace kd {
namespace {

using Floats = std::vector<float>;

Floats floats_of(const std::string& bytes) {
  Floats floats(bytes.size() / sizeof(float));
  memcpy(floats.data(), bytes.data(), floats.size() * sizeof(float));
  return floats;
}

py::bytes bytes_of(const Floats& floats) { return py::bytes(reinterpret_cast<const char*>(floats.data()), floats.size() * sizeof(float)); }

template <class Kernel>
void launch(const Kernel& kernel, int64_t blocks) {
  OnDeviceOf(Tensor()).launch(kernel, blocks);
}

Type type_named(const std::string& name) { return name == "fp32" ? Type::fp32 : name == "fp16" ? Type::fp16 : Type::bf16; }

// Calls run(X()) with the C++ type, Any() with `any`.
template <class Run>
void with_type(const std::string& name, bool any, const Run& run) {
  if (any) return run(Any());
  if (name == "fp32") return run(float());
  if (name == "fp16") return run(Half());
  run(BFloat16());
}

// A level of one image, contiguous, whose rows are channels.
Level level_in(const Guarded& memory, const std::string& type, int64_t length) {
  const int64_t rows = static_cast<int64_t>(memory.size()) / (length * kd::bytes_of(type_named(type)));
  return {memory.begin(), type_named(type), 1, rows, length, false};
}

// One row of a level to or from floats: a block a warp's columns.
template <class X, bool kStore>
struct Row {
  static constexpr int kThreads = kWarp, kCount = kWidth<X>;
  struct Shared {};

  Memory memory;
  int64_t begin, length;
  float* floats;

  template <class Me>
  void operator()(Me& me, Shared&) const {
    const int64_t column = me.block() * kSpan<X> + me.lane() * kCount;
    char* const at = const_cast<char*>(memory.begin) + (begin + column) * Elements<X>::bytes(memory);
    memory.aligned ? move<true>(me, at, column) : move<false>(me, at, column);
  }

 private:
  template <bool kAligned, class Me>
  void move(Me& me, char* at, int64_t column) const {
    float x[kCount];
    if (kStore) {
      for (int i = 0; i < kCount; ++i) x[i] = floats[column + i];
      Elements<X>::template put<kAligned>(me, memory, at, left_of(length, column), x);
    } else {
      Words<X> packed;
      Elements<X>::template get<false, kAligned>(memory, at, left_of(length, column), packed);
      Elements<X>::unpack(memory, packed, x);
      for (int i = 0; i < kCount; ++i) floats[column + i] = x[i];
    }
  }
};

// What a warp's threads load of a row, or store to it: floats for whole warps, those beyond the row too.
template <bool kStore>
Floats row(const Guarded& memory, const std::string& type, bool any, int64_t length, int64_t number, Floats floats) {
  with_type(type, any, [&](auto x) {
    using X = decltype(x);
    const int64_t blocks = ceil_div<int64_t>(length, kSpan<X>);
    floats.resize(blocks * kSpan<X>);
    guarded([&] { launch(Row<X, kStore>{memory_of(level_in(memory, type, length)), number * length, length, floats.data()}, blocks); });
  });
  return floats;
}

template <int kWords>
std::vector<uint32_t> shifted(const std::vector<uint32_t>& given, int bytes) {
  uint32_t words[kWords + 4];
  std::copy_n(given.begin(), kWords + 4, words);
  shift_down<kWords>(words, bytes);
  return {words, words + kWords};
}

template <class X>
std::string narrowed(const Floats& x) {
  constexpr size_t kPerWord = 4 / Codec<X>::kBytes;
  std::string bytes;
  for (size_t word = 0; word < x.size() / kPerWord; ++word) {
    const uint32_t bits = Codec<X>::narrow(x.data(), static_cast<int>(word));
    bytes.append(reinterpret_cast<const char*>(&bits), sizeof(bits));
  }
  return bytes;
}

template <class X>
Floats widened(const std::string& bytes) {
  std::vector<uint32_t> words(bytes.size() / 4);
  memcpy(words.data(), bytes.data(), bytes.size());
  Floats x(bytes.size() / Codec<X>::kBytes);
  for (size_t i = 0; i < x.size(); ++i) x[i] = Codec<X>::wide(words.data(), static_cast<int>(i));
  return x;
}

// What each thread of two blocks gets of a function that threads call together.
template <class Function>
struct Together {
  static constexpr int kThreads = 96;
  struct Shared {
    float of_thread[kThreads];
  };

  const float* in;
  float* out;
  Function function;

  template <class Me>
  void operator()(Me& me, Shared& shared) const {
    out[me.block() * kThreads + me.index()] = function(me, shared.of_thread, in);
  }
};

template <class Function>
py::bytes together(const std::string& in, const Function& function) {
  using Kernel = Together<Function>;
  constexpr int64_t kBlocks = 2;
  const Floats given = floats_of(in);
  Floats found(kBlocks * Kernel::kThreads);
  launch(Kernel{given.data(), found.data(), function}, kBlocks);
  return bytes_of(found);
}

// Its blocks wait for each other, so that all have to be there at once: how many they are.
struct Meeting {
  static constexpr int kThreads = kWarp;
  struct Shared {};

  int* arrived;

  template <class Me>
  void operator()(Me& me, Shared&) const {
    if (me.index() == 0) me.add(arrived, 1);
    me.wait_for(arrived, static_cast<int>(me.blocks()));
  }
};

// The launches for levels with so many blocks for an image each: of every launch its blocks, each a level and a block of that level.
py::list launches(int64_t images, const std::vector<int64_t>& blocks) {
  std::vector<Place> all;
  for (const int64_t count : blocks) {
    Place place{};
    place.blocks = count, place.index = static_cast<int>(all.size());
    all.push_back(place);
  }
  py::list found;
  in_launches(images, all, [&](const Places& places) {
    py::list levels;
    for (int64_t block = 0; block < places.blocks(); ++block) {
      const Place& place = places.place[places.of(block)];
      levels.append(py::make_tuple(place.index, block - place.first));
    }
    found.append(levels);
  });
  return found;
}

}  // namespace

void bind_inner(py::module_& m) {
  py::class_<Guarded>(m, "Guarded", "These bytes, `slack` bytes before memory that nobody may touch.")
      .def(py::init<const std::string&, size_t>(), py::arg("bytes"), py::arg("slack") = 0)
      .def("bytes", [](const Guarded& memory) { return py::bytes(memory.begin(), memory.size()); })
      .def_property_readonly("misalignment", [](const Guarded& memory) { return misalignment(memory.begin()); })
      .def("intact", &Guarded::intact, "Whether nobody has written around them.")
      .def("at", [](const Guarded& memory, size_t place) {
        int found = 0;
        guarded([&] { found = *static_cast<const volatile unsigned char*>(static_cast<void*>(memory.begin() + place)); });
        return found;
      });
  m.def(
      "load_row",
      [](const Guarded& memory, const std::string& type, bool any, int64_t length, int64_t number) {
        return bytes_of(row<false>(memory, type, any, length, number, {}));
      },
      "Row `number` of a level with rows of this length, as the threads of whole warps see it. Raises IndexError outside of the level.");
  m.def(
      "store_row",
      [](const Guarded& memory, const std::string& type, bool any, int64_t length, int64_t number, const std::string& floats) {
        row<true>(memory, type, any, length, number, floats_of(floats));
      },
      "Stores whole warps' floats, of which the row takes the first ones.");
  m.def("span", [](bool sixteen_bits) { return sixteen_bits ? kSpan<Half> : kSpan<float>; }, "Elements that a warp takes of a row.");
  m.def("funnel", &funnel);
  m.def("shift_down", [](const std::vector<uint32_t>& words, int bytes) {
    return words.size() == 8 ? shifted<4>(words, bytes) : shifted<8>(words, bytes);
  });
  m.def("narrow", [](const std::string& type, const std::string& floats) {
    const Floats x = floats_of(floats);
    return py::bytes(type == "fp32" ? narrowed<float>(x) : type == "fp16" ? narrowed<Half>(x) : narrowed<BFloat16>(x));
  });
  m.def("widen", [](const std::string& type, const std::string& bytes) {
    return bytes_of(type == "fp32" ? widened<float>(bytes) : type == "fp16" ? widened<Half>(bytes) : widened<BFloat16>(bytes));
  });
  m.def("launches", &launches);
  m.def("warp_sum", [](const std::string& x) {
    return together(x, [](auto& me, float*, const float* in) { return warp_sum(me, in[me.index()]); });
  });
  m.def("warp_sums", [](const std::string& x) {
    return together(x, [](auto& me, float*, const float* in) {
      const float* mine = in + 4 * me.index();
      return warp_sums(me, {mine[0], mine[1], mine[2], mine[3]});
    });
  });
  m.def("block_sum", [](const std::string& x) {
    return together(x, [](auto& me, float* shared, const float* in) {
      const float first = block_sum(me, in[me.index()], shared, 3);
      // The room is free again: a second sum must not disturb the first.
      return first + block_sum(me, 0.0f, shared, 3);
    });
  });
  m.def("across", [](const std::string& x, int mask) {
    return together(x, [mask](auto& me, float*, const float* in) { return me.across(in[me.index()], mask); });
  });
  m.def("up", [](const std::string& x, int by) {
    return together(x, [by](auto& me, float*, const float* in) { return me.up(in[me.index()], by); });
  });
  m.def(
      "next_of_block",
      [](const std::string& x, bool sync) {
        return together(x, [sync](auto& me, float* shared, const float* in) {
          shared[me.index()] = in[me.index()];
          if (sync) me.sync();
          return shared[(me.index() + 1) % 96];
        });
      },
      "Each thread's neighbour's number through shared memory; a race without `sync`.");
  m.def("meeting", [](int64_t most) {
    int arrived = 0;
    OnDeviceOf(Tensor()).launch_together(Meeting{&arrived}, most);
    return arrived;
  });
}

}  // namespace kd
