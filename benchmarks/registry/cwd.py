"""CWDLoss: every channel as a distribution over the map, by the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import CWDLoss

from . import channel_kl
from .entry import Entry, Function
from .features import features


def of(rows: Function) -> Function:
    """The loss by one of `channel_kl`'s functions."""

    def loss(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
        images = torch.tensor([x.shape[0] * x.shape[1] for x in student_features], device=student_features[0].device)
        return (10 * rows(student_features, teacher_features, 1.0) / images[:, None]).sum()

    return loss


ENTRIES = (
    Entry(
        name="cwd",
        kind="method",
        inputs=features,
        call=CWDLoss(preset="mmrazor"),
        eager=of(channel_kl.eager),
        paper=of(channel_kl.paper),
        units=channel_kl.ENTRIES[0].units,
        differentiable="student_features",
        losses=lambda: {"cwd": CWDLoss(preset="mmrazor")},
    ),
)
