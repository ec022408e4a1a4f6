"""AID: adaptive instance distillation (arXiv 2201.11097), a weight on any other loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..outputs import HeadOutputs
from ..pyramid import Gradients, Pyramid, as_pyramid, check_choice
from .base import DistillationLoss, Method, TeacherLosses
from .composed import ComposedLoss, Given, Part, Read, Reading
from .wrapper import WrapperLoss

GRANULARITIES = ("image", "level x image", "level", "batch")
SHARES = ("softmax", "argmin")
#: Of the teacher's loss: those that AID's authors weigh by.
PARTS = ("classification", "regression")


class WeightedSide(NamedTuple):
    """The teacher's part of a WeightedLoss."""

    base: Any
    weight: Tensor | dict[str, Tensor]  # broadcasts to (L, N); or one for each name in the base's `weighed_by`


class WeightedLoss(WrapperLoss, ComposedLoss):
    """Base of the losses that are another one times a constant weight; a subclass defines `factor`."""

    def factor(self, features: Sequence[Tensor], teacher_losses: TeacherLosses | None) -> Tensor:
        """What broadcasts to (L, N) and multiplies the base's terms; `features`: the teacher's."""
        raise TypeError(f"{type(self).__name__} does not define factor")

    def weights(self, features: Sequence[Tensor], teacher_losses: TeacherLosses | None) -> Tensor | dict[str, Tensor]:
        """`factor` for all terms, or one for each part of the teacher's loss."""
        return self.factor(features, teacher_losses)

    def shares(self) -> bool:
        kept = type(self).teacher_side is WeightedLoss.teacher_side and type(self).terms is WeightedLoss.terms
        return kept and isinstance(self.base, ComposedLoss) and self.base.shares()

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        return self.base.reading(features, names, given)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> WeightedSide:
        return WeightedSide(self.base.side(features, names, read, given), self.factor(features, given["teacher_losses"]))

    def parts(self, student_features: Pyramid, side: WeightedSide, student_gradients: Gradients | None = None) -> dict[str, Part]:
        assert isinstance(side.weight, Tensor)  # the losses that share passes have one for all terms
        parts = self.base.parts(student_features, side.base, student_gradients)
        return {name: part._replace(factor=side.weight * part.factor) for name, part in parts.items()}

    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
        **head: Any,
    ) -> WeightedSide:
        base = self.base.teacher_side(teacher_features, teacher_gradients, boxes, image_size, teacher_losses, **head)
        levels, _ = as_pyramid("teacher_features", teacher_features)
        with torch.no_grad():
            return WeightedSide(base, self.weights(levels, teacher_losses))

    def terms(
        self,
        student_features: Pyramid,
        side: WeightedSide,
        student_gradients: Gradients | None = None,
        student_outputs: HeadOutputs | None = None,
    ) -> dict[str, Tensor]:
        if self.shares():
            # The weight belongs into the factors of the terms: outside of them it would be a second pass over the gradient.
            return super().terms(student_features, side, student_gradients)
        outputs = {"student_outputs": student_outputs} if "outputs" in self.needs else {}
        terms = self.base.terms(student_features, side.base, student_gradients, **outputs)
        weight, parts = side.weight, self.weighed_by
        return {name: value * (weight[parts[name]] if isinstance(weight, dict) else weight) for name, value in terms.items()}


class TeacherShare(WeightedLoss):
    """A loss times its teacher's share among several: see `teacher_shares`.

    share: gives it for the batch under way, a tensor that broadcasts to (L, N)
    """

    also = frozenset({"teacher_losses"})

    def __init__(self, base: DistillationLoss, share: Callable[[], Tensor]):
        super().__init__(base)
        self.share = share
        self.granularity = getattr(base, "granularity", None)

    def factor(self, features: Sequence[Tensor], teacher_losses: TeacherLosses | None) -> Tensor:
        return self.share()


class AIDLoss(WeightedLoss):
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

    t may be a mapping of "classification" and "regression", the two parts of the teacher's loss, each as t is. LDLoss then has its
    localisation terms weighed by the latter and its class term by the former, as in the authors' code (`DistillationLoss.weighed_by`);
    a base that says nothing of parts is weighed by their sum. A plain t weighs all terms, those of LDLoss too.

    The weight is computed in fp32 and detached. t is never renormalised.
    """

    methods = (
        Method(
            "aid",
            "adaptive instance distillation",
            "arXiv 2201.11097; lanqz7766/AID",
            "exp(-alpha * L_det,T) * base",
            "separable",
            wraps=True,
        ),
    )

    also = frozenset({"teacher_losses"})

    def __init__(self, base: DistillationLoss, alpha: float = 0.1, granularity: str | None = None):
        super().__init__(base)
        if granularity is not None:
            check_choice("granularity", granularity, GRANULARITIES)
        self.alpha, self.granularity, self.by_parts = alpha, granularity, bool(base.weighed_by)

    def forward(self, *args: Any, teacher_losses: TeacherLosses | None = None, **kwargs: Any) -> Tensor:
        """The base loss's arguments, and teacher_losses by keyword. Scalar, or (L, N) with the base's reduction="none".

        Raises ValueError when t does not broadcast to (L, N), naming both shapes, or is 1-D while no granularity says what it is, and
        when it is a mapping of other parts.
        """
        return super().forward(*args, teacher_losses=teacher_losses, **kwargs)

    def weights(self, features: Sequence[Tensor], teacher_losses: TeacherLosses | None) -> Tensor | dict[str, Tensor]:
        if isinstance(teacher_losses, Mapping) and self.weighed_by:
            _check_parts(teacher_losses)
            return {part: self.factor(features, t) for part, t in teacher_losses.items()}
        return self.factor(features, teacher_losses)

    def factor(self, features: Sequence[Tensor], teacher_losses: TeacherLosses | None) -> Tensor:
        """What broadcasts to (L, N) and multiplies the base's terms."""
        if teacher_losses is None:
            raise ValueError("AIDLoss needs teacher_losses, which is missing")
        if isinstance(teacher_losses, Mapping):
            _check_parts(teacher_losses)
            teacher_losses = teacher_losses["classification"] + teacher_losses["regression"]
        shape = (len(features), features[0].shape[0]) if len(features) else (0, 0)
        device = features[0].device if len(features) else None
        if isinstance(teacher_losses, (int, float)):
            # as_tensor would copy it from the host and wait for that.
            t = torch.full((), teacher_losses, dtype=torch.float32, device=device)
        else:
            t = torch.as_tensor(teacher_losses, dtype=torch.float32, device=device)
        t = self._arrange(t, shape)
        if self.level_free and t.dim() == 2 and t.shape[0] > 1:
            raise ValueError(
                f"teacher_losses of shape {tuple(t.shape)} are one for each level, and {type(self.base).__name__} has no levels: "
                'choose granularity="image" or "batch"'
            )
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


def _check_parts(teacher_losses: Mapping[str, Any]) -> None:
    if set(teacher_losses) != set(PARTS):
        raise ValueError(f"teacher_losses: wanted the parts {list(PARTS)}, got {list(teacher_losses)}")


@torch.no_grad()
def teacher_shares(teacher_losses: Sequence[Tensor], mode: str = "softmax") -> list[Tensor]:
    """How much each of several teachers counts (released AID code): one tensor a teacher, fp32, summing to 1 over the teachers.

    teacher_losses: one t a teacher, all scalars or all of one shape (L, N), (L, 1) or (1, N).
    softmax: exp(-t) / sum over teachers of exp(-t), t summed over the levels first: a scalar or (1, N) (or (1, 1)).
    argmin:  1 for the teacher with the smallest t, 0 for the others, at each entry of t; the first of equal ones.
    A t that is NaN makes the shares of all teachers NaN: of its image, with argmin of its entry.
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
    shares = (teachers == stacked.argmin(0)).float()
    # argmin takes NaN for the smallest, and so the teacher that has failed for the best.
    return list(torch.where(stacked.isnan().any(0), torch.nan, shares))
