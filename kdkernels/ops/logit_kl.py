"""`logit_kl`: the divergence of two networks' logits, blocks of channels each a distribution (LD, CrossKD)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .. import backend
from ..logits import MOST_BINS, fused, logit_levels, operators, refuses
from ..pyramid import Pyramid, level_shapes
from ..reference.logit_kl import logit_kl as reference
from .attention import check_temperature


def logit_kl(s: Pyramid, t: Pyramid, weight: Sequence[Tensor] | None = None, temperature: float = 1.0, groups: int = 1) -> Tensor:
    """sum_hw weight * sum_groups sum_bins q * (log q - log p), q and p the softmax of t / temperature and s / temperature over each of
    `groups` blocks of K / groups channels: localization distillation's box edges (4 groups) and class logits (1), arXiv 2102.12252.

    Neither temperature^2 nor a mean over the bins is in it.

    s, t: pyramids of (N, K, H, W), each 16-bit, fp32 or fp64; weight: L tensors (N, H, W) or None. t and weight are constants.
    Returns (L, N), fp32 (fp64 if any is).
    Traffic in units, a unit being the bytes of one pyramid: forward 2 (s, t), backward 3 (s, t, the gradient).
    Raises ValueError for a temperature that is not above 0, groups that do not divide K or, naming both sides' level shapes, where these
    do not fit.
    """
    check_temperature(temperature)
    levels_s, levels_t = logit_levels(s, t, weight)
    if groups < 1 or any(x.shape[1] % groups for x in levels_s):
        raise ValueError(f"groups must divide the channels of every level; got {groups} and {level_shapes(levels_s)}")
    return backend.call("logit_kl", [*levels_s, *levels_t], levels_s, levels_t, weight, temperature, groups)


def refuses_in_triton(s: list[Tensor], t: list[Tensor], weight: Sequence[Tensor] | None, temperature: float, groups: int) -> str:
    """As `refuses`, and why one program cannot hold a distribution."""
    bins = max([x.shape[1] // groups for x in s])
    if bins > MOST_BINS:
        return f"it takes distributions of at most {MOST_BINS} bins, got {bins}"
    return refuses(s, t, weight)


_OPERATORS = operators("logit_kl", "float temperature, int groups")
backend.register("reference", "logit_kl", reference)
backend.register("triton", "logit_kl", partial(fused, _OPERATORS, "triton"), refuses_in_triton)
backend.register("native", "logit_kl", partial(fused, _OPERATORS, "native"), refuses)
