"""What the tests of `logit_bce` and `logit_kl` share: logits, weights, and the comparison with the loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oracle import cases, logit_rows
from oracle.compare import RTOL32, RTOL64, assert_levels_close
from torch import Tensor

from kdkernels import functional

#: Classes or bins at a cell: several, those of many anchors, and one.
SHAPES = [(2, 12, 3, 5), (2, 44, 2, 2), (2, 4, 1, 1)]
#: Largest error of a gradient by the type that it is rounded to.
RTOL_GRADIENT = {torch.float64: RTOL64, torch.float32: RTOL32, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def given(seed: int, shapes: Any = SHAPES, weighted: bool = True) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]:
    """Logits of both networks, and weights of which some are 0."""
    s, t, w, _ = cases.four(seed, shapes)
    return s, t, [np.maximum(x[:, 0], 0.0) for x in w] if weighted else None


def check(
    name: str,
    s: list[np.ndarray],
    t: list[np.ndarray],
    weight: list[np.ndarray] | None,
    *options: Any,
    dtype: torch.dtype = torch.float64,
    laid_out: Callable[[Tensor], Tensor] = lambda x: x,
    device: str = "cpu",
    rounding: float = 0.0,
) -> Tensor:
    """Rows and gradient of the primitive `name` against the loops on the same rounded numbers; returns the rows.

    rounding: of a gradient, where it is worse than its type's
    """
    x, y = ([laid_out(a.to(device)) for a in cases.tensors(levels, dtype)] for levels in (s, t))
    for a in x:
        a.requires_grad_()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    given = None if weight is None else [a.to(device) for a in cases.tensors(weight, exact)]
    got = getattr(functional, name)(x, y, given, *options)
    up = cases.upstream(3, *got.shape)
    gradients = torch.autograd.grad((torch.tensor(up, device=device) * got).sum(), x)
    held = cases.rounded(s, dtype), cases.rounded(t, dtype), [None] * len(s) if weight is None else cases.rounded(weight, exact)
    value, slope = getattr(logit_rows, name), getattr(logit_rows, f"{name}_gradient")
    levels = list(zip(*held, strict=True))
    assert got.dtype == exact and [g.dtype for g in gradients] == [dtype] * len(s)
    # Each image on its own: rows must not hide behind larger ones.
    want = [value(*level, *options) for level in levels]
    for image in range(got.shape[1]):
        assert_levels_close([row[image] for row in got], [row[image] for row in want], RTOL64 if dtype == torch.float64 else RTOL32)
    wanted = [slope(*level, *options, u) for level, u in zip(levels, up, strict=True)]
    assert_levels_close(gradients, wanted, max(rounding, RTOL_GRADIENT[dtype]), atol=1e-30, what="gradient of level")
    assert all(_strides(g) == _strides(a) for g, a in zip(gradients, x, strict=True))
    return got


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions that are walked."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
