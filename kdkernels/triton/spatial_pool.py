"""`spatial_pool`: the weights that a map gives its pixels, and the means under them, on the read pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .channel_sums import channel_sums
from .levels import Geometry, ceil_div, integers, launches, locate, offsets, pick_integer, pick_offset, remembered, sizes_of
from .reduce import reduce

#: Below all that a map may hold but -inf, whose difference from itself would be NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _place(pixels, pixel_offsets, programs, ends):
    """Of this program the pixels of its level, where its image begins in packed maps, and its number within the image."""
    level, program = locate(ends)
    size = pick_integer(pixels, level)
    n = (program // pick_integer(programs, level)).to(tl.int64)
    return size, pick_offset(pixel_offsets, level) + n * size, program % pick_integer(programs, level)


@triton.jit
def _statistics(a, pixels, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of a map and the sum of exp(a - maximum); without softmax 0 and the sum of a."""
    # Every lane keeps its own, so that nothing crosses lanes within the loop.
    largest = tl.full([BLOCK], _LOWEST if SOFTMAX else 0.0, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        value = tl.load(a + p, p < pixels, _LOWEST if SOFTMAX else 0.0)
        if SOFTMAX:
            risen = tl.maximum(largest, value)
            total = total * tl.exp(largest - risen) + tl.where(p < pixels, tl.exp(value - risen), 0.0)
            largest = risen
        else:
            total += value
    maximum = tl.max(largest, 0)
    if SOFTMAX:
        total *= tl.exp(largest - maximum)
    return maximum, tl.sum(total, 0)


@triton.jit
def pool_weights_kernel(
    a, out, pixels, pixel_offsets, programs, ends, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """A program writes STEPS * BLOCK weights. The sum of the whole map it works out for itself: that is small and lies in the L2 cache."""
    size, base, part = _place(pixels, pixel_offsets, programs, ends)
    maximum, total = _statistics(a + base, size, SOFTMAX, BLOCK)
    first = part * (STEPS * BLOCK)
    for start in range(first, min(first + STEPS * BLOCK, size), BLOCK):
        p = start + tl.arange(0, BLOCK)
        value = tl.load(a + base + p, p < size, _LOWEST if SOFTMAX else 0.0)
        if SOFTMAX:
            weight = tl.div_rn(tl.exp(value - maximum), total)
        else:
            weight = tl.where(total == 0, 0.0, tl.div_rn(value, tl.where(total == 0, 1.0, total)))
        tl.store(out + base + p, weight, p < size)


@triton.jit
def pool_weights_backward_kernel(
    weights, grad, a, out, pixels, pixel_offsets, programs, ends, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """The gradient of a, by programs as in `pool_weights_kernel`: (grad - sum(grad * weights)) times the weight, or over the sum of a."""
    size, base, part = _place(pixels, pixel_offsets, programs, ends)
    product = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        p = base + start + tl.arange(0, BLOCK)
        inside = p < base + size
        product += tl.load(weights + p, inside, 0.0) * tl.load(grad + p, inside, 0.0)
        if not SOFTMAX:
            total += tl.load(a + p, inside, 0.0)
    mean = tl.sum(product, 0)
    summed = tl.sum(total, 0)
    first = part * (STEPS * BLOCK)
    for start in range(first, min(first + STEPS * BLOCK, size), BLOCK):
        p = base + start + tl.arange(0, BLOCK)
        inside = p < base + size
        over = tl.load(grad + p, inside, 0.0) - mean
        if SOFTMAX:
            value = tl.load(weights + p, inside, 0.0) * over
        else:
            value = tl.where(summed == 0, 0.0, tl.div_rn(over, tl.where(summed == 0, 1.0, summed)))
        tl.store(out + p, value, inside)


def pool_weights(a: Tensor, images: int, pixels: Sequence[int], softmax: bool) -> Tensor:
    """Weights of the pixels of packed maps, fp32, of `pixels` pixels a level: a over the sum of its map, 0 where that is 0, or softmax."""
    out = torch.empty_like(a)
    options = launch.parameters("pool_weights", _heuristic, [a], False)
    for grid, geometry in _plan(images, tuple(pixels), options["BLOCK"] * options["STEPS"]):
        pool_weights_kernel[grid](a, out, *geometry, SOFTMAX=softmax, **options)
    return out


def pool_weights_backward(weights: Tensor, grad: Tensor, a: Tensor, images: int, pixels: Sequence[int], softmax: bool) -> Tensor:
    """The gradient of a for that of the weights that `pool_weights` made of it, all packed."""
    out = torch.empty_like(a)
    options = launch.parameters("pool_weights_backward", _heuristic, [a], False)
    for grid, geometry in _plan(images, tuple(pixels), options["BLOCK"] * options["STEPS"]):
        pool_weights_backward_kernel[grid](weights, grad, a, out, *geometry, SOFTMAX=softmax, **options)
    return out


def spatial_pool(x: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_hw weights * x. x: levels (N, C, H, W), at least one; weights: packed (N, H, W). Returns packed (N, C), fp32."""
    _, channels, _ = sizes_of(x)
    parts = reduce(x, channel="signed", pixel_weights=weights).channel
    assert parts is not None
    return channel_sums(parts, channels, [1] * len(x))


def _heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    # As for `attention`: a whole map goes through every program, with many threads and loads of each in flight. Without maxnreg the
    # assembler spills registers so that several programs would fit on one multiprocessor.
    return {"BLOCK": 4096, "STEPS": 4, "num_warps": 16, "maxnreg": 128}


@remembered
def _plan(images: int, pixels: tuple[int, ...], run: int) -> tuple[tuple[tuple[int], Geometry], ...]:
    """Grid of every launch, and the arguments pixels, pixel_offsets, programs and ends."""
    found = []
    for sizes in launches(images, (1,) * len(pixels), pixels) if images else ():
        programs = tuple(ceil_div(p, run) for p in sizes.pixels)
        ends = sizes.programs(programs)
        found.append(((ends[-1],), (integers(sizes.pixels), offsets(sizes.pixel_offsets), integers(programs), integers(ends))))
    return tuple(found)
