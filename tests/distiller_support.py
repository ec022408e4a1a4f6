"""A training step of a small FCOS with a Distiller on fused kernels, held against the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from levels import relative_error
from torch import Tensor, nn

from kdkernels import BMFILoss, Distiller, GKDLoss, set_backend
from kdkernels.models import DetectorSpec, build_detector

SPEC = DetectorSpec("fcos", "slim-student", min_size=64, max_size=64, neck_channels=32, head_convs=1, levels=3)
TOLERANCE = 1e-4
Train = Callable[[Distiller], dict[str, Tensor]]


class Step(NamedTuple):
    """What a training step leaves: gradients by parameter, values by loss and term, and the distillation losses as the step saw them."""

    gradients: dict[str, Tensor]
    values: dict[str, Tensor]
    handles: dict[str, Tensor]


def detector(seed: int, device: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_detector(SPEC).to(device).train()


def batch(device: str, seed: int = 0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64, generator=generator).to(device) for _ in range(2)]
    boxes = [[[4.0, 6.0, 40.0, 44.0], [30.0, 20.0, 60.0, 62.0]], [[10.0 + seed, 12.0, 52.0, 40.0]]]
    return images, [
        {"boxes": torch.tensor(b, device=device), "labels": torch.ones(len(b), dtype=torch.int64, device=device)} for b in boxes
    ]


def losses() -> dict[str, Any]:
    """Weights that make each of them felt beside the detector's own losses."""
    return {"gkd": GKDLoss(weight=2.0), "bmfi": BMFILoss(alpha=1e-2, gamma=1e-2, lambda_=0.05)}


def total(found: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(found.values())).sum()


def step(backend: str, device: str, mode: str, train: Train) -> Step:
    set_backend(backend)
    student = detector(0, device)
    distiller = Distiller(student, detector(1, device), losses(), mode=mode)
    found = train(distiller)
    assert not distiller.check()
    values = {name: value.detach().clone() for name, value in distiller.last_values().items()}
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return Step(gradients, values, {name: value.detach() for name, value in found.items() if name.startswith("kd_")})


def distance(got: Step, want: Step) -> float:
    """The largest error of gradients and last values. A parameter's gradient that is next to none is held against the whole one."""
    assert all(a.keys() == b.keys() and len(b) for a, b in zip(got, want, strict=True))
    whole = torch.stack([g.norm() for g in want.gradients.values()]).norm()
    errors = [float((got.gradients[name] - g).norm() / g.norm().clamp(min=1e-2 * whole)) for name, g in want.gradients.items()]
    return max(*errors, *(relative_error(value, want.values[name]) for name, value in got.values.items()))


def largest_error(backend: str, device: str, mode: str, train: Train) -> float:
    """Of gradients, last values and losses against the reference backend."""
    got, want = (step(name, device, mode, train) for name in (backend, "reference"))
    return max(distance(got, want), *(relative_error(value, want.handles[name]) for name, value in got.handles.items()))
