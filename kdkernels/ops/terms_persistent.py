"""`terms_persistent`: a map's distance, an attention's distance and an imitation, from features and gradients of both networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..library import define, keep, once_differentiable
from ..pyramid import in_graph, pack, products
from ..reference.terms import AttentionTerm, Factor, ImitationTerm, MapTerm
from ..term_batches import Options
from .channel_mean import channel_mean
from .shared_read import shared_read
from .terms import flat, gradients_of, layout, terms

#: Levels of one launch.
MOST_LEVELS = 8


class PersistentOperands(NamedTuple):
    """s, t: features, gradients_s, gradients_t: gradients of student and teacher, levels (N, C, H, W) of one shape;   masks: (N, H, W) a
    level, with which the teacher's attention makes the imitation's spatial weights
    """

    s: list[Tensor]
    t: list[Tensor]
    gradients_s: list[Tensor]
    gradients_t: list[Tensor]
    masks: list[Tensor]


class PersistentOptions(NamedTuple):
    """Of `MapTerm`, with signed channel means as weights of raw features;   temperature: of the attention"""

    rectify: str
    distance: str
    eps: float
    eps_mode: str
    average: str
    temperature: float


def terms_persistent(operands: PersistentOperands, factors: Sequence[Factor], options: PersistentOptions) -> list[Tensor]:
    """The map's distance, the attention's and the imitation's value, each (L, N) fp32, times their three factors, which are numbers or
    tensors that broadcast to (L, N).

    The teacher's map and attention are made of t and gradients_t. Shapes are the callers' to check.
    """
    return backend.call("terms_persistent", operands.s, operands, factors, options)


def by_passes(operands: PersistentOperands, factors: Sequence[Factor], options: PersistentOptions) -> list[Tensor]:
    """The same from the library's other primitives."""
    s, t, gradients_s, gradients_t, masks = operands
    with torch.no_grad():
        weights = [channel_mean(gradients, "signed") for gradients in (gradients_s, gradients_t)]
        maps, spatial, channel = shared_read(t, weights[1], "raw", options.rectify, options.temperature)
    map_options = ("raw", options.rectify, "minmax", options.distance, options.eps, options.eps_mode, 1.0, options.average)
    made = (
        MapTerm(weights[0], maps, None, *map_options),
        AttentionTerm(spatial, channel, options.temperature),
        ImitationTerm(t, products(masks, spatial), channel),
    )
    return terms(s, list(zip(made, factors, strict=True)))


_ARGUMENTS = "str rectify, str distance, float eps, bool relative, str average, float temperature, float[] scales"
#: Packed results besides the rows: what `terms_backward` takes as saved, and the operands that are made on the way.
_SAVED, _OPERANDS = 4, 5


def _fake(s: list[Tensor], *args: Any) -> list[Tensor]:
    images, levels = s[0].shape[0], len(s)
    pixels, channels = images * sum(x.shape[2] * x.shape[3] for x in s), images * sum(x.shape[1] for x in s)
    shapes: list[tuple[int, ...]] = [(4, levels, images), (pixels,), (pixels,), (channels,), (3, levels, images, 8)]
    shapes += [(channels,), (pixels,), (pixels,), (channels,), (pixels,)]
    return [*(s[0].new_empty(shape, dtype=torch.float32) for shape in shapes), *(torch.empty_like(x) for x in s)]


_run = define(
    "terms_persistent",
    f"(Tensor[] s, Tensor[] t, Tensor[] gradients_s, Tensor[] gradients_t, Tensor mask, Tensor? factors, {_ARGUMENTS}) -> Tensor[]",
    _fake,
)


class _Persistent(torch.autograd.Function):
    """The rows (4, L, N). The gradient for an upstream gradient of 1 is made with them, as by `ops.terms` with an early gradient."""

    @staticmethod
    def forward(
        ctx: Any, name: str, options: Options, mask: Tensor, factors: Tensor | None, levels: int, *tensors: Tensor
    ) -> Tensor:
        s, t, gradients_s, gradients_t = (list(tensors[k * levels : (k + 1) * levels]) for k in range(4))
        o = options
        arguments = (o.rectify, o.distance, o.eps, o.relative, o.average, o.temperature, o.scales)
        rows, *rest = _run(name, s, t, gradients_s, gradients_t, mask, factors, *arguments)
        weights, map_t, spatial, channel, region = rest[_SAVED : _SAVED + _OPERANDS]
        operands = (t, weights, map_t, None, spatial, channel, channel, [region], factors)
        ctx.name, ctx.options, ctx.levels, ctx.layout = name, options, levels, layout(operands)
        keep(ctx, *s, *rest[:_SAVED], *flat(operands))
        ctx.early = rest[_SAVED + _OPERANDS :]
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*[None] * 5, *gradients_of(ctx, grad), *[None] * (3 * ctx.levels))


def fused(name: str, operands: PersistentOperands, factors: Sequence[Factor], options: PersistentOptions) -> list[Tensor]:
    """`terms_persistent` in one launch of backend `name`."""
    s, t, gradients_s, gradients_t, masks = operands
    # The attention's rows are two, over pixels and over channels.
    of_rows = [factors[0], factors[1], factors[1], factors[2]]
    shape = (len(s), s[0].shape[0])
    tensors = None
    if any(isinstance(factor, Tensor) for factor in factors):
        ones = s[0].new_ones((), dtype=torch.float32)
        tensors = torch.stack([(f.detach().float() if isinstance(f, Tensor) else ones).expand(shape) for f in of_rows])
    made = Options(
        rectify=options.rectify,
        normalize="minmax",
        normalize_t="minmax",
        distance=options.distance,
        eps=options.eps,
        relative=options.eps_mode == "relative",
        average=options.average,
        temperature=options.temperature,
        imitations=1,
        scales=[1.0 if isinstance(factor, Tensor) else float(factor) for factor in of_rows],
    )
    mask = pack([x.float() for x in masks])
    constants = [x.detach() for levels in (t, gradients_s, gradients_t) for x in levels]
    rows = _Persistent.apply(name, made, mask, tensors, len(s), *s, *constants)
    return [rows[0], rows[1] + rows[2], rows[3]]


def on_gpu(x: Tensor) -> bool:
    """Whether a launch can serve this tensor."""
    return x.is_cuda


def refuses(operands: PersistentOperands, factors: Sequence[Factor] = (), *options: Any) -> str:
    """Why one launch cannot serve these; "" when it can."""
    s, t, gradients_s, gradients_t, masks = operands
    if not on_gpu(s[0]):
        return f"one launch is for a GPU, the tensors are on {s[0].device}"
    if not in_graph(s) or torch.compiler.is_compiling():
        return "without a gradient, or compiled, the passes have less to do"
    if len(s) > MOST_LEVELS:
        return f"it takes at most {MOST_LEVELS} levels, got {len(s)}"
    everything = [x for levels in (s, t, gradients_s, gradients_t) for x in levels]
    if any(x.dtype != s[0].dtype for x in everything):
        return "features and gradients are not all of one type"
    # Factors are constants whatever they come from.
    constants = [*t, *gradients_s, *gradients_t, *masks, *(f.detach() for f in factors if isinstance(f, Tensor))]
    return backend.refuses_constants(constants, s[0].device, "the teacher's features, gradients, masks or factors")


backend.register("reference", "terms_persistent", by_passes)
backend.register("triton", "terms_persistent", by_passes)
# Not fp16, whose gradients vanish without the scale that arrives with the upstream gradient.
backend.register("native", "terms_persistent", lambda *args: fused("native", *args), refuses, frozenset({torch.float32, torch.bfloat16}))
