"""The records of a cell as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .report.cells import extra

Record = Mapping[str, Any]


def table(title: str, found: Sequence[Record]) -> str:
    """A line a provider, the fastest first; figures that nobody has here are left out. Who has no time comes last, with the reason."""
    measured = sorted((record for record in found if record["ms"]), key=lambda record: record["ms"]["p50"])
    fastest = measured[0] if measured else {}
    columns = {name: cells for name, show in _COLUMNS.items() if any(cells := [show(record, fastest) for record in measured])}
    lines = [title]
    if measured:
        names = ["", *(record["provider"] for record in measured)]
        texts = [_aligned(names, str.ljust), *(_aligned([name, *cells], str.rjust) for name, cells in columns.items())]
        lines += ["  " + "  ".join(row) for row in zip(*texts, strict=True)]
    lines += [f"  {record['provider']}: {record['status']}: {record['reason']}" for record in found if not record["ms"]]
    return "\n".join(lines) + "\n"


def _aligned(column: Sequence[str], adjust: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [adjust(text, width) for text in column]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _range(ms: Mapping[str, float] | None) -> str:
    return f"{_number(ms['p20'])}..{_number(ms['p80'])}" if ms else ""


def _error(record: Record) -> str:
    found = [value for value in record["error"].values() if value is not None]
    return f"{max(found):.0e}" if found else ""


def _times(record: Record, fastest: Record) -> str:
    """How many times its time; nothing for itself."""
    return "" if record is fastest else _number(record["ms"]["p50"] / fastest["ms"]["p50"])


#: Column -> its text, of a record and of the fastest one.
_COLUMNS: dict[str, Callable[[Record, Record], str]] = {
    "ms": lambda record, _: _number(record["ms"]["p50"]),
    "p20..p80": lambda record, _: _range(record["ms"]),
    "x fastest": _times,
    "graph ms": lambda record, _: _number((record["graph_ms"] or {}).get("p50")),
    "GB/s": lambda record, _: _number(record["gb_per_s"]),
    "% of copy": lambda record, _: _number(record["percent_of_copy"]),
    "peak MB": lambda record, _: _number(record["peak_mb"]),
    "extra, % of a unit": lambda record, _: _number(extra(record)),
    "launches": lambda record, _: _number(record["launches"]),
    "host us": lambda record, _: _number(record["host_us"]),
    "compile s": lambda record, _: _number(record["compile_s"]),
    "error": lambda record, _: _error(record),
}
