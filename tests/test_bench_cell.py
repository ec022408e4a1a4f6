"""The cell: its samples, who is admitted, and whose time is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from benchmarks import providers as providers_module
from benchmarks.measure import cell as cell_module
from benchmarks.measure import samples
from benchmarks.measure.cell import LEAST_CALLS, Cell
from benchmarks.measure.contents import tensors
from benchmarks.providers import Provider, reference_of
from benchmarks.registry import ENTRIES, Case, Entry
from kdkernels import native as libraries

CPU = torch.device("cpu")
CASE = Case("tiny", batch=1, channels=8)
ENTRY = ENTRIES["feature_imitation"]
EAGER = Provider("eager", lambda entry: entry.eager)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples are enough to get past it."""
    monkeypatch.setattr(samples, "cache_bytes", lambda device: 100_000)


def wrapping(name: str, before: Callable[[dict[str, Any]], None]) -> Provider:
    """The eager form, with `before` called on the inputs of every call."""

    def function(entry: Entry) -> Callable[..., Any]:
        def called(**inputs: Any) -> Any:
            before(inputs)
            return entry.eager(**inputs)

        return called

    return Provider(name, function)


def test_samples_are_all_different_and_past_the_cache() -> None:
    made = samples.samples(ENTRY, CASE, "backward", CPU, 0)
    assert len(made) * samples.nbytes(made[0]) > 3 * 100_000
    firsts = [sample.inputs["s"][0].flatten()[:50].tolist() for sample in made]
    assert len({tuple(values) for values in firsts}) == len(made)
    assert torch.equal(made[0].inputs["s"][0], samples.samples(ENTRY, CASE, "backward", CPU, 0)[0].inputs["s"][0])
    assert [x.shape for x in made[0].cotangents] == [(3, 1)]


def test_number_of_samples_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "available_bytes", lambda device: 4_000_000)
    assert samples._count(10, CPU) == samples.MOST_SAMPLES
    assert samples._count(60_000, CPU) == 6
    assert samples._count(10_000_000, CPU) == 2
    monkeypatch.setattr(samples, "cache_bytes", lambda device: 10**9)
    assert samples._count(100_000, CPU) == 10


def test_needed_bytes_covers_the_samples_and_float64() -> None:
    case = Case("kitti", batch=2, channels=8, dtype="bf16")
    one = samples.nbytes(samples.samples(ENTRY, case, "backward", CPU, 0)[0])
    needed = samples.needed_bytes(ENTRY, case, CPU)
    assert one * (2 + 4 * samples.ORACLE_COPIES) < needed < 3 * one * (2 + 4 * samples.ORACLE_COPIES)


def test_cell_rotates_one_sequence_of_samples_for_all() -> None:
    seen: list[int] = []
    note = lambda inputs: seen.append(id(inputs["s"]))  # noqa: E731
    cell = Cell(ENTRY, CASE, "forward", CPU)
    for name in ("a", "b"):
        assert cell.admit(wrapping(name, note)).reason == ""
    seen.clear()
    assert len(cell.burst("a", 3)) == 3 and len(cell.burst("b", len(cell.samples))) == len(cell.samples)
    expected = [id(sample.inputs["s"]) for sample in cell.samples]
    start = expected.index(seen[0])
    assert seen == [expected[(start + i) % len(expected)] for i in range(len(seen))] and len(set(seen)) == len(expected)


@pytest.mark.parametrize("mode", ENTRY.modes)
def test_cell_times_who_is_right_only(mode: str) -> None:
    cell = Cell(ENTRY, CASE, mode, CPU)

    def raising(inputs: dict[str, Any]) -> None:
        raise ValueError("no such\nthing")

    assert cell.admit(EAGER).reason == ""
    assert cell.admit(Provider("wrong", lambda entry: lambda **inputs: 1.01 * entry.eager(**inputs))).reason
    assert cell.admit(wrapping("raising", raising)).reason == "ValueError: no such"
    assert cell.admitted == ["eager"] and list(cell.time(0.01)) == ["eager"]
    figures = {name: cell.figures(name) for name in ("eager", "wrong", "raising")}
    assert [f["status"] for f in figures.values()] == ["measured", "rejected", "failed"]
    eager = figures["eager"]
    assert eager["calls"] >= LEAST_CALLS and 0 < eager["ms"]["p20"] <= eager["ms"]["p50"] <= eager["ms"]["p80"]
    assert eager["peak_bytes"] > 0 and eager["compile_s"] is None and eager["graph_ms"] is None
    assert eager["error"]["value"] < 1e-5 and (eager["error"]["gradient"] is None) == (mode == "forward")
    assert "ms" not in figures["wrong"] and "ms" not in figures["raising"]


def test_first_call_of_a_compiler_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_module, "cold_caches", nullcontext)
    calls = []

    def slow_once(inputs: dict[str, Any]) -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) == 1 else 0)

    cell = Cell(ENTRY, CASE, "forward", CPU)
    cell.admit(wrapping("triton", slow_once))
    assert cell.attempts["triton"].compile == pytest.approx(0.05, abs=0.04)


def test_compile_that_runs_eagerly_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_module, "cold_caches", nullcontext)
    cell = Cell(ENTRY, CASE, "forward", CPU)
    assert "eagerly" in cell.admit(replace(EAGER, name="compile")).reason
    assert cell.figures("compile")["status"] == "rejected"


def test_compiled_code_stays_compiled_after_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is called below a mode of the dispatcher can be one that torch.compile gives up for good, in silence."""
    monkeypatch.setattr(cell_module, "cold_caches", nullcontext)
    donated = []

    def function(entry: Entry) -> Callable[..., Any]:
        return torch.compile(entry.eager, backend=lambda graph, inputs: donated.append(functorch.donated_buffer) or graph, dynamic=False)

    from torch._functorch import config as functorch

    cell = Cell(ENTRY, CASE, "backward", CPU)
    for name in ("compile", "compile-max"):
        assert cell.admit(Provider(name, function)).reason == ""
    assert list(cell.time(0.01)) == ["compile", "compile-max"]
    assert donated == [True, False] and functorch.donated_buffer


def test_order_is_random_but_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[str]:
        cell = Cell(ENTRY, CASE, "forward", CPU, seed)
        for name in "abcd":
            cell.admit(replace(EAGER, name=name))
        bursts: list[str] = []
        monkeypatch.setattr(cell, "burst", lambda name, calls: bursts.append(name) or [1.0] * calls)
        monkeypatch.setattr(cell, "_warm", lambda name, burst, seconds: 1.0)
        cell.time(1e-9)
        return bursts

    first = order(0)
    rounds = [first[i : i + 4] for i in range(0, len(first), 4)]
    assert len(rounds) == LEAST_CALLS and all(sorted(r) == list("abcd") for r in rounds) and len(set(map(tuple, rounds))) > 1
    assert order(0) == first != order(1)


def test_who_breaks_while_being_timed_has_no_time() -> None:
    calls = []

    def later(inputs: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) > 30:
            raise OSError("gone")

    cell = Cell(ENTRY, CASE, "forward", CPU)
    cell.admit(EAGER)
    assert cell.admit(wrapping("late", later)).reason == ""
    assert list(cell.time(0.02)) == ["eager"]
    assert cell.figures("late")["status"] == "failed" and "OSError: gone" in cell.figures("late")["reason"]


def test_inputs_changed_while_timing_cost_everybody_the_time() -> None:
    calls = []

    def later(inputs: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 30:
            inputs["t"][0][0, 0, 0, 0] += 1

    cell = Cell(ENTRY, CASE, "forward", CPU)
    assert cell.admit(wrapping("late", later)).reason == "" and cell.admit(EAGER).reason == ""
    assert cell.time(0.02) == {}
    assert "inputs changed" in cell.figures("eager")["reason"] and "ms" not in cell.figures("late")


def test_wrong_after_timing_is_rejected() -> None:
    calls = []

    def function(entry: Entry) -> Callable[..., Any]:
        def called(**inputs: Any) -> Any:
            calls.append(1)
            return entry.eager(**inputs) * (1 if len(calls) < 30 else 1.1)

        return called

    cell = Cell(ENTRY, CASE, "forward", CPU)
    assert cell.admit(Provider("tired", function)).reason == ""
    assert cell.time(0.02) == {} and cell.figures("tired")["reason"].startswith("after it was timed")


def test_samples_are_left_as_they_were() -> None:
    cell = Cell(ENTRY, CASE, "backward", CPU)
    before = [[x.clone() for x in tensors(sample)] for sample in cell.samples]
    cell.admit(EAGER)
    cell.time(0.01)
    for sample, contents in zip(cell.samples, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(sample), contents, strict=True))


@dataclass(frozen=True)
class Entered(Provider):
    """Notes when its context is entered and left."""

    log: tuple[list[str], ...] = ()

    @contextmanager
    def active(self) -> Iterator[None]:
        self.log[0].append("in")
        yield
        self.log[0].append("out")


def test_provider_is_active_around_a_burst_not_around_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    cell = Cell(ENTRY, CASE, "forward", CPU)
    cell.admit(Entered("own", wrapping("own", lambda inputs: log.append("call")).function, log=(log,)))
    log.clear()
    cell.burst("own", 3)
    assert log == ["in", "call", "call", "call", "out"]


@pytest.mark.parametrize("reason", ["", "it was not built"])
def test_compiled_kernels_are_absent_where_their_library_is(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"native": {"available": False, "reason": "no library at all"}}
    monkeypatch.setattr(providers_module, "backend_info", lambda: found)
    monkeypatch.setitem(libraries._loaded, "cuda", libraries.Library(None, reason))
    native, cuda = providers_module.providers()["native"], torch.device("cuda")
    assert providers_module.absent(native, cuda) == "no library at all"
    found["native"] = {"available": True, "reason": ""}
    assert providers_module.absent(native, cuda) == reason
    assert providers_module.absent(native, torch.device("meta")) == "the tensors are on meta, not on the CPU or a CUDA GPU"


def test_oracle_leaves_the_provider_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = samples.samples(ENTRY, CASE, "forward", CPU, 0)[0].inputs
    chosen: list[str] = []
    monkeypatch.setattr(providers_module, "set_backend", chosen.append)
    with Provider("native", lambda entry: entry.call, "native").active():
        reference_of(ENTRY)(**inputs)
    assert chosen == ["native", "reference", "native", "auto"]
