"""`kdkernels bench`: every chosen provider on every chosen cell, into a file of records and a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import records_table
from .choices import choices, seconds, whole
from .measure import records
from .measure.bandwidth import Copy
from .measure.cell import Cell, Functions, said
from .measure.clock import Clock
from .measure.memory import available_bytes
from .measure.profile import import_seconds
from .measure.provenance import device_state, provenance, revision
from .measure.samples import needed_bytes
from .providers import BACKENDS, BASELINES, absent, providers
from .registry import BATCHES, BOXES, CHANNELS, DTYPES, ENTRIES, LAYOUTS, MODES, PYRAMIDS, QUICK, Case, Entry, all_cases

Record = dict[str, Any]
#: Option -> field of `Case` and its values.
AXES: dict[str, tuple[str, Sequence[Any]]] = {
    "case": ("pyramid", tuple(PYRAMIDS)),
    "batch": ("batch", BATCHES),
    "channels": ("channels", CHANNELS),
    "boxes": ("boxes", BOXES),
    "dtype": ("dtype", tuple(DTYPES)),
    "layout": ("layout", tuple(LAYOUTS)),
}


#: Fields of a record's provenance that --resume compares.
SETUP = ("commit", "dirty", "versions", "device", "cpu", "threads", "seed", "native")
#: What is measured where no option says which entries.
LOOK = ("gkd_bmfi",)


class Job(NamedTuple):
    """One cell to be measured."""

    entry: Entry
    case: Case
    mode: str

    def __str__(self) -> str:
        return f"{self.entry.name}, {self.mode}, {self.case.name}"


def add_arguments(parser: argparse.ArgumentParser, entries: Sequence[str] | None = None) -> None:
    """`entries`: what is measured where no option says which; None: `LOOK`, or all of --quick and --full."""

    def several(option: str, known: Sequence[Any], default: Sequence[Any] | None, otherwise: str) -> None:
        text = f"comma list of {', '.join(map(str, known))} (default: {otherwise})"
        parser.add_argument(f"--{option}", type=choices(known), default=default, metavar="LIST", help=text)

    several("entry", tuple(ENTRIES), entries, ", ".join(entries) if entries else f"{', '.join(LOOK)}; all with --quick and --full")
    for option, (field, values) in AXES.items():
        several(option, values, None, str(getattr(Case(), field)))
    several("mode", MODES, MODES, "all that an entry has")
    several("provider", (*BASELINES, *BACKENDS), (*BASELINES, *BACKENDS), "all; those that cannot run here are listed with the reason")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a dozen pairs of entry and case; --entry, --case ... keep those that match")
    which.add_argument("--full", action="store_true", help="every case there is (days); --case, --batch ... keep those that match")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="of timing that a provider gets in each cell (default: 1)")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=whole, help="of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and of the order of providers (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines are added to it (default: a latest-kernels.jsonl)")
    parser.add_argument("--resume", action="store_true", help="skip cells that FILE has from this commit, with nothing changed since")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 something failed or was rejected, 2 nothing to measure, 130 Ctrl-C."""
    jobs = grid(pairs(args), args.mode)
    if not jobs:
        print("nothing to measure: no such case among --quick or --full, or the entries have none of the modes", file=sys.stderr)
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    output = args.output or records.default_path(device, "kernels")
    if problem := records.unwritable(output):
        print(f"--output {output}: {problem}", file=sys.stderr)
        return 2
    if args.resume:
        done = finished(records.read(output), provenance(device, args.seed))
        jobs = [job for job in jobs if not all(_key(job, name) in done for name in args.provider)]
    print(f"{len(jobs)} cells, up to {len(args.provider)} providers each; records go to {output}", file=sys.stderr)
    sound, begun = True, time.perf_counter()
    measured = measure(jobs, args.provider, device, args.seconds, args.seed)
    try:
        for number, (job, found) in enumerate(measured, 1):
            for record in found:
                records.append(output, record)
            sound = sound and all(record["status"] not in ("rejected", "failed") for record in found)
            print(records_table.table(str(job), found), flush=True)
            left = (time.perf_counter() - begun) / number * (len(jobs) - number)
            print(f"[{number}/{len(jobs)}] {job}: done; about {_duration(left)} left", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are in {output}, --resume goes on from there", file=sys.stderr)
        return 130
    return 0 if sound else 1


def grid(pairs: Sequence[tuple[Entry, Case]], modes: Sequence[str]) -> list[Job]:
    """The cells; an entry is measured in the modes that it has."""
    return [Job(entry, case, mode) for entry, case in pairs for mode in entry.modes if mode in modes]


def pairs(args: argparse.Namespace) -> list[tuple[Entry, Case]]:
    """What the options ask for: the usual case, changed as they say; with --quick or --full those of that list that match them."""
    given = {field: values for option, (field, _) in AXES.items() if (values := getattr(args, option)) is not None}
    names = args.entry or (tuple(ENTRIES) if args.quick or args.full else LOOK)
    usual = Case().as_dict()
    if args.quick:
        known = [(ENTRIES[name], case) for name, case in QUICK if name in names]
    else:
        changed = product(*(given.get(field.name, [usual[field.name]]) for field in fields(Case)))
        cases = all_cases() if args.full else [Case(*values) for values in changed]
        known = [(ENTRIES[name], case) for case in cases for name in names]
    return [(entry, case) for entry, case in known if all(getattr(case, field) in values for field, values in given.items())]


def measure(
    jobs: Sequence[Job], names: Sequence[str], device: torch.device, seconds: float = 1.0, seed: int = 0
) -> Iterator[tuple[Job, list[Record]]]:
    """Each job with a record for every named provider, as soon as it is done."""
    if not jobs:
        return
    torch.manual_seed(seed)
    copy = Copy(device, Clock(device))
    imported = import_seconds() if any(name in BACKENDS for name in names) else None
    origin = provenance(device, seed)
    previous, functions = jobs[0], Functions(jobs[0].entry)
    for job in jobs:
        if (job.entry, job.case) != (previous.entry, previous.case):
            previous, functions = job, Functions(job.entry)
        before = device_state(device)
        figures, copies = _figures(job, names, device, seconds, seed, functions, copy)
        rate = copy.rate(copies or copy.measure(1))
        source = {**origin, "before": before, "after": device_state(device)}
        imports = {name: imported if name in BACKENDS else None for name in names}
        yield job, [records.kernel_record(*job, name, figures[name], rate, imports[name], source) for name in names]


def finished(found: Sequence[Mapping[str, Any]], origin: Mapping[str, Any]) -> set[str]:
    """Keys of the records that need not be measured again: of the same commit, with nothing changed then or now, and the same setup.

    origin: today's `provenance`
    """
    commit, dirty = revision()
    if commit is None or dirty:
        print("--resume: kdkernels is not at a clean commit, so everything is measured", file=sys.stderr)
        return set()
    now = {**origin, "commit": commit, "dirty": False}
    same = (record for record in records.newest(found) if all(record["provenance"].get(field) == now[field] for field in SETUP))
    return {records.key(record) for record in same if record["status"] != "failed"}


def _of(cell: Cell, name: str) -> Mapping[str, Any]:
    """The figures of one provider; an exception costs only its own."""
    try:
        return cell.figures(name)
    except Exception as error:
        return {"status": "failed", "reason": said(error)}


def _figures(
    job: Job, names: Sequence[str], device: torch.device, seconds: float, seed: int, functions: Functions, copy: Copy
) -> tuple[dict[str, Mapping[str, Any]], list[float]]:
    """Provider -> what its record says; milliseconds of the copies meanwhile."""
    known = providers()
    figures: dict[str, Mapping[str, Any]] = {}
    for name in names:
        if reason := absent(known[name], device, job.entry, job.case):
            figures[name] = {"status": "absent", "reason": reason}
    here = [name for name in names if name not in figures]
    try:
        needed, available = needed_bytes(job.entry, job.case, device), available_bytes(device)
        if available is not None and needed > available:
            reason = f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
            return {**figures, **{name: {"status": "skipped", "reason": reason} for name in here}}, []
        cell = Cell(*job, device, seed, functions)
        for name in here:
            cell.admit(known[name])
        cell.time(seconds, copy)
        return {**figures, **{name: _of(cell, name) for name in here}}, cell.copy_ms
    except Exception as error:  # One cell that cannot be measured must not cost the rest of a night's run.
        return {**figures, **{name: {"status": "failed", "reason": said(error)} for name in here}}, []


def _key(job: Job, provider: str) -> str:
    about = {"kind": "kernel", "entry": job.entry.name, "case": job.case.as_dict(), "mode": job.mode, "provider": provider}
    return records.key(about)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
