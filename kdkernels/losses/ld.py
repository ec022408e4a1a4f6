"""LD: localization distillation, of the distributions that boxes are regressed by (arXiv 2102.12252)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..outputs import HeadOutputs, as_maps, best_scores, check_outputs
from ..pyramid import Gradients, Pyramid, accumulate
from .base import Method, level_scaled, preset_options
from .outputs_loss import AssignedOutputsLoss, OutputsSide


class LDLoss(AssignedOutputsLoss):
    """Localization distillation (Zheng et al., CVPR 2022, arXiv 2102.12252; HikariTJU/LD).

    Takes the outputs of two heads that regress boxes by distributions, in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64).
    With KD(p, q; T) = T^2 * mean_bins q_T (log q_T - log p_T), q the teacher's, and for an anchor LD_a = sum over its four edges of KD, per
    image and level:

    localization   = weight * ld  / 4  * sum over positives of max_k sigma(p_S) * LD_a          (the score a constant)
    region         = weight * vlr / 16 * sum over the valuable localisation region of IoU * LD_a
    classification = weight * kd / P   * sum over positives of KD of the class logits           (a softmax over the classes, as released)

    at `temperature`, the last at `class_temperature`, P the number of the level's positives in the batch. Positives and region are those of
    `kdkernels.losses.assignment.assign` (ATSS, IoU with threshold, DIoU) for the teacher's anchors. The entries of the first two are
    separable; the last is batch-coupled, each level's value split over its images.

    Under AID the teacher's loss of regression weighs the first two terms and that of classification the last.

    ld, vlr, kd: coefficients;   temperature, class_temperature: above 0
    preset: one-stage (COCO, of the source: .25, .25, 10) | two-stage (the source has none: a copy of one-stage) |
            ld-kitti (.05, 0, .05: lanqz7766/AID's configurations for KITTI, which have no term of the region)
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "ld",
            "distributions of the box edges",
            "arXiv 2102.12252; HikariTJU/LD, of KITTI lanqz7766/AID",
            "ld/4 * sum_pos score KL + vlr/16 * sum_region IoU KL + kd/P * sum_pos KL(classes),  KL times T^2 / bins",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"ld": 0.25, "vlr": 0.25, "kd": 10.0, "temperature": 10.0, "class_temperature": 2.0},
        "two-stage": {"ld": 0.25, "vlr": 0.25, "kd": 10.0, "temperature": 10.0, "class_temperature": 2.0},
        "ld-kitti": {"ld": 0.05, "vlr": 0.0, "kd": 0.05, "temperature": 10.0, "class_temperature": 2.0},
    }

    weighed_by = {"localization": "regression", "region": "regression", "classification": "classification"}

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        ld: float | None = None,
        vlr: float | None = None,
        kd: float | None = None,
        temperature: float | None = None,
        class_temperature: float | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        super().__init__(weight, reduction, on_nonfinite)
        given = {"ld": ld, "vlr": vlr, "kd": kd, "temperature": temperature, "class_temperature": class_temperature}
        chosen = preset_options(self.PRESETS, preset, **given)
        if not min(chosen["temperature"], chosen["class_temperature"]) > 0:
            raise ValueError(f"temperatures must be above 0; got {chosen['temperature']} and {chosen['class_temperature']}")
        self.preset, self.ld, self.vlr, self.kd = preset, chosen["ld"], chosen["vlr"], chosen["kd"]
        self.temperature, self.class_temperature = chosen["temperature"], chosen["class_temperature"]

    def coefficient(self, term: str) -> float:
        return self.weight * {"localization": self.ld, "region": self.vlr, "classification": self.kd}[term]

    def terms(
        self,
        student_features: Pyramid,
        side: OutputsSide,
        student_gradients: Gradients | None = None,
        student_outputs: HeadOutputs | None = None,
    ) -> dict[str, Tensor]:
        assert student_outputs is not None  # `require` has seen to it
        teacher, (positive, region) = side.outputs, side.assignment
        own, theirs = _distribution("student", student_outputs), _distribution("teacher", teacher)
        check_outputs("distributions", own, theirs)
        check_outputs("class logits", student_outputs.classification, teacher.classification)
        scores = [score * chosen for score, chosen in zip(best_scores(student_outputs), positive, strict=True)]
        # In fp32: two gradients arrive at the student's, and a sum of two that were rounded to 16 bits is not good enough.
        s, t = as_maps([accumulate(x).flatten(2) for x in own]), as_maps([x.flatten(2) for x in theirs])
        places = self.coefficient("localization") / 4 * self._divergence(s, t, scores, self.temperature, 4)
        regions = self.coefficient("region") / 16 * self._divergence(s, t, region, self.temperature, 4)
        s, t = as_maps(student_outputs.classification), as_maps(teacher.classification)
        classes = self._divergence(s, t, positive, self.class_temperature, 1)
        counts = [chosen.sum() for chosen in positive]
        return {
            "localization": places,
            "region": regions,
            "classification": level_scaled(classes, self.coefficient("classification"), counts),
        }

    @staticmethod
    def _divergence(s: list[Tensor], t: list[Tensor], weights: Sequence[Tensor], temperature: float, groups: int) -> Tensor:
        """(L, N): the weighted sum over the anchors of KD, summed over the groups."""
        rows = ops.logit_kl(s, t, [w[:, :, None] for w in weights], temperature, groups)
        factors = [temperature**2 * groups / x.shape[1] for x in s]
        return torch.stack([row * factor for row, factor in zip(rows, factors, strict=True)]) if s else rows


def _distribution(side: str, outputs: HeadOutputs) -> list[Tensor]:
    if outputs.distribution is None:
        raise ValueError(
            f"LDLoss compares the distributions that boxes are regressed by, and the {side}'s head regresses plain numbers: give the "
            "detector a distribution (DetectorSpec's reg_max)"
        )
    return outputs.distribution
