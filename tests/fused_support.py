"""What the tests of losses on fused kernels share: inputs, values and gradients, and how these are held against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import native_support
import torch
from levels import DTYPES, pyramid, relative_error
from torch import Tensor

from kdkernels import AIDLoss, DistillationLoss, FusedLoss, set_backend
from kdkernels.inline import InlinePlan, InlineTap
from kdkernels.losses.composed import teacher_sides

NAN, INF = float("nan"), float("inf")
IMAGE_SIZE = (200, 336)
BOXES = [[[8.0, 10.0, 150.0, 130.0], [130.0, 20.0, 160.0, 150.0]], [[33.3, 5.1, 271.7, 160.2]], []]
PYRAMIDS = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
SMALL = [(2, 3, 3, 4), (2, 5, 2, 3), (2, 3, 4, 4)]
#: A value below this is what rounding leaves of the difference of numbers near 1, as of two softmaxes of one cell.
NOTHING = 1e-2
GRAINS: dict[str, Any] = {"alpha": 0.4, "gamma": 0.3, "lambda_": 0.2, "beta_bg": 0.1}
Shapes = Sequence[Sequence[int]]
Losses = dict[str, Any]
Poisoned = Callable[[], AbstractContextManager[None]]


def gradient_tolerance(backend: str, dtype: torch.dtype, elements: int = 64) -> float:
    """Relative error of gradients of so many elements, against float64. Triton's interpreter truncates to bf16 where a GPU rounds."""
    truncates = backend == "triton" and dtype == torch.bfloat16
    tolerance = 6e-3 if truncates else native_support.GRADIENT[dtype]
    # In a few elements roundings do not average out, of which there is one a call of the operator and one of their sum.
    few = (2 if truncates else 1) * torch.finfo(dtype).eps
    return tolerance if elements >= 64 else max(tolerance, few)


def _between(x: Tensor, first: int, last: int, step: int = 1) -> Tensor:
    """Equal to x, with rows that lie apart."""
    room = x.new_full((*x.shape[:3], first + step * x.shape[3] + last), NAN)
    view = room[..., first : first + step * x.shape[3] : step]
    view.copy_(x)
    return view


def _odd_address(x: Tensor) -> Tensor:
    """Equal to x and as dense, an element behind where 16 bytes begin."""
    return torch.cat([x.new_zeros(1), x.as_strided((x.numel(),), (1,))])[1:].as_strided(x.shape, x.stride())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "odd address": _odd_address,
    "channels_last, odd address": lambda x: _odd_address(x.contiguous(memory_format=torch.channels_last)),
    "gaps": lambda x: _between(x, 1, 2),
    "every other": lambda x: _between(x, 0, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "images inside": lambda x: x.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2),
    "expanded": lambda x: x[:1].expand_as(x),
}


class Level(NamedTuple):
    """What a level is made of."""

    shape: tuple[int, ...]
    dtype: str
    layout: str


def built(drawn: dict[str, Any], device: str) -> dict[str, Any]:
    """All arguments of `FusedLoss`. drawn: the levels of each of `PYRAMIDS`, "padded" boxes or lists of them, "seed"."""
    case = {}
    for k, name in enumerate(PYRAMIDS):
        random = pyramid([level.shape for level in drawn[name]], seed=4 * drawn["seed"] + k, device=device)
        case[name] = [LAYOUTS[level.layout](x.to(DTYPES[level.dtype])) for x, level in zip(random, drawn[name], strict=True)]
    count, images = len(case["student_features"]), case["student_features"][0].shape[0]
    boxes: Any = [torch.tensor(b, device=device).reshape(-1, 4) for b in drawn.get("boxes", BOXES)[:images]]
    if drawn["padded"] and images:
        boxes = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True), torch.tensor([len(b) for b in boxes], device=device)
    losses = torch.rand(count, images, generator=torch.Generator().manual_seed(3)).to(device) * 3
    return {**case, "boxes": boxes, "image_size": IMAGE_SIZE, "teacher_losses": losses}


def of_shapes(
    shapes: Shapes,
    device: str = "cpu",
    layouts: Sequence[str] = ("contiguous",),
    dtypes: Sequence[str] = ("fp32",),
    seed: int = 1,
    padded: bool = False,
) -> dict[str, Any]:
    """Arguments of levels of these shapes, all in fp32 and contiguous but the student's; layouts, dtypes: in turn."""
    drawn = {name: [Level(tuple(shape), "fp32", "contiguous") for shape in shapes] for name in PYRAMIDS}
    kinds = [(dtypes[k % len(dtypes)], layouts[k % len(layouts)]) for k in range(len(shapes))]
    drawn["student_features"] = [Level(tuple(shape), *kind) for shape, kind in zip(shapes, kinds, strict=True)]
    return built({**drawn, "padded": padded, "seed": seed}, device)


def wide(case: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, boxes and teacher losses aside."""
    keep = ("boxes", "image_size", "teacher_losses")
    return {name: x if name in keep else [None if a is None else a.double().contiguous() for a in x] for name, x in case.items()}


def called(losses: Losses, case: dict[str, Any], backend: str) -> tuple[list[Any], list[Any]]:
    """Leaves in the student's strides, and the values of the losses; a loss alone is called without FusedLoss."""
    set_backend(backend)
    leaves = [x.detach().requires_grad_() for x in case["student_features"]]
    arguments = {**case, "student_features": leaves}
    if len(losses) > 1:
        return leaves, list(FusedLoss(losses)(**arguments).values())
    (loss,) = losses.values()
    wanted = (*loss.argument_names, *(["teacher_losses"] if isinstance(loss, AIDLoss) else []))
    return leaves, [loss(**{name: arguments[name] for name in wanted})]


def evaluated(
    losses: Losses, case: dict[str, Any], backend: str, upstream: float | Sequence[Tensor] = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and the gradients of the student's levels, 0 where there is none."""
    leaves, values = called(losses, case, backend)
    factors: Sequence[Any] = [upstream] * len(values) if isinstance(upstream, float) else upstream
    slopes = [torch.ones_like(v) * d for v, d in zip(values, factors, strict=True)]
    chosen = [(v, d) for v, d in zip(values, slopes, strict=True) if v.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if chosen:
        found = torch.autograd.grad([v for v, _ in chosen], leaves, [d for _, d in chosen], allow_unused=True)
    return [v.detach() for v in values], [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def of_one_graph(losses: Losses, case: dict[str, Any], backend: str, scales: Sequence[float]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Values, and the gradients of each scale times their sum, all from one graph."""
    leaves, values = called(losses, case, backend)
    gradients = [
        list(torch.autograd.grad(values, leaves, [torch.full_like(value, d) for value in values], retain_graph=True)) for d in scales
    ]
    return [value.detach() for value in values], gradients


def of_the_tap(losses: Losses, case: dict[str, Any], backend: str, d: float) -> list[Tensor]:
    """The gradients that leave the inline tap: those of the case that arrive and d times that of each loss."""
    set_backend(backend)
    leaves = [x.detach().requires_grad_() for x in case["student_features"]]
    arguments = {name: case[name] for name in ("teacher_gradients", "boxes", "image_size")}
    sides = teacher_sides(losses, case["teacher_features"], dict.fromkeys(losses, arguments))
    outputs = InlineTap.apply(InlinePlan(losses, sides, lambda *_: None), *leaves)
    return list(torch.autograd.grad(outputs, leaves, [*case["student_gradients"], *[leaves[0].new_full((), d)] * len(losses)]))


def value_error(got: Tensor, want: Tensor) -> float:
    """The largest error of a value relative to itself, where it is more than nothing; of no values 0."""
    return float(((got - want).abs() / want.clamp(min=NOTHING)).max()) if want.numel() else 0.0


def strides(x: Tensor) -> list[int]:
    """Of the axes with more than one element. Those of the others mean nothing: autograd's own sum of two gradients sets them anew."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(losses: dict[str, DistillationLoss], case: dict[str, Any], backend: str, poisoned: Poisoned = native_support.poisoned) -> float:
    """Holds values and every level's gradient against the reference; returns the largest error in units of what is allowed.

    poisoned: within it what the backend's kernels do not write is NaN
    """
    generator = torch.Generator().manual_seed(8)
    shape = len(case["student_features"]), case["student_features"][0].shape[0]
    upstream = [torch.rand(shape, generator=generator) + 0.5 if loss.reduction == "none" else torch.tensor(1.0) for loss in losses.values()]
    wanted, slopes = evaluated(losses, wide(case), "reference", upstream)
    # As AMP does, so that gradients in fp16 are neither subnormal nor infinite.
    largest = max((float(g.abs().max()) for g in slopes if g.numel()), default=0.0)
    scale = (
        2.0 ** (12 - math.ceil(math.log2(largest))) if largest and any(x.dtype == torch.float16 for x in case["student_features"]) else 1.0
    )
    with poisoned():
        values, gradients = evaluated(losses, case, backend, [scale * d for d in upstream])
    assert all(v.dtype == torch.float32 and v.shape == w.shape for v, w in zip(values, wanted, strict=True))
    for g, x in zip(gradients, case["student_features"], strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape and strides(g) == strides(torch.empty_like(x))
    errors = [value_error(v, w) / native_support.VALUE for v, w in zip(values, wanted, strict=True)]
    allowed = [gradient_tolerance(backend, g.dtype, g.numel()) for g in gradients]
    errors += [relative_error(g, scale * w) / most for g, w, most in zip(gradients, slopes, allowed, strict=True)]
    assert not any(math.isnan(e) for e in errors)
    return max(errors)
