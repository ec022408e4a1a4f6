"""`correlation`: the distance of features normalised per channel over the batch, 1 - Pearson's r (PKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, keep, kept, once_differentiable
from ..pyramid import Pyramid, as_pyramid, check_match, in_graph, stack_levels
from ..reference.correlation import correlation as reference


def correlation(s: Pyramid, t: Pyramid, eps: float = 1e-6) -> Tensor:
    """V = sum (z_s - z_t)^2 / (2 N C H W) of each level, with z = (x - mean) / (std + eps) per channel over N, H and W: 1 - Pearson's r,
    averaged over the channels. PKD, arXiv 2207.02039.

    std is the unbiased one, and 0 for a single value. The images' rows are their shares of V by sum_{c,h,w} (z_s - z_t)^2, which are
    constants (equal where all are 0): a sum of a level's rows has the value and the gradient of V.

    s, t: pyramids of (N, C, H, W), each 16-bit, fp32 or fp64; t is a constant.
    Returns (L, N), fp32 (fp64 if any is).
    Traffic in units, a unit being the bytes of one pyramid: forward 2 (s, t), backward 3 (s, t, the gradient).
    Raises ValueError for an eps that is not above 0 or, naming both sides' level shapes, where these do not fit.
    """
    if not eps > 0:
        raise ValueError(f"eps must be above 0; got {eps}")
    levels_s, names_s = as_pyramid("s", s)
    levels_t, names_t = as_pyramid("t", t)
    check_match("s", levels_s, names_s, "t", levels_t, names_t)
    return backend.call("correlation", [*levels_s, *levels_t], levels_s, levels_t, eps)


def _rows_and_planes(s: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    planes = 9 * sum(x.shape[1] for x in s)
    return s[0].new_empty((len(s), s[0].shape[0]), dtype=torch.float32), s[0].new_empty(planes, dtype=torch.float32)


_forward = define("correlation", "(Tensor[] s, Tensor[] t, float eps) -> (Tensor, Tensor)", _rows_and_planes)
_backward = define(
    "correlation_backward",
    "(Tensor[] s, Tensor[] t, Tensor planes, Tensor rows, Tensor grad) -> Tensor[]",
    lambda s, *args: [torch.empty_like(x) for x in s],
)


class _Correlation(torch.autograd.Function):
    """The rows; s first, then as many levels of t."""

    @staticmethod
    def forward(ctx: Any, name: str, eps: float, *x: Tensor) -> Tensor:
        rows, planes = _forward(name, list(x[: len(x) // 2]), list(x[len(x) // 2 :]), eps)
        ctx.name = name
        keep(ctx, planes, rows, *x)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        planes, rows, *x = kept(ctx)
        levels = len(x) // 2
        gradients = _backward(ctx.name, x[:levels], x[levels:], planes, rows, grad.contiguous())
        return (None, None, *gradients, *[None] * levels)


def fused(name: str, s: list[Tensor], t: list[Tensor], eps: float) -> Tensor:
    """`correlation` by the kernels of backend `name`."""
    if not s:
        return stack_levels([])
    if in_graph(s):
        return _Correlation.apply(name, eps, *s, *[x.detach() for x in t])
    return _forward(name, list(s), list(t), eps)[0]


backend.register("reference", "correlation", reference)
backend.register_fused("correlation", fused)
