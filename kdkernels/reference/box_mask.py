"""`box_mask`: boxes rasterised onto the grids of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Boxes = Sequence[Tensor] | tuple[Tensor, Tensor]
# Elements of one (N, boxes, H, W) intermediate; more boxes are taken in several rounds.
CHUNK = 1 << 24
# DeFeat's level 0 takes boxes below twice this edge, in pixels; every further level twice as much.
FINEST_EDGE = 56.0


def pad_boxes(boxes: Boxes) -> Tensor:
    """(N, M, 4) fp32 from a list of (n_i, 4) or from (padded (N, M, 4), counts (N,)); rows without a box are 0, a box without area."""
    if is_padded(boxes):
        padded, counts = boxes
        real = torch.arange(padded.shape[1], device=padded.device) < counts.to(padded.device)[:, None]
        return torch.where(real[:, :, None], padded.float(), 0)
    if len(boxes) == 0:
        return torch.zeros(0, 0, 4)
    return torch.nn.utils.rnn.pad_sequence([b.float() for b in boxes], batch_first=True)


def is_padded(boxes: Boxes) -> bool:
    """Whether boxes are (padded, counts) and not one tensor an image."""
    return len(boxes) == 2 and boxes[0].dim() == 3


@torch.no_grad()
def box_mask(
    boxes: Boxes,
    image_size: tuple[int, int],
    level_sizes: Sequence[tuple[int, int]],
    kind: str = "gaussian",
    expand: float = 2.0,
    placement: str = "centered",
    inner_ones: bool = True,
    area_norm: bool = True,
) -> list[Tensor]:
    """Masks (N, H_l, W_l), fp32, one a level: the maximum over an image's boxes.

    boxes: xyxy in pixels of `image_size` = (height, width), clipped to it; a box without area or with a NaN is skipped.
    With xmin = floor(x1 * W / width), xmax = ceil(x2 * W / width), w = xmax - xmin, and the same for y:

    gaussian:    a window of round(expand * w) x round(expand * h) cells around the box, exp(-0.5 ((x - cx)/cx)^2) an axis with cx half
                 the window; 1 inside the box (`inner_ones`); all divided by the window's area (`area_norm`)  (released GKD code)
    exponential: the same with exp(-5e-5 (x - cx)^2) an axis  (released AID code)
    area:        1 / ((w + 1) (h + 1)) on xmin..xmax, ymin..ymax inclusive  (FGD)
    binary:      1 on the box's cells
    assigned:    1 on floor(x1 * W / width) <= u < floor(x2 * W / width) (one cell if that is empty), on the one level
                 clamp(floor(log2(sqrt(area) / 56)), 0, L - 1)  (DeFeat)
    background:  1 where `gaussian` is 0, divided by the number of those cells, 0 if there are none
    placement `released` puts the window where the released code does: [2 ymin, 2 ymax) x [2 xmin, 2 xmax) of a (2H, 2W) canvas of
    which the centre is kept.
    """
    padded = pad_boxes(boxes)
    height, width = image_size
    low, high = padded[..., :2], padded[..., 2:]
    extent = torch.stack([padded.new_full((), width), padded.new_full((), height)])
    low, high = (torch.minimum(v.clamp(min=0), extent) for v in (low, high))
    real = (high > low).all(-1)
    # Thresholds on the area are exact where a logarithm is not.
    area = (high - low).prod(-1)
    level_of = sum((area >= (FINEST_EDGE * 2.0**k) ** 2).to(torch.int32) for k in range(1, len(level_sizes)))

    masks = []
    for level, (rows, columns) in enumerate(level_sizes):
        cells = torch.stack([padded.new_full((), columns), padded.new_full((), rows)])
        # The product first, and a tensor as divisor: a Python number would become a multiplication by its reciprocal on CUDA.
        first, last = (low * cells / extent).floor(), high * cells / extent
        last = last.floor() if kind == "assigned" else last.ceil()
        chosen = real
        if kind == "assigned":
            chosen = real & (level_of == level)
            last = torch.where((last <= first).any(-1, keepdim=True), first + 1, last)
        x = _axis(first[..., 0], last[..., 0], columns, kind, expand, placement, inner_ones)
        y = _axis(first[..., 1], last[..., 1], rows, kind, expand, placement, inner_ones)
        normed = kind == "area" or (area_norm and kind in ("gaussian", "exponential", "background"))
        weight = 1 / (x[2] * y[2]).clamp(min=1) if normed else torch.ones_like(x[2])
        mask = _outer_max(x, y, torch.where(chosen, weight, 0))
        masks.append(background(mask) if kind == "background" else mask)
    return masks


def background(mask: Tensor) -> Tensor:
    """1 where mask (N, H, W) is 0, divided by the number of those cells; 0 where an image has none."""
    empty = (mask == 0).float()
    return empty / empty.sum((1, 2), keepdim=True).clamp(min=1)


def _axis(
    first: Tensor, last: Tensor, cells: int, kind: str, expand: float, placement: str, inner_ones: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One axis of the windows (N, M): profile (N, M, cells), the box's own cells (N, M, cells) or None, window length (N, M)."""
    u = torch.arange(cells, device=first.device, dtype=first.dtype)
    size = last - first
    if kind in ("binary", "assigned", "area"):
        length = size + 1 if kind == "area" else size
        x = u - first[..., None]
        return ((x >= 0) & (x < length[..., None])).float(), None, length
    length = torch.floor(expand * size + 0.5)
    gap = torch.floor((length - size) / 2)
    start = 2 * first - cells // 2 if placement == "released" else first - gap
    x, half = u - start[..., None], (length / 2)[..., None]
    window = (x >= 0) & (x < length[..., None])
    exponent = -5e-5 * (x - half).square() if kind == "exponential" else -0.5 * ((x - half) / half).square()
    profile = torch.where(window, exponent.exp(), 0)
    own = (window & (x >= gap[..., None]) & (x < (gap + size)[..., None])).float() if inner_ones else None
    return profile, own, length


def _outer_max(x: tuple[Tensor, Tensor | None, Tensor], y: tuple[Tensor, Tensor | None, Tensor], scale: Tensor) -> Tensor:
    """max over boxes of scale * max(profile_y x profile_x, own_y x own_x): (N, H, W).

    The profiles are at most 1, so the inner maximum puts 1 on the box's own cells.
    """
    n, m, columns = x[0].shape
    rows = y[0].shape[2]
    mask = x[0].new_zeros(n, rows, columns)
    step = max(1, CHUNK // max(1, n * rows * columns))
    for start in range(0, m, step):
        part = slice(start, start + step)
        value = (y[0][:, part] * scale[:, part, None])[..., None] * x[0][:, part, None]
        if x[1] is not None and y[1] is not None:
            value = torch.maximum(value, (y[1][:, part] * scale[:, part, None])[..., None] * x[1][:, part, None])
        mask = torch.maximum(mask, value.amax(1))
    return mask
