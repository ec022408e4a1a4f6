"""`channel_kl`, `correlation` and both of logits by the CUDA kernels, emulated: in every order of the threads, and what they move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_support import in_any_order, with_cuda_kernels
from fused_support import LAYOUTS
from levels import DTYPES, pyramid, relative_error
from native_support import GRADIENT, VALUE
from toolchain import needs_compiler
from torch import Tensor

from kdkernels import functional, set_backend

pytestmark = needs_compiler
#: More levels than one launch takes; more pixels than a band and than a tile, and more channels than a block.
LARGE = [(2, 4, 3, 5), (2, 8, 47, 45), (2, 140, 3, 4), (2, 8, 17, 16)]
MANY = [*LARGE, (2, 4, 1, 2), (2, 20, 5, 9), (2, 4, 2, 2), (2, 8, 6, 6), (2, 12, 2, 3)]
KINDS = [(dtype, layout) for layout in ("contiguous", "channels_last", "odd address") for dtype in DTYPES]
#: Options behind s and t; None: the weights.
CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "channel_kl": ("channel_kl", (0.7, True)),
    "cross_entropy": ("channel_kl", (2.0, False)),
    "correlation": ("correlation", (1e-6,)),
    "logit_bce": ("logit_bce", (None, 1.0)),
    "logit_kl": ("logit_kl", (None, 2.0, 4)),
    # Its distributions have no room in shared memory.
    "logit_kl of many bins": ("logit_kl", (None, 1.0, 1)),
}


def levels(seed: int) -> list[Tensor]:
    """Each in a type and a layout of its own."""
    return [LAYOUTS[layout](x.to(DTYPES[dtype])) for x, (dtype, layout) in zip(pyramid(MANY, seed=seed), KINDS, strict=True)]


def results(name: str, s: list[Tensor], t: list[Tensor]) -> list[Tensor]:
    """Rows and gradients."""
    primitive, options = CALLS[name]
    if primitive.startswith("logit"):
        weights = pyramid([(x.shape[0], *x.shape[2:]) for x in s], seed=4)
        options = ([x.abs() for x in weights], *options[1:])
    leaves = [x.detach().requires_grad_() for x in s]
    rows = getattr(functional, primitive)(leaves, t, *options)
    # As large as fp16 needs it of a gradient that is divided by all values of a level.
    return [rows.detach(), *torch.autograd.grad(1e3 * rows.sum(), leaves)]


@pytest.fixture
def native():
    set_backend("native")
    yield
    set_backend("auto")


@pytest.mark.parametrize("name", CALLS)
def test_no_order_of_threads_and_no_other_level_changes_a_comparison(name, native):
    s, t = levels(1), levels(2)
    if "many bins" in name:
        s, t = (pyramid([(2, 3200, 1, 3), (2, 16, 3, 2)], torch.bfloat16, layout, 5) for layout in ("contiguous", "channels_last"))
        t = [x.flip(1) for x in t]
    rows, *gradients = in_any_order(lambda: results(name, s, t))
    set_backend("reference")
    wanted, *of_gradients = results(name, [x.double() for x in s], [x.double() for x in t])
    assert relative_error(rows, wanted) < VALUE
    assert all(relative_error(got, want) < GRADIENT[x.dtype] for got, want, x in zip(gradients, of_gradients, s, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["channel_kl", "correlation"])
def test_two_pyramids_are_read_once_and_again_for_the_gradient(name, layout, native):
    """In vectors, which alone are counted."""
    s, t = ([LAYOUTS[layout](x) for x in pyramid([(2, 16, 8, 16), (2, 32, 4, 4)], seed=seed)] for seed in (1, 2))
    once, moved = sum(x.nbytes for x in s), []
    with with_cuda_kernels() as emulator:
        leaves = [x.requires_grad_() for x in s]
        emulator.reset_counts()
        rows = getattr(functional, name)(leaves, t, *CALLS[name][1])
        for run in (lambda: None, lambda: torch.autograd.grad(rows.sum(), leaves)):
            run()
            counts = emulator.counts()
            moved.append((counts["bytes_read"], counts["bytes_written"]))
    assert moved == [(2 * once, 0), (4 * once, once)]
