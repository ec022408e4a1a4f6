// The CUDA kernels' launches on a CPU: each thread of a launch is a fiber, which runs until it waits for others. What csrc/cuda/launch.h
// has for a GPU has the same names here.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

// The operators of a file, for CPU tensors, in a library of the tests' own.
#define KD_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(kdkernels_emulated, CPU, m)

namespace kd {

// What a launch meets.
struct Machine {
  // The order in which threads and blocks run: 0 as they are numbered, 1 backwards, others at random by this seed.
  uint64_t seed = 0;
  // Blocks that are there at the same time, of launches whose blocks wait for each other.
  int64_t processors = 3;
};

// Since the last reset.
struct Counts {
  int64_t launches = 0, blocks = 0;
  // Of features and gradients, in vectors of 16 bytes.
  int64_t bytes_read = 0, bytes_written = 0;
};

Machine& machine();
Counts& counts();

class Fiber;

class AnyThread {
 public:
  int index() const { return index_; }
  int lane() const { return index_ % kWarp; }
  int warp() const { return index_ / kWarp; }
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }
  void sync();
  template <class T>
  T across(T x, int mask) {
    return exchange(x, lane() ^ mask);
  }
  template <class T>
  T up(T x, int by) {
    return exchange(x, lane() < by ? lane() : lane() - by);
  }
  int add(int* counter, int x) {
    const int before = *counter;
    *counter += x;
    return before;
  }
  void wait_for(const int* counter, int sum) {
    while (*counter < sum) pause();
  }
  int take(int* counter) { return add(counter, 1); }

 private:
  friend class Emulation;

  // Lets others run.
  void pause();
  // Waits for the threads of a group, by its number.
  void wait(size_t group);
  // What the thread of this lane passes at the same call.
  uint64_t passed(uint64_t mine, int lane);

  template <class T>
  T exchange(T x, int lane) {
    static_assert(sizeof(T) <= 8, "passed in a word of 64 bits");
    uint64_t word = 0;
    memcpy(&word, &x, sizeof(x));
    word = passed(word, lane);
    memcpy(&x, &word, sizeof(x));
    return x;
  }

  int index_;
  int64_t block_, blocks_;
  class Block* of_;
};

template <int kOfBlock>
class Thread : public AnyThread {
 public:
  static constexpr int kThreads = kOfBlock;
};

// Runs body(thread, shared) for every thread of every block; `together`: all blocks at the same time, as far as they can go.
void emulate(int64_t blocks, int threads, size_t shared_bytes, bool together, const std::function<void(AnyThread&, void*)>& body);

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}

  template <class Kernel>
  void launch(const Kernel& kernel, int64_t blocks) const {
    go(kernel, blocks, false);
  }
  template <class Kernel>
  void launch_together(const Kernel& kernel, int64_t most) const {
    go(kernel, std::min(most, machine().processors), true);
  }

 private:
  template <class Kernel>
  static void go(const Kernel& kernel, int64_t blocks, bool together) {
    static_assert(Kernel::kThreads % kWarp == 0, "whole warps");
    emulate(blocks, Kernel::kThreads, sizeof(typename Kernel::Shared), together,
            [&](AnyThread& me, void* shared) {
              kernel(static_cast<Thread<Kernel::kThreads>&>(me), *static_cast<typename Kernel::Shared*>(shared));
            });
  }
};

}  // namespace kd
