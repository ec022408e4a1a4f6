"""The run and its command line: options to cells, cells to records and a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cli, run
from benchmarks.choices import choices
from benchmarks.measure import records, samples
from benchmarks.measure.cell import Cell
from benchmarks.records_table import table
from benchmarks.registry import BATCHES, ENTRIES, QUICK, Case, all_cases
from benchmarks.report.run import NAMES

SMALL = ["--case", "tiny", "--batch", "1", "--channels", "64", "--entry", "feature_imitation", "--seconds", "0.01", "--device", "cpu"]
FAST = [*SMALL, "--provider", "eager,paper,triton"]
SCRIPT = Path(__file__).parents[1] / "scripts" / "cpu_numbers.sh"
Bench = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command line; its exit code and all records of its file. What is measured once a run is made up."""
    monkeypatch.setattr(samples, "cache_bytes", lambda device: 100_000)
    copy = SimpleNamespace(measure=lambda calls: [1.0] * calls, rate=lambda ms: 1e10 if ms else 0.0)
    monkeypatch.setattr(run, "Copy", lambda device, clock: copy)
    monkeypatch.setattr(run, "import_seconds", lambda: 0.25)
    path = tmp_path / "out.jsonl"

    def called(*options: str) -> tuple[int, list[dict[str, Any]]]:
        return cli.main([*options, "--output", str(path)]), records.read(path)

    return called


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(options)


def cases(*options: str) -> list[Case]:
    """Of one entry."""
    return [case for _, case in run.pairs(parsed("--entry", "gkd_bmfi", *options))]


def test_cases_that_options_ask_for() -> None:
    assert cases() == [Case()]
    assert cases("--case", "tiny,kitti", "--batch", "1") == [Case("tiny", batch=1), Case("kitti", batch=1)]
    assert cases("--dtype", "bf16", "--layout", "channels_last", "--boxes", "0,100", "--channels", "64") == [
        Case(channels=64, boxes=boxes, dtype="bf16", layout="channels_last") for boxes in (0, 100)
    ]
    assert len(cases("--full")) == sum(1 for _ in all_cases())
    assert len(cases("--full", "--batch", "2,8")) == sum(1 for _ in all_cases()) * 2 // len(BATCHES)
    assert run.pairs(parsed()) == [(ENTRIES["gkd_bmfi"], Case())], "a look takes minutes, not an hour"
    assert {entry.name for entry, _ in run.pairs(parsed("--full", "--batch", "1"))} == set(ENTRIES)


def test_quick_pairs_can_be_narrowed() -> None:
    assert [(entry.name, case) for entry, case in run.pairs(parsed("--quick"))] == list(QUICK)
    assert cases("--quick", "--case", "tiny") == [case for name, case in QUICK if name == "gkd_bmfi" and case.pyramid == "tiny"] != []


def test_grid_has_the_modes_of_each_entry() -> None:
    entry = ENTRIES["feature_imitation"]
    forward_only = replace(entry, name="other", units={"forward": 1})
    jobs = run.grid([(entry, Case()), (forward_only, Case())], ["forward", "backward"])
    assert [(job.entry.name, job.mode) for job in jobs] == [
        ("feature_imitation", "forward"),
        ("feature_imitation", "backward"),
        ("other", "forward"),
    ]


def test_choices_are_of_their_own_type_and_named_when_wrong() -> None:
    assert choices(BATCHES)("8, 1,8") == [8, 1]
    with pytest.raises(argparse.ArgumentTypeError, match=r"'3'.*1, 2, 8, 16"):
        choices(BATCHES)("2,3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--provider", "eagre"], "compile-max"),
        (["--entry", "gdk"], "feature_imitation"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "inf"], "above 0"),
        (["--seconds", "soon"], "above 0"),
        (["--threads", "0"], "1 or more"),
        (["--output", "/proc/no/such/place"], "--output /proc/no/such/place"),
        (["--quick", "--full"], "not allowed"),
        (["--device", "nonsense"], "--device nonsense"),
        (["comapre", "a", "b"], "speed-of-light"),
        (["--quick", "--case", "frcnn", "--dtype", "fp32"], "nothing to measure"),
        (["--entry", "feature_imitation", "--mode", "inline"], "nothing to measure"),
    ],
)
def test_wrong_usage_says_what_is_right(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(options) == 2
    assert message in capsys.readouterr().err


def test_help_names_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"], prog="kdkernels bench") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "kdkernels bench" in text and all(f"{name}:" in text for name in cli.COMMANDS)


def test_list_says_who_is_absent_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("feature_imitation" in line and "backward_scaled" in line for line in lines)
    assert any(line.split() == ["eager", "runs", "here"] for line in lines)
    assert any(line.split()[0] == "triton" and len(line.split()) > 3 for line in lines if line.strip())


def test_run_writes_records_and_a_table(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bench(*FAST, "--provider", "eager,paper,reference,triton")
    assert code == 0 and len(found) == 3 * 4
    by = {(record["mode"], record["provider"]): record for record in found}
    eager = by["backward", "eager"]
    assert eager["status"] == "measured" and eager["kind"] == "kernel" and eager["schema"] == 1
    assert eager["case"] == Case("tiny", batch=1, channels=64).as_dict()
    assert eager["percent_of_copy"] == pytest.approx(10 * eager["gb_per_s"]) and eager["copy_gb_per_s"] == 10
    assert eager["import_s"] is None and by["backward", "reference"]["import_s"] == 0.25
    assert {"before", "after", "commit", "threads"} <= eager["provenance"].keys()
    assert by["forward", "triton"]["status"] == "absent" and by["forward", "triton"]["reason"]
    output = capsys.readouterr()
    assert "% of copy" in output.out and "triton: absent: " in output.out and "graph ms" not in output.out
    assert "[3/3]" in output.err
    json.dumps(found, allow_nan=False)


def test_a_wrong_provider_is_recorded_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ENTRIES["feature_imitation"]
    monkeypatch.setitem(ENTRIES, entry.name, replace(entry, eager=lambda **inputs: 1.01 * entry.eager(**inputs)))
    code, found = bench(*FAST, "--mode", "forward")
    status = {record["provider"]: record["status"] for record in found}
    assert code == 1 and status == {"eager": "rejected", "paper": "measured", "triton": "absent"}
    assert found[0]["ms"] is None and found[0]["reason"] and found[0]["reason"] in capsys.readouterr().out


def test_what_does_not_fit_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "available_bytes", lambda device: 1000)
    code, found = bench(*FAST, "--mode", "forward")
    assert code == 0 and [record["status"] for record in found] == ["skipped", "skipped", "absent"]
    assert "GB" in found[0]["reason"]


def test_a_cell_that_breaks_costs_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["feature_imitation"]

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(ENTRIES, "broken", replace(entry, name="broken", inputs=broken))
    code, found = bench(*FAST, "--entry", "broken,feature_imitation", "--mode", "forward")
    assert code == 1 and [record["status"] for record in found] == ["failed", "failed", "absent", "measured", "measured", "absent"]
    assert found[0]["reason"] == "RuntimeError: out of memory"


def test_interrupted_run_keeps_what_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timed = Cell.time

    def time(self: Cell, *args: Any) -> Any:
        if self.mode == "backward":
            raise KeyboardInterrupt
        return timed(self, *args)

    monkeypatch.setattr(Cell, "time", time)
    code, found = bench(*FAST)
    assert code == 130 and {record["mode"] for record in found} == {"forward"} and len(found) == 3
    assert "--resume" in capsys.readouterr().err


def test_resume_measures_what_is_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    state: tuple[str, bool] = ("abc", False)
    made = run.provenance
    monkeypatch.setattr(run, "provenance", lambda *args: {**made(*args), "commit": state[0], "dirty": state[1]})
    monkeypatch.setattr(run, "revision", lambda: state)

    def added(*options: str) -> list[str]:
        before = len(bench(*FAST, "--mode", "forward", "--provider", "triton")[1])
        return [record["mode"] for record in bench(*options, "--resume")[1][before:]]

    assert bench(*FAST, "--mode", "forward")[0] == 0
    assert added(*FAST, "--mode", "forward,backward") == ["backward"] * 3
    assert added(*FAST, "--mode", "forward,backward") == []
    assert added(*FAST, "--mode", "forward", "--provider", "eager,reference") == ["forward"] * 2
    state = ("abc", True)
    assert len(added(*FAST, "--mode", "forward")) == 3 and "clean" in capsys.readouterr().err
    state = ("new", False)
    assert len(added(*FAST, "--mode", "forward")) == 3


def test_threads_and_seed_are_what_was_asked_for(bench: Bench) -> None:
    before = torch.get_num_threads()
    try:
        _, found = bench(*SMALL, "--mode", "forward", "--provider", "eager", "--threads", "1", "--seed", "5")
    finally:
        torch.set_num_threads(before)
    assert found[0]["provenance"]["threads"] == 1 and found[0]["provenance"]["seed"] == 5


def test_the_script_of_the_cpu_s_numbers_asks_for_what_there_is(tmp_path: Path) -> None:
    """Its commands, written down by a stand-in for Python, are understood, and every part can be had alone."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(0o755)

    def commands(*parts: str) -> list[list[str]]:
        log.unlink(missing_ok=True)
        done = subprocess.run([SCRIPT, *parts], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split()[1:] for line in log.read_text().splitlines()]

    everything = commands()
    assert [command for part in ("kernels", "scaling", "steps", "tables") for command in commands(part)] == everything
    assert everything.pop() == ["benchmarks.report.tables"]
    for name, *words in everything:
        path = cli.COMMANDS[words.pop(0)][0] if not words[0].startswith("-") else cli.RUN[0]
        parser = argparse.ArgumentParser(exit_on_error=False)
        import_module(path, "benchmarks").add_arguments(parser)
        args = parser.parse_args(words)
        assert name == "benchmarks" and args.output.name in NAMES
        assert args.provider is None or "native" in args.provider
    assert subprocess.run([SCRIPT, "kernel"], capture_output=True).returncode == 2


def test_table_shows_what_a_gpu_adds() -> None:
    def record(name: str, p50: float) -> dict[str, Any]:
        figures = {
            "status": "measured",
            "reason": "",
            "ms": {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50},
            "graph_ms": {"p20": 0.1, "p50": 0.125, "p80": 0.2},
            "launches": 12,
            "host_us": 34.5,
            "error": {"value": 1e-7, "gradient": 2e-6},
        }
        return records.kernel_record(ENTRIES["feature_imitation"], Case(), "backward", name, figures, 1e9, None, {})

    lines = table("title", [record("slow", 20.0), record("fast", 0.5)]).splitlines()
    assert lines[0] == "title" and [line.split()[0] for line in lines[2:4]] == ["fast", "slow"]
    assert lines[2].split()[1:4] == ["0.5", "0.45..0.55", "0.125"] and lines[2].split()[-3:] == ["12", "34.5", "2e-06"]
    assert all(name in lines[1] for name in ("graph ms", "launches", "host us")) and "compile s" not in lines[1]
    assert len({len(line) for line in lines[1:4]}) == 1
