"""`kdkernels bench tune`: who wins, what is kept, what is refused. A clock that is no clock says how long everybody takes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import kdkernels.tables
from benchmarks import tables
from benchmarks.cli import main
from benchmarks.registry import DTYPES, LAYOUTS, Case
from benchmarks.tune import calls, run
from benchmarks.tune.candidates import PARAMETERS, candidates
from benchmarks.tune.contest import Contest, Outcome
from kdkernels.triton import launch

CPU = torch.device("cpu")
X = torch.arange(1.0, 65.0)
#: Milliseconds by BLOCK and call; 128 is the heuristic's.
Cost = Callable[[int, str], float]


class Toy:
    """A kernel with calls "a" and "b", and a clock that times them by what the launch parameters are."""

    def __init__(self, cost: Cost, noise: float = 0.005) -> None:
        self.cost, self.noise, self.random, self.timed = cost, noise, random.Random(0), set[int]()

    def call(self, name: str, inputs: Any) -> list[Tensor]:
        constants = launch.parameters("toy", lambda dtype, last: {"BLOCK": 128, "num_warps": 4}, [X], False)
        self.block, self.name = constants["BLOCK"], name
        if self.block == 13:
            raise RuntimeError("out of resource: shared memory\nmore")
        out = torch.empty_like(X)
        if self.block != 11:
            out.copy_(X * (1.001 if self.block == 12 else 1 + 1e-7))
        return [out, torch.ones(3)]

    def measure(self, timed: Sequence[Callable[[], Any]]) -> list[float]:
        ms = []
        for one in timed:
            one()
            self.timed.add(self.block)
            ms.append(self.cost(self.block, self.name) * self.random.gauss(1, self.noise))
        return ms

    def contest(self, *blocks: int, rounds: int = 30) -> Outcome:
        calls = {name: partial(self.call, name) for name in ("a", "b")}
        return Contest("toy", calls, [None, None], self.measure).run([{"BLOCK": block} for block in blocks], rounds)  # type: ignore[list-item]


def test_the_fastest_wins_and_is_named_with_all_its_parameters() -> None:
    toy = Toy(lambda block, call: {128: 1.0, 256: 0.9, 512: 0.8, 1024: 1.5}[block] * (2 if call == "a" else 1))
    found = toy.contest(256, 512, 1024, 128)
    assert found.parameters == {"BLOCK": 512, "num_warps": 4} and found.heuristic == {"BLOCK": 128, "num_warps": 4}
    assert found.ms is not None and found.ms == pytest.approx({"a": 1.6, "b": 0.8}, rel=0.01)
    assert found.heuristic_ms == pytest.approx({"a": 2.0, "b": 1.0}, rel=0.01)
    assert found.judgement is not None and found.judgement.verdict == "faster" and found.judgement.ratio == pytest.approx(0.8, rel=0.01)
    assert found.candidates == 3 and found.rounds >= 8 and not found.dropped


@pytest.mark.parametrize(
    ("cost", "noise"),
    [
        (lambda block, call: 1.0 if block == 128 else 0.99, 0.002),  # too little
        (lambda block, call: 1.0, 0.3),  # nothing but noise
        (lambda block, call: 1.0 if block == 128 else 1.2, 0.01),  # slower
        (lambda block, call: 1.0 if block == 128 else {"a": 0.8, "b": 1.05}[call], 0.002),  # one call pays for the other
    ],
)
def test_the_heuristic_stays_unless_somebody_is_truly_faster(cost: Cost, noise: float) -> None:
    found = Toy(cost, noise).contest(64, 256, 512)
    assert found.parameters is None and found.ms is None and found.candidates == 3
    assert found.heuristic_ms.keys() == {"a", "b"}


def test_who_is_wrong_or_raises_is_dropped_and_never_timed() -> None:
    toy = Toy(lambda block, call: 1.0 if block == 128 else 0.5)
    found = toy.contest(11, 12, 13, 256)
    assert found.parameters is not None and found.parameters["BLOCK"] == 256 and toy.timed == {128, 256}
    assert "not what the heuristic gives" in found.dropped["BLOCK=11"] and "not what the heuristic gives" in found.dropped["BLOCK=12"]
    assert found.dropped["BLOCK=13"] == "a: RuntimeError: out of resource: shared memory"


def test_without_a_candidate_left_the_heuristic_has_its_time() -> None:
    found = Toy(lambda block, call: 3.0, 0.0).contest(128, 13)
    assert found.parameters is None and found.judgement is None and found.heuristic_ms == {"a": 3.0, "b": 3.0}


# The table


def entry(parameters: Mapping[str, int] | None) -> dict[str, Any]:
    return {"parameters": parameters, "heuristic": {"BLOCK": 128}, "ratio": None}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(tables, "provenance", lambda device, seed: {"time": "then"})
    return [(launch.Key("reduce", dtype, "contiguous", "small"), Case("tiny")) for dtype in ("fp32", "bf16", "fp16")]


def tuned(keys: Any, output: Path, measured: tables.Measured, again: bool = False) -> int:
    return tables.add(keys, tables.opened(launch.TABLE, output, (9, 0)), output, CPU, measured, run.summary, again)


def test_finished_entries_are_kept_and_the_rest_goes_on(keys: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "table.json"
    done: list[str] = []

    def measured(key: Any, *_: Any) -> dict[str, Any]:
        if len(done) == 1 and not tuned_before:
            raise KeyboardInterrupt
        done.append(key.dtype)
        return entry({"BLOCK": len(done)})

    tuned_before = False
    assert tuned(keys, output, measured) == 130
    assert "goes on from there" in capsys.readouterr().err
    tuned_before = True
    assert tuned(keys, output, measured) == 0 and done == ["fp32", "bf16", "fp16"]
    told = capsys.readouterr().err
    assert "2 entries to measure, 1 are there" in told and "[2/2] reduce fp16 contiguous small: BLOCK=3 beats" in told
    table = launch.read(output)
    assert [(e["parameters"]["BLOCK"], e["run"]) for e in table["entries"].values()] == [(1, 0), (2, 1), (3, 1)]
    assert table["runs"] == [{"time": "then"}] * 2
    assert tuned(keys, output, measured) == 0 and len(done) == 3
    assert tuned(keys, output, measured, again=True) == 0 and len(done) == 6
    assert list(tmp_path.rglob("*.*")) == [output]


def test_what_cannot_be_measured_costs_only_itself(keys: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(key: Any, *_: Any) -> dict[str, Any]:
        if key.dtype == "bf16":
            raise RuntimeError("out of memory")
        return entry(None)

    assert tuned(keys, tmp_path / "table.json", measured) == 1
    told = capsys.readouterr().err
    assert "reduce bf16 contiguous small: failed: RuntimeError: out of memory" in told and "the heuristic stays" in told
    assert launch.read(tmp_path / "table.json")["entries"].keys() == {"reduce fp32 contiguous small", "reduce fp16 contiguous small"}


def test_a_file_that_is_no_table_or_another_chips_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    output.write_text("[]")
    with pytest.raises(ValueError, match="table.json: no table"):
        tables.opened(launch.TABLE, output, (9, 0))
    tables.write(output, {"schema": 1, "capability": [8, 0], "runs": [], "entries": {}})
    with pytest.raises(ValueError, match=r"capability \[8, 0\], this GPU has \[9, 0\]"):
        tables.opened(launch.TABLE, output, (9, 0))
    assert json.loads(output.read_text())["capability"] == [8, 0]


# The command


def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", "cpu"]) == 2
    assert "takes a CUDA GPU" in capsys.readouterr().err


def test_it_refuses_gpus_without_compute_capability_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "compute capability" in run.refusal(gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(run, "absent", lambda provider, device: "no triton")
    assert run.refusal(gpu) == "the Triton kernels cannot run here: no triton"
    monkeypatch.setattr(run, "absent", lambda provider, device: "")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "TRITON_INTERPRET" in run.refusal(gpu)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert run.refusal(gpu) == ""


@pytest.mark.parametrize("words", [["--rounds", "7"], ["--kernel", "terms"], ["--case", "kitti"], ["--dtype", "fp64"]])
def test_it_refuses_what_it_does_not_know(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_the_command_measures_what_was_asked_for_on_this_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def add(*given: Any) -> int:
        seen.append(given)
        return 0

    monkeypatch.setattr(run, "refusal", lambda device: "")
    monkeypatch.setattr(tables, "add", add)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr("benchmarks.measure.clock.Clock", lambda device: SimpleNamespace(measure=None))
    monkeypatch.setattr(kdkernels.tables, "capability", lambda index: (9, 0))
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert main(["tune", "--device", "cpu", "--kernel", "gradient", "--dtype", "bf16", "--layout", "contiguous"]) == 0
    ((found, table, output, *_),) = seen
    assert [str(key) for key, _ in found] == [f"gradient bf16 contiguous {size}" for size in launch.SIZES]
    assert output == tmp_path / "sm_90.json" and launch.read(output) == table
    other = tmp_path / "other.json"
    tables.write(other, {**table, "capability": [8, 0]})
    assert main(["tune", "--device", "cpu", "--output", str(other)]) == 2
    assert "choose another --output" in capsys.readouterr().err and len(seen) == 1


# The kernels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", PARAMETERS)
def test_candidates_are_few_and_differ(kernel: str, layout: str) -> None:
    for dtype in DTYPES.values():
        found = candidates(kernel, dtype, layout == "channels_last")
        assert 8 <= len(found) <= 40 and len({tuple(c.items()) for c in found}) == len(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", PARAMETERS)
def test_a_winner_is_found_on_the_kernels_and_then_used(kernel: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the candidates of the real kernels, on tiny levels, to the parameters of a launch."""
    device = CPU if not torch.cuda.is_available() else torch.device("cuda")
    first, *_, other = candidates(kernel, torch.float16, layout == "channels_last")
    monkeypatch.setattr(run, "candidates", lambda *_: [first, other])
    monkeypatch.setattr(calls, "cache_bytes", lambda device: 0)
    case = SimpleNamespace(pyramid="made up", batch=2, channels=8, level_sizes=[(6, 8), (3, 5)])

    def measure(timed: Sequence[Callable[[], Any]]) -> list[float]:
        changes, _ = launch._OVERRIDES[kernel]
        return [0.5 if changes == other else 1.0 for _ in timed]

    key = launch.Key(kernel, "fp16", layout, "small")
    found = run.measured(key, case, "now", device, measure, 8)  # type: ignore[arg-type]
    assert found["dropped"] == 0 and found["parameters"] == {**found["heuristic"], **other} and found["ratio"]["verdict"] == "faster"
    assert set(found["parameters"]) == set(found["heuristic"]) and found["shapes"] == [(2, 8, 6, 8), (2, 8, 3, 5)]
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    tables.write(launch.path((9, 0)), {"schema": 1, "capability": [9, 0], "runs": [{}], "entries": {str(key): {**found, "run": 0}}})
    launch._CHECKED.clear()
    launch._table.cache_clear()
    monkeypatch.setattr(launch, "capability", lambda index: (9, 0))
    x = SimpleNamespace(dtype=torch.float16, is_cuda=True, device=SimpleNamespace(index=0), numel=lambda: 8)
    usual = found["heuristic"]
    try:
        assert launch.parameters(kernel, lambda *_: usual, [x], layout == "channels_last") == found["parameters"]  # type: ignore[list-item]
    finally:
        launch._CHECKED.clear()
        launch._table.cache_clear()


def test_cases_stand_for_the_sizes_of_the_table() -> None:
    assert [run.size(case) for case in tables.CASES.values()] == list(launch.SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", PARAMETERS)
def test_a_table_is_measured_on_a_gpu(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = candidates(kernel, torch.bfloat16, False)[:2]
    monkeypatch.setattr(run, "candidates", lambda *_: few)
    output = tmp_path / "table.json"
    words = ["tune", "--kernel", kernel, "--case", "tiny", "--dtype", "bf16", "--layout", "contiguous", "--rounds", "8"]
    assert main([*words, "--output", str(output)]) == 0
    table = launch.read(output)
    (found,) = table["entries"].values()
    assert table["capability"] == list(torch.cuda.get_device_capability()) and found["dropped"] == 0
    assert all(0 < ms < 100 for ms in found["heuristic_ms"].values())
