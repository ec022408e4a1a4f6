"""`kdkernels bench traffic`: one call by itself, for Nsight Compute to count what its kernels move, and a table of what it has counted.

    ncu --profile-from-start off --csv --print-units base --metrics METRICS --log-file FILE kdkernels bench traffic --batch 8 --dtype bf16
    kdkernels bench traffic --input FILE --batch 8 --dtype bf16

METRICS are those of `METRICS` with commas between them. What a kernel leaves in the L2 cache to be written later is not in its bytes.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from kdkernels.report.tables import Table, to_markdown

from .call import bind
from .call import sample as ready
from .choose.run import by_others
from .providers import BACKENDS, absent, providers, reference_of
from .registry import ENTRIES, MODES, Case, Entry, flat
from .registry.predicted import ASSUMED_BANDWIDTH, PREDICTED, units
from .report.text import number
from .run import AXES

#: Metric of Nsight Compute -> its units -> what they are in nanoseconds and in bytes.
METRICS: Mapping[str, Mapping[str, float]] = {
    "gpu__time_duration.sum": {"nsecond": 1, "ns": 1, "usecond": 1e3, "us": 1e3, "msecond": 1e6, "ms": 1e6},
    "dram__bytes_read.sum": {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    "dram__bytes_write.sum": {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
}
#: Of a kernel's template arguments, before its parameters.
_CASTS = re.compile(r"\((?:bool|int|unsigned int|long)\)")


class Kernel(NamedTuple):
    """One launch, in the order of `METRICS`: nanoseconds, bytes read, bytes written."""

    name: str
    ns: float
    read: float
    written: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entry", choices=tuple(PREDICTED), default="gkd_bmfi", help="default: %(default)s")
    parser.add_argument("--mode", choices=MODES, default="backward", help="default: %(default)s")
    parser.add_argument("--provider", choices=BACKENDS, default="native", help="default: %(default)s")
    for option, (field, values) in AXES.items():
        usual = getattr(Case(), field)
        parser.add_argument(f"--{option}", type=type(usual), choices=values, default=usual, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the call is made")
    parser.add_argument("--input", type=Path, metavar="FILE", help="what Nsight Compute has written of such a call, to be shown")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 nothing was counted, 2 usage, or who cannot run here."""
    entry = ENTRIES[args.entry]
    case = Case(**{field: getattr(args, option) for option, (field, _) in AXES.items()})
    if args.mode not in entry.modes:
        print(f"{entry.name} has no mode {args.mode}, but {', '.join(entry.modes)}", file=sys.stderr)
        return 2
    if args.input is None:
        return one_call(entry, case, args.mode, args.provider, torch.device(args.device))
    try:
        found = counted(args.input.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{args.input}: {error}", file=sys.stderr)
        return 1
    print(to_markdown(shown(found, entry, case, args.mode)))
    return 0


def one_call(entry: Entry, case: Case, mode: str, name: str, device: torch.device) -> int:
    """The second call of two is between the start and the stop of a profiler. Exit code: as `main`."""
    provider, generator = providers()[name], torch.Generator().manual_seed(0)
    if reason := absent(provider, device, entry, case):
        print(f"{name} cannot run here: {reason}", file=sys.stderr)
        return 2
    inputs = entry.inputs(case, generator, device)
    with torch.no_grad():
        shapes = [value.shape for value in flat(reference_of(entry)(**inputs))]
    given, call = ready(entry, inputs, mode, shapes, generator), bind(entry, provider.function(entry), mode, own=True)
    # By passes also where the one launch was measured as faster.
    with by_others(entry.name), provider.active():
        call(given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        call(given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
    return 0


def counted(text: str) -> list[Kernel]:
    """The kernels of a log with `--csv`, in their order. Raises ValueError where there are none, or one lacks a metric."""
    lines = text.splitlines()
    begin = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[begin:]):
        metric, unit = row["Metric Name"], row["Metric Unit"]
        if metric in METRICS:
            if unit not in METRICS[metric]:
                raise ValueError(f"{metric} is in {unit!r}, which is none of {', '.join(METRICS[metric])}")
            _, values = kernels.setdefault(row["ID"], (row["Kernel Name"], {}))
            values[metric] = float(row["Metric Value"].replace(",", "")) * METRICS[metric][unit]
    if not kernels or any(len(values) < len(METRICS) for _, values in kernels.values()):
        raise ValueError(f"Nsight Compute has not counted {', '.join(METRICS)}; what it said is in this file")
    return [Kernel(name, *(values[metric] for metric in METRICS)) for name, values in kernels.values()]


def shown(found: list[Kernel], entry: Entry, case: Case, mode: str) -> Table:
    """A row a kernel that moves a hundredth of a unit at least, and one for all."""

    def row(name: str, kernels: list[Kernel]) -> list[str]:
        read, written = (sum(part) / case.unit for part in ([k.read for k in kernels], [k.written for k in kernels]))
        return [name, str(len(kernels)), number(sum(k.ns for k in kernels) / 1e6), *map(number, (read, written, read + written))]

    large = [k for k in found if k.read + k.written >= case.unit / 100]
    small = [k for k in found if k not in large]
    rows = [row(_CASTS.sub("", k.name).partition("(")[0], [k]) for k in large]
    rows += [row("the others", small)] if small else []
    least = entry.units[mode]
    notes = [
        f"One unit is one pyramid, {number(case.unit / 1e6)} MB. Least: {number(least)} units, "
        f"{number(1e3 * least * case.unit / ASSUMED_BANDWIDTH)} ms at {number(ASSUMED_BANDWIDTH / 1e12)} TB/s, which is an assumption; "
        f"by passes {number(units(entry.name, case, mode))} units. Each kernel begins with empty caches here, and what it leaves in them "
        "to be written later is not counted."
    ]
    columns = ["kernel", "launches", "ms", "units read", "units written", "units"]
    return Table(f"Memory traffic of {entry.name}, {mode}, {case.name}", columns, [*rows, row("together", found)], notes)
