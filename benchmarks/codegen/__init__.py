"""What the compiler makes of the Triton kernels, told without a GPU: registers, spills, widths of memory accesses, variants, seconds."""
