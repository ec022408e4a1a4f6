"""Distillation in two real processes under DistributedDataParallel, without find_unused_parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectors import batch, detector
from torch.nn.parallel import DistributedDataParallel

from kdkernels import BMFILoss, Distiller, GKDLoss

RANKS = 2


def train(rank: int, folder: str, family: str, mode: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{mode}", rank=rank, world_size=RANKS)
    try:
        student = detector(family, 0, channels=64)
        teacher = detector(family, 1, channels=32)
        wrapped = DistributedDataParallel(student)
        losses = {"gkd": GKDLoss(weight=2.0), "bmfi": BMFILoss(lambda_=0.01)}
        distiller = Distiller(wrapped, teacher, losses, mode=mode)
        distiller.build(*batch(seed=rank)).prepare()
        parameters = [*wrapped.parameters(), *distiller.trainable.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=1e-4)
        first = {}
        for step in range(steps):
            torch.manual_seed(100 * rank + step)
            optimizer.zero_grad()
            sum(distiller(*batch(seed=RANKS * step + rank)).values()).backward()
            if step == 0:
                first = {name: p.grad.clone() for name, p in student.named_parameters()}
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        adapter = distiller.state_dict()["trainable"]["adapter"]
        torch.save({"first": first, "adapter": adapter, "student": student.state_dict()}, f"{folder}/{mode}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(folder: Path, family: str, mode: str, steps: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    mp.spawn(train, args=(str(folder), family, mode, steps), nprocs=RANKS)
    return [torch.load(folder / f"{mode}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("family", ["fcos", "fasterrcnn"])
def test_two_processes(tmp_path: Path, family: str) -> None:
    inline = run(tmp_path, family, "inline", 5)
    # Ranks see different images; that they agree afterwards is the all-reduce of student and adapter.
    for part in ("first", "student", "adapter"):
        assert inline[0][part].keys() == inline[1][part].keys() and inline[0][part]
        for name, value in inline[0][part].items():
            assert value.isfinite().all() and torch.equal(value, inline[1][part][name]), (part, name)

    explicit = run(tmp_path, family, "explicit", 1)[0]["first"]
    whole = torch.stack([g.norm() for g in explicit.values()]).norm()
    for name, g in explicit.items():
        assert (inline[0]["first"][name] - g).norm() <= 1e-5 * g.norm() + 1e-6 * whole, name
