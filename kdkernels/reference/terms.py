"""`terms`: what distillation losses are sums of, each a number per level and image, from features of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..pyramid import accumulate, stack_levels
from .attention import attention
from .feature_imitation import feature_imitation
from .map_distance import map_distance
from .weighted_channel_sum import weighted_channel_sum


class MapTerm(NamedTuple):
    """Distance of the student's map from the teacher's (GKD): `map_distance` of `weighted_channel_sum`.

    weights: (N, C) a level, or (N, C, H, W) for a weight per element;   target: the teacher's maps (N, H', W') before normalisation.
    A level that is None in either contributes 0. spatial: (N, H, W) a level, or None. The options are those of the two primitives.
    """

    weights: Sequence[Tensor | None]
    target: Sequence[Tensor | None]
    spatial: Sequence[Tensor] | None
    activation: str
    rectify: str
    normalize: str
    distance: str
    eps: float
    eps_mode: str
    temperature: float
    average: str


class AttentionTerm(NamedTuple):
    """sum_c |Ch - channel| + sum_hw |S - spatial|, with S and Ch the student's `attention` (BMFI, FGD).

    spatial: (N, H, W) a level;   channel: (N, C) a level, both of the teacher.
    """

    spatial: Sequence[Tensor]
    channel: Sequence[Tensor]
    temperature: float


class ImitationTerm(NamedTuple):
    """`feature_imitation` of the teacher's features.

    target: (N, C, H, W) a level;   spatial: (N, H, W) a level, or None;   channel: (N, C) a level, None where a level contributes 0, or
    None for all.
    """

    target: Sequence[Tensor]
    spatial: Sequence[Tensor | None] | None
    channel: Sequence[Tensor | None] | None


Term = MapTerm | AttentionTerm | ImitationTerm
Factor = Tensor | float
VJP = Callable[[Sequence[Tensor], Sequence[Tensor | None]], list[Tensor | None]]


def terms(features: Sequence[Tensor], wanted: Sequence[tuple[Term, Factor]]) -> list[Tensor]:
    """Every wanted term times its factor, (L, N), fp32 (fp64 for fp64), from the student's features, L tensors (N, C, H, W).

    A factor is a number or a tensor that broadcasts to (L, N).
    """
    # Lifted once, so that the gradients of all terms are added before they are rounded to 16 bits.
    lifted = [accumulate(x) for x in features]
    return [_term(lifted, term) * factor for term, factor in wanted]


def _term(features: Sequence[Tensor], term: Term) -> Tensor:
    if isinstance(term, MapTerm):
        return _map(features, term)
    if isinstance(term, AttentionTerm):
        spatial, channel = attention(features, term.temperature)
        pairs = zip(spatial, term.spatial, channel, term.channel, strict=True)
        return stack_levels([(a - b).abs().sum((1, 2)) + (c - d).abs().sum(1) for a, b, c, d in pairs])
    return _imitation(features, term)


def levels_of(term: Term) -> list[int]:
    """The levels at which the term has all that it needs; at the others it is 0, whatever the student's features are."""
    if isinstance(term, MapTerm):
        needed: list[Sequence[Tensor | None]] = [term.weights, term.target]
    elif isinstance(term, AttentionTerm):
        needed = [term.spatial]
    else:
        needed = [term.target, *(weights for weights in (term.spatial, term.channel) if weights is not None)]
    return [i for i, level in enumerate(zip(*needed, strict=True)) if not any(x is None for x in level)]


def _map(features: Sequence[Tensor], term: MapTerm) -> Tensor:
    given = enumerate(zip(term.weights, term.target, strict=True))
    levels = {i: (w, m) for i, (w, m) in given if w is not None and m is not None}
    maps, _, _ = weighted_channel_sum([features[i] for i in levels], [w for w, _ in levels.values()], term.activation, term.rectify)
    rows = map_distance(
        maps,
        [m for _, m in levels.values()],
        term.normalize,
        term.distance,
        term.eps,
        term.eps_mode,
        term.temperature,
        term.average,
        None if term.spatial is None else [term.spatial[i] for i in levels],
    )
    return at_levels(rows, list(levels), features)


def _imitation(features: Sequence[Tensor], term: ImitationTerm) -> Tensor:
    channel, spatial = term.channel, term.spatial
    keep = levels_of(term)
    rows = feature_imitation(
        [features[i] for i in keep],
        [term.target[i] for i in keep],
        None if spatial is None else [x for i in keep if (x := spatial[i]) is not None],
        None if channel is None else [x for i in keep if (x := channel[i]) is not None],
    )
    return at_levels(rows, keep, features)


def at_levels(rows: Tensor, keep: list[int], features: Sequence[Tensor]) -> Tensor:
    """(L, N) with `rows` at the levels `keep` and 0 at the others."""
    if len(keep) == len(features):
        return rows
    zero = accumulate(features[0].new_zeros(features[0].shape[0])) if not keep else rows.new_zeros(rows.shape[1])
    by_level = dict(zip(keep, rows.unbind(0), strict=True)) if keep else {}
    return torch.stack([by_level.get(i, zero) for i in range(len(features))])


def terms_vjp(features: Sequence[Tensor], wanted: Sequence[tuple[Term, Factor]]) -> tuple[list[Tensor], VJP]:
    """The terms, detached, and the function that makes gradients of them.

    It takes the upstream gradient (L, N) of each term and the gradients that arrive at the levels from elsewhere, None where none does, and
    gives their sum at each level, in the features' types.
    """
    # 16-bit features are lifted to fp32, so that both gradients are added before anything is rounded to 16 bits.
    leaves = [accumulate(x.detach()).requires_grad_() for x in features]
    with torch.enable_grad():
        rows = terms(leaves, wanted)

    def vjp(upstream: Sequence[Tensor], arriving: Sequence[Tensor | None]) -> list[Tensor | None]:
        needed = [(row, d) for row, d in zip(rows, upstream, strict=True) if row.requires_grad]
        own: Sequence[Tensor | None] = [None] * len(leaves)
        if needed:
            own = torch.autograd.grad([row for row, _ in needed], leaves, [d for _, d in needed], allow_unused=True)
        return [add_gradients(g, a, x.dtype) for g, a, x in zip(own, arriving, features, strict=True)]

    return [row.detach() for row in rows], vjp


def add_gradients(own: Tensor | None, arriving: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in at least fp32 and the one that arrives from elsewhere, added before the rounding to `dtype`; None counts as 0."""
    if own is None:
        return arriving
    # The arriving one first: the sum takes its memory layout.
    return (own if arriving is None else arriving + own).to(dtype)
