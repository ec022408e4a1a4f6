"""DeFeat: imitation of object regions and background apart, in features and in the head (arXiv 2103.14475)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.terms import ImitationTerm
from ..pyramid import Gradients, Pyramid, accumulate, as_pyramid, check_choice
from .base import Method, TeacherLosses, level_masks, level_scaled, preset_options
from .composed import student_levels
from .trainable import Align, Trainable

AVERAGES = ("half", "mean")


class DeFeatSide(NamedTuple):
    """The teacher's part of a DeFeatLoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    foreground: list[Tensor]  # (N, H, W): 1 on the boxes of the level, else 0
    background: list[Tensor]  # (N, H, W): 1 elsewhere


class DeFeatLoss(Trainable):
    """Imitation of object regions and of the background with factors of their own (arXiv 2103.14475; ggjy/DeFeat.pytorch).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). The student's channels and sizes may
    differ: adapt is a trained 3x3 convolution a level, with bilinear interpolation where sizes differ. mask is 1 on the boxes that the
    level is responsible for by their size (`assigned` of `kdkernels.reference.box_mask`); E = (adapt(F_S) - F_T)^2, and the sums over
    n, c, h, w count a position once a channel:

    half: foreground = alpha / L * sum mask * E / max(1, 2 sum mask),    background = beta / L * the same with 1 - mask
    mean: foreground = alpha * sum mask * E / sum mask,                  background = beta * the same with 1 - mask; 0 where a sum is 0

    Batch-coupled through the masks' sums: the entries (L, N) split each level's value over its images.

    weight:      factor of the loss;   alpha, beta: 3 and 12 in the presets of the source
    preset:      one-stage | two-stage | ld-kitti (0.1 and 0.2) | ld-coco (2 and 4), the last two without adapter and with average="mean":
                 weights and mean of LD's code, the mask of DeFeat. LD's mask has every anchor whose centre lies inside a box, at every
                 level, and a level without foreground has no background either
    adapter:     False compares the features as they are, which then need equal channels and sizes (and has nothing to train)
    average:     half | mean
    seed:        of the adapter's initial weights;   reduction, on_nonfinite: see DistillationLoss

    The head's part of the method is `defeat_head`.
    """

    methods = (
        Method(
            "defeat",
            "decoupled features of objects and background",
            "arXiv 2103.14475; ggjy/DeFeat.pytorch",
            "alpha/L * sum M (adapt(F_S) - F_T)^2 / max(1, 2 sum M) + beta/L * the same with 1 - M",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"alpha": 3.0, "beta": 12.0, "adapter": True, "average": "half"},
        "two-stage": {"alpha": 3.0, "beta": 12.0, "adapter": True, "average": "half"},
        "ld-kitti": {"alpha": 0.1, "beta": 0.2, "adapter": False, "average": "mean"},
        "ld-coco": {"alpha": 2.0, "beta": 4.0, "adapter": False, "average": "mean"},
    }
    needs = frozenset({"boxes"})
    argument_names = ("student_features", "teacher_features", "boxes", "image_size")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        alpha: float | None = None,
        beta: float | None = None,
        adapter: bool | None = None,
        average: str | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        super().__init__(weight, reduction, on_nonfinite)
        chosen = preset_options(self.PRESETS, preset, alpha=alpha, beta=beta, adapter=adapter, average=average)
        check_choice("average", chosen["average"], AVERAGES)
        self.preset, self.alpha, self.beta, self.seed = preset, chosen["alpha"], chosen["beta"], seed
        self.adapter, self.average = chosen["adapter"], chosen["average"]
        self.compares_features = not self.adapter

    def coefficient(self, term: str) -> float:
        return self.weight * {"foreground": self.alpha, "background": self.beta}[term]

    def forward(
        self, student_features: Pyramid, teacher_features: Pyramid, boxes: Any = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none".

        boxes: list of (n_i, 4) xyxy pixels, or (padded (N, M, 4), counts (N,)); image_size: (H, W) in pixels that the features cover.
        Raises ValueError for a missing argument or shapes that do not fit, naming both sides' level shapes.
        """
        return self.evaluate(student_features, teacher_features, boxes=boxes, image_size=image_size)

    def trains(self) -> bool:
        return self.adapter

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return Align(student, teacher, kernel_size=3, always=True)

    @torch.no_grad()
    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
    ) -> DeFeatSide:
        self.require({"boxes": boxes, "image_size": image_size})
        features, names = as_pyramid("teacher_features", teacher_features)
        masks = level_masks(features, boxes, image_size, "assigned")
        return DeFeatSide([x.detach() for x in features], names, masks, [1 - m for m in masks])

    def terms(self, student_features: Pyramid, side: DeFeatSide, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        student, _ = student_levels(student_features, side.names, side.features, "NCHW" if self.compares_features else "N")
        self.build(student, side.features)
        if self.trainable is not None:
            student = self.trainable(student, side.features)
        regions = {"foreground": side.foreground, "background": side.background}
        # Both from one pass over the features.
        rows = ops.terms(student, [(ImitationTerm(side.features, masks, None), 1.0) for masks in regions.values()])
        found = {}
        for (term, masks), own in zip(regions.items(), rows, strict=True):
            sizes = [m.sum() * x.shape[1] for m, x in zip(masks, side.features, strict=True)]
            share = self.coefficient(term)
            if self.average == "half":
                sizes, share = [(2 * size).clamp(min=1) for size in sizes], share / max(len(sizes), 1)
            found[term] = level_scaled(own, share, sizes)
        return found


def defeat_head(student_logits: Tensor, teacher_logits: Tensor, foreground: Tensor, alpha: float = 2.0, beta: float = 2.0) -> Tensor:
    """DeFeat's part on the head: alpha * mean over the foreground rows of KL(p_T || p_S) + beta * that of the others, a scalar.

    student_logits, teacher_logits: (R, K) class logits, background included, of the same R proposals, 16-bit, fp32 or fp64; p = softmax of
    temperature 1. foreground: (R,) bool. The mean over no rows is 0. The result is fp32 (fp64 for fp64); the teacher gets no gradient.
    Raises ValueError, with the shapes, where they do not fit. Source: arXiv 2103.14475, whose released neck configuration leaves it out.
    """
    shapes = [tuple(x.shape) for x in (student_logits, teacher_logits, foreground)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"student_logits and teacher_logits must be (R, K) alike, foreground (R,); got {', '.join(map(str, shapes))}")
    s, t = accumulate(student_logits).log_softmax(1), accumulate(teacher_logits.detach()).log_softmax(1)
    divergence = (t.exp() * (t - s)).sum(1)
    # Masks, not indices: the number of rows chosen is not asked for.
    inside = foreground.bool()
    total = divergence.new_zeros(())
    for factor, chosen in ((alpha, inside), (beta, ~inside)):
        total = total + factor * torch.where(chosen, divergence, 0).sum() / chosen.sum().clamp(min=1)
    return total
