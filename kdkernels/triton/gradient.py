"""The write pass: a pyramid's gradient, from vectors per channel and per pixel and one more read of the pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import parameters
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

#: Packed fp32 vectors (N, C) and maps (N, H*W); None for the neutral value.
ChannelAndPixel = tuple[Tensor | None, Tensor | None]


def gradient(
    x: Sequence[Tensor],
    *,
    target: Sequence[Tensor] | None = None,
    arriving: Sequence[Tensor] | None = None,
    product: ChannelAndPixel | None = None,
    sign: ChannelAndPixel | None = None,
    error: ChannelAndPixel | None = None,
    absolute: bool = False,
    values: Tensor | None = None,
    out: list[Tensor] | None = None,
    unless: Tensor | None = None,
) -> list[Tensor]:
    """dx = product_c * product_p * (sgn(x) if absolute else 1) + sgn(x) * (sign_c + sign_p) + error_c * error_p * (x - target) + arriving.

    x: at least one level (N, C, H, W), fp32, fp16 or bf16; target (needed by error) and arriving: the same shapes, types of their own.
    A pair that is None contributes nothing; in a pair None is 1, in that of sign 0. The factor 2 of a squared error is the caller's.
    Returns levels of x's type and strides, computed in fp32 and rounded once.

    values: (L, N) fp32, contiguous, filled with sum_{c,p} error_c * error_p * (x - target)^2 / 2, of which the error's part is the gradient
    out:    levels to write to, of such strides, instead of new ones;   unless: one int32 on the device: not 0 if `out` is right already
    """
    reads = sign is not None or error is not None or (product is not None and absolute)
    last = is_last(x)
    wanted = (x if reads else None, target if error is not None else None, arriving)
    read = [None if levels is None else dense(levels, last) for levels in wanted]
    written = Written(x, last, out)
    images, channels, pixels = sizes_of(x)
    if images == 0:
        return written.results
    vectors, places = _placed([pair[::-1] if pair and last else pair for pair in (product, sign, error)])
    blocks = _fitted(parameters("gradient", heuristic, x, last), max(channels if last else pixels))
    types = types_of([x, *(levels for levels in read if levels is not None)])
    plan = _plan(images, channels, pixels, types, last, *(blocks[name] for name in _BLOCKS))
    for sizes, grid, vector, geometry, left in plan:
        parts = None if values is None else torch.empty(grid, dtype=torch.float32, device=x[0].device)
        _kernel[grid](
            *(None if levels is None else sizes.of(levels) for levels in read),
            sizes.of(written.levels),
            vectors,
            parts,
            unless,
            *geometry,
            PLACES=places,
            ABSOLUTE=absolute,
            VECTOR=vector,
            **blocks,
        )
        if parts is not None:
            sum_parts[(images * len(sizes.indices),)](parts, values, images, *left, BLOCK=1024)
    return written.done()


def heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """Two vectors of 16 bytes a thread in a tile, one where factors are gathered: fewer than 128 registers, factors and all."""
    if dtype.itemsize == 4:
        return {"BLOCK_OUTER": 4, "BLOCK_INNER": 256, "STEPS": 8, "BLOCK_FLAT": 512, "num_warps": 4}
    return {"BLOCK_OUTER": 8, "BLOCK_INNER": 256, "STEPS": 4, "BLOCK_FLAT": 1024, "num_warps": 4}


#: The parameters that decide about the number of programs.
_BLOCKS = ("BLOCK_OUTER", "BLOCK_INNER", "STEPS", "BLOCK_FLAT")


def _fitted(blocks: dict[str, int], widest: int) -> dict[str, int]:
    """Tiles of as many elements, no wider than the widest level needs."""
    width = min(blocks["BLOCK_INNER"], power_of_2(widest))
    return {**blocks, "BLOCK_OUTER": blocks["BLOCK_OUTER"] * blocks["BLOCK_INNER"] // width, "BLOCK_INNER": width}


class _Launch(NamedTuple):
    """vector: elements of 16 bytes;   geometry, left: the arguments of the two kernels that say where what is"""

    sizes: Sizes
    grid: tuple[int]
    vector: int
    geometry: Geometry
    left: Geometry


@remembered
def _plan(
    images: int,
    channels: tuple[int, ...],
    pixels: tuple[int, ...],
    types: tuple[Types, ...],
    last: bool,
    block_outer: int,
    block_inner: int,
    steps: int,
    block_flat: int,
) -> tuple[_Launch, ...]:
    def programs(rows: int, columns: int, vector: int) -> int:
        """Of one image, as the kernel splits it."""
        if columns % vector == 0:
            return ceil_div(rows, block_outer * steps) * ceil_div(columns, block_inner)
        return ceil_div(rows * columns, block_flat)

    found = []
    for sizes in alike(launches(images, channels, pixels), types):
        vector = 16 // min(dtype.itemsize for dtype in types[sizes.indices[0]])
        by_channel, by_pixel = (sizes.channels, sizes.channel_offsets), (sizes.pixels, sizes.pixel_offsets)
        (outer, outer_offsets), (inner, inner_offsets) = (by_pixel, by_channel) if last else (by_channel, by_pixel)
        tiles = [programs(rows, columns, vector) for rows, columns in zip(outer, inner, strict=True)]
        ends = sizes.programs(tiles)
        geometry = (*(integers(group) for group in (ends, tiles, outer, inner)), offsets(outer_offsets), offsets(inner_offsets))
        found.append(_Launch(sizes, (ends[-1],), vector, geometry, (integers(sizes.indices), integers(ends), integers(tiles))))
    return tuple(found)


def _placed(pairs: Sequence[ChannelAndPixel | None]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vectors that there are, and the place among them of each of a pair: -1 for a neutral one, -2 where there is no pair."""
    vectors: list[Tensor] = []
    places: list[int] = []
    for pair in pairs:
        for v in pair or ():
            places.append(-1 if v is None else len(vectors))
            vectors.extend(() if v is None else (v,))
        if pair is None:
            places.extend((-2, -2))
    return tuple(vectors), tuple(places)


@triton.jit
def _vector(vectors, PLACE: tl.constexpr, start, index, mask, NEUTRAL: tl.constexpr):
    """Elements of the vector at this place, or as many neutral values, which cost nothing."""
    if PLACE < 0:
        return tl.full(index.shape, NEUTRAL, tl.float32)
    else:
        return tl.load(vectors[PLACE] + start + index, mask, NEUTRAL)


@triton.jit
def _three(vectors, PLACES: tl.constexpr, INNER: tl.constexpr, start, index, mask):
    """Elements of the outer or inner vector of the product, the sign and the error."""
    product = _vector(vectors, PLACES[INNER], start, index, mask, 1.0)
    signs = _vector(vectors, PLACES[2 + INNER], start, index, mask, 0.0)
    return product, signs, _vector(vectors, PLACES[4 + INNER], start, index, mask, 1.0)


@triton.jit
def _write(x, target, arriving, out, outer, inner, offsets, mask, PLACES: tl.constexpr, ABSOLUTE: tl.constexpr):
    """One tile, and its weighted squared errors; `outer` and `inner`: the tile's values of the three vectors, which broadcast to it."""
    value = tl.zeros(offsets.shape, tl.float32)
    squares = value
    if x is not None:
        at = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    if PLACES[0] > -2:
        if ABSOLUTE:
            value += outer[0] * inner[0] * sign(at)
        else:
            value += outer[0] * inner[0]
    if PLACES[2] > -2:
        value += sign(at) * (outer[1] + inner[1])
    if PLACES[4] > -2:
        difference = at - tl.load(target + offsets, mask, 0.0).to(tl.float32)
        slope = outer[2] * inner[2] * difference
        value += slope
        squares = slope * difference
    if arriving is not None:
        value += tl.load(arriving + offsets, mask, 0.0).to(tl.float32)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask)
    return squares


@triton.jit
def _rows(
    x,
    target,
    arriving,
    out,
    vectors,
    outer_start,
    inner_start,
    n,
    tile,
    outer,
    inner,
    PLACES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Tiles of whole 16-byte vectors of a row, below each other: the inner vectors are loaded once."""
    across = tl.cdiv(inner, BLOCK_INNER)
    first = (tile // across) * (BLOCK_OUTER * STEPS)
    columns = (tile % across) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    inside = columns < inner
    i0, i1, i2 = _three(vectors, PLACES, 1, inner_start, columns, inside)
    base = n.to(tl.int64) * outer * inner
    squares = tl.zeros([BLOCK_OUTER, BLOCK_INNER], tl.float32)
    for step in range(STEPS):
        rows = first + step * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
        below = rows < outer
        o0, o1, o2 = _three(vectors, PLACES, 0, outer_start, rows, below)
        outers = (o0[:, None], o1[:, None], o2[:, None])
        inners = (i0[None, :], i1[None, :], i2[None, :])
        offsets = base + (rows.to(tl.int64) * inner)[:, None] + columns[None, :]
        squares += _write(x, target, arriving, out, outers, inners, offsets, below[:, None] & inside[None, :], PLACES, ABSOLUTE)
    return tl.sum(tl.sum(squares, 1), 0)


@triton.jit
def _divided(along, inner):
    """along // inner, of at most inner plus some thousands; the quotient in fp32 is at most one off."""
    down = (along.to(tl.float32) * (1.0 / inner.to(tl.float32))).to(tl.int32)
    down -= (down * inner > along).to(tl.int32)
    return down + (along - down * inner >= inner).to(tl.int32)


@triton.jit
def _flat(
    x,
    target,
    arriving,
    out,
    vectors,
    outer_start,
    inner_start,
    n,
    tile,
    inner,
    total,
    PLACES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_FLAT: tl.constexpr,
):
    """A run of the `total` elements of an image that does not heed its rows: vectors of 16 bytes although rows are not whole ones."""
    start = tile.to(tl.int64) * BLOCK_FLAT
    row = start // inner
    lanes = tl.arange(0, BLOCK_FLAT)
    # Counted from the beginning of the first row.
    along = (start - row * inner).to(tl.int32) + lanes
    down = _divided(along, inner)
    # The bound as a product, so that it is known to end between two vectors.
    mask = lanes < tl.minimum(total // VECTOR - start // VECTOR, BLOCK_FLAT // VECTOR).to(tl.int32) * VECTOR
    outers = _three(vectors, PLACES, 0, outer_start + row, down, mask)
    inners = _three(vectors, PLACES, 1, inner_start, along - down * inner, mask)
    offsets = n.to(tl.int64) * total + start + lanes
    return tl.sum(_write(x, target, arriving, out, outers, inners, offsets, mask, PLACES, ABSOLUTE), 0)


@triton.jit
def _kernel(
    x,
    target,
    arriving,
    out,
    vectors,
    parts,
    unless,
    ends,
    tiles,
    outers,
    inners,
    outer_offsets,
    inner_offsets,
    PLACES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_FLAT: tl.constexpr,
):
    # Not with `and`, of which Triton may compile both sides: there is nothing to load without the pointer.
    if unless is not None:  # noqa: SIM102
        if tl.load(unless) != 0:
            return
    level, program = locate(ends)
    count = pick_integer(tiles, level)
    n = program // count
    tile = program % count
    outer = pick_integer(outers, level)
    inner = pick_integer(inners, level)
    o = pick_offset(outer_offsets, level) + n.to(tl.int64) * outer
    i = pick_offset(inner_offsets, level) + n.to(tl.int64) * inner
    if x is not None:
        x = pick(x, level)
    if target is not None:
        target = pick(target, level)
    if arriving is not None:
        arriving = pick(arriving, level)
    out = pick(out, level)
    total = outer.to(tl.int64) * inner
    # A size known to be a multiple of the vector, which a product is, makes loads and stores of 16 bytes.
    if inner % VECTOR == 0:
        inner = inner // VECTOR * VECTOR
        part = _rows(x, target, arriving, out, vectors, o, i, n, tile, outer, inner, PLACES, ABSOLUTE, BLOCK_OUTER, BLOCK_INNER, STEPS)
    elif total % VECTOR == 0:
        total = total // VECTOR * VECTOR
        part = _flat(x, target, arriving, out, vectors, o, i, n, tile, inner, total, PLACES, ABSOLUTE, VECTOR, BLOCK_FLAT)
    else:
        part = _flat(x, target, arriving, out, vectors, o, i, n, tile, inner, total, PLACES, ABSOLUTE, 1, BLOCK_FLAT)
    if parts is not None:
        tl.store(parts + tl.program_id(0), 0.5 * part)


# `values` is a row of a larger result: whether it begins on 16 bytes depends on the batch.
@triton.jit(do_not_specialize=["images"], do_not_specialize_on_alignment=["values"])
def sum_parts(parts, values, images, indices, ends, tiles, BLOCK: tl.constexpr):
    """A program a level and image: the sum of what its tiles left, in a fixed order."""
    level = tl.program_id(0) // images
    n = tl.program_id(0) % images
    count = pick_integer(tiles, level)
    parts += pick_integer(ends, level) - (images - n) * count
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(parts + tile, tile < count, 0.0)
    tl.store(values + pick_integer(indices, level) * images + n, tl.sum(total, 0))
