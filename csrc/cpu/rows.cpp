#include "rows.h"

#include <torch/headeronly/util/Half.h>

#define KD_KERNELS "rows.inl"
#include "each_isa.h"

namespace kd {

const RowKernels& row_kernels() { return chosen(scalar::kernels, avx2::kernels, avx512::kernels); }

}  // namespace kd
