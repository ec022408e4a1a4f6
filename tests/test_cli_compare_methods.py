"""`kdkernels compare-methods --quick` with two methods: its AP means nothing; its rows, its restarts and its report do."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import kdkernels

from kdkernels import recipes
from kdkernels.cli import compare_timing, stored_runs
from kdkernels.cli.compare_plan import Arena, Job, Plan, digest
from kdkernels.losses.catalogue import METHODS, defaults
from kdkernels.models import build_detector
from kdkernels.report.comparison import Group, comparison_markdown, groups, label

OPTIONS = ("compare-methods", "--quick", "--detectors", "fcos", "--methods", "fitnets,gkd", "--seeds", "1")
LABELS = ["no distillation", "fitnets", "gkd", "fitnets + AID", "gkd + AID"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    result = kdkernels(*OPTIONS, "-o", folder)
    assert result.exit_code == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "mAP" in line]
    assert [line.split(":")[1].split(",")[0].strip() for line in said] == ["teacher", *LABELS]
    assert said[0].startswith("1/6 fcos: teacher: mAP ") and all(" h " in line and " min left" in line for line in said)
    assert all(f"│ {label} " in result.stdout for label in ("teacher", *LABELS)) and "mean nothing" in result.stderr
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_every_method_has_a_row_alone_and_with_aid(folder: Path) -> None:
    results = read(folder)
    assert [(row["method"], row["aid"], row["seed"]) for row in results["rows"]] == [
        ("", False, 0), ("fitnets", False, 0), ("gkd", False, 0), ("fitnets", True, 0), ("gkd", True, 0),
    ]  # fmt: skip
    assert results["missing"] == [] and list(results["teachers"]) == ["fcos"]
    for row in results["rows"]:
        assert 0 <= row["map"] <= row["map50"] <= 1 and row["steps"] == 2 and row["task_loss"] > 0 and row["step_ms"] > 0
        assert (row["kd"] is None) == (row["method"] == "") and (row["kd"] or 1) > 0
        assert {"commit", "changed", "mode", "hash"} <= row.keys()
        assert set(row["losses"]) == ({row["method"]} if row["method"] else set())
        assert all((entry["type"] == "aid") == row["aid"] for entry in row["losses"].values())
    for key in ("initial_weights", "data_order", "parameters"):
        assert len({row[key] for row in results["rows"]}) == 1


def test_steps_are_timed_against_the_step_without_distillation(folder: Path) -> None:
    steps = read(folder)["timing"]["fcos"]
    assert set(steps) == set(LABELS) and steps["no distillation"]["ratio"] == 1
    assert f"1.00 ({steps['no distillation']['ms']:.0f} ms)" in (folder / "results.md").read_text(encoding="utf-8")
    assert all(step["ms"] > 0 and step["ratio"] > 0 and step["memory_mib"] > 1 for step in steps.values())


def test_timings_are_written_group_by_group(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second group leaves the first, and the same command measures only what is missing, beside the plain step again."""
    shutil.copytree(folder, tmp_path / "out")
    kept = tmp_path / "out" / "runs" / "fcos" / "timing.json"
    kept.unlink()
    monkeypatch.setattr(compare_timing, "TOGETHER", 3)
    measured, time_methods = [], compare_timing.time_methods

    def stopped_once(*arguments: Any) -> Any:
        measured.append(list(arguments[2]))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return time_methods(*arguments)

    monkeypatch.setattr(compare_timing, "time_methods", stopped_once)
    assert kdkernels(*OPTIONS, "-o", tmp_path / "out").exit_code == 130
    assert list(json.loads(kept.read_text(encoding="utf-8"))) == LABELS[:4]
    result = kdkernels(*OPTIONS, "-o", tmp_path / "out")
    assert result.exit_code == 0 and measured == [LABELS[1:4], LABELS[4:], LABELS[4:]]
    steps = read(tmp_path / "out")["timing"]["fcos"]
    assert set(steps) == set(LABELS) and all(step["ratio"] > 0 for step in steps.values())


def test_the_report_is_written_again_from_what_is_there(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    for name in ("results.json", "results.md", "gains.png"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "runs" / "fcos" / "seed0" / "gkd")
    result = kdkernels("compare-methods", "--report", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "Not run yet: gkd (seed 0)." in text and "| gkd + AID |" in text and "| gkd |" not in text
    assert (tmp_path / "out" / "gains.png").stat().st_size > 5000
    assert [row["method"] for row in read(tmp_path / "out")["missing"]] == ["gkd"]
    nothing = kdkernels("compare-methods", "--report", "-o", tmp_path / "none")
    assert nothing.exit_code == 2 and "there is no comparison in" in nothing.stderr and not (tmp_path / "none").exists()


def test_what_is_finished_is_kept_and_a_failure_is_recorded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "out")
    seed = tmp_path / "out" / "runs" / "fcos" / "seed0"
    shutil.rmtree(seed / "fitnets")
    (seed / "no-distillation" / "row.json").write_text('{"hash": "of another recipe", "map": 0.5}', encoding="utf-8")
    train = stored_runs.StoredRuns.train

    def fail(self: Any, title: str, *more: Any) -> Any:
        if "fitnets" in title:
            raise ValueError("it cannot be done")
        return train(self, title, *more)

    monkeypatch.setattr(stored_runs.StoredRuns, "train", fail)
    result = kdkernels(*OPTIONS, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if " min left" in line]
    assert said[0].startswith("1/2 fcos: no distillation, seed 0: mAP") and said[1].startswith("2/2 fcos: fitnets, seed 0: ValueError")
    assert "fitnets failed (seed 0): ValueError: it cannot be done" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    rows = {(row["method"], row["aid"]): row for row in read(tmp_path / "out")["rows"]}
    before = {(row["method"], row["aid"]): row for row in read(folder)["rows"]}
    assert rows["gkd", False] == before["gkd", False] and rows["", False]["map"] == before["", False]["map"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "3"), "holds another comparison (student_steps was 2, is 3)"),
        (("--methods", "fitnets,nonsense"), "--methods nonsense: no method 'nonsense'; the methods are acam, bmfi, bmfi-recipe, "),
        (("--detectors", "yolo"), "detector is 'yolo', should be one of fcos"),
        (("--methods", ","), "--methods ',': names are joined by ,, and one is empty"),
        (("--detectors", "fcos,"), "--detectors 'fcos,': names are joined by ,, and one is empty"),
        (("--methods", "gkd+"), "--methods 'gkd+': names are joined by +, and one is empty"),
        (("--methods", "gkd,cwd,gkd"), "--methods 'gkd,cwd,gkd': gkd stands there more than once"),
        (("--methods", "gkd+gkd"), "--methods 'gkd+gkd': gkd stands there more than once"),
        (("--methods", "gkd,aid"), "each method that is named has a row with it, unless --no-aid is given"),
        (("--methods", "aid+fgd"), "--methods aid+fgd: AID is not alone"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(options: tuple[str, ...], message: str, folder: Path) -> None:
    before = (folder / "comparison.json").read_text(encoding="utf-8")
    result = kdkernels(*OPTIONS, *options, "-o", folder)
    assert result.exit_code == 2 and message in result.stderr
    assert (folder / "comparison.json").read_text(encoding="utf-8") == before


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    result = kdkernels(*OPTIONS, "-o", tmp_path)
    assert result.exit_code == 2 and "is not empty and no comparison's" in result.stderr


def test_all_methods_come_once_before_any_comes_twice() -> None:
    methods = tuple(recipes.compared_methods())
    own = {name for name, (method, _) in METHODS.items() if not method.wraps or name == "pad"}
    assert len(methods) == len(set(methods)) and set(methods) == own | {"gkd-recipe", "gkd-imitation-recipe", "bmfi-recipe"}
    plan = Plan(recipes.COMPARED, methods, 3, True)
    jobs = plan.jobs()
    assert len(set(jobs)) == len(jobs) == 3 * (len(plan.arenas()) + 2 * 2 * len(methods))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    of_one = [job for job in jobs if job.seed == 1]
    assert [job.aid for job in of_one] == sorted(job.aid for job in of_one) and not of_one[0].method
    assert {job.arena for job in jobs} == set(plan.arenas())
    assert Plan(("fcos",), ("ld", "gkd"), 1, False).arenas() == [Arena("fcos"), Arena("fcos", True)]
    assert Plan(("fcos",), ("a",), 1, False).joined(Plan(("x", "fcos"), ("b", "a"), 2, True)) == Plan(("fcos", "x"), ("a", "b"), 2, True)


@pytest.mark.parametrize("detector", ["fcos", "fasterrcnn"])
def test_every_method_has_the_published_values_and_the_recipes_have_rows_of_their_own(detector: str) -> None:
    for name, (method, loss) in METHODS.items():
        if name == "aid":
            continue
        alone, weighed = (recipes.method_entries(name, detector, aid)[name] for aid in (False, True))
        assert weighed["base"] == alone and alone["type"] == name
        preset = alone.get("preset", "default")
        assert preset in ("paper", recipes.suitable_preset(loss, detector), method.options.get("preset", "default"))
        assert all(alone[key] == value for key, value in defaults(name)[preset].items())
    for name, tuned in recipes.LOSSES.items():
        row, plain = f"{name}-recipe", recipes.method_entries(name, detector, False)[name]
        found = recipes.method_entries(row, detector, False)[row]
        assert found == {**plain, **tuned} != plain
        (built,) = recipes.build_losses(recipes.method_entries(name, detector, False)).values()
        assert built.weight == plain["weight"]
    assert recipes.method_entries("pad", detector, False)["pad"]["base"]["type"] == "fbkd"


def test_rows_and_log_lines_say_what_a_method_weighs() -> None:
    assert [label("pad", aid) for aid in (False, True)] == ["pad (fbkd)", "pad (fbkd) + AID"]
    assert label("gkd+pad", False) == "gkd+pad (fbkd)" and label("", False) == "no distillation"
    assert Job(Arena("fcos"), "pad", False, 1).title == "fcos: pad (fbkd), seed 1"


def test_the_hash_of_a_run_covers_what_its_numbers_depend_on() -> None:
    recipe = recipes.COMPARISON
    spec = recipe.spec("fcos", "slim-student")
    plain = digest(recipe, spec, 5, 0, {})
    others = [
        digest(recipes.Comparison(learning_rate=1.0), spec, 5, 0, {}),
        digest(recipe, recipe.spec("retinanet", "slim-student"), 5, 0, {}),
        digest(recipe, spec, 6, 0, {}),
        digest(recipe, spec, 5, 1, {}),
        digest(recipe, spec, 5, 0, recipes.method_entries("gkd", "fcos", False)),
        digest(recipe, spec, 5, 0, recipes.method_entries("gkd", "fcos", True)),
        digest(recipe, spec, 5, 0, {}, "another teacher"),
    ]
    assert len({plain, *others}) == 8
    assert digest(recipes.Comparison(timing_rounds=1, teacher_steps=7), spec, 5, 0, {}) == plain


def test_gains_are_of_the_same_seed_sorted_and_marked_where_they_hurt() -> None:
    def row(method: str, seed: int, ap: float, aid: bool = False) -> dict[str, Any]:
        values = {"arena": "fcos", "method": method, "aid": aid, "seed": seed, "map": ap, "map50": ap, "commit": None, "changed": None}
        return {**values, "kd": 1.0 if method else None, "task_loss": 2.0, "mode": "inline"}

    bad, good = [row("bad", 0, 0.09), row("bad", 1, 0.28)], [row("good", 1, 0.32), row("good", 1, 0.33, True)]
    rows = [row("", 0, 0.10), row("", 1, 0.30), *bad, *good]
    results: dict[str, Any] = {
        "rows": rows, "missing": [], "teachers": {}, 
        "timing": {"fcos": {"good": {"ms": 712.5, "ratio": 1.5, "memory_mib": 9.0}, label("", False): {"ms": 475.2, "ratio": 1.0}}},
        "recipe": asdict(recipes.COMPARISON), "device": "cpu", "threads": 1, "versions": {"torch": "2"}, "backend": "reference",
    }  # fmt: skip
    found = groups(results, "fcos")
    assert [group.name for group in found] == ["no distillation", "good + AID", "good", "bad"]
    assert found[3].gain == pytest.approx(-1.5) and found[1].over_plain == [pytest.approx(1.0)]
    assert found[2].gains == {1: pytest.approx(2.0)}
    lines = [[cell.strip() for cell in line.split("|")] for line in comparison_markdown(results).splitlines() if "|" in line]
    cells = {line[1]: line for line in lines}
    assert cells["bad"][2:7] == ["2", "18.5 ± 13.4", "-1.5 ± 0.7", "-1.0, -2.0", "hurts"]
    assert "gkd-recipe: weight 0.1; gkd-imitation-recipe: weight 20" in comparison_markdown(results)
    assert cells["good"][2:7] == ["1", "32.0", "+2.0", "+2.0", ""] and cells["good"][9:11] == ["1.50", "9"]
    # The ratios are of something.
    assert cells["no distillation"][9] == "1.00 (475 ms)" and "in brackets the latter's own time" in comparison_markdown(results)


@pytest.mark.parametrize(
    ("gains", "hurts"), [((-1.0, -2.0), True), ((-1.0, 0.5), False), ((-9.0,), False), ((1.0, 2.0), False), ((), False)]
)
def test_a_method_hurts_when_it_loses_more_than_the_deviation(gains: tuple[float, ...], hurts: bool) -> None:
    assert Group("x", [], dict(enumerate(gains)), [], {}).hurts is hurts


@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("detector", recipes.COMPARED)
def test_the_detectors_of_a_gpus_comparison_can_be_built(detector: str, distribution: bool) -> None:
    recipe = recipes.COMPARISON_GPU
    student, teacher = (recipe.spec(detector, backbone, distribution) for backbone in (recipe.student, recipe.teacher))
    assert (student.backbone, teacher.backbone, student.pretrained, teacher.pretrained) == ("resnet18", "resnet50", False, False)
    sizes = []
    for spec in (student, teacher):
        with torch.device("meta"):
            model = build_detector(spec)
        assert (model.transform.min_size, model.transform.max_size) == ((192,), 640)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert 5e6 < sizes[0] < sizes[1]


def test_the_help_says_what_a_gpu_compares() -> None:
    recipe, text = recipes.COMPARISON_GPU, " ".join(kdkernels("compare-methods", "--help").stdout.replace("│", " ").split())
    assert f"resized to {recipe.min_size} x {recipe.max_size}" in text
