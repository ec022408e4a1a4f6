"""The read pass of `channel_kl` and `correlation`: both pyramids read once.

A program leaves some numbers of each channel of its band, its part. They are relative to what is near the values, so that large ones cost
no digits; programs of a second, small launch bring an image's bands together.
A part of `channel_kl` (KL) has, with k = 1 / temperature and e_t = exp((t - m_t) k),
    [0] [1]  m_s, the largest value of s, and z_s = sum exp((s - m_s) k)      [2] [3]  m_t and z_t of t
    [4]      sum e_t d with d = (t - m_t) k - (s - m_s) k, for the cross-entropy with d = (m_s - s) k
    [5]      for KL sum e_t (exp(-d) - 1 + d), in which near distributions keep their digits
and one of `correlation`, of s and t less their values at the level's first pixel of the channel,
    [0] [1]  means a and b      [2]  X = sum (s - a)^2      [3]  the slope of t by s, sum (s - a) (t - b) / X
    [4]      what it leaves of t, sum (t - b - slope (s - a))^2
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compared import across, down, fitted_blocks, heuristic, launch_plan, locate_band, tile_offsets
from .levels import ceil_div, dense, is_last, offsets, pick, pick_offset, sizes_of, types_of
from .series import second_order

#: Numbers of a part.
KL_NUMBERS, CROSS_ENTROPY_NUMBERS, CORRELATION_NUMBERS = tl.constexpr(6), tl.constexpr(5), tl.constexpr(5)
NUMBERS = {"kl": KL_NUMBERS.value, "cross_entropy": CROSS_ENTROPY_NUMBERS.value, "correlation": CORRELATION_NUMBERS.value}
#: The largest value of no pixels: finite, so that values of -inf are smaller and differ from it by no NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


class Parts(NamedTuple):
    """What the read pass leaves. parts: level after level (N, bands, numbers, C); bands, firsts: a level; length: pixels of a band"""

    parts: Tensor
    bands: tuple[int, ...]
    firsts: tuple[int, ...]
    length: int


def read(s: Sequence[Tensor], t: Sequence[Tensor], kind: str, inverse_temperature: float = 1.0, planes: Tensor | None = None) -> Parts:
    """The parts of the levels s and t, at least one.

    kind: kl | cross_entropy | correlation;   planes: of the correlation, of which the first and the third are filled: what its s and t are
    less
    """
    images, channels, pixels = sizes_of(s)
    last = is_last(s)
    levels, others = dense(s, last), dense(t, last)
    blocks = fitted_blocks(launch.parameters("compared_read", heuristic, levels, last), channels, pixels, last)
    length = blocks["PIXELS"] * blocks["STEPS"]
    count = NUMBERS[kind]
    bands = tuple(ceil_div(p, length) for p in pixels)
    firsts = tuple(accumulate((images * b * c * count for b, c in zip(bands, channels, strict=True)), initial=0))
    parts = s[0].new_empty(firsts[-1], dtype=torch.float32)
    for one in launch_plan(images, channels, pixels, types_of([levels, others]), last, blocks["CHANNELS"], length):
        _read[one.grid](
            one.sizes.of(levels),
            one.sizes.of(others),
            parts,
            planes,
            inverse_temperature,
            *one.geometry,
            offsets(firsts[i] for i in one.sizes.indices),
            offsets(place // images for place in one.sizes.channel_offsets),
            sum(channels),
            KIND=kind,
            COUNT=count,
            LAST=last,
            # A thread keeps its channels' numbers: of channels in a row no more than four.
            VECTOR=min(one.vector, 4) if last else one.vector,
            **blocks,
        )
    return Parts(parts, bands, firsts, length)


@triton.jit
def raised(z_s, z_t, a, b, s, t, KIND: tl.constexpr):
    """The sums of a part of `channel_kl`, [1] [3] [4] [5], less larger values: exponents fall by -s and -t."""
    e = tl.exp(t)
    # What differences grow by.
    more = tl.where(z_t == 0.0, 0.0, t - s if KIND == "kl" else -s)
    y_s, y_t, grown, second = z_s * tl.exp(s), z_t * e, e * (a + z_t * more), b
    if KIND == "kl":
        near = (z_t - a + b) * second_order(more) + a * more + b * (1.0 - more)
        second = tl.where((tl.abs(more) < 0.5) & (z_t > 0.0), e * near, y_s - y_t + grown)
    return y_s, y_t, grown, second


@triton.jit
def _joined(found, other, k, KIND: tl.constexpr):
    """The part of two sets of pixels of `channel_kl` together, from that of each."""
    m_s, z_s, m_t, z_t, a, b = found
    n_s, y_s, n_t, y_t, c, d = other
    top_s = tl.maximum(m_s, n_s)
    top_t = tl.maximum(m_t, n_t)
    z_s, z_t, a, b = raised(z_s, z_t, a, b, (m_s - top_s) * k, (m_t - top_t) * k, KIND)
    y_s, y_t, c, d = raised(y_s, y_t, c, d, (n_s - top_s) * k, (n_t - top_t) * k, KIND)
    return top_s, z_s + y_s, top_t, z_t + y_t, a + c, b + d


@triton.jit
def _divergence(s, t, mask, k, KIND: tl.constexpr, LAST: tl.constexpr, AXIS: tl.constexpr):
    """The part of a tile of `channel_kl`."""
    m_s = tl.maximum(tl.max(tl.where(mask, s, LOWEST), AXIS), LOWEST)
    m_t = tl.maximum(tl.max(tl.where(mask, t, LOWEST), AXIS), LOWEST)
    from_s = tl.where(mask, s - across(m_s, LAST), 0.0)
    from_t = tl.where(mask, t - across(m_t, LAST), 0.0)
    e_s = tl.where(mask, tl.exp(from_s * k), 0.0)
    e_t = tl.where(mask, tl.exp(from_t * k), 0.0)
    d = (from_t - from_s if KIND == "kl" else -from_s) * k
    second = e_t * second_order(d)
    if KIND == "kl":
        second = tl.where((tl.abs(d) < 0.5) & (e_t > 0.0), second, e_s - e_t + e_t * d)
    return m_s, tl.sum(e_s, AXIS), m_t, tl.sum(e_t, AXIS), tl.sum(e_t * d, AXIS), tl.sum(second, AXIS)


@triton.jit
def _slope(of_s, of_both):
    return tl.where(of_s > 0.0, of_both / of_s, 0.0)


@triton.jit
def _moments(s, t, mask, count, LAST: tl.constexpr, AXIS: tl.constexpr):
    """The part of a tile of `correlation` of so many pixels."""
    a = tl.sum(tl.where(mask, s, 0.0), AXIS) / count
    b = tl.sum(tl.where(mask, t, 0.0), AXIS) / count
    x = tl.where(mask, s - across(a, LAST), 0.0)
    y = tl.where(mask, t - across(b, LAST), 0.0)
    of_s = tl.sum(x * x, AXIS)
    slope = _slope(of_s, tl.sum(x * y, AXIS))
    rest = y - across(slope, LAST) * x
    return a, b, of_s, slope, tl.sum(rest * rest, AXIS)


@triton.jit
def _together(found, before, other, count):
    """The part of `before` and of `count` pixels of `correlation` together, from that of each."""
    a, b, of_s, slope, rest = found
    a2, b2, of_s2, slope2, rest2 = other
    s, t = a2 - a, b2 - b
    share = count / (before + count)
    weight = before * share
    squares = of_s + of_s2 + s * s * weight
    whole = _slope(squares, slope * of_s + slope2 * of_s2 + s * t * weight)
    first, second, between = slope - whole, slope2 - whole, t - whole * s
    rest += rest2 + first * of_s * first + second * of_s2 * second + between * between * weight
    return a + s * share, b + t * share, squares, whole, rest


@triton.jit(do_not_specialize=["total"])
def _read(
    s,
    t,
    parts,
    planes,
    inverse_temperature,
    ends,
    bands,
    channels,
    pixels,
    firsts,
    places,
    total,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    level, n, c, band, first, count, C, P = locate_band(ends, bands, channels, pixels, CHANNELS, PIXELS * STEPS)
    s = pick(s, level)
    t = pick(t, level)
    to = parts + pick_offset(firsts, level) + (n * count + band) * COUNT * C
    k = tl.cast(inverse_temperature, tl.float32)
    if planes is not None:
        planes += pick_offset(places, level)
    inner = C if LAST else P
    if inner % VECTOR == 0:
        # Written so that the compiler sees it is a multiple, and that rows begin on 16 bytes.
        inner = inner // VECTOR * VECTOR
        _read_band(s, t, to, planes, total, n, c, first, k, C, P, inner, KIND, COUNT, LAST, PIXELS, STEPS)
    else:
        _read_band(s, t, to, planes, total, n, c, first, k, C, P, inner, KIND, COUNT, LAST, PIXELS, STEPS)


@triton.jit
def _pixel(c, p, inner, LAST: tl.constexpr):
    """Where the elements of one pixel lie within an image."""
    if LAST:
        return tl.cast(p, tl.int64) * inner + c
    else:
        return c.to(tl.int64) * inner + p


@triton.jit
def _read_band(
    s, t, to, planes, total, n, c, first, k, C, P, inner,
    KIND: tl.constexpr, COUNT: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = 0 if LAST else 1
    # A row's length is known to be a multiple where it is one.
    C, P = (inner, P) if LAST else (C, inner)
    below = c < C
    none = tl.zeros(c.shape, tl.float32)
    image = n * C * P
    lowest = none + LOWEST
    found = (none, none, none, none, none) if KIND == "correlation" else (lowest, none, lowest, none, none, none)
    if KIND == "correlation":
        # Values are taken less the channel's first of the level.
        at = _pixel(c, 0, inner, LAST)
        s_0 = tl.load(s + at, below, 0.0).to(tl.float32)
        t_0 = tl.load(t + at, below, 0.0).to(tl.float32)
        alone = below & (n == 0) & (first == 0)
        tl.store(planes + c, s_0, alone)
        tl.store(planes + 2 * tl.cast(total, tl.int64) + c, t_0, alone)
    for begin in range(first, min(first + STEPS * PIXELS, P), PIXELS):
        p = begin + tl.arange(0, PIXELS)
        offset = image + tile_offsets(c, p, inner, LAST)
        # Channels behind the last one are computed as zeros.
        here = down(p < P, LAST)
        inside = here & across(below, LAST)
        x = tl.load(s + offset, inside, 0.0).to(tl.float32)
        y = tl.load(t + offset, inside, 0.0).to(tl.float32)
        if KIND == "correlation":
            new = tl.minimum(P - begin, PIXELS).to(tl.float32)
            part = _moments(x - across(s_0, LAST), y - across(t_0, LAST), here, new, LAST, AXIS)
            found = _together(found, (begin - first).to(tl.float32), part, new)
        else:
            found = _joined(found, _divergence(x, y, here, k, KIND, LAST, AXIS), k, KIND)
    for i in tl.static_range(COUNT):
        tl.store(to + i * C + c, found[i], below)
