"""`random_mask`: pixels set to 0 that Philox chooses, in one pass over a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
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
    remembered,
    sizes_of,
    types_of,
)


def random_mask(x: Sequence[Tensor], state: Tensor, threshold: int) -> list[Tensor]:
    """x with the pixels at 0 whose random word is below the threshold: see `kdkernels.reference.random_mask`. state: int64 (2,)."""
    images, channels, pixels = sizes_of(x)
    last = is_last(x)
    levels, written = dense(x, last), Written(x, last)
    constants = launch.parameters("random_mask", _heuristic, levels, last)
    for sizes, grid, vector, geometry in _plan(images, channels, pixels, types_of([levels]), last, constants["PIXELS"]):
        _kernel[grid](
            sizes.of(levels),
            sizes.of(written.levels),
            state,
            *geometry,
            offsets((threshold,)),
            LAST=last,
            VECTOR=vector,
            **constants,
        )
    return written.done()


def _heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """A band of pixels and so many of its channels at a time, 32 bytes or 64 a thread. Threads that share a pixel work out its word each
    for itself, so that rows of channels are read by few of them: 128 bytes at a time."""
    if last:
        return {"PIXELS": 64, "CHANNELS": 128 // dtype.itemsize, "num_warps": 8}
    return {"PIXELS": 256, "CHANNELS": 32 // dtype.itemsize, "num_warps": 4}


@remembered
def _plan(
    images: int, channels: tuple[int, ...], pixels: tuple[int, ...], types: tuple[Types, ...], last: bool, band: int
) -> tuple[tuple[Sizes, tuple[int], int, Geometry], ...]:
    """Of every launch the levels, the grid, the elements of 16 bytes, and ends, tiles, indices, channels and pixels."""
    found = []
    for sizes in alike(launches(images, channels, pixels), types) if images else ():
        tiles = tuple(ceil_div(p, band) for p in sizes.pixels)
        ends = sizes.programs(tiles)
        geometry = tuple(integers(values) for values in (ends, tiles, sizes.indices, sizes.channels, sizes.pixels))
        found.append((sizes, (ends[-1],), 16 // types[sizes.indices[0]][0].itemsize, geometry))
    return tuple(found)


@triton.jit
def _mask(x, out, keep, count, C, P, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """A band of `count` pixels of an image, of which x and out are the first one's; keep: (PIXELS,)"""
    pixel = tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    for start in range(0, C, CHANNELS):
        # In 32 bits, which spares registers: a band of pixels with all channels fits, as do so many channels of all pixels.
        if LAST:
            offset = pixel[:, None] * C + channel[None, :]
            inside = (pixel < count)[:, None] & (channel < C - start)[None, :]
            # What is masked is not even read.
            value = tl.load(x + offset, inside & keep[:, None], 0.0)
        else:
            offset = channel[:, None] * P + pixel[None, :]
            inside = (channel < C - start)[:, None] & (pixel < count)[None, :]
            value = tl.where(keep[None, :], tl.load(x + offset, inside, 0.0), 0.0)
        tl.store(out + offset, value.to(out.dtype.element_ty), inside)
        step = CHANNELS if LAST else CHANNELS * P
        x += step
        out += step


@triton.jit
def _kernel(
    xs, outs, state, ends, tiles, indices, channels, pixels, thresholds,
    LAST: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    level, program = locate(ends)
    bands = pick_integer(tiles, level)
    C = pick_integer(channels, level)
    P = pick_integer(pixels, level)
    n = program // bands
    first = (program % bands) * PIXELS
    p = first + tl.arange(0, PIXELS)
    nothing = tl.zeros([PIXELS], tl.int32)
    # The key is all of the seed; of the call the low word.
    word, _, _, _ = tl.philox(
        tl.load(state), p, nothing + n, nothing + pick_integer(indices, level), nothing + tl.load(state + 1).to(tl.int32)
    )  # fmt: skip
    keep = word.to(tl.int64) >= pick_offset(thresholds, 0)
    band = n.to(tl.int64) * C * P + first.to(tl.int64) * (C if LAST else 1)
    x = pick(xs, level)
    out = pick(outs, level)
    inner = C if LAST else P
    if inner % VECTOR == 0:
        # Written so that the compiler sees rows that begin on 16 bytes.
        inner = inner // VECTOR * VECTOR
        band = band // VECTOR * VECTOR
        if LAST:
            _mask(x + band, out + band, keep, P - first, inner, P, LAST, PIXELS, CHANNELS)
        else:
            _mask(x + band, out + band, keep, inner - first, C, inner, LAST, PIXELS, CHANNELS)
    else:
        # Element by element, each of which takes an address.
        _mask(x + band, out + band, keep, P - first, C, P, LAST, PIXELS, CHANNELS // 2)
