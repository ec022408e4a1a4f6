"""The kernel of `logit_bce` and `logit_kl`: what two networks' logits differ by, from one read of both, and its gradient, from another.

A level's image is taken in tiles (LINES, BINS). A line is the channels of a pixel, or one block of them where blocks are distributions of
their own; it lies along memory in a channels_last level, across it in a contiguous one, whose lines lie beside each other. A distribution
is in one tile. Tiles leave their sums; these are added up in a fixed order.

With e = exp(-|x|), sigma(|x|) = 1 / (1 + e) and sigma(-|x|) = e / (1 + e). Differences of what is nearly equal, sigmas or distributions,
come from the difference of the logits, so that they keep their digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logits import MOST_BINS
from . import launch
from .gradient import sum_parts
from .levels import (
    Geometry,
    Sizes,
    Types,
    Written,
    alike,
    ceil_div,
    dense,
    integers,
    is_last,
    launches,
    locate,
    offsets,
    pick,
    pick_integer,
    pick_offset,
    power_of_2,
    remembered,
    sign,
    sizes_of,
    types_of,
)
from .series import log_1_plus, second_order

#: The exponents of |sigma(s) - sigma(t)| that are multiplications.
POWERS = (0.0, 1.0, 2.0)


class Difference(NamedTuple):
    """kind: "bce" or "kl";   option: the exponent beta or the temperature;   groups: distributions of a pixel"""

    kind: str
    option: float
    groups: int = 1


def rows(s: Sequence[Tensor], t: Sequence[Tensor], weight: Tensor | None, of: Difference) -> Tensor:
    """(L, N) fp32. s, t: levels (N, K, H, W), at least one; weight: packed maps (N, H, W), fp32, or None."""
    images, _, _ = sizes_of(s)
    values = torch.empty(len(s), images, dtype=torch.float32, device=s[0].device)
    for one in _launches(s, t, weight, of):
        parts = torch.empty(one.grid, dtype=torch.float32, device=s[0].device)
        _kernel[one.grid](*one.read, None, None, parts, *one.arguments, **one.constants)
        sum_parts[(images * len(one.sizes.indices),)](parts, values, images, *one.left, BLOCK=1024)
    return values


def gradient(grad: Tensor, s: Sequence[Tensor], t: Sequence[Tensor], weight: Tensor | None, of: Difference) -> list[Tensor]:
    """Of s, in its types and strides, from that of the rows: grad (L, N), fp32, contiguous."""
    written = Written(s, is_last(s))
    for one in _launches(s, t, weight, of):
        _kernel[one.grid](*one.read, one.sizes.of(written.levels), grad, None, *one.arguments, **one.constants)
    return written.done()


def heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """A vector of 16 bytes of each network a thread: the arithmetic takes the registers. In a contiguous level lines that fill cache lines.

    BINS: the most of a tile, but for distributions.
    """
    return {"TILE": 512 if dtype.itemsize == 4 else 1024, "BINS": 256 if last else 8, "num_warps": 4}


class _Launch(NamedTuple):
    """read: the pointers of what is read;   left: where `sum_parts` finds what tiles left"""

    sizes: Sizes
    grid: tuple[int]
    read: tuple[tuple[Tensor, ...] | Tensor | None, ...]
    left: Geometry
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def _launches(s: Sequence[Tensor], t: Sequence[Tensor], weight: Tensor | None, of: Difference) -> list[_Launch]:
    """Raises ValueError for a distribution of more than `MOST_BINS` bins."""
    images, channels, pixels = sizes_of(s)
    if images == 0:
        return []
    last = is_last(s)
    own, other = dense(s, last), dense(t, last)
    constants = launch.parameters("logits", heuristic, s, last)
    tile, bins = constants.pop("TILE"), constants.pop("BINS")
    power = int(of.option) if of.kind == "bce" and of.option in POWERS else -1
    found = []
    for sizes, grid, lines, width, vector, geometry, left in _plan(
        images, channels, pixels, types_of((own, other)), last, of.groups, tile, MOST_BINS if of.kind == "kl" else bins
    ):
        if of.kind == "kl" and width < max(sizes.channels) // of.groups:
            raise ValueError(f"a distribution of {max(sizes.channels) // of.groups} bins, where the kernel takes {MOST_BINS}")
        meta = {"LAST": last, "KIND": of.kind, "POWER": power, "GROUPS": of.groups, "VECTOR": vector, "LINES": lines, "BINS": width}
        read = sizes.of(own), sizes.of(other), weight
        found.append(_Launch(sizes, grid, read, left, (*geometry, of.option), {**meta, **constants}))
    return found


@remembered
def _plan(
    images: int,
    channels: tuple[int, ...],
    pixels: tuple[int, ...],
    types: tuple[Types, ...],
    last: bool,
    groups: int,
    tile: int,
    most_bins: int,
) -> tuple[tuple[Sizes, tuple[int], int, int, int, Geometry, Geometry], ...]:
    """Levels, grid, lines and bins of a tile, elements of 16 bytes, and where what is, of every launch."""
    found = []
    for sizes in alike(launches(images, channels, pixels), types):
        vector = 16 // min(dtype.itemsize for dtype in types[sizes.indices[0]])
        width = min(most_bins, power_of_2(max(sizes.channels) // groups))
        lines = max(1, tile // width)
        tiles = []
        for c, p in zip(sizes.channels, sizes.pixels, strict=True):
            across = ceil_div(p * groups, lines) if last else groups * ceil_div(p, lines)
            tiles.append(across * ceil_div(c // groups, width))
        ends = integers(sizes.programs(tiles))
        geometry = (
            *(ends, integers(tiles), integers(sizes.channels), integers(sizes.pixels), offsets(sizes.pixel_offsets)),
            offsets(index * images for index in sizes.indices),
        )
        grid = (sizes.programs(tiles)[-1],)
        found.append((sizes, grid, lines, width, vector, geometry, (integers(sizes.indices), ends, integers(tiles))))
    return tuple(found)


@triton.jit
def _cross_entropy(s, t, beta, POWER: tl.constexpr):
    """|d|^beta * BCE(s, sigma(t)) with d = sigma(s) - sigma(t), and its derivative. POWER: beta where that is 0, 1 or 2, else -1"""
    e_s = tl.exp(-tl.abs(s))
    e_t = tl.exp(-tl.abs(t))
    p_s = 1.0 / (1.0 + e_s)
    p_t = 1.0 / (1.0 + e_t)
    q_s = e_s * p_s
    q_t = e_t * p_t
    above = s > 0
    same = above == (t > 0)
    error = log_1_plus(e_s) + tl.abs(s) * tl.where(same, q_t, p_t)
    x = s - t
    apart = tl.where(same, tl.where(above, q_t - q_s, q_s - q_t), tl.where(above, p_s - q_t, q_s - p_t))
    # sigma(s) * sigma(-t) * (1 - exp(-x)) for x > 0, and the same with both exchanged.
    high = tl.where(above, p_s, q_s) * tl.where(t > 0, q_t, p_t)
    low = tl.where(above, q_s, p_s) * tl.where(t > 0, p_t, q_t)
    step = tl.abs(x)
    near = tl.where(x > 0, high, -low) * (step - second_order(step))
    d = tl.where(step < 0.5, near, apart)
    if POWER == 0:
        return error, d
    # Of sigma(s), times the loss.
    rise = p_s * q_s * error
    if POWER == 1:
        return tl.abs(d) * error, tl.abs(d) * d + sign(d) * rise
    elif POWER == 2:
        return d * d * error, d * (d * d + 2.0 * rise)
    else:
        a = tl.abs(d)
        none = a == 0
        power = tl.where(none, 0.0, tl.exp((beta - 1.0) * tl.log(tl.where(none, 1.0, a))))
        return power * a * error, power * (a * d + beta * sign(d) * rise)


@triton.jit
def _exponentials(x, scale, below):
    """x less the largest of its line, exp of that times scale, and the sum of those."""
    x -= tl.max(tl.where(below, x, float("-inf")), 1)[:, None]
    e = tl.where(below, tl.exp(x * scale), 0.0)
    return x, e, tl.sum(e, 1)[:, None]


@triton.jit
def _divergence(s, t, temperature, below):
    """q * (log q - log p) + p - q of each bin, whose sum is the line's divergence, and the derivative (p - q) / temperature."""
    scale = 1.0 / temperature
    x, e_s, sum_s = _exponentials(s, scale, below)
    y, e_t, sum_t = _exponentials(t, scale, below)
    p = e_s / sum_s
    q = e_t / sum_t
    # A bin that the teacher rules out adds p alone, also where its logit is -inf.
    out = q == 0
    r = tl.where(out, 0.0, (y - x) * scale - (tl.log(sum_t) - tl.log(sum_s)))
    # Of distributions that differ little nothing is left but second-order terms.
    second = second_order(r)
    near = (tl.abs(r) < 0.5) & (q > 0)
    return tl.where(near, q * second, p - q + q * r), tl.where(near, q * (second - r), p - q) * scale


@triton.jit
def _tile(
    s, t, weights, out, scale, tile, C, P, inner, option,
    LAST: tl.constexpr, KIND: tl.constexpr, POWER: tl.constexpr, GROUPS: tl.constexpr, LINES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one tile, or returns its sum. s, t, weights, out: of its image;   inner: channels of a line, or the pixels"""
    line = tl.arange(0, LINES)
    bins = tl.arange(0, BINS)
    if LAST:
        lines = P * GROUPS
        chunks = tl.cdiv(inner, BINS)
        first = (tile // chunks) * LINES
        bin = (tile % chunks) * BINS
        start = first.to(tl.int64) * inner + bin
        below = bin + bins < inner
        at = line[:, None] * inner + bins[None, :]
        pixel = (first + line) // GROUPS
    else:
        lines = P
        length = C // GROUPS
        chunks = tl.cdiv(length, BINS)
        across = tl.cdiv(P, LINES)
        row = tile // across
        first = (tile % across) * LINES
        bin = (row % chunks) * BINS
        start = ((row // chunks) * length + bin).to(tl.int64) * inner + first
        below = bin + bins < length
        at = line[:, None] + bins.to(tl.int64)[None, :] * inner
        pixel = first + line
    inside = first + line < lines
    mask = inside[:, None] & below[None, :]
    a = tl.load(s + start + at, mask, 0.0).to(tl.float32)
    b = tl.load(t + start + at, mask, 0.0).to(tl.float32)
    if KIND == "bce":
        value, slope = _cross_entropy(a, b, option, POWER)
    else:
        value, slope = _divergence(a, b, option, below[None, :])
    if out is None:
        of_line = tl.sum(tl.where(mask, value, 0.0), 1)
        if weights is not None:
            of_line *= tl.load(weights + pixel, inside, 0.0)
        return tl.sum(of_line, 0)
    else:
        if weights is not None:
            slope *= tl.load(weights + pixel, inside, 0.0)[:, None]
        tl.store(out + start + at, (slope * scale).to(out.dtype.element_ty), mask)
        return scale


@triton.jit
def _kernel(
    ss, ts, weights, outs, grad, parts, ends, tiles, channels, pixels, pixel_offsets, row_offsets, option,
    LAST: tl.constexpr, KIND: tl.constexpr, POWER: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    LINES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile a program where there is `outs`, else its sum to `parts`."""
    level, program = locate(ends)
    count = pick_integer(tiles, level)
    C = pick_integer(channels, level)
    P = pick_integer(pixels, level)
    n = (program // count).to(tl.int64)
    s = pick(ss, level) + n * C * P
    t = pick(ts, level) + n * C * P
    weight = None if weights is None else weights + pick_offset(pixel_offsets, level) + n * P
    out = None if outs is None else pick(outs, level) + n * C * P
    scale = 1.0 if grad is None else tl.load(grad + pick_offset(row_offsets, level) + n)
    option = tl.cast(option, tl.float32)
    inner = C // GROUPS if LAST else P
    if inner % VECTOR == 0:
        # Written so that the compiler sees it is a multiple, and that lines begin on 16 bytes.
        inner = inner // VECTOR * VECTOR
        part = _tile(s, t, weight, out, scale, program % count, C, P, inner, option, LAST, KIND, POWER, GROUPS, LINES, BINS)
    else:
        part = _tile(s, t, weight, out, scale, program % count, C, P, inner, option, LAST, KIND, POWER, GROUPS, LINES, BINS)
    if parts is not None:
        tl.store(parts + tl.program_id(0), part)
