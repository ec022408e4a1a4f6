"""What one measured call is: a function of an entry's inputs in one mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.inline import InlinePlan, InlineTap
from kdkernels.losses import DistillationLoss
from kdkernels.losses.composed import teacher_sides

from .registry import UPSTREAM, Entry, Function, Inputs, flat


@dataclass
class Sample:
    """One set of inputs, with all that a call of its mode needs.

    inputs:     keyword arguments of the entry's functions; the levels of the differentiable one are leaves that want gradients
    cotangents: of every value, the gradient that arrives at it, d included (empty for mode "forward")
    arriving:   inline: the gradients G_S that arrive at the tap's levels
    """

    inputs: Inputs
    cotangents: list[Tensor] = field(default_factory=list)
    arriving: list[Tensor] = field(default_factory=list)


#: The values and, behind them, the gradient of every level; inline: the gradients only.
Call = Callable[[Sample], list[Tensor]]


def bind(entry: Entry, function: Function, mode: str, own: bool) -> Call:
    """The call that is timed. `own`: the function is kdkernels' own call, whose inline mode is the backward pass of its tap."""
    if mode == "forward":
        return lambda sample: _forward(function, sample)
    if mode == "inline":
        if not own:
            return lambda sample: _inline_by_hand(entry, function, sample)
        assert entry.losses is not None  # methods have an inline mode, and methods have losses
        losses = entry.losses()
        return lambda sample: _inline_tap(losses, sample)
    return lambda sample: _backward(entry, function, sample)


def sample(entry: Entry, inputs: Inputs, mode: str, shapes: list[torch.Size], generator: torch.Generator) -> Sample:
    """`inputs` made ready for calls of `mode`; `shapes` are those of the entry's values, `generator` draws the cotangents."""
    if mode == "forward":
        return Sample(dict(inputs))
    leaves = [x.detach().requires_grad_() for x in inputs[_argument(entry)]]
    ready = {**inputs, _argument(entry): leaves}
    d = UPSTREAM[mode]
    device = leaves[0].device
    # One value is a loss, or the matrix of its parts: what follows it is a sum. Several are maps and vectors, each with a use of its own.
    loss = len(shapes) == 1
    cotangents = [d * (torch.ones(shape) if loss else torch.randn(shape, generator=generator)).to(device) for shape in shapes]
    arriving: list[Tensor] = []
    if mode == "inline":
        given = inputs.get("student_gradients")
        arriving = given if given is not None else [_random_like(x, generator) for x in leaves]
    return Sample(ready, cotangents, arriving)


def widened(value: Any) -> Any:
    """Floating tensors and modules in float64, anywhere in `value`; leaves where they were leaves, integers as they are."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, dict):
        return {key: widened(item) for key, item in value.items()}
    return type(value)(widened(item) for item in value) if isinstance(value, (list, tuple)) else value


def _argument(entry: Entry) -> str:
    assert entry.differentiable is not None, f"{entry.name} has no mode with a gradient"
    return entry.differentiable


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Of x's type and memory layout: a gradient arrives in its feature's layout."""
    return torch.empty_like(x, requires_grad=False).copy_(torch.randn(x.shape, generator=generator))


def _forward(function: Function, sample: Sample) -> list[Tensor]:
    with torch.no_grad():
        return flat(function(**sample.inputs))


def _backward(entry: Entry, function: Function, sample: Sample) -> list[Tensor]:
    values = flat(function(**sample.inputs))
    gradients = torch.autograd.grad(values, sample.inputs[_argument(entry)], sample.cotangents)
    return [*(value.detach() for value in values), *gradients]


def _inline_by_hand(entry: Entry, function: Function, sample: Sample) -> list[Tensor]:
    """Without a tap: the loss's own gradient, added to the one that arrives."""
    leaves = sample.inputs[_argument(entry)]
    gradients = torch.autograd.grad(flat(function(**sample.inputs)), leaves, sample.cotangents)
    return [g + own for g, own in zip(sample.arriving, gradients, strict=True)]


def _inline_tap(losses: dict[str, DistillationLoss], sample: Sample) -> list[Tensor]:
    """As the Distiller does it, the teacher's side in the forward pass; every loss inside the tap."""
    student = sample.inputs["student_features"]
    given = {}
    for name, loss in losses.items():
        wanted = ("teacher_gradients", "boxes", "teacher_losses")
        given[name] = {need: sample.inputs[need] for need in wanted if need in loss.needs}
        if "boxes" in loss.needs:
            given[name]["image_size"] = sample.inputs["image_size"]
    sides = teacher_sides(losses, sample.inputs["teacher_features"], given)
    outputs = InlineTap.apply(InlinePlan(losses, sides, lambda *_: None), *student)
    # A scalar entry sums its losses, so each handle gets the same upstream gradient.
    upstream = sample.cotangents * len(losses)
    return list(torch.autograd.grad(outputs, student, [*sample.arriving, *upstream]))
