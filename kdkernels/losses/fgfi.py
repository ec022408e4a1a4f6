"""FGFI: fine-grained feature imitation, near the objects only (arXiv 1906.03609)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..pyramid import Gradients, Pyramid, as_pyramid, check_choice, level_shapes
from ..reference.box_mask import CHUNK, Boxes, pad_boxes
from .assignment import overlaps
from .base import Method, TeacherLosses, boxes_like, level_scaled, preset_options
from .composed import student_levels
from .trainable import Align, Trainable

AVERAGES = ("half", "mean")
#: An anchor is near a box if its IoU is above this part of the largest that any anchor of any level has with it.
NEAR = 0.5


class FGFISide(NamedTuple):
    """The teacher's part of a FGFILoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    masks: list[Tensor]  # (N, H, W), 1 near the objects, else 0


class FGFILoss(Trainable):
    """Imitation where anchors overlap objects most (arXiv 1906.03609; twangnh/Distilling-Object-Detectors).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). The student's channels and sizes may
    differ: adapt is a trained 3x3 convolution with ReLU a level, its weights from N(0, 1e-4^2), bilinear interpolation where sizes differ.
    mask is 1 at a position with an anchor whose IoU with one of the image's boxes is above half the largest IoU of that box with any
    anchor of any level given; a box that touches none selects none. With P the number of selected positions of the level in the batch,
    of which a level whose anchors suit no box has none:

    half: imitation = weight / (2 P)   * sum_nchw mask * (adapt(F_S) - F_T)^2
    mean: imitation = weight / (C P)   * sum_nchw mask * (adapt(F_S) - F_T)^2      0 where P is 0

    Batch-coupled through P: the entries (L, N) split each level's value over its images.

    weight:  factor of the loss; 0.01 in the presets of the source
    preset:  one-stage | two-stage | ld-kitti (0.1) | ld-kitti-aid (0.12, under AID) | ld-coco (2.0), the last three without adapter and
             with average="mean" (LD's code; for KITTI lanqz7766/AID's configurations)
    adapter: False compares the features as they are, which then need equal channels and sizes (and has nothing to train)
    average: half | mean
    seed:    of the adapter's initial weights;   reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "fgfi",
            "fine-grained feature imitation",
            "arXiv 1906.03609; twangnh/Distilling-Object-Detectors",
            "weight/(2 P) * sum mask (adapt(F_S) - F_T)^2,  mask = near an object's best anchors, P = positions of the mask",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"weight": 0.01, "adapter": True, "average": "half"},
        "two-stage": {"weight": 0.01, "adapter": True, "average": "half"},
        "ld-kitti": {"weight": 0.1, "adapter": False, "average": "mean"},
        "ld-kitti-aid": {"weight": 0.12, "adapter": False, "average": "mean"},
        "ld-coco": {"weight": 2.0, "adapter": False, "average": "mean"},
    }
    needs = frozenset({"boxes", "anchors"})
    argument_names = ("student_features", "teacher_features", "boxes", "image_size", "anchors")

    def __init__(
        self,
        weight: float | None = None,
        preset: str = "one-stage",
        adapter: bool | None = None,
        average: str | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        chosen = preset_options(self.PRESETS, preset, weight=weight, adapter=adapter, average=average)
        super().__init__(chosen["weight"], reduction, on_nonfinite)
        check_choice("average", chosen["average"], AVERAGES)
        self.preset, self.adapter, self.average, self.seed = preset, chosen["adapter"], chosen["average"], seed
        self.compares_features = not self.adapter

    def forward(
        self,
        student_features: Pyramid,
        teacher_features: Pyramid,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        anchors: Pyramid | None = None,
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none".

        boxes: list of (n_i, 4) xyxy pixels, or (padded (N, M, 4), counts (N,)); image_size: (H, W) in pixels that the features cover.
        anchors: (H W k, 4) xyxy in pixels a level of the teacher, the k anchors of a position behind each other, positions row by row; a
        list, or a dict by the names of the teacher's levels. Raises ValueError for a missing argument or shapes that do not fit, naming
        both sides' level shapes, and TypeError for anchors that are no tensors.
        """
        return self.evaluate(student_features, teacher_features, boxes=boxes, image_size=image_size, anchors=anchors)

    def trains(self) -> bool:
        return self.adapter

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        align = Align(student, teacher, kernel_size=3, always=True, relu=True)
        for parameter in align.parameters():
            # Biases have one axis.
            nn.init.normal_(parameter, std=1e-4) if parameter.dim() > 1 else nn.init.zeros_(parameter)
        return align

    @torch.no_grad()
    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
        anchors: Pyramid | None = None,
    ) -> FGFISide:
        self.require({"boxes": boxes, "image_size": image_size, "anchors": anchors})
        assert anchors is not None  # as was just required
        features, names = as_pyramid("teacher_features", teacher_features)
        own = [a.to(x.device) for a, x in zip(_level_anchors(anchors, features, names), features, strict=True)]
        boxes = boxes_like(features, boxes)
        masks = near_anchors(own, boxes, [(x.shape[2], x.shape[3]) for x in features])
        return FGFISide([x.detach() for x in features], names, masks)

    def terms(self, student_features: Pyramid, side: FGFISide, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        student, _ = student_levels(student_features, side.names, side.features, "NCHW" if self.compares_features else "N")
        self.build(student, side.features)
        if self.trainable is not None:
            student = self.trainable(student, side.features)
        rows = ops.feature_imitation(student, side.features, side.masks)
        sizes = [m.sum() * (x.shape[1] if self.average == "mean" else 2) for m, x in zip(side.masks, side.features, strict=True)]
        return {"imitation": level_scaled(rows, self.weight, sizes)}


def near_anchors(anchors: Sequence[Tensor], boxes: Boxes, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(N, H, W) a level, 1 at the positions with an anchor near one of the image's boxes, else 0; anchors: (H W k, 4) a level."""
    if not anchors:
        return []
    own = torch.cat([a.float() for a in anchors])
    padded = pad_boxes(boxes).to(own.device)
    near = torch.zeros(padded.shape[0], own.shape[0], dtype=torch.bool, device=own.device)
    # The overlaps take several intermediates.
    step = max(1, CHUNK // 4 // max(1, near.numel()))
    for start in range(0, padded.shape[1], step):
        overlap = overlaps(padded[:, start : start + step], own)
        near |= (overlap > NEAR * overlap.amax(2, keepdim=True)).any(1)
    found = []
    for level, (height, width) in zip(near.split([len(a) for a in anchors], 1), sizes, strict=True):
        found.append(level.unflatten(1, (height, width, -1)).any(3).float())
    return found


def _level_anchors(anchors: Pyramid, features: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The anchors as a list in the order of the features' levels."""
    if not isinstance(anchors, (Mapping, Sequence)):
        raise TypeError(f"anchors must be a list, tuple or dict of (A, 4) tensors, one a level; got {type(anchors).__name__}")
    if isinstance(anchors, Mapping):
        named = {str(key): a for key, a in anchors.items()}
        if set(named) != set(names):
            raise ValueError(f"anchors are of levels {list(named)}, teacher_features have {level_shapes(features, names)}")
        own = [named[name] for name in names]
    else:
        own = list(anchors)
    if len(own) != len(features):
        raise ValueError(f"anchors are of {len(own)} levels, teacher_features have {level_shapes(features, names)}")
    for a, x, name in zip(own, features, names, strict=True):
        if not isinstance(a, Tensor):
            raise TypeError(f"anchors, level {name}: expected a tensor, got {type(a).__name__}")
        if a.dim() != 2 or a.shape[1] != 4 or a.shape[0] % (x.shape[2] * x.shape[3]) or not len(a):
            wanted = f"a multiple of {x.shape[2]} * {x.shape[3]} rows of 4"
            raise ValueError(f"level {name}: anchors have shape {tuple(a.shape)}, teacher_features {tuple(x.shape)} want {wanted}")
    return own
