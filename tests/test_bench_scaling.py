"""The cost by size: every size takes its turns, nobody unchecked gets a time, and the tables compare what was measured together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_records import kernel, provenance, scaling

from benchmarks import cli
from benchmarks import scaling as command
from benchmarks.measure import records, samples
from benchmarks.registry import ENTRIES, PYRAMIDS, Case, all_cases
from benchmarks.report.page import page
from benchmarks.report.scaling import tables

CPU = torch.device("cpu")
SMALL = ["--entry", "feature_imitation", "--case", "tiny", "--channels", "4", "--rounds", "2", "--device", "cpu"]
#: Two numbers of images, and a second size for two of them.
WORDS = [*SMALL, "--batch", "1,2", "--size", "tiny,fcos-quarter", "--provider", "reference,eager"]
Scaling = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scaling:
    """Runs the command; its exit code and the records of its file. Copies and warming up take no time."""
    monkeypatch.setattr(samples, "cache_bytes", lambda device: 100_000)
    monkeypatch.setattr(command, "WARM_S", 1e-3)
    monkeypatch.setattr(command, "TURN_S", 1e-3)
    copy = SimpleNamespace(measure=lambda calls: [1.0] * calls, rate=lambda ms: 1e10)
    monkeypatch.setattr(command, "Copy", lambda device, clock: copy)
    path = tmp_path / "scaling.jsonl"

    def called(*options: str) -> tuple[int, list[dict[str, Any]]]:
        return cli.main(["scaling", *options, "--output", str(path)]), records.read(path)

    return called


def test_sizes_for_the_series_have_the_usual_levels() -> None:
    cases = [Case(name) for name in command.SIZES]
    pixels = [prod(case.image_size) for case in cases]
    assert [round(count / pixels[2], 2) for count in pixels] == [0.25, 0.52, 1.0, 2.0]
    assert {PYRAMIDS[name][1] for name in command.SIZES} == {PYRAMIDS["fcos"][1]}
    assert {case.pyramid for case in all_cases()} == {"fcos", "frcnn", "kitti", "tiny"}, "the full grid is large enough"


def test_a_record_a_size_and_both_tables(bench: Scaling, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bench(*WORDS)
    sizes = [("tiny", 1), ("tiny", 2), ("fcos-quarter", 2)]
    assert code == 0
    assert [(r["case"]["pyramid"], r["case"]["batch"], r["provider"]) for r in found] == [
        (*size, name) for size in sizes for name in ("reference", "eager")
    ]
    for record in found:
        assert record["kind"] == "scaling" and record["status"] == "measured" and record["rounds"] == 2
        assert record["calls"] >= 2 * command.COPIES and record["copy_gb_per_s"] == 10
        assert record["peak_mb"] > 0 and record["resident_mb"] is not None and record["error"]["gradient"] is not None
        assert {"before", "after", "commit", "native"} <= record["provenance"].keys()
    json.dumps(found, allow_nan=False)
    output = capsys.readouterr()
    assert output.out.count("by number of images") == 2 and output.out.count("by size of the images") == 2
    assert "| N = 2 |" in output.out and "| 400 x 672 |" in output.out and "round 2 of 2" in output.err


def test_units_are_times_over_those_of_the_copies_just_before() -> None:
    case = Case("tiny", batch=1, channels=4)
    cell: Any = SimpleNamespace(turn=lambda name, calls: [2.0] * calls, case=case)
    place = command.Place(cell, "eager", 3)
    rates = iter([1e9, 2e9])
    copy: Any = SimpleNamespace(measure=lambda calls: [1.0] * calls, rate=lambda ms: next(rates))
    place.turn(copy)
    place.turn(copy)
    assert place.units == pytest.approx([2e-3 * 1e9 / case.unit, 2e-3 * 2e9 / case.unit])
    assert len(place.copy_ms) == 2 * command.COPIES


def test_every_round_has_a_turn_of_each_in_another_order() -> None:
    turns: list[str] = []

    def place(name: str) -> Any:
        return SimpleNamespace(name=name, cell=SimpleNamespace(admitted=["a", "b", "c"]), turn=lambda copy: turns.append(name))

    sizes: Any = [SimpleNamespace(places=[place("a"), place("b")]), SimpleNamespace(places=[place("c"), place("rejected")])]
    copy: Any = None
    command._in_turns(sizes, copy, 20, seed=0)
    rounds = [tuple(turns[k : k + 3]) for k in range(0, len(turns), 3)]
    assert len(rounds) == 20 and all(set(r) == {"a", "b", "c"} for r in rounds) and len(set(rounds)) > 1


def test_the_largest_size_is_checked_first_and_again_last(bench: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's float64 copies are the most that is held at a time."""
    seen: list[tuple[str, int]] = []
    made = command.Cell

    class Noted(made):  # type: ignore[misc, valid-type]
        def contents(self) -> list[Any]:
            seen.append(("admitted", self.case.unit))
            return super().contents()

        def recheck(self, before: list[Any]) -> None:
            seen.append(("checked again", self.case.unit))
            super().recheck(before)

    monkeypatch.setattr(command, "Cell", Noted)
    assert bench(*WORDS)[0] == 0
    admitted, checked = ([unit for what, unit in seen if what == of] for of in ("admitted", "checked again"))
    assert len(admitted) == 3 and admitted == sorted(admitted, reverse=True) and checked == admitted[::-1]


def test_who_is_wrong_or_not_here_gets_no_time(bench: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["feature_imitation"]
    monkeypatch.setitem(ENTRIES, entry.name, replace(entry, eager=lambda **inputs: 1.01 * entry.eager(**inputs)))
    code, found = bench(*SMALL, "--batch", "1", "--size", "tiny", "--provider", "eager,reference,triton")
    assert code == 1 and len(found) == 6
    status = {record["provider"]: record["status"] for record in found}
    assert status == {"eager": "rejected", "reference": "measured", "triton": "absent"}
    assert all(
        record["ms"] is None and record["units"] is None and record["reason"] for record in found if record["provider"] != "reference"
    )


def test_a_size_that_does_not_fit_or_breaks_costs_no_other(bench: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["feature_imitation"]

    def inputs(case: Case, *args: Any) -> Any:
        if case.batch == 2 and case.pyramid == "tiny":
            raise RuntimeError("out of memory\nand more")
        return entry.inputs(case, *args)

    monkeypatch.setitem(ENTRIES, entry.name, replace(entry, inputs=inputs))
    needed = command.needed_bytes
    large = lambda entry, case, device: 10**15 if case.pyramid != "tiny" else needed(entry, case, device)  # noqa: E731
    monkeypatch.setattr(command, "needed_bytes", large)
    code, found = bench(*WORDS, "--provider", "eager")
    assert code == 1 and [record["status"] for record in found] == ["measured", "failed", "skipped"]
    assert found[1]["reason"] == "RuntimeError: out of memory" and "GB are free" in found[2]["reason"]


def test_a_series_that_is_stopped_leaves_nothing(
    bench: Scaling, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_in_turns", stopped)
    code, found = bench(*SMALL, "--batch", "1", "--size", "tiny", "--provider", "eager")
    assert code == 130 and found == [] and "nothing is recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "inline"], "has no mode inline"),
        (["--provider", "compile"], "choose from eager"),
        (["--batch", "3"], "1, 2, 4, 8, 16"),
        (["--output", "/proc/no/such/place"], "--output /proc/no/such/place"),
    ],
)
def test_wrong_usage_says_what_is_right(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scaling", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err


# Tables


def test_tables_show_the_cost_of_an_image_and_of_a_pixel() -> None:
    of_batch = [scaling(Case("kitti", batch=n), ms) for n, ms in ((1, 2.0), (4, 12.0))]
    found = tables([scaling(Case("kitti"), 4.0), *of_batch, scaling(Case("fcos"), 10.0), kernel("native", 99.0, Case("kitti"))])
    assert [table.title for table in found] == [
        "gkd_bmfi, forward + backward, native, by number of images: kitti C=256 boxes=20 fp32 contiguous",
        "gkd_bmfi, forward + backward, native, by size of the images: N=2 C=256 boxes=20 fp32 contiguous",
    ]
    images, sizes = found
    show = ["", "ms", "ms an image", "to the first row", "units to the first row"]
    rows = [[row[images.columns.index(name)] for name in show] for row in images.rows]
    assert rows == [
        ["N = 1", "2.00", "2.00", "1.00x", "1.00x"],
        ["N = 2", "4.00", "2.00", "1.00x", "1.00x"],
        ["N = 4", "12.0", "3.00", "1.50x", "1.50x"],
    ]
    # 4 ms for two images of 416 x 1344, 10 ms for two of 800 x 1344.
    assert [row[sizes.columns.index("us a megapixel")] for row in sizes.rows] == ["3577", "4650"]
    assert [row[sizes.columns.index("to the first row")] for row in sizes.rows] == ["1.00x", "1.30x"]
    assert "40 rounds" in images.notes[0] and "ideal: 7.00" in images.notes[0] and "A copy moved 10.0 GB/s" in images.notes[0]


def test_a_size_without_a_time_has_a_row_and_a_reason() -> None:
    (table,) = tables([scaling(Case(batch=1), 2.0), scaling(Case(batch=16), None)])
    assert table.rows[1][0] == "N = 16" and "skipped" in table.rows[1]
    assert "skipped: N = 16: needs about 30 GB, 20 GB are free" in table.notes
    (nobody,) = tables([scaling(Case(batch=1), None), scaling(Case(batch=16), None)])
    assert [row[0] for row in nobody.rows] == ["N = 1", "N = 16"]
    assert tables([scaling(Case(batch=n), None, status="absent") for n in (1, 2)]) == []


def test_only_sizes_of_one_run_are_compared() -> None:
    later = provenance(time="2025-11-22T09:00:00+00:00")
    newer = [scaling(Case(batch=n), n * 1.0, provenance=later) for n in (1, 2)]
    (table,) = tables([scaling(Case(batch=8), 80.0), *newer])
    assert [row[0] for row in table.rows] == ["N = 1", "N = 2"]


def test_the_page_has_the_cost_by_size() -> None:
    text = page("cpu", [scaling(Case(batch=n), n * 1.0) for n in (1, 2)], [])
    assert "## Cost by size" in text and "| N = 2 |" in text
    assert "Cost by size" not in page("cpu", [kernel("eager", 1.0)], [])
