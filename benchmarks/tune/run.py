"""`kdkernels bench tune`: launch parameters of the large Triton kernels, measured on this GPU, as the table that kdkernels reads."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..choices import choices, rounds
from ..measure.provenance import provenance
from ..providers import absent, providers
from ..registry import DTYPES, LAYOUTS, Case
from .candidates import PARAMETERS, candidates

if TYPE_CHECKING:
    from kdkernels.triton.launch import Key

    from .contest import Measure

#: Name -> what is measured for one size of the table, smallest first.
CASES = {"tiny": Case("tiny"), "fcos": Case("fcos"), "frcnn": Case("frcnn", batch=8)}
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def several(option: str, known: Sequence[str]) -> None:
        text = f"comma list of {', '.join(known)} (default: all)"
        parser.add_argument(f"--{option}", type=choices(known), default=known, metavar="LIST", help=text)

    several("kernel", tuple(PARAMETERS))
    several("case", tuple(CASES))
    several("dtype", tuple(DTYPES))
    several("layout", tuple(LAYOUTS))
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="cuda or cuda:N (default: the first GPU)")
    parser.add_argument("--rounds", type=rounds, default=30, help="the most that decide about one entry (default: 30)")
    where = "the table, made or added to; what it has is kept (default: where kdkernels looks for this GPU's)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=where)
    parser.add_argument("--again", action="store_true", help="measure also what FILE has")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 something could not be measured, 2 no GPU or another chip's table, 130 Ctrl-C."""
    device = torch.device(args.device)
    if reason := refusal(device):
        _tell(f"bench tune: {reason}")
        return 2
    from kdkernels.triton import launch

    from ..measure.clock import Clock

    index = torch.cuda.current_device() if device.index is None else device.index
    chip = launch.capability(index)
    assert chip is not None
    output = args.output or launch.path(chip)
    keys = [(launch.Key(kernel, dtype, layout, size(CASES[case])), CASES[case]) for kernel, dtype, layout, case in _grid(args)]
    try:
        table = opened(output, chip)
        write(output, table)
    except (OSError, ValueError) as error:
        _tell(f"bench tune: {error}")
        return 2
    with torch.cuda.device(index):
        return tune(keys, table, output, device, Clock(device).measure, args.rounds, args.again)


def refusal(device: torch.device) -> str:
    """Why nothing can be tuned on this device, "" if it can."""
    if device.type != "cuda":
        return "launch parameters are measured, and that takes a CUDA GPU; there is none here, or --device is not it"
    if torch.version.cuda is None:
        return "tables are by CUDA compute capability, and this GPU has none"
    if reason := absent(providers()["triton"], device):
        return f"the Triton kernels cannot run here: {reason}"
    import triton

    return "TRITON_INTERPRET is set, and interpreted kernels say nothing about compiled ones" if triton.knobs.runtime.interpret else ""


def size(case: Case) -> str:
    """The size in the table that a case is measured for."""
    from kdkernels.triton.launch import size_of

    return size_of([torch.empty(case.batch, case.channels, case.pixels, device="meta")])


def opened(output: Path, chip: tuple[int, int]) -> dict[str, Any]:
    """The table in the file, or a new one. Raises ValueError for a file that is no table, or another chip's."""
    from kdkernels.triton import launch

    if not output.exists():
        return {"schema": launch.SCHEMA, "capability": list(chip), "runs": [], "entries": {}}
    table = launch.read(output)
    if table["capability"] != list(chip):
        raise ValueError(
            f"{output}: a table of compute capability {table['capability']}, this GPU has {list(chip)}; choose another --output"
        )
    return table


def tune(
    keys: Sequence[tuple[Key, Case]],
    table: dict[str, Any],
    output: Path,
    device: torch.device,
    measure: Measure,
    rounds: int,
    again: bool = False,
) -> int:
    """Measures each key with its case, and writes the table after each. Exit code as `main`."""
    left = [(key, case) for key, case in keys if again or str(key) not in table["entries"]]
    _tell(f"{len(left)} entries to measure, {len(keys) - len(left)} are there; the table is {output}")
    if not left:
        return 0
    table["runs"].append(provenance(device, SEED))
    sound, begun = True, time.perf_counter()
    for number, (key, case) in enumerate(left, 1):
        said = f"[{number}/{len(left)}] {key}"
        try:
            entry = measured(key, case, device, measure, rounds, said)
        except KeyboardInterrupt:
            _tell(f"stopped; finished entries are in {output}, and the same command goes on from there")
            return 130
        except Exception as error:  # such as too little memory: it must not cost the others
            _tell(f"{said}: failed: {type(error).__name__}: {error}")
            sound = False
            continue
        table["entries"][str(key)] = {**entry, "run": len(table["runs"]) - 1}
        write(output, table)
        minutes = (time.perf_counter() - begun) / number * (len(left) - number) / 60
        _tell(f"{said}: {summary(entry)}; about {minutes:.0f} min left")
    return 0 if sound else 1


def measured(key: Key, case: Case, device: torch.device, measure: Measure, rounds: int, said: str) -> dict[str, Any]:
    """The entry of one key, all but its run. said: what progress is told with."""
    from .calls import CALLS, samples
    from .contest import Contest

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = DTYPES[key.dtype]
    tried = candidates(key.kernel, dtype, key.layout == "channels_last")
    shapes = [(case.batch, case.channels, *level) for level in case.level_sizes]
    _tell(f"{said}: {len(tried)} candidates, on {case.batch} images of {case.pyramid}")
    with torch.no_grad():
        inputs = samples(shapes, dtype, key.layout, device, SEED)
        outcome = Contest(key.kernel, CALLS[key.kernel], inputs, measure, SEED).run(tried, rounds)
    for candidate, reason in outcome.dropped.items():
        _tell(f"{said}: dropped {candidate}: {reason}")
    found = outcome.judgement
    return {
        "parameters": outcome.parameters,
        "heuristic": outcome.heuristic,
        "ms": outcome.ms,
        "heuristic_ms": outcome.heuristic_ms,
        "ratio": None if found is None else {"median": found.ratio, "low": found.low, "high": found.high, "verdict": found.verdict},
        "rounds": outcome.rounds,
        "candidates": outcome.candidates,
        "dropped": len(outcome.dropped),
        "shapes": shapes,
    }


def summary(entry: Mapping[str, Any]) -> str:
    """An entry in words."""
    ratio = entry["ratio"]
    gain = "" if ratio is None else f", {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) of its time"
    if entry["parameters"] is None:
        closest = "nobody looked faster" if ratio is None else f"the closest took{gain.removeprefix(',')}: {ratio['verdict']}"
        return f"the heuristic stays; {closest}"
    changed = {name: value for name, value in entry["parameters"].items() if entry["heuristic"].get(name) != value}
    return f"{' '.join(f'{name}={value}' for name, value in changed.items())} beats the heuristic{gain}"


def write(output: Path, table: Mapping[str, Any]) -> None:
    """The file as a whole, or as it was: it may be in use."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(output.name + ".new")
    new.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(new, output)


def _grid(args: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    return list(product(args.kernel, args.dtype, args.layout, args.case))


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
