"""What the tests of `attention`, `weighted_channel_sum` and `shared_read` on compiled kernels share, and how float64 holds them.

All three are maps and vectors that one read of the features leaves; the gradients of the first two are one write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import native_support
import pytest
import torch
from levels import pyramid, relative_error
from native_support import GRADIENT, VALUE
from torch import Tensor

from kdkernels.ops.attention import fused as fused_attention
from kdkernels.ops.shared_read import fused as fused_read
from kdkernels.ops.weighted_channel_sum import fused as fused_sum
from kdkernels.reference.attention import attention as reference_attention
from kdkernels.reference.shared_read import shared_read as reference_read
from kdkernels.reference.weighted_channel_sum import weighted_channel_sum as reference_sum

#: Rows of no, one and several vectors of 16; one pixel and one channel; more pixels than the 2048 of a band and the 4096 of a sum's block.
SHAPES = [(2, 20, 9, 11), (2, 3, 7, 11), (2, 1, 1, 1), (2, 8, 4, 6), (2, 5, 67, 71)]
ACTIVATIONS = list(itertools.product(("raw", "abs"), ("abs", "relu", "none")))
Levels = Sequence[Tensor]


class Primitive(NamedTuple):
    """kernels, reference: of levels and weights and the options, to a tuple of lists of levels."""

    kernels: Callable[..., tuple[list[Tensor], ...]]
    reference: Callable[..., tuple[list[Tensor], ...]]
    options: tuple[Any, ...]
    differentiable: bool = True


def sum_and_extrema(function: Callable[..., Any], *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The maps of `weighted_channel_sum` and both extrema as one: a minimum near 0 is what terms as large as the maximum's left."""
    maps, low, high = function(*args)
    return maps, [torch.stack(pair) for pair in zip(low, high, strict=True)]


PRIMITIVES = {
    "attention": Primitive(lambda x, w, t: fused_attention("native", x, t), lambda x, w, t: reference_attention(x, t), (0.5,)),
    "weighted_channel_sum": Primitive(
        partial(sum_and_extrema, partial(fused_sum, "native")), partial(sum_and_extrema, reference_sum), ("raw", "none")
    ),
    "shared_read": Primitive(partial(fused_read, "native"), reference_read, ("raw", "abs", 0.5), False),
}
of_every_primitive = pytest.mark.parametrize("name", PRIMITIVES)


def weights_of(x: Levels, seed: int = 50) -> list[Tensor]:
    return pyramid([a.shape[:2] for a in x], seed=seed)


def flat(parts: tuple[list[Tensor], ...]) -> list[Tensor]:
    return [level for part in parts for level in part]


def results_and_gradients(
    function: Callable[..., tuple[list[Tensor], ...]], x: Levels, w: Levels, options: tuple[Any, ...], differentiable: bool
) -> list[Tensor]:
    """All levels of all results and, where they have one, the gradients of x for random upstream gradients."""
    leaves = [a.detach().requires_grad_(differentiable) for a in x]
    results = flat(function(leaves, w, *options))
    upstream = [torch.randn(a.shape, generator=torch.Generator().manual_seed(7)).to(a) for a in results]
    return [*(a.detach() for a in results), *(torch.autograd.grad(results, leaves, upstream) if differentiable else ())]


def check(name: str, x: Levels, *options: Any, weights: Levels | None = None) -> list[Tensor]:
    """Results and gradients, whose strides and type must be x's, against the reference; returns all."""
    primitive = PRIMITIVES[name]
    options = options or primitive.options
    w = weights_of(x) if weights is None else weights
    found = native_support.same_everywhere(lambda: results_and_gradients(primitive.kernels, x, w, options, primitive.differentiable))
    wide, wide_w = ([a.double().contiguous() for a in levels] for levels in (x, w))
    want = results_and_gradients(primitive.reference, wide, wide_w, options, primitive.differentiable)
    count = len(found) - (len(x) if primitive.differentiable else 0)
    for got, expected in zip(found[:count], want[:count], strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape and relative_error(got, expected) < VALUE
    for got, expected, a in zip(found[count:], want[count:], x[: len(found) - count], strict=True):
        assert got.dtype == a.dtype and got.stride() == torch.empty_like(a).stride()
        assert relative_error(got, expected) < GRADIENT[a.dtype]
    return found
