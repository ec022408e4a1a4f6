"""The Triton kernels of `attention` and of the distance of two attentions against the reference in float64: values and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_support import DEVICES, DTYPES, LAYOUTS, ROUNDING, poisoned, pyramid, relative_error

from kdkernels import backend
from kdkernels.functional import attention as public
from kdkernels.ops.attention import fused
from kdkernels.reference.attention import attention as reference
from kdkernels.triton import launch
from kdkernels.triton.attention import channel_distance, distance_gradient, logit_factor, spatial_distance

pytestmark = pytest.mark.parametrize("device", DEVICES)
SHAPES = [(2, 20, 9, 11), (2, 3, 7, 11), (2, 1, 1, 1), (2, 8, 4, 6)]
TOLERANCE = 2e-6
NAN, INF = float("nan"), float("inf")


def check(x: Sequence[Tensor], temperature: float = 0.5, tolerance: float = TOLERANCE) -> list[Tensor]:
    """S, Ch and the gradient of x, whose strides and type it must have, against the reference; returns all."""
    wide = [a.detach().double().cpu().contiguous().requires_grad_() for a in x]
    leaves = [a.detach().requires_grad_() for a in x]
    want_spatial, want_channel = reference(wide, temperature)
    want = [*want_spatial, *want_channel]
    upstream = [torch.randn(a.shape, generator=torch.Generator().manual_seed(7)) for a in want]
    want_gradients = torch.autograd.grad(want, wide, [g.double() for g in upstream])
    with poisoned():
        spatial, channel = fused("triton", leaves, temperature)
        results = [*spatial, *channel]
        gradients = torch.autograd.grad(results, leaves, [g.to(a.device) for g, a in zip(upstream, results, strict=True)])
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert relative_error(got.detach(), expected.detach()) < tolerance
    for got, expected, a in zip(gradients, want_gradients, x, strict=True):
        assert got.dtype == a.dtype and got.stride() == torch.empty_like(a).stride()
        assert relative_error(got, expected) < ROUNDING[a.dtype] + 5 * tolerance
    return [*results, *gradients]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient(device, dtype, layout):
    results = check(pyramid(SHAPES, DTYPES[dtype], layout, device=device))
    assert len(results) == 3 * len(SHAPES)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_other_temperatures(device, temperature):
    results = check(pyramid(SHAPES[:2], seed=1, device=device), temperature, 5e-6)
    assert results[0].std() > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_maps_and_vectors_of_many_blocks(device, steps):
    """Blocks of 16: several turns make the statistics, several programs write a map; 273 pixels are two bands of the read pass."""
    x = pyramid([(2, 40, 9, 13), (2, 5, 13, 21)], seed=2, device=device)
    small = {"BLOCK": 16, "STEPS": steps}
    with launch.override("attention", small) as used, launch.override("attention_backward", small):
        check(x)
    assert used["STEPS"] == steps


@settings(max_examples=6)
@given(
    images=st.integers(1, 2),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (20, 14, 19)]), min_size=1, max_size=3),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=3, max_size=3),
)
def test_any_shapes_in_any_layouts(device, images, sizes, layouts):
    x = [pyramid([(images, *size)], layout=layout, device=device)[0] for size, layout in zip(sizes, layouts, strict=False)]
    results = check(x)
    assert len(results) == 3 * len(sizes)


def test_seven_levels_slices_and_unaligned_starts(device):
    x = pyramid([(1, 4, 1 + k, 5) for k in range(7)], seed=3, device=device)
    x[0] = pyramid([(3, 4, 6, 10)], seed=4, device=device)[0][1:2, :, ::2, 3:8]
    x[1] = torch.randn(1 + 4 * 2 * 5, device=device)[1:].view(1, 4, 2, 5)
    results = check(x)
    assert len(results) == 21 and not x[0].is_contiguous()


def test_no_images(device):
    x = [a.requires_grad_() for a in pyramid([(0, 3, 2, 2), (0, 2, 1, 1)], device=device)]
    spatial, channel = fused("triton", x, 0.5)
    assert [tuple(a.shape) for a in (*spatial, *channel)] == [(0, 2, 2), (0, 1, 1), (0, 3), (0, 2)]
    gradients = torch.autograd.grad([a.sum() for a in (*spatial, *channel)], x)
    assert [a.shape for a in gradients] == [a.shape for a in x]
    assert fused("triton", [], 0.5) == ([], [])


def test_constant_features_give_one_everywhere(device):
    spatial, channel = fused("triton", [torch.full((1, 3, 7, 7), -4.0, device=device)], 0.5)
    assert spatial[0].unique().tolist() == [1.0]
    assert channel[0].unique().tolist() == [1.0]


def test_large_features_saturate_without_overflow(device):
    x = torch.zeros(1, 2, 2, 2, device=device)
    x[0, 1, 1, 0] = 60000.0
    spatial, channel = fused("triton", [x.half(), x, 1e30 * x], 0.5)
    for s, c in zip(spatial, channel, strict=True):
        assert s.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
        assert c.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_features_make_their_image_nan(device, bad, layout):
    (x,) = pyramid([(3, 4, 5, 6)], layout=layout, device=device)
    x[1, 2, 4, 3] = bad
    x.requires_grad_()
    spatial, channel = fused("triton", [x], 0.5)
    (gradient,) = torch.autograd.grad(spatial[0].square().sum() + channel[0].square().sum(), x)
    for a in (spatial[0], channel[0], gradient):
        assert a[::2].isfinite().all() and not a[1].isfinite().any()


def test_two_runs_are_bit_equal(device):
    x = pyramid(SHAPES, torch.bfloat16, device=device)
    first, second = check(x), check(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with launch.override("attention", {"STEPS": 1}):
        again = fused("triton", x, 0.5)
    assert all(torch.equal(a, b) for a, b in zip([*again[0], *again[1]], first, strict=False))


def test_one_result_alone_gets_a_gradient(device):
    (x,) = (a.requires_grad_() for a in pyramid([(2, 3, 4, 5)], device=device))
    wide = x.detach().double().cpu().requires_grad_()
    for which in (0, 1):
        (got,) = torch.autograd.grad(fused("triton", [x], 0.5)[which][0].square().sum(), x)
        (want,) = torch.autograd.grad(reference([wide], 0.5)[which][0].square().sum(), wide)
        assert relative_error(got, want) < 5 * TOLERANCE


def test_the_backend_serves_the_public_function(device, monkeypatch):
    monkeypatch.setattr(backend, "_choice", "triton")
    x = pyramid(SHAPES[:2], torch.bfloat16, device=device)
    got = public(dict(enumerate(x)), 0.7)
    want = reference([a.double() for a in x], 0.7)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))
    with pytest.raises(ValueError, match="temperature"):
        public(x, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_and_fakes(device, layout):
    x = pyramid(SHAPES[1:3], torch.float16, layout, device=device)
    spatial, channel = torch.ops.kdkernels.attention("triton", x, 0.5)
    tests = ("test_schema", "test_faketensor")
    results = [
        torch.library.opcheck(torch.ops.kdkernels.attention.default, ("triton", x, 0.5), test_utils=tests),
        torch.library.opcheck(
            torch.ops.kdkernels.attention_backward.default, ("triton", x, spatial, channel, spatial, channel, 0.5), test_utils=tests
        ),
    ]
    assert all(result == dict.fromkeys(tests, "SUCCESS") for result in results)


@triton.jit(do_not_specialize=["pixels", "channels", "tiles"])
def _distances(
    sums, parts, spatial, channel, channel_sums, states, values, cotangents, spatial_gradient, channel_gradient,
    pixels, channels, tiles, temperature, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Both distances of one image and their gradients, by one program."""
    n = tl.program_id(0)
    by_pixel = logit_factor(channels, temperature)
    by_channel = logit_factor(pixels, temperature)
    sums += n * pixels
    spatial += n * pixels
    channel += n * channels
    channel_sums += n * channels
    states += n * 16
    tl.store(values + 2 * n, spatial_distance(sums, spatial, states, pixels, by_pixel, BLOCK))
    part = parts + n * tiles * channels
    tl.store(
        values + 2 * n + 1,
        channel_distance(part, channel, channel_sums, states + 8, tiles, channels, by_channel, BLOCK_C, BLOCK_TILES),
    )
    tl.debug_barrier()
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        slope = distance_gradient(sums, spatial, states, tl.load(cotangents + 2 * n), p, p < pixels, pixels, by_pixel)
        tl.store(spatial_gradient + n * pixels + p, slope, p < pixels)
    c = tl.arange(0, BLOCK_C)
    slope = distance_gradient(channel_sums, channel, states + 8, tl.load(cotangents + 2 * n + 1), c, c < channels, channels, by_channel)
    tl.store(channel_gradient + n * channels + c, slope, c < channels)


def distances(x: Tensor, target: Tensor, cotangents: Tensor, tiles: int, blocks: dict[str, int]) -> list[Tensor]:
    """Values (N, 2), gradients of sum_c |x| and of sum_p |x|, and x's; `tiles`: parts of the channel sums, at random pixels."""
    n, c, h, w = x.shape
    owner = torch.randint(tiles, (h * w,), generator=torch.Generator().manual_seed(1))
    flat = x.flatten(2).abs()
    parts = torch.stack([flat[:, :, owner == t].sum(2) for t in range(tiles)], 1).contiguous()
    spatial, channel = ([a.float().contiguous() for a in part] for part in reference([target], 0.7))
    with poisoned():
        values, by_pixel, by_channel = torch.empty(n, 2), torch.empty(n, h * w), torch.empty(n, c)
        buffers = [a.to(x.device) for a in (torch.empty(n, c), torch.empty(n, 2, 8), values, by_pixel, by_channel)]
    sums, states, values, by_pixel, by_channel = buffers
    _distances[(n,)](
        flat.sum(1), parts, spatial[0], channel[0], sums, states, values, cotangents, by_pixel, by_channel, h * w, c, tiles, 0.7, **blocks
    )  # fmt: skip
    return [values, by_pixel, by_channel, x.sgn() * (by_pixel.view(n, 1, h, w) + by_channel[:, :, None, None])]


@pytest.mark.parametrize("shape", [(2, 20, 9, 11), (1, 1, 1, 1), (2, 3, 1, 7), (1, 33, 8, 8)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 64, 2), (128, 64, 8)], ids=str)
def test_distances_and_their_gradients(device, shape, blocks):
    x, target = pyramid([shape, shape], seed=5, device=device)
    cotangents = torch.randn(shape[0], 2, device=device)
    constants = dict(zip(("BLOCK", "BLOCK_C", "BLOCK_TILES"), blocks, strict=True))
    values, _, _, gradient = distances(x, target, cotangents, 5, constants)

    wide = x.double().cpu().requires_grad_()
    own, other = (torch.cat([a.flatten(1) for part in reference([y], 0.7) for a in part], 1) for y in (wide, target.double().cpu()))
    each = (own - other).abs().split([shape[2] * shape[3], shape[1]], 1)
    want = torch.stack([a.sum(1) for a in each], 1)
    (want_gradient,) = torch.autograd.grad(want, wide, cotangents.double().cpu())
    # A difference of numbers near 1 is good to their rounding, whatever is left of it.
    assert (values.double().cpu() - want).abs().max() < 1e-6 * own.abs().sum(1).max()
    if shape != (1, 1, 1, 1):
        assert relative_error(gradient, want_gradient) < 5 * TOLERANCE
    else:
        assert gradient.eq(0).all() and values.eq(0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_distances_of_non_finite_features_are_nan(device, bad):
    x, target = pyramid([(3, 4, 5, 6)] * 2, seed=6, device=device)
    x[1, 2, 4, 3] = bad
    blocks = {"BLOCK": 16, "BLOCK_C": 8, "BLOCK_TILES": 2}
    for a in distances(x, target, torch.ones(3, 2, device=device), 2, blocks):
        assert a[::2].isfinite().all() and not a[1].isfinite().any()
