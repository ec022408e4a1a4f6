"""Masks of boxes besides the windows: each kind for all boxes at once, and as the published codes make it, box by box with slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .vectorised import CHUNK

Boxes = tuple[Tensor, Tensor]
Sizes = Sequence[tuple[int, int]]
#: DeFeat's first level takes boxes of edges below twice this, in pixels; every further one twice as much.
EDGE = 56.0


def area(boxes: Boxes, image_size: tuple[int, int], level_sizes: Sizes) -> list[Tensor]:
    """FGD's: 1 / cells on a box's cells, its last one included, (N, H, W) a level."""
    low, high, real = _clipped(boxes, image_size)
    masks = []
    for size in level_sizes:
        first, last = _cells(low, image_size, size).floor(), _cells(high, image_size, size).ceil()
        # Clipped boxes end at the last cell exactly; a compiler's approximate division may say a little more.
        last = torch.minimum(last, last.new_tensor((size[1], size[0])))
        masks.append(_largest(first, last + 1, torch.where(real, 1 / (last - first + 1).prod(-1), 0), size))
    return masks


def assigned(boxes: Boxes, image_size: tuple[int, int], level_sizes: Sizes) -> list[Tensor]:
    """DeFeat's: 1 on a box's cells, at least one, of the level for its size."""
    low, high, real = _clipped(boxes, image_size)
    extent = (high - low).prod(-1)
    level_of = torch.stack([extent >= (EDGE * 2.0**k) ** 2 for k in range(1, len(level_sizes) + 1)])[: len(level_sizes) - 1].sum(0)
    masks = []
    for level, size in enumerate(level_sizes):
        first, last = (_cells(x, image_size, size).floor() for x in (low, high))
        last = torch.where((last <= first).any(-1, keepdim=True), first + 1, last)
        masks.append(_largest(first, last, (real & (level_of == level)).float(), size))
    return masks


def _clipped(boxes: Boxes, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Both corners (N, M, 2) in the image, and which boxes have an area there; M is at least 1."""
    padded, counts = F.pad(boxes[0], (0, 0, 0, 1)), boxes[1]
    extent = padded.new_tensor((image_size[1], image_size[0]))
    low, high = (torch.minimum(x.clamp(min=0), extent) for x in (padded[..., :2], padded[..., 2:]))
    return low, high, (torch.arange(padded.shape[1], device=padded.device) < counts[:, None]) & (high > low).all(-1)


def _cells(corner: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return corner * corner.new_tensor((size[1], size[0])) / corner.new_tensor((image_size[1], image_size[0]))


def _largest(first: Tensor, end: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W): the largest weight (N, M) of the boxes over a cell, which are of the cells first .. end - 1, (N, M, 2)."""
    x, y = (
        (u >= first[..., k, None]) & (u < end[..., k, None]) for k, u in enumerate(torch.arange(n, device=first.device) for n in size[::-1])
    )
    mask = weight.new_zeros(weight.shape[0], *size)
    step = max(1, CHUNK // mask.numel())
    for some in (slice(start, start + step) for start in range(0, weight.shape[1], step)):
        inside = y[:, some, :, None] & x[:, some, None]
        mask = torch.maximum(mask, torch.where(inside, weight[:, some, None, None], 0).amax(1))
    return mask


def area_by_box(boxes: Boxes, image_size: tuple[int, int], level_sizes: Sizes) -> list[Tensor]:
    masks = [boxes[0].new_zeros(len(boxes[0]), *size) for size in level_sizes]
    for n, _, low, high in _by_box(boxes, image_size):
        for mask, size in zip(masks, level_sizes, strict=True):
            (x1, y1), (x2, y2) = _cells(low, image_size, size).floor().int().tolist(), _cells(high, image_size, size).ceil().int().tolist()
            part = mask[n, y1 : y2 + 1, x1 : x2 + 1]
            part.copy_(torch.maximum(part, part.new_tensor(1.0 / (x2 + 1 - x1) / (y2 + 1 - y1))))
    return masks


def assigned_by_box(boxes: Boxes, image_size: tuple[int, int], level_sizes: Sizes) -> list[Tensor]:
    masks = [boxes[0].new_zeros(len(boxes[0]), *size) for size in level_sizes]
    for n, extent, low, high in _by_box(boxes, image_size):
        level = sum(extent >= (EDGE * 2.0**k) ** 2 for k in range(1, len(level_sizes)))
        size = level_sizes[level]
        (x1, y1), (x2, y2) = (_cells(corner, image_size, size).floor().int().tolist() for corner in (low, high))
        if x2 <= x1 or y2 <= y1:
            x2, y2 = x1 + 1, y1 + 1
        masks[level][n, y1:y2, x1:x2] = 1
    return masks


def _by_box(boxes: Boxes, image_size: tuple[int, int]) -> Iterator[tuple[int, float, Tensor, Tensor]]:
    """Image, pixels and corners of every box with an area."""
    low, high, real = _clipped(boxes, image_size)
    for n, k in real.nonzero().tolist():
        yield n, float((high[n, k] - low[n, k]).prod()), low[n, k], high[n, k]


def background(masks: list[Tensor]) -> list[Tensor]:
    """FGD's: 1 where a mask is 0, over the number of such cells of the image."""
    empty = [(m == 0).float() for m in masks]
    return [x / x.sum((1, 2), keepdim=True).clamp(min=1) for x in empty]


def background_by_image(masks: list[Tensor]) -> list[Tensor]:
    found = []
    for mask in masks:
        empty = torch.where(mask > 0, 0.0, 1.0)
        for n in range(len(empty)):
            if torch.sum(empty[n]):
                empty[n] /= torch.sum(empty[n])
        found.append(empty)
    return found
