"""`terms`: several terms of distillation losses from the student's features, in as few passes over them as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..library import define, keep, kept, once_differentiable
from ..pyramid import Pyramid, as_pyramid, in_graph
from ..reference.terms import VJP, AttentionTerm, Factor, ImitationTerm, MapTerm, Term
from ..reference.terms import terms as reference
from ..reference.terms import terms_vjp as reference_vjp
from ..term_batches import Batch, batches

__all__ = ["AttentionTerm", "ImitationTerm", "MapTerm", "Term", "terms", "terms_vjp"]

Wanted = Sequence[tuple[Term, Factor]]


def terms(features: Pyramid, wanted: Wanted) -> list[Tensor]:
    """Every wanted term times its factor, (L, N), fp32 (fp64 for fp64), from the student's features, a pyramid of (N, C, H, W).

    wanted: terms, each with a number or a tensor that broadcasts to (L, N). Shapes are the callers' to check.
    What the terms have in common is computed once, and their gradients are written together.
    """
    levels, _ = as_pyramid("features", features)
    return backend.call("terms", levels, levels, wanted)


def terms_vjp(features: Pyramid, wanted: Wanted) -> tuple[list[Tensor], VJP]:
    """As `terms`, without a graph, and the function from upstream and arriving gradients to gradients of the features.

    It is what a backward pass needs that computes a loss and adds its gradient to the one that passes: see
    `kdkernels.reference.terms.terms_vjp`.
    """
    levels, _ = as_pyramid("features", features)
    return backend.call("terms_vjp", levels, levels, wanted)


#: Packed fp32 tensors, but t; `factors` (rows, L, N), None where all are in `scales`.
_OPERANDS = (
    "Tensor[] t, Tensor? weights, Tensor? map_t, Tensor? map_spatial, Tensor? attention_spatial, Tensor? attention_channel, "
    "Tensor? channel, Tensor[] spatial, Tensor? factors"
)
_OPTIONS = (
    "bool absolute, str rectify, str normalize, str normalize_t, str distance, float eps, bool relative, float map_temperature, "
    "str average, float temperature, int imitations, float[] scales"
)
_OPERAND_COUNT = 9
#: Results of the forward besides the rows: what the backward reads again.
_SAVED = 4


def _fake(features: list[Tensor], *args: Any) -> list[Tensor]:
    _, weights, _, _, attention, *_ = args[:_OPERAND_COUNT]
    images = features[0].shape[0]
    pixels, channels = (images * sum(sizes) for sizes in ([x.shape[2] * x.shape[3] for x in features], [x.shape[1] for x in features]))

    def buffer(*shape: int) -> Tensor:
        return features[0].new_empty(shape, dtype=torch.float32)

    return [
        buffer(len(args[-1]), len(features), images),
        buffer(0 if weights is None else pixels),
        buffer(0 if attention is None else pixels),
        buffer(0 if attention is None else channels),
        buffer(3, len(features), images, 8),
    ]


def _empty_like(features: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in features]


_forward = define("terms", f"(Tensor[] s, {_OPERANDS}, {_OPTIONS}) -> Tensor[]", _fake)
_backward = define(
    "terms_backward",
    f"(Tensor grad, Tensor[] saved, Tensor[] arriving, Tensor[] s, {_OPERANDS}, {_OPTIONS}) -> Tensor[]",
    lambda grad, saved, arriving, features, *args: _empty_like(features),
)
_with_gradient = define(
    "terms_with_gradient",
    f"(Tensor[] s, {_OPERANDS}, {_OPTIONS}) -> Tensor[]",
    lambda features, *args: [*_fake(features, *args), *_empty_like(features)],
    "terms",
)
_correct_gradient = define(
    "terms_correct_gradient",
    f"(Tensor(a!)[] gradients, Tensor grad, Tensor[] saved, Tensor[] s, {_OPERANDS}, {_OPTIONS}) -> ()",
    lambda *args: None,
    "terms",
)


class _Terms(torch.autograd.Function):
    """The rows of one batch, (rows, L, N).

    With `early` the gradient for an upstream gradient of 1 is written in the forward pass, in the same read of the features as the values.
    The first backward pass hands it out, made right on the device if the upstream gradient is another; a second one computes anew, so that
    nothing that was handed out ever changes.
    """

    @staticmethod
    def forward(ctx: Any, name: str, batch: Batch, early: bool, *features: Tensor) -> Tensor:
        run = _with_gradient if early else _forward
        rows, *rest = run(name, list(features), *batch.operands, *batch.options)
        ctx.name, ctx.options, ctx.levels, ctx.layout = name, batch.options, len(features), layout(batch.operands)
        keep(ctx, *features, *rest[:_SAVED], *flat(batch.operands))
        ctx.early = rest[_SAVED:]
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *gradients_of(ctx, grad))


def gradients_of(ctx: Any, grad: Tensor) -> list[Tensor]:
    """The features' gradients for that of the rows, from what a forward of `_Terms` has left in its context."""
    tensors = kept(ctx)
    features, saved, rest = tensors[: ctx.levels], tensors[ctx.levels : ctx.levels + _SAVED], tensors[ctx.levels + _SAVED :]
    operands = _unflat(rest, ctx.layout)
    gradients, ctx.early = ctx.early, []
    if gradients:
        _correct_gradient(ctx.name, gradients, grad.contiguous(), saved, features, *operands, *ctx.options)
        return gradients
    return _backward(ctx.name, grad.contiguous(), saved, [], features, *operands, *ctx.options)


def layout(operands: tuple[Any, ...]) -> tuple[int | None, ...]:
    """For each operand the number of tensors of a list, -1 for a tensor, None for none."""
    return tuple(len(x) if isinstance(x, list) else None if x is None else -1 for x in operands)


def flat(operands: tuple[Any, ...]) -> list[Tensor]:
    return [x for operand in operands if operand is not None for x in (operand if isinstance(operand, list) else [operand])]


def _unflat(tensors: list[Tensor], layout: tuple[int | None, ...]) -> tuple[Any, ...]:
    operands: list[Any] = []
    for size in layout:
        count = 0 if size is None else abs(size)
        taken, tensors = tensors[:count], tensors[count:]
        operands.append(None if size is None else taken[0] if size < 0 else taken)
    return tuple(operands)


def fused(name: str, features: list[Tensor], wanted: Wanted) -> list[Tensor]:
    """The terms by the kernels of backend `name`."""
    found: dict[int, Tensor] = {}
    for batch in batches(features, wanted):
        mine = batch.of(features)
        if in_graph(mine):
            rows = _Terms.apply(name, batch, _early(batch, mine), *mine)
        else:
            rows = _forward(name, mine, *batch.operands, *batch.options)[0]
        found |= batch.values(rows.unbind(0), features)
    return _complete(found, features, wanted)


def _complete(found: dict[int, Tensor], features: Sequence[Tensor], wanted: Wanted) -> list[Tensor]:
    """The values in the order of the wanted list, 0 for those that no batch serves."""
    shape = (len(features), features[0].shape[0])
    return [found[place] if place in found else features[0].new_zeros(shape, dtype=torch.float32) for place in range(len(wanted))]


def _early(batch: Batch, features: Sequence[Tensor]) -> bool:
    """Whether the gradient is made in the forward pass.

    That saves a read where the values come from the student and the teacher together; fp16, whose gradients vanish without the scale that
    arrives with the upstream gradient, and rows that will not see an upstream gradient of 1 are left out. A compiled graph cannot know
    which backward pass is the first.
    """
    worthwhile = batch.one_imitation and not batch.outside
    exact = all(x.dtype != torch.float16 for x in features)
    return worthwhile and exact and not torch.compiler.is_compiling()


def fused_vjp(name: str, features: list[Tensor], wanted: Wanted) -> tuple[list[Tensor], VJP]:
    """`terms_vjp` by the kernels of backend `name`: the arriving gradients are added in the write of the first batch."""
    with torch.no_grad():
        made = batches(features, wanted)
        results = [_forward(name, batch.of(features), *batch.operands, *batch.options) for batch in made]
    found: dict[int, Tensor] = {}
    for batch, (rows, *_) in zip(made, results, strict=True):
        found |= batch.values(rows.unbind(0), features)

    def vjp(upstream: Sequence[Tensor], arriving: Sequence[Tensor | None]) -> list[Tensor | None]:
        gradients = list(arriving)
        for batch, (_, *saved) in zip(made, results, strict=True):
            mine, given = batch.of(features), batch.of(gradients)
            if all(g is None for g in given):
                given = []
            given = [torch.zeros_like(x) if g is None else g for g, x in zip(given, mine, strict=False)]
            written = _backward(name, batch.upstream(upstream), saved, given, mine, *batch.operands, *batch.options)
            for i, gradient in zip(batch.levels, written, strict=True):
                gradients[i] = gradient
        return gradients

    return _complete(found, features, wanted), vjp


def refuses(features: Sequence[Tensor], wanted: Wanted) -> str:
    """Why the fused kernels cannot compute these terms; "" when they can."""
    maps = [term for term, _ in wanted if isinstance(term, MapTerm)]
    if any(w is not None and w.dim() == 4 for term in maps for w in term.weights):
        return "a weight per element is in the reference only"
    parts = [part for term, factor in wanted for part in (*term, [factor]) if isinstance(part, (list, tuple))]
    constants = [x for part in parts for x in part if isinstance(x, Tensor)]
    return backend.refuses_constants(constants, features[0].device, "the teacher's features or the weights")


backend.register("reference", "terms", reference)
backend.register("reference", "terms_vjp", reference_vjp)
backend.register_fused("terms", fused, refuses)
backend.register_fused("terms_vjp", fused_vjp, refuses)
