"""Inline distillation gives every parameter the gradient that explicit distillation gives it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectors import FAMILIES, batch, detector
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdkernels import AIDLoss, BMFILoss, Distiller, GKDLoss


def losses() -> dict[str, Any]:
    """GKD's map needs the student's gradient, the others do not; weights that make each of them felt."""
    return {"gkd": GKDLoss(weight=2.0), "bmfi": BMFILoss(alpha=1e-2, lambda_=0.05), "aid": AIDLoss(GKDLoss(weight=0.5), alpha=0.1)}


def gradients(mode: str, student: nn.Module, teacher: nn.Module, step: Callable[[Distiller], None], **options: Any) -> dict[str, Tensor]:
    student = copy.deepcopy(student)
    distiller = Distiller(student, copy.deepcopy(teacher), losses(), mode=mode, **options)
    torch.manual_seed(7)  # Faster R-CNN samples anchors and proposals
    step(distiller)
    distiller.close()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_equal_gradients(inline: dict[str, Tensor], explicit: dict[str, Tensor], tolerance: float = 1e-5, floor: float = 1e-6) -> None:
    assert inline.keys() == explicit.keys() and inline
    whole = torch.stack([g.norm() for g in explicit.values()]).norm()
    assert whole > 0
    for name, g in explicit.items():
        error = (inline[name] - g).norm()
        assert error <= tolerance * g.norm() + floor * whole, f"{name}: error {error:.3e}, norm {g.norm():.3e}, whole {whole:.3e}"


def one_backward(distiller: Distiller, scale: float = 1.0) -> None:
    (sum(distiller(*batch()).values()) * scale).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_inline_equals_explicit(family: str) -> None:
    student, teacher = detector(family, 0), detector(family, 1)
    explicit = gradients("explicit", student, teacher, one_backward)
    assert_equal_gradients(gradients("inline", student, teacher, one_backward), explicit)

    # The comparison can fail: without distillation the gradients differ by far more than the tolerance.
    bare = copy.deepcopy(student)
    torch.manual_seed(7)
    sum(bare(*batch()).values()).backward()
    moved = {name: (p.grad - explicit[name]).norm() / explicit[name].norm().clamp(min=1e-12) for name, p in bare.named_parameters()}
    assert max(moved.values()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_under_a_loss_scale(family: str) -> None:
    student, teacher = detector(family, 0), detector(family, 1)
    plain = gradients("explicit", student, teacher, one_backward)
    scaled = gradients("inline", student, teacher, lambda distiller: one_backward(distiller, 65536.0))
    assert_equal_gradients({name: g / 65536.0 for name, g in scaled.items()}, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_under_bf16_autocast(family: str) -> None:
    def step(distiller: Distiller) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = distiller(*batch())
        sum(value.float() for value in found.values()).backward()

    student, teacher = detector(family, 0), detector(family, 1)
    # Inline adds the distillation gradient to G_S in fp32 and rounds once, explicit lets autograd round each to bf16 (8 bits)
    # and add: a few units of 2^-8 in the tensors near the tap, which later layers pass on.
    assert_equal_gradients(
        gradients("inline", student, teacher, step), gradients("explicit", student, teacher, step), tolerance=0.05, floor=0.01
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_under_gradient_accumulation(family: str) -> None:
    def step(distiller: Distiller) -> None:
        for seed in (0, 1):
            (sum(distiller(*batch(seed=seed)).values()) / 2).backward()

    student, teacher = detector(family, 0), detector(family, 1)
    assert_equal_gradients(gradients("inline", student, teacher, step), gradients("explicit", student, teacher, step))


class Checkpointed(nn.Module):
    """Recomputes the module in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_with_a_checkpointed_backbone(family: str) -> None:
    student, teacher = detector(family, 0), detector(family, 1)
    plain = gradients("inline", student, teacher, one_backward)
    if family == "ssdlite":
        student.backbone.features[1] = Checkpointed(student.backbone.features[1])
    else:
        student.backbone.body["layer3"] = Checkpointed(student.backbone.body["layer3"])
    inline = gradients("inline", student, teacher, one_backward)
    assert_equal_gradients(inline, gradients("explicit", student, teacher, one_backward))
    assert_equal_gradients({name.replace(".module.", "."): g for name, g in inline.items()}, plain)


def test_values_are_the_same_and_known_after_the_backward() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    explicit = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), losses(), mode="explicit")
    inline = Distiller(student, teacher, losses())
    expected = explicit(*batch())
    found = inline(*batch())
    # BMFI needs no student gradient, but shares the passes of GKD, which does.
    assert all(found[f"kd_{name}"].item() == 0.0 and f"kd_{name}" not in inline.last_values() for name in losses())
    sum(found.values()).backward()
    for name in losses():
        value = inline.last_values()[f"kd_{name}"]
        assert value > 0
        torch.testing.assert_close(value, expected[f"kd_{name}"].detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found[f"kd_{name}"].detach(), value, rtol=0, atol=0)
    terms = {"kd_gkd/map", "kd_bmfi/region", "kd_bmfi/attention", "kd_bmfi/whole"}
    assert set(inline.last_values()) == set(explicit.last_values()) >= terms


def test_a_weighted_task_loss_needs_the_same_weights_in_explicit() -> None:
    weights = {"classification": 1.0, "bbox_regression": 3.0, "bbox_ctrness": 0.25}

    def step(distiller: Distiller) -> None:
        found = distiller(*batch())
        sum(value * weights.get(key, 1.0) for key, value in found.items()).backward()

    student, teacher = detector("fcos", 0), detector("fcos", 1)
    inline = gradients("inline", student, teacher, step)
    assert_equal_gradients(inline, gradients("explicit", student, teacher, step, task_weights=weights))
    with pytest.raises(AssertionError):
        assert_equal_gradients(inline, gradients("explicit", student, teacher, step))


def test_a_second_backward_through_the_same_graph_is_exact() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    distiller = Distiller(student, teacher, losses())
    total = sum(distiller(*batch()).values())
    total.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in student.named_parameters()}
    value = distiller.last_values()["kd_gkd"].clone()
    (3.0 * total).backward()
    assert_equal_gradients({name: (p.grad - first[name]) / 3 for name, p in student.named_parameters()}, first)
    # The second upstream gradient scales G_S by 3, which a relative epsilon does not feel but for rounding.
    torch.testing.assert_close(distiller.last_values()["kd_gkd"], value, rtol=1e-5, atol=0)
