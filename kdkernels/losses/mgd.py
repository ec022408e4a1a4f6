"""MGD: masked generative distillation (arXiv 2205.01529)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..pyramid import Gradients, Pyramid
from .base import Method, preset_options
from .comparison import ComparisonLoss, TeacherFeatures
from .composed import student_levels
from .trainable import Align, Trainable, as_parameters


class MGDLoss(ComparisonLoss, Trainable):
    """Masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529): the teacher's features from part of the student's.

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; the convolutions are in their parameters' type, the rest and the result are
    fp32 (fp64 for fp64). Per level and image:

    generation = weight * alpha / N * sum_{c,h,w} (G(m * align(F_S)) - F_T)^2,   G = conv3x3, ReLU, conv3x3

    with m (N, 1, H, W) = 0 with probability `ratio`, else 1, anew at every evaluation (`ops.random_mask`), and align a 1x1 convolution
    where channels differ and an interpolation where sizes do. G keeps the teacher's number of channels. A student's NaN where m is 0
    is hidden like any other value: neither the result nor on_nonfinite shows it.

    Separable: each entry (l, n) depends on its own level and image alone.

    weight: factor of alpha
    preset: "one-stage": alpha 2e-5, ratio 0.65 (RetinaNet, RepPoints); "two-stage": 5e-7, 0.45 (Faster and Mask R-CNN); yzd-v/MGD
    alpha:  of the loss;   ratio: of the cells that are masked, in [0, 1]
    seed:   of the initial parameters and of the masks. The buffer `trainable.state` (seed, number of evaluations) names the masks: it
            counts up after every evaluation in training mode, and a state_dict repeats them. Losses of one seed have the same masks,
            and so have all processes of a distributed run
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "mgd",
            "masked generative distillation",
            "arXiv 2205.01529; defaults of yzd-v/MGD",
            "alpha/N * ||G(m * align(F_S)) - F_T||^2,  m = 0 with probability ratio, else 1,  G = conv3x3, ReLU, conv3x3",
            "separable",
        ),
    )
    PRESETS = {"one-stage": {"alpha": 2e-5, "ratio": 0.65}, "two-stage": {"alpha": 5e-7, "ratio": 0.45}}

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        alpha: float | None = None,
        ratio: float | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        super().__init__(weight, reduction, on_nonfinite)
        chosen = preset_options(self.PRESETS, preset, alpha=alpha, ratio=ratio)
        if not 0 <= chosen["ratio"] <= 1:
            raise ValueError(f"ratio must be in [0, 1]; got {ratio}")
        self.preset, self.alpha, self.ratio, self.seed = preset, float(chosen["alpha"]), float(chosen["ratio"]), seed

    def coefficient(self, term: str) -> float:
        return self.weight * self.alpha

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return MaskedGeneration(student, teacher, self.ratio, self.seed)

    def terms(self, student_features: Pyramid, side: TeacherFeatures, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        features, _ = student_levels(student_features, side.names, side.features, "N")
        if not features:
            return {"generation": torch.zeros(0, 0)}
        parts = self.build(features, side.features).trainable
        assert parts is not None
        rows = ops.feature_imitation(parts(features, side.features), side.features)
        return {"generation": self.weight * self.alpha / max(rows.shape[1], 1) * rows}


class MaskedGeneration(nn.Module):
    """MGD's alignment, mask and generator of every level.

    state: int64 (2,), the seed and the number of evaluations in training mode so far, which names the next masks
    """

    state: Tensor

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], ratio: float, seed: int):
        super().__init__()
        self.ratio = ratio
        self.align = Align(student, teacher)
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(t.shape[1], t.shape[1], 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(t.shape[1], t.shape[1], 3, padding=1)
            )
            for t in teacher
        )
        self.register_buffer("state", torch.tensor([seed, 0], dtype=torch.int64))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """What the generators make of the student's levels, each like its teacher level."""
        masked = ops.random_mask(self.align(student, teacher), self.state, self.ratio)
        if self.training:
            with torch.no_grad():
                self.state[1] += 1
        return [generator(as_parameters(x, generator)) for generator, x in zip(self.generators, masked, strict=True)]
