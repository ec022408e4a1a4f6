"""`attention` and `shared_read` by the CUDA kernels, emulated: what `test_native_attention` leaves out, in every order of the threads."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attention_support import check
from cuda_support import ORDERS, with_cuda_kernels
from fused_support import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, pyramid, relative_error
from toolchain import needs_compiler

from kdkernels.reference.attention import attention as reference

pytestmark = needs_compiler
#: More levels than one launch takes.
MANY = [(2, 3, 4, 5), (2, 20, 9, 11), (2, 1, 1, 1), (2, 8, 1, 3), (2, 130, 1, 2), (2, 5, 3, 3), (2, 2, 2, 2), (2, 7, 1, 1), (2, 1, 6, 6)]
NAMES = pytest.mark.parametrize("name", ["attention", "shared_read"])
S = [torch.ones(2, 3, 4, 5)]
MAPS, VECTORS = torch.ones(2 * 20), torch.ones(2 * 3)


@pytest.fixture(autouse=True)
def emulator():
    with with_cuda_kernels(ORDERS) as found:
        yield found


def kinds_of(shapes, kinds):
    """Levels of these shapes, each in a type and a layout of its own."""
    levels = zip(pyramid(shapes, seed=3), shapes, kinds, strict=False)
    return [LAYOUTS[layout]((x.abs() + 0.1).to(DTYPES[dtype])) for x, _, (dtype, layout) in levels]


@NAMES
def test_many_levels_of_types_and_layouts_of_their_own(name):
    kinds = [(dtype, layout) for layout in ("contiguous", "channels_last", "odd address") for dtype in DTYPES]
    results = check(name, kinds_of(MANY, kinds))
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_that_several_blocks_write(layout):
    """A pixel more than two blocks' 8192 each, beside a level of few pixels and more channels than a block has threads."""
    x = [LAYOUTS[layout](a) for a in pyramid([(1, 2, 1, 16385), (1, 600, 1, 2)])]
    results = check("attention", x)
    for part in results[:2]:
        assert abs(float(part.mean()) - 1) < 1e-5


@NAMES
@settings(max_examples=8)
@given(
    images=st.integers(1, 3),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (40, 14, 19)]), min_size=1, max_size=3),
    kinds=st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(LAYOUTS))), min_size=3, max_size=3),
)
def test_any_levels(name, images, sizes, kinds):
    x = kinds_of([(images, *size) for size in sizes], kinds)
    results = check(name, x)
    assert len(results) == 3 * len(sizes)


def test_the_features_are_read_once(emulator):
    x, w = pyramid([(2, 16, 8, 16), (2, 32, 4, 4)]), torch.ones(2 * (16 + 32))
    emulator.reset_counts()
    raw, spatial, channel = torch.ops.kdkernels_emulated.shared_read(x, w, True, 0.5)
    counts = emulator.counts()
    assert counts["bytes_read"] == sum(a.nbytes for a in x) and counts["bytes_written"] == 0 and counts["launches"] == 3
    want = torch.cat([a.abs().sum(1).flatten() for a in x])
    assert relative_error(raw, want) < 1e-6
    packed = [torch.cat([a.flatten() for a in part]) for part in reference(x, 0.5)]
    assert relative_error(spatial, packed[0]) < 1e-5 and relative_error(channel, packed[1]) < 1e-5


def test_attentions_of_the_same_features_are_equal():
    x = pyramid([(2, 20, 9, 11), (1 + 1, 3, 5, 5)], torch.bfloat16)
    alone, read = torch.ops.kdkernels_emulated.attention(x, 0.5), torch.ops.kdkernels_emulated.shared_read(x, torch.ones(46), False, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(alone, read[1:], strict=True))


#: Operator -> case -> arguments, and what is said of them.
REFUSED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "attention": {
        "three dimensions": (([torch.ones(3, 4, 5)], 0.5), r"level 0: expected \(N, C, H, W\)"),
        "float64": (([S[0].double()], 0.5), "takes float32, float16 and bfloat16; got Double"),
    },
    "attention_backward": {
        "spatial": ((S, MAPS[:3], VECTORS, MAPS, VECTORS, 0.5), "expected 40 contiguous float32 elements"),
        "channel": ((S, MAPS, VECTORS[:3], MAPS, VECTORS, 0.5), "expected 6 contiguous float32 elements"),
        "grad_spatial": ((S, MAPS, VECTORS, MAPS[::2], VECTORS, 0.5), "expected 40 contiguous float32 elements"),
        "grad_channel": ((S, MAPS, VECTORS, MAPS, VECTORS.double(), 0.5), "expected 6 contiguous float32 elements"),
    },
    "shared_read": {"weights": ((S, torch.ones(7), False, 0.5), "expected 6 contiguous float32 elements")},
}
NO_LEVEL = {"attention": ([], 0.5), "attention_backward": ([], MAPS, VECTORS, MAPS, VECTORS, 0.5), "shared_read": ([], VECTORS, False, 0.5)}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in REFUSED.items() for case in cases])
def test_the_operators_refuse_what_does_not_fit(name, case):
    arguments, words = REFUSED[name][case]
    with pytest.raises(RuntimeError, match=words) as raised:
        getattr(torch.ops.kdkernels_emulated, name)(*arguments)
    assert re.search(r"\.(cpp|cu|h):\d+, ", str(raised.value)), "it names no line of the sources"


@pytest.mark.parametrize("name", NO_LEVEL)
def test_the_operators_refuse_a_pyramid_without_levels(name, emulator):
    emulator.reset_counts()
    with pytest.raises((RuntimeError, IndexError), match="at least one level|no tensor arguments|range_check"):
        getattr(torch.ops.kdkernels_emulated, name)(*NO_LEVEL[name])
    assert emulator.counts()["launches"] == 0
