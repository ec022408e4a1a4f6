"""`attention`: spatial and channel attention of FGD, BMFI and FBKD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, once_differentiable
from ..pyramid import Pyramid, as_pyramid, in_graph, unpack
from ..reference.attention import attention as reference


def attention(x: Pyramid, temperature: float = 0.5) -> tuple[list[Tensor], list[Tensor]]:
    """S = H*W * softmax_hw(mean_c |x| / temperature) and Ch = C * softmax_c(mean_hw |x| / temperature), both of mean 1.

    Formulas of the released GKD code, the same as FGD's.

    x: pyramid of (N, C, H, W), 16-bit, fp32 or fp64. Returns S, L tensors (N, H, W), and Ch, L tensors (N, C); fp32 (fp64 for fp64).
    Raises ValueError for a temperature that is not above 0 or a malformed pyramid.
    """
    check_temperature(temperature)
    levels, _ = as_pyramid("x", x)
    return backend.call("attention", levels, levels, temperature)


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")


def packed_attention(x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Empty buffers of the size and type of all levels' maps (N, H, W) and of all channel vectors (N, C)."""
    maps, vectors = sum(a.shape[0] * a.shape[2] * a.shape[3] for a in x), sum(a.shape[0] * a.shape[1] for a in x)
    return x[0].new_empty(maps, dtype=torch.float32), x[0].new_empty(vectors, dtype=torch.float32)


def unpack_attention(spatial: Tensor, channel: Tensor, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """S and Ch of every level of x, as views of the packed ones."""
    return unpack(spatial, [(a.shape[0], *a.shape[2:]) for a in x]), unpack(channel, [a.shape[:2] for a in x])


_forward = define("attention", "(Tensor[] x, float temperature) -> (Tensor, Tensor)", lambda x, temperature: packed_attention(x))
_backward = define(
    "attention_backward",
    "(Tensor[] x, Tensor spatial, Tensor channel, Tensor grad_spatial, Tensor grad_channel, float temperature) -> Tensor[]",
    lambda x, *args: [torch.empty_like(a) for a in x],
)


class _Attention(torch.autograd.Function):
    """S and Ch of all levels, packed."""

    @staticmethod
    def forward(ctx: Any, name: str, temperature: float, *x: Tensor) -> tuple[Tensor, Tensor]:
        spatial, channel = _forward(name, list(x), temperature)
        ctx.name, ctx.temperature = name, temperature
        ctx.save_for_backward(spatial, channel, *x)
        return spatial, channel

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spatial: Tensor, grad_channel: Tensor) -> tuple[Any, ...]:
        spatial, channel, *x = ctx.saved_tensors
        gradients = _backward(ctx.name, x, spatial, channel, grad_spatial.contiguous(), grad_channel.contiguous(), ctx.temperature)
        return (None, None, *gradients)


def fused(name: str, x: list[Tensor], temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """`attention` by the kernels of backend `name`."""
    if not x:
        return [], []
    spatial, channel = _Attention.apply(name, temperature, *x) if in_graph(x) else _forward(name, list(x), temperature)
    return unpack_attention(spatial, channel, x)


backend.register("reference", "attention", reference)
backend.register_fused("attention", fused)
