"""`terms`: a map's distance, an attention's distance and imitations of one target, from one read of the student and one gradient write.

Forward: the read pass, and one small launch in which a program takes one number of one level and image. Backward: one small launch that
makes a vector per channel and maps per pixel of the upstream gradient, and the write pass. Rows of the result, those that are wanted:
the map's, the attention's over pixels and over channels, one an imitation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..term_batches import Options
from . import launch
from .attention import channel_blocks, channel_distance, distance_gradient, logit_factor, spatial_distance
from .channel_sums import part_offsets
from .gradient import gradient
from .levels import Geometry, Sizes, ceil_div, integers, launches, locate, offsets, pick, pick_integer, pick_offset, remembered, sizes_of
from .map_distance import divisor_of, map_forward, map_gradient
from .reduce import reduce


@triton.jit
def _factor(factors, scales, row, place):
    """What multiplies a row at one level and image: a number a row, and a tensor (rows, levels, N) if there is one."""
    factor = tl.cast(pick(scales, row), tl.float32)
    if factors is not None:
        factor *= tl.load(factors + place)
    return factor


@triton.jit
def _upstream(grad, factors, scales, row, place):
    """Upstream gradient of a row, 1 without `grad`, times its factor."""
    d = _factor(factors, scales, row, place)
    if grad is not None:
        d *= tl.load(grad + place)
    return d


@triton.jit
def _weighted_sum(error, spatial, pixels, BLOCK: tl.constexpr):
    """sum_p spatial_p * error_p of one level and image; without spatial sum_p error_p."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        value = tl.load(error + p, p < pixels, 0.0)
        if spatial is not None:
            value *= tl.load(spatial + p, p < pixels, 0.0)
        total += value
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["images", "levels"])
def terms_kernel(
    raw, map_t, map_spatial, absolute, attention_spatial, attention_channel, parts, channel_sums, error, spatial, factors, rows, state,
    scales, images, levels, indices, pixels, channels, pixel_offsets, channel_offsets, part_offsets, tiles, ends,
    eps, map_temperature, temperature,
    RECTIFY: tl.constexpr, NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr, AVERAGE: tl.constexpr,
    RELATIVE: tl.constexpr, IMITATIONS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """A program a row, level and image.

    raw, absolute, error: maps of the read pass;   parts: its channel sums;   levels: of the whole pyramid, as in rows (rows, levels, N)
    and state (3, levels, N, 8)
    """
    MAP: tl.constexpr = 0 if raw is None else 1
    ATTENTION: tl.constexpr = 0 if absolute is None else 2
    level, program = locate(ends)
    size = pick_integer(pixels, level)
    count = pick_integer(channels, level)
    row = program // images
    n = (program % images).to(tl.int64)
    pixel = pick_offset(pixel_offsets, level) + n * size
    place = pick_integer(indices, level) * images + n
    value = 0.0
    if MAP:
        weights = None if map_spatial is None else map_spatial + pixel
        if row == 0:
            value = map_forward(
                raw + pixel, map_t + pixel, weights, state + place * 8, size, divisor_of(images, size, AVERAGE), eps, map_temperature,
                RECTIFY, NORMALIZE, NORMALIZE_T, DISTANCE, RELATIVE, BLOCK,
            )  # fmt: skip
    if ATTENTION:
        if row == MAP:
            own = state + (levels * images + place) * 8
            value = spatial_distance(absolute + pixel, attention_spatial + pixel, own, size, logit_factor(count, temperature), BLOCK)
        if row == MAP + 1:
            channel = pick_offset(channel_offsets, level) + n * count
            part = parts + pick_offset(part_offsets, level) + n * pick_integer(tiles, level) * count
            own = state + (2 * levels * images + place) * 8
            value = channel_distance(
                part, attention_channel + channel, channel_sums + channel, own, pick_integer(tiles, level), count,
                logit_factor(size, temperature), BLOCK_C, BLOCK_TILES,
            )  # fmt: skip
    for k in tl.static_range(IMITATIONS):
        if row == MAP + ATTENTION + k:
            weights = None if spatial is None else spatial[k] + pixel
            value = _weighted_sum(error + pixel, weights, size, BLOCK)
    place += row.to(tl.int64) * levels * images
    value *= _factor(factors, scales, row, place)
    tl.store(rows + place, value)


@triton.jit(do_not_specialize=["images", "levels"])
def terms_backward_kernel(
    raw, map_t, map_spatial, absolute, attention_spatial, attention_channel, channel_sums, spatial, factors, grad, state,
    product_pixel, sign_pixel, sign_channel, error_pixel, scales,
    images, levels, indices, pixels, channels, pixel_offsets, channel_offsets, tiles, ends, map_temperature, temperature,
    RECTIFY: tl.constexpr, NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr, AVERAGE: tl.constexpr,
    IMITATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the write pass needs: the first program of an image makes the vector of its channels, each of the others a tile of its maps."""
    MAP: tl.constexpr = 0 if raw is None else 1
    ATTENTION: tl.constexpr = 0 if absolute is None else 2
    level, program = locate(ends)
    size = pick_integer(pixels, level)
    count = pick_integer(channels, level)
    n = (program // pick_integer(tiles, level)).to(tl.int64)
    tile = program % pick_integer(tiles, level)
    place = pick_integer(indices, level) * images + n
    row = levels * images
    if tile == 0:
        if ATTENTION:
            channel = pick_offset(channel_offsets, level) + n * count
            own = state + (2 * row + place) * 8
            d = _upstream(grad, factors, scales, MAP + 1, place + (MAP + 1) * row)
            for start in range(0, count, BLOCK):
                c = start + tl.arange(0, BLOCK)
                slope = distance_gradient(
                    channel_sums + channel, attention_channel + channel, own, d, c, c < count, count, logit_factor(size, temperature)
                )
                tl.store(sign_channel + channel + c, slope, c < count)
    else:
        pixel = pick_offset(pixel_offsets, level) + n * size
        p = (tile - 1) * BLOCK + tl.arange(0, BLOCK)
        inside = p < size
        if MAP:
            weights = None if map_spatial is None else map_spatial + pixel
            d = _upstream(grad, factors, scales, 0, place)
            slope = map_gradient(
                raw + pixel, map_t + pixel, weights, state + place * 8, d, p, inside, divisor_of(images, size, AVERAGE), map_temperature,
                RECTIFY, NORMALIZE, NORMALIZE_T, DISTANCE,
            )  # fmt: skip
            tl.store(product_pixel + pixel + p, slope, inside)
        if ATTENTION:
            d = _upstream(grad, factors, scales, MAP, place + MAP * row)
            slope = distance_gradient(
                absolute + pixel, attention_spatial + pixel, state + (row + place) * 8, d, p, inside, size, logit_factor(count, temperature)
            )
            tl.store(sign_pixel + pixel + p, slope, inside)
        if IMITATIONS:
            slope = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(IMITATIONS):
                # The 2 of a square's derivative.
                d = 2.0 * _upstream(grad, factors, scales, MAP + ATTENTION + k, place + (MAP + ATTENTION + k) * row)
                if spatial is None:
                    slope += d
                else:
                    slope += d * tl.load(spatial[k] + pixel + p, inside, 0.0)
            tl.store(error_pixel + pixel + p, slope, inside)


@triton.jit(do_not_specialize=["count"])
def _all_ones(values, result, count, BLOCK: tl.constexpr):
    """Writes 1 if all values are 1, else 0."""
    others = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        others += (tl.load(values + k, k < count, 1.0) != 1.0).to(tl.int32)
    tl.store(result, (tl.sum(others, 0) == 0).to(tl.int32))


class Call(NamedTuple):
    """The operators' arguments besides the options.

    s, t: levels (N, C, H, W), t empty without imitations;   factors: (rows, L, N);   the others: packed fp32
    """

    s: Sequence[Tensor]
    t: Sequence[Tensor]
    weights: Tensor | None
    map_t: Tensor | None
    map_spatial: Tensor | None
    attention_spatial: Tensor | None
    attention_channel: Tensor | None
    channel: Tensor | None
    spatial: Sequence[Tensor]
    factors: Tensor | None

    def buffer(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.s[0].device)


def _map_constants(options: Options) -> dict[str, str]:
    return {
        "RECTIFY": options.rectify,
        "NORMALIZE": options.normalize,
        "NORMALIZE_T": options.normalize_t,
        "DISTANCE": options.distance,
        "AVERAGE": options.average,
    }


def _parsed(args: tuple[Any, ...]) -> tuple[Call, Options]:
    count = len(Call._fields)
    return Call(*args[:count]), Options(*args[count:])


def terms(*args: Any) -> list[Tensor]:
    """Rows (rows, L, N), and for the backward: the raw map, sum_c |s|, sum_p |s| (packed, empty when not wanted), state (3, L, N, 8).

    args: the fields of `Call` and of `Options`
    """
    call, options = _parsed(args)
    rows = call.buffer(len(options.scales), len(call.s), call.s[0].shape[0])
    return [rows, *_forward(call, options, rows, options.imitations)]


def terms_with_gradient(*args: Any) -> list[Tensor]:
    """As `terms`, of at most one imitation, and the gradients of s for upstream gradients of 1: its values come with these."""
    call, options = _parsed(args)
    rows = call.buffer(len(options.scales), len(call.s), call.s[0].shape[0])
    saved = _forward(call, options, rows, 0)
    gradients = _gradient(call, options, None, saved, values=rows[-1])
    return [rows, *saved, *gradients]


def terms_backward(grad: Tensor, saved: Sequence[Tensor], arriving: Sequence[Tensor], *args: Any) -> list[Tensor]:
    """Gradients of s for the gradient (rows, L, N) of `terms`' rows, with `arriving` (levels like s, or none) added."""
    call, options = _parsed(args)
    return _gradient(call, options, grad, saved, arriving=arriving or None)


def terms_correct_gradient(gradients: list[Tensor], grad: Tensor, saved: Sequence[Tensor], *args: Any) -> None:
    """Makes of the gradients for upstream gradients of 1 those for `grad`, in place; nothing to do where it is 1, which the device sees."""
    call, options = _parsed(args)
    right = torch.empty(1, dtype=torch.int32, device=grad.device)
    _all_ones[(1,)](grad, right, grad.numel(), BLOCK=1024)
    _gradient(call, options, grad, saved, out=gradients, unless=right)


def _forward(call: Call, options: Options, rows: Tensor, imitations: int) -> list[Tensor]:
    """Fills the rows, but those of imitations that are not counted, and returns what the backward needs."""
    s = call.s
    images, channels, pixels = sizes_of(s)
    attends = call.attention_spatial is not None
    buffer = call.buffer
    # Each row uses some of it; the rest is not to differ from run to run.
    state = torch.zeros(3, len(s), images, 8, dtype=torch.float32, device=s[0].device)
    channel_sums = buffer(images * sum(channels) if attends else 0)
    count = (call.weights is not None) + 2 * attends + imitations
    if count == 0:
        return [buffer(0), buffer(0), channel_sums, state]
    sums = reduce(
        s,
        target=call.t if imitations else None,
        weights=call.weights,
        absolute=options.absolute,
        channel="abs" if attends else "none",
        spatial_abs=attends,
        error_channel=call.channel if imitations else None,
    )
    parts, tiles = sums.channel or (None, (1,) * len(s))
    blocks = launch.parameters("terms", _forward_heuristic, s, False)
    for grid, geometry, channel_widths in _forward_plan(images, channels, pixels, tuple(tiles), count):
        terms_kernel[grid](
            sums.raw, call.map_t, call.map_spatial, sums.absolute, call.attention_spatial, call.attention_channel, parts, channel_sums,
            sums.error, tuple(call.spatial) if imitations and call.spatial else None, call.factors, rows, state, tuple(options.scales),
            images, len(s), *geometry,
            options.eps, options.map_temperature, options.temperature,
            **_map_constants(options), RELATIVE=options.relative, IMITATIONS=imitations, **channel_widths, **blocks,
        )  # fmt: skip
    return [
        buffer(0) if sums.raw is None else sums.raw,
        buffer(0) if sums.absolute is None else sums.absolute,
        channel_sums,
        state,
    ]


def _gradient(call: Call, options: Options, grad: Tensor | None, saved: Sequence[Tensor], **how: Any) -> list[Tensor]:
    """The small launch and the write pass for the upstream gradients `grad` (rows, L, N), None for 1; how: see `gradient.gradient`."""
    s = call.s
    images, channels, pixels = sizes_of(s)
    raw, absolute, channel_sums, state = saved
    has_map, attends, imitates = call.weights is not None, call.attention_spatial is not None, options.imitations > 0

    def buffer(wanted: bool, numel: int) -> Tensor | None:
        return call.buffer(numel) if wanted else None

    product, by_pixel, error = (buffer(wanted, images * sum(pixels)) for wanted in (has_map, attends, imitates))
    by_channel = buffer(attends, images * sum(channels))
    blocks = launch.parameters("terms_backward", _backward_heuristic, s, False)
    for grid, geometry in _backward_plan(images, channels, pixels, blocks["BLOCK"]):
        terms_backward_kernel[grid](
            raw if has_map else None, call.map_t, call.map_spatial, absolute if attends else None, call.attention_spatial,
            call.attention_channel, channel_sums, tuple(call.spatial) or None, call.factors, grad, state,
            product, by_pixel, by_channel, error, tuple(options.scales),
            images, len(s), *geometry,
            options.map_temperature, options.temperature, **_map_constants(options), IMITATIONS=options.imitations, **blocks,
        )  # fmt: skip
    return gradient(
        s,
        target=call.t or None,
        product=(call.weights, product) if has_map else None,
        sign=(by_channel, by_pixel) if attends else None,
        error=(call.channel, error) if imitates else None,
        absolute=options.absolute,
        **how,
    )


@remembered
def _forward_plan(
    images: int, channels: tuple[int, ...], pixels: tuple[int, ...], tiles: tuple[int, ...], count: int
) -> tuple[tuple[tuple[int], Geometry, dict[str, int]], ...]:
    """Grid, geometry and blocks of channels of every launch. tiles: of the channel parts; count: programs a level and image."""
    first_parts = part_offsets(images, channels, tiles)
    found = []
    for sizes in launches(images, channels, pixels) if images else ():
        ends = sizes.programs([count] * len(sizes.indices))
        parts = offsets(first_parts[i] for i in sizes.indices), integers(tiles[i] for i in sizes.indices)
        found.append(((ends[-1],), (*_geometry(sizes), *parts, integers(ends)), channel_blocks(sizes.channels)))
    return tuple(found)


@remembered
def _backward_plan(images: int, channels: tuple[int, ...], pixels: tuple[int, ...], block: int) -> tuple[tuple[tuple[int], Geometry], ...]:
    found = []
    for sizes in launches(images, channels, pixels) if images else ():
        tiles = tuple(1 + ceil_div(p, block) for p in sizes.pixels)
        ends = sizes.programs(tiles)
        found.append(((ends[-1],), (*_geometry(sizes), integers(tiles), integers(ends))))
    return tuple(found)


def _geometry(sizes: Sizes) -> Geometry:
    """The arguments indices, pixels, channels, pixel_offsets and channel_offsets of both kernels."""
    where = offsets(sizes.pixel_offsets), offsets(sizes.channel_offsets)
    return integers(sizes.indices), integers(sizes.pixels), integers(sizes.channels), *where


def _forward_heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    # A whole map of 67200 pixels goes through one program: many threads, each with several loads in flight.
    return {"BLOCK": 4096, "num_warps": 16}


def _backward_heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    return {"BLOCK": 1024, "num_warps": 4}
