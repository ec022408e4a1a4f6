"""What nvcc has made of the native library's CUDA kernels: registers, shared memory, spills, occupancy, widths of memory accesses."""
