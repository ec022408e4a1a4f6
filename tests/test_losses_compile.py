"""The losses compile without a graph break; `aot_eager` traces the backward too and needs no C++ compiler."""

from __future__ import annotations

import torch

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, NonFinite, functional

BOXES = [torch.tensor([[2.0, 2.0, 20.0, 20.0]]), torch.zeros(0, 4)]
IMAGE = (24, 24)


def pyramid(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, h, w, generator=generator) for h, w in ((5, 6),)]


def test_modules_compile_as_one_graph_with_equal_values_gradients_and_flags():
    fused = FusedLoss({"gkd": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0), "aid": AIDLoss(GKDLoss(form="imitation"), granularity="image")})
    teacher, student_gradients, teacher_gradients = pyramid(2), pyramid(3), pyramid(4)

    def total(student: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        return sum(fused(student, teacher, student_gradients, teacher_gradients, BOXES, IMAGE, t).values())

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    results = []
    for function in (total, compiled):
        student = [x.requires_grad_() for x in pyramid(1)]
        value = function(student, torch.tensor([0.5, 1.5]))
        results.append([value, *torch.autograd.grad(value, student)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert fused.check() == []
    compiled(student, torch.tensor([float("nan"), 1.5]))
    assert fused.check() == [NonFinite("aid", "imitation", 0, 0)]


def test_functions_compile_as_one_graph():
    teacher, student_gradients, teacher_gradients = pyramid(2), pyramid(3), pyramid(4)
    base = BMFILoss()

    def total(student: list[torch.Tensor]) -> torch.Tensor:
        value = functional.gkd(student, teacher, student_gradients, teacher_gradients, preset="release")
        return value + functional.aid(base, student, teacher, BOXES, IMAGE, teacher_losses=torch.tensor(0.5))

    want = total(pyramid(1))
    assert want > 0
    assert torch.equal(torch.compile(total, fullgraph=True, backend="eager")(pyramid(1)), want)
