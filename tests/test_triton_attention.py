"""The distance of two attentions, which other Triton kernels call, against the reference in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_support import DEVICES, poisoned, pyramid, relative_error

from kdkernels.reference.attention import attention as reference
from kdkernels.triton.attention import channel_distance, distance_gradient, logit_factor, spatial_distance

pytestmark = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = 2e-6
NAN, INF = float("nan"), float("inf")


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
