"""`random_mask`: features with random pixels set to 0, the same ones whatever device computes them (MGD)."""

from __future__ import annotations

from math import floor
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, once_differentiable
from ..pyramid import Pyramid, as_pyramid, in_graph
from ..reference.random_mask import random_mask as reference


def random_mask(x: Pyramid, state: Tensor, ratio: float) -> list[Tensor]:
    """x with each pixel set to 0, in all channels, with probability `ratio`; masked pixels are exactly 0, whatever x holds there:
    the masking of MGD, arXiv 2205.01529.

    Pixel p of image n and level l is kept if the first word of Philox4x32-10 is at least floor(ratio * 2^32). Its key is the low and the
    high word of state[0], its counter (p, n, l, low word of state[1]): the same state masks the same pixels on every device and backend.

    x: pyramid of (N, C, H, W), 16-bit, fp32 or fp64; state: int64 (2,) on x's device, a seed and the number of the call, which is read
    there and may be counted up before the backward runs. Returns L tensors of x's shapes, types and memory layouts.
    The gradient is the upstream gradient, masked alike.
    Traffic in units, a unit being the bytes of one pyramid: 2 - ratio (what is kept of x, and the result), and as much in the backward.
    What is kept of a contiguous level lies among what is masked, in the same cache lines, so that the kernels read all of it: 2.
    Raises ValueError for a ratio outside [0, 1], for another state, and where it is on another device than x.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be between 0 and 1; got {ratio}")
    levels, _ = as_pyramid("x", x)
    if state.dtype != torch.int64 or state.shape != (2,):
        raise ValueError(f"state must be int64 of shape (2,); got {state.dtype} of shape {tuple(state.shape)}")
    if any(level.device != state.device for level in levels):
        raise ValueError(f"state is on {state.device}, x on {levels[0].device}: it is read where the features are")
    return backend.call("random_mask", levels, levels, state, floor(ratio * 2**32))


_forward = define(
    "random_mask",
    "(Tensor[] x, Tensor state, int threshold) -> Tensor[]",
    lambda x, state, threshold: [torch.empty_like(level) for level in x],
)


class _RandomMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, state: Tensor, threshold: int, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.name, ctx.threshold = name, threshold
        ctx.save_for_backward(state.clone())
        return tuple(_forward(name, list(x), state, threshold))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (state,) = ctx.saved_tensors
        return (None, None, None, *_forward(ctx.name, list(grads), state, ctx.threshold))


def fused(name: str, x: list[Tensor], state: Tensor, threshold: int) -> list[Tensor]:
    """`random_mask` by the kernels of backend `name`."""
    if not x:
        return []
    state = state.contiguous()
    return list(_RandomMask.apply(name, state, threshold, *x)) if in_graph(x) else _forward(name, x, state, threshold)


backend.register("reference", "random_mask", reference)
backend.register_fused("random_mask", fused)
