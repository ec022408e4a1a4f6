"""`kdkernels bench list`: what can be measured, by whom, and what to expect of kdkernels' own kernels."""

from __future__ import annotations

import argparse

import torch

from .providers import absent, providers
from .registry import ENTRIES, QUICK, Case, Entry, all_cases
from .registry.predicted import ASSUMED_BANDWIDTH, PREDICTED, launches, milliseconds, units
from .report.text import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where providers are to run")


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    print("entries")
    for entry in ENTRIES.values():
        print(f"  {entry.name:24} {entry.kind:10} {', '.join(entry.modes)}")
    print(f"cases (the usual one is {Case().name}; --full has {sum(1 for _ in all_cases())} with every entry; --quick has these pairs)")
    for name, case in QUICK:
        print(f"  {name:24} {case.name}")
    print(f"providers on {device}")
    for name, provider in providers().items():
        print(f"  {name:24} {absent(provider, device) or 'runs here'}")
    print(f"predicted for triton at {Case().name}: units (pyramids) moved, and milliseconds")
    print(f"  at {number(ASSUMED_BANDWIDTH / 1e12)} TB/s, an assumption for an H200")
    print("  besides: some microseconds of the host a launch, and PyTorch's own operations on maps and vectors, which are not listed")
    for entry in (ENTRIES[name] for name in PREDICTED):
        for mode in entry.modes:
            print(_prediction(entry, mode, Case()))
    return 0


def _prediction(entry: Entry, mode: str, case: Case) -> str:
    made = launches(entry.name, case, mode)
    moved = f"{units(entry.name, case, mode):.3g} units (least {entry.units[mode]:.3g})"
    kernels = ", ".join(f"{launch.kernel} {launch.units:.3g}" if launch.units else launch.kernel for launch in made)
    return f"  {entry.name}, {mode}: {moved}, {number(milliseconds(entry.name, case, mode))} ms, launches: {len(made)}\n    {kernels}"
