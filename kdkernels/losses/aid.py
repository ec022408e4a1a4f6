"""AID: adaptive instance distillation (arXiv 2201.11097), a weight on any other loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pyramid import Gradients, Pyramid, as_pyramid, check_choice
from .base import DistillationLoss
from .composed import ComposedLoss, Given, Part, Read, Reading

GRANULARITIES = ("image", "level x image", "level", "batch")
SHARES = ("softmax", "argmin")


class AIDSide(NamedTuple):
    """The teacher's part of an AIDLoss."""

    base: Any
    weight: Tensor  # broadcasts to (L, N)


class AIDLoss(ComposedLoss):
    """exp(-alpha * t) times the base loss, t the teacher's own detection loss (arXiv 2201.11097).

    What the teacher gets wrong is imitated less.


    base:        a loss of this library; its weight, reduction and on_nonfinite stay in force
    alpha:       0.1 in the paper
    granularity: how `teacher_losses` t is read. None: a scalar or a 2-D t, (L, N), (L, 1) or (1, N), as given.
                 "image": (L, N) is summed over the levels, 1-D is (N,).
                 "level": (L, N) is averaged over the images, 1-D is (L,).
                 "level x image": 2-D, as given.
                 "batch": the mean over images of the sum over levels.
                 A scalar is one weight for all.

    The weight is computed in fp32 and detached. t is never renormalised.
    """

    def __init__(self, base: DistillationLoss, alpha: float = 0.1, granularity: str | None = None):
        if not isinstance(base, DistillationLoss):
            raise TypeError(f"AIDLoss wraps a loss of this library (GKDLoss, BMFILoss, ...); got {type(base).__name__}")
        if granularity is not None:
            check_choice("granularity", granularity, GRANULARITIES)
        super().__init__(base.weight, base.reduction, base.on_nonfinite)
        self.base: Any = base
        self.alpha, self.granularity = alpha, granularity
        self.needs = base.needs | {"teacher_losses"}
        self.compares_features = base.compares_features
        self.argument_names = base.argument_names
        # Whoever provides the student's gradients asks for it, to know whether they need a graph.
        self.grad_mode = getattr(base, "grad_mode", None)

    def inline_refusal(self) -> str | None:
        return self.base.inline_refusal()

    def forward(self, *args: Any, teacher_losses: Tensor | float | None = None, **kwargs: Any) -> Tensor:
        """The base loss's arguments, and teacher_losses by keyword. Scalar, or (L, N) with the base's reduction="none".

        Raises ValueError when t does not broadcast to (L, N), naming both shapes, or is 1-D while no granularity says what it is.
        """
        if len(args) > len(self.argument_names):
            known = len(self.argument_names)
            raise TypeError(f"{type(self.base).__name__} takes {known} arguments, got {len(args)}; pass teacher_losses= by keyword")
        given = dict(zip(self.argument_names, args, strict=False))
        repeated = sorted(given.keys() & kwargs.keys())
        if repeated:
            raise TypeError(f"AIDLoss got {', '.join(repeated)} twice")
        unknown = sorted(kwargs.keys() - set(self.argument_names))
        if unknown:
            raise TypeError(f"{type(self.base).__name__} takes no argument {', '.join(unknown)}")
        return self.evaluate(**given, **kwargs, teacher_losses=teacher_losses)

    def shares(self) -> bool:
        kept = type(self).teacher_side is AIDLoss.teacher_side and type(self).terms is AIDLoss.terms
        return kept and isinstance(self.base, ComposedLoss) and self.base.shares()

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        return self.base.reading(features, names, given)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> AIDSide:
        return AIDSide(self.base.side(features, names, read, given), self.factor(features, given["teacher_losses"]))

    def parts(self, student_features: Pyramid, side: AIDSide, student_gradients: Gradients | None = None) -> dict[str, Part]:
        parts = self.base.parts(student_features, side.base, student_gradients)
        return {name: part._replace(factor=side.weight * part.factor) for name, part in parts.items()}

    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: Tensor | float | None = None,
    ) -> AIDSide:
        base = self.base.teacher_side(teacher_features, teacher_gradients, boxes, image_size, teacher_losses)
        levels, _ = as_pyramid("teacher_features", teacher_features)
        with torch.no_grad():
            return AIDSide(base, self.factor(levels, teacher_losses))

    def terms(self, student_features: Pyramid, side: AIDSide, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        if self.shares():
            # The weight belongs into the factors of the terms: outside of them it would be a second pass over the gradient.
            return super().terms(student_features, side, student_gradients)
        terms = self.base.terms(student_features, side.base, student_gradients)
        return {name: value * side.weight for name, value in terms.items()}

    def factor(self, features: Sequence[Tensor], teacher_losses: Tensor | float | None) -> Tensor:
        """What broadcasts to (L, N) and multiplies the base's terms."""
        if teacher_losses is None:
            raise ValueError("AIDLoss needs teacher_losses, which is missing")
        shape = (len(features), features[0].shape[0]) if len(features) else (0, 0)
        device = features[0].device if len(features) else None
        if isinstance(teacher_losses, (int, float)):
            # as_tensor would copy it from the host and wait for that.
            t = torch.full((), teacher_losses, dtype=torch.float32, device=device)
        else:
            t = torch.as_tensor(teacher_losses, dtype=torch.float32, device=device)
        t = self._arrange(t, shape)
        # exp(-inf) would make an innocent 0 of an infinite loss; infinity * 0 is NaN.
        return torch.exp(-self.alpha * t) + t * 0

    def _arrange(self, t: Tensor, shape: tuple[int, int]) -> Tensor:
        """t as it broadcasts to `shape` = (L, N)."""
        if t.dim() == 0:
            return t
        given = tuple(t.shape)
        if t.dim() == 1:
            if self.granularity in (None, "level x image"):
                raise ValueError(
                    f'teacher_losses of shape {given} is 1-D: say granularity="image" or "level", or give (levels, images) = {shape}'
                )
            t = t[:, None] if self.granularity == "level" else t[None]
        if t.dim() != 2 or any(g not in (1, s) for g, s in zip(t.shape, shape, strict=True)):
            raise ValueError(
                f"teacher_losses of shape {given} does not broadcast to (levels, images) = {shape} (granularity={self.granularity!r})"
            )
        if self.granularity == "image":
            return t.sum(0, keepdim=True)
        if self.granularity == "level":
            return t.mean(1, keepdim=True)
        return t.sum(0).mean() if self.granularity == "batch" else t


@torch.no_grad()
def teacher_shares(teacher_losses: Sequence[Tensor], mode: str = "softmax") -> list[Tensor]:
    """How much each of several teachers counts (released AID code): one tensor a teacher, fp32, summing to 1 over the teachers.

    teacher_losses: one t a teacher, all scalars or all of one shape (L, N), (L, 1) or (1, N).
    softmax: exp(-t) / sum over teachers of exp(-t), t summed over the levels first: a scalar or (1, N) (or (1, 1)).
    argmin:  1 for the teacher with the smallest t, 0 for the others, at each entry of t; the first of equal ones.
    The shares multiply losses of reduction="none": `sum((w * aid(s, f, ..., teacher_losses=t)).sum() for w, f, t in ...)`.
    Raises ValueError for an unknown mode, no teacher, or shapes that differ.
    """
    check_choice("mode", mode, SHARES)
    losses = [torch.as_tensor(t, dtype=torch.float32) for t in teacher_losses]
    shapes = [tuple(t.shape) for t in losses]
    if not losses or len(set(shapes)) > 1 or len(shapes[0]) not in (0, 2):
        raise ValueError(f"teacher_losses: wanted one scalar or one 2-D (levels, images) tensor a teacher, all alike; got shapes {shapes}")
    stacked = torch.stack(losses)
    if mode == "softmax":
        total = stacked.sum(1, keepdim=True) if stacked.dim() == 3 else stacked
        return list((-total).softmax(0))
    teachers = torch.arange(len(losses), device=stacked.device).view(-1, *([1] * len(shapes[0])))
    return list((teachers == stacked.argmin(0)).float())
