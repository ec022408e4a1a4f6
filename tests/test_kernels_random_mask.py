"""`random_mask` by fused kernels: the bits of the reference on every backend, in every layout, with any number of threads."""

from __future__ import annotations

from math import floor

import pytest
import torch
from all_kernels import on_all_kernels, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid
from native_support import needs_library, same_everywhere, threads

from kdkernels import backend as backends
from kdkernels import functional
from kdkernels.ops.random_mask import fused
from kdkernels.reference.random_mask import random_mask as reference

SHAPES = [(2, 20, 14, 19), (2, 3, 7, 11), (2, 16, 4, 8), (2, 1, 1, 1)]
SEEDS = [(0, 0), (-5, 2**40 + 7), (2**62 + 12345, 3), (-(2**63), -1)]
HALF = floor(0.5 * 2**32)


def state_of(device, seed=1, call=0):
    return torch.tensor([seed, call], device=device)


def bits(x):
    return x.detach().cpu().contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check(backend, x, threshold, seed=1, call=0):
    """Values, and the gradient for an upstream gradient of other numbers, with the bits of the reference; returns the values."""
    state, leaves = state_of(x[0].device, seed, call), [level.detach().requires_grad_() for level in x]
    with poisoned(backend):
        got = fused(backend, leaves, state, threshold)
        up = [pyramid([level.shape], level.dtype, seed=8, device=level.device)[0] for level in x]
        state[1] += 1
        gradients = torch.autograd.grad(got, leaves, up)
    for results, levels in ((got, x), (gradients, up)):
        want = reference([level.detach().cpu() for level in levels], state_of("cpu", seed, call), threshold)
        for result, expected, level in zip(results, want, levels, strict=True):
            assert result.dtype == level.dtype and result.stride() == torch.empty_like(level).stride()
            assert torch.equal(bits(result), bits(expected))
    return [level.detach() for level in got]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_and_gradient(dtype, layout, backend, device):
    x = pyramid(SHAPES, dtype, layout, 1, device)
    for seed, call in SEEDS:
        got = check(backend, x, floor(0.65 * 2**32), seed, call)
    assert 0.3 < float((got[0] == 0).float().mean()) < 0.9


@on_all_kernels
@pytest.mark.parametrize("threshold", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32])
def test_thresholds(threshold, backend, device):
    x = pyramid(SHAPES, device=device)
    got = check(backend, x, threshold)
    if threshold in (0, 2**32):
        assert all(torch.equal(a, b if threshold == 0 else torch.zeros_like(b)) for a, b in zip(got, x, strict=True))


@on_all_kernels
def test_seven_levels_of_several_types_and_strides(backend, device):
    x = pyramid([(2, 5, 4, k) for k in range(2, 9)], torch.float32, "channels_last", 2, device)
    x[1], x[6], x[3], x[2] = x[1].contiguous(), x[6][:, 1:4], x[3][:, :, ::2], x[2].half()
    x[5] = torch.randn(1 + 2 * 5 * 4 * 7, device=device)[1:].view(2, 5, 4, 7)
    assert len(check(backend, x, HALF)) == 7


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_more_channels_and_pixels_than_a_block_takes(dtype, layout, backend, device):
    x = pyramid([(1, 2, 3, 1501), (1, 600, 1, 3), (1, 130, 9, 33)], dtype, layout, device=device)
    assert len(check(backend, x, HALF)) == 3


@on_all_kernels
@settings(max_examples=6)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3),
    dtype=st.sampled_from(list(DTYPES.values())),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(-(2**63), 2**63 - 1),
    threshold=st.integers(0, 2**32),
)
def test_any_shape_and_state(backend, device, shapes, dtype, layout, seed, threshold):
    x = pyramid([(2, *shape) for shape in shapes], dtype, layout, device=device)
    assert len(check(backend, x, threshold, seed, seed // 7)) == len(shapes)


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_pixels_are_0_whatever_they_were_and_others_stay_as_they_are(poison, layout, backend, device):
    x = [torch.full_like(level, poison) for level in pyramid(SHAPES, torch.bfloat16, layout, device=device)]
    got = check(backend, x, HALF)
    assert all(bool(((level == 0) | ~level.isfinite()).all()) for level in got)
    assert bool((got[0] == 0).any()) and not got[0].isfinite().all()


@on_all_kernels
def test_layouts_and_types_have_the_same_mask(backend, device):
    masks = []
    for layout in LAYOUTS:
        for dtype in DTYPES.values():
            x = [torch.ones_like(level) for level in pyramid(SHAPES, dtype, layout, device=device)]
            masks.append([level.bool() for level in fused(backend, x, state_of(device), HALF)])
    assert all(torch.equal(a, b) for mask in masks[1:] for a, b in zip(mask, masks[0], strict=True))


@needs_library
def test_instructions_and_threads_make_no_difference():
    leaves = [level.requires_grad_() for level in pyramid([(2, 33, 40, 61), (2, 7, 9, 5)], torch.bfloat16, "channels_last")]

    def run():
        got = fused("native", leaves, state_of("cpu"), HALF)
        return [*got, *torch.autograd.grad(got, leaves, [level.detach() for level in leaves])]

    first = same_everywhere(run)
    with threads(4):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_that_no_cache_holds(layout):
    """They are streamed; rows begin anywhere."""
    x = pyramid([(1, 131, 151, 151)], layout=layout)
    assert len(check("native", x, HALF)) == 1


@on_all_kernels
def test_only_once_differentiable(backend, device):
    x = [level.requires_grad_() for level in pyramid(SHAPES, device=device)]
    total = sum(level.square().sum() for level in fused(backend, x, state_of(device), HALF))
    gradient = torch.autograd.grad(total, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@on_all_kernels
def test_empty(backend, device):
    x = [level.requires_grad_() for level in pyramid([(0, 4, 3, 5), (0, 2, 1, 1)], torch.float16, device=device)]
    got = fused(backend, x, state_of(device), HALF)
    gradients = torch.autograd.grad(sum(level.sum() for level in got), x)
    assert fused(backend, [], state_of(device), HALF) == []
    assert [(g.shape, g.dtype) for g in (*got, *gradients)] == 2 * [(level.shape, level.dtype) for level in x]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_keep_to_their_schema(layout, backend, device):
    x = pyramid(SHAPES[1:], torch.float16, layout, device=device)
    x.append(x[0][:, 1:, 2:])
    checks = ("test_schema", "test_faketensor")
    arguments = (backend, x, state_of(device), HALF)
    done = torch.library.opcheck(torch.ops.kdkernels.random_mask.default, arguments, test_utils=checks)
    assert done == dict.fromkeys(checks, "SUCCESS")


@on_all_kernels
def test_the_library_s_choice_of_a_backend(backend, device, monkeypatch):
    x = pyramid(SHAPES[1:], device=device)
    monkeypatch.setattr(backends, "_choice", backend)
    # Every second number of a state.
    state = torch.tensor([1, 9, 0, 9], device=device)[::2]
    got = functional.random_mask(dict(enumerate(x)), state, 0.5)
    assert all(torch.equal(*pair) for pair in zip(got, fused(backend, x, state_of(device), HALF), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_captured_graph_reads_the_state_when_it_runs(backend):
    x, state = pyramid(SHAPES, device="cuda"), state_of("cuda")
    fused(backend, x, state, HALF)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fused(backend, x, state, HALF)
        state[1] += 1
    for call in range(3):
        graph.replay()
        want = reference(x, state_of("cuda", 1, call), HALF)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
