"""Distillation inside the backward pass: the student's own gradient is used where and when it passes by.

GKD needs the gradient G_S of the student's detection loss at its features. The one backward pass that training does anyway
brings it to the tap, so the tap is an autograd.Function over all levels: forward hands the features on, with one zero
scalar per loss as a handle for the graph; backward receives G_S and the upstream gradient d of each scalar (loss weight,
AMP scale, accumulation, all inside d) and returns G_S + sum_k d_k * dKD_k / dS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkernels.losses.base import DistillationLoss

Terms = dict[str, Tensor]


class InlinePlan:
    """What the backward of one tap call needs; lives in that call's autograd context and nowhere else."""

    def __init__(
        self,
        losses: dict[str, DistillationLoss],
        sides: dict[str, Any],
        record: Callable[[str, Terms, Tensor], Any],
    ) -> None:
        self.losses = losses
        self.sides = sides
        self.record = record

    def gradient(
        self, student: Sequence[Tensor], gradients: Sequence[Tensor | None], upstream: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """G_S + d * dKD per level; computes and records the values on the way."""
        # 16-bit features are lifted to fp32 once, so that d * dKD is added to G_S before anything is rounded to 16 bits.
        leaves = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in student]
        total: Tensor | None = None
        for (name, loss), d in zip(self.losses.items(), upstream, strict=True):
            if d is None:
                continue
            with torch.enable_grad():
                terms = loss.terms(leaves, self.sides[name], gradients)
                value = loss.reduce(terms)
                self.record(name, terms, value.detach())
                if value.requires_grad:
                    total = value * d if total is None else total + value * d
        if total is None:
            return list(gradients)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [_add(g, own, x.dtype) for g, own, x in zip(grads, gradients, student, strict=True)]


def _add(distillation: Tensor | None, own: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if distillation is None:
        return own
    # G_S first: the sum takes its memory layout.
    return (distillation if own is None else own + distillation).to(dtype)


class InlineTap(torch.autograd.Function):
    """Levels in, the same levels and one handle per loss of the plan out."""

    @staticmethod
    def forward(ctx: Any, plan: InlinePlan, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*features)
        handles = [torch.zeros((), device=features[0].device) for _ in plan.losses]
        # detach() makes aliases: no copy, and unlike views they leave the head free to work in place.
        return (*(x.detach() for x in features), *handles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features = ctx.saved_tensors
        levels = len(features)
        return (None, *ctx.plan.gradient(features, grads[:levels], grads[levels:]))
