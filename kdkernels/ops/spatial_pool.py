"""`spatial_pool`: the mean of features over pixels, weighted by a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, keep, kept, once_differentiable
from ..pyramid import Pyramid, accumulate, as_pyramid, check_choice, in_graph, level_shapes, pack, unpack
from ..reference.spatial_pool import spatial_pool as reference
from .weighted_channel_sum import packed_sum, packed_sum_backward

NORMALIZERS = ("mean", "softmax")


def spatial_pool(x: Pyramid, a: Sequence[Tensor], normalize: str = "mean") -> list[Tensor]:
    """sum_hw a * x / sum_hw a (`mean`; 0 where the sum of a is 0) or sum_hw softmax_hw(a) * x (`softmax`).

    Means over a mask, and the pooled context of a global context block (arXiv 1904.11492), which FGD's relation is made of.

    x: pyramid of (N, C, H, W); a: one (N, H, W) a level. 16-bit, fp32 or fp64. Returns L tensors (N, C), fp32 (fp64 if x or a is).
    Differentiable with respect to x and a.
    Traffic in units, a unit being the bytes of one pyramid: forward 1 (x), backward 1 (its gradient), and 1 more (x) for a gradient of a.
    Raises ValueError for another `normalize` and, with both sides' shapes, where a does not fit.
    """
    check_choice("normalize", normalize, NORMALIZERS)
    levels, names = as_pyramid("x", x)
    wanted = [(level.shape[0], *level.shape[2:]) for level in levels]
    if [tuple(weights.shape) for weights in a] != wanted:
        raise ValueError(f"a has level shapes {level_shapes(a)}, wanted {level_shapes(wanted, names)}")
    return backend.call("spatial_pool", [*levels, *a], levels, list(a), normalize)


_MAPS = "Tensor a, SymInt images, SymInt[] pixels, bool softmax"
_weights = define("pool_weights", f"({_MAPS}) -> Tensor", lambda a, *args: torch.empty_like(a), "spatial_pool")
_weights_backward = define(
    "pool_weights_backward",
    f"(Tensor weights, Tensor grad, {_MAPS}) -> Tensor",
    lambda weights, *args: torch.empty_like(weights),
    "spatial_pool",
)
_forward = define(
    "spatial_pool",
    "(Tensor[] x, Tensor weights) -> Tensor",
    lambda x, weights: x[0].new_empty(sum(level.shape[0] * level.shape[1] for level in x), dtype=torch.float32),
)


class _Weights(torch.autograd.Function):
    """The weights of the packed maps a of all levels, packed."""

    @staticmethod
    def forward(ctx: Any, name: str, images: int, pixels: list[int], softmax: bool, a: Tensor) -> Tensor:
        ctx.name, ctx.options = name, (images, pixels, softmax)
        weights = _weights(name, a, *ctx.options)
        ctx.save_for_backward(a, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, weights = ctx.saved_tensors
        return (None, None, None, None, _weights_backward(ctx.name, weights, grad.contiguous(), a, *ctx.options))


class _Pooled(torch.autograd.Function):
    """The means of all levels under packed weights, packed. A sum over pixels as the gradient of a weighted sum over channels is one."""

    @staticmethod
    def forward(ctx: Any, name: str, weights: Tensor, *x: Tensor) -> Tensor:
        ctx.name = name
        keep(ctx, weights, *x)
        return _forward(name, list(x), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, *x = kept(ctx)
        grad = grad.contiguous()
        of_weights = packed_sum(ctx.name, x, grad, False) if ctx.needs_input_grad[1] else None
        of_x = packed_sum_backward(ctx.name, x, grad, weights, False) if any(ctx.needs_input_grad[2:]) else [None] * len(x)
        return (None, of_weights, *of_x)


def fused(name: str, x: list[Tensor], a: list[Tensor], normalize: str) -> list[Tensor]:
    """`spatial_pool` by the kernels of backend `name`."""
    if not x:
        return []
    maps = pack([accumulate(level) for level in a])
    options = x[0].shape[0], [level.shape[2] * level.shape[3] for level in x], normalize == "softmax"
    weights = _Weights.apply(name, *options, maps) if in_graph([maps]) else _weights(name, maps, *options)
    means = _Pooled.apply(name, weights, *x) if in_graph([weights, *x]) else _forward(name, x, weights)
    return unpack(means, [level.shape[:2] for level in x])


backend.register("reference", "spatial_pool", reference)
backend.register_fused("spatial_pool", fused)
