"""Clock, memory, bandwidth, records, provenance, and the cell that puts providers through them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels
from benchmarks import providers as providers_module
from benchmarks.measure import bandwidth, memory, profile, provenance, records, samples
from benchmarks.measure import cell as cell_module
from benchmarks.measure.cell import LEAST_CALLS, Cell
from benchmarks.measure.clock import Clock, quantiles
from benchmarks.measure.cold import cold_caches
from benchmarks.measure.contents import tensors
from benchmarks.providers import Provider, reference_of
from benchmarks.registry import ENTRIES, Case, Entry

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


# Clock


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {"p20": 1.0, "p50": 2.5, "p80": 4.0}
    assert quantiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_clock_gives_each_call_its_own_time() -> None:
    slept = [0.012, 0.0, 0.006]
    ms = Clock(CPU).measure([lambda s=s: time.sleep(s) for s in slept])
    assert ms[0] >= 12 and ms[2] >= 6 and ms[1] < 5


def test_clock_keeps_the_garbage_collector_out() -> None:
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        if len(seen) == 2:
            raise ValueError

    with pytest.raises(ValueError):
        Clock(CPU).measure([call, call])
    assert seen == [False, False] and gc.isenabled()


def test_there_are_no_gpu_figures_of_a_cpu() -> None:
    assert Clock(CPU).graph(list) is None
    assert profile.launches(CPU, list) is None and profile.host_us(CPU, list, 3) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clock_on_a_gpu() -> None:
    device = torch.device("cuda")
    clock, x = Clock(device), torch.randn(1 << 26, device=device)
    few, many = (clock.measure([lambda n=n: [x.mul_(1) for _ in range(n)]] * 5)[2] for n in (1, 10))
    assert 5 < many / few < 15
    replay = clock.graph(lambda: x.mul_(1))
    assert replay is not None and 0.5 < clock.measure([replay] * 5)[2] / few < 2
    assert clock.graph(lambda: x.sum().item()) is None
    assert profile.launches(device, lambda: x.mul_(1)) == 1
    assert memory.peak_bytes(device, lambda: x + 1) == x.nbytes
    assert profile.host_us(device, lambda: x.mul_(1), 5) < 1e3 * many
    assert 1e11 < bandwidth.copy_bandwidth(device, clock) < 2e13


# Memory, bandwidth, profiler


def test_peak_is_what_is_held_at_a_time() -> None:
    def call() -> Tensor:
        for _ in range(3):
            torch.ones(1_000_000)
        a = torch.ones(500_000)
        return a + 1

    peak = memory.peak_bytes(CPU, call)
    assert peak == pytest.approx(4_000_000, abs=1000)
    assert memory.peak_bytes(CPU, lambda: None) is None


def test_caches_of_all_cores_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size, cores) in enumerate(((1, "32K", str(core)), (3, "4096K", shared))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", cores)):
                (folder / name).write_text(text + "\n")
    monkeypatch.setattr(memory, "_CPUS", tmp_path)
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert memory.cache_bytes(CPU) == 2 * (4096 << 10)
    monkeypatch.setattr(memory, "_CPUS", tmp_path / "none")
    assert memory.cache_bytes(CPU) > 0


def test_a_container_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUPS", (tmp_path / "memory.max",))
    unlimited = memory.available_bytes(CPU)
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.stat").write_text("anon 30000\nfile 60000\n")
    assert memory.available_bytes(CPU) == 70_000
    (tmp_path / "memory.max").write_text("max\n")
    assert unlimited is None or unlimited > 70_000 < (memory.available_bytes(CPU) or 0)


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "LEAST", {"cpu": 1 << 20})
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda device: 1_000_000)
    # 4 MB read and 4 MB written in 2 ms; slow while they warm up
    clock = SimpleNamespace(measure=lambda calls: [100.0] * bandwidth.WARM + [2.0] * (len(calls) - bandwidth.WARM))
    assert bandwidth.copy_bandwidth(CPU, clock) == pytest.approx(4e9)


def test_eager_work_is_not_taken_for_compiled() -> None:
    assert not profile.runs_compiled(lambda: torch.ones(3) + 1)


def test_import_prints_its_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    exec(profile._IMPORT, {})
    assert 0 <= float(capsys.readouterr().out) < 60


def test_import_seconds_is_the_median_of_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(profile.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=f"{next(outcomes)}\n"))
    assert profile.import_seconds() == 2.0
    monkeypatch.setattr(profile.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stdout=""))
    assert profile.import_seconds() is None


def test_cold_caches_are_fresh_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setattr("benchmarks.measure.cold._load_compiler", lambda: None)
    kernel, module = SimpleNamespace(device_caches={0: "compiled"}), ModuleType("kdkernels.triton.made_up")
    module.kernel = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folders = []
    for _ in range(2):
        with cold_caches():
            folders.append(cache_dir())
            assert torch.compiler.config.force_disable_caches and not kernel.device_caches
            Path(folders[-1], "compiled").touch()
    assert len({*folders, cache_dir()}) == 3 and not any(map(Path.exists, map(Path, folders)))


# Records


def test_records_survive_a_killed_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "file.jsonl"
    assert records.read(path) == []
    records.append(path, {"a": 1, "b": [float("nan"), 2.5], "c": {"d": float("inf")}})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    records.append(path, {"a": 3})
    assert records.read(path) == [{"a": 1, "b": [None, 2.5], "c": {"d": None}}, {"a": 3}]
    assert f"{path}:2:" in capsys.readouterr().err


def test_the_last_record_of_a_key_counts() -> None:
    base = {"kind": "kernel", "entry": "x", "case": Case().as_dict(), "mode": "forward", "provider": "eager", "ms": 1}
    others = [{**base, "mode": "inline"}, {**base, "case": Case(batch=1).as_dict()}, {**base, "provider": "paper"}]
    again = {**base, "ms": 2, "case": dict(reversed(base["case"].items()))}
    assert records.newest([base, *others, again]) == [again, *others]


def test_default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[1]
    assert records.default_path(CPU, "kernels") == root / "benchmarks" / "results" / "cpu" / "latest-kernels.jsonl"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "kdkernels" / "benchmarks" / "measure" / "records.py"))
    monkeypatch.chdir(tmp_path)
    assert records.default_path(CPU, "kernels") == tmp_path / "benchmarks" / "results" / "cpu" / "latest-kernels.jsonl"


def test_kernel_record_figures() -> None:
    figures = {"status": "measured", "reason": "", "ms": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "peak_bytes": 5e6}
    record = records.kernel_record(ENTRY, CASE, "forward", "eager", figures, 1e9, None, {"commit": None})
    ideal = ENTRY.ideal_bytes(CASE, "forward")
    assert record["gb_per_s"] == pytest.approx(ideal / 2e-3 / 1e9)
    assert record["percent_of_copy"] == pytest.approx(100 * ideal / 2e-3 / 1e9)
    assert record["peak_mb"] == 5.0 and record["copy_gb_per_s"] == 1.0
    nobody = records.kernel_record(ENTRY, CASE, "forward", "triton", {"status": "absent", "reason": "no"}, 1e9, 0.1, {})
    assert nobody.keys() == record.keys() and nobody["ms"] is None and nobody["gb_per_s"] is None and nobody["calls"] == 0


# Provenance


def test_provenance_of_this_checkout() -> None:
    found = provenance.provenance(CPU, 7)
    json.dumps(found, allow_nan=False)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(kdkernels.__file__).parent, capture_output=True, text=True)
    assert found["commit"] == (head.stdout.strip() or None)
    assert found["versions"]["torch"] == torch.__version__ and found["seed"] == 7 and found["threads"] == torch.get_num_threads()
    state = provenance.device_state(CPU)
    assert state["sm_mhz"] is None and state["throttle"] is None and {"cpu_mhz", "load", "power_w"} <= state.keys()


def test_revision_is_dirty_by_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kdkernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(kdkernels, "__file__", str(package))

    def git(*words: str) -> None:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path), *words]
        subprocess.run(command, check=True, capture_output=True)

    assert provenance.revision() == (None, None)
    git("init")
    # installed below somebody else's checkout
    assert provenance.revision() == (None, None)
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = provenance.revision()
    assert commit is not None and len(commit) == 40 and dirty is False
    results = tmp_path / "benchmarks" / "results" / "new.jsonl"
    results.parent.mkdir(parents=True)
    results.touch()
    (tmp_path / "notes.txt").touch()
    assert provenance.revision() == (commit, False)
    (package.parent / "new.py").touch()
    assert provenance.revision() == (commit, True)


def test_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"clocks.sm": "1980, 2619, 412.5, [N/A], 55", "clocks_throttle_reasons.active": "0x0000000000000000"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))

    def output(command: list[str]) -> str | None:
        assert "--id=GPU-1-2" in command
        return next((text for name, text in answers.items() if f"--query-gpu={name}" in " ".join(command)), None)

    monkeypatch.setattr(provenance, "_output", output)
    state = provenance.device_state(torch.device("cuda", 0))
    assert (state["sm_mhz"], state["power_w"], state["power_limit_w"], state["temperature_c"]) == (1980.0, 412.5, None, 55.0)
    assert state["throttle"] == "0x0000000000000000"
    answers.clear()
    assert provenance.device_state(torch.device("cuda", 0))["sm_mhz"] is None


def test_device_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (80GB)")
    assert provenance.device_label(CPU) == "cpu" and provenance.device_label(torch.device("cuda")) == "nvidia-h200-80gb"


# Samples


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


# Cell


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


def test_oracle_leaves_the_provider_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = samples.samples(ENTRY, CASE, "forward", CPU, 0)[0].inputs
    chosen: list[str] = []
    monkeypatch.setattr(providers_module, "set_backend", chosen.append)
    with Provider("native", lambda entry: entry.call, "native").active():
        reference_of(ENTRY)(**inputs)
    assert chosen == ["native", "reference", "native", "auto"]
