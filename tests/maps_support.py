"""What the tests of `map_distance` on compiled kernels share: maps, and how values and gradients are held against float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import native_support
import torch
from levels import pyramid, relative_error
from native_support import GRADIENT, VALUE
from torch import Tensor

from kdkernels.ops.map_distance import fused
from kdkernels.reference.map_distance import map_distance as reference

NORMALIZERS, DISTANCES = ("minmax", "zscore", "softmax", "none"), ("l1", "mse", "smooth_l1")
SHAPES = [(2, 5, 7), (2, 1, 1), (2, 1, 67), (2, 4, 4), (2, 3, 16)]
Maps = Sequence[Tensor]
kernels = partial(fused, "native")


def maps(shapes: Sequence[Sequence[int]], seed: int, scale: float = 1.0) -> list[Tensor]:
    return [scale * x for x in pyramid(shapes, seed=seed)]


def doubles(levels: Maps) -> list[Tensor]:
    return [x.double() for x in levels]


def value_and_gradients(function: Any, m_s: Maps, m_t: Maps, upstream: Tensor, spatial: Maps | None = None, **options: Any) -> list[Tensor]:
    student = [x.detach().clone().requires_grad_() for x in m_s]
    rows = function(student, m_t, spatial=spatial, **options)
    return [rows.detach(), *torch.autograd.grad(rows, student, upstream.to(rows))]


def check(m_s: Maps, m_t: Maps, spatial: Maps | None = None, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Values and gradients, these in the norm of a level, which the sums at an extremum dominate; returns both."""
    up = pyramid([(len(m_s), m_s[0].shape[0])], seed=9)[0] if upstream is None else upstream
    rows, *gradients = native_support.same_everywhere(lambda: value_and_gradients(kernels, m_s, m_t, up, spatial, **options))
    factors = None if spatial is None else doubles(spatial)
    want, *want_gradients = value_and_gradients(reference, doubles(m_s), doubles(m_t), up, factors, **options)
    assert rows.dtype == torch.float32 and relative_error(rows, want) < VALUE
    for level, (got, expected) in enumerate(zip(gradients, want_gradients, strict=True)):
        assert relative_error(got, expected) < GRADIENT[got.dtype], f"gradient of level {level}: {got} instead of {expected}"
    return [rows, *gradients]
