"""Distillation inside the backward pass: the student's own gradient is used where and when it passes by.

GKD needs the gradient G_S of the student's detection loss at its features. The one backward pass that training does anyway
brings it to the tap, so the tap is an autograd.Function over all levels: forward hands the features on, with one zero
scalar per loss as a handle for the graph; backward receives G_S and the upstream gradient d of each scalar (loss weight,
AMP scale, accumulation, all inside d) and returns G_S + sum_k d_k * dKD_k / dS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.library import once_differentiable
from kdkernels.losses.base import DistillationLoss
from kdkernels.losses.composed import split_shared, term_values_vjp
from kdkernels.pyramid import accumulate
from kdkernels.reference.terms import add_gradients

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
        arrived = {name: d for name, d in zip(self.losses, upstream, strict=True) if d is not None}
        shared, alone = split_shared({name: self.losses[name] for name in arrived})
        total = list(gradients)
        if alone:
            total = self._alone(alone, student, gradients, arrived)
        if shared:
            found, rows, vjp = term_values_vjp(shared, student, self.sides, gradients)
            upstream_of_rows: Sequence[Tensor | None] = [None] * len(rows)
            weighted = self._weighted(shared, found, arrived)
            if weighted is not None:
                upstream_of_rows = torch.autograd.grad(weighted, rows, allow_unused=True)
            total = vjp([torch.zeros_like(r) if d is None else d for r, d in zip(rows, upstream_of_rows, strict=True)], total)
        return total

    def _weighted(self, losses: Iterable[str], found: Mapping[str, Terms], arrived: Mapping[str, Tensor]) -> Tensor | None:
        """The sum over the losses of d times the value, all recorded; None when none has a gradient."""
        total: Tensor | None = None
        with torch.enable_grad():
            for name in losses:
                value = self.losses[name].reduce(found[name])
                self.record(name, found[name], value.detach())
                if value.requires_grad:
                    total = value * arrived[name] if total is None else total + value * arrived[name]
        return total

    def _alone(
        self,
        losses: Mapping[str, DistillationLoss],
        student: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        arrived: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        """G_S + d * dKD of losses that define their terms themselves."""
        leaves = [accumulate(x.detach()).requires_grad_() for x in student]
        with torch.enable_grad():
            found = {name: loss.terms(leaves, self.sides[name], gradients) for name, loss in losses.items()}
        weighted = self._weighted(losses, found, arrived)
        if weighted is None:
            return list(gradients)
        own = torch.autograd.grad(weighted, leaves, allow_unused=True)
        return [add_gradients(g, arriving, x.dtype) for g, arriving, x in zip(own, gradients, student, strict=True)]


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
