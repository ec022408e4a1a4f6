"""What the tests that need a GPU share: the backends, inputs that can be moved and renewed, and the ways in which losses are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from toolchain import needs_compiler, needs_nvcc
from torch import Tensor

from benchmarks.registry import ENTRIES, Case
from kdkernels import BMFILoss, FusedLoss, GKDLoss
from kdkernels.inline import InlinePlan, InlineTap
from kdkernels.losses import DistillationLoss
from kdkernels.losses.composed import teacher_sides

DEVICE = "cuda"
#: Where nvcc is there the native library for CUDA has to be: then its tests fail without it, with the library's reason.
needs_cuda_library = (needs_compiler, needs_nvcc)
#: Those with kernels for GPUs.
BACKENDS = ["triton", pytest.param("native", marks=needs_cuda_library)]
Losses = dict[str, DistillationLoss]


def both() -> Losses:
    """GKD and BMFI: what is written in one pass, in fp32 and bf16 in the forward pass."""
    return {"gkd": GKDLoss(), "bmfi": BMFILoss()}


def settled(case: Case) -> dict[str, Any]:
    """Arguments of `FusedLoss` on the GPU, padded boxes and counts, away from where gradients jump."""
    generator = torch.Generator().manual_seed(0)
    given = ENTRIES["gkd_bmfi"].inputs(case, generator, torch.device(DEVICE))
    return {**given, "teacher_losses": (4 * torch.rand(1, case.batch, generator=generator)).to(DEVICE)}


def mapped(given: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The arguments with every tensor replaced by the function's result."""
    if isinstance(given, Tensor):
        return function(given)
    if isinstance(given, dict):
        return {name: mapped(value, function) for name, value in given.items()}
    return type(given)(mapped(value, function) for value in given) if isinstance(given, (list, tuple)) else given


def moved(given: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """The arguments on a device; features and gradients, and nothing else, in `dtype`."""
    return mapped(given, lambda x: x.to(device, dtype if x.dim() == 4 else None))


def tensors(given: Any) -> list[Tensor]:
    """All tensors of the arguments."""
    if isinstance(given, Tensor):
        return [given]
    values = given.values() if isinstance(given, dict) else given if isinstance(given, (list, tuple)) else ()
    return [x for value in values for x in tensors(value)]


def explicit(losses: Losses, given: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    """The values, and the gradients of the levels for the upstream gradient, a scalar, of every value."""
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    values = list(FusedLoss(losses)(**{**given, "student_features": leaves}).values())
    return [*(value.detach() for value in values), *torch.autograd.grad(values, leaves, [upstream] * len(values))]


def sides(losses: Losses, given: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: given[name] for name in ("teacher_gradients", "boxes", "image_size", "teacher_losses")}
    return teacher_sides(losses, given["teacher_features"], dict.fromkeys(losses, arguments))


def inline(losses: Losses, given: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    """G_S + d * dKD of the levels, by the tap."""
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    outputs = InlineTap.apply(InlinePlan(losses, sides(losses, given), lambda *_: None), *leaves)
    return list(torch.autograd.grad(outputs, leaves, [*given["student_gradients"], *[upstream] * len(losses)]))


def captured(work: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of the work, and its results, which every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = list(work())
    return graph, results


def without_waiting(work: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Results of the work, which raises where it makes the host wait for the GPU; what is made only once is made before."""
    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return list(work())
    finally:
        torch.cuda.set_sync_debug_mode("default")
