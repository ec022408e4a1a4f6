"""`feature_imitation`: the weighted squared difference of features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..pyramid import accumulate, stack_levels


def feature_imitation(
    s: Sequence[Tensor], t: Sequence[Tensor], spatial: Sequence[Tensor] | None = None, channel: Sequence[Tensor] | None = None
) -> Tensor:
    """sum_{c,h,w} spatial * channel * (s - t)^2, without a normaliser (BMFI's region and whole-map grains, GKD's imitation form).

    s, t: L tensors (N, C, H, W). spatial: L tensors (N, H, W) or None; channel: L tensors (N, C) or None.
    Returns (L, N), fp32 (fp64 for fp64); with spatial of (N, K, H, W), K weights that share the pass over the features, (L, N, K).
    """
    rows = []
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        d = accumulate(a) - accumulate(b)
        # Weight before square: the backward then multiplies by tensors of the features' memory layout, and the gradient has it too.
        error = d * d if channel is None else d * channel[level][:, :, None, None] * d
        if spatial is None:
            rows.append(error.sum((1, 2, 3)))
        elif spatial[level].dim() == 3:
            rows.append((error.sum(1) * spatial[level]).sum((1, 2)))
        else:
            rows.append((error.sum(1, keepdim=True) * spatial[level]).sum((2, 3)))
    return stack_levels(rows)
