"""Box masks, cell by cell and box by box, with the box arithmetic in fp32."""

from __future__ import annotations

import math

import numpy as np

from .numeric import array, zeros

F = np.float32


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def clip(box, image_size: tuple[int, int]) -> tuple[np.float32, ...] | None:
    """The box cut to the image in fp32, or None where nothing is left of it."""
    x1, y1, x2, y2 = (F(value) for value in box)
    if any(math.isnan(value) for value in (x1, y1, x2, y2)):
        return None
    height, width = F(image_size[0]), F(image_size[1])
    x1, x2 = min(max(x1, F(0)), width), min(max(x2, F(0)), width)
    y1, y2 = min(max(y1, F(0)), height), min(max(y2, F(0)), height)
    return None if x2 <= x1 or y2 <= y1 else (x1, y1, x2, y2)


def cells(box: tuple[np.float32, ...], image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """xmin, ymin (floor), xmax, ymax (ceil) on a grid of size (H, W): fp32, product before quotient."""
    x1, y1, x2, y2 = box
    height, width = size
    left, right = math.floor(F(x1 * F(width)) / F(image_size[1])), math.ceil(F(x2 * F(width)) / F(image_size[1]))
    top, bottom = math.floor(F(y1 * F(height)) / F(image_size[0])), math.ceil(F(y2 * F(height)) / F(image_size[0]))
    return left, top, right, bottom


def _window_value(kind: str, x: int, y: int, window_w: int, window_h: int) -> float:
    dx, dy = x - window_w / 2, y - window_h / 2
    if kind == "exponential":
        return math.exp(-5e-5 * (dx * dx + dy * dy))
    return math.exp(-0.5 * (dx / (window_w / 2)) ** 2) * math.exp(-0.5 * (dy / (window_h / 2)) ** 2)


def _one_box(
    kind: str, grid: tuple[int, int, int, int], u: int, v: int, size, expand: float, placement: str, inner_ones: bool, area_norm: bool
) -> float:
    """The mask of one box at column u, row v."""
    left, top, right, bottom = grid
    w, h = right - left, bottom - top
    inside = left <= u < right and top <= v < bottom
    if kind == "area":
        return 1.0 / ((w + 1) * (h + 1)) if left <= u <= right and top <= v <= bottom else 0.0
    if kind in ("binary", "assigned"):
        return float(inside)
    window_w, window_h = _round(expand * w), _round(expand * h)
    gap_x, gap_y = math.floor((window_w - w) / 2), math.floor((window_h - h) / 2)
    if placement == "centered":
        x, y = u - (left - gap_x), v - (top - gap_y)
    else:
        # The canvas is (2H, 2W), the window starts at (2 ymin, 2 xmin) and the canvas is cropped at its centre.
        x, y = u + size[1] // 2 - 2 * left, v + size[0] // 2 - 2 * top
    if not (0 <= x < window_w and 0 <= y < window_h):
        return 0.0
    norm = window_w * window_h if area_norm else 1
    if inner_ones and gap_x <= x < gap_x + w and gap_y <= y < gap_y + h:
        return 1.0 / norm
    return _window_value(kind, x, y, window_w, window_h) / norm


def assigned_level(box: tuple[np.float32, ...], levels: int) -> int:
    """DeFeat's level of a box: floor(log2(sqrt(area) / 56)), kept in the pyramid."""
    scale = math.sqrt(float(box[2] - box[0]) * float(box[3] - box[1]))
    return min(max(math.floor(math.log2(scale / 56)), 0), levels - 1)


def _truncated(box: tuple[np.float32, ...], grid: tuple[int, int, int, int], image_size, size) -> tuple[int, int, int, int]:
    """The grid with xmax and ymax cut to whole cells as DeFeat does; where an axis has none left, the first cell alone."""
    left, top, _, _ = grid
    right = math.floor(F(box[2] * F(size[1])) / F(image_size[1]))
    bottom = math.floor(F(box[3] * F(size[0])) / F(image_size[0]))
    return (left, top, left + 1, top + 1) if right == left or bottom == top else (left, top, right, bottom)


def box_mask(
    boxes: list[np.ndarray],
    image_size: tuple[int, int],
    level_sizes: list[tuple[int, int]],
    kind: str = "gaussian",
    expand: float = 2.0,
    placement: str = "centered",
    inner_ones: bool = True,
    area_norm: bool = True,
) -> list[np.ndarray]:
    """(N, H, W) a level, in fp32: the maximum over the boxes of an image; "background" is 1 / count where the gaussian mask is 0."""
    out = []
    for level, (height, width) in enumerate(level_sizes):
        mask = zeros(len(boxes), height, width)
        for n, image_boxes in enumerate(boxes):
            kept = [kept for kept in (clip(box, image_size) for box in image_boxes) if kept is not None]
            for box in kept:
                grid = cells(box, image_size, (height, width))
                if kind == "assigned":
                    if assigned_level(box, len(level_sizes)) != level:
                        continue
                    grid = _truncated(box, grid, image_size, (height, width))
                shape = "gaussian" if kind == "background" else kind
                for v in range(height):
                    for u in range(width):
                        value = _one_box(shape, grid, u, v, (height, width), expand, placement, inner_ones, area_norm)
                        mask[n][v][u] = max(mask[n][v][u], value)
        result = array(mask, len(boxes), height, width)
        out.append((background(result) if kind == "background" else result).astype(F).astype(np.float64))
    return out


def background(foreground: np.ndarray) -> np.ndarray:
    """M_bg = 1[M_fg == 0] / count per image, in fp32; 0 where the boxes leave no background."""
    count, height, width = foreground.shape
    out = zeros(count, height, width)
    for n in range(count):
        free = [(v, u) for v in range(height) for u in range(width) if foreground[n, v, u] == 0.0]
        for v, u in free:
            out[n][v][u] = float(F(1.0 / len(free)))
    return array(out, count, height, width)
