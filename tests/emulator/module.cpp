// What the tests set and read of the emulator, and the kernels' inner functions. The operators come with the library itself.
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/launch.h"

namespace py = pybind11;

namespace kd {
// In inner.cpp.
void bind_inner(py::module_& m);
}  // namespace kd

PYBIND11_MODULE(kdkernels_emulated, m) {
  m.doc() = "The CUDA kernels of kdkernels, emulated on a CPU: operators torch.ops.kdkernels_emulated";
  m.def(
      "set_machine",
      [](uint64_t seed, int64_t processors) {
        kd::machine().seed = seed;
        kd::machine().processors = processors;
      },
      py::arg("seed") = 0, py::arg("processors") = 3,
      "seed: order of threads and blocks, 0 as numbered, 1 backwards, others random. processors: blocks of a cooperative launch.");
  m.def(
      "counts",
      [] {
        const kd::Counts& now = kd::counts();
        py::dict found;
        found["launches"] = now.launches;
        found["blocks"] = now.blocks;
        found["bytes_read"] = now.bytes_read;
        found["bytes_written"] = now.bytes_written;
        return found;
      },
      "Launches, blocks, and bytes of features and gradients moved in vectors since `reset_counts`.");
  m.def("reset_counts", [] { kd::counts() = kd::Counts(); });
  kd::bind_inner(m);
}
