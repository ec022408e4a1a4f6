"""`attention` and the distance of two attentions, from the sums of |x| that the read pass leaves: a_p = sum_c |x|, b_c = sum_p |x|.

S_p = P * softmax_p(a_p / (C * temperature)) and Ch_c = C * softmax_c(b_c / (P * temperature)) are the same function of a_p and b_c, with
P and C swapped: `factor` is 1 / (C * temperature) for the one and 1 / (P * temperature) for the other, see `logit_factor`.

The distance of one level and image against the teacher's attention leaves three floats for its backward:
    [0] maximum   the largest sum
    [1] scale     P / sum_p exp((a_p - maximum) * factor)     (C in place of P for the channels)
    [2] q         sum_p sgn(S_p - S_T,p) * S_p
The exponents are differences of sums, so a sum too large for fp32 (or a NaN) makes scale and with it the whole attention NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .channel_sums import part_offsets
from .gradient import gradient
from .levels import (
    Geometry,
    Sizes,
    ceil_div,
    integers,
    launches,
    locate,
    offsets,
    pick_integer,
    pick_offset,
    power_of_2,
    remembered,
    sign,
    sizes_of,
)
from .reduce import Sums, reduce

#: Elements of the block that sums the parts of all channels over the tiles.
_PARTS_BLOCK = 8192


def channel_blocks(channels: Sequence[int]) -> dict[str, int]:
    """BLOCK_C, all channels of any level, and BLOCK_TILES, the tiles whose parts are loaded at once."""
    block = power_of_2(max(channels))
    return {"BLOCK_C": block, "BLOCK_TILES": max(1, _PARTS_BLOCK // block)}


@triton.jit
def logit_factor(summed, temperature):
    """1 / (summed * temperature): from a sum of `summed` magnitudes to the softmax's argument."""
    return tl.div_rn(1.0, summed.to(tl.float32) * tl.cast(temperature, tl.float32))


@triton.jit
def attention_of(sums, maximum, scale, factor):
    """S of a_p, or Ch of b_c."""
    return tl.exp((sums - maximum) * factor) * scale


@triton.jit
def spatial_statistics(sums, pixels, factor, BLOCK: tl.constexpr):
    """Maximum and scale of the map `sums` of one level and image."""
    # Every lane keeps its own maximum and sum, so that nothing crosses lanes within the loop. No sum is below 0.
    largest = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        a = tl.load(sums + p, p < pixels, 0.0)
        risen = tl.maximum(largest, a)
        total = total * tl.exp((largest - risen) * factor) + tl.where(p < pixels, tl.exp((a - risen) * factor), 0.0)
        largest = risen
    maximum = tl.max(largest, 0)
    return maximum, tl.div_rn(pixels.to(tl.float32), tl.sum(total * tl.exp((largest - maximum) * factor), 0))


@triton.jit
def spatial_distance(sums, target, state, pixels, factor, BLOCK: tl.constexpr):
    """sum_p |S_p - S_T,p| of one level and image; stores its state.

    sums, target: the maps a and S_T, (P,) fp32
    """
    maximum, scale = spatial_statistics(sums, pixels, factor, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        s = tl.where(p < pixels, attention_of(tl.load(sums + p, p < pixels, 0.0), maximum, scale, factor), 0.0)
        difference = s - tl.load(target + p, p < pixels, 0.0)
        value += tl.abs(difference)
        q += sign(difference) * s
    _store_state(state, maximum, scale, tl.sum(q, 0))
    return tl.sum(value, 0)


@triton.jit
def sum_parts(parts, tiles, channels, BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """b (BLOCK_C,) of one level and image from its parts (tiles, C), added in a fixed order; 0 behind the last channel."""
    tile = tl.arange(0, BLOCK_TILES)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_TILES, BLOCK_C], tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        total += tl.load(parts + (start + tile) * channels + c, (start + tile < tiles) & (c < channels), 0.0)
    return tl.sum(total, 0)


@triton.jit
def channel_attention(b, channels, factor, BLOCK_C: tl.constexpr):
    """Ch (BLOCK_C,), 0 behind the last channel, with its maximum and scale, of b (BLOCK_C,)."""
    inside = tl.arange(0, BLOCK_C) < channels
    maximum = tl.max(b, 0)
    exponential = tl.where(inside, tl.exp((b - maximum) * factor), 0.0)
    scale = tl.div_rn(channels.to(tl.float32), tl.sum(exponential, 0))
    return tl.where(inside, exponential * scale, 0.0), maximum, scale


@triton.jit
def channel_distance(parts, target, sums, state, tiles, channels, factor, BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """sum_c |Ch_c - Ch_T,c| of one level and image; stores b in `sums` for the backward, and the state.

    parts: (tiles, C) fp32 of the read pass;   target, sums: Ch_T and b, (C,) fp32
    """
    c = tl.arange(0, BLOCK_C)
    b = sum_parts(parts, tiles, channels, BLOCK_C, BLOCK_TILES)
    own, maximum, scale = channel_attention(b, channels, factor, BLOCK_C)
    tl.store(sums + c, b, c < channels)
    difference = own - tl.load(target + c, c < channels, 0.0)
    _store_state(state, maximum, scale, tl.sum(sign(difference) * own, 0))
    return tl.sum(tl.abs(difference), 0)


@triton.jit
def distance_gradient(sums, target, state, cotangent, index, inside, count, factor):
    """Gradient of the distance, times `cotangent`, with respect to the sums at `index`; garbage where not `inside`.

    Of a_p (what sgn(x) is multiplied by at pixel p) with sums a, target S_T, count P; of b_c with sums b, target Ch_T, count C.
    """
    own = attention_of(tl.load(sums + index, inside, 0.0), tl.load(state), tl.load(state + 1), factor)
    difference = own - tl.load(target + index, inside, 0.0)
    mean = tl.load(state + 2) / count.to(tl.float32)
    return cotangent * own * (sign(difference) - mean) * factor


@triton.jit
def _store_state(state, maximum, scale, q):
    tl.store(state, maximum)
    tl.store(state + 1, scale)
    tl.store(state + 2, q)


@triton.jit
def _place(pixels, channels, programs, ends):
    """This program's level, image and number within the image, and the level's pixels and channels; programs: per image"""
    level, program = locate(ends)
    n = (program // pick_integer(programs, level)).to(tl.int64)
    return level, n, program % pick_integer(programs, level), pick_integer(pixels, level), pick_integer(channels, level)


@triton.jit
def attention_kernel(
    sums, parts, spatial, channel, pixels, channels, pixel_offsets, channel_offsets, part_offsets, tiles, programs, ends, temperature,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """The first program of an image writes its Ch, each of the others STEPS * BLOCK pixels of its S.

    These work out the statistics of the whole map each for itself: it is small and lies in the L2 cache.
    tiles: of the channel parts, per image;   programs: per image
    """
    level, n, part, size, count = _place(pixels, channels, programs, ends)
    if part == 0:
        rows = pick_integer(tiles, level)
        b = sum_parts(parts + pick_offset(part_offsets, level) + n * rows * count, rows, count, BLOCK_C, BLOCK_TILES)
        own, _, _ = channel_attention(b, count, logit_factor(size, temperature), BLOCK_C)
        c = tl.arange(0, BLOCK_C)
        tl.store(channel + pick_offset(channel_offsets, level) + n * count + c, own, c < count)
    else:
        base = pick_offset(pixel_offsets, level) + n * size
        factor = logit_factor(count, temperature)
        maximum, scale = spatial_statistics(sums + base, size, factor, BLOCK)
        first = (part - 1) * (STEPS * BLOCK)
        for start in range(first, min(first + STEPS * BLOCK, size), BLOCK):
            p = start + tl.arange(0, BLOCK)
            a = tl.load(sums + base + p, p < size, 0.0)
            tl.store(spatial + base + p, attention_of(a, maximum, scale, factor), p < size)


@triton.jit
def _softmax_backward(own, grad, out, count, factor, first, end, BLOCK: tl.constexpr):
    """own * (grad - sum(grad * own) / count) * factor, the gradient of the sums, for elements first..end of (count,) fp32."""
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        p = start + tl.arange(0, BLOCK)
        product += tl.load(own + p, p < count, 0.0) * tl.load(grad + p, p < count, 0.0)
    mean = tl.sum(product, 0) / count.to(tl.float32)
    for start in range(first, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        value = tl.load(own + p, p < end, 0.0) * (tl.load(grad + p, p < end, 0.0) - mean) * factor
        tl.store(out + p, value, p < end)


@triton.jit
def attention_backward_kernel(
    spatial, channel, grad_spatial, grad_channel, of_pixel, of_channel,
    pixels, channels, pixel_offsets, channel_offsets, programs, ends, temperature,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums a (`of_pixel`) and b (`of_channel`), by programs as in `attention_kernel`."""
    level, n, part, size, count = _place(pixels, channels, programs, ends)
    if part == 0:
        base = pick_offset(channel_offsets, level) + n * count
        factor = logit_factor(size, temperature)
        _softmax_backward(channel + base, grad_channel + base, of_channel + base, count, factor, 0, count, BLOCK)
    else:
        base = pick_offset(pixel_offsets, level) + n * size
        factor = logit_factor(count, temperature)
        first = (part - 1) * (STEPS * BLOCK)
        end = min(first + STEPS * BLOCK, size)
        _softmax_backward(spatial + base, grad_spatial + base, of_pixel + base, size, factor, first, end, BLOCK)


def attention(x: Sequence[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """S and Ch of the levels x (N, C, H, W), each packed fp32: one read of x and one small launch."""
    return attention_of_sums(x, reduce(x, channel="abs", spatial_abs=True), temperature)


def attention_of_sums(x: Sequence[Tensor], sums: Sums, temperature: float) -> tuple[Tensor, Tensor]:
    """S and Ch of x from what the read pass made of it: `absolute` and the "abs" `channel`."""
    assert sums.absolute is not None and sums.channel is not None
    images, channels, pixels = sizes_of(x)
    spatial, channel = _packed(x[0], images * sum(pixels)), _packed(x[0], images * sum(channels))
    if images == 0:
        return spatial, channel
    parts, tiles = sums.channel
    options = launch.parameters("attention", _heuristic, x, False)
    for grid, geometry, channel_widths in _plan(images, channels, pixels, tiles, options["BLOCK"] * options["STEPS"]):
        attention_kernel[grid](sums.absolute, parts, spatial, channel, *geometry, temperature, **channel_widths, **options)
    return spatial, channel


def attention_backward(
    x: Sequence[Tensor], spatial: Tensor, channel: Tensor, grad_spatial: Tensor, grad_channel: Tensor, temperature: float
) -> list[Tensor]:
    """Gradient of x from `attention`'s two results and their gradients, all packed fp32."""
    images, channels, pixels = sizes_of(x)
    of_pixel, of_channel = _packed(x[0], images * sum(pixels)), _packed(x[0], images * sum(channels))
    options = launch.parameters("attention_backward", _heuristic, x, False)
    for grid, geometry in _backward_plan(images, channels, pixels, options["BLOCK"] * options["STEPS"]):
        attention_backward_kernel[grid](
            spatial, channel, grad_spatial, grad_channel, of_pixel, of_channel, *geometry, temperature, **options
        )  # fmt: skip
    return gradient(x, sign=(of_channel, of_pixel))


def _heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    # A whole map of 67200 pixels goes through one program: many threads, and four loads of each in flight.
    return {"BLOCK": 4096, "STEPS": 4, "num_warps": 16}


@remembered
def _plan(
    images: int, channels: tuple[int, ...], pixels: tuple[int, ...], tiles: tuple[int, ...], run: int
) -> tuple[tuple[tuple[int], Geometry, dict[str, int]], ...]:
    """Grid, geometry and blocks of channels of every launch. tiles: of the channel parts; run: pixels of a program."""
    first_parts = part_offsets(images, channels, tiles)
    found = []
    for sizes in launches(images, channels, pixels):
        parts = offsets(first_parts[i] for i in sizes.indices), integers(tiles[i] for i in sizes.indices)
        grid, programs = _programs(sizes, run)
        found.append((grid, (*_where(sizes), *parts, *programs), channel_blocks(sizes.channels)))
    return tuple(found)


@remembered
def _backward_plan(images: int, channels: tuple[int, ...], pixels: tuple[int, ...], run: int) -> tuple[tuple[tuple[int], Geometry], ...]:
    found = []
    for sizes in launches(images, channels, pixels) if images else ():
        grid, programs = _programs(sizes, run)
        found.append((grid, (*_where(sizes), *programs)))
    return tuple(found)


def _where(sizes: Sizes) -> Geometry:
    """The arguments pixels, channels, pixel_offsets and channel_offsets of both kernels."""
    return integers(sizes.pixels), integers(sizes.channels), offsets(sizes.pixel_offsets), offsets(sizes.channel_offsets)


def _programs(sizes: Sizes, run: int) -> tuple[tuple[int], Geometry]:
    """The grid, and the arguments programs and ends."""
    programs = tuple(1 + ceil_div(p, run) for p in sizes.pixels)
    ends = sizes.programs(programs)
    return (ends[-1],), (integers(programs), integers(ends))


def _packed(like: Tensor, numel: int) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device=like.device)
