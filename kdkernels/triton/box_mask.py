"""Boxes rasterised onto the grids of a pyramid: one launch for all levels, and a second one where the cells left empty share 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.box_mask import FINEST_EDGE
from . import launch
from .levels import Geometry, ceil_div, integers, launches, locate, offsets, pick_integer, pick_offset, remembered

_ASSIGNED_FROM = tl.constexpr((2 * FINEST_EDGE) ** 2)
_LOG2_E = tl.constexpr(1.4426950216293335)
# What fp32 leaves of log2(e).
_LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)
_LN_2 = tl.constexpr(math.log(2))
# exp is 0 in fp32 below -103.97.
_EXP_END = tl.constexpr(-128.0)
_SMALL = tl.constexpr(2.0**-64)


@triton.jit
def _place(rows, columns, starts, ends, BLOCK: tl.constexpr):
    """This program's level, image and tile, the tiles of an image, the sides of the image's mask, and where that begins."""
    level, program = locate(ends)
    height, width = pick_integer(rows, level), pick_integer(columns, level)
    tiles = tl.cdiv(height * width, BLOCK)
    image = program // tiles
    start = pick_offset(starts, level) + image.to(tl.int64) * (height * width)
    return level, image, program - image * tiles, tiles, height, width, start


@triton.jit
def _clipped(x, end):
    # By comparisons that are false for NaN: it must reach the test of the area.
    return tl.where(x < 0, 0.0, tl.where(x > end, end, x))


@triton.jit
def _cells(low, high, cells, extent, KIND: tl.constexpr):
    """First and last + 1 of the cells of low..high on one axis; the product comes before the quotient, which is IEEE division."""
    first = tl.floor(tl.div_rn(low * cells, extent))
    last = tl.div_rn(high * cells, extent)
    if KIND == "assigned":
        return first, tl.floor(last)
    else:
        # Compiled, tl.ceil takes the smallest numbers above 0 for 0.
        return first, tl.maximum(tl.ceil(last), (last > 0).to(tl.float32))


@triton.jit
def _window(first, last, cells, expand, KIND: tl.constexpr, RELEASED: tl.constexpr):
    """Start and length of the window on one axis, and how far within it the box begins."""
    size = last - first
    if KIND == "area":
        return first, size + 1, 0.0
    elif KIND == "binary" or KIND == "assigned":
        return first, size, 0.0
    else:
        length = tl.floor(expand * size + 0.5)
        gap = tl.floor((length - size) * 0.5)
        if RELEASED:
            return 2 * first - (cells // 2).to(tl.float32), length, gap
        else:
            return first - gap, length, gap


@triton.jit
def _exp(x):
    """exp(x) for x <= 0, as exact for long distances as for short ones: the rounding error of x * log2(e) is made good."""
    x = tl.maximum(x, _EXP_END)
    power = x * _LOG2_E
    rest = tl.fma(x, _LOG2_E, -power) + x * _LOG2_E_REST
    # tl.exp2 makes 0 of the smallest numbers, and with it cells empty that are not.
    small = power < -64
    return tl.exp2(tl.where(small, power + 64, power)) * (1 + rest * _LN_2) * tl.where(small, _SMALL, 1.0)


@triton.jit
def _profile(x, length, KIND: tl.constexpr):
    """The window's profile on one axis at x cells from its start."""
    half = length * 0.5
    if KIND == "exponential":
        return _exp((x - half) * (x - half) * -5e-5)
    else:
        distance = (x - half) * (1.0 / half)
        return _exp(distance * distance * -0.5)


@triton.jit
def _within(x, start, length):
    return (x >= start) & (x < start + length)


@triton.jit
def _on_level(area, index, levels):
    """Whether boxes of this area, in pixels, belong to level `index` of `levels` when each belongs to one."""
    level = 0
    least = tl.full((), _ASSIGNED_FROM, tl.float32)
    for _ in range(1, levels):
        level += (area >= least).to(tl.int32)
        least *= 4
    return level == index


@triton.jit(do_not_specialize=("most", "levels"), do_not_specialize_on_alignment=("boxes", "counts"))
def _rasterise(
    boxes,
    counts,
    masks,
    empty_cells,
    rows,
    columns,
    starts,
    ends,
    indices,
    levels,
    most,
    height,
    width,
    expand,
    KIND: tl.constexpr,
    RELEASED: tl.constexpr,
    INNER_ONES: tl.constexpr,
    AREA_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program = tile of BLOCK cells, row by row, of one image's mask on one level: the maximum over the image's boxes, one by one.

    boxes (N, most, 4) fp32, xyxy in pixels; counts (N,) integers. For the background the cells that no box reaches are written as 1 and
    counted, by program, in `empty_cells`.
    """
    level, image, tile, _, height_of_level, width_of_level, mask_start = _place(rows, columns, starts, ends, BLOCK)
    pixels = height_of_level * width_of_level
    start = tile * BLOCK
    pixel = start + tl.arange(0, BLOCK)
    row = pixel // width_of_level
    u, v = (pixel - row * width_of_level).to(tl.float32), row.to(tl.float32)
    first_v = (start // width_of_level).to(tl.float32)
    last_v = ((tl.minimum(start + BLOCK, pixels) - 1) // width_of_level).to(tl.float32)
    height, width, expand = tl.cast(height, tl.float32), tl.cast(width, tl.float32), tl.cast(expand, tl.float32)

    mask = tl.zeros((BLOCK,), tl.float32)
    box = boxes + image.to(tl.int64) * most * 4
    for _ in range(tl.minimum(tl.load(counts + image), most).to(tl.int32)):
        x1, x2 = _clipped(tl.load(box), width), _clipped(tl.load(box + 2), width)
        y1, y2 = _clipped(tl.load(box + 1), height), _clipped(tl.load(box + 3), height)
        box += 4
        chosen = (x2 > x1) & (y2 > y1)
        if KIND == "assigned":
            chosen = chosen & _on_level((x2 - x1) * (y2 - y1), pick_integer(indices, level), levels)
        if chosen:
            first_y, end_y = _cells(y1, y2, height_of_level.to(tl.float32), height, KIND)
            first_x, end_x = _cells(x1, x2, width_of_level.to(tl.float32), width, KIND)
            if KIND == "assigned":
                none = (end_x <= first_x) | (end_y <= first_y)
                end_x, end_y = tl.where(none, first_x + 1, end_x), tl.where(none, first_y + 1, end_y)
            start_y, length_y, gap_y = _window(first_y, end_y, height_of_level, expand, KIND, RELEASED)
            # Most boxes end above a tile or begin below it.
            if (last_v >= start_y) & (first_v - start_y < length_y):
                start_x, length_x, gap_x = _window(first_x, end_x, width_of_level, expand, KIND, RELEASED)
                x, y = u - start_x, v - start_y
                window = _within(x, 0.0, length_x) & _within(y, 0.0, length_y)
                weight = 1.0
                if AREA_NORM:
                    weight = tl.div_rn(1.0, tl.maximum(length_x * length_y, 1.0))
                if KIND == "gaussian" or KIND == "exponential":
                    value = _profile(y, length_y, KIND) * weight * _profile(x, length_x, KIND)
                    if INNER_ONES:
                        own = _within(x, gap_x, end_x - first_x) & _within(y, gap_y, end_y - first_y)
                        value = tl.where(own, weight, value)
                    mask = tl.where(window, tl.maximum(mask, value), mask)
                else:
                    mask = tl.where(window, tl.maximum(mask, weight), mask)

    valid = pixel < pixels
    if KIND == "background":
        mask = (mask == 0).to(tl.float32)
        tl.store(empty_cells + tl.program_id(0), tl.sum(tl.where(valid, mask, 0.0)))
    tl.store(masks + mask_start + pixel, mask, valid)


@triton.jit
def _share(masks, empty_cells, rows, columns, starts, ends, BLOCK: tl.constexpr):
    """Divides the empty cells, marked 1, by their number in the image: the sum over the image's tiles, whole numbers in fp32."""
    _, _, tile, tiles, height, width, mask_start = _place(rows, columns, starts, ends, BLOCK)
    empty_cells += tl.program_id(0) - tile
    part = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, BLOCK):
        chosen = first + tl.arange(0, BLOCK)
        part += tl.load(empty_cells + chosen, chosen < tiles, 0.0)
    weight = tl.div_rn(1.0, tl.maximum(tl.sum(part), 1.0))
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < height * width
    masks += mask_start + pixel
    tl.store(masks, tl.load(masks, valid, 0.0) * weight, valid)


def heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    """Small enough tiles for a launch of a few images to fill the device, large enough to share a box's arithmetic."""
    return {"BLOCK": 512, "num_warps": 4}


def box_mask(
    boxes: Tensor,
    counts: Tensor,
    image_size: Sequence[float],
    sizes: Sequence[int],
    kind: str,
    expand: float,
    released: bool,
    inner_ones: bool,
    area_norm: bool,
) -> Tensor:
    """Packed masks of `kdkernels.reference.box_mask`, fp32.

    boxes (N, M, 4) fp32, counts (N,) integers on the same device, image_size (height, width), sizes H_0, W_0, H_1, W_1, ...
    """
    images, most, _ = boxes.shape
    pixels = [h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
    masks = torch.empty(images * sum(pixels), dtype=torch.float32, device=boxes.device)
    if masks.numel() == 0:
        return masks
    boxes, counts = boxes.contiguous(), counts.contiguous()
    chosen = launch.parameters("box_mask", heuristic, [boxes], False)
    # A multiplication and an addition in one rounding would move ties of the window's length.
    options = {**chosen, "enable_fp_fusion": False}
    profiled = kind in ("gaussian", "exponential")
    windowed = profiled or kind == "background"
    for programs, geometry, indices in _plan(images, tuple(sizes), chosen["BLOCK"]):
        empty_cells = masks.new_empty(programs) if kind == "background" else masks
        _rasterise[programs](
            boxes,
            counts,
            masks,
            empty_cells,
            *geometry,
            indices,
            len(pixels),
            most,
            float(image_size[0]),
            float(image_size[1]),
            float(expand),
            KIND=kind,
            RELEASED=released and windowed,
            INNER_ONES=inner_ones and profiled,
            AREA_NORM=kind == "area" or (area_norm and windowed),
            **options,
        )
        if kind == "background":
            _share[programs](masks, empty_cells, *geometry, **options)
    return masks


@remembered
def _plan(images: int, sizes: tuple[int, ...], block: int) -> tuple[tuple[tuple[int], Geometry, tuple[int, ...]], ...]:
    """Of every launch the grid, the arguments rows, columns, starts and ends of both kernels, and indices."""
    rows, columns = sizes[::2], sizes[1::2]
    pixels = tuple(h * w for h, w in zip(rows, columns, strict=True))
    found = []
    for part in launches(images, (1,) * len(pixels), pixels):
        ends = part.programs([ceil_div(p, block) for p in part.pixels])
        sides = integers(rows[i] for i in part.indices), integers(columns[i] for i in part.indices)
        found.append(((ends[-1],), (*sides, offsets(part.pixel_offsets), integers(ends)), integers(part.indices)))
    return tuple(found)
