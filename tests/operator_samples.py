"""Calls of the registered operators, and programs that compile, for the tests of every backend that has fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from levels import LAYOUTS, pyramid, relative_error
from torch import Tensor

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, functional
from kdkernels.ops.terms import AttentionTerm, ImitationTerm, MapTerm
from kdkernels.term_batches import Batch, batches

SHAPES = [(2, 6, 5, 7), (2, 3, 2, 3)]
IMAGE = (56, 72)
OPTIONS = ("abs", "relu", "minmax", "l1", 1e-6, "relative", 1.0, "nhw")
#: Layouts, numbers of images and of imitations of the samples to call the operators with.
SAMPLES = [("contiguous", 2, 1), ("channels_last", 2, 1), ("channels_last", 2, 2), ("sliced", 2, 1), ("sliced", 2, 2), ("contiguous", 0, 1)]
#: test_autograd_registration asks for an autograd kernel, which these have not: they are called below autograd, in a Function.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
Call = tuple[Any, tuple[Any, ...]]


def laid_out(levels: list[Tensor], layout: str) -> list[Tensor]:
    """The same values contiguous, channels_last, or with gaps: between the rows of the first level, between the channels of the others."""
    if layout == "sliced":
        first, *others = levels
        return [torch.cat([first, first], 3)[..., : first.shape[3]], *(x.repeat_interleave(2, 1)[:, ::2] for x in others)]
    return [x.contiguous(memory_format=LAYOUTS[layout]) for x in levels]


def sample(layout: str, images: int, imitations: int, device: str) -> tuple[list[Tensor], Batch]:
    """Features, and one call that serves a map, an attention and one or two imitations."""
    shapes = [(images, *shape[1:]) for shape in SHAPES]
    features, teacher = (laid_out(pyramid(shapes, seed=seed, device=device), layout) for seed in (0, 1))
    maps = [pyramid([(n, h, w) for n, _, h, w in shapes], seed=seed, device=device) for seed in range(2, 7)]
    vectors = [pyramid([(n, c) for n, c, _, _ in shapes], seed=seed, device=device) for seed in range(7, 10)]
    wanted: list[Any] = [
        (MapTerm(vectors[0], maps[0], maps[1], *OPTIONS), 0.5),
        (AttentionTerm(maps[2], vectors[1], 0.5), torch.full((1, images), 2.0, device=device)),
        *((ImitationTerm(teacher, spatial, vectors[2]), 0.1) for spatial in maps[3 : 3 + imitations]),
    ]
    (batch,) = batches(features, wanted)
    return features, batch


def term_calls(backend: str, layout: str, images: int, imitations: int, device: str) -> list[Call]:
    """The operators of `terms` that serve such a sample, with the arguments of a call each."""
    features, batch = sample(layout, images, imitations, device)
    operators = torch.ops.kdkernels
    arguments = (backend, features, *batch.operands, *batch.options)
    rows, *saved = operators.terms(*arguments)
    grad, arriving = torch.full_like(rows, 2.0), laid_out([torch.ones_like(x) for x in features], layout)
    calls: list[Call] = [
        (operators.terms, arguments),
        (operators.terms_backward, (backend, grad, saved, arriving, *arguments[1:])),
    ]
    if imitations == 1:
        early = [torch.empty_like(x).fill_(1.0) for x in features]
        calls.append((operators.terms_with_gradient, arguments))
        calls.append((operators.terms_correct_gradient, (backend, early, grad, saved, *arguments[1:])))
    return calls


def checked(call: Call) -> bool:
    """Whether the operator does what its schema and its fake say, for these arguments and when it is traced with unknown sizes."""
    operator, arguments = call
    return torch.library.opcheck(operator.default, arguments, test_utils=CHECKS) == dict.fromkeys(CHECKS, "SUCCESS")


def arguments(images: int, device: str) -> dict[str, Any]:
    """All that the losses take. Boxes are padded: a list has as many tensors as images, each number of which is a graph of its own."""
    shapes = [(images, 3, 4, 5)]
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    found: dict[str, Any] = {name: pyramid(shapes, seed=seed, device=device) for seed, name in enumerate(names)}
    corners = torch.tensor([[8.0, 10.0, 50.0, 40.0], [3.3, 20.0, 30.0, 55.0]], device=device)
    found["boxes"] = (corners.repeat(images, 1, 1), torch.full((images,), 2, device=device))
    return {**found, "teacher_losses": torch.linspace(0, 2, images, device=device)[None]}


def primitives(given: dict[str, Any]) -> Tensor:
    """A number from every primitive."""
    student, teacher = given["student_features"], given["teacher_features"]
    weights = functional.channel_mean(given["student_gradients"], "abs")
    own, low, high = functional.weighted_channel_sum(student, weights)
    other, _, _ = functional.shared_read(teacher, weights)
    spatial, channel = functional.attention(student)
    masks = functional.box_mask(given["boxes"], IMAGE, [(4, 5)])
    masked = functional.random_mask(student, torch.ones(2, dtype=torch.int64, device=student[0].device), 0.5)
    values = [
        functional.spatial_pool(masked, own, "softmax")[0],
        functional.map_distance(own, other, spatial=masks),
        functional.feature_imitation(student, teacher, masks, weights),
        functional.terms(student, [(MapTerm(weights, other, None, *OPTIONS), 1.0), (AttentionTerm(masks, weights, 0.5), 0.3)])[1],
        functional.channel_mean(student)[0],
        functional.logit_bce(student, teacher, masks, 1.0),
        functional.logit_kl(student, teacher, masks, 2.0, 3),
        functional.channel_kl(student, teacher, 2.0),
        functional.correlation(student, teacher),
    ]
    parts = [*values, *(b - a for a, b in zip(low, high, strict=True)), *(x.square() for x in (*spatial, *channel))]
    return sum(part.sum() for part in parts) + functional.normalize_map(own[0]).sum()


def programs() -> dict[str, Callable[[dict[str, Any]], Tensor]]:
    """What is compiled, with losses that no run has seen."""
    gkd, aid = GKDLoss(), AIDLoss(BMFILoss())
    fused = FusedLoss({"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.5, gamma=0.3), "aid": AIDLoss(BMFILoss(alpha=0.5))})
    four = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    return {
        "fused": lambda given: sum(fused(**given, image_size=IMAGE).values()),
        "gkd": lambda given: gkd(*(given[name] for name in four)),
        "aid": lambda given: aid(*(given[k] for k in (*four[:2], "boxes")), IMAGE, teacher_losses=given["teacher_losses"]),
        "primitives": primitives,
    }


def with_gradients(program: Callable[[dict[str, Any]], Tensor], given: dict[str, Any]) -> list[Tensor]:
    """The value and its gradients. What is compiled is told that the number of images will change."""
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    losses = given["teacher_losses"]
    torch._dynamo.mark_dynamic(losses, 1)
    for x in (x for value in (leaves, *given.values()) if value is not losses for x in value):
        torch._dynamo.mark_dynamic(x, 0)
    value = program({**given, "student_features": leaves})
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def is_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Compiled values come from another pass than early gradients' values, in another order of summation."""
    return all(a.shape == b.shape and relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def compiled(program: Callable[[dict[str, Any]], Tensor]) -> tuple[Callable[[dict[str, Any]], Tensor], list[Any]]:
    """The program as one graph, forward and backward traced, and the list that every graph is added to."""
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(program, fullgraph=True, backend=counting), graphs


#: Each of the features x, with a gradient that is not constant.
DIFFERENTIABLE: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "channel_mean": lambda x, t: functional.channel_mean(x, "abs")[0].square().sum(),
    "weighted_channel_sum": lambda x, t: functional.weighted_channel_sum(x, [a[:, :, 0, 0] for a in t])[0][0].square().sum(),
    "attention": lambda x, t: functional.attention(x)[0][0].square().sum(),
    "logit_bce": lambda x, t: functional.logit_bce(x, t, None, 1.0).sum(),
    "logit_kl": lambda x, t: functional.logit_kl(x, t, [a[:, 0] for a in t], 2.0).sum(),
    "random_mask": lambda x, t: functional.random_mask(x, torch.ones(2, dtype=torch.int64, device=x[0].device), 0.5)[0].square().sum(),
    "spatial_pool": lambda x, t: functional.spatial_pool(x, [a[:, 0] for a in t], "softmax")[0].square().sum(),
    "map_distance": lambda x, t: functional.map_distance([a[:, 0] for a in x], [a[:, 0] for a in t], distance="mse").sum(),
    "feature_imitation": lambda x, t: functional.feature_imitation(x, t).sum(),
    "channel_kl": lambda x, t: functional.channel_kl(x, t).sum(),
    "correlation": lambda x, t: functional.correlation(x, t).sum(),
    "fused": lambda x, t: programs()["fused"]({**arguments(2, x[0].device.type), "student_features": x, "teacher_features": t}),
}


def second_derivative(name: str, given: dict[str, Any], upstream: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    """Takes what is in DIFFERENTIABLE once; returns what tries to differentiate the gradient."""
    leaves = [x.requires_grad_() for x in given["student_features"]]
    value = DIFFERENTIABLE[name](leaves, given["teacher_features"])
    gradients = torch.autograd.grad(upstream(value), leaves, create_graph=True)
    # A summand that has a second derivative must not hide that the loss has none.
    penalty = sum((g + x.square()).square().sum() for g, x in zip(gradients, leaves, strict=True))
    return lambda: torch.autograd.grad(penalty, leaves)


def wanting(levels: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in levels]
