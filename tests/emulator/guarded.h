// Memory of an exact size: what is touched outside of it is noticed.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

namespace kd {

// Pages, and behind them one that nobody may touch: the bytes end `slack` bytes before that one. What else the pages have is filled with a
// number that must stay.
class Guarded {
 public:
  Guarded(const std::string& bytes, size_t slack)
      : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), size_(bytes.size()), whole_((size_ + slack + 2 * page_ - 1) / page_ * page_) {
    void* const made = mmap(nullptr, whole_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<char*>(made);
    begin_ = pages_ + whole_ - slack - size_;
    memset(pages_, FILLED, whole_);
    memcpy(begin_, bytes.data(), size_);
    mprotect(pages_ + whole_, page_, PROT_NONE);
  }
  ~Guarded() { munmap(pages_, whole_ + page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* begin() const { return begin_; }
  size_t size() const { return size_; }
  bool intact() const {
    for (const char* at = pages_; at < pages_ + whole_; ++at) {
      if ((at < begin_ || at >= begin_ + size_) && *at != FILLED) return false;
    }
    return true;
  }

 private:
  static constexpr char FILLED = 0x5a;

  size_t page_, size_, whole_;
  char *pages_, *begin_;
};

inline sigjmp_buf& out_of_trouble() {
  static sigjmp_buf place;
  return place;
}

// Calls run(), and raises std::out_of_range where that touches memory that is not there. What it had made is then lost, unfreed.
template <class Run>
void guarded(const Run& run) {
  struct sigaction jump {}, before {};
  jump.sa_handler = [](int) { siglongjmp(out_of_trouble(), 1); };
  sigemptyset(&jump.sa_mask);
  sigaction(SIGSEGV, &jump, &before);
  if (sigsetjmp(out_of_trouble(), 1) != 0) {
    sigaction(SIGSEGV, &before, nullptr);
    throw std::out_of_range("outside of the memory");
  }
  run();
  sigaction(SIGSEGV, &before, nullptr);
}

}  // namespace kd
