"""The picture of `kdkernels compare-methods`: what each method gains in each arena."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .comparison import Group, groups, label
from .figure import COLOURS, save

ROW_HEIGHT, PANEL_WIDTH = 0.27, 6.0


def draw_gains(results: Mapping[str, Any], out: Path) -> Path | None:
    """A panel an arena, a line a method, a dot a seed: the gain over no distillation without and with AID. None where there is none."""
    found = {arena: _methods(groups(results, arena)) for arena in results["teachers"]}
    arenas = {arena: methods for arena, methods in found.items() if methods}
    if not arenas:
        return None
    tallest = max(len(methods) for methods in arenas.values())
    figure = Figure(figsize=(PANEL_WIDTH * len(arenas), ROW_HEIGHT * tallest + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (arena, methods) in zip(figure.subplots(1, len(arenas), squeeze=False)[0], arenas.items(), strict=True):
        for y, forms in enumerate(methods.values()):
            for offset, (form, group) in zip((0.14, -0.14), forms.items(), strict=False):
                gains, colour = list(group.gains.values()), COLOURS[4 if form == "alone" else 1]
                axes.plot(gains, [y + offset] * len(gains), ".", color=colour, alpha=0.5, markersize=5)
                axes.plot(
                    mean(gains), y + offset, "o" if form == "alone" else "D", color=colour, markersize=5, label=form if y == 0 else None
                )
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(methods)), list(methods), fontsize=8)
        # Lines of the same height in all panels.
        axes.set_ylim(tallest - 0.5, -0.5)
        axes.set_title(arena, fontsize=9)
        axes.set_xlabel("mAP x 100 over no distillation", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.3)
        axes.legend(fontsize=7, frameon=False)
    return save(figure, out)


def _methods(found: list[Group]) -> dict[str, dict[str, Group]]:
    """Method -> "alone" and "with AID", as far as they have gains; the largest gain first."""
    methods: dict[str, dict[str, Group]] = {}
    for group in found:
        if group.gains:
            row = group.rows[0]
            methods.setdefault(label(row["method"], False), {})["with AID" if row["aid"] else "alone"] = group
    return {method: dict(sorted(forms.items())) for method, forms in methods.items()}
