// Which instructions the CPU kernels use, as operators: for `kdkernels info` and for tests that try all.
#include <torch/csrc/stable/library.h>

#include "isa.h"

namespace kd {
namespace {

std::string cpu_capability() { return name_of(isa()); }

void set_cpu_capability(std::string name) { set_isa(name); }

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&kd::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&kd::set_cpu_capability));
}
