"""Which cells are compared: the run's options, and what is taken where they say nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ..choices import choices, whole
from ..providers import BACKENDS, BASELINES
from ..registry import ENTRIES, MODES, Case, Entry
from ..run import AXES, pairs
from .rounds import Wanted

#: Without options: one case, because every cell is measured in every round. A GPU is busy for long enough only with a large one.
USUAL = {"cpu": Case("tiny"), "cuda": Case(batch=8, dtype="bf16")}
NOTE = "without an option about the case: " + ", ".join(f"{case.name} on {device}" for device, case in USUAL.items())


def add_selection(parser: argparse.ArgumentParser) -> None:
    def several(option: str, known: Sequence[Any], otherwise: str) -> None:
        text = f"comma list of {', '.join(map(str, known))} (default: {otherwise})"
        parser.add_argument(f"--{option}", type=choices(known), metavar="LIST", help=text)

    several("entry", tuple(ENTRIES), "all")
    for option, (field, values) in AXES.items():
        several(option, values, str(getattr(Case(), field)))
    several("mode", MODES, "backward, or forward where there is no gradient, and inline")
    several("provider", (*BASELINES, *BACKENDS), "kdkernels' backends, and eager once, as a control")
    parser.add_argument("--quick", action="store_true", help="a dozen pairs of entry and case; --entry, --case ... keep those that match")
    parser.set_defaults(full=False)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=whole, help="of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of inputs (default: 0)")


def select(args: argparse.Namespace) -> list[Wanted]:
    """The cells, those of one case together. Baselines contain nothing of kdkernels: they are controls."""
    given = args.quick or any(getattr(args, option) is not None for option in AXES)
    args.entry = args.entry or list(ENTRIES)
    usual = USUAL["cpu" if torch.device(args.device).type == "cpu" else "cuda"]
    chosen = pairs(args) if given else [(ENTRIES[name], usual) for name in args.entry]
    jobs = [(entry.name, case, mode) for entry, case in chosen for mode in _modes(entry, args.mode)]
    wanted = [Wanted(*job, name, name in BASELINES) for job in jobs for name in args.provider or BACKENDS]
    if args.provider is None:
        wanted += [Wanted(*job, "eager", True) for job in jobs[:1]]
    return wanted


def _modes(entry: Entry, asked: Sequence[str] | None) -> list[str]:
    if asked is not None:
        return [mode for mode in entry.modes if mode in asked]
    usual = "backward" if "backward" in entry.modes else "forward"
    return [mode for mode in entry.modes if mode in (usual, "inline")]
