"""What is measured on: the sizes, types and layouts of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any

import torch

#: Name -> (height, width) in pixels of the padded batch, strides of the levels. Level sizes are those of a stride-2 pyramid, rounded up.
PYRAMIDS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "fcos": ((800, 1344), (8, 16, 32, 64, 128)),
    "frcnn": ((800, 1344), (4, 8, 16, 32, 64)),
    "kitti": ((416, 1344), (8, 16, 32, 64, 128)),
    "tiny": ((256, 416), (8, 16, 32)),
    # A quarter and twice the pixels of "fcos", for the cost by size; not in the full grid.
    "fcos-quarter": ((400, 672), (8, 16, 32, 64, 128)),
    "fcos-double": ((1120, 1920), (8, 16, 32, 64, 128)),
}
GRID = ("fcos", "frcnn", "kitti", "tiny")
BATCHES = (1, 2, 8, 16)
CHANNELS = (64, 256)
BOXES = (0, 20, 100)
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS: dict[str, torch.memory_format] = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One size of the inputs.

    pyramid:  one of `PYRAMIDS`;   batch: images N;   channels: C of every level;   boxes: boxes per image
    dtype:    of features and gradients, one of `DTYPES`;   layout: one of `LAYOUTS`
    """

    pyramid: str = "fcos"
    batch: int = 2
    channels: int = 256
    boxes: int = 20
    dtype: str = "fp32"
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        return f"{self.pyramid} N={self.batch} C={self.channels} boxes={self.boxes} {self.dtype} {self.layout}"

    @property
    def image_size(self) -> tuple[int, int]:
        return PYRAMIDS[self.pyramid][0]

    @property
    def strides(self) -> tuple[int, ...]:
        return PYRAMIDS[self.pyramid][1]

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        height, width = self.image_size
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]

    @property
    def pixels(self) -> int:
        """Cells of all levels of one image."""
        return sum(prod(size) for size in self.level_sizes)

    @property
    def unit(self) -> int:
        """Bytes of one pyramid."""
        return self.batch * self.channels * self.pixels * DTYPES[self.dtype].itemsize

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_cases() -> Iterator[Case]:
    """The full grid."""
    for values in product(GRID, BATCHES, CHANNELS, BOXES, DTYPES, LAYOUTS):
        yield Case(*values)


#: Entry and case: the whole method on sizes, types and layouts that differ from the usual ones, most telling first, and its parts.
QUICK: tuple[tuple[str, Case], ...] = (
    ("gkd_bmfi", Case()),
    ("gkd_bmfi", Case(batch=8, dtype="bf16")),
    ("gkd_bmfi_separate", Case()),
    ("feature_imitation", Case()),
    ("attention", Case()),
    ("weighted_channel_sum", Case()),
    ("channel_mean", Case()),
    ("channel_kl", Case()),
    ("correlation", Case()),
    ("box_mask", Case(boxes=100)),
    ("map_distance", Case()),
    ("gkd_bmfi", Case(dtype="bf16", layout="channels_last")),
    ("gkd_bmfi", Case("frcnn", dtype="fp16")),
    ("gkd_bmfi", Case("kitti", boxes=100)),
    ("gkd_bmfi", Case("tiny", batch=1, channels=64, boxes=0)),
)
