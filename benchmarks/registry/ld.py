"""LDLoss: the distributions of the box edges and the class logits of the anchors that count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import LDLoss, functional
from kdkernels.losses.assignment import assign

from .case import Case
from .entry import Entry, Inputs, boxes
from .features import cells, total
from .heads import CLASSES, head_bytes, numbers, outputs, split

BINS = 17
LD, VLR, KD, TEMPERATURE, CLASS_TEMPERATURE = 0.25, 0.25, 10.0, 10.0, 2.0


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made: Inputs = {}
    for who in ("student", "teacher"):
        made[who] = [*numbers(case, generator, device, CLASSES, 2.0), *numbers(case, generator, device, 4 * BINS, 2.0)]
    return {**made, "anchors": cells(case, device), "boxes": boxes(case, generator, device), "image_size": case.image_size}


def call(
    student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    (classes_s, edges_s), (classes_t, edges_t) = (split(x, 2) for x in (student, teacher))
    heads = outputs(classes_s, anchors, distribution=edges_s), outputs(classes_t, anchors, distribution=edges_t)
    features = [x[:, :1, None] for x in classes_s]
    return functional.ld(features, features, *heads, boxes, image_size)


def divergence(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean over the bins, the last axis."""
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (s, t))
    return temperature**2 * (log_q.exp() * (log_q - log_p)).mean(-1)


def eager(
    student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    """Every anchor by its weight, which mostly is 0. The anchors are assigned by the library's plain PyTorch."""
    found, rows = assign([a.float() for a in anchors], boxes), []
    levels = zip(*split(student, 2), *split(teacher, 2), found.positive, found.region, strict=True)
    for classes_s, edges_s, classes_t, edges_t, positive, region in levels:
        score = classes_s.detach().float().amax(2).sigmoid() * positive
        edges = divergence(edges_s.unflatten(2, (4, -1)), edges_t.unflatten(2, (4, -1)), TEMPERATURE).sum(2)
        classes = divergence(classes_s, classes_t, CLASS_TEMPERATURE) * positive
        places = (edges * (LD / 4 * score + VLR / 16 * region)).sum()
        rows.append(places + KD * classes.sum() / positive.sum().clamp(min=1))
    return total(rows)


def paper(
    student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    """As the released code: only the anchors that count, gathered."""
    found, rows = assign([a.float() for a in anchors], boxes), []
    levels = zip(*split(student, 2), *split(teacher, 2), found.positive, found.region, strict=True)
    for classes_s, edges_s, classes_t, edges_t, positive, region in levels:
        chosen = positive.nonzero(as_tuple=True)
        score = classes_s[chosen].detach().float().sigmoid().max(dim=1).values if len(chosen[0]) else region.new_zeros(0)
        rows.append(LD * (_gathered(edges_s[chosen], edges_t[chosen], TEMPERATURE, 4) * score[:, None]).sum() / 4)
        rows.append(KD * _gathered(classes_s[chosen], classes_t[chosen], CLASS_TEMPERATURE, 1).sum() / max(len(chosen[0]), 1))
        chosen = (region > 0).nonzero(as_tuple=True)
        rows.append(VLR * (_gathered(edges_s[chosen], edges_t[chosen], TEMPERATURE, 4) * region[chosen][:, None]).sum() / 16)
    return total(rows)


def _gathered(s: Tensor, t: Tensor, temperature: float, groups: int) -> Tensor:
    """(anchors, groups)"""
    s, t = (x.float().view(len(x), groups, x.shape[1] // groups) for x in (s, t))
    loss = F.kl_div(F.log_softmax(s / temperature, dim=2), F.softmax(t / temperature, dim=2), reduction="none")
    return loss.mean(2) * temperature**2


def small_bytes(case: Case, mode: str) -> int:
    """The anchors, as they are given; what is read of the few that count is not counted. The gradient is written for all."""
    anchors = 32 * case.pixels
    return anchors if mode == "forward" else anchors + head_bytes(case, CLASSES + 4 * BINS)


ENTRIES = (
    Entry(
        name="ld",
        kind="method",
        inputs=inputs,
        call=call,
        eager=eager,
        paper=paper,
        # No features.
        units={"forward": 0, "backward": 0, "backward_scaled": 0},
        small_bytes=small_bytes,
        differentiable="student",
        losses=lambda: {"ld": LDLoss()},
    ),
)
