"""`kdkernels bench tune`: launch parameters of the large Triton kernels, chosen by time on the GPU that is there."""
