"""PAD: prime-aware adaptive distillation (arXiv 2008.01458), a weight on any other loss, as AID's authors compare with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..outputs import HeadOutputs
from ..pyramid import Gradients, Pyramid, accumulate, as_pyramid
from .base import DistillationLoss, Method, preset_options
from .wrapper import WrapperLoss


class PADLoss(WrapperLoss):
    """A loss with each level divided by the variance of the student's features there (after Zhang et al., ECCV 2020, arXiv 2008.01458).

    This is the baseline that AID is compared with in its authors' code (lanqz7766/AID, pad_one_stage.py and pad_two_stage.py); PAD's
    paper learns the variance with a branch of its own. Every term of `base`, (L, N), becomes

    term / (eps + exp(s_l)) + coefficient * s_l / N,   s_l = log Var(F_S) of level l

    with the biased variance of all of the level's values, over (N, C, H, W), in fp32 (fp64 for fp64), and the term's coefficient in
    `base` (`DistillationLoss.coefficient`). F_S are the features that are given; the released code takes s of what its adapting convolution
    makes of them, which in this library is a part of some bases; and in its loop over the non-local terms it still has the s of the last
    level, where here each level has its own. The gradient runs through s too. Values may be negative.

    Entries have the coupling of `base`, but for s_l, which is of the whole batch and counts equally for its images. A variance below
    the smallest normal number, such as that of constant features, counts as that number and has no gradient. Around a loss without levels
    s is of the values of all levels.

    base:   a loss of this library; its weight, reduction and on_nonfinite stay in force
    preset: "one-stage": eps 1e-6; "two-stage": 1e-8
    """

    methods = (
        Method(
            "pad",
            "adaptive distillation by the variance of the features",
            "arXiv 2008.01458; lanqz7766/AID, pad_one_stage.py and pad_two_stage.py",
            "base / (eps + exp(s_l)) + w s_l,  s_l = log Var(F_S)",
            "batch-coupled",
            wraps=True,
        ),
    )
    PRESETS = {"one-stage": {"eps": 1e-6}, "two-stage": {"eps": 1e-8}}

    def __init__(self, base: DistillationLoss, preset: str = "one-stage", eps: float | None = None):
        super().__init__(base)
        self.preset, self.eps = preset, float(preset_options(self.PRESETS, preset, eps=eps)["eps"])
        # Whoever provides the teacher's losses asks for it: the base may be an AIDLoss.
        self.granularity = getattr(base, "granularity", None)

    def teacher_side(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.teacher_side(*args, **kwargs)

    def terms(
        self,
        student_features: Pyramid,
        side: Any,
        student_gradients: Gradients | None = None,
        student_outputs: HeadOutputs | None = None,
    ) -> dict[str, Tensor]:
        outputs = {"student_outputs": student_outputs} if "outputs" in self.needs else {}
        levels, names = as_pyramid("student_features", student_features)
        # Lifted once, so that the gradients of base and variance are added before they are rounded to 16 bits.
        levels = [accumulate(x) for x in levels]
        lifted = dict(zip(names, levels, strict=True)) if isinstance(student_features, Mapping) else levels
        terms = self.base.terms(lifted, side, student_gradients, **outputs)
        if not levels or not levels[0].shape[0]:
            return terms
        s = log_variances(levels, self.level_free)
        scale = 1 / (self.eps + s.exp())
        return {name: term * scale + self.coefficient(name) / term.shape[1] * s for name, term in terms.items()}


def log_variances(levels: list[Tensor], together: bool) -> Tensor:
    """(L, 1): the logarithm of each level's biased variance; (1, 1), of the values of all levels, with `together`."""
    moments = [torch.var_mean(x, correction=0) for x in levels]
    variances, means = (torch.stack(list(values)) for values in zip(*moments, strict=True))
    if together:
        total = sum(x.numel() for x in levels)
        shares = torch.stack([torch.full_like(mean, x.numel() / total) for mean, x in zip(means, levels, strict=True)])
        middle = (shares * means).sum()
        variances = (shares * (variances + (means - middle).square())).sum()[None]
    return variances.clamp(min=torch.finfo(variances.dtype).tiny).log()[:, None]
