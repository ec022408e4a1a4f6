"""`kdkernels bench choose`: both backends of every primitive, measured on this GPU, as the table by which `auto` chooses."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .. import tables
from ..providers import absent, providers
from ..registry import ENTRIES, Case
from ..tables import SEED, tell
from .subjects import MADE_OF_OTHERS, SUBJECTS, grid

if TYPE_CHECKING:
    from kdkernels.tables import Key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables.add_arguments(parser, "primitive", tuple(SUBJECTS))


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 something could not be measured, 2 no GPU or another chip's table, 130 Ctrl-C."""
    device = torch.device(args.device)
    if reason := refusal(device):
        tell(f"bench choose: {reason}")
        return 2
    from kdkernels import choice

    keys = grid(args.primitive, args.dtype, args.layout, args.case)
    entry = partial(measured, device=device, rounds=args.rounds)
    try:
        return tables.fill("bench choose", choice.TABLE, choice.path, keys, entry, summary, args)
    finally:
        choice.forget()


def refusal(device: torch.device) -> str:
    """Why there is nothing to choose between on this device, "" if there is."""
    from kdkernels import choice

    if reason := tables.refusal(device, "times of backends"):
        return reason
    missing = {name: reason for name in choice.BACKENDS if (reason := absent(providers()[name], device))}
    return "; ".join(f"{name} cannot run here: {reason}" for name, reason in missing.items())


def measured(key: Key, case: Case, said: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """The entry of one key, all but its run. Raises RuntimeError where a backend is wrong. said: what progress is told with."""
    from kdkernels import choice

    from ..measure.cell import Cell
    from .contest import contest

    entry, mode, _ = SUBJECTS[key.name]
    # The entries that were written so far choose the backends of the other primitives.
    choice.forget()
    tell(f"{said}: {entry}, {mode}, on {case.batch} images of {case.pyramid}")
    first, second = (replace(providers()[name], primitive=key.name) for name in choice.BACKENDS)
    with by_others(key.name):
        outcome = contest(Cell(ENTRIES[entry], case, mode, device, SEED), first, second, rounds, SEED)
    return {
        "ms": outcome.ms,
        "ratio": tables.ratio(outcome.judgement),
        "rounds": outcome.rounds,
        "entry": entry,
        "mode": mode,
        "case": case.as_dict(),
    }


def by_others(measured: str) -> AbstractContextManager[None]:
    """Within it calls do not go past the primitive that is measured to the one launch that does its work too."""
    from kdkernels.backend import assigned

    return nullcontext() if measured == MADE_OF_OTHERS else assigned(MADE_OF_OTHERS, "reference")


def summary(entry: Mapping[str, Any]) -> str:
    """An entry in words."""
    (first, _), (second, _) = entry["ms"].items()
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in entry["ms"].items())
    return f"{times}; {second} against {first}: {tables.in_words(entry['ratio'])}"
