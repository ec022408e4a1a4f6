"""FitNets: plain imitation of the teacher's features (arXiv 1412.6550)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.terms import ImitationTerm
from ..pyramid import Gradients, Pyramid, accumulate
from .base import Method, preset_options
from .comparison import TeacherFeatures
from .composed import ComposedLoss, Given, Part, Read, student_levels


class FitNetsLoss(ComposedLoss):
    """Mean squared difference of the features (arXiv 1412.6550, its hints, at the levels of a pyramid).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). Per level and image:

    imitation = weight / (N C H W) * sum_chw (F_S - F_T)^2

    Student and teacher need equal channels and sizes (adapter). The entries (L, N) are separable.

    weight: factor of the loss, 1 in both presets
    preset: one-stage | two-stage
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (Method("fitnets", "plain feature imitation", "arXiv 1412.6550", "weight/(N C H W) * sum (F_S - F_T)^2", "separable"),)
    PRESETS = {"one-stage": {"weight": 1.0}, "two-stage": {"weight": 1.0}}
    compares_features = True

    def __init__(self, weight: float | None = None, preset: str = "one-stage", reduction: str = "sum", on_nonfinite: str = "flag"):
        super().__init__(preset_options(self.PRESETS, preset, weight=weight)["weight"], reduction, on_nonfinite)
        self.preset = preset

    def forward(self, student_features: Pyramid, teacher_features: Pyramid) -> Tensor:
        """Scalar, or (L, N) with reduction="none". Raises ValueError, naming both sides' level shapes, where they differ."""
        return self.evaluate(student_features, teacher_features)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> TeacherFeatures:
        return TeacherFeatures(features, names)

    def parts(self, student_features: Pyramid, side: TeacherFeatures, student_gradients: Gradients | None = None) -> dict[str, Part]:
        features, _ = student_levels(student_features, side.names, side.features)
        # Filled on the device: a copy from the host would wait for it.
        means = [accumulate(x[:0]).new_full((1,), self.weight / max(x.numel(), 1)) for x in features]
        factor: Any = torch.stack(means) if means else self.weight
        return {"imitation": Part(ImitationTerm(side.features, None, None), factor)}
