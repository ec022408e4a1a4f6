"""`kdkernels bench scaling`: one call for more and more images and for larger and larger ones, all sizes taken in turns."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kdkernels.report.tables import to_markdown

from .choices import choices, whole
from .measure import records
from .measure.bandwidth import Copy
from .measure.cell import COPIES, Cell, said
from .measure.clock import Clock, quantiles
from .measure.memory import available_bytes
from .measure.provenance import device_state, provenance
from .measure.samples import needed_bytes
from .providers import BACKENDS, Provider, absent, providers
from .registry import ENTRIES, MODES, PYRAMIDS, Case, Entry
from .report.scaling import tables

Record = dict[str, Any]
#: Without those of torch.compile: their code is forgotten whenever another size's cell is made.
PROVIDERS = ("eager", *BACKENDS)
BATCHES = (1, 2, 4, 8, 16)
#: Sizes of images with the same levels, P3 to P7, from a quarter to twice the usual number of pixels.
SIZES = ("fcos-quarter", "kitti", "fcos", "fcos-double")
#: Of a size that with 16 images still fits, in float64 for the gate, into 24 GB.
PYRAMID = "kitti"
#: Of warming up, and of a turn: a turn of small inputs has more calls.
WARM_S, TURN_S = 0.25, 0.03


@dataclass
class Place:
    """One provider at one size.

    calls: of a turn;   copy_ms: of the copies before its turns;   units: of each turn, the median time over that in which the copies just
    before it moved the bytes of one pyramid
    """

    cell: Cell
    name: str
    calls: int
    copy_ms: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)

    def turn(self, copy: Copy) -> None:
        copies = copy.measure(COPIES)
        ms = self.cell.turn(self.name, self.calls)
        if ms:
            self.copy_ms += copies
            self.units.append(median(ms) * 1e-3 * copy.rate(copies) / self.cell.case.unit)

    def figures(self, copy: Copy) -> dict[str, Any]:
        """`Cell.figures` with those of the turns."""
        found = self.cell.figures(self.name)
        timed = bool(found.get("ms"))
        units = {"rounds": len(self.units), "units": quantiles(self.units)} if timed else {}
        return {**found, **units, "copy": copy.rate(self.copy_ms) if timed else None}


@dataclass
class Size:
    """All providers at one size.   before: what its samples held before anybody was timed"""

    cell: Cell
    places: list[Place]
    before: list[Any]

    def finished(self, copy: Copy) -> dict[tuple[Case, str], dict[str, Any]]:
        """Figures of all, each checked again."""
        self.cell.recheck(self.before)
        return {(self.cell.case, place.name): place.figures(copy) for place in self.places}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def several(option: str, known: Sequence[Any], default: Sequence[Any] | None, otherwise: str, what: str = "") -> None:
        text = f"{what}comma list of {', '.join(map(str, known))} (default: {otherwise})"
        parser.add_argument(f"--{option}", type=choices(known), default=default, metavar="LIST", help=text)

    parser.add_argument("--entry", choices=tuple(ENTRIES), default="gkd_bmfi", help="default: %(default)s")
    parser.add_argument("--mode", choices=MODES, default="backward", help="default: %(default)s")
    several("provider", PROVIDERS, None, "native where it runs, else reference")
    several("batch", BATCHES, BATCHES, "all", "numbers of images of one size: ")
    parser.add_argument("--case", choices=tuple(PYRAMIDS), default=PYRAMID, help="that size (default: %(default)s)")
    several("size", tuple(PYRAMIDS), SIZES, ",".join(SIZES), f"sizes of {Case().batch} images: ")
    parser.add_argument("--channels", type=whole, default=Case().channels, help="of every level (default: %(default)s)")
    parser.add_argument("--rounds", type=whole, default=40, help="turns of every size (default: %(default)s)")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=whole, help="of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and of the order of turns (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines are added to it (default: a latest-scaling.jsonl)")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 something failed or was rejected, 2 usage, 130 Ctrl-C, which leaves no record: only whole series compare."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, entry = torch.device(args.device), ENTRIES[args.entry]
    output = args.output or records.default_path(device, "scaling")
    if args.mode not in entry.modes:
        _tell(f"{entry.name} has no mode {args.mode}; it has {', '.join(entry.modes)}")
        return 2
    if problem := records.unwritable(output):
        _tell(f"--output {output}: {problem}")
        return 2
    names = args.provider or ["reference" if absent(providers()["native"], device) else "native"]
    of_batch = [Case(args.case, batch=batch, channels=args.channels) for batch in args.batch]
    cases = list(dict.fromkeys([*of_batch, *(Case(size, channels=args.channels) for size in args.size)]))
    _tell(f"{len(cases)} sizes, {args.rounds} rounds; records go to {output}")
    try:
        found = measure(entry, cases, args.mode, names, device, args.rounds, args.seed)
    except KeyboardInterrupt:
        _tell("stopped; nothing is recorded of a series that is not whole")
        return 130
    for record in found:
        records.append(output, record)
    print("\n".join(map(to_markdown, tables(found))))
    return 0 if all(record["status"] not in ("rejected", "failed") for record in found) else 1


def measure(
    entry: Entry, cases: Sequence[Case], mode: str, names: Sequence[str], device: torch.device, rounds: int, seed: int = 0
) -> list[Record]:
    """A record for every case and provider, in the order of the cases.

    The gate's float64 copies are several times a case's inputs, which stay until all were timed: so the largest case is admitted first,
    when nothing else is there, and checked again last.
    """
    torch.manual_seed(seed)
    origin = {**provenance(device, seed), "before": device_state(device)}
    copy, known = Copy(device, Clock(device)), providers()
    figures: dict[tuple[Case, str], dict[str, Any]] = {}
    here = []
    for name in names:
        reason = absent(known[name], device, entry, cases[0])
        figures |= {(case, name): {"status": "absent", "reason": reason} for case in cases if reason}
        here += [] if reason else [known[name]]
    sizes = []
    for case in sorted(cases, key=lambda case: case.unit, reverse=True) if here else ():
        _tell(f"{case.name}: inputs and checks")
        size, status, reason = _admitted(entry, case, mode, here, device, seed)
        figures |= {(case, provider.name): {"status": status, "reason": reason} for provider in here}
        sizes += [] if size is None else [size]
    _in_turns(sizes, copy, rounds, seed)
    while sizes:
        figures |= sizes.pop().finished(copy)
    origin["after"] = device_state(device)
    found = []
    for case, name in product(cases, names):
        of_place = figures[case, name]
        rate = of_place.get("copy") or copy.rate(copy.measure(1))
        record = records.kernel_record(entry, case, mode, name, of_place, rate, None, origin)
        found.append({**record, "kind": "scaling", "rounds": of_place.get("rounds", 0), "units": of_place.get("units")})
    return found


def _admitted(
    entry: Entry, case: Case, mode: str, known: Sequence[Provider], device: torch.device, seed: int
) -> tuple[Size | None, str, str]:
    """A size whose providers went through the gate; or None, and as what and why it is recorded."""
    needed, available = needed_bytes(entry, case, device), available_bytes(device)
    if available is not None and needed > available:
        return None, "skipped", f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
    try:
        cell = Cell(entry, case, mode, device, seed)
        for provider in known:
            cell.admit(provider)
        calls = {name: max(COPIES, int(TURN_S / cell.warm(name, WARM_S))) for name in cell.admitted}
        return Size(cell, [Place(cell, provider.name, calls.get(provider.name, 0)) for provider in known], cell.contents()), "", ""
    except Exception as error:  # such as too little memory; the other sizes are measured all the same
        return None, "failed", said(error)


def _in_turns(sizes: Sequence[Size], copy: Copy, rounds: int, seed: int) -> None:
    """Every round a turn of each, in random order: what disturbs the machine for a while meets all sizes alike."""
    order, shuffled = [place for size in sizes for place in size.places], random.Random(seed)
    for done in range(1, rounds + 1):
        shuffled.shuffle(order)
        for place in order:
            if place.name in place.cell.admitted:
                place.turn(copy)
        if done % 10 == 0 or done == rounds:
            _tell(f"round {done} of {rounds}")


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
