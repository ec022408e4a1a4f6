"""FRS: distillation where the teacher sees something, by its own class scores (arXiv 2106.08022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..outputs import HeadOutputs, as_maps, best_scores, check_levels, check_outputs
from ..pyramid import Gradients, Pyramid, as_pyramid
from .base import Method, TeacherLosses, level_scaled, preset_options
from .composed import student_levels
from .trainable import Align, Trainable


class FRSSide(NamedTuple):
    """The teacher's part of an FRSLoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    classification: list[Tensor]  # (N, A, K) logits
    masks: list[Tensor]  # (N, H, W)


class FRSLoss(Trainable):
    """Feature richness score distillation (Du et al., NeurIPS 2021, arXiv 2106.08022; duzhixing/FRS).

    Takes pyramids of (N, C, H, W) and head outputs in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). Per level, with
    M (N, H, W) the teacher's best score at a cell, the largest sigma over its anchors and the classes (of an RPN its objectness):

    feature        = weight * alpha / sum_nhw M * sum_nchw M * (F_T - adapt(F_S))^2        (the denominator has no factor C, as released)
    classification = weight * beta  / sum_nhw M * sum_{n,a,k} M_cell(a) * BCE(p_S, sigma(p_T))

    adapt is a trained 3x3 convolution a level, bilinear interpolation where sizes differ. Batch-coupled through sum M: the entries split
    each level's value over its images. The released code raises both from 0 over the first 500 iterations, which is for training to do.

    preset: one-stage = gfl (.1, .05) | retinanet (.005, .02) | fcos (.01, .05) | two-stage (.002, .1)
    seed:   of the adapter's initial weights;   reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "frs",
            "features and scores where the teacher sees something",
            "arXiv 2106.08022; duzhixing/FRS",
            "alpha/sum M * sum M (F_T - conv(F_S))^2 + beta/sum M * sum M BCE(p_S, sigma(p_T)),  M = max sigma(p_T)",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"alpha": 0.1, "beta": 0.05},
        "two-stage": {"alpha": 0.002, "beta": 0.1},
        "gfl": {"alpha": 0.1, "beta": 0.05},
        "retinanet": {"alpha": 0.005, "beta": 0.02},
        "fcos": {"alpha": 0.01, "beta": 0.05},
    }
    needs = frozenset({"outputs"})
    argument_names = ("student_features", "teacher_features", "student_outputs", "teacher_outputs")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        super().__init__(weight, reduction, on_nonfinite)
        chosen = preset_options(self.PRESETS, preset, alpha=alpha, beta=beta)
        self.preset, self.alpha, self.beta, self.seed = preset, chosen["alpha"], chosen["beta"], seed

    def forward(
        self,
        student_features: Pyramid,
        teacher_features: Pyramid,
        student_outputs: HeadOutputs | None = None,
        teacher_outputs: HeadOutputs | None = None,
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none".

        The anchors of a cell stand behind each other in the outputs, cells row by row. Raises ValueError for a missing argument or shapes
        that do not fit, naming both sides'.
        """
        return self.evaluate(student_features, teacher_features, student_outputs=student_outputs, teacher_outputs=teacher_outputs)

    def coefficient(self, term: str) -> float:
        return self.weight * (self.alpha if term == "feature" else self.beta)

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return Align(student, teacher, kernel_size=3, always=True)

    @torch.no_grad()
    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
        teacher_outputs: HeadOutputs | None = None,
    ) -> FRSSide:
        features, names = as_pyramid("teacher_features", teacher_features)
        assert teacher_outputs is not None  # `require` has seen to it
        check_levels(teacher_outputs, features, names, ["classification"], cells=True)
        scores = best_scores(teacher_outputs)
        masks = [b.unflatten(1, (*x.shape[2:], -1)).amax(3) for b, x in zip(scores, features, strict=True)]
        return FRSSide([x.detach() for x in features], names, [x.detach() for x in teacher_outputs.classification], masks)

    def terms(
        self,
        student_features: Pyramid,
        side: FRSSide,
        student_gradients: Gradients | None = None,
        student_outputs: HeadOutputs | None = None,
    ) -> dict[str, Tensor]:
        student, _ = student_levels(student_features, side.names, side.features, "N")
        assert student_outputs is not None  # `require` has seen to it
        check_outputs("class logits", student_outputs.classification, side.classification)
        self.build(student, side.features)
        if self.trainable is not None:  # without levels there is nothing to build
            student = self.trainable(student, side.features)
        features = ops.feature_imitation(student, side.features, side.masks)
        each = [
            m.flatten(1).repeat_interleave(c.shape[1] // (m.shape[1] * m.shape[2]), 1)
            for m, c in zip(side.masks, side.classification, strict=True)
        ]
        classes = ops.logit_bce(as_maps(student_outputs.classification), as_maps(side.classification), [m[:, :, None] for m in each])
        sizes = [m.sum() for m in side.masks]
        return {
            "feature": level_scaled(features, self.coefficient("feature"), sizes),
            "classification": level_scaled(classes, self.coefficient("classification"), sizes),
        }
