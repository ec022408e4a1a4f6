"""What all pictures share: a figure without a display, and panels of images with boxes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

#: A colour per label from 1.
COLOURS = ("#ffb000", "#fe6100", "#dc267f", "#785ef0", "#648fff", "#00b894", "#e17055", "#0984e3")


def grid(rows: int, columns: int, panel: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of rows x columns panels without axes, each (width, height) inches; the panels are a 2-D array."""
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel_axes in panels.flat:
        panel_axes.set_axis_off()
    return figure, panels


def save(figure: Figure, path: Path, dpi: int = 110) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def show_image(axes: Any, pixels: np.ndarray, title: str = "") -> None:
    """An (H, W, 3) uint8 image in a panel."""
    axes.imshow(pixels, interpolation="nearest")
    if title:
        axes.set_title(title, fontsize=8)


def show_boxes(axes: Any, boxes: Iterable[Iterable[float]], labels: Iterable[int], dashed: bool = False) -> None:
    """Boxes xyxy in pixels of the image shown, coloured by label; the centre of the first pixel is at 0, its edge at -0.5."""
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        colour = COLOURS[(int(label) - 1) % len(COLOURS)]
        style = {"linestyle": ":", "linewidth": 0.9} if dashed else {"linewidth": 1.2}
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor="white" if dashed else colour, **style))


def legend(figure: Figure, classes: Iterable[str]) -> None:
    """The colours of the classes above the panels."""
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(classes)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=7, frameon=False)
