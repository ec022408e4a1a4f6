"""PKDLoss: correlation of the features."""

from __future__ import annotations

from torch import Tensor

from kdkernels import PKDLoss

from . import correlation
from .entry import Entry, Function
from .features import features


def of(rows: Function) -> Function:
    """The loss by one of `correlation`'s functions."""

    def loss(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
        return 10 * rows(student_features, teacher_features).sum()

    return loss


ENTRIES = (
    Entry(
        name="pkd",
        kind="method",
        inputs=features,
        call=PKDLoss(),
        eager=of(correlation.eager),
        paper=of(correlation.paper),
        units=correlation.ENTRIES[0].units,
        differentiable="student_features",
        losses=lambda: {"pkd": PKDLoss()},
    ),
)
