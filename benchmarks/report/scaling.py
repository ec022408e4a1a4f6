"""Tables of what more and what larger images cost: whether the time of an image, and of a pixel, stays what it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from kdkernels.report.tables import Table

from ..registry import Case
from .cells import Record, extra, p50, provider_order, run
from .kernels import EXTRA, LABELS, RESIDENT
from .origin import where
from .text import between, number, plural, reason, without_empty_columns

COLUMNS = [
    "",
    "megapixels",
    "ms",
    "p20 to p80",
    "ms an image",
    "us a megapixel",
    "to the first row",
    "units at copy bandwidth",
    "units to the first row",
    EXTRA,
    RESIDENT,
]
#: What differs within a series, a field of `Case` -> what it is called.
FIELDS = {"batch": "number of images", "pyramid": "size of the images"}


def tables(records: Iterable[Record]) -> list[Table]:
    """For everything of which a series was measured, a table by the number of images and one by their size.

    Sizes are compared only within a run, which takes them in turns: of several, the newest run is shown.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record["kind"] == "scaling" and record["status"] != "absent":
            groups.setdefault((record["entry"], record["mode"], record["provider"]), []).append(record)
    found = []
    for key in sorted(groups, key=lambda key: (*key[:2], provider_order(key[2]))):
        newest = max(groups[key], key=lambda record: record["provenance"]["time"])
        of_run = [record for record in groups[key] if run(record) == run(newest)]
        found += [_table(series, field) for field in FIELDS for series in _series(of_run, field)]
    return found


def _series(records: list[Record], field: str) -> list[list[Record]]:
    """Two or more records whose cases differ in `field` alone, the smallest first."""
    groups: dict[Case, list[Record]] = {}
    for record in records:
        groups.setdefault(replace(_case(record), **{field: getattr(Case(), field)}), []).append(record)
    return [sorted(group, key=lambda record: _megapixels(_case(record))) for group in groups.values() if len(group) > 1]


def _table(series: list[Record], field: str) -> Table:
    first = series[0]
    what = f"{first['entry']}, {LABELS.get(first['mode'], first['mode'])}, {first['provider']}"
    fixed, shown = _case(first).name, getattr(_case(first), field)
    fixed = fixed.removeprefix(f"{shown} ") if field == "pyramid" else fixed.replace(f" N={shown}", "")
    timed = [record for record in series if record["status"] == "measured"]
    rows = [_row(record, field, timed[0]) if record in timed else _untimed(record, field) for record in series]
    ideal = number(first["ideal_bytes"] / _case(first).unit)
    notes = [
        f"All in turns, {plural(max(record['rounds'] for record in series), 'round')}. Megapixels are of the images. Units: time over the "
        f"time in which the copies just before moved the bytes of one pyramid; ideal: {ideal}. {where(series)}",
        *(reason(record["status"], _label(_case(record), field), record["reason"]) for record in series if record not in timed),
    ]
    return without_empty_columns(Table(f"{what}, by {FIELDS[field]}: {fixed}", COLUMNS, rows, notes))


def _row(record: Record, field: str, first: Record) -> list[str]:
    case, ms = _case(record), p50(record)
    per_pixel = 1e3 * ms / _megapixels(case)
    return [
        _label(case, field),
        number(_megapixels(case)),
        number(ms),
        between(record["ms"]),
        number(ms / case.batch),
        number(per_pixel),
        number(per_pixel / (1e3 * p50(first) / _megapixels(_case(first))), "x"),
        number(record["units"]["p50"]),
        number(record["units"]["p50"] / first["units"]["p50"], "x"),
        number(extra(record)),
        number(extra(record, "resident_mb")),
    ]


def _untimed(record: Record, field: str) -> list[str]:
    case = _case(record)
    return [_label(case, field), number(_megapixels(case)), record["status"], *[""] * (len(COLUMNS) - 3)]


def _label(case: Case, field: str) -> str:
    return f"N = {case.batch}" if field == "batch" else "{} x {}".format(*case.image_size)


def _case(record: Record) -> Case:
    return Case(**record["case"])


def _megapixels(case: Case) -> float:
    return case.batch * prod(case.image_size) / 1e6
