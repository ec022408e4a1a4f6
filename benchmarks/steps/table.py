"""The table that a run prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Share -> its column.
SHARES = {
    "teacher_forward_ms": "teacher forward",
    "teacher_head_gradient_ms": "head gradient",
    "teacher_losses_ms": "teacher losses",
    "distillation_ms": "distillation",
}
COLUMNS = ("step", "ms (p20..p80)", "x student", *SHARES.values(), "peak MB", "compile s")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown of the records of one pair; the shares in ms, as medians of paired differences."""
    head = records[0]
    height, width = head["image"]
    amp = "" if head["amp"] == "none" else f", {head['amp']} autocast"
    title = f"{head['pair']}, {head['batch']} images of {height} x {width}{amp}, {head['provenance'].get('threads')} threads"
    rows = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *(_row(record) for record in records)]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in rows), ""])


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    name = " ".join(filter(None, (record["variant"], record["provider"], record["mode"])))
    ms, parts = record["ms"], record["shares"]
    if ms is None:
        return (name, f"{record['status']}: {record['reason']}", *("" for _ in COLUMNS[2:]))
    return (
        name,
        f"{ms['p50']:.1f} ({ms['p20']:.1f}..{ms['p80']:.1f})",
        f"{record['ratio_to_student']:.2f}",
        *(_number(parts[part]) for part in SHARES),
        _number(record["peak_mb"]),
        _number(record["compile_s"]),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
