"""`map_distance`: normalises the maps of student and teacher and compares them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pyramid import stack_levels


def normalize_map(
    r: Tensor, normalize: str = "minmax", eps: float = 1e-6, eps_mode: str = "relative", temperature: float = 0.5
) -> Tensor:
    """One level's maps r (N, H, W), each image's map normalised for itself; same shape and dtype.

    minmax:  y / D with y = r - min r, m = max y (GKD Eq. 3), gradients of both extrema split equally among exact ties
    zscore:  (r - mean) / D with m = the standard deviation over H*W (not H*W - 1)
    softmax: H*W * softmax(r / temperature)
    none:    r
    D = m * (1 + eps) + tiny (`relative`: independent of r's scale) or m + eps (`absolute`: the released code).
    With minmax and zscore a constant map gives 0 and no gradient; NaN and infinity give NaN.
    """
    if normalize == "none":
        return r
    if normalize == "softmax":
        # The softmax of -inf is an innocent 0; -inf * 0 is NaN.
        return (r.shape[1] * r.shape[2]) * (r / temperature).flatten(1).softmax(1).view_as(r) + r * 0
    if normalize == "minmax":
        y = r - r.amin((1, 2), keepdim=True)
        m = y.amax((1, 2), keepdim=True)
        constant = m == 0
    else:
        y = r - r.mean((1, 2), keepdim=True)
        # A rounded mean leaves a small rest on a constant map: its range, not its variance, tells. A difference, because infinity
        # equals itself: a map of infinities is not constant.
        span = (r.amax((1, 2), keepdim=True) - r.amin((1, 2), keepdim=True)).detach()
        constant = span == 0
        span = torch.where(constant, 1, span)
        # In units of the range, so that the squares of very small or large maps are still fp32 numbers; the units cancel.
        variance = (y / span).square().mean((1, 2), keepdim=True)
        m = span * torch.where(constant, 1, variance).sqrt()
    denominator = m * (1 + eps) + torch.finfo(r.dtype).tiny if eps_mode == "relative" else m + eps
    # The inner `where` keeps 0/0 out of the backward, the outer one takes the gradient away.
    return torch.where(constant, 0, y / torch.where(constant, 1, denominator))


def map_distance(
    m_s: Sequence[Tensor],
    m_t: Sequence[Tensor],
    normalize: str = "minmax",
    distance: str = "l1",
    eps: float = 1e-6,
    eps_mode: str = "relative",
    temperature: float = 0.5,
    average: str = "nhw",
    spatial: Sequence[Tensor] | None = None,
) -> Tensor:
    """Distance of the normalised maps, summed over H, W and divided by N*H*W (`nhw`, GKD Eq. 4 and the batch mean) or by N (`n`).

    m_s, m_t: L tensors (N, H, W), maps before normalisation. Where sizes differ, the teacher's normalised map is resized bilinearly
    (half-pixel centres) to the student's. spatial: L tensors (N, H, W) of the student's sizes that multiply both normalised maps, or None.
    distance: l1 |d|, mse d^2, smooth_l1 (d^2/2 for |d| < 1, else |d| - 1/2). Returns (L, N), fp32 (fp64 for fp64).
    """
    rows = []
    for level, (r_s, r_t) in enumerate(zip(m_s, m_t, strict=True)):
        a = normalize_map(r_s, normalize, eps, eps_mode, temperature)
        b = normalize_map(r_t, normalize, eps, eps_mode, temperature)
        if a.shape != b.shape:
            b = F.interpolate(b[:, None], size=a.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        d = a - b
        if spatial is not None:
            d = d * spatial[level]
        if distance == "l1":
            d = d.abs()
        elif distance == "mse":
            d = d * d
        else:
            d = F.smooth_l1_loss(d, torch.zeros_like(d), reduction="none")
        n, h, w = a.shape
        rows.append(d.sum((1, 2)) / (max(n, 1) * (h * w if average == "nhw" else 1)))
    return stack_levels(rows)
