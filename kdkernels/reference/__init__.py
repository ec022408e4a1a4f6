"""Every primitive in plain PyTorch: its definition, the oracle of the fused kernels and their fallback."""
