"""FusedLoss on the Triton kernels: values and gradients against float64, early gradients, second backward passes, inline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_support import DEVICES, DTYPES, LAYOUTS, poisoned, pyramid, relative_error

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, set_backend
from kdkernels.inline import InlinePlan, InlineTap
from kdkernels.losses.composed import teacher_sides

SHAPES = [(2, 16, 13, 21), (2, 16, 7, 11)]
BOXES = [[[8.0, 10.0, 150.0, 130.0], [130.0, 20.0, 160.0, 150.0]], [[33.3, 5.1, 171.7, 160.2]]]
#: The interpreter truncates to bf16 where a GPU rounds.
TOLERANCE = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 6e-3}
LOSSES: dict[str, dict[str, Any]] = {
    "gkd and bmfi": {"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.5, gamma=0.3)},
    "several grains": {"gkd": GKDLoss(preset="release"), "bmfi": BMFILoss(alpha=0.5, gamma=0.3, lambda_=0.2, beta_bg=0.1)},
    "aid on the same": {"gkd": AIDLoss(GKDLoss()), "bmfi": BMFILoss(alpha=0.5), "aid": AIDLoss(BMFILoss(alpha=0.5))},
    "imitation": {"imitation": GKDLoss(form="imitation")},
}


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


def inputs(dtype: torch.dtype, layout: str, device: str) -> dict[str, Any]:
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    found: dict[str, Any] = {name: pyramid(SHAPES, dtype, layout, seed, device) for seed, name in enumerate(names)}
    found["boxes"] = [torch.tensor(b, device=device) for b in BOXES]
    return {**found, "image_size": (200, 336), "teacher_losses": torch.tensor([[0.4, 2.0]], device=device)}


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {k: [x.double() for x in v] if isinstance(v, list) and v[0].dim() == 4 else v for k, v in given.items()}


def evaluated(
    losses: dict[str, Any], given: dict[str, Any], backend: str, scales: tuple[float, ...]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Values, and the gradients of each scale times their sum, all from one graph."""
    set_backend(backend)
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    values = list(FusedLoss(losses)(**{**given, "student_features": leaves}).values())
    gradients = []
    for d in scales:
        upstream = [torch.full_like(value, d) for value in values]
        gradients.append(list(torch.autograd.grad(values, leaves, upstream, retain_graph=True)))
    return [value.detach() for value in values], gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gkd and bmfi"])
def test_types_and_layouts_with_any_upstream_gradient(name: str, dtype: str, layout: str, device: str) -> None:
    given = inputs(DTYPES[dtype], layout, device)
    scales = (1.0, 3.0, 1.0)
    with poisoned():
        values, gradients = evaluated(LOSSES[name], given, "triton", scales)
    wanted, slopes = evaluated(LOSSES[name], wide(given), "reference", scales)
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(values, wanted, strict=True))
    for got, want in zip(gradients, slopes, strict=True):
        for a, b, x in zip(got, want, given["student_features"], strict=True):
            assert a.dtype == x.dtype and a.stride() == x.stride()
            assert relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_share_passes_and_stay_what_they_are(name: str, device: str) -> None:
    given = inputs(torch.float32, "contiguous", device)
    values, (first,) = evaluated(LOSSES[name], given, "triton", (0.5,))
    again, (second,) = evaluated(LOSSES[name], given, "triton", (0.5,))
    wanted, (slopes,) = evaluated(LOSSES[name], wide(given), "reference", (0.5,))
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(values, wanted, strict=True))
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(first, slopes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([*values, *first], [*again, *second], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_was_handed_out_never_changes(dtype: str, device: str) -> None:
    given = inputs(DTYPES[dtype], "contiguous", device)
    set_backend("triton")
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    value = sum(FusedLoss(LOSSES["gkd and bmfi"])(**{**given, "student_features": leaves}).values())
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value, leaves, torch.full_like(value, 7.0), retain_graph=True)
    third = torch.autograd.grad(value, leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, kept, third, strict=True))
    assert all(relative_error(b, 7 * a.double()) < 2 * TOLERANCE[dtype] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_inline_adds_to_the_gradient_that_arrives(device: str) -> None:
    given = inputs(torch.float32, "contiguous", device)
    losses = LOSSES["gkd and bmfi"]
    found = {}
    for backend, case in (("triton", given), ("reference", wide(given))):
        set_backend(backend)
        leaves = [x.detach().requires_grad_() for x in case["student_features"]]
        arguments = {name: case[name] for name in ("teacher_gradients", "boxes", "image_size")}
        sides = teacher_sides(losses, case["teacher_features"], dict.fromkeys(losses, arguments))
        outputs = InlineTap.apply(InlinePlan(losses, sides, lambda *_: None), *leaves)
        upstream = [leaves[0].new_full((), 65536.0)] * len(losses)
        found[backend] = torch.autograd.grad(outputs, leaves, [*case["student_gradients"], *upstream])
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(found["triton"], found["reference"], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_image_gives_no_value_and_gradients_of_no_image(device: str) -> None:
    given = inputs(torch.float32, "contiguous", device)
    none = {k: [x[:0] for x in v] if isinstance(v, list) and v[0].dim() == 4 else v for k, v in given.items()}
    none |= {"boxes": [], "teacher_losses": torch.zeros(1, 0, device=device)}
    values, (gradients,) = evaluated({"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.0)}, none, "triton", (1.0,))
    assert [value.item() for value in values] == [0.0, 0.0]
    assert [tuple(g.shape) for g in gradients] == [(0, *shape[1:]) for shape in SHAPES]
    assert all(not g.numel() for g in gradients)


class Copies(TorchDispatchMode):
    """Counts the levels that are brought to another layout."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.clone.default and args[0].dim() == 4
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [1.0, 3.0])
def test_a_teacher_in_the_other_layout_is_copied_once(d: float, device: str) -> None:
    given = inputs(torch.float32, "channels_last", device)
    given["teacher_features"] = [x.contiguous() for x in given["teacher_features"]]
    with Copies() as copies:
        evaluated({"bmfi": BMFILoss(alpha=0.5)}, given, "triton", (d,))
    assert copies.count == len(SHAPES)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_loss_is_one_graph(device: str) -> None:
    set_backend("triton")
    given = inputs(torch.float32, "contiguous", device)
    fused = FusedLoss(LOSSES["gkd and bmfi"])

    def total(student: list[Tensor], case: dict[str, Any]) -> Tensor:
        return sum(fused(**{**case, "student_features": student}).values())

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in given.pop("student_features")]
    want, got = total(leaves, given), compiled(leaves, given)
    assert relative_error(got.detach(), want.detach()) < 1e-6
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert relative_error(a, b) < 1e-6
