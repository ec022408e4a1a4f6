"""Records of kernel measurements as cells: one entry, case and mode on one device, with a record a provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from statistics import geometric_mean
from typing import Any

from ..providers import BACKENDS, BASELINES
from ..registry import BATCHES, BOXES, CHANNELS, DTYPES, LAYOUTS, MODES, PYRAMIDS, Case

Record = Mapping[str, Any]

#: The order of rows and columns everywhere.
PROVIDERS = (*BASELINES, *BACKENDS)
_CASE_ORDER = {
    "pyramid": tuple(PYRAMIDS),
    "batch": BATCHES,
    "channels": CHANNELS,
    "boxes": BOXES,
    "dtype": tuple(DTYPES),
    "layout": tuple(LAYOUTS),
}


@dataclass(frozen=True)
class Cell:
    """What was measured of one entry, case and mode.

    records: provider -> its newest record, whatever its status, in the order of `PROVIDERS`
    """

    entry: str
    kind: str
    case: Case
    mode: str
    records: Mapping[str, Record]

    @property
    def measured(self) -> dict[str, Record]:
        """The admitted ones, which have a time."""
        return {name: record for name, record in self.records.items() if record["status"] == "measured"}

    @property
    def tried(self) -> dict[str, Record]:
        """Those that can run here, whatever became of them."""
        return {name: record for name, record in self.records.items() if record["status"] != "absent"}

    @property
    def light_ms(self) -> float:
        """Milliseconds that the ideal bytes take at the copy bandwidth (of its first record: each run measures its own)."""
        return light_ms(next(iter(self.records.values())))

    @property
    def units(self) -> float:
        """Ideal bytes as a number of pyramids."""
        return self.ideal_bytes / self.case.unit

    @property
    def ideal_bytes(self) -> int:
        return next(iter(self.records.values()))["ideal_bytes"]

    def speed_ups(self, name: str) -> dict[str, float]:
        """Every other provider that was timed together with `name` -> how many times faster than it `name` is.

        Empty when `name` has no time. Providers of one run take turns; what was measured on another day is not compared.
        """
        own = self.measured.get(name)
        if own is None:
            return {}
        others = {other: record for other, record in self.measured.items() if other != name and run(record) == run(own)}
        return {other: p50(record) / p50(own) for other, record in others.items()}

    def against_best(self, name: str) -> tuple[str, float] | None:
        """The fastest of the others and the speed-up over it; None when there is nobody to compare with."""
        ratios = self.speed_ups(name)
        if not ratios:
            return None
        best = min(ratios, key=lambda other: ratios[other])
        return best, ratios[best]


def cells(records: Iterable[Record]) -> list[Cell]:
    """Kernel records, at most one a provider in each cell, as cells: methods before primitives, by name, case and mode."""
    groups: dict[tuple[str, str, Case, str], dict[str, Record]] = {}
    for record in records:
        if record["kind"] == "kernel":
            key = (record["entry"], record["entry_kind"], Case(**record["case"]), record["mode"])
            groups.setdefault(key, {})[record["provider"]] = record
    found = [
        Cell(entry, kind, case, mode, {name: group[name] for name in sorted(group, key=provider_order)})
        for (entry, kind, case, mode), group in groups.items()
    ]
    return sorted(found, key=lambda cell: (cell.kind, cell.entry, case_order(cell.case), MODES.index(cell.mode)))


def provider_order(name: str) -> tuple[int, str]:
    return PROVIDERS.index(name) if name in PROVIDERS else len(PROVIDERS), name


def case_order(case: Case) -> tuple[int, ...]:
    """By position in the declared choices; a value that was declared once and is no more comes last."""
    order = []
    for field in fields(case):
        known, value = _CASE_ORDER[field.name], getattr(case, field.name)
        order.append(known.index(value) if value in known else len(known))
    return tuple(order)


def run(record: Record) -> tuple[Any, ...]:
    """What is equal for records of one run."""
    origin = record["provenance"]
    return origin["time"], origin["device"], origin["threads"], origin["commit"]


def p50(record: Record) -> float:
    """Milliseconds."""
    return record["ms"]["p50"]


def light_ms(record: Record) -> float:
    """Milliseconds that the ideal bytes take at the copy bandwidth measured in the record's own run."""
    return record["ideal_bytes"] / record["copy_gb_per_s"] / 1e6


def distance(record: Record) -> float:
    """How many times the speed of light the time is."""
    return p50(record) / light_ms(record)


def extra(record: Record, figure: str = "peak_mb") -> float | None:
    """What a call held at its peak beyond its own gradient, in per cent of a pyramid; None of who has no time, or moves no pyramid.

    The gradient that it returns is one pyramid in every mode but "forward". figure: "resident_mb" for resident memory, which older
    records do not have
    """
    unit, peak = Case(**record["case"]).unit, record.get(figure)
    if peak is None or record["ideal_bytes"] < unit:
        return None
    gradient = 0 if record["mode"] == "forward" else unit
    return 100 * (1e6 * peak - gradient) / unit


def tried_names(found: Iterable[Cell]) -> list[str]:
    """Providers that can run here, in their order."""
    return sorted({name for cell in found for name in cell.tried}, key=provider_order)


def mean_speed_up(cells: Iterable[Cell], name: str) -> tuple[float, int] | None:
    """Geometric mean of the speed-ups of `name` against the best other provider, and over how many of the cells it goes."""
    ratios = [best[1] for cell in cells if (best := cell.against_best(name)) is not None]
    return (geometric_mean(ratios), len(ratios)) if ratios else None
