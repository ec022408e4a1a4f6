"""Distance of normalised maps: one program a level and image, which leaves in its state all that an elementwise backward needs.

With y = r - shift, M the normalised student's map, D its denominator, k = dD/dm (1 + eps or 1), e_p = d value / d M_p, the gradient is
    minmax:  e / D - [r = max r] k sum(e M) / (D * ties) + [r = min r] (k sum(e M) - sum(e)) / (D * ties)
    zscore:  (e - sum(e) / P) / D - k sum(e M) / (P * deviation) * M
    softmax: (e - sum(e M) / P) * M / temperature
    none:    e
in which D appears once to the power -1, so that maps as small as 1e-30 need no square of it. State of a level and image, STATE floats:
    [0] [1] [2]  shift, centre and scale of the student's map, see `statistics`;   [3] [4] [5]  of the teacher's
    [6] [7]      minmax: what is added at the largest and at the smallest values;   zscore: what is added everywhere and the factor of -M
                 softmax: sum(e M) / P and 0;   none: 0 and 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .levels import Geometry, ceil_div, integers, launches, locate, offsets, pick_integer, pick_offset, rectified, remembered, sign

STATE = 8
#: The smallest normal fp32 number, torch.finfo(torch.float32).tiny.
TINY = tl.constexpr(2.0**-126)
#: Pixels of a thread in one turn of the last loop.
ROWS = tl.constexpr(8)


@triton.jit
def _extremes(source, pixels, RECTIFY: tl.constexpr, BLOCK: tl.constexpr):
    """Smallest and largest value of a map and the sum; the extremes are NaN where any value is NaN or infinite."""
    first = rectified(tl.load(source), RECTIFY)
    smallest = tl.zeros([BLOCK], tl.float32) + first
    largest = smallest
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        r = rectified(tl.load(source + p, p < pixels, 0.0), RECTIFY)
        total += r
        r = tl.where(p < pixels, r, first)
        smallest = tl.minimum(smallest, r, propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(largest, r, propagate_nan=tl.PropagateNan.ALL)
    # The reductions over lanes drop NaN.
    poison = tl.sum((smallest - smallest) + (largest - largest), 0)
    return tl.min(smallest, 0) + poison, tl.max(largest, 0) + poison, tl.sum(total, 0)


@triton.jit
def _moments(source, pixels, low, span, total, RECTIFY: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of r - low and standard deviation of r, of which `total` is the sum: 0 and 0 where span is 0."""
    unit = tl.where(span == 0.0, 1.0, span)
    count = pixels.to(tl.float32)
    # In units of the range, so that squares neither underflow nor overflow, and around the rounded mean, so that nothing cancels.
    pivot = total / count - low
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        r = rectified(tl.load(source + p, p < pixels, 0.0), RECTIFY)
        u = tl.where(p < pixels, ((r - low) - pivot) / unit, 0.0)
        first += u
        second += u * u
    rest = tl.sum(first, 0) / count
    deviation = span * tl.sqrt_rn(tl.sum(second, 0) / count - rest * rest)
    return tl.where(span == 0.0, 0.0, pivot + span * rest), tl.where(span == 0.0, 0.0, deviation)


@triton.jit
def _softmax_scale(source, pixels, high, inverse_temperature, RECTIFY: tl.constexpr, BLOCK: tl.constexpr):
    """P / sum exp((r - high) / temperature)."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        r = rectified(tl.load(source + p, p < pixels, 0.0), RECTIFY)
        total += tl.where(p < pixels, tl.exp((r - high) * inverse_temperature), 0.0)
    return tl.div_rn(pixels.to(tl.float32), tl.sum(total, 0))


@triton.jit
def statistics(
    source, pixels, eps, inverse_temperature,
    NORMALIZE: tl.constexpr, RELATIVE: tl.constexpr, RECTIFY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a map (P,): shift, centre, scale and spread m, with which `normalised` gives M.

    minmax:  min r, max r, 1 / D and the range;   zscore: min r, mean of r - min r, 1 / D and the standard deviation
    softmax: max r, 0, P / sum exp and 0;   none: zeros
    scale is 0 where the map is constant, NaN where it is not finite.
    """
    shift, centre, scale, spread = 0.0, 0.0, 0.0, 0.0
    if NORMALIZE != "none":
        low, high, total = _extremes(source, pixels, RECTIFY, BLOCK)
        if NORMALIZE == "softmax":
            shift = high
            scale = _softmax_scale(source, pixels, high, inverse_temperature, RECTIFY, BLOCK)
        else:
            shift = low
            if NORMALIZE == "minmax":
                centre = high
                spread = high - low
            else:
                centre, spread = _moments(source, pixels, low, high - low, total, RECTIFY, BLOCK)
            denominator = spread * (1.0 + eps) + TINY if RELATIVE else spread + eps
            # The reciprocal of what is smaller is infinite.
            denominator = tl.where(denominator < TINY, TINY, denominator)
            scale = tl.where(spread == 0.0, 0.0, tl.div_rn(1.0, denominator))
    return shift, centre, scale, spread


@triton.jit
def normalised(r, shift, centre, scale, inverse_temperature, NORMALIZE: tl.constexpr):
    """M of r, given what `statistics` says of its map."""
    if NORMALIZE == "minmax":
        return (r - shift) * scale
    elif NORMALIZE == "zscore":
        return ((r - shift) - centre) * scale
    elif NORMALIZE == "softmax":
        return tl.exp((r - shift) * inverse_temperature) * scale
    else:
        return r


@triton.jit
def _compared(
    r, target, spatial, p, inside, shift, centre, scale, shift_t, centre_t, scale_t, inverse_temperature,
    NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """M of the student's values r at the pixels p, the distances there and their derivatives with respect to M; 0 where not inside."""
    # Behind the map's end r is 0, of which softmax may make infinity: it would meet slopes of 0.
    m = tl.where(inside, normalised(r, shift, centre, scale, inverse_temperature, NORMALIZE), 0.0)
    r_t = tl.load(target + p, inside, 0.0)
    d = m - normalised(r_t, shift_t, centre_t, scale_t, inverse_temperature, NORMALIZE_T)
    weight = 1.0
    if spatial is not None:
        weight = tl.load(spatial + p, inside, 0.0)
        d *= weight
    d = tl.where(inside, d, 0.0)
    if DISTANCE == "l1":
        value, slope = tl.abs(d), sign(d)
    elif DISTANCE == "mse":
        value, slope = d * d, 2.0 * d
    else:
        small = tl.abs(d) < 1.0
        value, slope = tl.where(small, 0.5 * d * d, tl.abs(d) - 0.5), tl.where(small, d, sign(d))
    return m, value, slope * weight


@triton.jit
def map_forward(
    source, target, spatial, state, pixels, divisor, eps, temperature,
    RECTIFY: tl.constexpr, NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The distance of one level and image over `divisor`; stores its state.

    source, target: the student's map, which is rectified here, and the teacher's, (P,) fp32;   spatial: (P,) fp32 or None
    divisor:        fp32, see `divisor_of`
    """
    eps = tl.cast(eps, tl.float32)
    inverse_temperature = tl.div_rn(1.0, tl.cast(temperature, tl.float32))
    shift, centre, scale, spread = statistics(source, pixels, eps, inverse_temperature, NORMALIZE, RELATIVE, RECTIFY, BLOCK)
    shift_t, centre_t, scale_t, _ = statistics(target, pixels, eps, inverse_temperature, NORMALIZE_T, RELATIVE, "none", BLOCK)
    # A lane's ROWS pixels of a turn are added up before they meet the sums, which thus take few registers.
    LANES: tl.constexpr = BLOCK // ROWS
    index = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    values = tl.zeros([LANES], tl.float32)
    slopes = tl.zeros([LANES], tl.float32)
    products = tl.zeros([LANES], tl.float32)
    highest = tl.zeros([LANES], tl.float32)
    lowest = tl.zeros([LANES], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + index
        inside = p < pixels
        r = rectified(tl.load(source + p, inside, 0.0), RECTIFY)
        m, value, slope = _compared(
            r, target, spatial, p, inside, shift, centre, scale, shift_t, centre_t, scale_t, inverse_temperature,
            NORMALIZE, NORMALIZE_T, DISTANCE,
        )  # fmt: skip
        values += tl.sum(value, 0)
        slopes += tl.sum(slope, 0)
        products += tl.sum(slope * m, 0)
        if NORMALIZE == "minmax":
            highest += tl.sum(tl.where(inside & (r == centre), 1.0, 0.0), 0)
            lowest += tl.sum(tl.where(inside & (r == shift), 1.0, 0.0), 0)
    result = tl.sum(values, 0) / divisor
    count = pixels.to(tl.float32)
    a, b = 0.0, 0.0
    if NORMALIZE != "none":
        product = tl.sum(products, 0) / divisor
        if NORMALIZE == "softmax":
            a = product / count
        else:
            total = tl.sum(slopes, 0) / divisor
            if RELATIVE:
                product *= 1.0 + eps
            if NORMALIZE == "minmax":
                a = -product * scale / tl.sum(highest, 0)
                b = (product - total) * scale / tl.sum(lowest, 0)
            else:
                a = -total / count * scale
                b = tl.where(spread == 0.0, 0.0, product / count / spread)
    # sgn(NaN) is 0: a map of the teacher's that is not finite would give the student an innocent gradient.
    scale += result * 0.0
    tl.store(state, shift)
    tl.store(state + 1, centre)
    tl.store(state + 2, scale)
    tl.store(state + 3, shift_t)
    tl.store(state + 4, centre_t)
    tl.store(state + 5, scale_t)
    tl.store(state + 6, a)
    tl.store(state + 7, b)
    return result


@triton.jit
def map_gradient(
    source, target, spatial, state, cotangent, p, inside, divisor, temperature,
    RECTIFY: tl.constexpr, NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """Gradient of the distance of one level and image, times `cotangent`, with respect to the student's unrectified map at the pixels p.

    The arguments are those of `map_forward`, with the state that it stored; garbage where not `inside`.
    """
    inverse_temperature = tl.div_rn(1.0, tl.cast(temperature, tl.float32))
    raw = tl.load(source + p, inside, 0.0)
    r = rectified(raw, RECTIFY)
    shift, centre, scale, a, b = tl.load(state), tl.load(state + 1), tl.load(state + 2), tl.load(state + 6), tl.load(state + 7)
    m, _, slope = _compared(
        r, target, spatial, p, inside,
        shift, centre, scale, tl.load(state + 3), tl.load(state + 4), tl.load(state + 5), inverse_temperature,
        NORMALIZE, NORMALIZE_T, DISTANCE,
    )  # fmt: skip
    gradient = slope / divisor
    if NORMALIZE == "minmax":
        gradient = gradient * scale + tl.where(r == centre, a, 0.0) + tl.where(r == shift, b, 0.0)
    elif NORMALIZE == "zscore":
        gradient = gradient * scale + a - b * m
    elif NORMALIZE == "softmax":
        gradient = (gradient - a) * m * inverse_temperature
    else:
        # The scale is 0, or NaN where the value is not finite.
        gradient += scale
    if RECTIFY == "abs":
        gradient *= sign(raw)
    elif RECTIFY == "relu":
        gradient = tl.where(raw > 0, gradient, gradient * 0.0)
    return gradient * cotangent


@triton.jit
def divisor_of(images, pixels, AVERAGE: tl.constexpr):
    """N*H*W (`nhw`) or N (`n`), fp32."""
    if AVERAGE == "nhw":
        return images.to(tl.float32) * pixels.to(tl.float32)
    else:
        return images.to(tl.float32)


@triton.jit(do_not_specialize=["images"])
def map_distance_kernel(
    source, target, spatial, rows, state, images, indices, pixels, pixel_offsets, ends, eps, temperature,
    NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr, RELATIVE: tl.constexpr, AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a level and image."""
    level, n = locate(ends)
    size = pick_integer(pixels, level)
    base = pick_offset(pixel_offsets, level) + n.to(tl.int64) * size
    row = pick_integer(indices, level) * images + n
    if spatial is not None:
        spatial += base
    value = map_forward(
        source + base, target + base, spatial, state + row * 8, size, divisor_of(images, size, AVERAGE), eps, temperature,
        "none", NORMALIZE, NORMALIZE_T, DISTANCE, RELATIVE, BLOCK,
    )  # fmt: skip
    tl.store(rows + row, value)


@triton.jit(do_not_specialize=["images"])
def map_distance_backward_kernel(
    source, target, spatial, state, grad, result, images, indices, pixels, pixel_offsets, tiles, ends, temperature,
    NORMALIZE: tl.constexpr, NORMALIZE_T: tl.constexpr, DISTANCE: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a tile of BLOCK pixels."""
    level, program = locate(ends)
    size = pick_integer(pixels, level)
    n = program // pick_integer(tiles, level)
    p = (program % pick_integer(tiles, level)) * BLOCK + tl.arange(0, BLOCK)
    base = pick_offset(pixel_offsets, level) + n.to(tl.int64) * size
    row = pick_integer(indices, level) * images + n
    if spatial is not None:
        spatial += base
    gradient = map_gradient(
        source + base, target + base, spatial, state + row * 8, tl.load(grad + row), p, p < size, divisor_of(images, size, AVERAGE),
        temperature, "none", NORMALIZE, NORMALIZE_T, DISTANCE,
    )  # fmt: skip
    tl.store(result + base + p, gradient, p < size)


def map_distance(
    m_s: Tensor, m_t: Tensor, spatial: Tensor | None, images: int, pixels: Sequence[int],
    normalize: str, normalize_t: str, distance: str, eps: float, relative: bool, temperature: float, average: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The distances (L, N) and the state (L, N, STATE) of packed maps of `pixels` pixels a level, fp32."""
    rows = torch.empty(len(pixels), images, dtype=torch.float32, device=m_s.device)
    state = torch.empty(len(pixels), images, STATE, dtype=torch.float32, device=m_s.device)
    options = launch.parameters("map_distance", _forward_heuristic, [m_s], False)
    for grid, where, _, ends in _plan(images, tuple(pixels), None):
        map_distance_kernel[grid](
            m_s, m_t, spatial, rows, state, images, *where, ends, eps, temperature,
            NORMALIZE=normalize, NORMALIZE_T=normalize_t, DISTANCE=distance, RELATIVE=relative, AVERAGE=average, **options,
        )  # fmt: skip
    return rows, state


def map_distance_backward(
    m_s: Tensor, m_t: Tensor, spatial: Tensor | None, state: Tensor, grad: Tensor, images: int, pixels: Sequence[int],
    normalize: str, normalize_t: str, distance: str, eps: float, relative: bool, temperature: float, average: str,
) -> Tensor:  # fmt: skip
    """The packed gradient of m_s for the gradient (L, N) of the distances, given the state that they left; eps is in the state."""
    result = torch.empty_like(m_s)
    options: dict[str, Any] = launch.parameters("map_distance_backward", _backward_heuristic, [m_s], False)
    for grid, where, tiles, ends in _plan(images, tuple(pixels), options["BLOCK"]):
        map_distance_backward_kernel[grid](
            m_s, m_t, spatial, state, grad, result, images, *where, tiles, ends, temperature,
            NORMALIZE=normalize, NORMALIZE_T=normalize_t, DISTANCE=distance, AVERAGE=average, **options,
        )  # fmt: skip
    return result


@remembered
def _plan(
    images: int, pixels: tuple[int, ...], block: int | None
) -> tuple[tuple[tuple[int], Geometry, tuple[int, ...], tuple[int, ...]], ...]:
    """Of every launch the grid, the arguments indices, pixels and pixel_offsets, the tiles of an image, and ends; block None: one tile."""
    found = []
    for sizes in launches(images, (1,) * len(pixels), pixels) if images else ():
        tiles = tuple(1 if block is None else ceil_div(p, block) for p in sizes.pixels)
        ends = sizes.programs(tiles)
        where = integers(sizes.indices), integers(sizes.pixels), offsets(sizes.pixel_offsets)
        found.append(((ends[-1],), where, integers(tiles), integers(ends)))
    return tuple(found)


def _forward_heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    # A whole map of 67200 pixels goes through one program: many threads, each with several loads in flight. There are fewer programs than
    # multiprocessors: without maxnreg the assembler spills registers so that several would fit on one.
    return {"BLOCK": 4096, "num_warps": 16, "maxnreg": 128}


def _backward_heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    return {"BLOCK": 1024, "num_warps": 4}
