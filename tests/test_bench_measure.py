"""Clock, memory, bandwidth, profiler, records and provenance."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import kdkernels.native
from benchmarks.measure import bandwidth, memory, profile, provenance, records
from benchmarks.measure.clock import Clock, quantiles
from benchmarks.measure.cold import cold_caches
from benchmarks.registry import ENTRIES, Case

CPU = torch.device("cpu")
CASE = Case("tiny", batch=1, channels=8)
ENTRY = ENTRIES["feature_imitation"]


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
    assert profile.launches(CPU, list) is None and profile.host_times(CPU, list, 3) == (None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clock_on_a_gpu() -> None:
    device = torch.device("cuda")
    clock, x = Clock(device), torch.randn(1 << 26, device=device)
    few, many = (clock.measure([lambda n=n: [x.mul_(1) for _ in range(n)]] * 5)[2] for n in (1, 10))
    assert 5 < many / few < 15
    graph = clock.graph(lambda: x + 1)
    assert graph is not None and 0.5 < clock.measure([graph[0]] * 5)[2] / few < 2
    x.fill_(3)
    graph[0]()
    assert graph[1].unique().tolist() == [4]
    assert clock.graph(lambda: x.sum().item()) is None
    assert profile.launches(device, lambda: x.mul_(1)) == 1
    assert memory.peak_bytes(device, lambda: x + 1) == x.nbytes
    host_us, wall_ms = profile.host_times(device, lambda: x.mul_(1), 5)
    assert host_us is not None and wall_ms is not None and host_us < 1e3 * many and few < 2 * wall_ms
    copy = bandwidth.Copy(device, clock)
    assert 1e11 < copy.rate(copy.measure(5)) < 2e13


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


def test_what_the_profiler_says_of_gpus_and_of_earlier_blocks_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    earlier = [torch.ones(1000) for _ in range(3)]

    def call(fails: bool = False) -> None:
        earlier.clear()
        os.write(2, b"ERROR: DeviceProperties.cpp:48] gpuGetDeviceCount failed with code 35\nof the call\n")
        if fails:
            raise ValueError

    memory.peak_bytes(CPU, call)
    assert capfd.readouterr().err == "of the call\n"
    with pytest.raises(ValueError):
        memory.peak_bytes(CPU, lambda: call(True))
    os.write(2, b"behind it\n")
    assert capfd.readouterr().err == "of the call\nbehind it\n"


def test_resident_memory_is_whoever_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def call(elsewhere: int = 20_000_000) -> Tensor:
        other = bytearray(b"x") * elsewhere
        return torch.ones(5_000_000) + len(other)

    assert memory.peak_bytes(CPU, call) == pytest.approx(40_000_000, abs=1000), "of torch"
    call()
    assert memory.resident_bytes(CPU, call) == pytest.approx(60_000_000, rel=0.1)
    assert memory.resident_bytes(CPU, lambda: call(1)) == pytest.approx(40_000_000, rel=0.1), "not what was there before"
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none")
    assert memory.resident_bytes(CPU, call) is None and memory.resident_bytes(torch.device("meta"), call) is None


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
    # 4 MB read and 4 MB written in 2 ms
    copy = bandwidth.Copy(CPU, SimpleNamespace(measure=lambda calls: [2.0] * len(calls)))
    assert copy.measure(3) == [2.0] * 3 and copy.rate([2.0, 100.0, 1.0]) == pytest.approx(4e9)


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

    monkeypatch.setattr("benchmarks.measure.cold._load_compiler", lambda device: None)
    kernel, module = SimpleNamespace(device_caches={0: "compiled"}), ModuleType("kdkernels.triton.made_up")
    module.kernel = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folders = []
    for _ in range(2):
        with cold_caches(CPU):
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
    assert record["peak_mb"] == 5.0 and record["resident_mb"] is None and record["copy_gb_per_s"] == 1.0
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


@pytest.mark.parametrize(
    "built", [{}, {"version": "0.1.0", "torch": "2.11.0", "cpu": {"compiler": "/opt/bin/c++ (Some)  12.2", "flags": "-I/x"}}]
)
def test_a_record_says_how_the_compiled_library_was_built(built: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    available = [False]
    monkeypatch.setattr(kdkernels, "backend_info", lambda: {"native": {"available": available[0]}})
    monkeypatch.setattr(kdkernels.native, "build_info", lambda: built)
    monkeypatch.setattr(kdkernels.native, "capability", lambda: "avx512")
    assert provenance.provenance(CPU, 0)["native"] is None
    available[0] = True
    compiler = "c++ (Some) 12.2" if built else None
    wanted = {"capability": "avx512", "compiler": compiler, "version": built.get("version"), "torch": built.get("torch")}
    assert provenance.provenance(CPU, 0)["native"] == wanted, "no folder of this machine"


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
    answers = {"clocks_throttle_reasons.active": "1980, 2619, 412.5, [N/A], 55, 0x0000000000000000"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))

    def output(command: list[str]) -> str | None:
        assert "--id=GPU-1-2" in command
        return next((text for name, text in answers.items() if any(word.endswith(f",{name}") for word in command)), None)

    monkeypatch.setattr(provenance, "_output", output)
    state = provenance.device_state(torch.device("cuda", 0))
    assert (state["sm_mhz"], state["power_w"], state["power_limit_w"], state["temperature_c"]) == (1980.0, 412.5, None, 55.0)
    assert state["throttle"] == "0x0000000000000000"
    answers.clear()
    assert provenance.device_state(torch.device("cuda", 0))["sm_mhz"] is None


def test_device_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (80GB)")
    assert provenance.device_label(CPU) == "cpu" and provenance.device_label(torch.device("cuda")) == "nvidia-h200-80gb"
