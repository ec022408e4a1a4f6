"""GID: general instances, where student and teacher differ most, compared by features, relations and answers (arXiv 2103.02340)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..outputs import HeadOutputs, as_maps, best_scores, check_levels, check_outputs, detached
from ..pyramid import Gradients, Pyramid, accumulate, as_pyramid, level_shapes, quotient, split_over_images
from .assignment import overlaps
from .base import DistillationLoss, Method, TeacherLosses, preset_options
from .composed import student_levels

#: Candidates and instances of an image, the overlap from which one of two is dropped, and from which an anchor belongs to an instance.
BEFORE, AFTER, DROP, MATCH = 3000, 10, 0.3, 0.5
#: Cells of a region's side; of so few instances in a batch on their relations say something.
RESOLUTION, RELATED = 10, 3
#: A box is bounded to this many image sizes around the image: a diverged one would take for ever to pool.
BOUND = 8.0


class GIDSide(NamedTuple):
    """The teacher's part of a GIDLoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    outputs: HeadOutputs  # detached
    strides: list[float]


class GIDLoss(DistillationLoss):
    """General instance distillation (Dai et al., CVPR 2021, arXiv 2103.02340; daixinghome/Distill_GID_detectron2).

    Takes pyramids of (N, C, H, W) and head outputs in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). Needs torchvision.
    An anchor's score is max_k |sigma(p_T) - sigma(p_S)|; its box is the teacher's where max_k sigma(p_T) > max_k sigma(p_S), else the
    student's. The instances of an image are the 10 boxes that score best after non-maximum suppression (IoU above 0.3) of its 3000 best
    anchors over all levels; boxes are constants. R_i is instance i's region, 10 x 10 by RoIAlign (half-pixel alignment, as many samples a
    cell as it is positions long) of the level floor(4 + log2(sqrt(area) / 224)), of those given; K instances in the batch; D_ij = |R_i -
    R_j|, over the mean of all i != j. An anchor belongs to an instance with which its own box has an IoU of 0.5 or more; P in the batch.

    feature        = weight * feature / (100 K) * sum_i (R_i^S - R_i^T)^2
    relation       = weight * relation / (K^2 - K) * sum_{i != j} smooth_l1(D_ij^S - D_ij^T)             0 where K < 3
    classification = weight * classification / P * sum_{a,k} BCE(p_S, sigma(p_T))       over the anchors that belong to an instance
    regression     = weight * regression / P * sum_a |r_S - r_T|                        over the same, r as the head regresses

    Level-free: entries (1, N), each term's value split over the images by their sums, the relations' equally. Student and teacher need
    equal channels and sizes (adapter), and all levels the same channels (not SSD's), the finest level first. Strides are the distance of
    the teacher's anchors of neighbouring cells. Boxes are not clipped to the image, nor small ones dropped, as the released code does; its
    shared adapter, which it never applies, is left out. How many instances there are is asked of the device, which waits; on a GPU the
    gradient of RoIAlign is the same from run to run only with `torch.use_deterministic_algorithms(True)`.

    feature, relation, classification, regression: coefficients
    preset: one-stage | two-stage, both 5e-4, 40, .1, 1 (the configuration of the source, a RetinaNet)
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "gid",
            "instances on which student and teacher differ",
            "arXiv 2103.02340; daixinghome/Distill_GID_detectron2",
            "f/(100 K) * sum (R_S - R_T)^2 + r * smooth_l1(d_S - d_T) + c * BCE + b * |box_S - box_T|,  R = RoI features of GI boxes",
            "level-free",
        ),
    )
    PRESETS = {
        "one-stage": {"feature": 5e-4, "relation": 40.0, "classification": 0.1, "regression": 1.0},
        "two-stage": {"feature": 5e-4, "relation": 40.0, "classification": 0.1, "regression": 1.0},
    }
    needs = frozenset({"outputs"})
    compares_features = True
    level_free = True
    argument_names = ("student_features", "teacher_features", "student_outputs", "teacher_outputs")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        feature: float | None = None,
        relation: float | None = None,
        classification: float | None = None,
        regression: float | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        super().__init__(weight, reduction, on_nonfinite)
        given = {"feature": feature, "relation": relation, "classification": classification, "regression": regression}
        chosen = preset_options(self.PRESETS, preset, **given)
        self.preset, self.feature, self.relation = preset, chosen["feature"], chosen["relation"]
        self.classification, self.regression = chosen["classification"], chosen["regression"]

    def forward(
        self,
        student_features: Pyramid,
        teacher_features: Pyramid,
        student_outputs: HeadOutputs | None = None,
        teacher_outputs: HeadOutputs | None = None,
    ) -> Tensor:
        """Scalar, or (1, N) with reduction="none".

        Raises ValueError for a missing argument or shapes that do not fit, naming both sides', and ImportError without torchvision.
        """
        return self.evaluate(student_features, teacher_features, student_outputs=student_outputs, teacher_outputs=teacher_outputs)

    def coefficient(self, term: str) -> float:
        return self.weight * getattr(self, term)

    @torch.no_grad()
    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
        teacher_outputs: HeadOutputs | None = None,
    ) -> GIDSide:
        features, names = as_pyramid("teacher_features", teacher_features)
        assert teacher_outputs is not None  # `require` has seen to it
        if len({x.shape[1] for x in features}) > 1:
            raise ValueError(f"GIDLoss relates the regions of all levels, which need equal channels: {level_shapes(features, names)}")
        check_levels(teacher_outputs, features, names, ["classification", "regression", "anchors", "boxes"], cells=True)
        outputs = detached(teacher_outputs)
        strides = anchor_strides(outputs.anchors, [(x.shape[2], x.shape[3]) for x in features], names)
        return GIDSide([x.detach() for x in features], names, outputs, strides)

    def terms(
        self,
        student_features: Pyramid,
        side: GIDSide,
        student_gradients: Gradients | None = None,
        student_outputs: HeadOutputs | None = None,
    ) -> dict[str, Tensor]:
        student, _ = student_levels(student_features, side.names, side.features)
        assert student_outputs is not None  # `require` has seen to it
        for what in ("classification", "regression", "boxes"):
            check_outputs(what, getattr(student_outputs, what), getattr(side.outputs, what))
        if not student or not student[0].shape[0]:
            # In the graph: whoever trains calls backward, whatever the batch.
            seen = [*student, *student_outputs.classification, *student_outputs.regression, *student_outputs.boxes]
            nothing = sum((accumulate(x).sum() for x in seen), torch.zeros((), device=seen[0].device if seen else None))
            return {term: nothing.expand(1, 0) for term in self.PRESETS["one-stage"]}
        height, width = student[0].shape[2:]
        bound = BOUND * side.strides[0] * max(height, width)
        instances = general_instances(student_outputs, side.outputs, bound)
        return {**self._regions(student, side, instances), **self._answers(student_outputs, side.outputs, instances)}

    def _regions(self, student: list[Tensor], side: GIDSide, instances: list[Tensor]) -> dict[str, Tensor]:
        own, theirs = (pool_regions(levels, instances, side.strides) for levels in (student, side.features))
        count = own.shape[0]
        apart = (own - theirs).square().sum(1)
        rows = torch.stack([image.sum() for image in apart.split([len(boxes) for boxes in instances])])
        feature = rows.sum() * (self.coefficient("feature") / (max(count, 1) * RESOLUTION**2))
        relation = apart.new_zeros(())
        if count >= RELATED:
            total = F.smooth_l1_loss(distances(own), distances(theirs), reduction="sum")
            relation = total * (self.coefficient("relation") / (count * count - count))
        return {
            "feature": split_over_images(feature[None], rows[None]),
            "relation": split_over_images(relation[None], torch.zeros_like(rows)[None]),
        }

    def _answers(self, student: HeadOutputs, teacher: HeadOutputs, instances: list[Tensor]) -> dict[str, Tensor]:
        anchors = torch.cat([accumulate(a) for a in teacher.anchors])
        matched = torch.stack([(overlaps(boxes.to(anchors), anchors) >= MATCH).any(0) for boxes in instances]).to(anchors.dtype)
        p_s, p_t = (torch.cat(o.classification, 1) for o in (student, teacher))
        r_s, r_t = (torch.cat([accumulate(x) for x in o.regression], 1) for o in (student, teacher))
        classes = ops.logit_bce(as_maps([p_s]), as_maps([p_t]), [matched[:, :, None]])
        sides = ((r_s - r_t).abs().sum(2) * matched).sum(1)[None]
        count = matched.sum().clamp(min=1)
        return {
            name: split_over_images(rows.sum(1) * self.coefficient(name) / count, rows)
            for name, rows in (("classification", classes), ("regression", sides))
        }


def anchor_strides(anchors: Sequence[Tensor], sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> list[float]:
    """Pixels between the anchors of neighbouring cells of each level (H, W); of one with a single cell twice the level's before.

    Raises ValueError, naming the levels, unless they are above 0 and ascend.
    """
    found: list[float] = []
    for a, (height, width) in zip(anchors, sizes, strict=True):
        if height * width > 1:
            step, axis = (1, 0) if width > 1 else (width, 1)
            away = len(a) // (height * width) * step
            found.append(float(a[away, axis] - a[0, axis]))
        else:
            found.append(2 * found[-1] if found else float((a[0, 2:] - a[0, :2]).mean()))
    # Each has to be more than the one before, the first more than 0; of NaN that is false.
    if not all(small < large < math.inf for small, large in pairwise([0.0, *found])):
        listed = ", ".join(f"{name}: {stride:g}" for name, stride in zip(names, found, strict=True))
        wanted = "wanted ascending ones above 0, the finest level first"
        raise ValueError(f"teacher_outputs: the levels' anchors have strides [{listed}], {wanted}")
    return found


@torch.no_grad()
def general_instances(student: HeadOutputs, teacher: HeadOutputs, bound: float) -> list[Tensor]:
    """The instances' boxes (at most 10, 4) of each image, within `bound` pixels; a box or score that is not finite comes last."""
    nms = _torchvision_ops().nms
    sigma_s, sigma_t = (torch.cat([accumulate(x).sigmoid() for x in o.classification], 1) for o in (student, teacher))
    best_s, best_t = (torch.cat(best_scores(o), 1) for o in (student, teacher))
    box_s, box_t = (torch.cat([accumulate(x) for x in o.boxes], 1) for o in (student, teacher))
    scores = (sigma_t - sigma_s).abs().amax(2)
    boxes = torch.where((best_t > best_s)[:, :, None], box_t, box_s)
    sound = boxes.isfinite().all(2) & scores.isfinite()
    boxes = torch.where(sound[:, :, None], boxes, 0).clamp(-bound, bound)
    scores = torch.where(sound, scores, -1)
    kept = []
    for own, score in zip(boxes, scores, strict=True):
        order = score.argsort(descending=True, stable=True)[:BEFORE]
        own, score = own[order], score[order]
        kept.append(own[nms(own, score, DROP)[:AFTER]])
    return kept


def pool_regions(levels: Sequence[Tensor], instances: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
    """(K, C * 100): RoIAlign of every instance on the level that suits its size."""
    align = _torchvision_ops().roi_align
    boxes = torch.cat(list(instances))
    owner = torch.cat([boxes.new_full((len(own), 1), n) for n, own in enumerate(instances)])
    first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    # Of a box without area the logarithm is minus infinity, and its level the first.
    level = (4 + ((boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt() / 224).log2()).floor().clamp(first, last)
    place = (level - first).clamp(max=len(levels) - 1)
    pooled = accumulate(levels[0]).new_zeros(len(boxes), levels[0].shape[1] * RESOLUTION**2)
    for i, (x, stride) in enumerate(zip(levels, strides, strict=True)):
        chosen = (place == i).nonzero()[:, 0]
        own = accumulate(x)
        regions = align(own, torch.cat([owner, boxes], 1)[chosen].to(own.dtype), RESOLUTION, 1 / stride, 0, True)
        pooled = pooled.index_copy(0, chosen, regions.flatten(1))
    return pooled


def distances(regions: Tensor) -> Tensor:
    """(K, K) from (K, D): the regions' distances, over the mean of those of two different ones; 0 where all are the same."""
    apart = torch.cdist(regions, regions, compute_mode="donot_use_mm_for_euclid_dist")
    count = len(regions)
    return quotient(apart, apart.sum() / (count * count - count))


def _torchvision_ops() -> Any:
    try:
        return importlib.import_module("torchvision.ops")
    except ImportError as error:
        raise ImportError("GIDLoss pools regions with torchvision, which is not installed: pip install torchvision") from error
