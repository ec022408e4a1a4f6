"""`kdkernels demo --quick`: the whole demo on a few images and steps. Its AP means nothing; its form, its hashes and its restarts do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli import kdkernels
from PIL import Image
from typer.testing import Result

from kdkernels import backend_info, recipes

NAMES = ["teacher", "student", "student, equal time", "student + BMFI", "student + GKD-BMFI", "student + AID-BMFI"]
KEYS = [
    "name", "seed", "map", "map50", "parameters", "step_ms", "train_seconds", "initial_weights", "data_order", "steps", "learning_rate",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    result = kdkernels("demo", "--quick", "--seeds", "2", "--output", folder)
    assert result.exit_code == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def results(demo: tuple[Path, Result]) -> dict[str, Any]:
    return json.loads((demo[0] / "results.json").read_text(encoding="utf-8"))


def test_results_have_a_row_for_every_student_of_every_seed(results: dict[str, Any]) -> None:
    assert [(row["name"], row["seed"]) for row in results["rows"]] == [("teacher", 0), *((n, s) for s in (0, 1) for n in NAMES[1:])]
    assert all(list(row) == KEYS for row in results["rows"])
    assert all(0 <= row["map"] <= row["map50"] <= 1 and row["step_ms"] > 0 and row["train_seconds"] > 0 for row in results["rows"])
    assert round(results["rows"][0]["parameters"] / 1e6, 2) == 3.09
    assert {row["parameters"] for row in results["rows"][1:]} == {586_937}
    assert {row["learning_rate"] for row in results["rows"]} == {2e-3}


def test_results_say_what_was_run(results: dict[str, Any]) -> None:
    assert results["data"]["train_images"] == 16 and results["data"]["val_images"] == 6 and results["data"]["size"] == [96, 320]
    assert results["seconds"] > sum(row["train_seconds"] for row in results["rows"])
    assert results["inherit"] is True and backend_info()[results["backend"]]["active"]
    assert results["recipe"]["losses"] == recipes.LOSSES and results["threads"] >= 1 and results["versions"]["torch"].startswith("2.")


def test_students_of_a_seed_start_and_are_fed_alike(results: dict[str, Any]) -> None:
    for seed in (0, 1):
        rows = [row for row in results["rows"][1:] if row["seed"] == seed]
        assert len({row["initial_weights"] for row in rows}) == 1 and len({row["data_order"] for row in rows}) == 1
        steps = {row["name"]: row["steps"] for row in rows}
        longer = steps.pop("student, equal time")
        assert set(steps.values()) == {3} and 3 <= longer <= 9
    for key in ("initial_weights", "data_order"):
        assert len({row[key] for row in results["rows"]}) == 3


def test_equal_time_is_set_by_the_steps_of_the_distilled_run(demo: tuple[Path, Result], results: dict[str, Any]) -> None:
    from kdkernels.cli.demo_run import step_seconds

    for seed in (0, 1):
        folder = demo[0] / f"seed{seed}"
        ratio = step_seconds(folder / "student-gkd-bmfi") / step_seconds(folder / "student")
        row = next(r for r in results["rows"] if r["seed"] == seed and r["name"] == "student, equal time")
        assert row["steps"] == round(3 * min(max(ratio, 1), 3))


def test_the_table_is_on_stdout_and_in_markdown_and_html(demo: tuple[Path, Result]) -> None:
    folder, result = demo
    for text in (result.stdout, (folder / "results.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")):
        assert all(name in text for name in NAMES)
    assert "mean nothing" in result.stderr
    assert result.stderr.count("mAP") == 11 and "student + AID-BMFI, seed 1: mAP" in result.stderr


def test_pictures_are_drawn(demo: tuple[Path, Result]) -> None:
    for name in ("detections", "gkd_maps", "bmfi_masks", "curves"):
        with Image.open(demo[0] / "pictures" / f"{name}.png") as picture:
            assert picture.width > 500 and picture.height > 200
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_the_runs_can_be_used_by_the_other_commands(demo: tuple[Path, Result], results: dict[str, Any], tmp_path: Path) -> None:
    folder = demo[0]
    result = kdkernels("evaluate", folder / "seed1" / "student-aid-bmfi", "--json", tmp_path / "ap.json")
    assert result.exit_code == 0, result.stderr
    row = next(r for r in results["rows"] if r["seed"] == 1 and r["name"] == "student + AID-BMFI")
    assert json.loads((tmp_path / "ap.json").read_text(encoding="utf-8"))["metrics"]["bbox/AP"] == pytest.approx(row["map"], abs=1e-6)
    config = kdkernels("distill", "-c", folder / "seed0" / "student-gkd-bmfi" / "run.yaml", "--print-config")
    assert config.exit_code == 0 and "gkd-bmfi" in config.stdout


def test_a_stopped_demo_goes_on_where_it_was(demo: tuple[Path, Result], results: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(demo[0], folder)
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "seed1" / "student-bmfi")
    (folder / "seed0" / "student-aid-bmfi" / "row.json").unlink()  # stopped behind the last checkpoint
    again = kdkernels("demo", "--quick", "--seeds", "2", "--output", folder)
    assert again.exit_code == 0, again.stderr
    assert "keeping what is finished" in again.stderr
    assert [line.split(":")[0] for line in again.stderr.splitlines() if "mAP" in line] == [
        "student + AID-BMFI, seed 0",
        "student + BMFI, seed 1",
    ]
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for before, after in zip(results["rows"], found["rows"], strict=True):
        if (after["name"], after["seed"]) == ("student + BMFI", 1):
            assert (after["map"], after["initial_weights"], after["data_order"]) == (
                before["map"],
                before["initial_weights"],
                before["data_order"],
            )
        else:
            assert after == before
    assert found["seconds"] > results["seconds"]


def test_another_recipe_or_fresh_begins_anew_and_other_folders_are_left_alone(demo: tuple[Path, Result], tmp_path: Path) -> None:
    from kdkernels.cli.console import Stages
    from kdkernels.cli.demo_run import DemoRun
    from kdkernels.cli.errors import UserError

    folder = tmp_path / "out"
    shutil.copytree(demo[0], folder)
    (folder / "mine.txt").write_text("kept", encoding="utf-8")
    assert DemoRun(folder, 2, recipes.QUICK, Stages()).seconds_before > 0
    assert (folder / "teacher" / "row.json").is_file()
    assert DemoRun(folder, 2, recipes.QUICK, Stages(), fresh=True).seconds_before == 0
    assert not (folder / "teacher").exists() and not (folder / "seed1").exists() and not (folder / "results.json").exists()
    assert (folder / "mine.txt").is_file()
    shutil.copytree(demo[0] / "teacher", folder / "teacher")
    DemoRun(folder, 2, recipes.Recipe(teacher_steps=5), Stages())
    assert not (folder / "teacher").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not empty and no demo's"):
        DemoRun(tmp_path / "other", 1, recipes.QUICK, Stages())
