"""`kdkernels train`, `distill` and `evaluate` on a handful of rendered images."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from cli import kdkernels

from kdkernels.data import load_dataset

TINY = ("--steps", "2", "--batch-size", "2", "--device", "cpu")


class Runs(NamedTuple):
    data: Path
    teacher: Path
    student: Path
    stdout: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Data, a teacher and a student distilled by GKD and BMFI with AID, all by the command line."""
    root = tmp_path_factory.mktemp("runs")
    data, teacher, student = root / "road", root / "teacher", root / "student"
    assert kdkernels("data", "synthetic", data, "-n", "8", "--seed", "1").exit_code == 0
    made = kdkernels("train", "--data", data, "--backbone", "slim-teacher", *TINY, "-o", teacher)
    assert made.exit_code == 0, made.stderr
    result = kdkernels("distill", "--data", data, "--teacher", teacher, *TINY, "--aid", "--seed", "3", "--ema", "0.9", "-o", student)
    assert result.exit_code == 0, result.stderr
    return Runs(data, teacher, student, result.stdout)


def test_a_run_folder_has_configuration_logs_weights_and_result(runs: Runs) -> None:
    for folder in (runs.teacher, runs.student):
        names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert {
            "run.yaml",
            "config.yaml",
            "model.json",
            "metrics.jsonl",
            "train.log",
            "best.pt",
            "checkpoints/last.pt",
            "result.json",
        } <= names
        assert "curves.png" in names
    config = yaml.safe_load((runs.student / "run.yaml").read_text(encoding="utf-8"))
    assert config["teacher"] == str(runs.teacher) and config["data"]["root"] == str(runs.data)
    assert config["losses"]["bmfi"]["type"] == "aid" and config["train"]["ema_decay"] == 0.9 and config["train"]["resume"] is False


def test_the_result_has_the_students_numbers_and_the_teachers_beside(runs: Runs) -> None:
    result = json.loads((runs.student / "result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 2 and result["parameters"] == 586937 and result["teacher"]["parameters"] > 3_000_000
    assert 0 <= result["map"] <= result["map50"] <= 1 and result["metrics"]["bbox/AP"] == result["map"]
    assert list(result["losses"]) == ["gkd", "bmfi"] and result["mode"] == "inline"
    assert result["data"]["train_images"] + result["data"]["val_images"] == 8
    assert "student + AID-gkd, AID-bmfi" in runs.stdout and "teacher" in runs.stdout


def test_the_students_size_is_the_teachers_and_the_teachers_that_of_the_data(runs: Runs) -> None:
    for folder in (runs.teacher, runs.student):
        spec = json.loads((folder / "model.json").read_text(encoding="utf-8"))["spec"]
        assert (spec["min_size"], spec["max_size"], spec["detector"], spec["num_classes"]) == (96, 320, "fcos", 4)


def test_the_steps_log_every_loss(runs: Runs) -> None:
    lines = [json.loads(line) for line in (runs.student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert all(line["kd/gkd"] > 0 and line["kd/bmfi"] > 0 for line in lines)


def test_evaluate_finds_the_runs_own_validation_data(runs: Runs, tmp_path: Path) -> None:
    result = kdkernels("evaluate", runs.student, "--device", "cpu", "--json", tmp_path / "sub" / "ap.json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "sub" / "ap.json").read_text(encoding="utf-8"))
    wanted = json.loads((runs.student / "result.json").read_text(encoding="utf-8"))
    assert found["split"] == "val" and found["images"] == wanted["data"]["val_images"] and found["hash"] == wanted["data"]["val"]
    assert found["metrics"] == pytest.approx(wanted["metrics"], abs=1e-6)
    assert all(name in result.stdout for name in ("AP50", "Pedestrian", "fcos on slim-student"))


def test_evaluate_takes_other_data_and_single_checkpoints(runs: Runs, tmp_path: Path) -> None:
    kdkernels("data", "convert", runs.data, runs.data / "coco.json")
    split = json.loads((runs.teacher / "result.json").read_text(encoding="utf-8"))["data"]
    for checkpoint, arguments, images in (
        (runs.teacher / "best.pt", ("--data", runs.data, "--split", "all"), 8),
        (runs.teacher / "best.pt", ("--data", runs.data, "--split", "train"), split["train_images"]),
        (runs.teacher / "best.pt", ("--data", runs.data), split["val_images"]),
        (runs.teacher / "checkpoints" / "last.pt", ("--data", runs.data / "coco.json", "--format", "coco"), 8),
    ):
        result = kdkernels("evaluate", checkpoint, *arguments, "--json", tmp_path / "ap.json")
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / "ap.json").read_text(encoding="utf-8"))["images"] == images


def test_evaluate_without_a_model_or_with_other_classes(runs: Runs, tmp_path: Path) -> None:
    assert "neither best.pt nor checkpoints/last.pt" in _refused("evaluate", tmp_path)
    assert "there is no checkpoint" in _refused("evaluate", tmp_path / "x.pt")
    shutil.copy(runs.teacher / "best.pt", tmp_path / "best.pt")
    (tmp_path / "model.json").write_text(
        (runs.teacher / "model.json").read_text(encoding="utf-8").replace("Cyclist", "Rider"), encoding="utf-8"
    )
    assert "does not say what data it was trained on" in _refused("evaluate", tmp_path)
    assert "detects Car, Pedestrian, Rider, but the classes of the data are Car, Pedestrian, Cyclist" in _refused(
        "evaluate", tmp_path, "--data", runs.data
    )


def test_a_finished_run_is_not_overwritten(runs: Runs) -> None:
    assert "holds a run already: --resume continues it" in _refused("train", "--data", runs.data, "-o", runs.teacher)


def test_resume_takes_the_configuration_from_the_folder_and_only_that(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs.student, folder)
    config = (folder / "run.yaml").read_text(encoding="utf-8").replace(str(runs.student), str(folder))
    (folder / "run.yaml").write_text(config, encoding="utf-8")
    result = kdkernels("distill", "--resume", "-o", folder)
    assert result.exit_code == 0, result.stderr
    assert "resumed at step 2 of 2" in result.stderr
    assert (folder / "run.yaml").read_text(encoding="utf-8") == config
    assert "steps was 2, is 3" in _refused("distill", "--resume", "-o", folder, "--steps", "3")
    assert "losses was" in _refused("distill", "--resume", "-o", folder, "--method", "bmfi")
    assert "there is nothing to resume" in _refused("distill", "--resume", "-o", tmp_path / "none")
    assert (folder / "run.yaml").read_text(encoding="utf-8") == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "there is no data: give --data DIR"),
        (("distill", "--data", "x"), "there is no teacher: give --teacher"),
        (("distill", "--data", "x", "--teacher", "no/teacher"), "there is no checkpoint no/teacher"),
        (("distill", "--data", "x", "--teacher", "t", "--set", "losses={}"), "there are no losses: give --method"),
        (("distill", "--data", "x", "--teacher", "t", "--method", ""), "names are joined by +, and one is empty"),
        (("train", "--data", "x", "--set", "losses.bmfi={}"), "the configuration has losses: use kdkernels distill"),
        (("train", "--data", "no/data"), "no KITTI data in no/data"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in _refused(*arguments, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backbone", "vgg"), "backbone is 'vgg', should be one of"),
        (("--set", "losses.bmfi.mask=round"), "loss 'bmfi': mask"),
        (("--set", "losses.gkd.normalize=softmax"), "loss 'gkd' cannot run inside the backward pass: normalize="),
        (("--set", "losses.gkd.grad_mode=second_order"), "needs a graph of the student's gradients; give --mode explicit"),
        (("--precision", "fp16"), "fp16' needs a GPU"),
    ],
)
def test_options_that_do_not_fit_exit_with_2(arguments: tuple[str, ...], message: str, runs: Runs, tmp_path: Path) -> None:
    assert message in _refused("distill", "--data", runs.data, "--teacher", runs.teacher, *TINY, *arguments, "-o", tmp_path / "run")


def test_a_teacher_of_other_classes_is_refused(runs: Runs, tmp_path: Path) -> None:
    coco = runs.data / "renamed.json"
    kdkernels("data", "convert", runs.data, coco)
    coco.write_text(coco.read_text(encoding="utf-8").replace("Cyclist", "Rider"), encoding="utf-8")
    message = _refused("distill", "--data", coco, "--format", "coco", "--teacher", runs.teacher, *TINY, "-o", tmp_path / "run")
    assert "detects Car, Pedestrian, Cyclist, but the classes of the data are Car, Pedestrian, Rider" in message


def test_bad_data_is_reported_before_training_and_skipped_when_told(runs: Runs, tmp_path: Path) -> None:
    data = tmp_path / "road"
    shutil.copytree(runs.data, data)
    first, second = (item.name for item in load_dataset(data, "kitti", "train").items[:2])
    label, image = data / "training" / "label_2" / f"{first}.txt", data / "training" / "image_2" / f"{second}.png"
    label.write_text("Car 0 0\n", encoding="utf-8")
    image.write_bytes(image.read_bytes()[:200])
    arguments = ("train", "--data", data, *TINY, "-o", tmp_path / "run")
    message = _refused(*arguments)
    assert f"{label}:1: 3 columns, 15 wanted" in message and f"{image}: image cannot be read" in message
    assert "2 problems in the data" in message and "--skip-bad" in message
    assert not (tmp_path / "run").exists()
    result = kdkernels(*arguments, "--skip-bad")
    assert result.exit_code == 0, result.stderr
    assert "left out, because of 2 problems" in result.stderr and f"{label}:1: 3 columns, 15 wanted" in result.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert found["data"]["train_images"] + found["data"]["val_images"] == 6
    assert label.read_text(encoding="utf-8") == "Car 0 0\n"


def test_separate_validation_data_and_an_inherited_head(runs: Runs, tmp_path: Path) -> None:
    kdkernels("data", "synthetic", tmp_path / "val", "-n", "3", "--seed", "2")
    result = kdkernels(
        "distill", "--data", runs.data, "--val-data", tmp_path / "val", "--teacher", runs.teacher / "best.pt", *TINY,
        "--method", "bmfi", "--init-student", "--mode", "explicit", "-o", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert (found["data"]["train_images"], found["data"]["val_images"], found["mode"]) == (8, 3, "explicit")
    assert found["inherited"] > 0 and list(found["losses"]) == ["bmfi"]


def test_an_earlier_checkpoint_teaches_the_same_detector(runs: Runs, tmp_path: Path) -> None:
    arguments = ("distill", "--data", runs.data, *TINY, "--method", "bmfi", "--aid", "-o", tmp_path / "run")
    result = kdkernels(*arguments, "--self", runs.teacher)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert found["detector"]["backbone"] == "slim-teacher" and found["parameters"] == found["teacher"]["parameters"]
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))["teacher"] == str(runs.teacher)
    assert "--self and --teacher exclude each other" in _refused(*arguments, "--self", runs.teacher, "--teacher", runs.teacher)
    message = _refused(*arguments, "--self", runs.teacher, "--backbone", "slim-student")
    assert "the architecture of the checkpoint, not model.backbone slim-student for slim-teacher" in message
    assert "there is no checkpoint" in _refused(*arguments, "--self", tmp_path / "none")


def test_the_students_own_average_teaches_it(runs: Runs, tmp_path: Path) -> None:
    arguments = ("distill", "--data", runs.data, *TINY, "--method", "bmfi", "-o", tmp_path / "run")
    result = kdkernels(*arguments, "--self", "ema")
    assert result.exit_code == 0, result.stderr
    assert "taught by its own average with bmfi" in result.stderr
    config = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert config["teacher"] is None and config["train"]["teacher_ema"] == 0.999
    assert "teacher_updates" in torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert "there can be no other" in _refused(*arguments, "--teacher", runs.teacher, "--set", "train.teacher_ema=0.9")


def test_what_needs_distributions_is_refused_before_data_is_read(runs: Runs, tmp_path: Path) -> None:
    arguments = ("distill", "--data", "no/data", *TINY, "--method", "bmfi+ld", "-o", tmp_path / "run")
    own, message = "the student reg_max 16", _refused(*arguments, "--teacher", runs.teacher, "--aid", "--set", "model.reg_max=16")
    assert f"ld compares the distributions by which student and teacher regress boxes, and they have: {own}, {runs.teacher} none" in message
    assert "--set model.reg_max=16 to kdkernels train for the teacher and to kdkernels distill for the student" in message
    assert "they have: the student none; give" in _refused(*arguments, "--self", "ema")
    assert "no KITTI data in no/data" in _refused(*arguments, "--self", "ema", "--set", "model.reg_max=16")
    assert "with --self ema the student is its own" in _refused(*arguments, "--self", "ema", "--init-student")
    assert not (tmp_path / "run").exists()


def test_several_teachers_are_weighed(runs: Runs, tmp_path: Path) -> None:
    teachers = ("--teacher", runs.teacher, "--teacher", runs.teacher)
    arguments = ("distill", "--data", runs.data, *teachers, *TINY, "-o", tmp_path / "run")
    result = kdkernels(*arguments, "--method", "bmfi", "--aid", "--teacher-weights", "argmin", "--init-student")
    assert result.exit_code == 0, result.stderr
    assert f"taught by {runs.teacher} and {runs.teacher} with AID-bmfi (inline)" in result.stderr
    assert all(f"teacher {number}, " in result.stdout for number in (1, 2))
    config = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert config["teacher"] == [str(runs.teacher)] * 2 and config["train"]["teacher_weights"] == "argmin"
    assert len(json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["teacher"]) == 2
    assert kdkernels("distill", "--resume", "-o", tmp_path / "run").exit_code == 0
    message = _refused("distill", "--data", runs.data, *teachers, *TINY, "-o", tmp_path / "other")
    assert "losses ['gkd'] need the student's gradient" in message and "give --mode explicit" in message


def test_training_that_fails_exits_with_1(runs: Runs, tmp_path: Path) -> None:
    result = kdkernels(
        "train", "--data", runs.data, *TINY, "--lr", "1e38", "--set", "train.steps=12", "--set", "train.nonfinite_patience=1",
        "--set", "train.clip_norm=0", "--set", "train.weight_decay=1e9", "-o", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "training stopped at step" in result.stderr


def test_ctrl_c_saves_the_checkpoint_exits_with_130_and_resume_goes_on(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "kdkernels", "distill"]
    arguments = ["--data", runs.data, "--teacher", runs.teacher, "--steps", "40", "--batch-size", "1", "--device", "cpu", "-o", folder]
    process = subprocess.Popen([*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopped: interrupted at step" in errors
    step = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["step"]
    assert 2 <= step < 40 and log.read_text(encoding="utf-8").count("\n") == step

    result = kdkernels("distill", "--resume", "-o", folder)
    assert result.exit_code == 0, result.stderr
    assert f"resumed at step {step} of 40" in result.stderr
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, 41))


def _refused(*arguments: str | Path) -> str:
    """What a command that exits with 2 says."""
    result = kdkernels(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr)
    return result.stderr
