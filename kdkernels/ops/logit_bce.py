"""`logit_bce`: binary cross-entropy of two networks' class logits (FRS, CrossKD, GID)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .. import backend
from ..logits import fused, logit_levels, operators, refuses
from ..pyramid import Pyramid
from ..reference.logit_bce import logit_bce as reference


def logit_bce(s: Pyramid, t: Pyramid, weight: Sequence[Tensor] | None = None, beta: float = 0.0) -> Tensor:
    """sum_hw weight * sum_k |sigma(s) - sigma(t)|^beta * BCE(s, sigma(t)), BCE(s, y) = max(s, 0) - s * y + log(1 + exp(-|s|)).

    With beta 0 the soft classification term of FRS (arXiv 2106.08022) and GID (arXiv 2103.02340), with beta 1 CrossKD's quality focal loss
    (arXiv 2306.11369). The gradient to s goes through the
    factor of beta too; where both probabilities are equal that has the derivative 0.

    s, t: pyramids of (N, K, H, W), each 16-bit, fp32 or fp64; weight: L tensors (N, H, W) or None. t and weight are constants.
    Returns (L, N), fp32 (fp64 if any is).
    Traffic in units, a unit being the bytes of one pyramid: forward 2 (s, t), backward 3 (s, t, the gradient).
    Raises ValueError for a beta below 0 or, naming both sides' level shapes, where these do not fit.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0; got {beta}")
    levels_s, levels_t = logit_levels(s, t, weight)
    return backend.call("logit_bce", [*levels_s, *levels_t], levels_s, levels_t, weight, beta)


_OPERATORS = operators("logit_bce", "float beta")
backend.register("reference", "logit_bce", reference)
backend.register_fused("logit_bce", partial(fused, _OPERATORS), refuses)
