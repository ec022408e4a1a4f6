"""Tables of kernel measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kdkernels.report.tables import Table

from ..providers import BACKENDS
from ..registry import Case
from .cells import Cell, Record, distance, extra, mean_speed_up, p50, tried_names
from .origin import where
from .text import between, number, reason, without_empty_columns

#: What is held beside the gradient: as torch's allocator sees it, and as the system does.
EXTRA, RESIDENT = "extra, % of a unit", "resident extra, % of a unit"
COLUMNS = [
    "",
    "ms",
    "p20 to p80",
    "GB/s",
    "% of copy",
    "x speed of light",
    "peak MB",
    EXTRA,
    RESIDENT,
    "launches",
    "host us",
    "wall ms",
    "graph ms",
    "cold compile s",
    "error, value",
    "error, gradient",
    "against the best other",
    "against each",
]
#: Modes whose name does not say it all.
LABELS = {"backward": "forward + backward"}


def cell_table(cell: Cell) -> Table:
    """Everything of one cell: a row a provider that was tried; those that cannot run here are named once, on top of the page."""
    rows = [_row(cell, name, record) for name, record in cell.tried.items()]
    ideal = f"{number(cell.ideal_bytes / 1e6)} MB ideal = {number(cell.units)} units, {number(cell.light_ms)} ms at the copy bandwidth"
    return without_empty_columns(Table(f"{cell.mode}: {ideal}", COLUMNS, rows, not_measured([cell], absent=False)))


def _row(cell: Cell, name: str, record: Record) -> list[str]:
    if record["status"] != "measured":
        return [name, record["status"], *[""] * (len(COLUMNS) - 2)]
    errors = record.get("error") or {}
    best = cell.against_best(name) if name in BACKENDS else None
    each = cell.speed_ups(name) if name in BACKENDS else {}
    return [
        name,
        number(p50(record)),
        between(record["ms"]),
        number(record["gb_per_s"]),
        number(record["percent_of_copy"]),
        number(distance(record)),
        number(record["peak_mb"]),
        number(extra(record)),
        number(extra(record, "resident_mb")),
        "" if record["launches"] is None else str(record["launches"]),
        number(record["host_us"]),
        number(record.get("wall_ms")),
        number(record["graph_ms"]["p50"]) if record["graph_ms"] else "",
        number(record["compile_s"]),
        *(f"{value:.0e}" if (value := errors.get(of)) is not None else "" for of in ("value", "gradient")),
        f"{number(best[1], 'x')} ({best[0]})" if best else "",
        ", ".join(f"{other} {number(ratio, 'x')}" for other, ratio in each.items()),
    ]


def one_case(cells: Iterable[Cell], entry: str, case: Case, modes: Sequence[str]) -> Table | None:
    """The short table of one entry: a row a mode and provider. None when it was never tried."""
    chosen = [cell for cell in cells if cell.entry == entry and cell.case == case and cell.mode in modes and cell.tried]
    if not chosen:
        return None
    columns = ["", "ms", "p20 to p80", "% of copy", "x speed of light", "peak MB", EXTRA, RESIDENT]
    rows = []
    for cell in chosen:
        for name, record in cell.tried.items():
            figures = [record["status"], *[""] * (len(columns) - 2)]
            if record["status"] == "measured":
                numbers = (record["percent_of_copy"], distance(record), record["peak_mb"], extra(record), extra(record, "resident_mb"))
                figures = [number(p50(record)), between(record["ms"]), *map(number, numbers)]
            rows.append([f"{LABELS.get(cell.mode, cell.mode)}: {name}", *figures])
    records = [record for cell in chosen for record in cell.records.values()]
    ideal = ", ".join(
        f"{LABELS.get(cell.mode, cell.mode)} {number(cell.units)} units = {number(cell.ideal_bytes / 1e6)} MB" for cell in chosen
    )
    notes = [f"Ideal traffic: {ideal}. {where(records)}", *not_measured(chosen)]
    return without_empty_columns(Table(f"{entry}, {case.name}", columns, rows, notes))


def overview(cells: Iterable[Cell], case: Case) -> Table | None:
    """Milliseconds of everything at one case: a row an entry and mode, a column a provider, and kdkernels against the best other."""
    chosen = [cell for cell in cells if cell.case == case and cell.tried]
    if not chosen:
        return None
    names = tried_names(chosen)
    backends = [name for name in names if name in BACKENDS]
    rows = []
    for cell in chosen:
        times = [shown(cell, name, lambda record: number(p50(record))) for name in names]
        ratios = [f"{number(best[1], 'x')} ({best[0]})" if (best := cell.against_best(name)) else "" for name in backends]
        rows.append([f"{cell.entry}, {cell.mode}", number(cell.light_ms), *times, *ratios])
    notes = [where([record for cell in chosen for record in cell.records.values()])]
    for name in backends:
        if (found := mean_speed_up(chosen, name)) is not None:
            over = (
                f"all {len(chosen)} rows above"
                if found[1] == len(chosen)
                else f"the {found[1]} of the {len(chosen)} rows above that have both"
            )
            notes.append(f"{name} against the best other, geometric mean over {over}: {number(found[0], 'x')}.")
    columns = ["", "speed of light", *names, *(f"{name} against the best other" for name in backends)]
    return Table(f"Milliseconds (median) at {case.name}", columns, rows, [*notes, *not_measured(chosen)])


def shown(cell: Cell, name: str, figure: Callable[[Record], str]) -> str:
    """The figure of who has a time; else why there is none, in a word."""
    if name in cell.measured:
        return figure(cell.measured[name])
    return cell.records[name]["status"] if name in cell.records else ""


def not_measured(cells: Sequence[Cell], absent: bool | None = None) -> list[str]:
    """A note for every provider and reason why it has no time somewhere; `absent`: only of those that cannot run here, or of others."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        for name, record in cell.records.items():
            status = record["status"]
            if status != "measured" and absent in (None, status == "absent"):
                found.setdefault((name, status, record["reason"]), []).append(f"{cell.entry} {cell.mode}")
    notes = []
    for (name, status, text), places in found.items():
        who = name if len(places) == len(cells) else f"{name} ({', '.join(places)})"
        notes.append(reason(status, who, text))
    return notes
