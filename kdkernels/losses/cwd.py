"""CWD: channel-wise distillation (arXiv 2011.13256)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..pyramid import Gradients, Pyramid
from .base import Method, preset_options
from .comparison import ComparisonLoss, TeacherFeatures
from .composed import student_levels


class CWDLoss(ComparisonLoss):
    """Channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256): where each channel looks, as a distribution over the map.

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). Per level and image:

    divergence = weight * temperature^2 / (N C) * sum_c KL( softmax_hw(F_T / temperature) || softmax_hw(F_S / temperature) )

    Separable: each entry (l, n) depends on its own level and image alone. Student and teacher need equal channels and sizes (adapter).

    weight:      factor of the loss; None: the preset's
    preset:      "one-stage" and "two-stage": weight 5, temperature 1, the cross-entropy (detection configurations of
                 pppppM/mmdetection-distiller); "mmrazor": weight 10, temperature 1, the divergence (open-mmlab/mmrazor)
    temperature: tau
    entropy:     False leaves the teacher's own sum_hw p log p out, a constant: a cross-entropy, of the same gradient
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "cwd",
            "channel-wise distillation",
            "arXiv 2011.13256; defaults of pppppM/mmdetection-distiller and open-mmlab/mmrazor",
            "w tau^2/(N C) * sum_c KL(softmax_hw(F_T/tau) || softmax_hw(F_S/tau))",
            "separable",
        ),
    )
    PRESETS = {
        "one-stage": {"weight": 5.0, "temperature": 1.0, "entropy": False},
        "two-stage": {"weight": 5.0, "temperature": 1.0, "entropy": False},
        "mmrazor": {"weight": 10.0, "temperature": 1.0, "entropy": True},
    }
    compares_features = True

    def __init__(
        self,
        weight: float | None = None,
        preset: str = "one-stage",
        temperature: float | None = None,
        entropy: bool | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        chosen = preset_options(self.PRESETS, preset, weight=weight, temperature=temperature, entropy=entropy)
        super().__init__(chosen["weight"], reduction, on_nonfinite)
        if not chosen["temperature"] > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        self.preset, self.temperature, self.entropy = preset, float(chosen["temperature"]), bool(chosen["entropy"])

    def terms(self, student_features: Pyramid, side: TeacherFeatures, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        features, _ = student_levels(student_features, side.names, side.features)
        rows = ops.channel_kl(features, side.features, self.temperature, self.entropy)
        factor = self.weight * self.temperature**2 / max(rows.shape[1], 1)
        channels = [x.shape[1] for x in features]
        if len(set(channels)) > 1:
            rows = torch.stack([row / own for row, own in zip(rows.unbind(0), channels, strict=True)])
        elif channels:
            factor /= channels[0]
        return {"divergence": factor * rows}
