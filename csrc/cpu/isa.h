// Which instructions the kernels use. Every kernel is compiled once a set, chosen when it is called; all sets give the same bits.
#pragma once

#include <cstdint>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define KD_X86 1
#else
#define KD_X86 0
#endif

namespace kd {

// Floats that are worked on at a time, whatever a register holds.
constexpr int64_t LANES = 16;

enum class Isa { scalar, avx2, avx512 };

// The best of this machine, unless KDKERNELS_CPU_CAPABILITY or `set_isa` names a lesser one.
Isa isa();

// Raises for a name other than scalar, avx2 and avx512 and for instructions that this machine has not.
void set_isa(const std::string& name);

std::string name_of(Isa set);

// Of three tables of kernels the one to call.
template <class Table>
const Table& chosen(const Table& scalar, const Table& avx2, const Table& avx512) {
  const Isa set = isa();
  return set == Isa::avx512 ? avx512 : set == Isa::avx2 ? avx2 : scalar;
}

}  // namespace kd
