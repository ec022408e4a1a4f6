"""The read pass: every sum over channels and over pixels that a loss takes of a pyramid, from one read of it.

A program reads a band of an image: all channels of PIXELS pixels. In tiles (ROWS, PIECES, UNROLL, BLOCK) of the matrix (outer, inner) it
goes down the outer axis, UNROLL * ROWS rows at a time and all PIECES * BLOCK columns. The order of the tile's axes gives ROWS to the warps
and PIECES and UNROLL to the registers of each thread. Sums over the outer axis stay in registers until the end, sums over the inner one are
finished a tile at a time, by one warp where BLOCK is no longer than its vectors.
contiguous:    outer = channels, inner = the band's pixels: maps stay in registers.
channels_last: outer = the band's pixels, inner = all channels: channel sums do.
Channel sums of a band are partial; `channel_sums` adds the bands up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import MOST_PIXELS
from . import launch
from .channel_sums import ChannelParts, part_offsets
from .levels import (
    Geometry,
    Sizes,
    Types,
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
    sizes_of,
    types_of,
)

#: A channels_last row lies in the registers of one program. Where one is longer, the pyramid is copied to contiguous levels.
MOST_CHANNELS = 4096
#: Rows of a contiguous band that a program reads at a time.
MOST_ROWS = 128


class Sums(NamedTuple):
    """What was asked for, fp32 and 1-D: packed maps (N, H*W), and the channel sums of the bands."""

    raw: Tensor | None
    absolute: Tensor | None
    error: Tensor | None
    channel: ChannelParts | None


def reduce(
    x: Sequence[Tensor],
    *,
    target: Sequence[Tensor] | None = None,
    weights: Tensor | None = None,
    absolute: bool = False,
    channel: str = "none",
    spatial_abs: bool = False,
    error_channel: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> Sums:
    """Sums of the levels x (N, C, H, W), at least one level, from one read of x and target.

    raw (with weights):       sum_c weights * x, of |x| with `absolute`
    absolute (spatial_abs):   sum_c |x|
    error (with target):      sum_c error_channel * (x - target)^2; error_channel None is 1
    channel (abs, signed):    sums over a band's pixels of |x| or x, the latter times pixel_weights where there are any
    target: levels of x's shapes; weights, error_channel: packed (N, C), pixel_weights: packed (N, H*W), fp32.
    """
    images, channels, pixels = sizes_of(x)
    last = is_last(x, MOST_CHANNELS)
    levels, others = dense(x, last), [] if target is None else [dense(target, last)]
    plain_error = target is not None and weights is None and error_channel is None and channel == "none"
    constants = launch.parameters("reduce", _plain_error_heuristic if plain_error else heuristic, levels, last)
    read = [levels, *others]
    plan = _plan(images, channels, pixels, types_of(read), last, constants["PIXELS"], constants["PIECES"], constants["num_warps"])

    def maps(wanted: bool) -> Tensor | None:
        return torch.empty(plan.pixels, dtype=torch.float32, device=x[0].device) if wanted else None

    raw, absolutes, error = maps(weights is not None), maps(spatial_abs), maps(target is not None)
    parts = None if channel == "none" else torch.empty(plan.parts, dtype=torch.float32, device=x[0].device)
    for sizes, grid, rows, block, geometry in plan.launches:
        if not last and rows * constants["UNROLL"] > MOST_ROWS:
            raise ValueError(f"launch parameters {constants} read {rows * constants['UNROLL']} rows at a time, more than {MOST_ROWS}")
        _reduce[grid](
            sizes.of(levels),
            sizes.of(others[0]) if others else None,
            weights,
            error_channel,
            pixel_weights,
            raw,
            absolutes,
            error,
            parts,
            *geometry,
            LAST=last,
            ABSOLUTE=absolute,
            CHANNEL=channel,
            VECTOR=plan.vector,
            BLOCK=block,
            ROWS=rows,
            **constants,
        )
    return Sums(raw, absolutes, error, None if parts is None else ChannelParts(parts, plan.tiles))


def heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """A warp reads a row of a contiguous band; every thread has 4 loads of 16 bytes under way, in fewer than 128 registers."""
    if dtype.itemsize == 4:
        return {"PIXELS": 256, "PIECES": 2, "UNROLL": 2, "num_warps": 8}
    return {"PIXELS": 256, "PIECES": 1, "UNROLL": 4, "num_warps": 8}


def _plain_error_heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """Half the rows: there are two pyramids, and the compiler keeps so short a loop to 64 registers, beyond which it spilled."""
    usual = heuristic(dtype, last)
    return {**usual, "UNROLL": usual["UNROLL"] // 2}


class _Launch(NamedTuple):
    sizes: Sizes
    grid: tuple[int]
    rows: int
    block: int
    geometry: Geometry


class _Plan(NamedTuple):
    """What a read pass does about these sizes. pixels, parts: elements of a packed map and of the bands' sums; tiles: bands, a level."""

    pixels: int
    parts: int
    tiles: tuple[int, ...]
    vector: int
    launches: tuple[_Launch, ...]


@remembered
def _plan(
    images: int,
    channels: tuple[int, ...],
    pixels: tuple[int, ...],
    types: tuple[Types, ...],
    last: bool,
    band: int,
    pieces: int,
    warps: int,
) -> _Plan:
    """Channels_last levels of very different channels are launched apart: a program as wide as the widest would idle in the others.

    Raises ValueError for a contiguous map of `MOST_PIXELS` or more.
    """
    if not last and max(pixels) >= MOST_PIXELS:
        raise ValueError(f"a map of {max(pixels)} pixels, where the read pass takes fewer than {MOST_PIXELS} of a contiguous level")
    tiles = tuple(ceil_div(p, band) for p in pixels)
    first_parts = part_offsets(images, channels, tiles)
    vector = 16 // min(dtype.itemsize for level in types for dtype in level)
    found = []
    for one in alike(launches(images, channels, pixels), types) if images else ():
        widths = [max(64, power_of_2(c)) if last else band for c in one.channels]
        for width in sorted(set(widths), reverse=True):
            sizes = one.only([k for k, w in enumerate(widths) if w == width])
            bands = tuple(tiles[i] for i in sizes.indices)
            ends = sizes.programs(bands)
            geometry = (
                *(integers(values) for values in (ends, bands, sizes.channels, sizes.pixels)),
                *(offsets(values) for values in (sizes.channel_offsets, sizes.pixel_offsets, (first_parts[i] for i in sizes.indices))),
            )
            block = width // pieces
            found.append(_Launch(sizes, (ends[-1],), max(1, 32 * warps * vector // block), block, geometry))
    return _Plan(images * sum(pixels), first_parts[-1], tiles, vector, tuple(found))


@triton.jit
def _reduce(
    xs,
    targets,
    weights,
    error_weights,
    pixel_weights,
    raw,
    absolute,
    error,
    parts,
    ends,
    tiles,
    channels,
    pixels,
    channel_offsets,
    pixel_offsets,
    part_offsets,
    LAST: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    CHANNEL: tl.constexpr,
    VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, program = locate(ends)
    bands = pick_integer(tiles, level)
    C = pick_integer(channels, level)
    P = pick_integer(pixels, level)
    n = (program // bands).to(tl.int64)
    band = program % bands
    x = pick(xs, level)
    target = None if targets is None else pick(targets, level)
    first = band * PIXELS
    channel = pick_offset(channel_offsets, level) + n * C
    pixel = pick_offset(pixel_offsets, level) + n * P
    part = pick_offset(part_offsets, level) + program.to(tl.int64) * C
    inner = C if LAST else P
    if inner % VECTOR == 0:
        # Written so that the compiler sees it is a multiple, and that rows begin on 16 bytes.
        inner = (inner // VECTOR) * VECTOR
        _read(
            x, target, weights, error_weights, pixel_weights, raw, absolute, error, parts, n, first, channel, pixel, part,
            C, P, inner, LAST, ABSOLUTE, CHANNEL, PIXELS, PIECES, UNROLL, ROWS, BLOCK,
        )  # fmt: skip
    else:
        # Element by element, neighbours to neighbouring threads. Fewer rows at a time: every element takes an address.
        _read(
            x, target, weights, error_weights, pixel_weights, raw, absolute, error, parts, n, first, channel, pixel, part,
            C, P, inner, LAST, ABSOLUTE, CHANNEL, PIXELS, PIECES * VECTOR, 1, ROWS, BLOCK // VECTOR,
        )  # fmt: skip


@triton.jit
def _read(
    x,
    target,
    weights,
    error_weights,
    pixel_weights,
    raw,
    absolute,
    error,
    parts,
    n,
    first,
    channel,
    pixel,
    part,
    C,
    P,
    inner,
    LAST: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    CHANNEL: tl.constexpr,
    PIXELS: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One band, from pixel `first` of image n on. channel, pixel, part: where the image's vectors and maps and the band's sums begin."""
    STEP: tl.constexpr = UNROLL * ROWS
    row = tl.arange(0, ROWS)[:, None] + tl.arange(0, UNROLL)[None, :] * ROWS
    column = tl.arange(0, PIECES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if LAST:
        outer = min(P - first, PIXELS)
        start = (n * P + first) * inner
        pixel += first
    else:
        outer = C
        column += first
        start = n * C * inner
    inside = column < inner
    # In 32 bits, which spares registers: `MOST_ROWS` rows of `MOST_PIXELS` fit.
    offset = row[:, None, :, None] * inner + column[None, :, None, :]
    x += start
    if target is not None:
        target += start
    if LAST and weights is not None:
        column_weights = tl.load(weights + channel + column, inside, 0.0)[None, :, None, :]
    if LAST and error_weights is not None:
        column_error_weights = tl.load(error_weights + channel + column, inside, 0.0)[None, :, None, :]
    if not LAST and pixel_weights is not None:
        column_pixel_weights = tl.load(pixel_weights + pixel + column, inside, 0.0)[None, :, None, :]
    raw_sum = tl.zeros([ROWS, PIECES, BLOCK], tl.float32)
    absolute_sum = tl.zeros([ROWS, PIECES, BLOCK], tl.float32)
    error_sum = tl.zeros([ROWS, PIECES, BLOCK], tl.float32)
    channel_sum = tl.zeros([ROWS, PIECES, BLOCK], tl.float32)
    for done in range(0, outer, STEP):
        rows = done + row
        below = rows < outer
        mask = below[:, None, :, None] & inside[None, :, None, :]
        s = tl.load(x + offset, mask, 0.0).to(tl.float32)
        x += STEP * inner
        if target is not None:
            d = s - tl.load(target + offset, mask, 0.0).to(tl.float32)
            target += STEP * inner
            squared = d * d
            if error_weights is not None:
                if LAST:
                    squared *= column_error_weights
                else:
                    squared *= tl.load(error_weights + channel + rows, below, 0.0)[:, None, :, None]
            error_sum = _add(squared, error_sum, error, pixel + rows, below, LAST)
        if raw is not None:
            value = tl.abs(s) if ABSOLUTE else s
            if LAST:
                value *= column_weights
            else:
                value *= tl.load(weights + channel + rows, below, 0.0)[:, None, :, None]
            raw_sum = _add(value, raw_sum, raw, pixel + rows, below, LAST)
        if absolute is not None:
            absolute_sum = _add(tl.abs(s), absolute_sum, absolute, pixel + rows, below, LAST)
        if parts is not None:
            value = tl.abs(s) if CHANNEL == "abs" else s
            if pixel_weights is not None:
                if LAST:
                    value *= tl.load(pixel_weights + pixel + rows, below, 0.0)[:, None, :, None]
                else:
                    value *= column_pixel_weights
            channel_sum = _add(value, channel_sum, parts, part + rows, below, not LAST)
    if LAST:
        if parts is not None:
            tl.store(parts + part + column, tl.sum(channel_sum, 0), inside)
    else:
        if raw is not None:
            tl.store(raw + pixel + column, tl.sum(raw_sum, 0), inside)
        if absolute is not None:
            tl.store(absolute + pixel + column, tl.sum(absolute_sum, 0), inside)
        if error is not None:
            tl.store(error + pixel + column, tl.sum(error_sum, 0), inside)


@triton.jit
def _add(term, total, out, at, mask, ACROSS: tl.constexpr):
    """A tile (ROWS, PIECES, UNROLL, BLOCK) added to the sums down its columns, or its sums across the rows stored at out + at."""
    if ACROSS:
        tl.store(out + at, tl.sum(tl.sum(term, 1), 2), mask)
        return total
    else:
        return total + tl.sum(term, 2)
