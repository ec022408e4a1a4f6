"""What the comparisons of the losses with their float64 loops share: inputs, random parameters, and the comparison of every term."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracle import cases
from oracle.compare import RTOL32, RTOL64, assert_close, assert_levels_close, numbers
from oracle.tape import Evaluation, Rows
from torch import Tensor, nn

from kdkernels.losses.catalogue import defaults, make_loss

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
RTOLS = {torch.float64: RTOL64, torch.float32: RTOL32}
IMAGE_SIZE = (64, 96)
# Three images, in odd and even sizes; of the last level a row.
SHAPES = [(3, 4, 5, 7), (3, 4, 3, 4), (3, 4, 1, 2)]
# Two boxes that overlap, one that fills the image, and an image without any.
BOXES = [np.array([[9.0, 11.0, 41.0, 33.0], [28.0, 18.0, 63.0, 50.0]]), np.array([[0.0, 2.0, 95.0, 63.0]]), np.zeros((0, 4))]


def features(seed: int, dtype: torch.dtype, student=SHAPES, teacher=SHAPES) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Student's and teacher's levels, in numbers that `dtype` holds."""
    return tuple(cases.rounded(cases.pyramid(seed + 7000 + 50 * k, shapes), dtype) for k, shapes in enumerate((student, teacher)))


def narrower(shapes=SHAPES, channels: int = 3) -> list[tuple[int, ...]]:
    """The same levels with fewer channels."""
    return [(n, channels, h, w) for n, _, h, w in shapes]


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """The module with random numbers, which fp32 holds, in place of its parameters' initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn)
    return module


def parameters_of(module: nn.Module | None) -> dict[str, np.ndarray]:
    return {} if module is None else {name: numbers(parameter) for name, parameter in module.named_parameters()}


def check_terms(
    found: Mapping[str, Tensor],
    want: Evaluation,
    inputs: list[list[Tensor]],
    module: nn.Module | None = None,
    rtol: float | None = None,
    names: Mapping[str, str] | None = None,
) -> set[str]:
    """The terms compared: every one's (L, N), and its gradients to all inputs and parameters, under an upstream of different numbers.

    `want` was evaluated on the inputs and, behind them, on the parameters of `module`; names: the loss's term -> the oracle's.
    """
    names = names or {}
    assert {names.get(term, term) for term in found} == set(want.rows)
    parameters = {} if module is None else dict(module.named_parameters())
    leaves = [leaf for group in inputs for leaf in group] + list(parameters.values())
    rtol = RTOLS[leaves[0].dtype] if rtol is None else rtol
    for term, value in found.items():
        own = names.get(term, term)
        assert_close(value, want.value(own), rtol, what=f"{term}, (level, image)")
        up = cases.upstream(len(term), *value.shape)
        wanted = want.gradient(up, own)
        noise = 8 * torch.finfo(leaves[0].dtype).eps * np.abs(want.value(own)).max()
        if not value.requires_grad:
            largest = max(np.abs(level).max() for group in wanted for level in (group.values() if isinstance(group, dict) else group))
            assert largest == 0, f"{term} has no gradient, wanted one of {largest}"
            continue
        got = list(torch.autograd.grad((value * torch.tensor(up).to(value)).sum(), leaves, retain_graph=True, allow_unused=True))
        for k, group in enumerate(inputs):
            mine, got = got[: len(group)], got[len(group) :]
            # A gradient that cancels altogether in one level is as exact as those of the others, or as the value.
            atol = noise + rtol * max(np.abs(level).max() for level in wanted[k])
            assert_levels_close(mine, wanted[k], rtol, atol, f"{term}, input {k}: gradient of level")
        if parameters:
            atol = noise + rtol * max(np.abs(gradient).max() for gradient in wanted[-1].values())
            for name, gradient in zip(parameters, got, strict=True):
                wanted_one = wanted[-1][name]
                mine = np.zeros_like(wanted_one) if gradient is None else gradient
                assert_close(mine, wanted_one, rtol, atol, f"{term}: gradient of {name}")
    return set(found)


def check_features(
    loss: nn.Module,
    oracle: Callable[[Any, Any, dict[str, Any]], dict[str, Rows]],
    levels: tuple[list[np.ndarray], list[np.ndarray]],
    dtype: torch.dtype,
    rtol: float | None = None,
    names: Mapping[str, str] | None = None,
    **given: Any,
) -> set[str]:
    """The terms of a loss, compared with `oracle(student, teacher, parameters)`; given: arguments of its teacher_side."""
    s, t = levels
    x, y = cases.tensors(s, dtype, requires_grad=True), cases.tensors(t, dtype)
    student_gradients = given.pop("student_gradients", None)
    module = None
    # A wrapper trains what it wraps.
    inner = getattr(loss, "base", loss)
    if hasattr(inner, "build"):
        module = inner.build(x, y).trainable
    if module is not None:
        randomised(module.to(dtype))
    constant = [level.tolist() for level in t]
    want = Evaluation(lambda student, parameters: oracle(student, constant, parameters), s, parameters_of(module))
    found = loss.terms(x, loss.teacher_side(y, **given), student_gradients)
    return check_terms(found, want, [x], module, rtol, names)


def presets(name: str, published: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the library gives for every preset of the method, of the options that `published` names."""
    options = {option for table in published.values() for option in table}
    return {preset: {option: table[option] for option in options} for preset, table in defaults(name).items()}


def preset_loss(name: str, preset: str, **options: Any) -> nn.Module:
    """The method with the numbers of a preset."""
    return make_loss(name, {"preset": preset, **options})


def anchors(shapes=SHAPES, lengths: Sequence[float] = (7.25, 14.5)) -> list[np.ndarray]:
    """One a cell of each length, longer by level: (H W k, 4) a level. On quarters, so that those of a cell have the very same centre."""
    levels = []
    for level, (_, _, height, width) in enumerate(shapes):
        cells = []
        for h in range(height):
            for w in range(width):
                x, y = (w + 0.5) * IMAGE_SIZE[1] / width, (h + 0.5) * IMAGE_SIZE[0] / height
                for long in lengths:
                    half = long * 1.9**level
                    cells.append([x, y, half, 0.8 * half])
        x, y, across, down = np.round(4 * np.array(cells).T) / 4
        levels.append(np.stack([x - across, y - down, x + across, y + down], 1))
    return levels


def kinds(published: Mapping[str, Any]) -> list[Any]:
    """Every preset in both types."""
    return [pytest.param(preset, dtype, id=f"{preset}-{name}") for preset in published for name, dtype in DTYPES.items()]
