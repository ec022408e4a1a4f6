"""BMFILoss with its defaults: region and attention grains."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import BMFILoss

from . import published, vectorised
from .case import Case
from .entry import Entry, Inputs, boxes, pyramid
from .settle import settle_student

BMFI = BMFILoss()
#: forward: S and T once (2). That is enough for values: a pixel's spatial attention is known but for a factor as soon as its channels are
#: read, so sums a channel of mask x attention x error come from the same pass, and the channel attention is applied to those sums.
#: backward: the gradient needs the finished attentions, so S and T for these (2), then S, T and the gradient (3).
#: backward_scaled: the values come with the first pass and the second is made when d is known: the same.
#: inline: G_S is read besides (1).
UNITS = {"forward": 2, "backward": 5, "backward_scaled": 5, "inline": 6}


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = {
        "student_features": pyramid(case, generator, device),
        "teacher_features": pyramid(case, generator, device),
        "boxes": boxes(case, generator, device),
        "image_size": case.image_size,
    }
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_student(made, maps=False, attentions=True)


def eager(
    student_features: list[Tensor], teacher_features: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    return vectorised.bmfi_images(student_features, teacher_features, boxes, image_size).sum()


ENTRIES = (
    Entry(
        name="bmfi",
        kind="method",
        inputs=inputs,
        call=BMFI,
        eager=eager,
        paper=published.bmfi,
        units=UNITS,
        differentiable="student_features",
        losses=lambda: {"bmfi": BMFILoss()},
        settle=settle,
    ),
)
