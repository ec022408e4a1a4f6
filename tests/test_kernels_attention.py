"""The kernels of `attention` for GPUs against the reference in float64: values and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from all_kernels import on_gpu_kernels, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from torch import Tensor
from triton_support import DEVICES, ROUNDING

from kdkernels import backend as backends
from kdkernels.functional import attention as public
from kdkernels.ops.attention import fused
from kdkernels.reference.attention import attention as reference
from kdkernels.triton import launch

SHAPES = [(2, 20, 9, 11), (2, 3, 7, 11), (2, 1, 1, 1), (2, 8, 4, 6)]
TOLERANCE = 2e-6
NAN, INF = float("nan"), float("inf")


def check(backend: str, x: Sequence[Tensor], temperature: float = 0.5, tolerance: float = TOLERANCE) -> list[Tensor]:
    """S, Ch and the gradient of x, whose strides and type it must have, against the reference; returns all."""
    wide = [a.detach().double().cpu().contiguous().requires_grad_() for a in x]
    leaves = [a.detach().requires_grad_() for a in x]
    want_spatial, want_channel = reference(wide, temperature)
    want = [*want_spatial, *want_channel]
    upstream = [torch.randn(a.shape, generator=torch.Generator().manual_seed(7)) for a in want]
    want_gradients = torch.autograd.grad(want, wide, [g.double() for g in upstream])
    with poisoned(backend):
        spatial, channel = fused(backend, leaves, temperature)
        results = [*spatial, *channel]
        gradients = torch.autograd.grad(results, leaves, [g.to(a.device) for g, a in zip(upstream, results, strict=True)])
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert relative_error(got.detach(), expected.detach()) < tolerance
    for got, expected, a in zip(gradients, want_gradients, x, strict=True):
        assert got.dtype == a.dtype and got.stride() == torch.empty_like(a).stride()
        assert relative_error(got, expected) < ROUNDING[a.dtype] + 5 * tolerance
    return [*results, *gradients]


@on_gpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient(backend, device, dtype, layout):
    results = check(backend, pyramid(SHAPES, DTYPES[dtype], layout, device=device))
    assert len(results) == 3 * len(SHAPES)


@on_gpu_kernels
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_other_temperatures(backend, device, temperature):
    results = check(backend, pyramid(SHAPES[:2], seed=1, device=device), temperature, 5e-6)
    assert results[0].std() > 0


@on_gpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_and_vectors_of_many_blocks(backend, device, layout):
    """More pixels than two blocks of a map take, beside more channels than a block has threads."""
    results = check(backend, pyramid([(1, 2, 1, 16385), (1, 600, 1, 2)], layout=layout, device=device))
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [1, 3])
def test_maps_and_vectors_of_many_blocks_of_triton(device, steps):
    """By its launch parameters, of 16: several turns make the statistics, several programs write a map; 273 pixels are two bands of the
    read pass."""
    x = pyramid([(2, 40, 9, 13), (2, 5, 13, 21)], seed=2, device=device)
    small = {"BLOCK": 16, "STEPS": steps}
    with launch.override("attention", small) as used, launch.override("attention_backward", small):
        check("triton", x)
    assert used["STEPS"] == steps


@on_gpu_kernels
@settings(max_examples=6)
@given(
    images=st.integers(1, 2),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (20, 14, 19)]), min_size=1, max_size=3),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=3, max_size=3),
)
def test_any_shapes_in_any_layouts(backend, device, images, sizes, layouts):
    x = [pyramid([(images, *size)], layout=layout, device=device)[0] for size, layout in zip(sizes, layouts, strict=False)]
    results = check(backend, x)
    assert len(results) == 3 * len(sizes)


@on_gpu_kernels
def test_seven_levels_slices_and_unaligned_starts(backend, device):
    x = pyramid([(1, 4, 1 + k, 5) for k in range(7)], seed=3, device=device)
    x[0] = pyramid([(3, 4, 6, 10)], seed=4, device=device)[0][1:2, :, ::2, 3:8]
    x[1] = torch.randn(1 + 4 * 2 * 5, device=device)[1:].view(1, 4, 2, 5)
    results = check(backend, x)
    assert len(results) == 21 and not x[0].is_contiguous()


@on_gpu_kernels
def test_no_images(backend, device):
    x = [a.requires_grad_() for a in pyramid([(0, 3, 2, 2), (0, 2, 1, 1)], device=device)]
    spatial, channel = fused(backend, x, 0.5)
    assert [tuple(a.shape) for a in (*spatial, *channel)] == [(0, 2, 2), (0, 1, 1), (0, 3), (0, 2)]
    gradients = torch.autograd.grad([a.sum() for a in (*spatial, *channel)], x)
    assert [a.shape for a in gradients] == [a.shape for a in x]
    assert fused(backend, [], 0.5) == ([], [])


@on_gpu_kernels
def test_constant_features_give_one_everywhere(backend, device):
    spatial, channel = fused(backend, [torch.full((1, 3, 7, 7), -4.0, device=device)], 0.5)
    assert spatial[0].unique().tolist() == [1.0]
    assert channel[0].unique().tolist() == [1.0]


@on_gpu_kernels
def test_large_features_saturate_without_overflow(backend, device):
    x = torch.zeros(1, 2, 2, 2, device=device)
    x[0, 1, 1, 0] = 60000.0
    spatial, channel = fused(backend, [x.half(), x, 1e30 * x], 0.5)
    for s, c in zip(spatial, channel, strict=True):
        assert s.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
        assert c.tolist() == [[0.0, 2.0]]


@on_gpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_features_make_their_image_nan(backend, device, bad, layout):
    (x,) = pyramid([(3, 4, 5, 6)], layout=layout, device=device)
    x[1, 2, 4, 3] = bad
    x.requires_grad_()
    spatial, channel = fused(backend, [x], 0.5)
    (gradient,) = torch.autograd.grad(spatial[0].square().sum() + channel[0].square().sum(), x)
    for a in (spatial[0], channel[0], gradient):
        assert a[::2].isfinite().all() and not a[1].isfinite().any()


@on_gpu_kernels
def test_two_runs_are_bit_equal(backend, device):
    x = pyramid(SHAPES, torch.bfloat16, device=device)
    first, second = check(backend, x), check(backend, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_launch_parameters_of_triton_change_no_bit(device):
    x = pyramid(SHAPES, torch.bfloat16, device=device)
    first = fused("triton", x, 0.5)
    with launch.override("attention", {"STEPS": 1}):
        again = fused("triton", x, 0.5)
    assert all(torch.equal(a, b) for a, b in zip([*again[0], *again[1]], [*first[0], *first[1]], strict=True))


@on_gpu_kernels
def test_one_result_alone_gets_a_gradient(backend, device):
    (x,) = (a.requires_grad_() for a in pyramid([(2, 3, 4, 5)], device=device))
    wide = x.detach().double().cpu().requires_grad_()
    for which in (0, 1):
        (got,) = torch.autograd.grad(fused(backend, [x], 0.5)[which][0].square().sum(), x)
        (want,) = torch.autograd.grad(reference([wide], 0.5)[which][0].square().sum(), wide)
        assert relative_error(got, want) < 5 * TOLERANCE


@on_gpu_kernels
def test_the_backend_serves_the_public_function(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_choice", backend)
    x = pyramid(SHAPES[:2], torch.bfloat16, device=device)
    got = public(dict(enumerate(x)), 0.7)
    want = reference([a.double() for a in x], 0.7)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))
    with pytest.raises(ValueError, match="temperature"):
        public(x, 0.0)


@on_gpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_and_fakes(backend, device, layout):
    x = pyramid(SHAPES[1:3], torch.float16, layout, device=device)
    spatial, channel = torch.ops.kdkernels.attention(backend, x, 0.5)
    tests = ("test_schema", "test_faketensor")
    results = [
        torch.library.opcheck(torch.ops.kdkernels.attention.default, (backend, x, 0.5), test_utils=tests),
        torch.library.opcheck(
            torch.ops.kdkernels.attention_backward.default, (backend, x, spatial, channel, spatial, channel, 0.5), test_utils=tests
        ),
    ]
    assert all(result == dict.fromkeys(tests, "SUCCESS") for result in results)
