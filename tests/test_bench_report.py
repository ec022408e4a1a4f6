"""Tables, pictures and pages from made-up records: what is compared with what, and that nobody who has no time is passed over."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_records import DISTANCES, kernel, kernels, provenance, step, steps

from benchmarks.measure.records import append
from benchmarks.registry import Case
from benchmarks.registry.predicted import SHORTEST_MS
from benchmarks.report import methods, run, speed_of_light
from benchmarks.report.cells import Cell, cells, extra, light_ms, mean_speed_up
from benchmarks.report.kernels import EXTRA, RESIDENT, cell_table, not_measured, one_case, overview
from benchmarks.report.origin import device, runs, where
from benchmarks.report.page import page
from benchmarks.report.steps import by_provider, setup_table, setups
from benchmarks.report.text import number
from kdkernels.report.tables import Table


def one_cell(*records: dict) -> Cell:
    (cell,) = cells(records)
    return cell


def column(table: Table | None, name: str) -> dict[str, str]:
    assert table is not None
    return {row[0]: row[table.columns.index(name)] for row in table.rows}


def written(folder: Path, records: list[dict], name: str = "kernels.jsonl") -> Path:
    path = folder / name
    for record in records:
        append(path, record)
    return path


def parsed(module: object, *words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(list(map(str, words)))


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0, "0.00"), (0.01234, "0.0123"), (1.0, "1.00"), (25.68, "25.7"), (256.4, "256"), (12345.6, "12346")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_speed_up_is_against_the_best_of_the_others_and_against_each() -> None:
    cell = one_cell(kernel("reference", 10.0), kernel("eager", 30.0), kernel("compile", 5.0), kernel("paper", 100.0), kernel("triton"))
    assert cell.speed_ups("reference") == {"paper": 10.0, "eager": 3.0, "compile": 0.5}
    assert cell.against_best("reference") == ("compile", 0.5)
    assert cell.against_best("compile") == ("reference", 2.0)
    row = {name: column(cell_table(cell), name) for name in ("against the best other", "against each")}
    assert row["against the best other"] == {"paper": "", "eager": "", "compile": "", "reference": "0.500x (compile)"}
    assert row["against each"]["reference"] == "paper 10.0x, eager 3.00x, compile 0.500x"


def test_other_backends_of_kdkernels_count_as_others() -> None:
    cell = one_cell(kernel("reference", 10.0), kernel("native", 2.0), kernel("eager", 30.0))
    assert cell.against_best("native") == ("reference", 5.0)
    assert cell.against_best("reference") == ("native", 0.2)


def test_who_has_no_time_is_compared_with_nobody() -> None:
    cell = one_cell(kernel("reference"), kernel("eager", 30.0))
    assert cell.against_best("reference") is None and cell.against_best("eager") is None


@pytest.mark.parametrize("changed", [{"time": "2025-11-22T09:00:00+00:00"}, {"threads": 1}, {"commit": "f" * 40}])
def test_only_times_of_one_run_are_compared(changed: dict) -> None:
    cell = one_cell(kernel("reference", 10.0), kernel("eager", 30.0), kernel("compile", 1.0, provenance=provenance(**changed)))
    assert cell.against_best("reference") == ("eager", 3.0)
    assert cell.against_best("compile") is None


def test_the_mean_is_geometric_and_says_over_what() -> None:
    found = cells(
        [
            *(kernel("reference", 10.0, mode="forward"), kernel("eager", 40.0, mode="forward")),
            *(kernel("reference", 10.0), kernel("eager", 10.0)),
            *(kernel("reference", mode="inline"), kernel("eager", 10.0, mode="inline")),
        ]
    )
    assert mean_speed_up(found, "reference") == (pytest.approx(2.0), 2)
    table = overview(found, Case())
    assert table is not None
    assert "reference against the best other, geometric mean over the 2 of the 3 rows above that have both: 2.00x." in table.notes


def test_speed_of_light_is_the_ideal_bytes_at_the_copy_bandwidth() -> None:
    record = kernel("eager", 64.2)
    # 7 units of 2 images x 256 channels x 22400 cells (P3..P7 of 800 x 1344) x 4 bytes at 10 GB/s.
    assert Case().pixels == 22400
    assert light_ms(record) == pytest.approx(7 * 2 * 256 * 22400 * 4 / 10e9 * 1e3)
    table = speed_of_light.speed_of_light(cells([record]), Case())
    assert table is not None
    assert table.rows == [["gkd_bmfi, backward", "321", "7.00", "32.1", "2.00x"]]


def test_speed_of_light_is_of_primitives_and_of_the_whole() -> None:
    records = [kernel("eager", 64.2, entry=name, entry_kind=kind) for name, kind in (("attention", "primitive"), ("bmfi", "method"))]
    table = speed_of_light.speed_of_light(cells([*records, kernel("eager", 64.2)]), Case())
    assert table is not None
    assert [row[0] for row in table.rows] == ["gkd_bmfi, backward", "attention, backward"]


def test_the_prediction_stands_beside_what_was_measured() -> None:
    """Seven units at 10 GB/s, and ten launches over maps and vectors only."""
    records = [kernel("eager", 64.2), kernel("triton", 40.0), kernel("eager", 64.2, mode="inline"), kernel("triton", mode="inline")]
    table = speed_of_light.speed_of_light(cells(records), Case())
    assert table is not None and table.columns[-2:] == ["triton ms", "predicted ms"]
    expected = number(7 * Case().unit / 10e9 * 1e3 + 10 * SHORTEST_MS)
    assert [row[-2:] for row in table.rows] == [["40.0", expected], ["absent", "absent"]]
    assert sum(note.startswith("Predicted: ") for note in table.notes) == 1
    gone = speed_of_light.speed_of_light(cells([kernel("triton", 40.0, entry="gone", entry_kind="primitive")]), Case())
    assert gone is not None and gone.rows[0][-2:] == ["40.0", ""]


def test_rejected_and_absent_providers_are_named_with_their_reason() -> None:
    rejected = kernel("compile", status="rejected", reason="value 0: relative error 3e-1 is above 2e-5")
    cell = one_cell(kernel("eager", 30.0), rejected, kernel("triton"))
    assert column(cell_table(cell), "ms") == {"eager": "30.0", "compile": "rejected"}
    assert cell_table(cell).notes == ["rejected: compile: value 0: relative error 3e-1 is above 2e-5"]
    assert not_measured([cell], absent=True) == ["absent: triton: needs a GPU"]
    text = page("cpu", [kernel("eager", 30.0), rejected, kernel("triton")], [])
    assert "absent: triton: needs a GPU" in text and "above 2e-5" in text
    for table in (overview([cell], Case()), one_case([cell], "gkd_bmfi", Case(), ["backward"])):
        assert table is not None
        assert len([note for note in table.notes if "needs a GPU" in note or "above 2e-5" in note]) == 2


def test_a_cell_in_which_all_are_rejected_is_shown() -> None:
    records = [kernel("eager", 1.0, mode="forward"), kernel("eager", status="rejected", reason="wrong"), kernel("triton")]
    for table in (
        overview(cells(records), Case()),
        speed_of_light.speed_of_light(cells(records), Case()),
        one_case(cells(records), "gkd_bmfi", Case(), ["forward", "backward"]),
    ):
        assert table is not None and len(table.rows) == 2
        assert "rejected" in table.rows[1] and "rejected: eager (gkd_bmfi backward): wrong" in table.notes
    assert overview(cells([kernel("triton")]), Case()) is None


def test_a_reason_that_holds_in_some_cells_says_in_which() -> None:
    records = [kernel("compile", status="failed", reason="Broken: <here>"), kernel("eager", 1.0), kernel("compile", 2.0, mode="forward")]
    assert not_measured(cells(records)) == ["failed: compile (gkd_bmfi backward): Broken: &lt;here>"]


def test_the_short_table_has_the_figures_and_says_device_and_threads() -> None:
    table = one_case(cells(kernels()), "gkd_bmfi", Case(), ["forward", "backward", "inline"])
    assert table is not None
    assert [row[0] for row in table.rows[:5]] == [f"forward: {name}" for name in DISTANCES]
    assert len(table.rows) == 15
    assert column(table, "x speed of light")["forward + backward: compile"] == "4.00"
    assert column(table, "% of copy")["inline: eager"] == "4.00"
    assert "Some CPU (2 cores), 2 threads, torch 2.11.0, commit 0123456789, 2025-11-21. A copy moved 10.0 GB/s." in table.notes[0]
    assert one_case(cells(kernels()), "gkd_bmfi", Case("tiny"), ["forward"]) is None


def test_figures_that_nobody_has_here_have_no_column() -> None:
    assert "launches" not in cell_table(one_cell(kernel("eager", 1.0))).columns
    assert column(cell_table(one_cell(kernel("eager", 1.0, launches=7), kernel("paper", 1.0))), "launches") == {"paper": "", "eager": "7"}


def test_extra_memory_is_what_is_held_beside_the_gradient() -> None:
    unit = Case().unit / 1e6
    held = {mode: kernel("native", 1.0, mode=mode, peak_mb=1.02 * unit) for mode in ("forward", "backward", "inline")}
    assert {mode: extra(record) for mode, record in held.items()} == {mode: pytest.approx(102 if mode == "forward" else 2) for mode in held}
    masks = kernel("native", 1.0, mode="forward", entry="box_mask", entry_kind="primitive", ideal_bytes=180_000)
    assert extra(masks) is None and extra(kernel("native")) is None and extra({**held["inline"], "peak_mb": None}) is None
    seen = {**held["backward"], "resident_mb": 1.03 * unit}
    assert column(cell_table(one_cell(seen)), EXTRA) == {"native": "2.00"}
    assert column(cell_table(one_cell(seen)), RESIDENT) == {"native": "3.00"}
    assert RESIDENT not in cell_table(one_cell(held["backward"])).columns, "older records do not have it"
    assert column(one_case(cells(held.values()), "gkd_bmfi", Case(), ["backward"]), EXTRA) == {"forward + backward: native": "2.00"}
    assert EXTRA not in cell_table(one_cell(masks)).columns


def test_the_compiled_library_is_told_where_it_was_measured() -> None:
    origin = provenance(native={"capability": "avx512", "compiler": "c++ 12.2", "version": "0.1.0", "torch": "2.11.0"})
    others, own = kernel("eager", 3.0, provenance=origin), kernel("native", 1.0, provenance=origin)
    assert "torch 2.11.0, native: avx512, c++ 12.2, commit" in where([others, own])
    assert "native" not in where([others]) and "native" not in where([kernel("native")])
    assert "; native library: avx512, c++ 12.2; commit" in runs([own]) and "native" not in runs([kernel("eager", 1.0)])


def test_a_backend_that_is_measured_is_in_every_table_and_picture() -> None:
    from benchmarks.report import plots

    records = [record for case in (Case(), Case("tiny")) for record in kernels(case, {**DISTANCES, "native": 1.5})]
    found = cells(records)
    table = overview(found, Case())
    assert column(table, "native against the best other")["gkd_bmfi, backward"] == "2.00x (compile-max)"
    assert column(speed_of_light.speed_of_light(found, Case()), "native")["gkd_bmfi, inline"] == "1.50x"
    assert "forward: native" in column(one_case(found, "gkd_bmfi", Case(), ["forward"]), "ms")
    drawn = plots.figures(records)
    labels = {name: figure.axes[0].get_legend_handles_labels()[1] for name, figure in drawn.items()}
    assert set(drawn) == {"time", "copy", "memory"} and all("native" in found for found in labels.values())
    assert "absent: native" not in page("cpu", records, []) and "absent: triton" in page("cpu", records, [])


def test_where_names_everything_that_differs() -> None:
    other = provenance(dirty=True, threads=1, time="2025-11-23T01:00:00+00:00")
    text = where([kernel("eager", 1.0), kernel("paper", 1.0, copy_gb_per_s=12.0, provenance=other)])
    assert text == (
        "Measured on Some CPU (2 cores), 2 threads; Some CPU (2 cores), 1 thread, torch 2.11.0, commit 0123456789, "
        "0123456789 with changes, 2025-11-21 to 2025-11-23. A copy moved 10.0 to 12.0 GB/s."
    )
    assert device([kernel("eager", 1.0, provenance=provenance(device="NVIDIA H200"))]) == "NVIDIA H200"


def test_the_state_of_the_machine_is_told() -> None:
    assert "load average 0.500 to 1.50, CPU clock 2100 to 2900 MHz." in runs([kernel("eager", 1.0)])
    hot = {"throttle": "0x0000000000000004", "sm_mhz": 1200.0}
    quiet = {"throttle": "0x0000000000000000", "sm_mhz": 1900.0}
    assert "SM clock 1200 to 1900 MHz, throttle flags 0x0000000000000004" in runs(
        [kernel("eager", provenance=provenance(before=quiet, after=hot))]
    )
    assert "no throttle flag at these moments" in runs([kernel("eager", provenance=provenance(before=quiet, after=quiet))])


def test_the_page_has_every_cell() -> None:
    records = [*kernels(), *kernels(Case("tiny")), *steps()]
    text = page("cpu", records, ["cpu-time.png"])
    assert text.count("units, ") == 6
    assert "### gkd_bmfi: tiny N=2 C=256 boxes=20 fp32 contiguous" in text
    assert "## Step: fcos-small" in text
    assert "](cpu-time.png)" in text and "cpu-copy.png" not in text


def test_step_tables_keep_setups_apart() -> None:
    groups = setups([*steps(), *steps(amp="bf16"), *steps(pair="frcnn-small"), *steps(batch=4), *kernels()])
    assert len(groups) == 4
    titles = [setup_table(group).title for group in groups.values()]
    assert titles[:2] == ["fcos-small, 2 images of 256 x 416, fp32", "fcos-small, 2 images of 256 x 416, bf16 autocast"]


def test_the_step_table_has_shares_and_reasons() -> None:
    (group,) = setups(steps(["gkd_bmfi", "bmfi"])).values()
    table = setup_table(group, "gkd_bmfi")
    names = ["student", "+ teacher forward", "+ teacher head gradient", "+ gkd_bmfi, eager, explicit", "+ gkd_bmfi, reference, explicit"]
    assert [row[0] for row in table.rows] == [*names, "+ gkd_bmfi, eager, inline", "+ gkd_bmfi, reference, inline"]
    assert column(table, "distillation ms")["+ gkd_bmfi, reference, inline"] == "40.0"
    assert column(table, "teacher forward ms")["+ teacher forward"] == "40.0"
    assert column(table, "ms")["+ gkd_bmfi, eager, inline"] == "rejected"
    assert "rejected: + gkd_bmfi, eager, inline: gradient off by 0.1" in table.notes
    shares = by_provider(group)
    assert shares is not None
    assert shares.columns == ["", "eager", "reference"]
    assert ["gkd_bmfi, inline", "", "40.0"] in shares.rows
    assert by_provider([step("student", 100.0)]) is None
    assert "step against reference" not in table.columns, "older records do not have it"


def test_the_step_table_says_what_a_whole_step_gains() -> None:
    steps = [step("student", 100.0), step("+ gkd_bmfi", 160.0, "native", "inline", against={"reference": 1.2, "eager": 1.3})]
    table = setup_table([*steps, step("+ gkd_bmfi", 192.0, "reference", "inline", against={"native": 0.83, "eager": 1.1})])
    found = column(table, "step against reference")
    assert found == {"student": "", "+ gkd_bmfi, native, inline": "1.20x", "+ gkd_bmfi, reference, inline": ""}


def test_report_writes_a_page_and_pictures_that_know_their_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "cpu"
    sizes = [record for case in (Case(), Case("tiny"), Case(boxes=0)) for record in kernels(case)]
    source = written(results, [kernel("eager", 1e9), *sizes])
    written(results, steps(), "steps.jsonl")
    assert run.main(parsed(run, "--results", results.parent, "--output", tmp_path / "out")) == 0
    names = {"cpu.md", "cpu-time.png", "cpu-copy.png", "cpu-memory.png", "cpu-steps.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert len(capsys.readouterr().out.splitlines()) == len(names)
    text = (tmp_path / "out" / "cpu.md").read_text()
    assert all(f"]({name})" in text for name in names - {"cpu.md"})
    assert "1000000000" not in text, "the newer record of the same cell and provider counts"
    before = (tmp_path / "out" / "cpu-time.png").read_bytes()
    assert run.fingerprint(run.result_files(results.parent)["cpu"]).encode() in before
    append(source, kernel("eager", 5.0))
    assert run.fingerprint(run.result_files(results.parent)["cpu"]).encode() not in before


def test_pictures_of_the_same_records_are_the_same(tmp_path: Path) -> None:
    from benchmarks.report import plots

    records = steps()
    first, second = (plots.save_figures(records, "cpu", tmp_path / name, "source")[0].read_bytes() for name in "ab")
    assert first == second


def test_no_picture_without_something_to_draw() -> None:
    from benchmarks.report import plots

    assert plots.figures([kernel("eager"), step("student", 100.0)]) == {}
    assert set(plots.figures([kernel("eager", 1.0)])) == {"copy", "memory"}, "one size makes no line"


def test_lines_of_the_time_plot_differ_in_size_only() -> None:
    from benchmarks.report import plots

    cases = [Case(), Case("tiny"), Case("frcnn", batch=8), Case(boxes=0), Case("tiny", dtype="bf16")]
    figure = plots.time_by_size(cells([record for case in cases for record in kernels(case)]))
    sizes = [round(x) for x in figure.axes[0].get_xticks()]
    assert sizes == [round(replace(case).unit / 1e6) for case in (Case("tiny"), Case(), Case("frcnn", batch=8))]


def test_report_without_matplotlib_still_writes_the_page(tmp_path: Path) -> None:
    source = written(tmp_path, kernels())
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from benchmarks.cli import main\n"
        f"sys.exit(main(['report', '--input', {str(source)!r}, '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "no pictures" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cpu.md"]


def test_report_says_when_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(parsed(run, "--results", tmp_path, "--output", tmp_path / "out")) == 1
    assert run.main(parsed(run, "--input", tmp_path / "absent.jsonl", "--output", tmp_path / "out")) == 2
    assert not (tmp_path / "out").exists()
    assert "absent.jsonl" in capsys.readouterr().err


def test_a_file_of_another_device_names_the_page(tmp_path: Path) -> None:
    source = written(tmp_path, [kernel("eager", 1.0, provenance=provenance(device="NVIDIA H200"))])
    assert run.main(parsed(run, "--input", source, "--output", tmp_path / "out")) == 0
    assert (tmp_path / "out" / "nvidia-h200.md").is_file()


def test_speed_of_light_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, [*kernels(), *kernels(Case("tiny"))])
    assert speed_of_light.main(parsed(speed_of_light, "--input", source)) == 0
    out = capsys.readouterr().out
    assert out.count("**Distance from the speed of light at") == 2 and "| gkd_bmfi, inline | 367 | 8.00 | 36.7 | 60.0x |" in out
    assert speed_of_light.main(parsed(speed_of_light, "--input", tmp_path / "absent.jsonl")) == 2


def test_speed_of_light_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--entry", "feature_imitation", "--case", "tiny", "--batch", 1, "--channels", 64, "--mode", "forward"]
    words = [*small, "--provider", "eager", "--seconds", 0.01, "--device", "cpu", "--output", tmp_path / "kernels.jsonl"]
    written(tmp_path, kernels(entry="feature_imitation", entry_kind="primitive"))
    assert speed_of_light.main(parsed(speed_of_light, *words)) == 0
    out = capsys.readouterr().out
    assert out.startswith("**Distance from the speed of light at tiny N=1 C=64"), "progress goes to standard error"
    assert out.count("\n| feature_imitation, ") == 1, "only what was asked for, whatever else the file holds"


def test_a_wrapper_that_adds_statistics_of_the_batch_shows_its_own_coupling_and_cost() -> None:
    pages, lines = {name: methods.block(name) for name in ("pad", "aid")}, methods.overview().splitlines()
    assert "It costs what the loss that it wraps costs" in pages["aid"] and "entries are those of the loss that it wraps" in pages["aid"]
    assert "Least traffic, on fitnets, in units" in pages["pad"] and "| values and gradient | 5 |" in pages["pad"]
    assert "Coupled over the batch" in pages["pad"] and "It costs what" not in pages["pad"]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    rows = {row[1].partition("]")[0]: row for row in cells}
    assert (rows["[pad"][3], rows["[pad"][6]) == ("batch-coupled", "5, on fitnets")
    assert (rows["[aid"][3], rows["[aid"][6]) == ("of what it wraps", "") and rows["[fitnets"][6] == "3"
