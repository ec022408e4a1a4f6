"""`weighted_channel_sum`: GKD's map before normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, keep, kept, once_differentiable
from ..pyramid import Pyramid, as_pyramid, check_choice, constant, in_graph, level_shapes, pack, unpack
from ..reference.weighted_channel_sum import weighted_channel_sum as reference

ACTIVATIONS = ("raw", "abs")
RECTIFIERS = ("abs", "relu", "none")


def weighted_channel_sum(
    x: Pyramid, w: Sequence[Tensor], activation: str = "raw", rectify: str = "abs"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """r = rectify(sum_c w_c * activation(x_c)) and its extrema (GKD Eq. 2 and the inner part of Eq. 3).

    x: pyramid of (N, C, H, W); w: one (N, C) a level, or (N, C, H, W) for a weight per element. 16-bit, fp32 or fp64.
    Returns the maps (N, H, W), their minima (N,) and maxima (N,), each a list of L; fp32 (fp64 if x or w is).
    Raises ValueError, naming the level and both shapes, where w does not fit x.
    """
    levels = check_weights(x, w, activation, rectify)
    return backend.call("weighted_channel_sum", levels, levels, list(w), activation, rectify)


def check_weights(x: Pyramid, w: Sequence[Tensor], activation: str, rectify: str) -> list[Tensor]:
    """The levels of x. Raises ValueError for an unknown option and, naming the level and both shapes, where w does not fit x."""
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("rectify", rectify, RECTIFIERS)
    levels, names = as_pyramid("x", x)
    if len(w) != len(levels):
        raise ValueError(f"w has {len(w)} levels, x has {len(levels)}: {level_shapes(levels, names)}")
    for level, weight, name in zip(levels, w, names, strict=True):
        if weight.shape != level.shape[:2] and weight.shape != level.shape:
            raise ValueError(
                f"w, level {name}: got shape {tuple(weight.shape)}, wanted {tuple(level.shape[:2])} or x's shape {tuple(level.shape)}"
            )
    return levels


def rectified(raw: Tensor, rectify: str) -> Tensor:
    """|raw|, relu or raw itself. As in the reference relu keeps NaN: -inf * 0, where relu() makes an innocent 0 of an overflowed sum."""
    if rectify == "relu":
        return torch.where(raw > 0, raw, raw * 0)
    return raw.abs() if rectify == "abs" else raw


def _packed_maps(x: Sequence[Tensor], w: Tensor, absolute: bool) -> Tensor:
    return x[0].new_empty(sum(level.shape[0] * level.shape[2] * level.shape[3] for level in x), dtype=torch.float32)


packed_sum = define("weighted_channel_sum", "(Tensor[] x, Tensor w, bool absolute) -> Tensor", _packed_maps)
packed_sum_backward = define(
    "weighted_channel_sum_backward",
    "(Tensor[] x, Tensor w, Tensor grad, bool absolute) -> Tensor[]",
    lambda x, w, grad, absolute: [torch.empty_like(level) for level in x],
)


class _WeightedChannelSum(torch.autograd.Function):
    """The sums of all levels, packed, before they are rectified."""

    @staticmethod
    def forward(ctx: Any, name: str, w: Tensor, absolute: bool, *x: Tensor) -> Tensor:
        ctx.name, ctx.absolute = name, absolute
        keep(ctx, w, *x)
        return packed_sum(name, list(x), w, absolute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        w, *x = kept(ctx)
        return (None, None, None, *packed_sum_backward(ctx.name, x, w, grad.contiguous(), ctx.absolute))


def fused(
    name: str, levels: Sequence[Tensor], weights: Sequence[Tensor], activation: str = "raw", rectify: str = "abs"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`weighted_channel_sum` by the kernels of backend `name`, for weights a channel, differentiable with respect to the levels only."""
    if not levels:
        return [], [], []
    w = pack([constant(weight) for weight in weights])
    absolute = activation == "abs"
    raw = _WeightedChannelSum.apply(name, w, absolute, *levels) if in_graph(levels) else packed_sum(name, list(levels), w, absolute)
    maps = unpack(rectified(raw, rectify), [(level.shape[0], *level.shape[2:]) for level in levels])
    return maps, [r.amin((1, 2)) for r in maps], [r.amax((1, 2)) for r in maps]


def _refuses(levels: Sequence[Tensor], weights: Sequence[Tensor], activation: str, rectify: str) -> str:
    if any(weight.dim() != 2 for weight in weights):
        return "a weight per element is in the reference only"
    return backend.refuses_constants(weights, levels[0].device, "the weights")


backend.register("reference", "weighted_channel_sum", reference)
backend.register_fused("weighted_channel_sum", fused, _refuses)
