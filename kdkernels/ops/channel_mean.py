"""`channel_mean`: GKD's channel weights, the spatial mean of gradients."""

from __future__ import annotations

from torch import Tensor

from .. import backend
from ..pyramid import Pyramid, as_pyramid, check_choice
from ..reference.channel_mean import channel_mean as reference

MODES = ("signed", "abs")
backend.register("reference", "channel_mean", reference)


def channel_mean(x: Pyramid, mode: str = "signed") -> list[Tensor]:
    """Mean over H, W of x (`signed`, GKD Eq. 1) or of |x| (`abs`, the released code).

    x: pyramid of (N, C, H, W), 16-bit, fp32 or fp64. Returns L tensors (N, C), fp32 (fp64 for fp64).
    Raises ValueError for an unknown mode or a malformed pyramid.
    """
    check_choice("mode", mode, MODES)
    levels, _ = as_pyramid("x", x)
    return backend.call("channel_mean", levels, levels, mode)
