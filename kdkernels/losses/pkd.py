"""PKD: distillation by the Pearson correlation of features (arXiv 2207.02039)."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..pyramid import Gradients, Pyramid, as_pyramid, check_match
from .base import Method, preset_options
from .comparison import ComparisonLoss, TeacherFeatures, resized
from .composed import student_levels


class PKDLoss(ComparisonLoss):
    """Distillation by the Pearson correlation coefficient (Cao et al., NeurIPS 2022, arXiv 2207.02039).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). Per level:

    correlation = weight / (2 N C H W) * sum_{n,c,h,w} (z_S - z_T)^2,   z = (F - mean) / (std + eps)

    with mean and unbiased standard deviation of each channel over (N, H, W): but for eps weight * (1 - r) * (NHW - 1) / NHW, r being
    Pearson's coefficient of student and teacher, averaged over the channels. Scale and offset of a channel do not matter, on either side.

    Batch-coupled: a level's total is split over the images by their sums of (z_S - z_T)^2. A channel of a single value (N H W = 1) has
    z = 0. Student and teacher need equal channels (adapter); a student of another size is resized to the teacher's (bilinear).

    weight: factor of the loss; None: the preset's
    preset: "one-stage": weight 10 (RetinaNet, of a teacher that is one or an FCOS); "two-stage": 6 (Faster R-CNN), both of
            open-mmlab/mmrazor's configurations; "gfl": 6 (jbwang1997/CrossKD's configuration of both methods together)
    eps:    above 0, added to the standard deviations
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "pkd",
            "correlation of the features",
            "arXiv 2207.02039; defaults of open-mmlab/mmrazor",
            "w/2 * mean (z_S - z_T)^2,  z = (F - mean)/(std + eps) of each channel over (N, H, W)",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"weight": 10.0, "eps": 1e-6},
        "two-stage": {"weight": 6.0, "eps": 1e-6},
        "gfl": {"weight": 6.0, "eps": 1e-6},
    }
    compares_features = True

    def __init__(
        self,
        weight: float | None = None,
        preset: str = "one-stage",
        eps: float | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        chosen = preset_options(self.PRESETS, preset, weight=weight, eps=eps)
        super().__init__(chosen["weight"], reduction, on_nonfinite)
        if not chosen["eps"] > 0:
            raise ValueError(f"eps must be above 0; got {eps}")
        self.preset, self.eps = preset, float(chosen["eps"])

    def check_features(self, student_features: Pyramid, teacher_features: Pyramid) -> None:
        student, student_names = as_pyramid("student_features", student_features)
        teacher, teacher_names = as_pyramid("teacher_features", teacher_features)
        check_match("student_features", student, student_names, "teacher_features", teacher, teacher_names, "NC")

    def terms(self, student_features: Pyramid, side: TeacherFeatures, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        features, _ = student_levels(student_features, side.names, side.features, "NC")
        features = [resized(s, t) for s, t in zip(features, side.features, strict=True)]
        return {"correlation": self.weight * ops.correlation(features, side.features, self.eps)}
