"""Records: one JSON object a line, appended as they are measured; the last one of a key is the one that counts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .provenance import device_label

if TYPE_CHECKING:
    from ..registry import Case, Entry

SCHEMA = 1
#: Fields that say what a record is about, in kernel records and in step records.
_IDENTITY = ("kind", "entry", "case", "mode", "provider", "pair", "batch", "image", "dtype", "amp", "variant", "loss")


def kernel_record(
    entry: Entry,
    case: Case,
    mode: str,
    provider: str,
    figures: Mapping[str, Any],
    copy: float,
    import_s: float | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of one provider in one cell.

    figures:  `Cell.figures`, or {"status", "reason"} for who never came to be measured
    copy:     bytes a second of a plain copy, read and write both counted
    import_s: seconds that importing kdkernels takes after torch; only providers that are kdkernels' have it
    """
    ms = figures.get("ms")
    ideal = entry.ideal_bytes(case, mode)
    rate = ideal / (1e-3 * ms["p50"]) if ms else None
    peak, resident = figures.get("peak_bytes"), figures.get("resident_bytes")
    return {
        "schema": SCHEMA,
        "kind": "kernel",
        "entry": entry.name,
        "entry_kind": entry.kind,
        "case": case.as_dict(),
        "mode": mode,
        "provider": provider,
        "status": figures["status"],
        "reason": figures["reason"],
        "ms": ms,
        "calls": figures.get("calls", 0),
        "graph_ms": figures.get("graph_ms"),
        "ideal_bytes": ideal,
        "gb_per_s": None if rate is None else rate / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "percent_of_copy": None if rate is None else 100 * rate / copy,
        "peak_mb": None if peak is None else peak / 1e6,
        "resident_mb": None if resident is None else resident / 1e6,
        "launches": figures.get("launches"),
        "host_us": figures.get("host_us"),
        "wall_ms": figures.get("wall_ms"),
        "compile_s": figures.get("compile_s"),
        "import_s": import_s,
        "error": figures.get("error", {"value": None, "gradient": None}),
        "rotated_mb": figures["rotated_bytes"] / 1e6 if "rotated_bytes" in figures else None,
        "provenance": dict(provenance),
    }


def unwritable(path: Path) -> str:
    """Why no record can be added to the file, "" when one can: to be asked before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line. Numbers that are not finite become null: JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(record), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # a run that was killed while it wrote
                line = "\n" + line
        file.write(line.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first; [] without a file. A line that is no record (its writer was killed) is told on stderr and skipped."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            print(f"{path}:{number}: no JSON record, skipped", file=sys.stderr)
    return found


def key(record: Mapping[str, Any]) -> str:
    """Equal for records of the same thing."""
    return json.dumps({name: record[name] for name in _IDENTITY if name in record}, sort_keys=True)


def newest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last record of every key, in the order in which the keys first came."""
    return list({key(record): record for record in records}.values())


def default_path(device: torch.device, name: str) -> Path:
    """benchmarks/results/<device>/latest-<name>.jsonl under the checkout, or under the current folder outside of one.

    git ignores these files: a casual look must not change the numbers that are committed.
    """
    checkout = Path(__file__).resolve().parents[2]
    root = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return root / "benchmarks" / "results" / device_label(device) / f"latest-{name}.jsonl"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
