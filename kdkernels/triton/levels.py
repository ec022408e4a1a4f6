"""What all Triton kernels share: pyramids brought to one memory layout, small results packed behind each other, levels found by program.

A level's image is read as a matrix (outer, inner) of which `inner` is contiguous: (C, H*W) of a contiguous level, (H*W, C) of a
channels_last one. Small fp32 results of all levels lie packed in one buffer, level after level: maps (N, H*W), channel vectors (N, C).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pyramid import memory_format

#: Levels of one launch. Pyramids with more take several launches.
MOST_LEVELS = 6
#: Makes an integer one of 64 bits for Triton, which goes by its value.
_LONG = 1 << 40
_FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


class Sizes(NamedTuple):
    """Of the levels of one launch, largest first.

    indices:         their places in the pyramid
    channels, pixels: C and H*W
    channel_offsets: where a level begins in a packed buffer of channel vectors;   pixel_offsets: in one of maps
    """

    images: int
    indices: tuple[int, ...]
    channels: tuple[int, ...]
    pixels: tuple[int, ...]
    channel_offsets: tuple[int, ...]
    pixel_offsets: tuple[int, ...]

    def of(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The levels of this launch."""
        return tuple(levels[i] for i in self.indices)

    def only(self, places: Sequence[int]) -> Sizes:
        """A launch of some of its levels."""
        return Sizes(self.images, *(tuple(values[k] for k in places) for values in self[1:]))

    def programs(self, tiles: Sequence[int]) -> tuple[int, ...]:
        """Programs up to and including each level, given the tiles of an image of each: the last is the grid."""
        return tuple(accumulate(self.images * t for t in tiles))


#: For functions of sizes. A training loop calls with few, always the same; what is worked out anew in Python makes the GPU wait.
remembered = lru_cache(maxsize=512)


@remembered
def launches(images: int, channels: tuple[int, ...], pixels: tuple[int, ...]) -> tuple[Sizes, ...]:
    """The launches of one pass: levels from the largest to the smallest, `MOST_LEVELS` at a time.

    Raises ValueError for a map of 2^30 pixels or more, within which kernels count in 32 bits.
    """
    if max(pixels, default=0) >= 2**30:
        raise ValueError(f"a map of {max(pixels)} pixels, where the kernels take fewer than 2^30")
    first_channel = [0, *accumulate(images * c for c in channels)]
    first_pixel = [0, *accumulate(images * p for p in pixels)]
    order = sorted(range(len(pixels)), key=lambda i: -channels[i] * pixels[i])
    groups = [tuple(order[start : start + MOST_LEVELS]) for start in range(0, len(order), MOST_LEVELS)]
    return tuple(
        Sizes(images, group, *(tuple(values[i] for i in group) for values in (channels, pixels, first_channel, first_pixel)))
        for group in groups
    )


#: The arguments of a kernel that say where what is.
Geometry = tuple[tuple[int, ...], ...]
#: Types of a level in each of the pyramids that a launch reads and writes.
Types = tuple[torch.dtype, ...]


def types_of(pyramids: Sequence[Sequence[Tensor]]) -> tuple[Types, ...]:
    """Of every level its types in these pyramids."""
    return tuple(zip(*([x.dtype for x in levels] for levels in pyramids), strict=True))


def alike(passes: Iterable[Sizes], types: Sequence[Types]) -> Iterator[Sizes]:
    """Levels of one type a launch, as pointers of one type are what a kernel can choose from."""
    for sizes in passes:
        mine = [types[i] for i in sizes.indices]
        for kind in dict.fromkeys(mine):
            yield sizes.only([k for k, other in enumerate(mine) if other == kind])


def integers(values: Iterable[int]) -> tuple[int, ...]:
    """Sizes, each below 2^30, for a tuple argument of a kernel, which reads them by `pick_integer` and `locate`.

    Triton compiles anew for a size of 1 or divisible by 16, in tuples whatever `do_not_specialize` says: these are odd and above 1.
    """
    coded = tuple(2 * value + 3 for value in values)
    if max(coded) >= 2**31:
        raise ValueError(f"a level of 2^30 pixels, channels or programs or more: {tuple(values)}")
    return coded


def offsets(values: Iterable[int]) -> tuple[int, ...]:
    """As `integers`, for `pick_offset`: of any size, and always passed as 64 bits."""
    return tuple(2 * value + 3 + _LONG for value in values)


def sizes_of(levels: Sequence[Tensor]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """N, and C and H*W of every level."""
    shapes = [x.shape for x in levels]
    return shapes[0][0], tuple([c for _, c, _, _ in shapes]), tuple([h * w for _, _, h, w in shapes])


def ceil_div(count: int, size: int) -> int:
    """Tiles of `size` that hold `count`; triton.cdiv takes 5 us."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << (count - 1).bit_length()


def is_last(levels: Sequence[Tensor], most_channels: int | None = None) -> bool:
    """Whether all levels are read as channels_last: as the largest lies, but contiguous if one has more than `most_channels` channels."""
    narrow = most_channels is None or max(x.shape[1] for x in levels) <= most_channels
    return narrow and memory_format(levels) is torch.channels_last


def dense(levels: Sequence[Tensor], last: bool) -> list[Tensor]:
    """The levels, dense in this layout. What is not is copied: a slice with gaps, the other layout."""
    return [x.contiguous(memory_format=_FORMATS[last]) for x in levels]


class Written:
    """Room for one result a level, with the strides that `torch.empty_like` gives, written in the launch's layout."""

    def __init__(self, like: Sequence[Tensor], last: bool, results: list[Tensor] | None = None) -> None:
        self.results = [torch.empty_like(x) for x in like] if results is None else results
        dense = [x if x.is_contiguous(memory_format=_FORMATS[last]) else None for x in self.results]
        # Results that were given hold something, which a launch may leave as it is.
        room = torch.empty_like if results is None else torch.clone
        self.levels = [room(x, memory_format=_FORMATS[last]) if d is None else d for x, d in zip(self.results, dense, strict=True)]

    def done(self) -> list[Tensor]:
        """The results, after the launches."""
        for result, level in zip(self.results, self.levels, strict=True):
            if result is not level:
                result.copy_(level)
        return self.results


@triton.jit
def pick(values, level):
    """values[level] of a tuple of scalars or pointers."""
    chosen = values[0]
    for k in tl.static_range(1, len(values)):
        if level == k:
            chosen = values[k]
    return chosen


@triton.jit
def pick_integer(values, level):
    """The size at this level of those that `integers` passed."""
    return (pick(values, level) - 3) >> 1


@triton.jit
def pick_offset(values, level):
    """The number at this level of those that `offsets` passed, int64."""
    return (pick(values, level) - (3 + (1 << 40))) >> 1


@triton.jit
def locate(ends):
    """Level of this program, and its number within the level; `ends`: `integers` of the programs up to and including each level."""
    program = tl.program_id(0)
    level = 0
    first = 0
    for k in tl.static_range(len(ends) - 1):
        end = (ends[k] - 3) >> 1
        if program >= end:
            level = k + 1
            first = end
    return level, program - first


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as torch.sgn."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def rectified(raw, RECTIFY: tl.constexpr):
    """|raw|, relu or raw itself. relu keeps the NaN that -inf * 0 is: a sum of -inf, which an overflow brings, is no innocent 0."""
    if RECTIFY == "abs":
        return tl.abs(raw)
    elif RECTIFY == "relu":
        return tl.where(raw > 0, raw, raw * 0)
    else:
        return raw
