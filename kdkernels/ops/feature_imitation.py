"""`feature_imitation`: the weighted squared difference of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..pyramid import Pyramid, as_pyramid, check_match, level_shapes
from ..reference.feature_imitation import feature_imitation as reference
from .terms import ImitationTerm, refuses
from .terms import fused as fused_terms


def feature_imitation(s: Pyramid, t: Pyramid, spatial: Sequence[Tensor] | None = None, channel: Sequence[Tensor] | None = None) -> Tensor:
    """sum_{c,h,w} spatial * channel * (s - t)^2, without a normaliser (BMFI's region and whole-map grains, GKD's imitation form).

    s, t: pyramids of (N, C, H, W), each 16-bit, fp32 or fp64. spatial: L tensors (N, H, W) or None; channel: L tensors (N, C) or None.
    Returns (L, N), fp32 (fp64 if any is); with spatial of (N, K, H, W), K weights that share the pass over the features, (L, N, K).
    Raises ValueError, naming both sides' level shapes, where they do not fit.
    """
    levels_s, names_s = as_pyramid("s", s)
    levels_t, names_t = as_pyramid("t", t)
    check_match("s", levels_s, names_s, "t", levels_t, names_t)
    several = (spatial[0].shape[1],) if spatial and spatial[0].dim() == 4 else ()
    _check("spatial", spatial, [(x.shape[0], *several, *x.shape[2:]) for x in levels_s])
    _check("channel", channel, [tuple(x.shape[:2]) for x in levels_s])
    return backend.call("feature_imitation", [*levels_s, *levels_t], levels_s, levels_t, spatial, channel)


def _check(name: str, weights: Sequence[Tensor] | None, wanted: list[tuple[int, ...]]) -> None:
    if weights is not None and [tuple(x.shape) for x in weights] != wanted:
        raise ValueError(f"{name} has level shapes {level_shapes(weights)}, wanted {level_shapes(wanted)}")


def fused(name: str, s: list[Tensor], t: list[Tensor], spatial: Sequence[Tensor] | None, channel: Sequence[Tensor] | None) -> Tensor:
    """By the kernels of backend `name`: one imitation term for each of the weights that share the pass."""
    if spatial is None or spatial[0].dim() == 3:
        return fused_terms(name, s, [(ImitationTerm(t, spatial, channel), 1.0)])[0]
    several = [[x[:, k] for x in spatial] for k in range(spatial[0].shape[1])]
    return torch.stack(fused_terms(name, s, [(ImitationTerm(t, one, channel), 1.0) for one in several]), -1)


def _refuses(s: list[Tensor], t: list[Tensor], spatial: Sequence[Tensor] | None, channel: Sequence[Tensor] | None) -> str:
    return refuses(s, [(ImitationTerm(t, spatial, channel), 1.0)])


backend.register("reference", "feature_imitation", reference)
backend.register_fused("feature_imitation", fused, _refuses)
