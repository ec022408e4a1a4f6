"""What `tune` and `choose` have in common: tables by compute capability (`kdkernels.tables`), filled entry by entry on this GPU."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .choices import choices, rounds
from .compare.statistics import Judgement
from .measure.provenance import provenance
from .registry import DTYPES, LAYOUTS, Case

if TYPE_CHECKING:
    from kdkernels.tables import Key, Kind

#: Name -> what is measured for one size of a table of pyramids, smallest first.
CASES = {"tiny": Case("tiny"), "fcos": Case("fcos"), "frcnn": Case("frcnn", batch=8)}
SEED = 0

Entry = dict[str, Any]
#: Measures the entry of one key, all but its run, telling progress with the given words.
Measured = Callable[["Key", Case, str], Entry]


def add_arguments(parser: argparse.ArgumentParser, name: str, known: Sequence[str]) -> None:
    """Options that both have. name, known: the option, and its values, for what the keys are about."""
    for option, values in ((name, known), ("case", tuple(CASES)), ("dtype", tuple(DTYPES)), ("layout", tuple(LAYOUTS))):
        text = f"comma list of {', '.join(values)} (default: all)"
        parser.add_argument(f"--{option}", type=choices(values), default=values, metavar="LIST", help=text)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="cuda or cuda:N (default: the first GPU)")
    parser.add_argument("--rounds", type=rounds, default=30, help="the most that decide about one entry (default: 30)")
    where = "the table, made or added to; what it has is kept (default: where kdkernels looks for this GPU's)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=where)
    parser.add_argument("--again", action="store_true", help="measure also what FILE has")


def refusal(device: torch.device, what: str) -> str:
    """Why `what` cannot be measured on this device for a table, "" if it can."""
    if device.type != "cuda":
        return f"{what} are measured, and that takes a CUDA GPU; there is none here, or --device is not it"
    return "tables are by CUDA compute capability, and this GPU has none" if torch.version.cuda is None else ""


def fill(
    command: str,
    kind: Kind,
    path: Callable[[tuple[int, int]], Path],
    keys: Sequence[tuple[Key, Case]],
    measured: Measured,
    summary: Callable[[Mapping[str, Any]], str],
    args: argparse.Namespace,
) -> int:
    """Measures the keys on the GPU of `args`, each with its case, into the table of `kind` in its file or at `path`.

    Exit code: 0 done, 1 something could not be measured, 2 another chip's table or none, 130 Ctrl-C.
    """
    from kdkernels import tables

    device = torch.device(args.device)
    index = torch.cuda.current_device() if device.index is None else device.index
    chip = tables.capability(index)
    assert chip is not None  # who is not refused
    output = args.output or path(chip)
    try:
        table = opened(kind, output, chip)
        write(output, table)
    except (OSError, ValueError) as error:
        tell(f"{command}: {error}")
        return 2
    with torch.cuda.device(index):
        return add(keys, table, output, device, measured, summary, args.again)


def opened(kind: Kind, output: Path, chip: tuple[int, int]) -> dict[str, Any]:
    """The table in the file, or a new one. Raises ValueError for a file that is no such table, or another chip's."""
    if not output.exists():
        return kind.empty(chip)
    table = kind.read(output)
    if table["capability"] != list(chip):
        raise ValueError(
            f"{output}: a table of compute capability {table['capability']}, this GPU has {list(chip)}; choose another --output"
        )
    return table


def add(
    keys: Sequence[tuple[Key, Case]],
    table: dict[str, Any],
    output: Path,
    device: torch.device,
    measured: Measured,
    summary: Callable[[Mapping[str, Any]], str],
    again: bool = False,
) -> int:
    """Measures each key with its case, and writes the table after each. Exit code as `fill`."""
    left = [(key, case) for key, case in keys if again or str(key) not in table["entries"]]
    tell(f"{len(left)} entries to measure, {len(keys) - len(left)} are there; the table is {output}")
    if not left:
        return 0
    table["runs"].append(provenance(device, SEED))
    sound, begun = True, time.perf_counter()
    for number, (key, case) in enumerate(left, 1):
        said = f"[{number}/{len(left)}] {key}"
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            entry = measured(key, case, said)
        except KeyboardInterrupt:
            tell(f"stopped; finished entries are in {output}, and the same command goes on from there")
            return 130
        except Exception as error:  # such as too little memory: it must not cost the others
            tell(f"{said}: failed: {type(error).__name__}: {error}")
            sound = False
            continue
        table["entries"][str(key)] = {**entry, "run": len(table["runs"]) - 1}
        write(output, table)
        minutes = (time.perf_counter() - begun) / number * (len(left) - number) / 60
        tell(f"{said}: {summary(entry)}; about {minutes:.0f} min left")
    return 0 if sound else 1


def write(output: Path, table: Mapping[str, Any]) -> None:
    """The file as a whole, or as it was: it may be in use."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(output.name + ".new")
    new.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(new, output)


def ratio(found: Judgement | None) -> dict[str, Any] | None:
    """What an entry says of a verdict."""
    return None if found is None else {"median": found.ratio, "low": found.low, "high": found.high, "verdict": found.verdict}


def in_words(ratio: Mapping[str, Any]) -> str:
    """What `ratio` made."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) of its time: {ratio['verdict']}"


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
