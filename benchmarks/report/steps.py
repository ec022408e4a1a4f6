"""Tables of whole training steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kdkernels.report.tables import Table

from .cells import Record, provider_order
from .origin import where
from .text import between, number, plural, reason, without_empty_columns

#: Share -> the heading of its column.
SHARES = {
    "teacher_forward_ms": "teacher forward ms",
    "teacher_head_gradient_ms": "head gradient ms",
    "teacher_losses_ms": "teacher's losses ms",
    "distillation_ms": "distillation ms",
}
COLUMNS = ["", "ms", "p20 to p80", "x student alone", *SHARES.values(), "step against reference", "peak MB"]


def setups(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """The step records by pair, batch, image size and number type: only within one of these may times be compared."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["kind"] == "step":
            key = (record["pair"], record["batch"], *record["image"], number_type(record))
            found.setdefault(key, []).append(record)
    for group in found.values():
        group.sort(key=_order)
    return found


def setup_table(group: list[Record], loss: str | None = None) -> Table:
    """All variants of one setup; with `loss`, those of that loss and those without any."""
    chosen = [record for record in group if loss is None or record["loss"] in (None, loss)]
    title = setup(group[0])
    return without_empty_columns(
        Table(title, COLUMNS, [_row(r) for r in chosen if r["status"] != "absent"], [where(chosen), *_reasons(chosen)])
    )


def _row(record: Record) -> list[str]:
    if record["status"] != "measured":
        return [name(record), record["status"], *[""] * (len(COLUMNS) - 2)]
    shares: Mapping[str, float | None] = record["shares"] or {}
    return [
        name(record),
        number(record["ms"]["p50"]),
        between(record["ms"]),
        number(record["ratio_to_student"]),
        *(number(shares.get(share)) for share in SHARES),
        # How many times as long the reference's step takes, in the same rounds.
        number((record.get("against") or {}).get("reference"), "x"),
        number(record["peak_mb"]),
    ]


def by_provider(group: list[Record]) -> Table | None:
    """Milliseconds of distillation proper: a row a loss and mode, a column a provider. None when no loss was measured."""
    measured = [r for r in group if r["status"] == "measured" and r["loss"] and (r["shares"] or {}).get("distillation_ms") is not None]
    if not measured:
        return None
    names = sorted({record["provider"] for record in measured}, key=provider_order)
    rows: dict[str, dict[str, str]] = {}
    for record in measured:
        rows.setdefault(f"{record['loss']}, {record['mode']}", {})[record["provider"]] = number(record["shares"]["distillation_ms"])
    cells = [[row, *(found.get(column, "") for column in names)] for row, found in rows.items()]
    title = f"{setup(measured[0])}: milliseconds of distillation proper, without the teacher's forward pass and head gradient"
    return Table(title, ["", *names], cells, [where(measured), *_reasons(group)])


def name(record: Record) -> str:
    """A row's name: what the step does besides training the student, who computes it, and when."""
    return ", ".join(filter(None, (record["variant"], record["provider"], record["mode"])))


def setup(record: Record) -> str:
    """What all steps of one group have in common."""
    height, width = record["image"]
    return f"{record['pair']}, {plural(record['batch'], 'image')} of {height} x {width}, {number_type(record)}"


def number_type(record: Record) -> str:
    return record["dtype"] if record["amp"] in (None, "none") else f"{record['amp']} autocast"


def _order(record: Record) -> tuple[Any, ...]:
    """Steps without a loss first, in the order in which they were measured (each asks more of the teacher than the one before)."""
    return record["loss"] is not None, record["loss"] or "", record["mode"] or "", provider_order(record["provider"] or "")


def _reasons(group: list[Record]) -> list[str]:
    return list(dict.fromkeys(reason(r["status"], name(r), r["reason"]) for r in group if r["status"] != "measured"))
