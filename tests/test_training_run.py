"""Whole runs without distillation: files, resume, precision, what happens when things go wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_support import CLASSES, SPEC, same_state, student, tiny_dataset

from kdkernels.data import DetectionDataset
from kdkernels.models import DetectorSpec, build_detector, load_detector
from kdkernels.training import TrainConfig, TrainingDiverged, TrainingInterrupted, TrainResult, load_config, train

QUICK: dict[str, Any] = {"batch_size": 2, "warmup_steps": 2, "device": "cpu"}


@pytest.fixture
def data(tmp_path: Path) -> DetectionDataset:
    return tiny_dataset(tmp_path / "data", 6)


def run(data: DetectionDataset, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, TrainResult]:
    model = model or student()
    arguments = {k: options.pop(k) for k in ("val", "evaluate", "progress", "spec") if k in options}
    config = TrainConfig(**{**QUICK, **options})
    result = train(model, arguments.pop("spec", SPEC), data, arguments.pop("val", None), config, console=False, **arguments)
    return model, result


def figures(value: float) -> dict[str, float]:
    return {"bbox/AP": value, "bbox/AP50": 2 * value}


def test_a_run_and_its_files(tmp_path: Path, data: DetectionDataset) -> None:
    folder = tmp_path / "run"
    ticks: list[tuple[int, int]] = []
    model, result = run(data, val=data, epochs=2, run_dir=str(folder), progress=lambda *tick: ticks.append(tick))
    assert result.steps == 6 and ticks == [(i, 6) for i in range(1, 7)]
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == {
        "config.yaml", "model.json", "metrics.jsonl", "train.log", "best.pt", "checkpoints/last.pt",
    }  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and [r["epoch"] for r in records] == [1, 1, 1, 2, 2, 2]
    parts = {"loss/classification", "loss/bbox_regression", "loss/bbox_ctrness"}
    for r in records:
        assert parts | {"loss", "grad_norm", "lr", "step_ms", "data_ms", "memory_mib"} <= r.keys() and "kd" not in r
        assert r["loss"] == pytest.approx(sum(r[p] for p in parts)) and r["step_ms"] > 0 and r["memory_mib"] > 10
    assert [r["lr"] for r in records[:2]] == [1e-3, 2e-3]
    lines = (folder / "train.log").read_text().splitlines()
    assert len(lines) == 2 and "epoch 2/2" in lines[1] and "AP " in lines[1] and "AP " not in lines[0]
    assert load_config(folder / "config.yaml").epochs == 2

    strict = build_detector(SPEC)
    strict.load_state_dict(torch.load(folder / "best.pt", weights_only=True), strict=True)
    assert same_state(strict.state_dict(), model.state_dict()) == []
    assert load_detector(folder)[2] == CLASSES
    assert result.map == result.best_map == result.history[1]["bbox/AP"] and len(result.history) == 2
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.learning_rate == 2e-3 and result.train_seconds > 0 and result.step_ms > 0


def test_training_learns_the_tiny_set(data: DetectionDataset) -> None:
    _, result = run(data, steps=30, augment=False)
    losses = [e["loss"] for e in result.history]
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0]


def test_same_seed_same_weights_and_hashes(data: DetectionDataset) -> None:
    first, a = run(data, steps=3)
    second, b = run(data, steps=3)
    _, c = run(data, steps=3, seed=1)
    assert same_state(first.state_dict(), second.state_dict()) == []
    assert (a.initial_weights, a.data_order) == (b.initial_weights, b.data_order)
    assert a.initial_weights == c.initial_weights and a.data_order != c.data_order


class StopAt:
    """Sends Ctrl-C to this process when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, done: int, total: int) -> None:
        if done == self.step:
            os.kill(os.getpid(), signal.SIGINT)


AVERAGED: dict[str, Any] = {"optimizer": "sgd", "ema_decay": 0.9, "accumulation": 2, "batch_size": 1}
FASTER = DetectorSpec("fasterrcnn", num_classes=4, min_size=64, max_size=96)  # draws its RoIs at random


@pytest.mark.parametrize(
    ("stop", "options"),
    [(2, {}), (3, {}), (2, AVERAGED), (3, AVERAGED), (2, {"mixed_precision": "bf16"}), (1, {"spec": FASTER, "val": None, "steps": 4})],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, data: DetectionDataset, stop: int, options: dict[str, Any]) -> None:
    common: dict[str, Any] = {"spec": SPEC, "val": data, "steps": 8, "eval_every": 1, **options}
    spec = common["spec"]
    whole, expected = run(data, student(0, spec), run_dir=str(tmp_path / "whole"), **common)
    folder = str(tmp_path / "parts")
    with pytest.raises(TrainingInterrupted, match=f"interrupted at step {stop + 1} of {common['steps']}"):
        run(data, student(0, spec), run_dir=folder, progress=StopAt(stop), **common)
    torch.rand(5)
    model, result = run(data, student(9, spec), run_dir=folder, resume=True, **common)
    assert same_state(whole.state_dict(), model.state_dict()) == []
    for name in ("map", "map50", "best_map", "initial_weights", "data_order", "steps"):
        assert getattr(result, name) == getattr(expected, name), name
    timing = {"step_ms", "data_ms", "memory_mib"}
    for a, b in zip(expected.history, result.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    records = [[json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "parts")]
    strip = [[{k: v for k, v in r.items() if k not in timing} for r in part] for part in records]
    assert strip[0] == strip[1]
    states = [torch.load(tmp_path / d / "checkpoints" / "last.pt", weights_only=True) for d in ("whole", "parts")]
    assert same_state(states[0]["model"], states[1]["model"]) == []
    if common["val"] is not None:
        best = [torch.load(tmp_path / d / "best.pt", weights_only=True) for d in ("whole", "parts")]
        assert same_state(*best) == []


def test_ctrl_c_during_evaluation_loses_nothing(tmp_path: Path, data: DetectionDataset) -> None:
    def broken(model: nn.Module, dataset: DetectionDataset) -> dict[str, float]:
        raise KeyboardInterrupt

    common: dict[str, Any] = {"val": data, "steps": 6, "eval_every": 1, "run_dir": str(tmp_path / "run")}
    with pytest.raises(KeyboardInterrupt):
        run(data, evaluate=broken, **common)
    seen: list[int] = []
    _, result = run(data, student(5), evaluate=lambda m, d: seen.append(1) or figures(0.25), resume=True, **common)
    assert len(seen) == 2 and [e["step"] for e in result.history] == [3, 6]
    assert [e["bbox/AP"] for e in result.history] == [0.25, 0.25]


def test_resume_refuses_another_run(tmp_path: Path, data: DetectionDataset) -> None:
    folder = str(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(data, steps=2, run_dir=folder, resume=True)
    run(data, steps=2, run_dir=folder)
    with pytest.raises(ValueError, match="seed was 0, is 1; steps was 2, is 4"):
        run(data, steps=4, seed=1, run_dir=folder, resume=True)
    _, finished = run(data, steps=2, run_dir=folder, resume=True, eval_every=3)
    assert finished.steps == 2


def test_best_is_the_best_of_all_evaluations(tmp_path: Path, data: DetectionDataset) -> None:
    values = iter([0.1, 0.3, 0.2])
    states: list[dict[str, torch.Tensor]] = []

    def evaluate(model: nn.Module, dataset: DetectionDataset) -> dict[str, float]:
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return figures(next(values))

    _, result = run(data, val=data, epochs=3, eval_every=1, evaluate=evaluate, run_dir=str(tmp_path / "run"))
    assert (result.map, result.map50, result.best_map) == (0.2, 0.4, 0.3)
    assert same_state(torch.load(tmp_path / "run" / "best.pt", weights_only=True), states[1]) == []


def test_ema_is_what_is_evaluated_and_saved(tmp_path: Path, data: DetectionDataset) -> None:
    seen: list[nn.Module] = []
    model, _ = run(
        data, val=data, steps=3, ema_decay=0.5, evaluate=lambda m, d: seen.append(m) or figures(0.1), run_dir=str(tmp_path / "run")
    )
    assert seen[0] is not model
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert same_state(best, seen[0].state_dict()) == [] and same_state(best, model.state_dict()) != []
    loaded, _, _ = load_detector(tmp_path / "run" / "checkpoints" / "last.pt")
    assert same_state(loaded.state_dict(), best) == []


def test_accumulation_adds_up_to_the_big_batch(data: DetectionDataset) -> None:
    """Without BatchNorm statistics and with one foreground count the sum of two half batches is the whole batch."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, images: list[torch.Tensor], targets: object) -> dict[str, torch.Tensor]:
            return {"loss": torch.stack([(i.mean((1, 2)) * self.weight).sum() ** 2 for i in images]).mean()}

    options: dict[str, Any] = {"steps": 3, "optimizer": "sgd", "clip_norm": 0, "learning_rate": 0.1}
    one, a = run(data, Mean(), batch_size=6, **options)
    two, b = run(data, Mean(), batch_size=2, accumulation=3, **options)
    torch.testing.assert_close(one.weight, two.weight)
    assert a.history[0]["loss"] == pytest.approx(b.history[0]["loss"]) and a.data_order == b.data_order
    assert not torch.equal(one.weight, torch.ones(3))


class Broken(nn.Module):
    """A loss that is NaN from its third call on."""

    def __init__(self, good: int = 2, bad: int = 100) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls, self.good, self.bad = 0, good, bad

    def forward(self, images: list[torch.Tensor], targets: object) -> dict[str, torch.Tensor]:
        self.calls += 1
        broken = self.good < self.calls <= self.good + self.bad
        fine = sum(i.mean() for i in images) * self.weight.sum()
        return {"fine": fine, "broken": fine * float("nan") if broken else fine}


def test_persistent_nan_stops_and_names_the_loss(tmp_path: Path, data: DetectionDataset) -> None:
    model = Broken()
    with pytest.raises(TrainingDiverged, match="stopped at step 6: 4 steps in a row were not finite: .*loss/broken"):
        run(data, model, steps=20, nonfinite_patience=4, run_dir=str(tmp_path / "run"))
    assert bool(model.weight.isfinite().all())
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step 3: not finite: loss, loss/broken; the weights were left as they are" in log
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/broken"] == "nan" and last["step"] == 6


def test_a_passing_nan_is_survived(data: DetectionDataset) -> None:
    model, result = run(data, Broken(good=2, bad=2), steps=8, nonfinite_patience=4)
    assert result.steps == 8 and bool(model.weight.isfinite().all())


def test_bf16_and_frozen_batchnorm(data: DetectionDataset) -> None:
    model = student()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(data, model, steps=2, mixed_precision="bf16", freeze_batchnorm=True)
    bn = [k for k in before if k.startswith("backbone.body") and k.endswith(("running_mean", "running_var"))]
    assert bn and all(torch.equal(before[k], model.state_dict()[k]) for k in bn)
    assert not torch.equal(before["backbone.fpn.layer_blocks.0.1.running_mean"], model.backbone.fpn.layer_blocks[0][1].running_mean)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert "forward" not in model.__dict__  # autocast stays with the trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixed_precision": "fp16"}, "fp16.*GPU"), ({"init_student": True}, "needs a teacher"), ({"run_dir": "x", "spec": None}, "spec")],
)
def test_options_that_do_not_fit(data: DetectionDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, steps=1, **options)


def test_the_console_gets_a_line_an_epoch(data: DetectionDataset, capsys: pytest.CaptureFixture[str]) -> None:
    call: Callable[..., TrainResult] = train
    call(student(), SPEC, data, None, TrainConfig(**QUICK, epochs=2))
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[0].startswith("epoch 1/2  step 3  loss ")


def test_workers_and_inherited_weights(data: DetectionDataset) -> None:
    teacher = student(7)
    _, plain = run(data, steps=2)
    model = student()
    result = train(model, SPEC, data, None, TrainConfig(**QUICK, steps=2, init_student=True, workers=1), teacher=teacher, console=False)
    assert result.inherited > 0 and result.initial_weights != plain.initial_weights and result.data_order == plain.data_order
