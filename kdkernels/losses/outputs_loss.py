"""What the losses on a head's outputs share: the teacher's part, and what they are called with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..outputs import HeadOutputs, check_levels, detached
from ..pyramid import Gradients, Pyramid, as_pyramid
from .assignment import Assignment, assign
from .base import DistillationLoss, TeacherLosses, boxes_like


class OutputsSide(NamedTuple):
    """The teacher's part: its outputs, detached, and which of its anchors belong to the boxes."""

    outputs: HeadOutputs
    assignment: Assignment


class AssignedOutputsLoss(DistillationLoss):
    """Base of the losses on the outputs of a head at anchors that ATSS assigns to the boxes. Of the features only the sizes play a part.

    parts: of the outputs those that must not be missing
    """

    parts: tuple[str, ...] = ("classification", "anchors")

    needs = frozenset({"outputs", "boxes"})
    argument_names = ("student_features", "teacher_features", "student_outputs", "teacher_outputs", "boxes", "image_size")

    def forward(
        self,
        student_features: Pyramid,
        teacher_features: Pyramid,
        student_outputs: HeadOutputs | None = None,
        teacher_outputs: HeadOutputs | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none".

        boxes: list of (n_i, 4) xyxy pixels, or (padded (N, M, 4), counts (N,)); image_size: (H, W) in pixels that the features cover.
        Raises ValueError for a missing argument and for outputs that do not fit the features or each other, naming level and shapes.
        """
        given = {"student_outputs": student_outputs, "teacher_outputs": teacher_outputs, "boxes": boxes, "image_size": image_size}
        return self.evaluate(student_features, teacher_features, **given)

    @torch.no_grad()
    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
        teacher_outputs: HeadOutputs | None = None,
    ) -> OutputsSide:
        assert teacher_outputs is not None  # `require` has seen to it
        features, names = as_pyramid("teacher_features", teacher_features)
        check_levels(teacher_outputs, features, names, self.parts)
        found = detached(teacher_outputs)
        if not found.anchors:
            return OutputsSide(found, Assignment([], []))
        device = found.anchors[0].device
        return OutputsSide(found, assign(found.anchors, [b.to(device) for b in boxes_like(features, boxes)]))
