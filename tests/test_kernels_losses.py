"""The losses as users call them, on fused kernels: values and gradients against the reference in float64, whatever the input."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from all_kernels import check, on_all_kernels, on_gpu_kernels, poisoned
from fused_strategies import inputs_of
from fused_strategies import losses as losses_of
from fused_support import GRAINS, INF, NAN, PYRAMIDS, SMALL, built, called, evaluated, gradient_tolerance, of_shapes, wide
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from levels import DTYPES, relative_error
from native_support import VALUE

from kdkernels import BMFILoss, DistillationLoss, FusedLoss, GKDLoss, set_backend

#: Image 1 has no box of any cell in all of them, image 0 in all but the first.
BAD_BOXES: dict[str, list[list[list[float]]]] = {
    "none in one image": [[[8.0, 10.0, 320.0, 190.0]], []],
    "none": [[], []],
    "outside or without area": [
        [[20.0, 30.0, 20.0, 90.0], [50.0, 60.0, 10.0, 20.0]],
        [[10.0, -80.0, 90.0, -5.0], [400.0, 10.0, 500.0, 90.0]],
    ],
}


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


# Few, and not shrunk, which would interpret hundreds of examples: a failure shows the one that was found.
few = functools.partial(settings, phases=[Phase.explicit, Phase.generate])


@on_gpu_kernels
@few(max_examples=5)
@given(data=st.data())
def test_gkd_maps(data: Any, backend: str, device: str) -> None:
    assert check(data.draw(losses_of("gkd map")), built(data.draw(inputs_of("gkd map")), device), backend) < 1


@on_gpu_kernels
@few(max_examples=4)
@given(data=st.data())
def test_gkd_imitations(data: Any, backend: str, device: str) -> None:
    assert check(data.draw(losses_of("gkd imitation")), built(data.draw(inputs_of("gkd imitation")), device), backend) < 1


@on_gpu_kernels
@few(max_examples=5)
@given(data=st.data())
def test_bmfi(data: Any, backend: str, device: str) -> None:
    assert check(data.draw(losses_of("bmfi")), built(data.draw(inputs_of("bmfi")), device), backend) < 1


@on_gpu_kernels
@few(max_examples=3)
@given(data=st.data())
def test_several_losses_together(data: Any, backend: str, device: str) -> None:
    assert check(data.draw(losses_of("several")), built(data.draw(inputs_of("several")), device), backend) < 1


@on_all_kernels
def test_seven_levels_take_two_launches(backend: str, device: str) -> None:
    shapes = [(1, 3, 2, 3), (1, 1, 4, 3), (1, 3, 1, 1), (1, 16, 5, 4), (1, 1, 1, 1), (1, 8, 3, 7), (1, 5, 2, 4)]
    case = of_shapes(shapes, device, seed=2, padded=True)
    assert check({"gkd": GKDLoss(), "bmfi": BMFILoss(**GRAINS, reduction="none")}, case, backend) < 1


@on_all_kernels
@pytest.mark.parametrize("layouts", [("contiguous", "channels_last", "transposed"), ("channels_last", "gaps", "images inside")])
def test_levels_of_different_layouts_with_the_gradient_from_the_forward_pass(backend: str, device: str, layouts: tuple[str, ...]) -> None:
    """The gradient kernel leaves what is right as it is where the upstream gradient is 1, in the student's layout too."""
    assert check({"whole": BMFILoss(alpha=0.0, lambda_=1.0)}, of_shapes(SMALL, device, layouts), backend) < 1


@on_all_kernels
@pytest.mark.parametrize("bad", BAD_BOXES)
def test_boxes_that_leave_images_without_a_region(backend: str, device: str, bad: str) -> None:
    case = of_shapes(SMALL, device) | {"boxes": [torch.tensor(b, device=device).reshape(-1, 4) for b in BAD_BOXES[bad]]}
    assert check({"bmfi": BMFILoss(**GRAINS), "weighted": GKDLoss(box_weight="sqrt_mask")}, case, backend) < 1
    region = BMFILoss(gamma=0.0, reduction="none")(*(case[name] for name in BMFILoss.argument_names))
    assert region[:, 1].eq(0).all() and bool(region[:, 0].ne(0).all()) == (bad == "none in one image")


@on_all_kernels
@pytest.mark.parametrize("source", PYRAMIDS)
def test_non_finite_elements_are_found_where_the_reference_finds_them(backend: str, device: str, source: str) -> None:
    case = of_shapes(SMALL, device)
    for level, image, bad in ((0, 1, NAN), (1, 0, INF), (2, 1, -INF)):
        case[source][level][image, 1, 1, 1] = bad
    values, gradients = {}, {}
    found = {}
    for name, given_case in ((backend, case), ("reference", wide(case))):
        losses: dict[str, DistillationLoss] = {
            "map": GKDLoss(preset="release", reduction="none"),
            "imitation": GKDLoss(form="imitation", reduction="none"),
            "bmfi": BMFILoss(**GRAINS, reduction="none"),
        }
        values[name], gradients[name] = evaluated(losses, given_case, name)
        found[name] = [report for loss in losses.values() for report in loss.check()]
    assert found[backend] == found["reference"] and found[backend]
    finite = torch.ones(3, 2, dtype=torch.bool, device=device)
    for got, want in zip(values[backend], values["reference"], strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        torch.testing.assert_close(got, want.float(), rtol=VALUE, atol=0, equal_nan=True)
        finite &= want.isfinite()
    for mask, got, want in zip(finite, gradients[backend], gradients["reference"], strict=True):
        # A teacher that is not finite gives a gradient of NaN where the reference's sign of NaN is 0.
        assert relative_error(got[mask], want[mask]) < gradient_tolerance(backend, torch.float32)
        assert not got[~mask].isfinite().flatten(1).all(1).any()


@on_all_kernels
def test_constant_features(backend: str, device: str) -> None:
    case = of_shapes(SMALL, device)
    case["student_features"][0].fill_(0.1)
    case["teacher_features"][1].fill_(-0.7)
    case["student_features"][2][0], case["teacher_features"][2][0] = 0.3, 0.3
    assert check({"map": GKDLoss(), "bmfi": BMFILoss(**GRAINS)}, case, backend) < 1
    _, gradients = evaluated({"loss": GKDLoss()}, case, backend)
    assert gradients[0].eq(0).all() and gradients[1].ne(0).any() and gradients[2][0].eq(0).all()


@on_all_kernels
@pytest.mark.parametrize("missing", ["student_gradients", "teacher_gradients"])
def test_a_level_without_gradient_contributes_nothing_whatever_it_holds(backend: str, device: str, missing: str) -> None:
    case = of_shapes(SMALL, device)
    case[missing][1] = None
    assert check({"map": GKDLoss(), "imitation": GKDLoss(form="imitation"), "bmfi": BMFILoss()}, case, backend) < 1
    for features in ("student_features", "teacher_features"):
        case[features][1][0, 0, 0, 0] = float("nan")
    values, (_, gradient, _) = evaluated({"loss": GKDLoss(reduction="none")}, case, backend)
    assert values[0][1].eq(0).all() and values[0][[0, 2]].ne(0).all() and gradient.eq(0).all()
    values, (_, gradient, _) = evaluated({"loss": GKDLoss(form="imitation", reduction="none")}, case, backend)
    assert missing == "student_gradients" or (values[0][1].eq(0).all() and gradient.eq(0).all())


@on_all_kernels
def test_an_upstream_gradient_of_zero_gives_zero(backend: str, device: str) -> None:
    # The forward pass has made the gradient for 1 already.
    _, gradients = evaluated({"map": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0, alpha=0.0)}, of_shapes(SMALL, device), backend, 0.0)
    assert all(g.eq(0).all() for g in gradients)


@on_all_kernels
def test_the_losses_of_one_call_are_differentiated_one_by_one(backend: str, device: str) -> None:
    case = of_shapes(SMALL, device)
    found = {}
    for name, given_case in ((backend, case), ("reference", wide(case))):
        leaves, values = called({"gkd": GKDLoss(), "bmfi": BMFILoss(**GRAINS)}, given_case, name)
        found[name] = [g for value in values for g in torch.autograd.grad(value, leaves, retain_graph=True)]
    assert len(found[backend]) == 6
    errors = [relative_error(a, b) for a, b in zip(found[backend], found["reference"], strict=True)]
    assert max(errors) < gradient_tolerance(backend, torch.float32)


@on_all_kernels
def test_two_runs_are_equal_to_the_bit(backend: str, device: str) -> None:
    case = of_shapes(SMALL, device, ("contiguous", "channels_last", "gaps"), tuple(DTYPES))
    runs = [evaluated({"gkd": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0)}, case, backend) for _ in range(2)]
    assert all(torch.equal(a, b) for one, two in zip(*runs, strict=True) for a, b in zip(one, two, strict=True))


@on_all_kernels
def test_without_a_graph_the_values_are_the_same(backend: str, device: str) -> None:
    case, losses = of_shapes(SMALL, device), {"gkd": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0, alpha=0.0, reduction="none")}
    values, _ = evaluated(losses, case, backend)
    with torch.no_grad(), poisoned(backend):
        again = FusedLoss(losses)(**case)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(again.values(), values, strict=True))


@on_all_kernels
def test_what_only_the_reference_has_is_refused_by_name(backend: str, device: str) -> None:
    set_backend(backend)
    case = of_shapes(SMALL, device)
    arguments = [case[name] for name in GKDLoss.argument_names[:4]]
    with pytest.raises(RuntimeError, match="a weight per element is in the reference only"):
        GKDLoss(channel_weight="elementwise")(*arguments)
    arguments[2] = [(x * g).requires_grad_() for x, g in zip(arguments[0], arguments[2], strict=True)]
    with pytest.raises(RuntimeError, match="which only the reference gives") as error:
        GKDLoss(grad_mode="second_order")(*arguments)
    assert "choose 'auto' or 'reference'" in str(error.value)
