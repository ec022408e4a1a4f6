"""The registered operators and what stands on them: schemas and fakes, compiling for any batch, refusals, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from all_kernels import on_gpu_kernels
from operator_samples import (
    DIFFERENTIABLE,
    OPTIONS,
    SAMPLES,
    arguments,
    checked,
    compiled,
    is_equal,
    programs,
    sample,
    second_derivative,
    term_calls,
    wanting,
    with_gradients,
)
from torch import Tensor

from kdkernels import GKDLoss, functional, set_backend
from kdkernels.ops.terms import MapTerm


@pytest.fixture(autouse=True)
def chosen(request: pytest.FixtureRequest) -> Iterator[None]:
    """Chooses the backend that a test is parametrised with."""
    if "backend" in request.fixturenames:
        set_backend(request.getfixturevalue("backend"))
    torch._dynamo.reset()
    yield
    set_backend("auto")


@on_gpu_kernels
@pytest.mark.parametrize(("layout", "images", "imitations"), SAMPLES)
def test_terms_operators_are_what_their_schemas_and_fakes_say(layout: str, images: int, imitations: int, backend: str, device: str) -> None:
    assert all(map(checked, term_calls(backend, layout, images, imitations, device)))


@on_gpu_kernels
def test_gradients_of_samples_with_gaps_are_dense(backend: str, device: str) -> None:
    features, batch = sample("sliced", 2, 1, device)
    assert [x.stride() for x in features] == [(6 * 5 * 14, 5 * 14, 14, 1), (6 * 6, 2 * 6, 3, 1)]
    rows, *rest = torch.ops.kdkernels.terms_with_gradient(backend, features, *batch.operands, *batch.options)
    later = torch.ops.kdkernels.terms_backward(backend, torch.ones_like(rows), rest[:4], [], features, *batch.operands, *batch.options)
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
    if kind == "words":
        return torch.empty(2, dtype=torch.int64, **meta)
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
    "channel_kl": (lambda: (large("features"), large("features"), 1.0, True), [flat(2, 300), flat(4 * CHANNELS)]),
    "channel_kl_backward": (
        lambda: (large("features"), large("features"), torch.empty(4 * CHANNELS, device="meta"), large("row"), 1.0),
        LIKE,
    ),
    "channel_mean": (lambda: (large("features"), True), [flat(CHANNELS)]),
    "channel_mean_backward": (lambda: (large("features"), large("vectors"), True), LIKE),
    "correlation": (lambda: (large("features"), large("features"), 1e-6), [flat(2, 300), flat(9 * (8 + 8))]),
    "correlation_backward": (
        lambda: (large("features"), large("features"), torch.empty(9 * (8 + 8), device="meta"), large("row"), large("row")),
        LIKE,
    ),
    "logit_bce": (lambda: (large("features"), large("features"), large("maps"), 0.5), [flat(2, 300)]),
    "logit_bce_backward": (lambda: (large("row"), large("features"), large("features"), None, 0.5), LIKE),
    "logit_kl": (lambda: (large("features"), large("features"), None, 2.0, 4), [flat(2, 300)]),
    "logit_kl_backward": (lambda: (large("row"), large("features"), large("features"), large("maps"), 2.0, 4), LIKE),
    "map_distance": (
        lambda: (large("maps"), large("maps"), large("maps"), *SIZES, *MAP_OPTIONS),
        [flat(2, 300), flat(2, 300, 8)],
    ),
    "map_distance_backward": (
        lambda: (large("maps"), large("maps"), None, large("state"), large("row"), *SIZES, *MAP_OPTIONS),
        [flat(PIXELS)],
    ),
    "pool_weights": (lambda: (large("maps"), *SIZES, True), [flat(PIXELS)]),
    "pool_weights_backward": (lambda: (large("maps"), large("maps"), large("maps"), *SIZES, False), [flat(PIXELS)]),
    "random_mask": (lambda: (large("features"), large("words"), 2**31), LIKE),
    "shared_read": (lambda: (large("features"), large("vectors"), False, 0.5), [flat(PIXELS), flat(PIXELS), flat(CHANNELS)]),
    "spatial_pool": (lambda: (large("features"), large("maps")), [flat(CHANNELS)]),
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
    # What one backend alone has, tests/test_cuda_terms_persistent.py looks at.
    assert registered == {f"kdkernels::{name}" for name in (*OPERATORS, "terms_persistent")}


@on_gpu_kernels
@pytest.mark.parametrize("name", programs())
def test_one_graph_serves_all_batches(name: str, backend: str, device: str) -> None:
    program = programs()[name]
    run, graphs = compiled(program)
    for images in (2, 3):
        given = arguments(images, device)
        want = with_gradients(program, given)
        assert is_equal(with_gradients(run, given), want)
    assert len(graphs) == 1


@on_gpu_kernels
def test_sizes_that_are_all_unknown_compile_once(backend: str, device: str) -> None:
    program = programs()["gkd"]
    # More graphs than one are an error within.
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)
        for images in (3, 5):
            given = arguments(images, device)
            want = with_gradients(program, given)
            assert is_equal(with_gradients(compiled, given), want)


@on_gpu_kernels
def test_batches_that_nobody_announced_compile_a_second_graph_and_no_third(backend: str, device: str) -> None:
    program = programs()["fused"]
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(program, fullgraph=True, backend=counting)
    for images in (2, 3, 4, 5):
        assert compiled(arguments(images, device)).isfinite()
    assert len(graphs) == 2


@on_gpu_kernels
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name: str, backend: str, device: str) -> None:
    for upstream in (lambda value: value, torch.square):
        differentiate = second_derivative(name, arguments(2, device), upstream)
        with pytest.raises(RuntimeError) as caught:
            differentiate()
        assert "twice" in str(caught.value)


@on_gpu_kernels
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_teacher_may_run_in_inference_mode(name: str, backend: str, device: str) -> None:
    given = arguments(2, device)
    leaves = [x.requires_grad_() for x in given["student_features"]]
    with torch.inference_mode():
        teacher = [x.clone() for x in given["teacher_features"]]
    found = [torch.autograd.grad(DIFFERENTIABLE[name](leaves, t), leaves) for t in (given["teacher_features"], teacher)]
    assert teacher[0].is_inference() and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@on_gpu_kernels
@pytest.mark.parametrize("part", ["teacher", "weights", "factor", "second order"])
def test_gradients_of_constants_are_the_reference_s(part: str, backend: str, device: str) -> None:
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
        f"backend {backend!r} cannot run {primitive}: the teacher's features or the weights require a gradient, which only the reference "
        "gives; choose 'auto' or 'reference'"
    )
    set_backend("auto")
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(value().sum(), sought))


@on_gpu_kernels
def test_losses_take_a_teacher_that_is_being_trained(backend: str, device: str) -> None:
    given = arguments(2, device)
    teacher = wanting(given["teacher_features"])
    values = [with_gradients(programs()["fused"], {**given, "teacher_features": t}) for t in (given["teacher_features"], teacher)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert all(x.grad is None for x in teacher)


@on_gpu_kernels
@pytest.mark.parametrize("name", programs())
def test_autocast_changes_nothing(name: str, backend: str, device: str) -> None:
    given = arguments(2, device)
    want = with_gradients(programs()[name], given)
    with torch.autocast(device, torch.bfloat16):
        got = with_gradients(programs()[name], given)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
