#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>

namespace kd {
namespace {

bool has(Isa set) {
#if KD_X86
  if (set == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  }
  // F16C, for which older compilers have no name here, is older than AVX2.
  if (set == Isa::avx2) return __builtin_cpu_supports("avx2");
#endif
  return set == Isa::scalar;
}

Isa named(const std::string& name) {
  for (const Isa set : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (name_of(set) != name) continue;
    STD_TORCH_CHECK(has(set), "this machine has no ", name, " instructions");
    return set;
  }
  STD_TORCH_CHECK(false, "unknown instructions '", name, "'; there are scalar, avx2 and avx512");
}

Isa first_choice() {
  const char* wanted = std::getenv("KDKERNELS_CPU_CAPABILITY");
  if (wanted != nullptr && *wanted != '\0') return named(wanted);
  return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

std::atomic<Isa>& choice() {
  static std::atomic<Isa> value{first_choice()};
  return value;
}

}  // namespace

Isa isa() { return choice().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { choice().store(named(name)); }

std::string name_of(Isa set) { return set == Isa::avx512 ? "avx512" : set == Isa::avx2 ? "avx2" : "scalar"; }

}  // namespace kd
