"""The CAM variants: maps that are 0 or missing, the gradients' scale, and what cannot be computed inside the backward pass."""

from __future__ import annotations

import pytest
import torch
from levels import relative_error
from method_support import FOCAL, SHAPES, call, given, gradients, made, new

from kdkernels import CamLoss, FGDLoss
from kdkernels.losses.catalogue import defaults, make_loss

ALONE = {**FOCAL, "lambda_": 0.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_maps_of_0_leave_what_the_other_network_has(side, dtype):
    case = given(1, dtype=dtype)
    for one in ("student", "teacher"):
        if side in (one, "both"):
            case[f"{one}_gradients"] = [torch.zeros_like(x) for x in case[f"{one}_gradients"]]
    value = call(CamLoss(alpha=1.0, beta=0.0, gamma=0.0, lambda_=0.0), case)
    found = gradients(value, case)
    assert bool(torch.isfinite(value)) and all(bool(torch.isfinite(g).all()) for g in found)
    assert (float(value.detach()) > 1e-3) == (side != "both")
    # Where the student's map is 0 its features are weighted by 0.
    assert (max(float(g.abs().max()) for g in found) > 1e-6) == (side == "teacher")


def test_a_level_without_a_gradient_has_no_foreground_and_no_cam():
    case = given(2)
    for missing in ("student_gradients", "teacher_gradients"):
        given_gradients = [None if level == 1 else g for level, g in enumerate(case[missing])]
        side_case = {**case, missing: given_gradients}
        loss = CamLoss(alpha=1.0, beta=1.0, gamma=0.0, lambda_=0.0, reduction="none")
        rows, full = call(loss, side_case), call(loss, case)
        assert float(rows[1].detach().abs().max()) == 0 and float(full[1].detach().max()) > 0
        assert relative_error(rows[[0, 2, 3]].detach(), full[[0, 2, 3]].detach()) < 1e-12


def test_a_relative_epsilon_does_not_see_the_scale_of_the_gradients():
    case = given(3)
    scaled = {**case, "student_gradients": [g * 2.0**20 for g in case["student_gradients"]]}
    relative, absolute = (CamLoss(**ALONE, eps_mode=mode) for mode in ("relative", "absolute"))
    assert relative_error(call(relative, scaled).detach(), call(relative, case).detach()) < 1e-12
    tiny = {**case, "student_gradients": [g * 1e-8 for g in case["student_gradients"]]}
    assert relative_error(call(absolute, tiny).detach(), call(absolute, case).detach()) > 1e-3


def test_the_teachers_variant_weighs_both_sides_alike_and_has_no_cam_term():
    case = given(4)
    loss = made("teacher-cam", case)
    side = loss.teacher_side(case["teacher_features"], case["teacher_gradients"], case["boxes"], case["image_size"])
    assert set(loss.terms(case["student_features"], side)) == {"foreground", "attention", "relation"}
    assert "student_gradients" not in loss.needs
    same = {**case, "student_features": [x.clone() for x in case["teacher_features"]]}
    assert float(call(new("teacher-cam"), same)) == 0


def test_the_teachers_variant_has_no_beta():
    for make in (lambda **options: CamLoss(variant="teacher", **options), lambda **options: make_loss("teacher-cam", options)):
        with pytest.raises(ValueError, match='^beta weighs the distance of both maps, which variant="teacher" does not have.*got 0.05'):
            make(beta=0.05)
        assert make(beta=0.0).beta == make().beta == 0
    with pytest.raises(ValueError, match="nothing to compute"):
        CamLoss(variant="teacher", alpha=0.0, gamma=0.0, lambda_=0.0)
    assert all("beta" in values for values in defaults("cam-gmask").values())
    assert not any("beta" in values for values in defaults("teacher-cam").values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "; choose lambda_=0"),
        ({"lambda_": 0.0}, "absolute"),
        ({"lambda_": 0.0, "eps_mode": "relative"}, None),
        ({"variant": "teacher"}, None),
    ],
)
def test_what_cannot_be_computed_inside_the_backward_pass(options, said):
    refusal = CamLoss(**options).inline_refusal()
    assert refusal is None if said is None else said in refusal


def test_a_student_of_other_channels_is_aligned_for_what_is_compared_and_has_its_own_map():
    case, narrow = given(6), given(7, [(3, 2, *shape[2:]) for shape in SHAPES])
    case = {**case, "student_features": narrow["student_features"], "student_gradients": narrow["student_gradients"]}
    loss = made("cam-gmask", case)
    side = loss.teacher_side(case["teacher_features"], case["teacher_gradients"], case["boxes"], case["image_size"])
    terms = loss.terms(case["student_features"], side, case["student_gradients"])
    assert list(terms) == ["foreground", "attention", "relation", "cam"]
    only = make_loss("cam-only", {"weight": FOCAL["beta"], "reduction": "none"})
    assert relative_error(terms["cam"].detach(), call(only, case).detach()) < 1e-12
    aligned = loss.trainable.align(case["student_features"], case["teacher_features"])
    attention = FGDLoss(alpha=0.0, beta=0.0, gamma=FOCAL["gamma"], lambda_=0.0, reduction="none")
    assert relative_error(terms["attention"].detach(), attention(aligned, case["teacher_features"]).detach()) < 1e-12
    torch.stack(list(terms.values())).sum().backward()
    assert all(float(x.grad.abs().max()) > 0 for x in case["student_features"])
    assert all(bool(torch.isfinite(p.grad).all()) for p in loss.parameters())
    with pytest.raises(ValueError, match=r"student_gradients|student_features has shape \(3, 2"):
        call(new("cam-gmask alone"), case)


@pytest.mark.parametrize("argument", ["student_gradients", "teacher_gradients"])
def test_missing_gradients_are_named(argument):
    case = given(5)
    with pytest.raises(ValueError, match=f"CamLoss needs {argument}"):
        call(new("cam-gmask"), {**case, argument: None})



@pytest.mark.parametrize(("option", "value"), [("variant", "student"), ("eps_mode", "none"), ("mask", "round")])
def test_options_that_are_not_defined_are_refused(option, value):
    with pytest.raises(ValueError, match=f"(?s){option}.*{value}"):
        CamLoss(**{option: value})
