"""The registered operators and what stands on them: schemas and fakes, compiling for any batch, refusals, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import DEVICES, pyramid, relative_error

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, functional, set_backend
from kdkernels.ops.terms import AttentionTerm, ImitationTerm, MapTerm
from kdkernels.term_batches import Batch, batches

SHAPES = [(2, 6, 5, 7), (2, 3, 2, 3)]
IMAGE = (56, 72)
OPTIONS = ("abs", "relu", "minmax", "l1", 1e-6, "relative", 1.0, "nhw")


@pytest.fixture(autouse=True)
def chosen_triton() -> Iterator[None]:
    set_backend("triton")
    torch._dynamo.reset()
    yield
    set_backend("auto")


def laid_out(levels: list[Tensor], layout: str) -> list[Tensor]:
    """The same values contiguous, channels_last, or with gaps: between the rows of the first level, between the channels of the others."""
    if layout == "sliced":
        first, *others = levels
        return [torch.cat([first, first], 3)[..., : first.shape[3]], *(x.repeat_interleave(2, 1)[:, ::2] for x in others)]
    return [x.contiguous(memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)) for x in levels]


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("layout", "images", "imitations"),
    [("contiguous", 2, 1), ("channels_last", 2, 1), ("channels_last", 2, 2), ("sliced", 2, 1), ("sliced", 2, 2), ("contiguous", 0, 1)],
)
def test_terms_operators_are_what_their_schemas_and_fakes_say(layout: str, images: int, imitations: int, device: str) -> None:
    features, batch = sample(layout, images, imitations, device)
    operators = torch.ops.kdkernels
    arguments = (features, *batch.operands, *batch.options)
    rows, *saved = operators.terms("triton", *arguments)
    grad, arriving = torch.full_like(rows, 2.0), laid_out([torch.ones_like(x) for x in features], layout)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.terms, arguments),
        (operators.terms_backward, (grad, saved, arriving, *arguments)),
    ]
    if imitations == 1:
        calls.append((operators.terms_with_gradient, arguments))
        calls.append((operators.terms_correct_gradient, ([torch.empty_like(x).fill_(1.0) for x in features], grad, saved, *arguments)))
    # test_autograd_registration asks for an autograd kernel, which these have not: they are called below autograd, in a Function.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, args in calls:
        done = torch.library.opcheck(operator.default, ("triton", *args), test_utils=checks)
        assert done == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_samples_with_gaps_are_dense(device: str) -> None:
    features, batch = sample("sliced", 2, 1, device)
    assert [x.stride() for x in features] == [(6 * 5 * 14, 5 * 14, 14, 1), (6 * 6, 2 * 6, 3, 1)]
    rows, *rest = torch.ops.kdkernels.terms_with_gradient("triton", features, *batch.operands, *batch.options)
    later = torch.ops.kdkernels.terms_backward("triton", torch.ones_like(rows), rest[:4], [], features, *batch.operands, *batch.options)
    dense = [(6 * 5 * 7, 5 * 7, 7, 1), (3 * 6, 6, 3, 1)]
    assert [x.stride() for x in rest[4:]] == [x.stride() for x in later] == dense


#: Beyond 2^31 elements a level, and pixels in all.
LARGE = [(300, 8, 4000, 3000), (300, 8, 2000, 1500)]
PIXELS, CHANNELS = 300 * (4000 * 3000 + 2000 * 1500), 300 * (8 + 8)
#: Of the first, which is channels_last, and of the second, a slice with gaps: what is made like it is dense.
STRIDES = [(8 * 12_000_000, 1, 8 * 3000, 8), (8 * 3_000_000, 3_000_000, 1500, 1)]
LIKE = [(shape, torch.bfloat16, strides) for shape, strides in zip(LARGE, STRIDES, strict=True)]


def flat(*shape: int) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """Shape, type and strides of a contiguous fp32 result."""
    return shape, torch.float32, torch.empty(shape, device="meta").stride()


def large(kind: str) -> Any:
    """Arguments without memory."""
    meta = {"device": "meta"}
    if kind == "features":
        first = torch.empty(LARGE[0], dtype=torch.bfloat16, memory_format=torch.channels_last, **meta)
        return [first, torch.empty(*LARGE[1][:3], 2 * LARGE[1][3], dtype=torch.bfloat16, **meta)[..., : LARGE[1][3]]]
    sizes = {
        "maps": (PIXELS,),
        "vectors": (CHANNELS,),
        "rows": (5, 2, 300),
        "row": (2, 300),
        "state": (2, 300, 8),
        "states": (3, 2, 300, 8),
    }
    if kind == "boxes":
        return torch.empty(300, 7, 4, **meta)
    return torch.empty(0, **meta) if kind == "none" else torch.empty(sizes[kind], **meta)


def terms_arguments() -> tuple[Any, ...]:
    """The operands of a map, an attention and two imitations, and their options."""
    maps, vectors = large("maps"), large("vectors")
    operands = (large("features"), vectors, maps, maps, maps, vectors, vectors, [maps, maps], large("rows"))
    return *operands, False, "abs", "minmax", "minmax", "l1", 1e-6, True, 1.0, "nhw", 0.5, 2, [1.0] * 5


SIZES = (300, [12_000_000, 3_000_000])
MAP_OPTIONS = ("minmax", "minmax", "l1", 1e-6, True, 0.5, "nhw")
SAVED = [flat(PIXELS), flat(PIXELS), flat(CHANNELS), flat(3, 2, 300, 8)]
#: Operator -> its arguments, and shape, type and strides of its results.
OPERATORS: dict[str, tuple[Callable[[], tuple[Any, ...]], list[Any]]] = {
    "attention": (lambda: (large("features"), 0.5), [flat(PIXELS), flat(CHANNELS)]),
    "attention_backward": (
        lambda: (large("features"), large("maps"), large("vectors"), large("maps"), large("vectors"), 0.5),
        LIKE,
    ),
    "box_mask": (
        lambda: (large("boxes"), large("row")[0].int(), [64.0, 96.0], [4000, 3000, 2000, 1500], "gaussian", 2.0, False, True, True),
        [flat(PIXELS)],
    ),
    "channel_mean": (lambda: (large("features"), True), [flat(CHANNELS)]),
    "channel_mean_backward": (lambda: (large("features"), large("vectors"), True), LIKE),
    "map_distance": (
        lambda: (large("maps"), large("maps"), large("maps"), *SIZES, *MAP_OPTIONS),
        [flat(2, 300), flat(2, 300, 8)],
    ),
    "map_distance_backward": (
        lambda: (large("maps"), large("maps"), None, large("state"), large("row"), *SIZES, *MAP_OPTIONS),
        [flat(PIXELS)],
    ),
    "shared_read": (lambda: (large("features"), large("vectors"), False, 0.5), [flat(PIXELS), flat(PIXELS), flat(CHANNELS)]),
    "terms": (lambda: (large("features"), *terms_arguments()), [flat(5, 2, 300), *SAVED]),
    "terms_backward": (
        lambda: (large("rows"), [large(k) for k in ("maps", "maps", "vectors", "states")], [], large("features"), *terms_arguments()),
        LIKE,
    ),
    "terms_with_gradient": (lambda: (large("features"), *terms_arguments()), [flat(5, 2, 300), *SAVED, *LIKE]),
    "terms_correct_gradient": (
        lambda: (
            large("features"),
            large("rows"),
            [large(k) for k in ("maps", "maps", "vectors", "states")],
            large("features"),
            *terms_arguments(),
        ),
        [],
    ),
    "weighted_channel_sum": (lambda: (large("features"), large("vectors"), True), [flat(PIXELS)]),
    "weighted_channel_sum_backward": (lambda: (large("features"), large("vectors"), large("maps"), True), LIKE),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_count_beyond_2_to_the_31(name: str) -> None:
    arguments, want = OPERATORS[name]
    # No backend is called so: a kernel that was asked for would not be found.
    found = getattr(torch.ops.kdkernels, name)("nobody", *arguments())
    results = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
    assert [(tuple(x.shape), x.dtype, x.stride()) for x in results] == want
    assert all(x.is_meta for x in results)


def test_every_operator_has_a_fake_that_was_looked_at() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdkernels::")}
    assert registered == {f"kdkernels::{name}" for name in OPERATORS}


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
    values = [
        functional.map_distance(own, other, spatial=masks),
        functional.feature_imitation(student, teacher, masks, weights),
        functional.terms(student, [(MapTerm(weights, other, None, *OPTIONS), 1.0), (AttentionTerm(masks, weights, 0.5), 0.3)])[1],
        functional.channel_mean(student)[0],
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", programs())
def test_one_graph_serves_all_batches(name: str, device: str) -> None:
    program = programs()[name]
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(program, fullgraph=True, backend=counting)
    for images in (2, 3):
        given = arguments(images, device)
        want = with_gradients(program, given)
        assert is_equal(with_gradients(compiled, given), want)
    assert len(graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_that_are_all_unknown_compile_once(device: str) -> None:
    program = programs()["gkd"]
    # More graphs than one are an error within.
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)
        for images in (3, 5):
            given = arguments(images, device)
            want = with_gradients(program, given)
            assert is_equal(with_gradients(compiled, given), want)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_nobody_announced_compile_a_second_graph_and_no_third(device: str) -> None:
    program = programs()["fused"]
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(program, fullgraph=True, backend=counting)
    for images in (2, 3, 4, 5):
        assert compiled(arguments(images, device)).isfinite()
    assert len(graphs) == 2


#: Each of the features x, with a gradient that is not constant.
DIFFERENTIABLE: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "channel_mean": lambda x, t: functional.channel_mean(x, "abs")[0].square().sum(),
    "weighted_channel_sum": lambda x, t: functional.weighted_channel_sum(x, [a[:, :, 0, 0] for a in t])[0][0].square().sum(),
    "attention": lambda x, t: functional.attention(x)[0][0].square().sum(),
    "map_distance": lambda x, t: functional.map_distance([a[:, 0] for a in x], [a[:, 0] for a in t], distance="mse").sum(),
    "feature_imitation": lambda x, t: functional.feature_imitation(x, t).sum(),
    "fused": lambda x, t: programs()["fused"]({**arguments(2, x[0].device.type), "student_features": x, "teacher_features": t}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name: str, device: str) -> None:
    given = arguments(2, device)
    leaves = [x.requires_grad_() for x in given["student_features"]]
    for upstream in (lambda value: value, torch.square):
        value = DIFFERENTIABLE[name](leaves, given["teacher_features"])
        gradients = torch.autograd.grad(upstream(value), leaves, create_graph=True)
        # A summand that has a second derivative must not hide that the loss has none.
        penalty = sum((g + x.square()).square().sum() for g, x in zip(gradients, leaves, strict=True))
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(penalty, leaves)
        assert "twice" in str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_teacher_may_run_in_inference_mode(name: str, device: str) -> None:
    given = arguments(2, device)
    leaves = [x.requires_grad_() for x in given["student_features"]]
    with torch.inference_mode():
        teacher = [x.clone() for x in given["teacher_features"]]
    found = [torch.autograd.grad(DIFFERENTIABLE[name](leaves, t), leaves) for t in (given["teacher_features"], teacher)]
    assert teacher[0].is_inference() and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def wanting(levels: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in levels]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["teacher", "weights", "factor", "second order"])
def test_gradients_of_constants_are_the_reference_s(part: str, device: str) -> None:
    given = arguments(2, device)
    student, teacher = given["student_features"], given["teacher_features"]
    sought, primitive = wanting(teacher), "terms"
    if part == "teacher":
        primitive = "feature_imitation"
        value = lambda: functional.feature_imitation(student, sought)  # noqa: E731
    elif part == "second order":
        program = GKDLoss(grad_mode="second_order")
        slopes = torch.autograd.grad(sum(x.square().sum() for x in sought), sought, create_graph=True)
        value = lambda: program(student, teacher, slopes, given["teacher_gradients"])  # noqa: E731
    else:
        weights, maps = [x[:, :, 0, 0] for x in teacher], [x[:, 0] for x in teacher]
        factor = torch.ones(1, 2, device=device)
        if part == "weights":
            sought = weights = wanting(weights)
        else:
            sought = [factor.requires_grad_()]
        value = lambda: functional.terms(student, [(MapTerm(weights, maps, None, *OPTIONS), factor)])[0]  # noqa: E731
    with pytest.raises(RuntimeError) as caught:
        value()
    assert str(caught.value) == (
        f"backend 'triton' cannot run {primitive}: the teacher's features or the weights require a gradient, which only the reference "
        "gives; choose 'auto' or 'reference'"
    )
    set_backend("auto")
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(value().sum(), sought))


@pytest.mark.parametrize("device", DEVICES)
def test_losses_take_a_teacher_that_is_being_trained(device: str) -> None:
    given = arguments(2, device)
    teacher = wanting(given["teacher_features"])
    values = [with_gradients(programs()["fused"], {**given, "teacher_features": t}) for t in (given["teacher_features"], teacher)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert all(x.grad is None for x in teacher)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", programs())
def test_autocast_changes_nothing(name: str, device: str) -> None:
    given = arguments(2, device)
    want = with_gradients(programs()[name], given)
    with torch.autocast(device, torch.bfloat16):
        got = with_gradients(programs()[name], given)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
