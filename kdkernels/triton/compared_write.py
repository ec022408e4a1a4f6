"""The write pass of `channel_kl` and `correlation`: both pyramids read again and the gradient written.

It takes from the launch after the read pass a few numbers of every channel, planes (channels,) behind each other, and of every row a
factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compared import across, down, fitted_blocks, heuristic, launch_plan, locate_band, tile_offsets
from .levels import Written, dense, integers, is_last, offsets, pick, pick_integer, pick_offset, sizes_of, types_of


def write(
    s: Sequence[Tensor],
    t: Sequence[Tensor],
    planes: Tensor,
    factors: tuple[Tensor, Tensor | None],
    kind: str,
    inverse_temperature: float = 1.0,
) -> list[Tensor]:
    """Gradient of the levels s, in their types and strides. planes: what the second launch left of all channels

    factors: the rows' gradient (L, N) and, for the correlation, the rows: see `_factor`
    """
    images, channels, pixels = sizes_of(s)
    last = is_last(s)
    read = [dense(s, last), dense(t, last)]
    written = Written(s, last)
    if images == 0:
        return written.results
    blocks = fitted_blocks(launch.parameters("compared_write", _heuristic, s, last), channels, pixels, last)
    by_image = kind != "correlation"
    total = sum(channels) * (images if by_image else 1)
    plan = launch_plan(images, channels, pixels, types_of([s, *read]), last, blocks["CHANNELS"], blocks["PIXELS"] * blocks["STEPS"])
    for one in plan:
        first = one.sizes.channel_offsets
        _write[one.grid](
            one.sizes.of(read[0]),
            one.sizes.of(read[1]),
            one.sizes.of(written.levels),
            planes,
            *factors,
            inverse_temperature,
            *one.geometry,
            offsets(place if by_image else place // images for place in first),
            integers(one.sizes.indices),
            total,
            images,
            KIND=kind,
            LAST=last,
            VECTOR=one.vector,
            IMAGES=32,
            **blocks,
        )
    return written.done()


def _heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    # Twice the warps on twice the pixels: with four the assembler takes 72 registers of fp16 on sm_100, and spills two.
    return {"CHANNELS": 64, "PIXELS": 32, "STEPS": 8, "num_warps": 8} if last else heuristic(dtype, last)


@triton.jit
def _factor(grad, rows, index, images, IMAGES: tl.constexpr):
    """What the gradient of a level's total V is multiplied by, sum_n d_n * row_n / V: rows are shares of it, equal ones where V is 0."""
    total = tl.zeros([IMAGES], tl.float32)
    weighted = total
    plain = total
    for first in range(0, images, IMAGES):
        n = first + tl.arange(0, IMAGES)
        own = tl.load(rows + index * images + n, n < images, 0.0)
        d = tl.load(grad + index * images + n, n < images, 0.0)
        total += own
        weighted += d * own
        plain += d
    whole = tl.sum(total, 0)
    still = whole == 0.0
    return tl.where(still, tl.sum(plain, 0), tl.sum(weighted, 0)) / tl.where(still, images.to(tl.float32), whole)


@triton.jit(do_not_specialize=["total", "images"])
def _write(
    s,
    t,
    out,
    planes,
    grad,
    rows,
    inverse_temperature,
    ends,
    bands,
    channels,
    pixels,
    places,
    indices,
    total,
    images,
    KIND: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    IMAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    level, n, c, band, first, count, C, P = locate_band(ends, bands, channels, pixels, CHANNELS, PIXELS * STEPS)
    s = pick(s, level)
    t = pick(t, level)
    out = pick(out, level)
    k = tl.cast(inverse_temperature, tl.float32)
    index = pick_integer(indices, level)
    planes += pick_offset(places, level)
    if KIND == "correlation":
        by = _factor(grad, rows, index, images, IMAGES)
    else:
        planes += n * C
        by = tl.load(grad + index * images + n) * k
    inner = C if LAST else P
    if inner % VECTOR == 0:
        inner = inner // VECTOR * VECTOR
        _write_band(s, t, out, planes, total, by, n, c, first, k, C, P, inner, KIND, LAST, PIXELS, STEPS)
    else:
        _write_band(s, t, out, planes, total, by, n, c, first, k, C, P, inner, KIND, LAST, PIXELS, STEPS)


@triton.jit
def _plane(planes, total, i, c, below, LAST: tl.constexpr):
    return across(tl.load(planes + tl.cast(i, tl.int64) * total + c, below, 0.0), LAST)


@triton.jit
def _write_band(
    s, t, out, planes, total, by, n, c, first, k, C, P, inner,
    KIND: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    C, P = (inner, P) if LAST else (C, inner)
    below = c < C
    image = n * C * P
    # kl: largest value and factor of s and of t;   correlation: what s and t are taken from, their slopes and a constant
    a = _plane(planes, total, 0, c, below, LAST)
    u = _plane(planes, total, 1, c, below, LAST) * by
    b = _plane(planes, total, 2, c, below, LAST)
    v = _plane(planes, total, 3, c, below, LAST) * by
    if KIND == "correlation":
        w = _plane(planes, total, 4, c, below, LAST) * by
    for begin in range(first, min(first + STEPS * PIXELS, P), PIXELS):
        p = begin + tl.arange(0, PIXELS)
        offset = image + tile_offsets(c, p, inner, LAST)
        inside = across(below, LAST) & down(p < P, LAST)
        x = tl.where(inside, tl.load(s + offset, inside, 0.0).to(tl.float32) - a, 0.0)
        y = tl.where(inside, tl.load(t + offset, inside, 0.0).to(tl.float32) - b, 0.0)
        value = u * x + v * y + w if KIND == "correlation" else u * tl.exp(x * k) - v * tl.exp(y * k)
        tl.store(out + offset, value.to(out.dtype.element_ty), inside)
