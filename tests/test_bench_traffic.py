"""`kdkernels bench traffic`: one call for Nsight Compute, and the table of what it counts; the figures that docs/cuda.md asks for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cli, records_table, run, traffic
from benchmarks.registry import ENTRIES, Case
from benchmarks.report import speed_of_light
from kdkernels import backend

CASE = ["--case", "tiny", "--batch", "1", "--channels", "64"]
UNIT = Case("tiny", 1, 64).unit
HEADER = '"ID","Process ID","Kernel Name","Block Size","Section Name","Metric Name","Metric Unit","Metric Value"'


def log(*kernels: tuple[str, str, str, str, str]) -> str:
    """What Nsight Compute writes. kernels: name, time and its unit, bytes read, bytes written"""
    lines = ["==PROF== Connected to process 1", "==PROF== Disconnected from process 1", HEADER]
    for number, (name, time, unit, *moved) in enumerate(kernels):
        metrics = zip(traffic.METRICS, (time, *moved), (unit, "byte", "byte"), strict=True)
        lines += [f'"{number}","1","{name}","(256, 1, 1)","Command line profiler metrics","{m}","{u}","{v}"' for m, v, u in metrics]
    return "\n".join(lines) + "\n"


def test_what_was_counted_is_a_table_in_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, moved = tmp_path / "ncu.csv", f"{2 * UNIT:,}"
    name = "void kd::Kernel<kd::Reduce<float, (bool)1>>(T1)"
    file.write_text(log((name, "1,500", "ns", moved, "0"), ("fill", "2", "us", "64", "128"), ("write", "0.5", "usecond", "0", str(UNIT))))
    assert cli.main(["traffic", "--entry", "terms_persistent", *CASE, "--input", str(file)]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found = {row[0].replace("\\", ""): row[1:] for row in rows}
    assert found["void kd::Kernel<kd::Reduce<float, 1>>"] == ["1", "0.00150", "2.00", "0.00", "2.00"]
    assert found["write"] == ["1", "0.000500", "0.00", "1.00", "1.00"] and found["the others"][:2] == ["1", "0.00200"]
    assert found["together"] == ["3", "0.00400", "2.00", "1.00", "3.00"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("==ERROR== The user does not have permission\n", "has not counted gpu__time_duration.sum, "),
        (log(("one", "1", "ns", "0", "0")).replace("dram__bytes_read", "dram__bytes_red"), "has not counted gpu__time_duration.sum, "),
        (log(("one", "1", "fortnight", "0", "0")), "gpu__time_duration.sum is in 'fortnight'"),
        (log(("one", "n/a", "ns", "0", "0")), "n/a"),
        (None, "No such file"),
    ],
)
def test_what_was_not_counted_is_said(text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ncu.csv"
    if text is not None:
        file.write_text(text)
    assert cli.main(["traffic", *CASE, "--input", str(file)]) == 1
    assert said in capsys.readouterr().err


def test_one_call_is_made_by_passes_and_no_other_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, str]] = []

    def count(*_: Any, **__: Any) -> torch.Tensor:
        calls.append(dict(backend._assigned))
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(traffic, "bind", lambda *_, **__: count)
    assert cli.main(["traffic", "--provider", "reference", "--device", "cpu", *CASE]) == 0
    assert calls == [{"terms_persistent": "reference"}] * 2, "the first compiles"
    calls.clear()
    assert cli.main(["traffic", "--entry", "terms_persistent", "--provider", "reference", "--device", "cpu", *CASE]) == 0
    assert calls == [{}] * 2


def test_who_cannot_make_the_call_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["traffic", "--provider", "triton", "--device", "cpu", *CASE]) == 2
    assert cli.main(["traffic", "--entry", "terms_persistent", "--mode", "inline", *CASE]) == 2
    assert "has no mode inline, but backward" in capsys.readouterr().err


FIGURES = (Path(__file__).parent.parent / "docs" / "cuda.md").read_text().partition("## Not measured yet\n")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^\| .* \| `kdkernels bench (.*)` \| (.*) \|$", FIGURES, re.MULTILINE)


@pytest.mark.parametrize(("words", "column"), COMMANDS, ids=[str(number) for number in range(len(COMMANDS))])
def test_each_figure_that_is_asked_for_has_a_command_that_shows_it(words: str, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the measurement: of cells that there are, on providers that are asked, in a table with this column."""
    asked: list[Any] = []
    for module in (run, speed_of_light):
        monkeypatch.setattr(module, "main", lambda args: asked.append(args) or 0)
    assert cli.main(shlex.split(words)) == 0
    (args,) = asked
    jobs = run.grid(run.pairs(args), args.mode)
    shown = column == ", ".join(reversed(args.provider)) if "speed-of-light" in words else column in records_table._COLUMNS
    assert jobs and "native" in args.provider and shown
    # Of a unit that no cache holds, but for the host's time.
    assert {(job.case.pyramid, job.case.unit > 80e6) for job in jobs} == {("tiny", False) if "tiny" in words else ("fcos", True)}


def test_every_figure_of_the_contract_is_in_the_table() -> None:
    assert len(COMMANDS) == len(re.findall(r"^\| .*\|$", FIGURES, re.MULTILINE)) - 1 == 7
    entries = {match for words, _ in COMMANDS for match in re.findall(r"--entry (\w+)", words)}
    assert entries == {"feature_imitation", "gkd_bmfi", "terms_persistent"} <= set(ENTRIES)
