"""`kdkernels bench tune`: launch parameters of the large Triton kernels, measured on this GPU, as the table that kdkernels reads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from .. import tables
from ..providers import absent, providers
from ..registry import DTYPES, Case
from ..tables import CASES, SEED, tell
from .candidates import PARAMETERS, candidates

if TYPE_CHECKING:
    from kdkernels.tables import Key

    from .contest import Measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables.add_arguments(parser, "kernel", tuple(PARAMETERS))


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 something could not be measured, 2 no GPU or another chip's table, 130 Ctrl-C."""
    device = torch.device(args.device)
    if reason := refusal(device):
        tell(f"bench tune: {reason}")
        return 2
    from kdkernels.triton import launch

    from ..measure.clock import Clock

    grid = product(args.kernel, args.dtype, args.layout, (CASES[name] for name in args.case))
    keys = [(launch.Key(kernel, dtype, layout, size(case)), case) for kernel, dtype, layout, case in grid]
    entry = partial(measured, device=device, measure=Clock(device).measure, rounds=args.rounds)
    return tables.fill("bench tune", launch.TABLE, launch.path, keys, entry, summary, args)


def refusal(device: torch.device) -> str:
    """Why nothing can be tuned on this device, "" if it can."""
    if reason := tables.refusal(device, "launch parameters"):
        return reason
    if reason := absent(providers()["triton"], device):
        return f"the Triton kernels cannot run here: {reason}"
    import triton

    return "TRITON_INTERPRET is set, and interpreted kernels say nothing about compiled ones" if triton.knobs.runtime.interpret else ""


def size(case: Case) -> str:
    """The size in the table that a case is measured for."""
    from kdkernels.tables import size_of

    return size_of([torch.empty(case.batch, case.channels, case.pixels, device="meta")])


def measured(key: Key, case: Case, said: str, device: torch.device, measure: Measure, rounds: int) -> dict[str, Any]:
    """The entry of one key, all but its run. said: what progress is told with."""
    from .calls import CALLS, samples
    from .contest import Contest

    dtype = DTYPES[key.dtype]
    tried = candidates(key.name, dtype, key.layout == "channels_last")
    shapes = [(case.batch, case.channels, *level) for level in case.level_sizes]
    tell(f"{said}: {len(tried)} candidates, on {case.batch} images of {case.pyramid}")
    with torch.no_grad():
        inputs = samples(shapes, dtype, key.layout, device, SEED)
        outcome = Contest(key.name, CALLS[key.name], inputs, measure, SEED).run(tried, rounds)
    for candidate, reason in outcome.dropped.items():
        tell(f"{said}: dropped {candidate}: {reason}")
    return {
        "parameters": outcome.parameters,
        "heuristic": outcome.heuristic,
        "ms": outcome.ms,
        "heuristic_ms": outcome.heuristic_ms,
        "ratio": tables.ratio(outcome.judgement),
        "rounds": outcome.rounds,
        "candidates": outcome.candidates,
        "dropped": len(outcome.dropped),
        "shapes": shapes,
    }


def summary(entry: Mapping[str, Any]) -> str:
    """An entry in words."""
    ratio = entry["ratio"]
    if entry["parameters"] is None:
        closest = "nobody looked faster" if ratio is None else f"the closest took {tables.in_words(ratio)}"
        return f"the heuristic stays; {closest}"
    changed = {name: value for name, value in entry["parameters"].items() if entry["heuristic"].get(name) != value}
    gain = "" if ratio is None else f", {tables.in_words(ratio)}"
    return f"{' '.join(f'{name}={value}' for name, value in changed.items())} beats the heuristic{gain}"
