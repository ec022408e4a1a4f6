"""The kernels of `weighted_channel_sum` for GPUs against the reference in float64: values, extrema and the gradient of the features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from all_kernels import on_gpu_kernels, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_support import ROUNDING

from kdkernels import set_backend
from kdkernels.functional import weighted_channel_sum as public
from kdkernels.ops.weighted_channel_sum import ACTIVATIONS, RECTIFIERS, fused
from kdkernels.reference.weighted_channel_sum import weighted_channel_sum as reference

pytestmark = on_gpu_kernels
SHAPES = [(2, 16, 7, 8), (2, 3, 7, 11), (2, 8, 3, 5), (2, 1, 1, 1)]
# Sums of some tens of terms in fp32, each good to 2^-24, which cancel where a sum is near 0.
TOLERANCE = 2e-6
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def chosen(backend: str) -> Iterator[None]:
    set_backend(backend)
    yield
    set_backend("auto")


def weights_of(x: Sequence[Tensor], seed: int = 50) -> list[Tensor]:
    return pyramid([a.shape[:2] for a in x], seed=seed, device=str(x[0].device))


def check(
    backend: str, x: Sequence[Tensor], activation: str = "raw", rectify: str = "abs", weights: list[Tensor] | None = None
) -> list[Tensor]:
    """Maps, minima, maxima and gradients, whose strides and type must be x's, against the reference; returns all."""
    weights = weights_of(x) if weights is None else weights
    wide = [a.detach().double().cpu().contiguous().requires_grad_() for a in x]
    leaves = [a.detach().requires_grad_() for a in x]
    wanted_parts = reference(wide, [w.double().cpu() for w in weights], activation, rectify)
    want = [part for parts in wanted_parts for part in parts]
    upstream = [torch.randn(a.shape, generator=torch.Generator().manual_seed(7)) for a in want]
    want_gradients = torch.autograd.grad(want, wide, [g.double() for g in upstream])
    with poisoned(backend):
        found_parts = fused(backend, leaves, weights, activation, rectify)
        results = [part for parts in found_parts for part in parts]
        gradients = torch.autograd.grad(results, leaves, [g.to(a.device) for g, a in zip(upstream, results, strict=True)])
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
    for level, expected_level in zip(zip(*found_parts, strict=True), zip(*wanted_parts, strict=True), strict=True):
        # Both extrema at once: a minimum near 0 is what terms as large as those of the maximum left.
        for pick in (slice(0, 1), slice(1, 3)):
            got, expected = (torch.stack(parts[pick]).detach() for parts in (level, expected_level))
            assert relative_error(got, expected) < TOLERANCE
    for got, expected, a in zip(gradients, want_gradients, x, strict=True):
        assert got.dtype == a.dtype and got.stride() == torch.empty_like(a).stride()
        assert relative_error(got, expected) < ROUNDING[a.dtype]
    return [*results, *gradients]


@pytest.mark.parametrize(("activation", "rectify"), list(product(ACTIVATIONS, RECTIFIERS)))
def test_values_and_gradient(backend, device, activation, rectify):
    results = check(backend, pyramid(SHAPES, device=device), activation, rectify)
    assert len(results) == 4 * len(SHAPES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_layouts(backend, device, dtype, layout):
    results = check(backend, pyramid(SHAPES, DTYPES[dtype], layout, device=device), "abs", "none")
    assert results[-1].dtype == DTYPES[dtype]


def test_16_bit_weights(backend, device):
    x = pyramid(SHAPES[:2], torch.bfloat16, device=device)
    assert check(backend, x, weights=[w.bfloat16() for w in weights_of(x)])[0].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_layouts_slices_and_misaligned_starts(backend, device, layout):
    whole = pyramid([(2, 16, 7, 9), (2, 6, 7, 11), (2, 8, 3, 5)], layout=layout, device=device)
    shifted = torch.cat([whole[2].new_zeros(1), whole[2].contiguous().flatten()])[1:].view(whole[2].shape)
    results = check(backend, [whole[0][:, :, :, 1:], whole[1][:, ::2].contiguous(), shifted])
    assert shifted.storage_offset() == 1 and len(results) == 12


def test_seven_levels_take_two_launches(backend, device):
    shapes = [(1, c, h, h + 1) for c, h in [(3, 2), (8, 7), (5, 1), (8, 3), (2, 6), (16, 4), (4, 4)]]
    assert len(check(backend, pyramid(shapes, device=device))) == 28


def test_no_images_and_no_levels(backend, device):
    x = [a.requires_grad_() for a in pyramid([(0, 3, 4, 5), (0, 8, 2, 2)], device=device)]
    maps, low, high = fused(backend, x, weights_of(x))
    gradients = torch.autograd.grad(sum(m.sum() for m in maps), x)
    assert [m.shape for m in maps] == [(0, 4, 5), (0, 2, 2)] and {a.shape for a in [*low, *high]} == {(0,)}
    assert [g.shape for g in gradients] == [a.shape for a in x]
    assert fused(backend, [], []) == ([], [], [])


@pytest.mark.parametrize(("bad", "rectify"), [(NAN, "abs"), (INF, "none"), (-INF, "relu")])
def test_bad_numbers_stay_and_do_not_spread(backend, device, bad, rectify):
    x = pyramid(SHAPES, device=device)
    weights = weights_of(x)
    x[0][1, 2, 3, 4] = bad
    weights[1][0, 1] = bad
    maps, low, high = fused(backend, x, weights, "abs", rectify)
    assert [int((~torch.isfinite(m)).sum()) for m in maps] == [1, 77, 0, 0]
    assert not (torch.isfinite(low[0][1]) and torch.isfinite(high[0][1]))
    assert bool(torch.isfinite(low[0][0]) & torch.isfinite(high[0][0]))


def test_two_runs_are_equal_to_the_bit(backend, device):
    x = pyramid(SHAPES, torch.bfloat16, device=device)
    assert all(torch.equal(a, b) for a, b in zip(check(backend, x), check(backend, x), strict=True))


@settings(max_examples=6)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3),
    layout=st.sampled_from(list(LAYOUTS)),
    rectify=st.sampled_from(RECTIFIERS),
)
def test_any_shape(backend, device, shapes, layout, rectify):
    # Numbers of one sign: a sum that cancels to nearly 0 by itself is no more exact than its largest term.
    x = [a.abs() + 0.1 for a in pyramid([(2, *shape) for shape in shapes], layout=layout, device=device)]
    assert len(check(backend, x, "raw", rectify, [w.abs() for w in weights_of(x)])) == 4 * len(shapes)


def test_public_function_takes_the_kernels(backend, device, chosen):
    x = pyramid(SHAPES[:2], device=device)
    weights = weights_of(x)
    got, want = public(x, weights), fused(backend, x, weights)
    assert all(torch.equal(a, b) for parts, others in zip(got, want, strict=True) for a, b in zip(parts, others, strict=True))


def test_what_only_the_reference_can_do_is_refused(backend, device, chosen):
    x = pyramid(SHAPES[:2], device=device)
    with pytest.raises(RuntimeError, match="a weight per element is in the reference only"):
        public(x, [torch.ones_like(a) for a in x])
    wanting = [w.requires_grad_() for w in weights_of(x)]
    with pytest.raises(RuntimeError, match="the weights require a gradient"):
        public(x, wanting)
    with pytest.raises(RuntimeError, match="float64"):
        public(x, [w.detach().double() for w in wanting])
    with torch.no_grad():
        assert public(x, wanting)[0][0].shape == (2, 7, 8)
    set_backend("reference")
    assert public(x, wanting)[0][0].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_what_their_fakes_say(backend, device, layout):
    x = pyramid(SHAPES[:2], layout=layout, device=device)
    w, grad = torch.ones(sum(a.shape[0] * a.shape[1] for a in x), device=device), torch.ones(sum(a[:, 0].numel() for a in x), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for operator, args in (("weighted_channel_sum", (x, w, True)), ("weighted_channel_sum_backward", (x, w, grad, True))):
            results = torch.library.opcheck(getattr(torch.ops.kdkernels, operator).default, (backend, *args))
            assert set(results.values()) == {"SUCCESS"}


def test_fakes_count_beyond_2_to_the_31_elements(backend, device):
    with FakeTensorMode():
        x = torch.empty(5, 1, 2**15, 2**15, dtype=torch.float16, device=device, requires_grad=True)
        maps, low, _ = fused(backend, [x], [torch.empty(5, 1, device=device)])
        (gradient,) = torch.autograd.grad(maps[0].sum(), x)
    assert maps[0].numel() == 5 * 2**30 and low[0].shape == (5,)
    assert gradient.shape == x.shape and gradient.dtype == torch.float16


def test_compiled_without_graph_breaks(backend, device):
    def step(x: list[Tensor], weights: list[Tensor]) -> Tensor:
        maps, low, high = fused(backend, x, weights, "abs", "relu")
        return sum(m.square().sum() for m in maps) + sum((b - a).sum() for a, b in zip(low, high, strict=True))

    x, weights = [a.requires_grad_() for a in pyramid(SHAPES[:2], device=device)], weights_of(pyramid(SHAPES[:2], device=device))
    want = step(x, weights)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weights)
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        assert torch.allclose(a, b)
