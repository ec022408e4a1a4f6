"""`kdkernels bench list`: what can be measured, and by whom."""

from __future__ import annotations

import argparse

import torch

from .providers import absent, providers
from .registry import ENTRIES, QUICK, Case, all_cases


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
    return 0
