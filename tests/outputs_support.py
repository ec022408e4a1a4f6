"""Head outputs for the tests of the losses on them: anchors on a grid, logits, boxes near their anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.outputs import HeadOutputs

Size = tuple[int, int]
SIZES: list[Size] = [(6, 8), (3, 4)]
STRIDES = (8, 16)


def grid_anchors(size: Size, stride: float, per_cell: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """(H W k, 4): squares of 1, 2, ... strides around each cell's corner, the k of a cell behind each other."""
    rows, columns = (torch.arange(n, dtype=dtype) * stride for n in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y, x, y], 2).view(-1, 1, 4)
    half = torch.arange(1, per_cell + 1, dtype=dtype)[:, None] * stride / 2
    return (centres + half * torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=dtype)).view(-1, 4)


def head_outputs(
    seed: int,
    sizes: Sequence[Size] = SIZES,
    strides: Sequence[float] = STRIDES,
    images: int = 2,
    classes: int = 3,
    per_cell: int = 1,
    bins: int | None = 5,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> HeadOutputs:
    """Random outputs; all but the anchors are leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    exact = torch.float32 if dtype.itemsize < 4 else dtype
    anchors = [grid_anchors(size, stride, per_cell, exact) for size, stride in zip(sizes, strides, strict=True)]
    counts = [len(a) for a in anchors]
    shift = [draw(images, a, 4) * stride / 3 for a, stride in zip(counts, strides, strict=True)]
    boxes = [_ordered(a + 0.5 * s) for a, s in zip(anchors, shift, strict=True)]
    parts = [
        [draw(images, a, classes) * 2 for a in counts],
        [draw(images, a, 4) for a in counts],
        [x.to(dtype) for x in boxes],
        [draw(images, a, 4, bins or 1) for a in counts],
    ]
    for part in parts:
        for x in part:
            x.requires_grad_(requires_grad)
    return HeadOutputs(parts[0], parts[1], anchors, parts[2], parts[3] if bins else None)


def leaves(outputs: HeadOutputs) -> list[Tensor]:
    """What a gradient may arrive at."""
    return [x for part in outputs if part is not None for x in part if x.requires_grad]


def features(
    seed: int, sizes: Sequence[Size] = SIZES, images: int = 2, channels: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def targets(images: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Boxes in pixels of a 48 x 64 image, three, one, one, ... of them."""
    first = torch.tensor([[3.0, 4.0, 30.0, 28.5], [20.25, 10.0, 60.0, 44.0], [40.0, 2.0, 52.0, 15.0]], dtype=dtype)
    return [first[: 3 if n == 0 else 1] + n * 1.5 for n in range(images)]


def moved(outputs: HeadOutputs, order: Tensor) -> HeadOutputs:
    """The images in another order."""
    return HeadOutputs(
        *(
            None if part is None else [x if name == "anchors" else x.detach()[order].requires_grad_(x.requires_grad) for x in part]
            for name, part in zip(HeadOutputs._fields, outputs, strict=True)
        )
    )


def _ordered(boxes: Tensor) -> Tensor:
    low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
    return torch.cat([low, high], -1)
