"""FusedLoss on fused kernels: values and gradients against float64, early gradients, second backward passes, inline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_kernels import on_all_kernels, poisoned
from fused_support import Losses, called, gradient_tolerance, of_one_graph, of_shapes, of_the_tap, wide
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from native_support import VALUE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, set_backend

SHAPES = [(2, 16, 13, 21), (2, 16, 7, 11)]
LOSSES: dict[str, Losses] = {
    "gkd and bmfi": {"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.5, gamma=0.3)},
    "several grains": {"gkd": GKDLoss(preset="release"), "bmfi": BMFILoss(alpha=0.5, gamma=0.3, lambda_=0.2, beta_bg=0.1)},
    "aid on the same": {"gkd": AIDLoss(GKDLoss()), "bmfi": BMFILoss(alpha=0.5), "aid": AIDLoss(BMFILoss(alpha=0.5))},
    "imitation": {"imitation": GKDLoss(form="imitation")},
}


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


def inputs(dtype: str, layout: str, device: str) -> dict[str, Any]:
    """Arguments of FusedLoss, the teacher's in the student's type and layout too."""
    case = of_shapes(SHAPES, device)
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    return {**case, **{name: pyramid(SHAPES, DTYPES[dtype], layout, seed, device) for seed, name in enumerate(names)}}


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gkd and bmfi"])
def test_types_and_layouts_with_any_upstream_gradient(name: str, dtype: str, layout: str, backend: str, device: str) -> None:
    given = inputs(dtype, layout, device)
    scales = (1.0, 3.0, 1.0)
    with poisoned(backend):
        values, gradients = of_one_graph(LOSSES[name], given, backend, scales)
    wanted, slopes = of_one_graph(LOSSES[name], wide(given), "reference", scales)
    assert all(relative_error(a, b) < VALUE for a, b in zip(values, wanted, strict=True))
    for got, want in zip(gradients, slopes, strict=True):
        for a, b, x in zip(got, want, given["student_features"], strict=True):
            assert a.dtype == x.dtype and a.stride() == x.stride()
            assert relative_error(a, b) < gradient_tolerance(backend, DTYPES[dtype])


@on_all_kernels
@pytest.mark.parametrize("name", LOSSES)
def test_losses_share_passes_and_stay_what_they_are(name: str, backend: str, device: str) -> None:
    given = inputs("fp32", "contiguous", device)
    values, (first,) = of_one_graph(LOSSES[name], given, backend, (0.5,))
    again, (second,) = of_one_graph(LOSSES[name], given, backend, (0.5,))
    wanted, (slopes,) = of_one_graph(LOSSES[name], wide(given), "reference", (0.5,))
    assert all(relative_error(a, b) < VALUE for a, b in zip(values, wanted, strict=True))
    assert all(relative_error(a, b) < VALUE for a, b in zip(first, slopes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([*values, *first], [*again, *second], strict=True))


@on_all_kernels
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_was_handed_out_never_changes(dtype: str, backend: str, device: str) -> None:
    given = inputs(dtype, "contiguous", device)
    leaves, values = called(LOSSES["gkd and bmfi"], given, backend)
    value = sum(values)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value, leaves, torch.full_like(value, 7.0), retain_graph=True)
    third = torch.autograd.grad(value, leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, kept, third, strict=True))
    assert all(
        relative_error(b, 7 * a.double()) < 2 * gradient_tolerance(backend, DTYPES[dtype]) for a, b in zip(first, second, strict=True)
    )


@on_all_kernels
def test_inline_adds_to_the_gradient_that_arrives(backend: str, device: str) -> None:
    given = inputs("fp32", "contiguous", device)
    cases = ((backend, given), ("reference", wide(given)))
    found = {name: of_the_tap(LOSSES["gkd and bmfi"], case, name, 65536.0) for name, case in cases}
    assert all(relative_error(a, b) < VALUE for a, b in zip(found[backend], found["reference"], strict=True))


@on_all_kernels
def test_no_image_gives_no_value_and_gradients_of_no_image(backend: str, device: str) -> None:
    given = inputs("fp32", "contiguous", device)
    none = {k: [x[:0] for x in v] if isinstance(v, list) and v[0].dim() == 4 else v for k, v in given.items()}
    none |= {"boxes": [], "teacher_losses": torch.zeros(1, 0, device=device)}
    values, (gradients,) = of_one_graph({"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.0)}, none, backend, (1.0,))
    assert [value.item() for value in values] == [0.0, 0.0]
    assert [tuple(g.shape) for g in gradients] == [(0, *shape[1:]) for shape in SHAPES]
    assert all(not g.numel() for g in gradients)


class Copies(TorchDispatchMode):
    """Counts the levels that are brought to another layout."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.clone.default and args[0].dim() == 4
        return function(*args, **(kwargs or {}))


@on_all_kernels
@pytest.mark.parametrize("d", [1.0, 3.0])
def test_a_teacher_in_the_other_layout_is_copied_once(d: float, backend: str, device: str) -> None:
    given = inputs("fp32", "channels_last", device)
    given["teacher_features"] = [x.contiguous() for x in given["teacher_features"]]
    with Copies() as copies:
        of_one_graph({"bmfi": BMFILoss(alpha=0.5)}, given, backend, (d,))
    assert copies.count == len(SHAPES)


@on_all_kernels
def test_a_compiled_loss_is_one_graph(backend: str, device: str) -> None:
    set_backend(backend)
    given = inputs("fp32", "contiguous", device)
    fused = FusedLoss(LOSSES["gkd and bmfi"])

    def total(student: list[Tensor], case: dict[str, Any]) -> Tensor:
        return sum(fused(**{**case, "student_features": student}).values())

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in given.pop("student_features")]
    want, got = total(leaves, given), compiled(leaves, given)
    assert relative_error(got.detach(), want.detach()) < 1e-6
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert relative_error(a, b) < 1e-6
