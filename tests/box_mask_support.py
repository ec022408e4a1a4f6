"""Boxes worth drawing, and the comparison of `box_mask` by any native kernels with the reference and with the loops over boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from oracle import boxes as box_oracle
from oracle import cases
from oracle.compare import RTOL_MASK, assert_close
from torch import Tensor

from kdkernels import functional
from kdkernels.reference.box_mask import Boxes
from kdkernels.reference.box_mask import box_mask as reference

#: Calls a function by the kernels in question, in all ways in which its results are to be equal to the bit, and returns these.
Everywhere = Callable[[Callable[[], Sequence[Tensor]]], list[Tensor]]
PROFILED = ("gaussian", "exponential")
SIZES = [(8, 12), (3, 3), (1, 1), (23, 25), (2, 16)]
#: Of 800 x 1344 pixels at strides 8 to 128.
PYRAMID = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
#: More levels than those at which DeFeat puts boxes apart from each other, not in the order of their sizes.
LEVELS = [(2, 3), (8, 8), (1, 1), (9, 17), (4, 4), (5, 2), (3, 3)]
NAN, INF = math.nan, math.inf
#: Boxes without area in an image of `cases.IMAGE_SIZE`; boxes that reach beyond it; the smallest ones.
WITHOUT_AREA = [
    *([NAN if i == axis else value for i, value in enumerate((1.0, 1.0, 20.0, 20.0))] for axis in range(4)),
    [40, 10, 20, 30], [10, 10, 10, 30], [200, 10, 300, 30], [-50, -60, -10, -20], [0, 64, 20, 90], [INF, 0, INF, 9], [-INF, 0, -INF, 9],
    [-0.0, -0.0, 0.0, 9],
]  # fmt: skip
BEYOND = [[-INF, 10, 40, INF], [-5, -5, 500, 3], [1e30, -1e30, INF, 1e30], [90, 60, 1e38, 1e38]]
SMALLEST = [[0, 0, 1e-40, 1e-40], [0, 0, 1e-45, 64]]
#: Sides of squares below, at and above the areas at which DeFeat's next level begins.
SIDES = [56 * 2**k - less for k in range(8) for less in (0, 0.1)]
#: Arguments of the library's operator, and changes to them that it refuses with these words.
ARGUMENTS = {
    "boxes": torch.zeros(2, 3, 4), "counts": torch.tensor([3, 3]), "image_size": [64.0, 96.0], "sizes": [3, 4], "kind": "gaussian",
    "expand": 2.0, "released": False, "inner_ones": True, "area_norm": True,
}  # fmt: skip
REFUSED = [
    ({"boxes": torch.zeros(2, 3, 4, dtype=torch.float64)}, "float32"),
    ({"boxes": torch.zeros(2, 3, 4, dtype=torch.float16)}, "fp32"),
    ({"boxes": torch.zeros(2, 3, 5)}, r"\(N, M, 4\)"),
    ({"boxes": torch.zeros(3, 4)}, r"\(N, M, 4\)"),
    ({"counts": torch.zeros(3, dtype=torch.int64)}, "counts"),
    ({"image_size": [64.0]}, "image_size"),
    ({"sizes": [3, 4, 5]}, "sizes"),
    ({"sizes": [3, -4]}, "level 0"),
    ({"kind": "circle"}, "circle"),
]


def check(
    everywhere: Everywhere, boxes: Boxes, image_size: Any = cases.IMAGE_SIZE, sizes: Sequence[tuple[int, int]] = SIZES, **options: Any
) -> list[Tensor]:
    """The masks, after their comparison with the reference."""
    masks = everywhere(lambda: functional.box_mask(boxes, image_size, sizes, **options))
    for level, (got, want) in enumerate(zip(masks, reference(boxes, image_size, sizes, **options), strict=True)):
        where = f"{options} level {level}"
        assert got.shape == want.shape and got.dtype == torch.float32, where
        assert torch.equal(got == 0, want == 0), f"{where}: other cells are covered"
        if options.get("kind", "gaussian") in PROFILED:
            # The smallest numbers of fp32 are 1.4e-45 apart.
            assert bool(((got - want).abs() <= RTOL_MASK * want + 3e-45).all()), where
        else:
            assert torch.equal(got, want), where
    return masks


def check_by_loops(everywhere: Everywhere, boxes: list[Any], image_size: Any, sizes: list[tuple[int, int]], **options: Any) -> list[Tensor]:
    """`check`, and the comparison with the loops. boxes: (n, 4) float64 arrays of numbers that fp32 has, or lists"""
    masks = check(everywhere, cases.box_tensors(boxes), image_size, sizes, **options)
    for got, want in zip(masks, box_oracle.box_mask(boxes, image_size, sizes, **options), strict=True):
        assert np.array_equal(got.numpy() > 0, want > 0), f"{options}: other cells are covered"
        assert_close(got, want, rtol=RTOL_MASK if options["kind"] in PROFILED else 0.0, what=str(options))
    return masks


def random_boxes(seed: int, counts: Sequence[int], image_size: Any, largest: float = 0.9) -> list[np.ndarray]:
    """Arrays (count, 4), some of whose boxes reach beyond the image or have no area; `largest` side in parts of the image's."""
    rng = np.random.RandomState(seed)
    images = []
    for count in counts:
        corner = rng.uniform(-0.2, 1.0, (count, 2)) * image_size[::-1]
        boxes = np.concatenate([corner, corner + rng.uniform(-0.1, 1, (count, 2)) * largest * image_size[::-1]], axis=1)
        images.append((boxes.round() if rng.rand() < 0.3 else boxes).astype(np.float32).astype(np.float64))
    return images


def ill_boxes() -> list[Tensor]:
    """Three images of `WITHOUT_AREA`, `BEYOND` and `SMALLEST`."""
    return [torch.tensor(one, dtype=torch.float32) for one in (WITHOUT_AREA, BEYOND, SMALLEST)]


def padded_boxes() -> tuple[Tensor, Tensor]:
    """Five images' padded boxes, NaN and a large one beyond their counts, and these, below 0 and above the boxes' number too."""
    padded = torch.full((5, 4, 4), NAN)
    padded[:, 3] = torch.tensor([0.0, 0.0, 90.0, 60.0])
    padded[0, :3], padded[1, :1] = torch.tensor(cases.BOXES[0]), torch.tensor(cases.BOXES[1])
    return padded, torch.tensor([3, 1, 0, -2, 9])


def strided_boxes() -> tuple[Tensor, Tensor]:
    """Two images' boxes, the same, with counts 3 and 2, neither contiguous."""
    rows = torch.tensor(np.stack([cases.BOXES[0]] * 2)).float().transpose(1, 2).contiguous().transpose(1, 2)
    counts = torch.tensor([3, 9, 2, 9])[::2]
    assert not rows.is_contiguous() and not counts.is_contiguous()
    return rows, counts


def one_edge_each(width: float, columns: int) -> list[Tensor]:
    """Images of one box, from the left or to the right, whose other edge is the border between two of so many columns."""
    x = np.arange(1, columns) * width / columns
    both = [np.stack([0 * x, 0 * x, x, 0 * x + 8], axis=1), np.stack([x, 0 * x, 0 * x + width, 0 * x + 8], axis=1)]
    return cases.box_tensors(np.concatenate(both)[:, None])


def squares(sides: Sequence[float]) -> list[Tensor]:
    """Images of one square each."""
    return [torch.tensor([[100.0, 50.0, 100 + side, 50 + side]]) for side in sides]
