"""GKD + BMFI, the whole of arXiv 2303.04240: in one FusedLoss call, and as two calls whose results are added."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import BMFILoss, FusedLoss, GKDLoss

from . import bmfi, gkd, published, vectorised
from .case import Case
from .entry import Entry, Function, Inputs, boxes
from .settle import settle_student

FUSED = FusedLoss({"gkd": GKDLoss(), "bmfi": BMFILoss()})


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = gkd.pyramids(case, generator, device) | {"boxes": boxes(case, generator, device), "image_size": case.image_size}
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_student(made, maps=True, attentions=True)


def one_call(**given: object) -> Tensor:
    return sum(FUSED(**given).values())


def both(maps: Function, imitation: Function) -> Function:
    """GKD's function and BMFI's, one after the other and added: there is no pass that they could share without a kernel of their own."""

    def call(
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        student_gradients: list[Tensor],
        teacher_gradients: list[Tensor],
        boxes: tuple[Tensor, Tensor],
        image_size: tuple[int, int],
    ) -> Tensor:
        loss: Tensor = maps(student_features, teacher_features, student_gradients, teacher_gradients)
        return loss + imitation(student_features, teacher_features, boxes, image_size)

    return call


two_calls = both(gkd.GKD, bmfi.BMFI)
#: One graph for the compiler, whichever entry it serves.
eager = both(vectorised.gkd, bmfi.eager)
paper = both(published.gkd, published.bmfi)

ENTRIES = (
    Entry(
        name="gkd_bmfi",
        kind="method",
        inputs=inputs,
        call=one_call,
        eager=eager,
        paper=paper,
        # forward: both gradients (2), then both features for maps, attentions and error sums alike (2): values need no second pass, see
        # bmfi.py. The others are the contract's (architecture, section 3): gradients (2), features for maps and attentions (2), features
        # and the gradient (3) are 7; at another d than 1 the gradient is read and written again, 9; inline, G_S is read once more, 8.
        units={"forward": 4, "backward": 7, "backward_scaled": 9, "inline": 8},
        differentiable="student_features",
        losses=lambda: {"gkd": GKDLoss(), "bmfi": BMFILoss()},
        settle=settle,
    ),
    Entry(
        name="gkd_bmfi_separate",
        kind="method",
        inputs=inputs,
        call=two_calls,
        eager=eager,
        paper=paper,
        # GKD's and BMFI's own, and autograd's addition of their gradients: two read, one written (3). There is no inline mode: a tap
        # takes all losses at once.
        units={"forward": 6, "backward": 13, "backward_scaled": 13},
        differentiable="student_features",
        settle=settle,
    ),
)
