#include "maps.h"

#include <torch/headeronly/util/Half.h>

#include <limits>

#define KD_KERNELS "maps.inl"
#include "each_isa.h"

namespace kd {

const MapKernels& map_kernels() { return chosen(scalar::kernels, avx2::kernels, avx512::kernels); }

}  // namespace kd
