"""`weighted_channel_sum` by the CUDA kernels, emulated: what `test_native_attention` leaves out, in every order of threads and blocks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attention_support import ACTIVATIONS, check
from cuda_support import ORDERS, with_cuda_kernels
from fused_support import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, pyramid
from toolchain import needs_compiler

pytestmark = needs_compiler
S = [torch.ones(2, 3, 4, 5)]
MAPS, VECTORS = torch.ones(2 * 20), torch.ones(2 * 3)
FORWARD, BACKWARD = "weighted_channel_sum", "weighted_channel_sum_backward"


@pytest.fixture(autouse=True)
def emulator():
    with with_cuda_kernels(ORDERS) as found:
        yield found


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_around_vectors_spans_and_bands(dtype, layout):
    """Rows of one whole vector, of a warp's span of them and of an element more or less; more channels than a block takes at a time."""
    shapes = [
        (1, 8, 1, 8),
        (2, 3, 4, 64),
        (1, 5, 1, 257),
        (1, 4, 3, 85),
        (1, 70, 3, 3),
        (1, 257, 1, 1),
        (1, 1, 1, 129),
        (2, 33, 5, 13),
        (1, 16, 8, 8),
    ]
    x = [LAYOUTS[layout](a.to(DTYPES[dtype])) for n in (1, 2) for a in pyramid([s for s in shapes if s[0] == n])]
    by_images = [[a for a in x if len(a) == n] for n in (1, 2)]
    assert all(a.isfinite().all() for levels in by_images for a in check("weighted_channel_sum", levels))


@settings(max_examples=12)
@given(
    images=st.integers(1, 3),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (60, 14, 19)]), min_size=1, max_size=3),
    kinds=st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(LAYOUTS))), min_size=3, max_size=3),
    how=st.sampled_from(ACTIVATIONS),
)
def test_any_levels(images, sizes, kinds, how):
    shapes = [(images, *size) for size in sizes]
    # Numbers of one sign: a sum that cancels to nearly 0 by itself is no more exact than its largest term.
    levels = [LAYOUTS[layout]((a.abs() + 0.1).to(DTYPES[dtype])) for a, (dtype, layout) in zip(pyramid(shapes), kinds, strict=False)]
    results = check("weighted_channel_sum", levels, *how, weights=[a.abs() for a in pyramid([shape[:2] for shape in shapes], seed=5)])
    assert len(results) == 3 * len(sizes)


def test_the_features_are_read_once_and_only_where_the_gradient_needs_them(emulator):
    x, operators = pyramid([(2, 16, 8, 16), (2, 32, 4, 4)]), torch.ops.kdkernels_emulated
    unit, w, grad = sum(a.nbytes for a in x), torch.ones(2 * (16 + 32)), torch.ones(2 * (128 + 16))

    def moved(name, *arguments):
        emulator.reset_counts()
        getattr(operators, name)(*arguments)
        counts = emulator.counts()
        return counts["bytes_read"], counts["bytes_written"], counts["launches"]

    assert moved("weighted_channel_sum", x, w, True) == (unit, 0, 1)
    assert moved("weighted_channel_sum_backward", x, w, grad, True) == (unit, unit, 1)
    assert moved("weighted_channel_sum_backward", x, w, grad, False) == (0, unit, 1)


#: Case -> operator, arguments, and what is said of them.
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "levels of different N": (FORWARD, ([*S, torch.ones(3, 3, 4, 5)], VECTORS, False), r"level 1: expected \(N, C, H, W\), one N for all"),
    "an empty level": (FORWARD, ([torch.ones(2, 3, 0, 5)], VECTORS, False), "level 0: .* no empty level"),
    "too few weights": (FORWARD, (S, torch.ones(1), False), "expected 6 contiguous float32 elements"),
    "weights of another type": (FORWARD, (S, VECTORS.double(), False), "expected 6 contiguous float32 elements"),
    "weights with gaps": (FORWARD, (S, torch.ones(12)[::2], False), "expected 6 contiguous float32 elements"),
    "too few weights of the backward": (BACKWARD, (S, torch.ones(1), MAPS, False), "expected 6 contiguous float32 elements"),
    "too small a gradient": (BACKWARD, (S, VECTORS, torch.ones(1), False), "expected 40 contiguous float32 elements"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_operators_refuse_what_does_not_fit(case):
    name, arguments, words = REFUSED[case]
    with pytest.raises(RuntimeError, match=words) as raised:
        getattr(torch.ops.kdkernels_emulated, name)(*arguments)
    assert re.search(r"\.(cpp|cu|h):\d+, ", str(raised.value)), "it names no line of the sources"


@pytest.mark.parametrize(("name", "arguments"), [(FORWARD, ([], VECTORS, False)), (BACKWARD, ([], VECTORS, MAPS, False))])
def test_the_operators_refuse_a_pyramid_without_levels(name, arguments, emulator):
    emulator.reset_counts()
    with pytest.raises((RuntimeError, IndexError), match="at least one level|no tensor arguments|range_check"):
        getattr(torch.ops.kdkernels_emulated, name)(*arguments)
    assert emulator.counts()["launches"] == 0
