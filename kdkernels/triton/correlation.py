"""`correlation` and its gradient: a read and a write pass over both pyramids, and between them programs for some channels and for an image.

Over the M values of all images a channel has X = sum (s - mean_s)^2, the slope b = sum (s - mean_s) (t - mean_t) / X of t by s, what it
leaves of t, E = sum (t - mean_t - b (s - mean_s))^2, and so sum (t - mean_t)^2 = E + b^2 X; with sigma = sqrt(sum / (M - 1)) and
a = 1 / (sigma + eps) then sum (z_s - z_t)^2 = (a_s - a_t b)^2 X + a_t^2 E. Nothing cancels in it, however well s predicts t. Half of it
over M and the number C of channels is V, whose gradient is
    (a_s^2 eps (a_s - a_t b) + a_s a_t b) / (M C) * (s - mean_s) - a_s a_t / (M C) * (t - mean_t)
also for a constant channel, whose deviation has no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compared_read import CORRELATION_NUMBERS, read
from .compared_write import write
from .levels import Geometry, Sizes, ceil_div, integers, launches, locate, offsets, pick_integer, pick_offset, remembered, sizes_of

#: Parts and channels that a program takes at a time.
_CHANNELS = {"PARTS": 32, "BLOCK": 32, "num_warps": 4}
_ROWS = {"PARTS": 4, "BLOCK": 128, "num_warps": 4}
#: What is known of a channel: five numbers for the gradient, and a_s, a_t and both means for the rows.
_PLANES = 9


def correlation(s: Sequence[Tensor], t: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Rows (L, N), and `_PLANES` planes of all channels, fp32."""
    images, channels, pixels = sizes_of(s)
    total = sum(channels)
    rows, planes = s[0].new_empty(len(s), images, dtype=torch.float32), s[0].new_empty(_PLANES * total, dtype=torch.float32)
    if images == 0:
        return rows, planes.zero_()
    parts = read(s, t, "correlation", planes=planes)
    for sizes, geometry, grid, blocks in _plan(images, channels, pixels, parts.bands, parts.firsts, _CHANNELS["BLOCK"]):
        _channels[grid](parts.parts, planes, eps, *geometry, blocks, parts.length, total, images, **_CHANNELS)
        _rows[(images * len(sizes.indices),)](
            parts.parts, planes, rows, *geometry, integers(sizes.indices), parts.length, total, images, **_ROWS
        )  # fmt: skip
    return rows, planes


def correlation_backward(s: Sequence[Tensor], t: Sequence[Tensor], planes: Tensor, rows: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradient of the levels s, in their types and strides, from what `correlation` gave and the rows' gradient, (L, N) fp32."""
    return write(s, t, planes, (grad, rows), "correlation")


@remembered
def _plan(
    images: int, channels: tuple[int, ...], pixels: tuple[int, ...], bands: tuple[int, ...], firsts: tuple[int, ...], block: int
) -> tuple[tuple[Sizes, Geometry, tuple[int], tuple[int, ...]], ...]:
    """Levels of a launch, the geometry of both kernels, and the grid and the programs up to each level of the first."""
    found = []
    for sizes in launches(images, channels, pixels) if images else ():
        ends = tuple(accumulate(ceil_div(c, block) for c in sizes.channels))
        at = integers(bands[i] for i in sizes.indices), integers(sizes.channels), integers(sizes.pixels)
        geometry = (*at, offsets(firsts[i] for i in sizes.indices), offsets(place // images for place in sizes.channel_offsets))
        found.append((sizes, geometry, (ends[-1],), integers(ends)))
    return tuple(found)


@triton.jit
def _load(parts, first, count, c, C, P, bands, length, PARTS: tl.constexpr):
    """Of how many pixels some parts are, and their numbers, (PARTS, channels); 0 behind the last of `count`."""
    j = first + tl.arange(0, PARTS)
    there = (j < count)[:, None] & (c < C)[None, :]
    size = tl.where(j < count, tl.minimum(P - (j % bands) * length, length), 0).to(tl.float32)
    parts += (j.to(tl.int64) * (CORRELATION_NUMBERS * C))[:, None] + c[None, :]
    a, b = tl.load(parts, there, 0.0), tl.load(parts + C, there, 0.0)
    x, slope = tl.load(parts + 2 * C, there, 0.0), tl.load(parts + 3 * C, there, 0.0)
    return size[:, None], a, b, x, slope, tl.load(parts + 4 * C, there, 0.0)


@triton.jit(do_not_specialize=["length", "total", "images"])
def _channels(
    parts, planes, eps, bands, channels, pixels, firsts, places, ends, length, total, images,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is known of BLOCK channels of a level, from the parts of all images."""
    level, program = locate(ends)
    C, P, per_image = pick_integer(channels, level), pick_integer(pixels, level), pick_integer(bands, level)
    parts += pick_offset(firsts, level)
    c = program * BLOCK + tl.arange(0, BLOCK)
    count = images * per_image
    sum_s = tl.zeros([PARTS, BLOCK], tl.float32)
    sum_t = sum_s
    for first in range(0, count, PARTS):
        size, a, b, _, _, _ = _load(parts, first, count, c, C, P, per_image, length, PARTS)
        sum_s += size * a
        sum_t += size * b
    values = images.to(tl.float32) * P
    mean_s, mean_t = tl.sum(sum_s, 0) / values, tl.sum(sum_t, 0) / values
    of_s = tl.zeros([PARTS, BLOCK], tl.float32)
    of_both = of_s
    for first in range(0, count, PARTS):
        size, a, b, x, slope, _ = _load(parts, first, count, c, C, P, per_image, length, PARTS)
        s, t = a - mean_s[None, :], b - mean_t[None, :]
        of_s += x + size * s * s
        of_both += slope * x + size * s * t
    x, p = tl.sum(of_s, 0), tl.sum(of_both, 0)
    whole = tl.where(x > 0.0, tl.div_rn(p, x), 0.0)
    rests = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, count, PARTS):
        size, a, b, squares, slope, rest = _load(parts, first, count, c, C, P, per_image, length, PARTS)
        tilted, away = slope - whole[None, :], b - mean_t[None, :] - whole[None, :] * (a - mean_s[None, :])
        rests += rest + tilted * squares * tilted + size * away * away
    others = tl.maximum(values - 1.0, 1.0)
    a_s = tl.div_rn(1.0, tl.sqrt_rn(x / others) + tl.cast(eps, tl.float32))
    a_t = tl.div_rn(1.0, tl.sqrt_rn((tl.sum(rests, 0) + whole * p) / others) + tl.cast(eps, tl.float32))
    v = -a_s * a_t / (values * C)
    u = a_s * a_s * eps * (a_s - a_t * whole) / (values * C) - v * whole
    inside = c < C
    planes += pick_offset(places, level) + c
    width = tl.cast(total, tl.int64)
    # The first and the third are what the read pass took s and t from.
    tl.store(planes + width, u, inside)
    tl.store(planes + 3 * width, v, inside)
    tl.store(planes + 4 * width, -u * mean_s - v * mean_t, inside)
    tl.store(planes + 5 * width, a_s, inside)
    tl.store(planes + 6 * width, a_t, inside)
    tl.store(planes + 7 * width, mean_s, inside)
    tl.store(planes + 8 * width, mean_t, inside)


@triton.jit(do_not_specialize=["length", "total", "images"])
def _rows(
    parts, planes, rows, bands, channels, pixels, firsts, places, indices, length, total, images,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An image's row: its part of sum (z_s - z_t)^2 / (2 M C), of which one over all pixels would be V."""
    level = tl.program_id(0) // images
    n = (tl.program_id(0) % images).to(tl.int64)
    C, P, count = pick_integer(channels, level), pick_integer(pixels, level), pick_integer(bands, level)
    parts += pick_offset(firsts, level) + n * count * CORRELATION_NUMBERS * C
    planes += pick_offset(places, level)
    width = tl.cast(total, tl.int64)
    total_error = tl.zeros([PARTS, BLOCK], tl.float32)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        inside = c < C
        a_s = tl.load(planes + 5 * width + c, inside, 0.0)[None, :]
        a_t = tl.load(planes + 6 * width + c, inside, 0.0)[None, :]
        mean_s = tl.load(planes + 7 * width + c, inside, 0.0)[None, :]
        mean_t = tl.load(planes + 8 * width + c, inside, 0.0)[None, :]
        for first in range(0, count, PARTS):
            size, a, b, x, slope, rest = _load(parts, first, count, c, C, P, count, length, PARTS)
            along, away = a_s - a_t * slope, a_s * (a - mean_s) - a_t * (b - mean_t)
            total_error += along * x * along + a_t * rest * a_t + size * away * away
    values = 2.0 * images.to(tl.float32) * P * C
    tl.store(rows + pick_integer(indices, level) * images + n, tl.div_rn(tl.sum(tl.sum(total_error, 0), 0), values))
