"""`kdkernels bench step`: the time and memory of whole training steps, and the teacher's and distillation's shares of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..choices import choices, whole
from ..measure import records
from ..measure.provenance import device_state, provenance
from ..providers import BACKENDS, BASELINES, absent, providers
from ..registry import ENTRIES
from .pairs import PAIRS
from .session import Session
from .step import Variant, has_step, variants
from .table import table

MODES = ("inline", "explicit")
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def several(option: str, known: Sequence[str], default: Sequence[str] | None, otherwise: str) -> None:
        text = f"comma list of {', '.join(known)} (default: {otherwise})"
        parser.add_argument(f"--{option}", type=choices(known), default=default, metavar="LIST", help=text)

    several("pair", tuple(PAIRS), None, "fcos-small on a CPU, else fcos-r101-r50")
    several("loss", [entry.name for entry in ENTRIES.values() if has_step(entry)], ["gkd_bmfi"], "gkd_bmfi")
    several("provider", (*BASELINES, *BACKENDS), None, "eager, compile and the backends of kdkernels that run here")
    several("mode", MODES, MODES, "both")
    parser.add_argument("--threads", type=whole, help="of torch on a CPU")
    parser.add_argument("--batch", type=whole, default=2, help="images a step (default: 2)")
    parser.add_argument("--rounds", type=whole, default=20, help="steps of each variant that are timed (default: 20)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="bf16: autocast around the forward passes")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines are added to it (default: a latest-steps.jsonl)")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 all that can run here was measured, 1 something failed or was rejected, 2 usage, 130 Ctrl-C."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    output = args.output or records.default_path(device, "steps")
    if problem := records.unwritable(output):
        _tell(f"--output {output}: {problem}")
        return 2
    names = args.provider or ["eager", "compile", *(name for name in BACKENDS if not absent(providers()[name], device))]
    plan = variants([ENTRIES[name] for name in args.loss], names, args.mode)
    sound = True
    for name in args.pair or ["fcos-small" if device.type == "cpu" else "fcos-r101-r50"]:
        _tell(f"{name}: {len(plan)} steps, {args.rounds} rounds; records go to {output}")
        found, stopped = measure_pair(name, plan, device, args)
        for record in found:
            records.append(output, record)
        sound = sound and all(record["status"] not in ("failed", "rejected") for record in found)
        print(table(found), flush=True)
        if stopped:
            _tell(f"stopped; what was timed is in {output}")
            return 130
    return 0 if sound else 1


def measure_pair(name: str, plan: Sequence[Variant], device: torch.device, args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """One record a variant, in the plan's order; whether Ctrl-C ended it early."""
    pair = PAIRS[name]
    origin = {**provenance(device, SEED), "before": device_state(device)}
    session = Session(pair, args.batch, device, args.amp == "bf16", SEED, _tell)
    try:
        session.admit(plan)
        session.measure(args.rounds)
    except KeyboardInterrupt:
        stopped = True
    else:
        stopped = session.rounds < args.rounds
    origin["after"] = device_state(device)
    common = {
        "schema": records.SCHEMA,
        "kind": "step",
        "pair": name,
        "batch": args.batch,
        "image": list(pair.image),
        "dtype": "fp32",
        "amp": args.amp,
    }
    return [{**common, **session.result(variant), "provenance": origin} for variant in plan], stopped


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
