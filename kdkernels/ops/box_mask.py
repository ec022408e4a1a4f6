"""`box_mask`: boxes rasterised onto the grids of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define
from ..pyramid import check_choice, unpack
from ..reference.box_mask import Boxes, background, is_padded
from ..reference.box_mask import box_mask as reference

__all__ = ["background", "box_mask", "check_boxes", "check_mask_options"]
KINDS = ("gaussian", "exponential", "area", "binary", "assigned", "background")
PLACEMENTS = ("centered", "released")


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
    """Masks (N, H_l, W_l), fp32, one a level, on the boxes' device: the maximum over an image's boxes.

    boxes: list of (n_i, 4) xyxy in pixels, one an image, or (padded (N, M, 4), counts (N,)); any real dtype, taken as fp32.
    image_size: (height, width) in pixels that the features cover; level_sizes: (H_l, W_l) a level.
    kind gaussian | exponential | area | binary | assigned | background: formulas in `kdkernels.reference.box_mask`.
    expand, placement (centered | released), inner_ones and area_norm are of gaussian, exponential and background only;
    `released` is defined for expand=2.
    Nothing on the host depends on the boxes' values. Raises ValueError for boxes of another shape or options that are not defined.
    """
    check_mask_options(kind, expand, placement)
    check_boxes(boxes)
    if len(image_size) != 2 or not min(image_size) > 0:
        raise ValueError(f"image_size must be (height, width) in pixels, both above 0; got {image_size}")
    for level, size in enumerate(level_sizes):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"level_sizes, level {level}: wanted (H, W), both at least 1; got {tuple(size)}")
    arguments = (boxes, image_size, level_sizes, kind, expand, placement, inner_ones, area_norm)
    if len(boxes) == 0:
        return reference(*arguments)
    # Counts may lie elsewhere: they follow their boxes.
    return backend.call("box_mask", boxes[:1] if is_padded(boxes) else boxes, *arguments)


def _fake(boxes: Tensor, counts: Tensor, image_size: Sequence[float], sizes: Sequence[int], *options: Any) -> Tensor:
    cells = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    return boxes.new_empty(boxes.shape[0] * cells, dtype=torch.float32)


_operator = define(
    "box_mask",
    "(Tensor boxes, Tensor counts, float[] image_size, SymInt[] sizes, str kind, float expand, bool released, bool inner_ones, "
    "bool area_norm) -> Tensor",
    _fake,
)


@torch.no_grad()
def fused(
    name: str,
    boxes: Boxes,
    image_size: tuple[int, int],
    level_sizes: Sequence[tuple[int, int]],
    kind: str,
    expand: float,
    placement: str,
    inner_ones: bool,
    area_norm: bool,
) -> list[Tensor]:
    """`box_mask` by the kernels of backend `name`: one operator for all levels. Neither values nor counts of boxes come to the host."""
    if len(level_sizes) == 0:
        return []
    padded, counts = _padded(boxes)
    sizes = [side for size in level_sizes for side in size]
    extent = [float(side) for side in image_size]
    packed = _operator(name, padded, counts, extent, sizes, kind, float(expand), placement == "released", inner_ones, area_norm)
    return unpack(packed, [(padded.shape[0], *size) for size in level_sizes])


def _padded(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """(N, M, 4) fp32 and counts (N,) on one device. A list's missing boxes are 0 and counted: boxes without area are none."""
    if is_padded(boxes):
        padded, counts = boxes
        return padded.float(), counts.to(padded.device, non_blocking=True)
    padded = torch.nn.utils.rnn.pad_sequence([b.float() for b in boxes], batch_first=True)
    return padded, torch.full(padded.shape[:1], padded.shape[1], dtype=torch.int32, device=padded.device)


def check_mask_options(kind: str, expand: float, placement: str) -> None:
    """Raises ValueError for options of `box_mask` that are not defined."""
    check_choice("kind", kind, KINDS)
    check_choice("placement", placement, PLACEMENTS)
    if not 0 < expand < math.inf:
        raise ValueError(f"expand must be above 0 and finite; got {expand}")
    if placement == "released" and expand != 2:
        raise ValueError(f'placement="released" is defined for expand=2 only; got {expand}')


def check_boxes(boxes: Boxes) -> None:
    """Raises ValueError unless boxes are a list of (n_i, 4) or (padded (N, M, 4), counts (N,)), and TypeError unless they are tensors."""
    if isinstance(boxes, Tensor) or not all(isinstance(b, Tensor) for b in boxes):
        raise TypeError("boxes must be a list of (n_i, 4) tensors, one an image, or a pair of tensors: padded (N, M, 4) and counts (N,)")
    if is_padded(boxes):
        padded, counts = boxes
        if padded.shape[2] != 4 or counts.shape != padded.shape[:1]:
            raise ValueError(f"boxes: wanted padded (N, M, 4) and counts (N,); got {tuple(padded.shape)} and {tuple(counts.shape)}")
        return
    for image, b in enumerate(boxes):
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"boxes, image {image}: wanted (n, 4) xyxy pixels, got {tuple(b.shape)}")


backend.register("reference", "box_mask", reference)
backend.register_fused("box_mask", fused, dtypes=None)
