"""What the primitives of class and box logits share: their arguments, and the way to the kernels and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import define, keep, kept, once_differentiable
from .pyramid import Pyramid, as_pyramid, check_match, constant, in_graph, level_shapes, pack

#: Bins of a distribution that the Triton kernel takes, in the registers of one program. Here, as Triton may not be installed.
MOST_BINS = 4096


class Operators(NamedTuple):
    """forward: of the backend's name, s, t, packed weights and the options, to rows (L, N); backward: the same behind the rows' gradient"""

    forward: Callable[..., Tensor]
    backward: Callable[..., list[Tensor]]


def logit_levels(s: Pyramid, t: Pyramid, weight: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """The levels of both. Raises ValueError, with level shapes, unless they fit each other and weight has one of (N, H, W) for each."""
    levels_s, names_s = as_pyramid("s", s)
    levels_t, names_t = as_pyramid("t", t)
    check_match("s", levels_s, names_s, "t", levels_t, names_t)
    wanted = [(x.shape[0], *x.shape[2:]) for x in levels_s]
    if weight is not None and [tuple(x.shape) for x in weight] != wanted:
        raise ValueError(f"weight has level shapes {level_shapes(weight)}, wanted {level_shapes(wanted)}")
    return levels_s, levels_t


def operators(name: str, options: str) -> Operators:
    """The fused operators of the primitive `name`. options: the end of their schemas, as "float beta"."""
    operands = f"Tensor[] s, Tensor[] t, Tensor? weight, {options}"
    return Operators(
        define(name, f"({operands}) -> Tensor", lambda s, *args: s[0].new_empty((len(s), s[0].shape[0]), dtype=torch.float32)),
        define(f"{name}_backward", f"(Tensor grad, {operands}) -> Tensor[]", lambda grad, s, *args: [torch.empty_like(x) for x in s]),
    )


class _Rows(torch.autograd.Function):
    """Keeps the logits: the gradient is made of them again."""

    @staticmethod
    def forward(
        ctx: Any, run: Operators, name: str, t: list[Tensor], weight: Tensor | None, options: tuple[Any, ...], *s: Tensor
    ) -> Tensor:
        ctx.run, ctx.name, ctx.options = run, name, options
        keep(ctx, weight, *s, *t)
        return run.forward(name, list(s), t, weight, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *levels = kept(ctx)
        s, t = levels[: len(levels) // 2], levels[len(levels) // 2 :]
        return (None,) * 5 + tuple(ctx.run.backward(ctx.name, grad.contiguous(), s, t, weight, *ctx.options))


def fused(run: Operators, name: str, s: list[Tensor], t: list[Tensor], weight: Sequence[Tensor] | None, *options: Any) -> Tensor:
    """A primitive's rows by the kernels of backend `name`."""
    if not s:
        return torch.zeros(0, 0)
    teacher = [x.detach() for x in t]
    packed = None if weight is None else pack([constant(x) for x in weight])
    if in_graph(s):
        return _Rows.apply(run, name, teacher, packed, options, *s)
    return run.forward(name, s, teacher, packed, *options)


def refuses(s: list[Tensor], t: list[Tensor], weight: Sequence[Tensor] | None, *options: Any) -> str:
    """Why the kernels cannot take these weights, "" when they can."""
    if weight and any(x.dtype == torch.float64 or x.device != s[0].device for x in weight):
        return "the weights are in float64 or on another device"
    return ""
