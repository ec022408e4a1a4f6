"""Pictures of result files. Imported only where they are drawn: needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..registry import Case
from .cells import Cell, Record, cells, p50, provider_order
from .origin import device
from .page import default_case
from .steps import name, setup, setups

#: Okabe and Ito's colours, which people with any colour vision can tell apart, and a marker each for those who see none.
STYLES: dict[str, tuple[str, str]] = {
    "paper": ("#000000", "X"),
    "eager": ("#E69F00", "s"),
    "compile": ("#56B4E9", "^"),
    "compile-max": ("#0072B2", "v"),
    "reference": ("#CC79A7", "D"),
    "triton": ("#009E73", "o"),
    "native": ("#D55E00", "P"),
}
OTHER = ("#666666", ".")
#: Share -> label, colour and hatch of its part of a bar.
PARTS = {
    "student": ("student alone", "#BBBBBB", ""),
    "teacher_forward_ms": ("teacher's forward pass", "#56B4E9", "//"),
    "teacher_losses_ms": ("teacher's losses", "#009E73", "xx"),
    "teacher_head_gradient_ms": ("teacher's head gradient", "#E69F00", ".."),
    "distillation_ms": ("distillation proper", "#0072B2", ""),
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
#: A picture's main entry.
ENTRY = "gkd_bmfi"


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Name -> figure, of those for which there are records."""
    kernels = cells(records)
    drawn = {"time": time_by_size(kernels), "copy": per_cent_of_copy(kernels), "memory": memory(kernels), "steps": step_shares(records)}
    return {picture: figure for picture, figure in drawn.items() if figure is not None}


def save_figures(records: Sequence[Record], label: str, folder: Path, source: str) -> list[Path]:
    """PNG files <label>-<name>.png; `source` is kept inside each, so that a stale picture can be told."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture, figure in figures(records).items():
        path = folder / f"{label}-{picture}.png"
        figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})
        paths.append(path)
    return paths


def time_by_size(found: Sequence[Cell]) -> Figure | None:
    """Time of the main entry against the bytes of a pyramid, a panel a mode; the cases differ from the usual one in nothing but size."""
    usual = default_case(found)
    sized = [
        cell
        for cell in found
        if cell.entry == ENTRY and cell.measured and _but_size(cell.case) == _but_size(usual) and cell.mode != "backward_scaled"
    ]
    modes = list(dict.fromkeys(cell.mode for cell in sized))
    if not modes or len({cell.case.unit for cell in sized}) < 2:
        return None
    figure, panels = _panels(len(modes), (4.3, 3.9), sharey=True)
    for axes, mode in zip(panels, modes, strict=True):
        of_mode = sorted((cell for cell in sized if cell.mode == mode), key=lambda cell: cell.case.unit)
        for provider in _names(sized):
            points = [(cell.case.unit / 1e6, cell.measured[provider]) for cell in of_mode if provider in cell.measured]
            middle = [p50(record) for _, record in points]
            low = [p50(record) - record["ms"]["p20"] for _, record in points]
            high = [record["ms"]["p80"] - p50(record) for _, record in points]
            colour, marker = STYLES.get(provider, OTHER)
            axes.errorbar([x for x, _ in points], middle, [low, high], label=provider, color=colour, marker=marker, markersize=5, capsize=2)
        light = [(cell.case.unit / 1e6, cell.light_ms) for cell in of_mode]
        axes.plot(*zip(*light, strict=True), color="black", linestyle="--", linewidth=1, label="speed of light")
        _finish(axes, mode, "size of one pyramid [MB]", "time [ms]" if axes is panels[0] else "")
        axes.set_yscale("log")
        axes.set_xscale("log")
        sizes = [f"{cell.case.unit / 1e6:.3g}\n{cell.case.pyramid}\nN={cell.case.batch}" for cell in of_mode]
        axes.set_xticks([x for x, _ in light], sizes)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PLAIN)
    case = f"C={usual.channels}, {usual.boxes} boxes an image, {usual.dtype}, {usual.layout}"
    return _titled(figure, panels[0], f"{ENTRY}: time by size ({case})", _measured(sized))


def per_cent_of_copy(found: Sequence[Cell]) -> Figure | None:
    def value(record: Record) -> float | None:
        return record["percent_of_copy"]

    def finish(axes: Any) -> None:
        axes.set_xscale("log")
        axes.axvline(100, color="black", linestyle="--", linewidth=1)
        axes.xaxis.set_major_formatter(PLAIN)

    return _by_entry(
        found, value, finish, "ideal bytes / time, % of copy bandwidth", "Per cent of the copy bandwidth (further right is better)"
    )


def memory(found: Sequence[Cell]) -> Figure | None:
    def value(record: Record) -> float | None:
        return record["peak_mb"]

    def finish(axes: Any) -> None:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(left=-0.1)
        axes.xaxis.set_major_formatter(PLAIN)

    return _by_entry(found, value, finish, "peak memory above the inputs [MB], linear below 1", "Peak memory (further left is better)")


def _by_entry(
    found: Sequence[Cell], value: Callable[[Record], float | None], finish: Callable[[Any], None], label: str, title: str
) -> Figure | None:
    """A row an entry, a point a provider, a panel for forward and one for forward + backward, at the usual case."""
    usual = default_case(found)
    chosen = [cell for cell in found if cell.case == usual and cell.mode in ("forward", "backward") and cell.measured]
    chosen = [cell for cell in chosen if any(value(record) is not None for record in cell.measured.values())]
    if not chosen:
        return None
    entries = list(dict.fromkeys(cell.entry for cell in chosen))[::-1]
    modes = [mode for mode in ("forward", "backward") if any(cell.mode == mode for cell in chosen)]
    figure, panels = _panels(len(modes), (5.4, 1.3 + 0.36 * len(entries)), sharey=True)
    for axes, mode in zip(panels, modes, strict=True):
        of_mode = [cell for cell in chosen if cell.mode == mode]
        providers = _names(chosen)
        for place, provider in enumerate(providers):
            # Above one another, so that equal values do not hide each other.
            aside = 0.5 * (0.5 - (place + 0.5) / len(providers))
            points = [
                (read, entries.index(cell.entry) + aside)
                for cell in of_mode
                if provider in cell.measured and (read := value(cell.measured[provider])) is not None
            ]
            colour, marker = STYLES.get(provider, OTHER)
            axes.scatter([x for x, _ in points], [y for _, y in points], label=provider, color=colour, marker=marker, s=34)
        _finish(axes, "forward + backward" if mode == "backward" else mode, label, "")
        finish(axes)
        axes.set_yticks(range(len(entries)), entries)
        axes.set_ylim(-0.6, len(entries) - 0.4)
    return _titled(figure, panels[0], f"{title}: {usual.name}", _measured(chosen))


def step_shares(records: Sequence[Record]) -> Figure | None:
    """A bar a step, made of the student's own step, what the teacher is asked for, and distillation proper; a panel a pair.

    Shares are medians of differences and need not add up to the median of the whole, which has a mark of its own.
    """
    groups = []
    for group in setups(records).values():
        chosen = [record for record in group if record["status"] == "measured" and record["loss"] in (None, ENTRY)]
        if any(record["loss"] for record in chosen) and any(record["variant"] == "student" for record in chosen):
            groups.append(chosen[::-1])
    if not groups:
        return None
    figure, panels = _panels(len(groups), (6.2, 1.2 + 0.28 * max(map(len, groups))))
    for axes, bars in zip(panels, groups, strict=True):
        (student,) = [p50(record) for record in bars if record["variant"] == "student"]
        left = [0.0] * len(bars)
        for share, (label, colour, hatch) in PARTS.items():
            widths = [student if share == "student" else max(0.0, record["shares"][share] or 0.0) for record in bars]
            if any(widths):
                axes.barh(range(len(bars)), widths, left=left, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.scatter([p50(record) for record in bars], range(len(bars)), marker="|", color="black", s=90, label="whole step, median")
        _finish(axes, setup(bars[0]), "time of a step [ms]", "")
        axes.set_yticks(range(len(bars)), [name(record) for record in bars])
    return _titled(figure, panels[0], "Where a training step's time goes", [record for bars in groups for record in bars])


def _names(found: Sequence[Cell]) -> list[str]:
    return sorted({name for cell in found for name in cell.measured}, key=provider_order)


def _measured(found: Sequence[Cell]) -> list[Record]:
    return [record for cell in found for record in cell.measured.values()]


def _but_size(case: Case) -> tuple[Any, ...]:
    return case.channels, case.boxes, case.dtype, case.layout


def _panels(count: int, panel: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels of (width, height) inches, at most three in a row."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(2, columns) * panel[0], rows * panel[1] + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _titled(figure: Figure, first: Any, title: str, records: Sequence[Record]) -> Figure:
    figure.suptitle(f"{title}\n{device(records)}", fontsize=10)
    handles, labels = first.get_legend_handles_labels()
    handles, labels = zip(*sorted(zip(handles, labels, strict=True), key=lambda pair: provider_order(pair[1])[0]), strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return figure
