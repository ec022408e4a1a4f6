"""Random features for tests of kernels, in every layout and type, and how far results are from what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pyramid(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0, device: str = "cpu"
) -> list[Tensor]:
    """Normal random levels of these shapes, or small tensors of any other number of dimensions."""
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.contiguous(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x for x in levels]


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; 0 when both are 0."""
    difference = (got.double().cpu() - want.double().cpu()).norm()
    return float(difference / want.double().cpu().norm()) if float(difference) else 0.0
