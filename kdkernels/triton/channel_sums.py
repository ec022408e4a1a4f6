"""The second stage of the read pass: the channel sums that its programs left of their bands, added up in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .levels import Geometry, ceil_div, integers, launches, locate, offsets, pick_integer, pick_offset, remembered


class ChannelParts(NamedTuple):
    """Channel sums of every band. parts: fp32, 1-D, level after level (N, bands, C); tiles: bands of an image, a level."""

    parts: Tensor
    tiles: tuple[int, ...]


def part_offsets(images: int, channels: Sequence[int], tiles: Sequence[int]) -> list[int]:
    """Where each level begins in `ChannelParts.parts`, and the end."""
    return [0, *accumulate(images * t * c for t, c in zip(tiles, channels, strict=True))]


def channel_sums(parts: ChannelParts, channels: Sequence[int], divisors: Sequence[int]) -> Tensor:
    """Packed (N, C), fp32: the bands' channel sums added up, each level divided by its divisor.

    channels, divisors: a level; the number of pixels as divisor gives the mean.
    """
    constants = launch.parameters("channel_sums", _heuristic, [parts.parts], False)
    numel, plan = _plan(parts.parts.numel(), tuple(parts.tiles), tuple(channels), tuple(divisors), constants["BLOCK"])
    out = parts.parts.new_empty(numel)
    for grid, geometry in plan:
        _channel_sums[grid](parts.parts, out, *geometry, **constants)
    return out


def _heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """32 channels are a cache line; 64 bands hide the latency of a loop over hundreds."""
    return {"BANDS": 64, "BLOCK": 32, "num_warps": 4}


@remembered
def _plan(
    numel: int, tiles: tuple[int, ...], channels: tuple[int, ...], divisors: tuple[int, ...], block: int
) -> tuple[int, tuple[tuple[tuple[int], Geometry], ...]]:
    """Elements of the result, and grid and geometry of every launch."""
    images = numel // sum(t * c for t, c in zip(tiles, channels, strict=True))
    first_parts = part_offsets(images, channels, tiles)
    found = []
    # The pixels that order the levels of a launch are the bands here: the longest loop first.
    for sizes in launches(images, channels, tiles) if images else ():
        blocks = tuple(ceil_div(c, block) for c in sizes.channels)
        ends = sizes.programs(blocks)
        geometry = (
            *(integers(values) for values in (ends, blocks, sizes.channels, sizes.pixels)),
            offsets(first_parts[i] for i in sizes.indices),
            offsets(sizes.channel_offsets),
            integers(divisors[i] for i in sizes.indices),
        )
        found.append(((ends[-1],), geometry))
    return images * sum(channels), tuple(found)


@triton.jit
def _channel_sums(
    parts,
    out,
    ends,
    tiles,
    channels,
    bands,
    part_offsets,
    channel_offsets,
    divisors,
    BANDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, program = locate(ends)
    blocks = pick_integer(tiles, level)
    C = pick_integer(channels, level)
    count = pick_integer(bands, level)
    n = (program // blocks).to(tl.int64)
    c = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    band = tl.arange(0, BANDS)
    parts += pick_offset(part_offsets, level) + n * count * C
    total = tl.zeros([BANDS, BLOCK], tl.float32)
    for first in range(0, count, BANDS):
        b = (first + band)[:, None]
        total += tl.load(parts + b * C + c[None, :], (b < count) & inside[None, :], 0.0)
    mean = tl.div_rn(tl.sum(total, 0), pick_integer(divisors, level).to(tl.float32))
    tl.store(out + pick_offset(channel_offsets, level) + n * C + c, mean, inside)
