"""`kdkernels bench speed-of-light`: how far everybody is from the time that the ideal bytes take at the measured copy bandwidth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import torch

from kdkernels.report.tables import Table, to_markdown

from .. import run
from ..measure.records import default_path, newest, read
from ..registry import ENTRIES, Case
from ..registry.predicted import PREDICTED, SHORTEST_MS, milliseconds
from .cells import Cell, Record, cells, distance, p50, tried_names
from .kernels import not_measured, shown
from .origin import where
from .text import number

#: Besides the primitives.
METHODS = ("gkd_bmfi",)
#: Whose launches were written down beforehand.
OWN = "triton"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=Path, nargs="+", metavar="FILE", help="results of `kdkernels bench`; without it, the options below measure"
    )
    run.add_arguments(parser, [name for name, entry in ENTRIES.items() if entry.kind == "primitive" or name in METHODS])


def main(args: argparse.Namespace) -> int:
    """0 done; 1 something that was to be measured failed or was rejected, or there is nothing to show; 2 usage; 130 Ctrl-C."""
    status = 0
    if args.input:
        missing = [str(path) for path in args.input if not path.is_file()]
        if missing:
            print(f"no such file: {', '.join(missing)}", file=sys.stderr)
            return 2
        found = cells(newest(record for path in args.input for record in read(path)))
    else:
        with redirect_stdout(sys.stderr):
            status = run.main(args)
        if status == 2:
            return status
        found = cells(_asked(args))
    tables = [table for case in dict.fromkeys(cell.case for cell in found) if (table := speed_of_light(found, case)) is not None]
    print("\n".join(map(to_markdown, tables)) or "nothing measured")
    return status if tables else 1


def _asked(args: argparse.Namespace) -> list[Record]:
    """What the run just measured, or found there already with --resume."""
    jobs = run.grid(run.pairs(args), args.mode)
    wanted = {(job.entry.name, job.case, job.mode) for job in jobs}
    path = args.output or default_path(torch.device(args.device), "kernels")
    kernels = [record for record in newest(read(path)) if record["kind"] == "kernel" and record["provider"] in args.provider]
    return [record for record in kernels if (record["entry"], Case(**record["case"]), record["mode"]) in wanted]


def speed_of_light(found: Iterable[Cell], case: Case) -> Table | None:
    """A row a primitive (and the whole of GKD + BMFI) and mode: ideal bytes, units, milliseconds, and each provider's multiple of them.

    Where the Triton backend was tried, also its milliseconds, measured and predicted.
    """
    chosen = [cell for cell in found if cell.case == case and cell.tried and (cell.kind == "primitive" or cell.entry in METHODS)]
    if not chosen:
        return None
    names = tried_names(chosen)
    rows = []
    for cell in chosen:
        multiples = [shown(cell, name, lambda record: number(distance(record), "x")) for name in names]
        ideal = [number(cell.ideal_bytes / 1e6), number(cell.units), number(cell.light_ms)]
        row = [f"{cell.entry}, {cell.mode}", *ideal, *multiples]
        if OWN in names:
            row += [shown(cell, OWN, lambda record: number(p50(record))), shown(cell, OWN, lambda record: number(_predicted(record)))]
        rows.append(row)
    origin = where([record for cell in chosen for record in cell.records.values()])
    notes = [
        "1.00x is the speed of light: the ideal bytes at the bandwidth of a copy, measured in the same run. "
        f"One unit is one pyramid, {number(case.unit / 1e6)} MB. {origin}",
        *not_measured(chosen),
    ]
    columns = ["", "ideal MB", "units", "ms", *names]
    if OWN in names:
        columns += [f"{OWN} ms", "predicted ms"]
        notes.insert(
            1, f"Predicted: what {OWN}'s launches move, at the same bandwidth, and at least {number(1e3 * SHORTEST_MS)} us a launch."
        )
    return Table(f"Distance from the speed of light at {case.name}", columns, rows, notes)


def _predicted(record: Record) -> float | None:
    """None for an entry that is no more."""
    if record["entry"] not in PREDICTED:
        return None
    return milliseconds(record["entry"], Case(**record["case"]), record["mode"], 1e9 * record["copy_gb_per_s"])
