"""CrossKD: the teacher's head on the student's head features has to say what the teacher says (arXiv 2306.11369)."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..outputs import HeadOutputs, as_maps, best_scores, check_outputs
from ..pyramid import Gradients, Pyramid, accumulate, stack_levels
from .assignment import generalized_overlap
from .base import Method, level_scaled, preset_options
from .outputs_loss import AssignedOutputsLoss, OutputsSide


class CrossKDLoss(AssignedOutputsLoss):
    """Cross-head knowledge distillation (Wang et al., CVPR 2024, arXiv 2306.11369; jbwang1997/CrossKD).

    Takes head outputs in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). `student_outputs` are crossed: what the
    teacher's head says of the student's head features, see `kdkernels.integrations.torchvision_heads.DenseHead.cross`: each branch's last
    convolution is the teacher's, as released (of FCOS the last two are there). With w = max_k sigma(p_T) of an anchor, sums over images,
    anchors, classes and edges, per level:

    classification = weight * classification / P * sum |sigma(p_S) - sigma(p_T)| * BCE(p_S, sigma(p_T))
    regression     = weight * regression / P * sum w * (1 - GIoU(box_S, box_T)), or, of two heads that regress by distributions,
    distribution   = weight * distribution / (4 W) * sum w * KL(softmax(teacher's) || softmax(student's))

    P is the number of positive anchors of the batch, an image without one counting as one; W the sum of w over all levels. The released
    code takes P from each detector's own assignment (GFL: ATSS, which it is here for all: `kdkernels.losses.assignment.assign`; RetinaNet:
    IoU; FCOS: the sum of the centerness targets), and for FCOS an IoU loss in place of GIoU, without the centerness.
    Batch-coupled: the entries split each level's value over its images.

    classification, regression, distribution: coefficients
    preset: one-stage, gfl and retinanet (1, 1, 4) | two-stage (the source has none at 87e156a: a copy of one-stage) | fcos (.4, .75, 4)
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "crosskd",
            "the teacher's head on the student's head features",
            "arXiv 2306.11369; jbwang1997/CrossKD",
            "c/P * sum |sigma_S - sigma_T| BCE(p_S, sigma_T) + r/P * sum max sigma_T (1 - GIoU)  (or KL of the distributions)",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
        "two-stage": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
        "gfl": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
        "retinanet": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
        "fcos": {"classification": 0.4, "regression": 0.75, "distribution": 4.0},
    }
    crosses = True
    parts = ("classification", "anchors", "boxes")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        classification: float | None = None,
        regression: float | None = None,
        distribution: float | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        super().__init__(weight, reduction, on_nonfinite)
        given = {"classification": classification, "regression": regression, "distribution": distribution}
        chosen = preset_options(self.PRESETS, preset, **given)
        self.preset, self.classification = preset, chosen["classification"]
        self.regression, self.distribution = chosen["regression"], chosen["distribution"]

    def coefficient(self, term: str) -> float:
        return self.weight * {"classification": self.classification, "regression": self.regression, "distribution": self.distribution}[term]

    def terms(
        self,
        student_features: Pyramid,
        side: OutputsSide,
        student_gradients: Gradients | None = None,
        student_outputs: HeadOutputs | None = None,
    ) -> dict[str, Tensor]:
        assert student_outputs is not None  # `require` has seen to it
        teacher = side.outputs
        check_outputs("class logits", student_outputs.classification, teacher.classification)
        check_outputs("boxes", student_outputs.boxes, teacher.boxes)
        weights = best_scores(teacher)
        positives = [stack_levels([chosen.sum(1) for chosen in side.assignment.positive]).sum(0).clamp(min=1).sum()] * len(weights)
        classes = ops.logit_bce(as_maps(student_outputs.classification), as_maps(teacher.classification), beta=1.0)
        found = {"classification": level_scaled(classes, self.coefficient("classification"), positives)}
        if student_outputs.distribution is not None and teacher.distribution is not None:
            own, theirs = student_outputs.distribution, teacher.distribution
            check_outputs("distributions", own, theirs)
            s, t = (as_maps([x.flatten(2) for x in levels]) for levels in (own, theirs))
            rows = ops.logit_kl(s, t, [w[:, :, None] for w in weights], groups=4)
            sizes = [4 * stack_levels([w.sum() for w in weights]).sum()] * len(weights)
            found["distribution"] = level_scaled(rows, self.coefficient("distribution"), sizes)
        else:
            pairs = zip(weights, student_outputs.boxes, teacher.boxes, strict=True)
            rows = stack_levels([(w * (1 - generalized_overlap(accumulate(a), accumulate(b)))).sum(1) for w, a, b in pairs])
            found["regression"] = level_scaled(rows, self.coefficient("regression"), positives)
        return found
