"""What is predicted of kdkernels' own kernels is what their launchers ask for: every launch, in its order, and what it moves.

Run as a program, it prints what they ask for. That is a process of its own: launches are recorded of kernels that are not interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.call import bind, sample
from benchmarks.cli import main
from benchmarks.codegen.capture import Launch, is_pyramid, recorded
from benchmarks.registry import DTYPES, ENTRIES, LAYOUTS, Case, Entry, flat
from benchmarks.registry.predicted import ASSUMED_BANDWIDTH, PREDICTED, SHORTEST_MS, launches, milliseconds, units
from kdkernels import backend

ROOT = Path(__file__).parent.parent
CASES = [Case("tiny", batch=1, channels=64, boxes=3, dtype=dtype, layout=layout) for dtype, layout in product(DTYPES, LAYOUTS)]
#: Those whose launches are all predicted.
OWN = [ENTRIES[name] for name in PREDICTED]
#: Of each launch its kernel and its units; by entry, case and mode.
Recordings = dict[str, list[list[Any]]]


class OfPyTorch(TorchDispatchMode):
    """Adds to the launches the operators of PyTorch's own, outside of kdkernels', that make a level."""

    def __init__(self, made: list[Launch]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and is_pyramid((result,)):
            levels = {str(k): (x,) for k, x in enumerate((*args, result)) if isinstance(x, Tensor)}
            self.made.append(Launch(f"torch.{function._opname}", "", (), levels, {}, None, 0.0))
        return result


def recording(entry: Entry, case: Case, mode: str) -> Iterator[tuple[str, float]]:
    """Kernel and units of every launch of one call."""
    generator = torch.Generator().manual_seed(0)
    inputs = entry.inputs(case, generator, torch.device("cpu"))
    given = sample(entry, inputs, mode, [x.shape for x in flat(entry.eager(**inputs))], generator)
    with (
        mock.patch.object(backend, "_choice", "triton"),
        mock.patch.object(backend, "refusal", lambda *_: ""),
        recorded(90, lambda kernel: False) as made,
        OfPyTorch(made),
    ):
        bind(entry, entry.call, mode, own=True)(given)
    ones = False
    for launch in made:
        if launch.kernel == "terms.all_ones":
            ones = bool((launch.arguments["values"] == 1).all())
        idle = ones and launch.arguments.get("unless") is not None
        moved = 0 if idle else sum(x.numel() for levels in launch.arguments.values() if is_pyramid(levels) for x in levels)
        # Rows of masked pixels are skipped, which no argument shows.
        skipped = inputs["ratio"] if launch.kernel == "random_mask.kernel" and launch.constants["LAST"] else 0
        yield launch.kernel, moved / (case.batch * case.channels * case.pixels) - skipped


def key(entry: Entry, case: Case, mode: str) -> str:
    return f"{entry.name}, {case.name}, {mode}"


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("entry", OWN, ids=PREDICTED)
def test_predicted_launches_are_those_that_are_made(entry: Entry, recordings: Recordings) -> None:
    for case, mode in product(CASES, entry.modes):
        found = recordings[key(entry, case, mode)]
        assert [[launch.kernel, launch.units] for launch in launches(entry.name, case, mode)] == found, f"{case.name}, {mode}"


def test_no_less_is_predicted_than_must_be_moved() -> None:
    """But where the contract counts a gradient that is read and written again for d: in fp16 it is written once, when d is known."""
    grid = [(entry, mode, dtype) for entry in OWN for mode in entry.modes for dtype in DTYPES]
    less = [
        (entry.name, mode, dtype) for entry, mode, dtype in grid if units(entry.name, Case(dtype=dtype), mode) < entry.units[mode] - 1e-9
    ]
    assert less == [("gkd_bmfi", "backward_scaled", "fp16")]


def test_there_is_a_prediction_for_every_primitive_and_for_the_methods_of_the_paper() -> None:
    methods = {"gkd", "gkd_imitation", "bmfi", "aid_bmfi", "gkd_bmfi", "gkd_bmfi_separate"}
    assert PREDICTED.keys() == methods | {name for name, entry in ENTRIES.items() if entry.kind == "primitive"}


@pytest.mark.parametrize("name", PREDICTED)
def test_more_bandwidth_takes_less_time_and_a_launch_its_least(name: str) -> None:
    for mode in ENTRIES[name].modes:
        times = [milliseconds(name, Case(), mode, factor * ASSUMED_BANDWIDTH) for factor in (0.1, 0.5, 1.0, 1000.0)]
        moves = units(name, Case(), mode) > 0
        assert all(slow > fast if moves else slow == fast for slow, fast in pairwise(times)), mode
        assert times[-1] == pytest.approx(SHORTEST_MS * len(launches(name, Case(), mode)))


def test_a_time_by_hand() -> None:
    """GKD + BMFI in bf16, 8 images of P3..P7 of 800 x 1344: seven pyramids of 92 MB, and ten launches that move none."""
    case = Case(batch=8, dtype="bf16")
    moved = 7 * 8 * 256 * 22400 * 2 / ASSUMED_BANDWIDTH * 1e3
    assert milliseconds("gkd_bmfi", case, "backward") == pytest.approx(moved + 10 * SHORTEST_MS)


def test_the_list_shows_predictions_beside_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = (k for k, line in enumerate(lines) if line.startswith("  weighted_channel_sum, backward:"))
    moved = 2 * Case().unit / ASSUMED_BANDWIDTH * 1e3
    assert lines[at] == f"  weighted_channel_sum, backward: 2 units (least 2), {moved:.4f} ms, launches: 2"
    assert lines[at + 1].split() == ["reduce.reduce", "1,", "gradient.kernel", "1"]
    assert sum(", launches: " in line for line in lines) == sum(len(entry.modes) for entry in OWN)
    assert any("4.20 TB/s, an assumption for an H200" in line for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = [(entry, case, mode) for entry in OWN for case in CASES for mode in entry.modes]
    print(json.dumps({key(*one): list(recording(*one)) for one in wanted}))
