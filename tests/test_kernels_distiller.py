"""The Distiller on fused kernels, in a small FCOS: every parameter's gradient and every value against the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_kernels import on_all_kernels
from distiller_support import TOLERANCE, Train, batch, largest_error, step, total
from levels import relative_error
from torch import Tensor

from kdkernels import Distiller, set_backend
from kdkernels.distiller import MODES

pytestmark = on_all_kernels


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_and_values_are_those_of_the_reference(backend: str, device: str, mode: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        found = distiller(*batch(device))
        total(found).backward()
        return found

    assert largest_error(backend, device, mode, train) < TOLERANCE


def test_inline_is_explicit_under_a_loss_scale(backend: str, device: str) -> None:
    def train(scale: float) -> Train:
        def scaled(distiller: Distiller) -> dict[str, Tensor]:
            found = distiller(*batch(device))
            (total(found) * scale).backward()
            return found

        return scaled

    assert largest_error(backend, device, "inline", train(65536.0)) < TOLERANCE
    inline, explicit = step(backend, device, "inline", train(65536.0)), step(backend, device, "explicit", train(1.0))
    whole = torch.stack([g.norm() for g in explicit.gradients.values()]).norm()
    for name, g in explicit.gradients.items():
        assert (inline.gradients[name] / 65536 - g).norm() < TOLERANCE * g.norm() + 1e-6 * whole, name
    assert all(relative_error(value, explicit.values[name]) < TOLERANCE for name, value in inline.values.items())


@pytest.mark.parametrize("mode", MODES)
def test_two_accumulated_backward_passes(backend: str, device: str, mode: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        for seed in (0, 1):
            found = distiller(*batch(device, seed))
            (total(found) / 2).backward()
        return found

    assert largest_error(backend, device, mode, train) < TOLERANCE


def test_a_loss_that_no_backward_pass_reaches_is_skipped(backend: str, device: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        found = distiller(*batch(device))
        total({name: value for name, value in found.items() if name != "kd_gkd"}).backward()
        assert "kd_gkd" not in distiller.last_values() and "kd_bmfi" in distiller.last_values()
        return found

    assert largest_error(backend, device, "inline", train) < TOLERANCE


def test_levels_that_no_gradient_reaches(backend: str, device: str) -> None:
    """Only BMFI counts: nothing of the detector's own arrives at the tap, of which GKD makes 0 and BMFI its whole gradient."""

    def train(distiller: Distiller) -> dict[str, Tensor]:
        found = distiller(*batch(device))
        total({name: value for name, value in found.items() if name.startswith("kd_")}).backward()
        assert distiller.last_values()["kd_gkd"].item() == 0.0 and distiller.last_values()["kd_bmfi"].item() > 0
        return found

    assert largest_error(backend, device, "inline", train) < TOLERANCE


def test_frozen_features_are_served_explicitly(backend: str, device: str) -> None:
    def train(distiller: Distiller) -> dict[str, Tensor]:
        distiller.student.backbone.requires_grad_(False)
        with pytest.warns(UserWarning, match="need no gradient"):
            found = distiller(*batch(device))
        total(found).backward()
        return found

    assert largest_error(backend, device, "inline", train) < TOLERANCE
