"""Every method of the catalogue, alone and inside AID, trains a small one-stage and a small two-stage detector for a step."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdkernels import AIDLoss, Distiller, FitNetsLoss, Teacher
from kdkernels.losses.base import DistillationLoss
from kdkernels.losses.catalogue import METHODS, make_loss
from kdkernels.models import DetectorSpec, build_detector

DETECTORS = {"fcos": "one-stage", "fasterrcnn": "two-stage"}
#: Those whose gradient reaches the head's own parameters too. Not that of CrossKD where the head has a single convolution, which is then
#: the teacher's, and not that of GID where no anchor overlaps an instance enough, as hardly ever one of FCOS's cells does.
HEADS = {"frs", "ld", "crosskd", "gid"}
NOT_THE_HEAD = {("crosskd", "fasterrcnn"), ("gid", "fcos")}


@cache
def state(kind: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_detector(spec(kind)).state_dict()


def spec(kind: str) -> DetectorSpec:
    return DetectorSpec(kind, "slim-student", min_size=64, max_size=64, neck_channels=32, head_convs=2, levels=3, reg_max=7)


def detector(kind: str, seed: int) -> nn.Module:
    model = build_detector(spec(kind))
    model.load_state_dict(state(kind, seed))
    return model.train()


@cache
def teacher(kind: str) -> Teacher:
    return Teacher(detector(kind, 1))


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    boxes = [[[4.0, 6.0, 40.0, 44.0], [30.0, 20.0, 60.0, 62.0]], [[10.0, 12.0, 52.0, 40.0]]]
    targets = [{"boxes": torch.tensor(b), "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes]
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(2)], targets


def loss_of(name: str, kind: str) -> DistillationLoss:
    method, made = METHODS[name]
    options: dict[str, Any] = {"base": FitNetsLoss()} if method.wraps else {}
    if "preset" not in method.options and DETECTORS[kind] in made.PRESETS:
        options["preset"] = DETECTORS[kind]
    return make_loss(name, options)


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step(name: str, kind: str) -> None:
    student = detector(kind, 0)
    losses = {"alone": loss_of(name, kind), "aid": AIDLoss(loss_of(name, kind), granularity="image")}
    # Inline, the student's gradient passes by with the detector's own losses only: here each is looked at without these.
    mode = "explicit" if "student_gradients" in losses["alone"].needs else "inline"
    distiller = Distiller(student, teacher(kind), losses, mode=mode).build(*batch())
    parameters = [*student.parameters(), *distiller.trainable.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    found = distiller(*batch())
    for loss in losses:
        optimizer.zero_grad()
        found["kd_" + loss].backward(retain_graph=True)
        reached = {part for part, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert any(part.startswith("backbone.body") for part in reached)
        assert any(".head." in "." + part for part in reached) == (name in HEADS and (name, kind) not in NOT_THE_HEAD)
        trained = [p.grad for part, module in distiller.trainable.items() if part == "loss_" + loss for p in module.parameters()]
        assert not trained or any(g is not None and g.abs().max() > 0 for g in trained)
        value = distiller.last_values()["kd_" + loss]
        assert value.isfinite() and (value > 0 or name == "pad")
    assert not distiller.check()

    optimizer.zero_grad()
    torch.stack(list(found.values())).sum().backward()
    optimizer.step()
    before = state(kind, 0)
    moved = [part for part, p in student.named_parameters() if not torch.equal(p, before[part])]
    assert len(moved) > len(before) // 4 and all(p.isfinite().all() for p in parameters)
    distiller.close()
