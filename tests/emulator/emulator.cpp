#include "../../csrc/cuda/launch.h"

#include <csetjmp>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <ucontext.h>
#include <vector>

namespace kd {

Machine& machine() {
  static Machine machine;
  return machine;
}

Counts& counts() {
  static Counts counts;
  return counts;
}

namespace {

void check_aligned(const char* at, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) throw std::runtime_error("an access that is not aligned to its size");
}

constexpr size_t STACK = size_t{64} << 10;

// Numbers 0..count-1 in the order of the machine.
class Order {
 public:
  explicit Order(uint64_t seed) : seed_(seed), random_(seed) {}

  std::vector<int64_t> of(int64_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t{0});
    if (seed_ == 1) std::reverse(order.begin(), order.end());
    if (seed_ > 1) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

 private:
  uint64_t seed_;
  std::mt19937_64 random_;
};

}  // namespace

void count_read(const char* at, int64_t bytes) {
  check_aligned(at, bytes);
  counts().bytes_read += bytes;
}

void count_written(const char* at, int64_t bytes) {
  check_aligned(at, bytes);
  counts().bytes_written += bytes;
}

// One thread's run of the kernel, which goes on where it stopped. After the first time it is entered and left by jumps: a change of
// context asks the system for the signals' mask each time.
class Fiber {
 public:
  Fiber() : stack_(new char[STACK]) {}

  void start(std::function<void()> body) {
    body_ = std::move(body);
    fresh_ = true;
    done_ = false;
  }
  bool done() const { return done_; }

  // Lets the fiber run until it leaves; raises what it raised.
  void enter() {
    if (_setjmp(outside_) == 0) {
      if (!fresh_) _longjmp(inside_, 1);
      fresh_ = false;
      getcontext(&context_);
      context_.uc_stack.ss_sp = stack_.get();
      context_.uc_stack.ss_size = STACK;
      context_.uc_link = nullptr;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::begin), 2, static_cast<unsigned>(self),
                  static_cast<unsigned>(self >> 32));
      setcontext(&context_);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void leave() {
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
  }

 private:
  static void begin(unsigned low, unsigned high) {
    Fiber* const self = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
    try {
      self->body_();
    } catch (...) {
      self->error_ = std::current_exception();
    }
    self->done_ = true;
    _longjmp(self->outside_, 1);
  }

  std::unique_ptr<char[]> stack_;
  std::function<void()> body_;
  std::exception_ptr error_;
  ucontext_t context_;
  jmp_buf outside_, inside_;
  bool fresh_ = false, done_ = true;
};

// Threads that wait for each other: a warp, or a block. Those that have ended are waited for no more.
struct Group {
  int alive = 0, arrived = 0;
  uint64_t turn = 0;

  void go_on_if_all() {
    if (arrived < alive) return;
    arrived = 0;
    ++turn;
  }
};

class Block {
 public:
  Block(int threads, size_t shared_bytes)
      : fibers(threads), groups(threads / kWarp + 1), passing(threads), shared((shared_bytes + 15) / 16 * 2) {}

  // By their places: each warp, and behind them the block.
  std::vector<Fiber> fibers;
  std::vector<Group> groups;
  std::vector<AnyThread> threads;
  std::vector<uint64_t> passing;
  std::vector<uint64_t> shared;
};

void AnyThread::wait(size_t place) {
  Group& group = of_->groups[place];
  const uint64_t turn = group.turn;
  ++group.arrived;
  group.go_on_if_all();
  while (group.turn == turn) of_->fibers[index_].leave();
}

void AnyThread::sync() { wait(of_->groups.size() - 1); }

void AnyThread::pause() { of_->fibers[index_].leave(); }

uint64_t AnyThread::passed(uint64_t mine, int lane) {
  of_->passing[index_] = mine;
  wait(warp());
  const uint64_t found = of_->passing[index_ - this->lane() + lane];
  wait(warp());
  return found;
}

class Emulation {
 public:
  Emulation(int64_t blocks, int threads, size_t shared_bytes, const std::function<void(AnyThread&, void*)>& body)
      : count_(blocks), threads_(threads), shared_bytes_(shared_bytes), body_(body), order_(machine().seed) {}

  void one_by_one() {
    Block block(threads_, shared_bytes_);
    for (const int64_t number : order_.of(count_)) {
      begin(block, number);
      while (turn(block)) {
      }
    }
  }

  void together() {
    std::vector<std::unique_ptr<Block>> blocks;
    for (int64_t number = 0; number < count_; ++number) {
      blocks.push_back(std::make_unique<Block>(threads_, shared_bytes_));
      begin(*blocks.back(), number);
    }
    for (bool going = true; going;) {
      going = false;
      for (const int64_t number : order_.of(count_)) going = turn(*blocks[number]) || going;
    }
  }

 private:
  void begin(Block& block, int64_t number) {
    // NaN, as what nobody wrote is.
    std::fill(block.shared.begin(), block.shared.end(), ~uint64_t{0});
    for (size_t place = 0; place < block.groups.size(); ++place) {
      block.groups[place] = {place + 1 == block.groups.size() ? threads_ : kWarp, 0, 0};
    }
    block.threads.assign(threads_, AnyThread());
    for (int i = 0; i < threads_; ++i) {
      AnyThread& thread = block.threads[i];
      thread.index_ = i, thread.block_ = number, thread.blocks_ = count_, thread.of_ = &block;
      block.fibers[i].start([this, &thread, &block] { body_(thread, block.shared.data()); });
    }
  }

  // Lets every thread run until it waits; whether any has still something to do.
  bool turn(Block& block) {
    bool going = false;
    for (const int64_t i : order_.of(threads_)) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done()) continue;
      fiber.enter();
      going = true;
      if (!fiber.done()) continue;
      for (Group* group : {&block.groups[i / kWarp], &block.groups.back()}) {
        --group->alive;
        if (group->arrived > 0) group->go_on_if_all();
      }
    }
    return going;
  }

  int64_t count_;
  int threads_;
  size_t shared_bytes_;
  const std::function<void(AnyThread&, void*)>& body_;
  Order order_;
};

void emulate(int64_t blocks, int threads, size_t shared_bytes, bool together, const std::function<void(AnyThread&, void*)>& body) {
  ++counts().launches;
  counts().blocks += blocks;
  Emulation emulation(blocks, threads, shared_bytes, body);
  together ? emulation.together() : emulation.one_by_one();
}

}  // namespace kd
