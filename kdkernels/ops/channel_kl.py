"""`channel_kl`: the divergence of two networks' channels, each a distribution over its pixels (CWD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, keep, kept, once_differentiable
from ..pyramid import Pyramid, as_pyramid, check_match, in_graph, stack_levels
from ..reference.channel_kl import channel_kl as reference
from .attention import check_temperature


def channel_kl(s: Pyramid, t: Pyramid, temperature: float = 1.0, entropy: bool = True) -> Tensor:
    """sum_c KL(p_c || q_c) with p_c = softmax_hw(t_c / temperature) and q_c = softmax_hw(s_c / temperature), without a normaliser;
    without `entropy` the cross-entropy, -sum_c sum_hw p_c log q_c. Channel-wise distillation, arXiv 2011.13256.

    s, t: pyramids of (N, C, H, W), each 16-bit, fp32 or fp64; t is a constant.
    Returns (L, N), fp32 (fp64 if any is).
    Traffic in units, a unit being the bytes of one pyramid: forward 2 (s, t), backward 3 (s, t, the gradient).
    Raises ValueError for a temperature that is not above 0 or, naming both sides' level shapes, where these do not fit.
    """
    check_temperature(temperature)
    levels_s, names_s = as_pyramid("s", s)
    levels_t, names_t = as_pyramid("t", t)
    check_match("s", levels_s, names_s, "t", levels_t, names_t)
    return backend.call("channel_kl", [*levels_s, *levels_t], levels_s, levels_t, temperature, entropy)


def _rows_and_planes(s: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    images, channels = s[0].shape[0], sum(x.shape[1] for x in s)
    return s[0].new_empty((len(s), images), dtype=torch.float32), s[0].new_empty(4 * images * channels, dtype=torch.float32)


_forward = define("channel_kl", "(Tensor[] s, Tensor[] t, float temperature, bool entropy) -> (Tensor, Tensor)", _rows_and_planes)
_backward = define(
    "channel_kl_backward",
    "(Tensor[] s, Tensor[] t, Tensor planes, Tensor grad, float temperature) -> Tensor[]",
    lambda s, *args: [torch.empty_like(x) for x in s],
)


class _ChannelKl(torch.autograd.Function):
    """The rows; s first, then as many levels of t."""

    @staticmethod
    def forward(ctx: Any, name: str, temperature: float, entropy: bool, *x: Tensor) -> Tensor:
        s, t = x[: len(x) // 2], x[len(x) // 2 :]
        rows, planes = _forward(name, list(s), list(t), temperature, entropy)
        ctx.name, ctx.temperature = name, temperature
        keep(ctx, planes, *x)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        planes, *x = kept(ctx)
        levels = len(x) // 2
        gradients = _backward(ctx.name, x[:levels], x[levels:], planes, grad.contiguous(), ctx.temperature)
        return (None, None, None, *gradients, *[None] * levels)


def fused(name: str, s: list[Tensor], t: list[Tensor], temperature: float, entropy: bool) -> Tensor:
    """`channel_kl` by the kernels of backend `name`."""
    if not s:
        return stack_levels([])
    if in_graph(s):
        return _ChannelKl.apply(name, temperature, entropy, *s, *[x.detach() for x in t])
    return _forward(name, list(s), list(t), temperature, entropy)[0]


backend.register("reference", "channel_kl", reference)
backend.register_fused("channel_kl", fused)
