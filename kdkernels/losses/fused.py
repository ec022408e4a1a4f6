"""FusedLoss: several losses in one call, sharing what they can of the passes over the features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..outputs import HeadOutputs
from ..pyramid import Gradients, Pyramid
from .base import DistillationLoss, NonFinite, NonFiniteError, TeacherLosses
from .composed import teacher_sides, term_values
from .one_launch import in_one_launch


class FusedLoss(nn.Module):
    """Evaluates several losses on the same features and returns a dict of the same keys.

    Each value is what that loss alone gives for the same arguments, to the bit on the reference, which adds in the same order: boxes that
    are given for BMFI also weight GKD's imitation form.

    losses: name -> loss of this library.
    needs:  all that the losses need together; compares_features: whether one of them does.
    """

    def __init__(self, losses: Mapping[str, DistillationLoss]):
        super().__init__()
        if not losses:
            raise ValueError("FusedLoss needs at least one loss")
        for name, loss in losses.items():
            if not isinstance(loss, DistillationLoss):
                raise TypeError(f"FusedLoss, {name!r}: expected a loss of this library; got {type(loss).__name__}")
        self.losses = nn.ModuleDict(losses)
        self.needs = frozenset().union(*(loss.needs for loss in losses.values()))
        self.compares_features = any(loss.compares_features for loss in losses.values())

    def forward(
        self,
        student_features: Pyramid,
        teacher_features: Pyramid,
        student_gradients: Gradients | None = None,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
        student_outputs: HeadOutputs | None = None,
        teacher_outputs: HeadOutputs | None = None,
        anchors: Pyramid | None = None,
    ) -> dict[str, Tensor]:
        """name -> scalar, or (L, N) by that loss's reduction. Raises ValueError naming the loss and the argument that it misses."""
        given: dict[str, Any] = {
            "student_gradients": student_gradients,
            "teacher_gradients": teacher_gradients,
            "boxes": boxes,
            "image_size": image_size,
            "teacher_losses": teacher_losses,
            "student_outputs": student_outputs,
            "teacher_outputs": teacher_outputs,
            "anchors": anchors,
        }
        losses = dict(self._members())
        for name, loss in losses.items():
            loss.require(given, name)
            loss.check_features(student_features, teacher_features)
        student_gradients, student_outputs = given.pop("student_gradients"), given.pop("student_outputs")
        every = in_one_launch(losses, student_features, teacher_features, student_gradients, given)
        if every is None:
            sides = teacher_sides(losses, teacher_features, dict.fromkeys(losses, given))
            every = term_values(losses, student_features, sides, student_gradients, student_outputs)
        values = {}
        for name, terms in every.items():
            try:
                values[name] = losses[name].reduce(terms)
            except NonFiniteError as error:
                raise NonFiniteError([found._replace(loss=name) for found in error.found]) from None
        return values

    def check(self) -> list[NonFinite]:
        """The non-finite values of all losses since the last call, under the losses' names here. Synchronises and clears."""
        return [found._replace(loss=name) for name, loss in self._members() for found in loss.check()]

    def _members(self) -> Iterator[tuple[str, DistillationLoss]]:
        for name, loss in self.losses.items():
            yield name, cast(DistillationLoss, loss)
