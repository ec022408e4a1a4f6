"""Training curves from metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .figure import save

#: Steps over which a curve is averaged, as a share of its length.
SMOOTHING = 0.05


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; values that were not finite are NaN or infinite."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records.append({key: float(value) for key, value in record.items() if value is not None})
    return records


def smooth(values: list[float], share: float = SMOOTHING) -> list[float]:
    """The mean over the last `share` of the curve's length, of finite values only."""
    width = max(1, round(share * len(values)))
    means = []
    for end in range(1, len(values) + 1):
        finite = [v for v in values[max(0, end - width) : end] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def draw_curves(runs: Mapping[str, Path], out: Path) -> Path:
    """Task loss, distillation over task loss, and gradient norm over the steps, a line for each run (name -> metrics.jsonl)."""
    panels = {"loss": "detection loss", "kd_ratio": "distillation loss / detection loss", "grad_norm": "gradient norm before clipping"}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    records = {name: read_metrics(path) for name, path in runs.items()}
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, (name, steps) in enumerate(records.items()):
            known = [record for record in steps if key in record]
            if known:
                axes.plot([r["step"] for r in known], smooth([r[key] for r in known]), label=name, color=f"C{i % 10}", linewidth=1.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        if axes.lines:
            axes.set_yscale("log")
            axes.legend(fontsize=7, frameon=False)
    return save(figure, out)
