"""`attention`: spatial and channel attention of FGD, BMFI and FBKD."""

from __future__ import annotations

from torch import Tensor

from .. import backend
from ..pyramid import Pyramid, as_pyramid
from ..reference.attention import attention as reference

backend.register("reference", "attention", reference)


def attention(x: Pyramid, temperature: float = 0.5) -> tuple[list[Tensor], list[Tensor]]:
    """S = H*W * softmax_hw(mean_c |x| / temperature) and Ch = C * softmax_c(mean_hw |x| / temperature), both of mean 1.

    Formulas of the released GKD code, the same as FGD's.

    x: pyramid of (N, C, H, W), 16-bit, fp32 or fp64. Returns S, L tensors (N, H, W), and Ch, L tensors (N, C); fp32 (fp64 for fp64).
    Raises ValueError for a temperature that is not above 0 or a malformed pyramid.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    levels, _ = as_pyramid("x", x)
    return backend.call("attention", levels, levels, temperature)
