"""What the losses have in common that need nothing but the features of both networks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pyramid import Gradients, Pyramid, accumulate, as_pyramid
from .base import DistillationLoss, TeacherLosses


class TeacherFeatures(NamedTuple):
    """A teacher's part that is its features, (N, C, H, W) a level, detached."""

    features: list[Tensor]
    names: list[str]


class ComparisonLoss(DistillationLoss):
    """Base of the losses that compare two pyramids and ask for nothing else."""

    def forward(self, student_features: Pyramid, teacher_features: Pyramid) -> Tensor:
        """Scalar, or (L, N) with reduction="none". Raises ValueError for shapes that do not fit, naming both sides' level shapes."""
        return self.evaluate(student_features, teacher_features)

    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
    ) -> Any:
        features, names = as_pyramid("teacher_features", teacher_features)
        return TeacherFeatures([x.detach() for x in features], names)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """x (N, C, H, W) in the height and width of `like`, bilinear with half-pixel centres, in at least fp32; x itself where it has them."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(accumulate(x), size=tuple(like.shape[-2:]), mode="bilinear", align_corners=False)


def root(totals: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    zero = totals == 0
    return torch.where(zero, 0, torch.where(zero, 1, totals).sqrt())
