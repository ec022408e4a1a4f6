"""`spatial_pool` and `random_mask` by the CUDA kernels, emulated: in every order of the threads, what they move, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cuda_support import in_any_order, with_cuda_kernels
from fused_support import LAYOUTS
from levels import DTYPES, pyramid, relative_error
from toolchain import needs_compiler

from kdkernels.ops.random_mask import fused as fused_mask
from kdkernels.ops.spatial_pool import fused as fused_pool
from kdkernels.reference.random_mask import random_mask
from kdkernels.reference.spatial_pool import spatial_pool

pytestmark = needs_compiler
#: More levels than one launch takes.
MANY = [(2, 3, 4, 5), (2, 20, 9, 11), (2, 1, 1, 1), (2, 8, 1, 3), (2, 130, 1, 2), (2, 5, 3, 3), (2, 2, 2, 2), (2, 7, 1, 1), (2, 1, 6, 6)]
KINDS = [(dtype, layout) for layout in ("contiguous", "channels_last", "odd address") for dtype in DTYPES]
STATE = torch.tensor([11, 3])
HALF = 1 << 31
S = [torch.ones(2, 3, 4, 5)]
MAPS = torch.ones(2 * 20)


def levels():
    """Each in a type and a layout of its own."""
    return [LAYOUTS[layout](x.to(DTYPES[dtype])) for x, (dtype, layout) in zip(pyramid(MANY, seed=3), KINDS, strict=True)]


def maps():
    return [x + 2.5 for x in pyramid([(n, h, w) for n, _, h, w in MANY], seed=4)]


@pytest.mark.parametrize("normalize", ["mean", "softmax"])
def test_no_order_of_threads_and_no_other_level_changes_a_pool(normalize):
    def run():
        x, a = ([v.detach().requires_grad_() for v in values] for values in (levels(), maps()))
        means = fused_pool("native", x, a, normalize)
        return [*(m.detach() for m in means), *torch.autograd.grad(means, [*x, *a], [m.detach() for m in means])]

    results = in_any_order(run)
    want = spatial_pool([x.double() for x in levels()], [a.double() for a in maps()], normalize)
    assert max(relative_error(got, expected) for got, expected in zip(results, want, strict=False)) < 2e-6


def test_no_order_of_threads_changes_a_mask():
    results = in_any_order(lambda: fused_mask("native", levels(), STATE, HALF))
    assert all(torch.equal(got, want) for got, want in zip(results, random_mask(levels(), STATE, HALF), strict=True))


def test_a_pool_reads_features_once():
    x, weights = pyramid([(2, 16, 8, 16), (2, 32, 4, 4)]), torch.ones(2 * (128 + 16))
    with with_cuda_kernels() as emulator:
        emulator.reset_counts()
        pooled = torch.ops.kdkernels_emulated.spatial_pool(x, weights)
        counts = emulator.counts()
    assert counts["bytes_read"] == sum(a.nbytes for a in x) and counts["bytes_written"] == 0 and counts["launches"] == 2
    assert relative_error(pooled, torch.cat([a.sum((2, 3)).flatten() for a in x])) < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mask_reads_and_writes_features_once_and_does_not_read_what_it_masks(layout):
    x = [LAYOUTS[layout](a) for a in pyramid([(2, 16, 8, 16), (2, 32, 4, 4)])]
    with with_cuda_kernels() as emulator:
        emulator.reset_counts()
        masked = torch.ops.kdkernels_emulated.random_mask(x, STATE, HALF)
        counts = emulator.counts()
    kept = [a if layout == "contiguous" else a[(want[:, 0] != 0)[:, None].expand_as(a)] for a, want in zip(x, masked, strict=True)]
    assert counts["bytes_read"] == sum(4 * a.numel() for a in kept)
    assert counts["bytes_written"] == sum(a.nbytes for a in x) and counts["launches"] == 1


#: Operator -> case -> arguments, and what is said of them.
REFUSED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "pool_weights": {"maps": ((MAPS[:3], 2, [20], True), "expected 40 contiguous float32 elements")},
    "pool_weights_backward": {
        "weights": ((MAPS[:3], MAPS, MAPS, 2, [20], True), "expected 40 contiguous float32 elements"),
        "grad": ((MAPS, MAPS[::2], MAPS, 2, [20], True), "expected 40 contiguous float32 elements"),
        "maps": ((MAPS, MAPS, MAPS.double(), 2, [20], True), "expected 40 contiguous float32 elements"),
    },
    "random_mask": {
        "three dimensions": (([S[0][0]], STATE, HALF), r"level 0: expected \(N, C, H, W\)"),
        "float64": (([S[0].double()], STATE, HALF), "takes float32, float16 and bfloat16; got Double"),
        "words": ((S, STATE.int(), HALF), "expected a state of 2 contiguous int64"),
        "one number": ((S, STATE[:1], HALF), "expected a state of 2 contiguous int64"),
        "gaps": ((S, torch.zeros(4, dtype=torch.int64)[::2], HALF), "expected a state of 2 contiguous int64"),
    },
    "spatial_pool": {"weights": ((S, MAPS[:3]), "expected 40 contiguous float32 elements")},
}


@pytest.mark.parametrize("library", ["kdkernels_emulated", "kdkernels_native"])
@pytest.mark.parametrize("name, case", [(name, case) for name, cases in REFUSED.items() for case in cases])
def test_the_operators_refuse_what_does_not_fit(name, case, library):
    arguments, words = REFUSED[name][case]
    with with_cuda_kernels(), pytest.raises(RuntimeError, match=words) as raised:
        getattr(getattr(torch.ops, library), name)(*arguments)
    assert re.search(r"\.(cpp|cu|h):\d+, ", str(raised.value)), "it names no line of the sources"
