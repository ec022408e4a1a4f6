"""What the compiler makes of the GPU kernels, told without a GPU: registers, spills, widths of memory accesses, variants, seconds.

The modules here are about the Triton kernels, those of native/ about the native library's.
"""
