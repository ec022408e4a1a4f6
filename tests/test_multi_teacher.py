"""Several teachers: each loss is the sum over them of its value times their shares, and so are the gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectors import batch, detector
from torch import Tensor, nn

from kdkernels import AIDLoss, BMFILoss, Distiller, GKDLoss, MultiTeacherDistiller
from kdkernels.losses import DistillationLoss, MGDLoss
from kdkernels.losses.aid import TeacherShare, teacher_shares


def losses() -> dict[str, DistillationLoss]:
    return {"aid": AIDLoss(BMFILoss(lambda_=0.1)), "gkd": GKDLoss(), "mgd": MGDLoss()}


def gradients(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.stack(list(found.values())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def teacher_losses(student: nn.Module, teacher: nn.Module) -> Tensor:
    """D_n, (1, N), as a Distiller hands it to a loss."""
    seen: list[Tensor] = []

    class Spy(TeacherShare):
        def factor(self, features: Any, given: Any) -> Tensor:
            seen.append(given)
            return torch.ones(())

    distiller = Distiller(copy.deepcopy(student), teacher, {"spy": Spy(BMFILoss(), lambda: torch.ones(()))})
    distiller(*batch())
    distiller.close()
    return seen[0]


@pytest.mark.parametrize("weights", ["softmax", "argmin", "none"])
def test_values_and_gradients_are_the_sum_over_the_teachers(weights: str) -> None:
    student, teachers = detector("fcos", 0), [detector("fcos", 1), detector("fcos", 2)]
    own = [teacher_losses(student, teacher) for teacher in teachers]
    shares = [torch.ones(())] * 2 if weights == "none" else teacher_shares(own, weights)
    bare = copy.deepcopy(student)
    task = gradients(bare, bare(*batch()))
    expected = {name: -g for name, g in task.items()}
    values: dict[str, Tensor] = {}
    for teacher, share in zip(teachers, shares, strict=True):
        one = copy.deepcopy(student)
        weighed: dict[str, Any] = {name: TeacherShare(loss, lambda share=share: share) for name, loss in losses().items()}
        distiller = Distiller(one, teacher, weighed, mode="explicit")
        for name, g in gradients(one, distiller(*batch())).items():
            expected[name] = expected[name] + g
        for name, value in distiller.last_values().items():
            values[name] = values.get(name, 0) + value
        distiller.close()

    several = MultiTeacherDistiller(student, teachers, losses(), weights, mode="explicit")
    found = several(*batch())
    assert [name for name in found if name.startswith("kd_")] == ["kd_aid", "kd_gkd", "kd_mgd"]
    got = gradients(student, found)
    for name, value in several.last_values().items():
        torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-7)
    for name in ("kd_aid", "kd_gkd", "kd_mgd"):
        torch.testing.assert_close(found[name].detach(), values[name], rtol=1e-5, atol=1e-7)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert got.keys() == expected.keys()
    assert all(float((got[name] - g).norm()) <= 1e-4 * float(g.norm()) + 1e-5 * float(whole) for name, g in expected.items())
    several.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for model in (student, *teachers) for module in model.modules())


def test_every_teacher_has_trained_parts_of_its_own_and_all_are_resumed() -> None:
    def made(student: nn.Module) -> MultiTeacherDistiller:
        teachers = [detector("fcos", 1), detector("fcos", 2, channels=96)]
        return MultiTeacherDistiller(student, teachers, {"mgd": MGDLoss(), "bmfi": BMFILoss()}).build(*batch())

    student = detector("fcos", 0)
    first, second = made(student), made(copy.deepcopy(student))
    names = [name for name, _ in first.trainable.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"teacher0", "teacher1"}
    torch.stack(list(first(*batch()).values())).sum().backward()
    assert all(p.grad is not None for p in first.trainable.parameters())
    with torch.no_grad():
        for p in first.trainable.parameters():
            p.add_(1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(first.trainable.parameters(), second.trainable.parameters(), strict=True))
    first.teacher.load_state_dict(second.teacher.state_dict())
    assert first.check() == []


def test_what_cannot_work_is_refused() -> None:
    student, teachers = detector("fcos", 0), [detector("fcos", 1), detector("fcos", 2)]
    with pytest.raises(ValueError, match=r"\['gkd'\] need the student's gradient.*mode='explicit'"):
        MultiTeacherDistiller(student, teachers, {"gkd": GKDLoss()})
    with pytest.raises(ValueError, match="expected two or more, got 1"):
        MultiTeacherDistiller(student, teachers[:1], {"bmfi": BMFILoss()})
    with pytest.raises(ValueError, match="teacher_weights"):
        MultiTeacherDistiller(student, teachers, {"bmfi": BMFILoss()}, "mean")
