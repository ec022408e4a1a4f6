"""`channel_kl` and its gradient: a read and a write pass over both pyramids, and a program a level and image that joins its bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compared_read import CROSS_ENTROPY_NUMBERS, KL_NUMBERS, LOWEST, raised, read
from .compared_write import write
from .levels import Geometry, Sizes, integers, launches, offsets, pick_integer, pick_offset, remembered, sizes_of
from .series import log_1_plus, second_order

#: Bands and channels that a program takes at a time.
_BLOCKS = {"BANDS": 8, "BLOCK": 64, "num_warps": 4}


def channel_kl(s: Sequence[Tensor], t: Sequence[Tensor], temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Rows (L, N), and of all channels the planes m_s, 1 / z_s, m_t, 1 / z_t, each packed (N, C), all fp32."""
    images, channels, pixels = sizes_of(s)
    rows, planes = s[0].new_empty(len(s), images, dtype=torch.float32), s[0].new_empty(4 * images * sum(channels), dtype=torch.float32)
    kind = "kl" if entropy else "cross_entropy"
    parts = read(s, t, kind, 1 / temperature)
    total = images * sum(channels)
    for sizes, geometry in _plan(images, channels, pixels, parts.bands, parts.firsts):
        _rows[(images * len(sizes.indices),)](parts.parts, rows, planes, 1 / temperature, *geometry, total, images, KIND=kind, **_BLOCKS)
    return rows, planes


def channel_kl_backward(s: Sequence[Tensor], t: Sequence[Tensor], planes: Tensor, grad: Tensor, temperature: float) -> list[Tensor]:
    """Gradient of the levels s, in their types and strides, from the planes and the rows' gradient, (L, N) fp32."""
    return write(s, t, planes, (grad, None), "kl", 1 / temperature)


@remembered
def _plan(
    images: int, channels: tuple[int, ...], pixels: tuple[int, ...], bands: tuple[int, ...], firsts: tuple[int, ...]
) -> tuple[tuple[Sizes, Geometry], ...]:
    found = []
    for sizes in launches(images, channels, pixels) if images else ():
        at = integers(bands[i] for i in sizes.indices), integers(sizes.channels), integers(sizes.indices)
        found.append((sizes, (*at, offsets(firsts[i] for i in sizes.indices), offsets(sizes.channel_offsets))))
    return tuple(found)


@triton.jit(do_not_specialize=["total", "images"])
def _rows(
    parts, rows, planes, inverse_temperature, bands, channels, indices, firsts, places, total, images,
    KIND: tl.constexpr, BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An image's bands brought together: its row, and the planes of its channels."""
    NUMBERS: tl.constexpr = KL_NUMBERS if KIND == "kl" else CROSS_ENTROPY_NUMBERS
    level = tl.program_id(0) // images
    n = (tl.program_id(0) % images).to(tl.int64)
    count = pick_integer(bands, level)
    C = pick_integer(channels, level)
    parts += pick_offset(firsts, level) + n * count * NUMBERS * C
    planes += pick_offset(places, level) + n * C
    k = tl.cast(inverse_temperature, tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < C
        m_s = tl.full([BLOCK], LOWEST, tl.float32)
        m_t = m_s
        for begin in range(0, count, BANDS):
            at, there = _bands(begin, count, c, C, BANDS, NUMBERS)
            m_s = tl.maximum(m_s, tl.max(tl.load(parts + at, there, LOWEST), 0))
            m_t = tl.maximum(m_t, tl.max(tl.load(parts + at + 2 * C, there, LOWEST), 0))
        z_s = tl.zeros([BLOCK], tl.float32)
        z_t = z_s
        a = z_s
        b = z_s
        for begin in range(0, count, BANDS):
            at, there = _bands(begin, count, c, C, BANDS, NUMBERS)
            r = tl.where(there, (tl.load(parts + at, there, 0.0) - m_s[None, :]) * k, 0.0)
            u = tl.where(there, (tl.load(parts + at + 2 * C, there, 0.0) - m_t[None, :]) * k, 0.0)
            own, other = tl.load(parts + at + C, there, 0.0), tl.load(parts + at + 3 * C, there, 0.0)
            differences = tl.load(parts + at + 4 * C, there, 0.0)
            second = tl.load(parts + at + 5 * C, there, 0.0) if KIND == "kl" else differences
            own, other, differences, second = raised(own, other, differences, second, r, u, KIND)
            z_s += tl.sum(own, 0)
            z_t += tl.sum(other, 0)
            a += tl.sum(differences, 0)
            b += tl.sum(second, 0)
        # Behind the last channel numbers that do no harm.
        z_s, z_t = tl.where(inside, z_s, 1.0), tl.where(inside, z_t, 1.0)
        tl.store(planes + c, m_s, inside)
        tl.store(planes + tl.cast(total, tl.int64) + c, tl.div_rn(1.0, z_s), inside)
        tl.store(planes + tl.cast(total, tl.int64) * 2 + c, m_t, inside)
        tl.store(planes + tl.cast(total, tl.int64) * 3 + c, tl.div_rn(1.0, z_t), inside)
        mean = tl.div_rn(a, z_t)
        found = _value(mean, tl.div_rn(b, z_t), tl.div_rn(z_s, z_t)) if KIND == "kl" else mean + tl.log(z_s)
        value += tl.where(inside, found, 0.0)
    tl.store(rows + pick_integer(indices, level) * images + n, tl.sum(value, 0))


@triton.jit
def _value(mean, second, ratio):
    """sum p (log p - log q), from the sums over z_t and z_s / z_t: of near distributions by its second-order terms."""
    # Of differences less their mean.
    rest = (1.0 - mean + second) * second_order(-mean) - mean * mean + second * (1.0 + mean)
    rest = tl.where(rest < 0.0, 0.0, rest)
    near = tl.where(rest < 1.0, log_1_plus(rest), tl.log(1.0 + rest))
    return tl.where(tl.abs(mean) < 0.5, near, mean + tl.log(ratio))


@triton.jit
def _bands(begin, count, c, C, BANDS: tl.constexpr, NUMBERS: tl.constexpr):
    """Where the first number of some bands' parts lies, (BANDS, channels), and which are there."""
    band = begin + tl.arange(0, BANDS)
    return (band.to(tl.int64) * (NUMBERS * C))[:, None] + c[None, :], (band < count)[:, None] & (c < C)[None, :]
