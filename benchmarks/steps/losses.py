"""Losses for the Distiller: one that only asks the teacher, and one that computes by a function of the registry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kdkernels.losses import DistillationLoss

from ..registry import Function, flat

#: Arguments of `DistillationLoss.teacher_side`, in order.
_SIDE = ("teacher_features", "teacher_gradients", "boxes", "image_size", "teacher_losses")


def all_needs(losses: Iterable[DistillationLoss]) -> frozenset[str]:
    """Everything that the losses need together."""
    return frozenset[str]().union(*(loss.needs for loss in losses))


class Probe(DistillationLoss):
    """Makes the Distiller ask its teacher for `needs`, and makes nothing of it: its value is 0."""

    def __init__(self, needs: frozenset[str]):
        super().__init__()
        self.needs = needs

    def teacher_side(self, teacher_features: Any, *args: Any, **given: Any) -> None:
        return None

    def terms(self, student_features: Any, side: None, student_gradients: Any = None) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(1, 1, device=student_features[0].device)}


class FunctionLoss(DistillationLoss):
    """A baseline in a training step: `function` of a registry's entry in place of the entry's own `losses`, and needing what they need."""

    def __init__(self, function: Function, losses: Iterable[DistillationLoss]):
        super().__init__()
        losses = list(losses)
        self.function = function
        self.needs = all_needs(losses)
        self.compares_features = any(loss.compares_features for loss in losses)

    def teacher_side(self, teacher_features: Any, *args: Any, **given: Any) -> dict[str, Any]:
        """What the function is to be given by name, student's side apart; what the loss does not need is None and left out."""
        side = dict(zip(_SIDE, (teacher_features, *args), strict=False)) | given
        return {name: value for name, value in side.items() if value is not None}

    def terms(self, student_features: Any, side: dict[str, Any], student_gradients: Any = None) -> dict[str, Tensor]:
        if student_gradients is not None:
            side = {**side, "student_gradients": student_gradients}
        # As kdkernels does in its own calls: a step under autocast must not round the sums of the loss.
        with torch.autocast(student_features[0].device.type, enabled=False):
            values = flat(self.function(student_features=student_features, **side))
        return {"loss": torch.stack([value.sum() for value in values]).sum().reshape(1, 1)}
