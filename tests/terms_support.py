"""What the tests of the native terms operators share: terms of random maps and vectors, and their values and gradients by both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fused_support import LAYOUTS
from levels import DTYPES, pyramid, relative_error
from native_support import GRADIENT, VALUE
from torch import Tensor

from kdkernels.ops.terms import AttentionTerm, ImitationTerm, MapTerm, fused

Wanted = list[tuple[Any, Any]]
MAP_OPTIONS = ("raw", "abs", "minmax", "l1", 1e-6, "relative", 0.5, "n")


def laid_out(shapes: Sequence[Sequence[int]], dtype: str, layout: str, seed: int) -> list[Tensor]:
    return [LAYOUTS[layout](x) for x in pyramid(shapes, DTYPES[dtype], seed=seed)]


def terms(shapes: Sequence[Sequence[int]], teacher: list[Tensor], imitations: int, factor: Any = 1.0, spatial: bool = True) -> Wanted:
    """A map, an attention and imitations of the teacher, each times `factor`."""
    maps = [pyramid([(n, h, w) for n, _, h, w in shapes], seed=seed) for seed in range(20, 23 + imitations)]
    vectors = [pyramid([shape[:2] for shape in shapes], seed=seed) for seed in range(30, 33)]
    wanted: Wanted = [(MapTerm(vectors[0], maps[0], maps[1], *MAP_OPTIONS), factor), (AttentionTerm(maps[2], vectors[1], 0.5), factor)]
    return wanted + [(ImitationTerm(teacher, x if spatial else None, vectors[2]), factor) for x in maps[3:]]


def doubles(x: Any) -> Any:
    """The same in float64, in terms and lists too."""
    if isinstance(x, Tensor):
        return x.double()
    if isinstance(x, (MapTerm, AttentionTerm, ImitationTerm)):
        return type(x)(*map(doubles, x))
    return type(x)(map(doubles, x)) if isinstance(x, (list, tuple)) else x


def with_gradients(function: Any, features: Sequence[Tensor], wanted: Wanted, upstream: Sequence[Tensor]) -> list[Tensor]:
    """The rows, and the gradients of the features for the upstream gradients of the rows."""
    leaves = [x.detach().requires_grad_() for x in features]
    rows = function(leaves, wanted)
    return [*(row.detach() for row in rows), *torch.autograd.grad(rows, leaves, [d.to(r) for d, r in zip(upstream, rows, strict=True)])]


def kernels(features: list[Tensor], wanted: Wanted) -> list[Tensor]:
    return fused("native", features, wanted)


def terms_error(got: Sequence[Tensor], want: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> float:
    """The largest of rows and gradients, in units of what is allowed; dtypes: of the gradients, which come last."""
    allowed = [VALUE] * (len(want) - len(dtypes)) + [GRADIENT[dtype] for dtype in dtypes]
    return max(relative_error(a, b) / most for a, b, most in zip(got, want, allowed, strict=True))


def with_arriving(function: Any, x: list[Any], wanted: Wanted, arriving: list[Any], upstream: list[Any]) -> list[Tensor]:
    """The rows, and the gradients for the upstream gradients with those that arrive added; function: as `terms_vjp`."""
    rows, vjp = function(x, wanted)
    return [*rows, *vjp(upstream, arriving)]
