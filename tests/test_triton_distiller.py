"""The Distiller on the Triton kernels, in a small FCOS: every parameter's gradient and every value against the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from triton_support import DEVICES, relative_error

from kdkernels import BMFILoss, Distiller, GKDLoss, set_backend
from kdkernels.distiller import MODES
from kdkernels.models import DetectorSpec, build_detector

pytestmark = pytest.mark.parametrize("device", DEVICES)
SPEC = DetectorSpec("fcos", "slim-student", min_size=64, max_size=64, neck_channels=32, head_convs=1, levels=3)
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


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


def step(backend: str, device: str, mode: str, train: Callable[[Distiller], dict[str, Tensor]]) -> Step:
    set_backend(backend)
    student = detector(0, device)
    distiller = Distiller(student, detector(1, device), losses(), mode=mode)
    found = train(distiller)
    assert not distiller.check()
    values = {name: value.detach().clone() for name, value in distiller.last_values().items()}
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return Step(gradients, values, {name: value.detach() for name, value in found.items() if name.startswith("kd_")})


def largest_error(device: str, mode: str, train: Callable[[Distiller], dict[str, Tensor]]) -> float:
    """Of gradients, last values and losses. A parameter's gradient that is next to none is held against the whole one."""
    got, want = (step(backend, device, mode, train) for backend in ("triton", "reference"))
    assert all(a.keys() == b.keys() and len(b) for a, b in zip(got, want, strict=True))
    whole = torch.stack([g.norm() for g in want.gradients.values()]).norm()
    errors = [float((got.gradients[name] - g).norm() / g.norm().clamp(min=1e-2 * whole)) for name, g in want.gradients.items()]
    for name in ("values", "handles"):
        errors += [relative_error(value, getattr(want, name)[key]) for key, value in getattr(got, name).items()]
    return max(errors)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_and_values_are_those_of_the_reference(device: str, mode: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        found = distiller(*batch(device))
        total(found).backward()
        return found

    assert largest_error(device, mode, train) < TOLERANCE


def test_inline_is_explicit_under_a_loss_scale(device: str) -> None:
    def train(scale: float) -> Callable[[Distiller], dict[str, Tensor]]:
        def scaled(distiller: Distiller) -> dict[str, Tensor]:
            found = distiller(*batch(device))
            (total(found) * scale).backward()
            return found

        return scaled

    assert largest_error(device, "inline", train(65536.0)) < TOLERANCE
    inline, explicit = step("triton", device, "inline", train(65536.0)), step("triton", device, "explicit", train(1.0))
    whole = torch.stack([g.norm() for g in explicit.gradients.values()]).norm()
    for name, g in explicit.gradients.items():
        assert (inline.gradients[name] / 65536 - g).norm() < TOLERANCE * g.norm() + 1e-6 * whole, name
    assert all(relative_error(value, explicit.values[name]) < TOLERANCE for name, value in inline.values.items())


@pytest.mark.parametrize("mode", MODES)
def test_two_accumulated_backward_passes(device: str, mode: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        for seed in (0, 1):
            found = distiller(*batch(device, seed))
            (total(found) / 2).backward()
        return found

    assert largest_error(device, mode, train) < TOLERANCE


def test_a_loss_that_no_backward_pass_reaches_is_skipped(device: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        found = distiller(*batch(device))
        total({name: value for name, value in found.items() if name != "kd_gkd"}).backward()
        assert "kd_gkd" not in distiller.last_values() and "kd_bmfi" in distiller.last_values()
        return found

    assert largest_error(device, "inline", train) < TOLERANCE


def test_levels_that_no_gradient_reaches(device: str) -> None:
    """Only BMFI counts: nothing of the detector's own arrives at the tap, of which GKD makes 0 and BMFI its whole gradient."""

    def train(distiller: Distiller) -> dict[str, Tensor]:
        found = distiller(*batch(device))
        total({name: value for name, value in found.items() if name.startswith("kd_")}).backward()
        assert distiller.last_values()["kd_gkd"].item() == 0.0 and distiller.last_values()["kd_bmfi"].item() > 0
        return found

    assert largest_error(device, "inline", train) < TOLERANCE


def test_frozen_features_are_served_explicitly(device: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        distiller.student.backbone.requires_grad_(False)
        with pytest.warns(UserWarning, match="need no gradient"):
            found = distiller(*batch(device))
        total(found).backward()
        return found

    assert largest_error(device, "inline", train) < TOLERANCE
