"""`shared_read`: attention and weighted channel sum of the same features, as the teacher's side of GKD-BMFI needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..library import define
from ..pyramid import Pyramid, constant, pack, unpack
from ..reference.shared_read import shared_read as reference
from .attention import check_temperature, packed_attention, unpack_attention
from .weighted_channel_sum import check_weights, rectified


def shared_read(
    x: Pyramid, w: Sequence[Tensor], activation: str = "raw", rectify: str = "abs", temperature: float = 0.5
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The maps of `weighted_channel_sum`, without their extrema, and the two results of `attention`, where possible in one read of x.

    x: pyramid of (N, C, H, W); w: one (N, C) a level, or (N, C, H, W) for a weight per element. 16-bit, fp32 or fp64.
    Returns the maps (N, H, W), S (N, H, W) and Ch (N, C), each a list of L; fp32 (maps fp64 if x or w is, the others if x is).
    Raises ValueError as those two do.
    """
    check_temperature(temperature)
    levels = check_weights(x, w, activation, rectify)
    return backend.call("shared_read", [*levels, *w], levels, list(w), activation, rectify, temperature)


def _fake(x: Sequence[Tensor], w: Tensor, absolute: bool, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    spatial, channel = packed_attention(x)
    return torch.empty_like(spatial), spatial, channel


_forward = define("shared_read", "(Tensor[] x, Tensor w, bool absolute, float temperature) -> (Tensor, Tensor, Tensor)", _fake)


def fused(
    name: str, x: list[Tensor], w: list[Tensor], activation: str, rectify: str, temperature: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`shared_read` by the kernels of backend `name`; not differentiable."""
    if not x:
        return [], [], []
    raw, spatial, channel = _forward(name, x, pack([constant(v) for v in w]), activation == "abs", temperature)
    return unpack(rectified(raw, rectify), [(a.shape[0], *a.shape[2:]) for a in x]), *unpack_attention(spatial, channel, x)


def _refuses(x: list[Tensor], w: list[Tensor], *options: object) -> str:
    if any(v.dim() == 4 for v in w):
        return "a weight per element is in the reference only"
    return backend.refuses_constants([*x, *w], x[0].device, "features or weights")


backend.register("reference", "shared_read", reference)
backend.register_fused("shared_read", fused, _refuses)
