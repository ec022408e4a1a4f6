"""Whole runs with a teacher."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_support import SPEC, same_state, student, tiny_dataset

from kdkernels import AIDLoss, BMFILoss, GKDLoss, Teacher
from kdkernels.data import DetectionDataset
from kdkernels.losses import DistillationLoss
from kdkernels.models import DetectorSpec, build_detector
from kdkernels.training import TrainConfig, TrainingDiverged, TrainingInterrupted, TrainResult, train

TEACHER = DetectorSpec(backbone="slim-student", num_classes=4, min_size=64, max_size=96, neck_channels=32)


@pytest.fixture
def data(tmp_path: Path) -> DetectionDataset:
    return tiny_dataset(tmp_path / "data", 6)


def run(
    data: DetectionDataset, losses: dict[str, DistillationLoss] | None, teacher: nn.Module | Teacher | None = None, **options: Any
) -> tuple[nn.Module, TrainResult]:
    model = student()
    progress = options.pop("progress", None)
    config = TrainConfig(**{"batch_size": 2, "warmup_steps": 2, "steps": 3, "device": "cpu", **options})
    teacher = teacher or student(1, TEACHER)
    return model, train(model, SPEC, data, None, config, teacher, losses, console=False, progress=progress)


def both() -> dict[str, DistillationLoss]:
    return {"gkd": GKDLoss(weight=0.1), "bmfi": BMFILoss(lambda_=0.1)}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["inline", "explicit"])
def test_every_term_is_recorded(tmp_path: Path, data: DetectionDataset, mode: str) -> None:
    folder = tmp_path / "run"
    model, result = run(data, both(), run_dir=str(folder), mode=mode)
    for record in records(folder):
        for key in ("kd/gkd", "kd/bmfi", "kd/bmfi/region", "kd/bmfi/attention", "kd/bmfi/whole"):
            assert record[key] > 0, key
        terms = sum(v for k, v in record.items() if k.startswith("kd/bmfi/"))
        assert record["kd/bmfi"] == pytest.approx(terms, rel=1e-4)
        assert record["kd"] == pytest.approx(record["kd/gkd"] + record["kd/bmfi"])
        assert record["kd_ratio"] == pytest.approx(record["kd"] / record["loss"])
    line = (folder / "train.log").read_text().splitlines()[-1]
    assert "gkd " in line and "bmfi " in line and "bmfi/region" not in line
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert any(v.numel() for v in last["distiller"]["trainable"]["adapter"].values())
    build_detector(SPEC).load_state_dict(last["model"], strict=True)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert result.history[-1]["kd/gkd"] > 0


def test_weight_zero_is_the_run_without_a_teacher(data: DetectionDataset) -> None:
    plain, a = run(data, None)
    weightless, b = run(data, {"bmfi": BMFILoss(weight=0.0)}, student(1))
    assert same_state(plain.state_dict(), weightless.state_dict()) == []
    assert (a.initial_weights, a.data_order) == (b.initial_weights, b.data_order)
    taught, c = run(data, {"bmfi": BMFILoss(weight=1.0, lambda_=0.1)}, student(1))
    assert same_state(plain.state_dict(), taught.state_dict()) != []
    assert (a.initial_weights, a.data_order) == (c.initial_weights, c.data_order)


def test_distillation_pulls_the_features_to_the_teachers(data: DetectionDataset) -> None:
    _, result = run(data, {"bmfi": BMFILoss(alpha=0.0, gamma=0.0, lambda_=1.0)}, steps=24, augment=False)
    assert result.history[-1]["kd/bmfi"] < 0.7 * result.history[0]["kd/bmfi"]


def test_adapters_are_trained_and_resumed(tmp_path: Path, data: DetectionDataset) -> None:
    whole, expected = run(data, both(), run_dir=str(tmp_path / "whole"), steps=5)
    folder = str(tmp_path / "parts")

    def stop(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        run(data, both(), run_dir=folder, steps=5, progress=stop)
    model, result = run(data, both(), run_dir=folder, steps=5, resume=True)
    assert same_state(whole.state_dict(), model.state_dict()) == []
    states = [torch.load(tmp_path / d / "checkpoints" / "last.pt", weights_only=True)["distiller"] for d in ("whole", "parts")]
    adapters = [s["trainable"]["adapter"] for s in states]
    assert adapters[0] and same_state(*adapters) == []
    assert torch.equal(states[0]["teacher_random_state"]["cpu"], states[1]["teacher_random_state"]["cpu"])
    run(data, both(), run_dir=str(tmp_path / "short"), steps=1)
    first = torch.load(tmp_path / "short" / "checkpoints" / "last.pt", weights_only=True)["distiller"]["trainable"]["adapter"]
    assert same_state(first, adapters[0]) != []
    assert result.data_order == expected.data_order


def test_the_students_average_teaches_it_and_is_resumed(tmp_path: Path, data: DetectionDataset) -> None:
    def taught(folder: str, resume: bool = False, progress: Any = None) -> nn.Module:
        model = student()
        options: dict[str, Any] = {"batch_size": 2, "warmup_steps": 2, "steps": 5, "device": "cpu", "teacher_ema": 0.7}
        config = TrainConfig(run_dir=str(tmp_path / folder), resume=resume, **options)
        train(model, SPEC, data, None, config, None, both(), console=False, progress=progress)
        return model

    def stop(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = taught("whole")
    with pytest.raises(TrainingInterrupted):
        taught("parts", progress=stop)
    states = {name: torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "parts")}
    assert states["parts"]["teacher_updates"] == states["parts"]["step"] < 5 == states["whole"]["teacher_updates"]
    assert same_state(states["whole"]["teacher_ema"], states["parts"]["teacher_ema"]) != []
    assert same_state(states["whole"]["teacher_ema"], states["whole"]["model"]) != []
    assert same_state(whole.state_dict(), taught("parts", resume=True).state_dict()) == []
    assert all(record["kd/bmfi"] > 0 for record in records(tmp_path / "parts"))
    with pytest.raises(ValueError, match="there can be no other"):
        run(data, both(), teacher_ema=0.9)
    with pytest.raises(ValueError, match="needs losses by which the average teaches"):
        train(student(), SPEC, data, None, TrainConfig(steps=1, device="cpu", teacher_ema=0.9), console=False)


def test_the_teacher_stays_as_it_was(data: DetectionDataset) -> None:
    teacher = student(1, TEACHER)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    _, result = run(data, both(), Teacher(teacher), init_student=True)
    assert same_state(before, teacher.state_dict()) == [] and result.inherited > 0


def test_schedule_of_the_weight(tmp_path: Path, data: DetectionDataset) -> None:
    run(data, {"bmfi": BMFILoss(lambda_=0.1)}, run_dir=str(tmp_path / "run"), kd_warmup_steps=2, kd_schedule="linear", steps=4)
    factors = [r["kd"] / r["kd/bmfi"] for r in records(tmp_path / "run")]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.0])


def test_aid_in_bf16_with_accumulation(tmp_path: Path, data: DetectionDataset) -> None:
    losses = {"aid": AIDLoss(BMFILoss(lambda_=0.1)), "gkd": GKDLoss(weight=0.1)}
    run(data, losses, run_dir=str(tmp_path / "run"), mixed_precision="bf16", accumulation=2, batch_size=1)
    plain = {"aid": BMFILoss(lambda_=0.1), "gkd": GKDLoss(weight=0.1)}
    run(data, plain, run_dir=str(tmp_path / "plain"), mixed_precision="bf16", accumulation=2, batch_size=1)
    weighted, full = records(tmp_path / "run")[0], records(tmp_path / "plain")[0]
    assert 0 < weighted["kd/aid"] < full["kd/aid"] and weighted["kd/gkd"] == pytest.approx(full["kd/gkd"])


def test_divergence_names_the_distillation_term(data: DetectionDataset) -> None:
    with pytest.raises(TrainingDiverged, match="kd/bmfi.*NonFinite.*term='attention'"):
        run(data, {"bmfi": BMFILoss(gamma=3e38, alpha=0.0)}, steps=9, nonfinite_patience=2)


def test_losses_need_a_teacher(data: DetectionDataset) -> None:
    with pytest.raises(ValueError, match="without a teacher"):
        train(student(), SPEC, data, None, TrainConfig(steps=1, device="cpu"), None, both(), console=False)
