"""Two pyramids compared channel by channel, for `channel_kl` and `correlation`: what `compared_read` and `compared_write` share.

A program takes a band of an image, some pixels of some channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .levels import Geometry, Sizes, Types, alike, ceil_div, integers, launches, locate, pick_integer, power_of_2, remembered


class Launch(NamedTuple):
    sizes: Sizes
    grid: tuple[int]
    vector: int
    geometry: Geometry


def heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """Tiles of eight elements a thread of each pyramid: fewer than 128 registers, exponentials and all."""
    if last:
        return {"CHANNELS": 64, "PIXELS": 16, "STEPS": 16, "num_warps": 4}
    return {"CHANNELS": 4, "PIXELS": 256, "STEPS": 8, "num_warps": 4}


def fitted_blocks(blocks: dict[str, int], channels: Sequence[int], pixels: Sequence[int], last: bool) -> dict[str, int]:
    """Tiles of as many elements, no longer along a row than the longest of any level."""
    inner, outer = ("CHANNELS", "PIXELS") if last else ("PIXELS", "CHANNELS")
    width = min(blocks[inner], power_of_2(max(channels if last else pixels)))
    return {**blocks, inner: width, outer: blocks[outer] * blocks[inner] // width}


@remembered
def launch_plan(
    images: int, channels: tuple[int, ...], pixels: tuple[int, ...], types: tuple[Types, ...], last: bool, across: int, length: int
) -> tuple[Launch, ...]:
    """Launches whose programs take `across` channels of a band of `length` pixels each."""
    found = []
    for sizes in alike(launches(images, channels, pixels), types) if images else ():
        bands = tuple(ceil_div(p, length) for p in sizes.pixels)
        tiles = tuple(ceil_div(c, across) * b for c, b in zip(sizes.channels, bands, strict=True))
        ends = sizes.programs(tiles)
        vector = 16 // min(dtype.itemsize for dtype in types[sizes.indices[0]])
        found.append(Launch(sizes, (ends[-1],), vector, tuple(integers(v) for v in (ends, bands, sizes.channels, sizes.pixels))))
    return tuple(found)


@triton.jit
def locate_band(ends, bands, channels, pixels, CHANNELS: tl.constexpr, LENGTH: tl.constexpr):
    """This program's level, image, channels, number of its band and the band's first pixel, and the level's bands, channels and pixels."""
    level, program = locate(ends)
    count = pick_integer(bands, level)
    C = pick_integer(channels, level)
    P = pick_integer(pixels, level)
    tiles = tl.cdiv(C, CHANNELS) * count
    n = (program // tiles).to(tl.int64)
    tile = program % tiles
    c = (tile // count) * CHANNELS + tl.arange(0, CHANNELS)
    return level, n, c, tile % count, (tile % count) * LENGTH, count, C, P


@triton.jit
def across(numbers, LAST: tl.constexpr):
    """A number a channel, to meet a tile: (pixels, channels) of a channels_last level, (channels, pixels) of a contiguous one."""
    return numbers[None, :] if LAST else numbers[:, None]


@triton.jit
def down(numbers, LAST: tl.constexpr):
    """A number a pixel, to meet a tile."""
    return numbers[:, None] if LAST else numbers[None, :]


@triton.jit
def tile_offsets(c, p, inner, LAST: tl.constexpr):
    """Where the elements of a tile lie within an image, in 64 bits, as images are large."""
    if LAST:
        return (p.to(tl.int64) * inner)[:, None] + c[None, :]
    else:
        return (c.to(tl.int64) * inner)[:, None] + p[None, :]
