"""The operators of the native backend and what stands on them: schemas and fakes, compiling for any batch, refusals, autocast."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from levels import pyramid, relative_error
from native_support import needs_library
from operator_samples import (
    DIFFERENTIABLE,
    IMAGE,
    OPTIONS,
    SAMPLES,
    SHAPES,
    Call,
    arguments,
    checked,
    compiled,
    is_equal,
    laid_out,
    programs,
    second_derivative,
    term_calls,
    wanting,
    with_gradients,
)

from kdkernels import GKDLoss, backend, functional, set_backend
from kdkernels.ops.terms import MapTerm

pytestmark = needs_library


@pytest.fixture(autouse=True)
def chosen_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_fallbacks_told", set())
    set_backend("native")
    torch._dynamo.reset()
    yield
    set_backend("auto")


def calls(layout: str, images: int) -> list[Call]:
    """Every operator but those of `terms`, with the arguments of a call."""
    shapes = [(images, *shape[1:]) for shape in SHAPES]
    x, operators = laid_out(pyramid(shapes), layout), torch.ops.kdkernels
    other_x, of_level = laid_out(pyramid(shapes, seed=1), layout), sum(shape[1] for shape in shapes)
    channels, pixels = (sum(n * size for n, size in sizes) for sizes in ([s[:2] for s in shapes], [(n, h * w) for n, _, h, w in shapes]))
    vector, map_, other = torch.randn(channels), torch.randn(pixels), torch.rand(pixels)
    sizes = (images, [h * w for _, _, h, w in shapes], "minmax", "zscore", "smooth_l1", 1e-6, True, 0.5, "nhw")
    _, state = operators.map_distance("native", map_, other, None, *sizes)
    rows = torch.randn(len(shapes), images)
    boxes, counts = torch.tensor([[8.0, 10.0, 50.0, 40.0], [3.3, 20.0, 30.0, 55.0]]).repeat(images, 1, 1), torch.full((images,), 2)
    grids = [size for shape in shapes for size in shape[2:]]
    return [
        (operators.attention, ("native", x, 0.5)),
        (operators.attention_backward, ("native", x, map_.abs(), vector.abs(), other, vector, 0.5)),
        (operators.box_mask, ("native", boxes, counts, [56.0, 72.0], grids, "gaussian", 2.0, False, True, True)),
        (operators.channel_kl, ("native", x, other_x, 1.0, True)),
        (operators.channel_kl_backward, ("native", x, other_x, vector.repeat(4), torch.ones(len(shapes), images), 1.0)),
        (operators.channel_mean, ("native", x, True)),
        (operators.channel_mean_backward, ("native", x, vector, True)),
        (operators.correlation, ("native", x, other_x, 1e-6)),
        (operators.correlation_backward, ("native", x, other_x, torch.ones(9 * of_level), *[torch.ones(len(shapes), images)] * 2)),
        *(
            (operator, ("native", *grad, x, x, other, *options))
            for name, options in (("logit_bce", (1.0,)), ("logit_kl", (2.0, 1)))
            for operator, grad in ((getattr(operators, name), ()), (getattr(operators, f"{name}_backward"), (rows,)))
        ),
        (operators.map_distance, ("native", map_, other, None, *sizes)),
        (operators.map_distance_backward, ("native", map_, other, other, state, rows, *sizes)),
        (operators.pool_weights, ("native", map_, *sizes[:2], True)),
        (operators.pool_weights_backward, ("native", other, map_, other, *sizes[:2], False)),
        (operators.random_mask, ("native", x, torch.tensor([5, 1]), 2**31)),
        (operators.shared_read, ("native", x, vector, False, 0.5)),
        (operators.spatial_pool, ("native", x, other)),
        (operators.weighted_channel_sum, ("native", x, vector, True)),
        (operators.weighted_channel_sum_backward, ("native", x, vector, map_, False)),
    ]


@pytest.mark.parametrize(("layout", "images", "imitations"), SAMPLES)
def test_terms_operators_are_what_their_schemas_and_fakes_say(layout: str, images: int, imitations: int) -> None:
    assert all(map(checked, term_calls("native", layout, images, imitations, "cpu")))


@pytest.mark.parametrize("images", [2, 0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_operators_are_what_their_schemas_and_fakes_say(layout: str, images: int) -> None:
    assert all(map(checked, calls(layout, images)))


def test_every_operator_was_looked_at() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdkernels::")}
    looked_at = [*calls("contiguous", 2), *term_calls("native", "contiguous", 2, 1, "cpu")]
    # There is nothing like it for the CPU: tests/test_cuda_terms_persistent.py looks at it.
    of_cuda = {"kdkernels::terms_persistent"}
    assert registered == {operator.default._schema.name for operator, _ in looked_at} | of_cuda


@pytest.mark.parametrize("name", programs())
def test_one_graph_serves_all_batches(name: str) -> None:
    program = programs()[name]
    run, graphs = compiled(program)
    for images in (2, 3):
        given = arguments(images, "cpu")
        want = with_gradients(program, given)
        assert is_equal(with_gradients(run, given), want)
    assert len(graphs) == 1


def test_sizes_that_are_all_unknown_compile_once() -> None:
    program = programs()["gkd"]
    # More graphs than one are an error within.
    with torch._dynamo.config.patch(recompile_limit=1):
        run = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)
        for images in (3, 5):
            given = arguments(images, "cpu")
            want = with_gradients(program, given)
            assert is_equal(with_gradients(run, given), want)


def test_inductor_compiles_a_loss_and_its_gradient() -> None:
    program, given = programs()["gkd"], arguments(2, "cpu")
    want = with_gradients(program, given)
    got = with_gradients(torch.compile(program, fullgraph=True), given)
    assert is_equal(got, want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name: str) -> None:
    for upstream in (lambda value: value, torch.square):
        differentiate = second_derivative(name, arguments(2, "cpu"), upstream)
        with pytest.raises(RuntimeError) as caught:
            differentiate()
        assert "this loss cannot be differentiated twice; with the backend 'reference', in explicit mode, it can" in str(caught.value)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_teacher_may_run_in_inference_mode(name: str) -> None:
    given = arguments(2, "cpu")
    leaves = [x.requires_grad_() for x in given["student_features"]]
    with torch.inference_mode():
        teacher = [x.clone() for x in given["teacher_features"]]
    found = [torch.autograd.grad(DIFFERENTIABLE[name](leaves, t), leaves) for t in (given["teacher_features"], teacher)]
    assert teacher[0].is_inference() and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", programs())
def test_inference_mode_changes_no_value(name: str) -> None:
    given = arguments(2, "cpu")
    want = programs()[name](given)
    with torch.inference_mode():
        got = programs()[name](given)
    assert got.is_inference() and torch.equal(got, want)


@pytest.mark.parametrize("part", ["teacher", "weights", "factor", "second order"])
def test_gradients_of_constants_are_the_reference_s(part: str) -> None:
    given = arguments(2, "cpu")
    student, teacher = given["student_features"], given["teacher_features"]
    sought = wanting(teacher)
    weights, maps, factor = [x[:, :, 0, 0] for x in teacher], [x[:, 0] for x in teacher], torch.ones(1, 2)
    if part == "weights":
        sought = weights = wanting(weights)
    elif part == "factor":
        sought = [factor.requires_grad_()]

    def value() -> Any:
        if part == "teacher":
            return functional.feature_imitation(student, sought)
        if part != "second order":
            return functional.terms(student, [(MapTerm(weights, maps, None, *OPTIONS), factor)])[0]
        slopes = torch.autograd.grad(sum(x.square().sum() for x in sought), sought, create_graph=True)
        return GKDLoss(grad_mode="second_order")(student, teacher, slopes, given["teacher_gradients"])

    with pytest.raises(RuntimeError) as caught:
        value()
    assert str(caught.value) == (
        f"backend 'native' cannot run {'feature_imitation' if part == 'teacher' else 'terms'}: the teacher's features or the weights "
        "require a gradient, which only the reference gives; choose 'auto' or 'reference'"
    )
    set_backend("auto")
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(value().sum(), sought))


def test_losses_compute_no_gradient_of_a_teacher_that_is_being_trained() -> None:
    given = arguments(2, "cpu")
    teacher = wanting(given["teacher_features"])
    values = [with_gradients(programs()["fused"], {**given, "teacher_features": t}) for t in (given["teacher_features"], teacher)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert all(x.grad is None for x in teacher)


@pytest.mark.parametrize("name", programs())
def test_autocast_changes_nothing(name: str) -> None:
    given = arguments(2, "cpu")
    want = with_gradients(programs()[name], given)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(programs()[name], given)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "it does not take float64"),
        ({"device": "meta"}, "the tensors are on meta, not on the CPU"),
    ],
)
@pytest.mark.parametrize(
    "name", ["channel_kl", "channel_mean", "correlation", "attention", "weighted_channel_sum", "shared_read", "feature_imitation"]
)
def test_named_it_refuses_other_types_and_devices(name: str, change: dict[str, Any], reason: str) -> None:
    x = [level.to(**change) for level in pyramid(SHAPES)]
    others = {
        **dict.fromkeys(("channel_kl", "correlation", "feature_imitation"), (x,)),
        **dict.fromkeys(("attention", "channel_mean"), ()),
    }.get(name, ([level[:, :, 0, 0] for level in x],))
    with pytest.raises(RuntimeError) as caught:
        getattr(functional, name)(x, *others)
    assert str(caught.value).startswith(f"backend 'native' cannot run {name}: ") and reason in str(caught.value)
    assert str(caught.value).endswith("; choose 'auto' or 'reference'")


def test_auto_takes_the_reference_for_float64_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    set_backend("auto")
    x = wanting([level.double() for level in pyramid(SHAPES)])
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        values = [functional.channel_mean(x)[0] for _ in range(2)]
    assert values[0].dtype == torch.float64 and torch.equal(values[0], x[0].mean((2, 3)))
    assert [record.getMessage() for record in caplog.records] == [
        "backend auto: using 'reference' for channel_mean, not 'native': it does not take float64"
    ]


def test_functional_transformations_are_refused_by_name_and_served_by_auto() -> None:
    x = pyramid(SHAPES)[0]

    def mean(level: torch.Tensor) -> torch.Tensor:
        return functional.channel_mean([level])[0].sum()

    with pytest.raises(RuntimeError, match="torch.func and forward-mode differentiation work on the reference only"):
        torch.func.grad(mean)(x)
    set_backend("auto")
    assert relative_error(torch.func.grad(mean)(x), torch.full_like(x, 1 / 35)) < 1e-6


def test_a_gradient_that_was_handed_out_never_changes() -> None:
    given = arguments(2, "cpu")
    leaves = [x.requires_grad_() for x in given["student_features"]]
    value = programs()["fused"]({**given, "student_features": leaves})
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = copy.deepcopy(first)
    twice = torch.autograd.grad(2 * value, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(relative_error(b, 2 * a) < 1e-6 for a, b in zip(first, twice, strict=True))


def test_boxes_of_no_image_give_masks_of_no_image() -> None:
    masks = functional.box_mask((torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64)), IMAGE, [(4, 5)])
    assert [m.shape for m in masks] == [(0, 4, 5)]
