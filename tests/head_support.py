"""Small losses on a head's outputs and with parts that train, for the tests of what the Distiller serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import DistillationLoss
from kdkernels.losses.trainable import Align, Trainable
from kdkernels.outputs import HeadOutputs


class OnOutputs(DistillationLoss):
    """Mean squared difference of scores and of boxes. `seen`: what it was given last, (student, teacher, anchors)."""

    needs = frozenset({"outputs", "anchors"})

    def __init__(self, crosses: bool = False):
        super().__init__()
        self.crosses = crosses
        self.seen: tuple[HeadOutputs, HeadOutputs, list[Tensor]] | None = None

    def teacher_side(self, teacher_features: Any, *given: Any, **head: Any) -> Any:
        return head["teacher_outputs"], head["anchors"]

    def terms(self, student_features: Any, side: Any, student_gradients: Any = None, student_outputs: Any = None) -> dict[str, Tensor]:
        self.seen = student_outputs, *side
        pairs = zip(student_outputs.classification, side[0].classification, student_outputs.boxes, side[0].boxes, strict=True)
        return {"outputs": torch.stack([(a - b).pow(2).mean((1, 2)) + 1e-3 * (c - d).pow(2).mean((1, 2)) for a, b, c, d in pairs])}


class Trained(Trainable):
    """Mean squared difference behind a convolution that trains."""

    def __init__(self, gradients: bool = False, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.needs = frozenset({"student_gradients"} if gradients else ())

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return Align(student, teacher, 3, always=True)

    def teacher_side(self, teacher_features: Any, *given: Any, **more: Any) -> Any:
        return teacher_features

    def terms(self, student_features: Any, side: Any, student_gradients: Any = None) -> dict[str, Tensor]:
        self.build(student_features, side)
        assert self.trainable is not None
        aligned = self.trainable(student_features, side)
        rows = [(s - t).pow(2).mean((1, 2, 3)) for s, t in zip(aligned, side, strict=True)]
        if student_gradients is not None:
            rows = [row * g.abs().mean() for row, g in zip(rows, student_gradients, strict=True)]
        return {"aligned": torch.stack(rows)}
