"""Where the numbers of a table come from, in words: device, threads, versions, commits, and how quiet the machine was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .cells import Record
from .text import number, plural

#: States that are read before and after every cell -> what they are called, with their unit.
STATES = {
    "load": ("load average", ""),
    "cpu_mhz": ("CPU clock", " MHz"),
    "sm_mhz": ("SM clock", " MHz"),
    "memory_mhz": ("memory clock", " MHz"),
    "power_w": ("power", " W"),
    "temperature_c": ("temperature", " degrees C"),
}
#: nvidia-smi's masks for "nothing" and for "idle", which no measurement suffers from.
QUIET = {"0x0000000000000000", "0x0000000000000001"}


def device(records: Iterable[Record]) -> str:
    """ "NVIDIA H200" or "<CPU's name>, 2 threads"; all of them if the records come from several."""
    return "; ".join(dict.fromkeys(map(_device, records)))


def label(records: Sequence[Record]) -> str:
    """The name of the folder that results of this device have: "cpu", "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", records[0]["provenance"]["device"].lower()).strip("-")


def where(records: Sequence[Record]) -> str:
    """A sentence: device, threads, torch, commits and days, and the copy bandwidth where the records have one."""
    made = [record["provenance"] for record in records]
    versions = ", ".join(dict.fromkeys(f"torch {origin['versions']['torch']}" for origin in made))
    commits = ", ".join(dict.fromkeys(map(_commit, records)))
    days = _range(sorted({origin["time"][:10] for origin in made}))
    copies = sorted({record["copy_gb_per_s"] for record in records if record.get("copy_gb_per_s")})
    copy = f" A copy moved {_range([number(copies[0]), number(copies[-1])])} GB/s." if copies else ""
    built = dict.fromkeys(f", native: {name}" for record in records if record.get("provider") == "native" and (name := _native(record)))
    return f"Measured on {device(records)}, {versions}{''.join(built)}, commit {commits}, {days}.{copy}"


def _native(record: Record) -> str:
    """How the compiled library was built, "avx512, c++ 12.2.0"; "" where there was none."""
    found = record["provenance"].get("native") or {}
    return ", ".join(str(found[name]) for name in ("capability", "compiler") if found.get(name))


def runs(records: Sequence[Record]) -> str:
    """A Markdown list: every setup that records come from, and the range of what was read before and after each cell."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record["provenance"]["versions"].items() if version)
        native = f"; native library: {name}" if (name := _native(record)) else ""
        setup = f"{_device(record)}; {record['provenance']['platform']}; {versions}{native}; commit {_commit(record)}"
        groups.setdefault(setup, []).append(record)
    lines = []
    for setup, group in groups.items():
        origins = [record["provenance"] for record in group]
        seeds = ", ".join(dict.fromkeys(str(origin["seed"]) for origin in origins))
        imports = sorted(record["import_s"] for record in group if record.get("import_s"))
        times = sorted(origin["time"] for origin in origins)
        parts = [plural(len(group), "record"), f"measured {_range([times[0], times[-1]])}", f"seed {seeds}"]
        parts += [f"import {_range([number(imports[0]), number(imports[-1])])} s"] if imports else []
        lines += [f"- {setup}: {', '.join(parts)}.", f"  {_states(group)}."]
    return "\n".join(lines) + "\n"


def _states(records: Sequence[Record]) -> str:
    moments = [record["provenance"].get(moment) or {} for record in records for moment in ("before", "after")]
    found = []
    for state, (label, unit) in STATES.items():
        values = sorted(moment[state] for moment in moments if moment.get(state) is not None)
        if values:
            found.append(f"{label} {_range([number(values[0]), number(values[-1])])}{unit}")
    flags = {moment["throttle"] for moment in moments if moment.get("throttle")}
    if flags:
        raised = sorted(flags - QUIET)
        found.append(f"throttle flags {', '.join(raised)}" if raised else "no throttle flag at these moments")
    return f"Before and after the cells: {', '.join(found)}" if found else "The machine's state could not be read"


def _device(record: Record) -> str:
    origin = record["provenance"]
    if origin["device"] != "cpu":
        return origin["device"]
    return f"{origin['cpu']} ({plural(origin['cores'], 'core')}), {plural(origin['threads'], 'thread')}"


def _commit(record: Record) -> str:
    origin = record["provenance"]
    return "unknown" if origin["commit"] is None else origin["commit"][:10] + (" with changes" if origin["dirty"] else "")


def _range(ends: Sequence[str]) -> str:
    """The first and the last, in one word if they are the same."""
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"
