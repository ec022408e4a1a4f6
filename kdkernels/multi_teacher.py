"""Several teachers for one student, each with a share in every loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.distillation_call import DistillationCall
from kdkernels.distiller import Distiller
from kdkernels.distiller import inline_refusals as refusals_with_one
from kdkernels.losses.aid import TeacherShare, teacher_shares
from kdkernels.losses.base import DistillationLoss, NonFinite
from kdkernels.pyramid import check_choice
from kdkernels.teacher import Teacher

WEIGHTS = ("softmax", "argmin", "none")


class MultiTeacherDistiller:
    """A Distiller with several teachers: each loss is the sum over the teachers of its value times their share.

    Args:
        student: the detector to train.
        teachers: two or more detectors, or `Teacher`s.
        losses: name to loss. Every teacher gets a copy of each, so that parts that train are its own.
        teacher_weights: the shares, image by image, from each teacher's own detection loss on the image (`teacher_shares`): "softmax",
            exp(-loss) over their sum; "argmin", 1 for the best teacher and 0 for the others; "none", 1 for all. AIDLoss multiplies by
            its own weight besides.
        options: those of `Distiller`.

    Raises:
        ValueError: fewer than two teachers, or in inline mode a loss that needs the student's gradients: what passes by there holds the
            gradient of the other teachers' losses too. Use mode='explicit'.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module | Teacher],
        losses: Mapping[str, DistillationLoss],
        teacher_weights: str = "softmax",
        **options: Any,
    ) -> None:
        check_choice("teacher_weights", teacher_weights, WEIGHTS)
        if len(teachers) < 2:
            raise ValueError(f"teachers: expected two or more, got {len(teachers)}; one teacher is the Distiller's")
        if options.get("mode", "inline") == "inline":
            for refusal in inline_refusals(losses, len(teachers)):
                raise ValueError(f"{refusal}; use mode='explicit', which takes the student's gradient from the detector's losses alone")
        self.teacher_weights = teacher_weights
        self._calls: list[DistillationCall] = []
        self._shares: list[Tensor] = []
        self._values: list[dict[str, Tensor]] = []
        self.parts: list[Distiller] = []
        for index, teacher in enumerate(teachers):
            own = {name: loss if index == 0 else copy.deepcopy(loss) for name, loss in losses.items()}
            if teacher_weights != "none":
                own = {name: TeacherShare(loss, partial(self._share, index)) for name, loss in own.items()}
            self.parts.append(Distiller(student, teacher, own, **options))
        self.student, self.losses, self.adapter = student, dict(losses), self.parts[0].adapter
        #: For checkpoints: the random streams of all teachers.
        self.teacher = Streams([part.teacher for part in self.parts])

    @property
    def trainable(self) -> nn.ModuleDict:
        """The trainable parts of all teachers."""
        return nn.ModuleDict({f"teacher{index}": part.trainable for index, part in enumerate(self.parts)})

    def _share(self, index: int) -> Tensor:
        if not self._shares:
            # Losses ask for their weights without gradients, and a teacher that is asked here first may have to give its own.
            with torch.enable_grad():
                found = [call._output().losses for call in self._calls]
            self._shares = teacher_shares([losses[None, :] for losses in found if losses is not None], self.teacher_weights)
        return self._shares[index]

    def __call__(self, images: Any, targets: Any) -> dict[str, Tensor]:
        """The student's own losses plus one scalar per distillation loss, summed over the teachers."""
        self._shares, self._calls = [], [DistillationCall(part, images, targets) for part in self.parts]
        for part, call in zip(self.parts, self._calls, strict=True):
            part._call = call
        try:
            task = self.adapter.losses(self.student, images, targets)
        finally:
            for part in self.parts:
                part._call = None
                part._tap.clear()
        self._values = [call.record.values for call in self._calls]
        result = dict(task)
        for call in self._calls:
            for name, value in call.finish(task).items():
                if name not in task:
                    result[name] = result[name] + value if name in result else value
        self._calls, self._shares = [], []
        return result

    def build(self, images: Any, targets: Any) -> MultiTeacherDistiller:
        """`Distiller.build` for every teacher."""
        for part in self.parts:
            part.build(images, targets)
        return self

    def prepare(self, wrap: Callable[[nn.Module], nn.Module] | None = None) -> MultiTeacherDistiller:
        """`Distiller.prepare` for every teacher."""
        for part in self.parts:
            part.prepare(wrap)
        return self

    def last_values(self) -> dict[str, Tensor]:
        """Value of every loss and term of the last call, summed over the teachers."""
        found: dict[str, Tensor] = {}
        for values in self._values:
            for name, value in values.items():
                found[name] = found[name] + value if name in found else value
        return found

    def check(self) -> list[NonFinite]:
        """`Distiller.check` of every teacher."""
        return [report for part in self.parts for report in part.check()]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, teacher by teacher."""
        return {"teachers": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError for another number of teachers."""
        for part, own in zip(self.parts, state["teachers"], strict=True):
            part.load_state_dict(own)

    def close(self) -> None:
        """Take all hooks off the student and the teachers."""
        for part in self.parts:
            part.close()


def inline_refusals(losses: Mapping[str, DistillationLoss], teachers: int = 1) -> list[str]:
    """Why these losses cannot be computed inside the backward pass with so many teachers, a sentence a reason; none if they can."""
    late = [name for name, loss in losses.items() if "student_gradients" in loss.needs]
    several = [f"losses {late} need the student's gradient, and in what passes by there is that of the other teachers' losses"]
    return [*refusals_with_one(losses), *(several if late and teachers > 1 else [])]


class Streams:
    """The random streams of several teachers as one state."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = list(teachers)

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": [teacher.state_dict() for teacher in self.teachers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for teacher, own in zip(self.teachers, state["teachers"], strict=True):
            teacher.load_state_dict(own)
