"""Losses with parts that train: where they live, how they are resumed and wrapped, and what their gradient must not enter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectors import batch, detector
from head_support import OnOutputs, Trained
from torch.nn.parallel import DistributedDataParallel

from kdkernels import AIDLoss, Distiller, GKDLoss

RANKS = 2


def test_trained_parts_are_in_trainable_and_learn() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1, channels=32)
    bare, loss = copy.deepcopy(student), Trained()
    distiller = Distiller(student, teacher, {"own": loss, "aid": AIDLoss(Trained(seed=1)), "gkd": GKDLoss()})
    torch.manual_seed(5)
    distiller.build(*batch())
    assert sorted(distiller.trainable) == ["loss_aid", "loss_own"] and distiller.trainable["loss_own"] is loss.trainable
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in bare.state_dict().items())
    expected = bare(*batch())
    state = torch.get_rng_state()
    torch.manual_seed(5)
    found = distiller(*batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    (found["kd_own"] + found["kd_aid"]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in distiller.trainable.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())
    assert all(p.grad is None for p in student.head.parameters())


def test_the_first_call_makes_them_as_build_does() -> None:
    built = Distiller(detector("fcos", 0), detector("fcos", 1), {"own": Trained()}).build(*batch())
    called = Distiller(detector("fcos", 0), detector("fcos", 1), {"own": Trained()})
    assert not called.trainable
    called(*batch())
    ours, theirs = (dict(d.trainable.named_parameters()) for d in (built, called))
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    made = Trained()
    made.trainable = copy.deepcopy(built.trainable["loss_own"])
    assert list(Distiller(detector("fcos", 0), detector("fcos", 1), {"own": made}).trainable) == ["loss_own"]


def test_their_gradient_does_not_enter_the_students() -> None:
    values = []
    for losses in ({"gkd": GKDLoss()}, {"gkd": GKDLoss(), "own": Trained()}):
        distiller = Distiller(detector("fcos", 0), detector("fcos", 1), losses)
        sum(distiller(*batch()).values()).backward()
        values.append(distiller.last_values()["kd_gkd"])
    assert torch.equal(*values)


def test_resume_continues_as_if_not_interrupted() -> None:
    losses = lambda: {"own": Trained(seed=3), "gkd": GKDLoss()}  # noqa: E731
    distiller = Distiller(detector("fcos", 0), detector("fcos", 1), losses()).build(*batch())
    optimizer = torch.optim.SGD(distiller.trainable.parameters(), lr=0.1)
    distiller(*batch())["kd_own"].backward()
    optimizer.step()
    state = copy.deepcopy(distiller.state_dict())
    resumed = Distiller(detector("fcos", 0), detector("fcos", 1), losses())
    with pytest.raises(ValueError, match=r"expected \[\], got \['loss_own'\]; call build\(images, targets\) first"):
        resumed.load_state_dict(state)
    resumed.build(*batch()).load_state_dict(state)
    fresh = Distiller(detector("fcos", 0), detector("fcos", 1), losses())
    want, got, other = (d(*batch(seed=1))["kd_own"] for d in (distiller, resumed, fresh))
    assert torch.equal(want, got) and not torch.equal(want, other)


def test_inline_refuses_those_that_need_the_students_gradients() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    with pytest.raises(ValueError, match=r"'own' cannot run inside the backward pass: it has parts that train.*mode='explicit'"):
        Distiller(student, teacher, {"own": Trained(gradients=True)})
    distiller = Distiller(student, teacher, {"own": Trained(gradients=True), "gkd": GKDLoss()}, mode="explicit")
    found = distiller(*batch())
    found["kd_own"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.trainable.parameters())
    assert found["kd_own"] > 0


def test_parts_of_two_losses_are_their_own() -> None:
    loss = Trained()
    with pytest.raises(ValueError, match="'aid' shares its trained parts"):
        Distiller(detector("fcos", 0), detector("fcos", 1), {"own": loss, "aid": AIDLoss(loss)})


def train(rank: int, folder: str, family: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        student, teacher = detector(family, 0), detector(family, 1)
        losses = {"own": AIDLoss(Trained()), "on": OnOutputs(), "crossed": OnOutputs(crosses=True)}
        distiller = Distiller(DistributedDataParallel(student), teacher, losses)
        distiller.build(*batch(seed=rank)).prepare()
        wrapped = distiller.trainable["loss_own"]
        same = isinstance(wrapped, DistributedDataParallel) and losses["own"].base.trainable is wrapped
        parameters = [*student.parameters(), *distiller.trainable.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=1e-4)
        for step in range(5):
            torch.manual_seed(100 * rank + step)
            optimizer.zero_grad()
            sum(distiller(*batch(seed=RANKS * step + rank)).values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        parts = distiller.state_dict()["trainable"]["loss_own"]
        torch.save({"parts": parts, "student": student.state_dict(), "same": same}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", ["fcos", "fasterrcnn"])
def test_two_processes(tmp_path: Path, family: str) -> None:
    mp.spawn(train, args=(str(tmp_path), family), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert first["same"] and second["same"]
    for part in ("parts", "student"):
        assert first[part].keys() == second[part].keys() and first[part]
        for name, value in first[part].items():
            assert value.isfinite().all() and torch.equal(value, second[part][name]), (part, name)
