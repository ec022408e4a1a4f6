"""`channel_mean`: GKD's channel weights, the spatial mean of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, once_differentiable
from ..pyramid import Pyramid, as_pyramid, check_choice, in_graph, unpack
from ..reference.channel_mean import channel_mean as reference

MODES = ("signed", "abs")


def channel_mean(x: Pyramid, mode: str = "signed") -> list[Tensor]:
    """Mean over H, W of x (`signed`, GKD Eq. 1) or of |x| (`abs`, the released code).

    x: pyramid of (N, C, H, W), 16-bit, fp32 or fp64. Returns L tensors (N, C), fp32 (fp64 for fp64).
    Raises ValueError for an unknown mode or a malformed pyramid.
    """
    check_choice("mode", mode, MODES)
    levels, _ = as_pyramid("x", x)
    return backend.call("channel_mean", levels, levels, mode)


def _packed_vectors(x: Sequence[Tensor], absolute: bool) -> Tensor:
    return x[0].new_empty(sum(level.shape[0] * level.shape[1] for level in x), dtype=torch.float32)


_forward = define("channel_mean", "(Tensor[] x, bool absolute) -> Tensor", _packed_vectors)
_backward = define(
    "channel_mean_backward",
    "(Tensor[] x, Tensor grad, bool absolute) -> Tensor[]",
    lambda x, grad, absolute: [torch.empty_like(level) for level in x],
)


class _ChannelMean(torch.autograd.Function):
    """The means of all levels, packed."""

    @staticmethod
    def forward(ctx: Any, name: str, absolute: bool, *x: Tensor) -> Tensor:
        ctx.name, ctx.absolute = name, absolute
        ctx.save_for_backward(*x)
        return _forward(name, list(x), absolute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (None, None, *_backward(ctx.name, list(ctx.saved_tensors), grad.contiguous(), ctx.absolute))


def fused(name: str, levels: Sequence[Tensor], mode: str) -> list[Tensor]:
    """`channel_mean` by the kernels of backend `name`."""
    if not levels:
        return []
    absolute = mode == "abs"
    means = _ChannelMean.apply(name, absolute, *levels) if in_graph(levels) else _forward(name, list(levels), absolute)
    return unpack(means, [level.shape[:2] for level in levels])


backend.register("reference", "channel_mean", reference)
backend.register_fused("channel_mean", fused)
