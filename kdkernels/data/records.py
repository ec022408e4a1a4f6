"""The plain records every reader ends in: annotations, items (an image with its annotations) and problems found in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: A box may stick out of its image by this many pixels (rounding in KITTI and COCO labels); it is clipped then, and refused beyond.
BOX_TOLERANCE = 2.0


@dataclass(frozen=True, slots=True)
class Annotation:
    """One labelled object, or a region that neither trains nor is counted.

    `box` is (x1, y1, x2, y2) in pixels of the image, continuous: the left edge of the image is 0, its right edge `width`.
    `label` is 1..K; 0 stands for "every class" and occurs only with `ignore`. `iscrowd` is COCO's crowd flag, `ignore` marks regions
    such as KITTI's DontCare. `area` is in square pixels (COCO's mask area where the file has one). `truncated` (0..1), `occluded`
    (0..3) and `type` (the name in the file) are kept where the format has them.
    """

    box: tuple[float, float, float, float]
    label: int
    area: float
    iscrowd: bool = False
    ignore: bool = False
    truncated: float | None = None
    occluded: int | None = None
    type: str | None = None

    @property
    def trains(self) -> bool:
        return not (self.iscrowd or self.ignore)


@dataclass(frozen=True, slots=True)
class Item:
    """An image and its annotations. `width` and `height` are what the dataset delivers: the file is resized to them when it differs.

    `name` is what a split hashes (the file's name without its ending); `file_name` is the path written to COCO files.
    """

    path: Path
    name: str
    file_name: str
    image_id: int
    width: int
    height: int
    annotations: tuple[Annotation, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in the data: the file, the line where the format has lines (from 1), and the reason."""

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.line is None else f"{self.file}:{self.line}: {self.reason}"


class BadDataError(ValueError):
    """Raised with every problem of a data set at once; `problems` is the list."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''} in the data"
        super().__init__("\n".join([f"{count}:", *(f"  {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple:
        return BadDataError, (self.problems,)


def fit_box(box: tuple[float, float, float, float], width: int, height: int) -> tuple[tuple[float, float, float, float] | None, str]:
    """Clip a continuous xyxy box to the image: (box, "") or (None, reason). Up to `BOX_TOLERANCE` pixels outside are rounding."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return None, f"box without area ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    out = max(-x1, -y1, x2 - width, y2 - height)
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if out > BOX_TOLERANCE or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return None, f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) outside the image of {width} x {height} pixels"
    return clipped, ""
