"""The terms operators as CUDA kernels, emulated: types, layouts, options, upstream and arriving gradients, what they move and refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cuda_support import in_any_order
from emulation import emulated
from fused_support import GRAINS, INF, NAN, SMALL, called, evaluated, of_one_graph, of_shapes, of_the_tap, wide
from levels import DTYPES, pyramid, relative_error
from memory_support import held_beside
from native_support import VALUE, same_bits
from operator_samples import SAMPLES, checked, term_calls
from terms_arguments import REFUSED, S, arguments
from terms_support import Wanted, doubles, kernels, laid_out, terms, terms_error, with_arriving, with_gradients
from toolchain import needs_compiler
from torch import Tensor

from benchmarks.call import bind
from benchmarks.call import sample as sampled
from benchmarks.measure.memory import peak_bytes
from benchmarks.registry import ENTRIES, Case, flat
from benchmarks.registry.predicted import units
from kdkernels import AIDLoss, BMFILoss, GKDLoss, set_backend
from kdkernels.ops.terms import MapTerm, fused_vjp
from kdkernels.reference.terms import terms as reference
from kdkernels.reference.terms import terms_vjp as reference_vjp
from kdkernels.term_batches import batches

pytestmark = needs_compiler
#: Several tiles and bands with tails, rows that begin anywhere, one pixel.
SHAPES = [(2, 9, 17, 31), (2, 67, 4, 4), (2, 3, 1, 1)]
IN_BATCH = {"gkd": GKDLoss(preset="release"), "bmfi": BMFILoss(alpha=0.4, gamma=0.3)}


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


def in_one_order(run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `run` returns, by the emulated kernels, in a random order of threads and blocks."""
    with emulated(2):
        return list(run())


#: Backwards, and in a random order.
in_two_orders = partial(in_any_order, orders=(1, 2))


def check(features: list[Tensor], wanted: Wanted, upstream: Sequence[Tensor] | None = None, run: Any = in_two_orders) -> list[Tensor]:
    """Held against the reference in float64; upstream None: 1, for which there may be a gradient from the forward pass."""
    given = [torch.ones(len(features), features[0].shape[0]) for _ in wanted] if upstream is None else upstream
    got = run(lambda: with_gradients(kernels, features, wanted, given))
    want = with_gradients(reference, [x.double() for x in features], doubles(wanted), given)
    assert terms_error(got, want, [x.dtype for x in features]) < 1
    assert [g.stride() for g in got[len(wanted) :]] == [torch.empty_like(x).stride() for x in features]
    return got


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("imitations", [0, 1, 2])
def test_types_and_layouts_with_any_upstream_gradient(imitations: int, dtype: str, layout: str) -> None:
    features, teacher = laid_out(SHAPES, dtype, layout, 1), laid_out(SHAPES, dtype, layout, 2)
    wanted = terms(SHAPES, teacher, imitations, 0.7)
    check(features, wanted)
    rows = check(features, wanted, pyramid([(3, 2)] * len(wanted), seed=5))
    assert len(rows) == len(wanted) + len(SHAPES)


@pytest.mark.parametrize("student", ["contiguous", "channels_last"])
@pytest.mark.parametrize("teacher", ["contiguous", "channels_last", "odd address", "gaps"])
def test_student_and_teacher_of_different_types_and_layouts(teacher: str, student: str) -> None:
    """Each type once on either side, as what looks types up does so pyramid by pyramid."""
    for mine, other in (("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "fp32"), ("bf16", "bf16")):
        wanted = terms(SHAPES, laid_out(SHAPES, other, teacher, 2), 1)
        assert check(laid_out(SHAPES, mine, student, 1), wanted, run=in_one_order)[0].dtype == torch.float32


def test_levels_of_different_types_and_layouts() -> None:
    kinds = [("fp32", "channels_last"), ("bf16", "contiguous"), ("fp16", "channels_last, odd address")]
    features = [laid_out([shape], *kind, seed)[0] for seed, (shape, kind) in enumerate(zip(SHAPES, kinds, strict=True))]
    teacher = [laid_out([shape], *kind, 5 + seed)[0] for seed, (shape, kind) in enumerate(zip(SHAPES, reversed(kinds), strict=True))]
    rows = check(features, terms(SHAPES, teacher, 2), pyramid([(3, 2)] * 4, seed=5))
    assert [g.dtype for g in rows[4:]] == [x.dtype for x in features]


@pytest.mark.parametrize("normalize", ["none", "minmax", "zscore", "softmax"])
@pytest.mark.parametrize("rectify", ["none", "abs", "relu"])
def test_options_of_the_map(rectify: str, normalize: str) -> None:
    shapes = [(2, 4, 23, 29), (2, 3, 1, 1)]
    features, up = laid_out(shapes, "fp32", "contiguous", 1), pyramid([(2, 2)], seed=5)
    for distance, activation in itertools.product(("l1", "mse", "smooth_l1"), ("raw", "abs")):
        mode, average = ("relative", "n") if activation == "raw" else ("absolute", "nhw")
        options = (activation, rectify, normalize, distance, 1e-6, mode, 0.5, average)
        maps = [pyramid([(n, h, w) for n, _, h, w in shapes], seed=seed) for seed in (2, 3)]
        term = MapTerm(pyramid([shape[:2] for shape in shapes], seed=4), maps[0], maps[1], *options)
        assert len(check(features, [(term, 0.3)], up, in_one_order)) == 3, options


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_imitations_alone(count: int, spatial: bool) -> None:
    """Without a map and an attention, of which nothing is read then."""
    features, teacher = laid_out(SHAPES, "fp32", "contiguous", 1), laid_out(SHAPES, "fp32", "contiguous", 2)
    wanted = terms(SHAPES, teacher, count, 0.7, spatial)[2:]
    check(features, wanted)
    assert len(check(features, wanted, pyramid([(3, 2)] * count, seed=5))) == count + 3


@pytest.mark.parametrize("shape", [(), (3, 2), (1, 2), (3, 1)], ids=str)
def test_factors_that_are_tensors(shape: tuple[int, ...]) -> None:
    features, teacher = (laid_out(SHAPES, "fp32", "contiguous", seed) for seed in (1, 2))
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(6)) + 2.0
    wanted = terms(SHAPES, teacher, 1, factor)
    rows = check(features, wanted)
    check(features, wanted, pyramid([(3, 2)] * 3, seed=5))
    plain = in_one_order(lambda: kernels(features, terms(SHAPES, teacher, 1)))
    assert all(relative_error(a, b * factor) < 1e-6 for a, b in zip(rows[:3], plain, strict=True))


@pytest.mark.parametrize("arriving", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_arrive_are_added_whatever_their_type(dtype: str, arriving: str) -> None:
    features, teacher = laid_out(SHAPES, dtype, "channels_last", 1), laid_out(SHAPES, "bf16", "contiguous", 2)
    wanted, up = terms(SHAPES, teacher, 1, 0.3), pyramid([(3, 2)] * 3, seed=5)
    for layout, missing in (("contiguous", None), ("channels_last", 1), ("gaps", None)):
        given: list[Tensor | None] = list(laid_out(SHAPES, arriving, layout, 8))
        if missing is not None:
            given[missing] = None
        got = in_one_order(partial(with_arriving, partial(fused_vjp, "native"), features, wanted, given, up))
        exact = [None if x is None else x.double() for x in given]
        want = with_arriving(reference_vjp, [x.double() for x in features], doubles(wanted), exact, [x.double() for x in up])
        assert [g.dtype for g in got[3:]] == [x.dtype for x in features]
        assert terms_error(got, want, [x.dtype for x in features]) < 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_early_gradients_are_right_for_any_upstream_gradient_and_never_change(dtype: str, layout: str) -> None:
    """Of the first backward pass they are those of the forward pass, made right on the device; a second one computes anew."""
    case = of_shapes(SMALL, layouts=(layout,), dtypes=(dtype,))
    for scales in ((1.0, 3.0, 1.0), (3.0, 1.0)):

        def run(scales: Sequence[float] = scales) -> list[Tensor]:
            values, gradients = of_one_graph(IN_BATCH, case, "native", scales)
            return [*values, *itertools.chain.from_iterable(gradients)]

        got = in_two_orders(run)
        _, wanted = of_one_graph(IN_BATCH, wide(case), "reference", scales)
        found = [got[2 + 3 * k : 5 + 3 * k] for k in range(len(scales))]
        kinds = [DTYPES[dtype]] * 3
        assert all(terms_error(a, b, kinds) < 1 for a, b in zip(found, wanted, strict=True))
        if len(scales) == 3:
            assert all(same_bits(a, b) for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("d", [NAN, INF, -INF, 0.0, 1.0])
def test_upstream_gradients_of_the_sum(d: float) -> None:
    """In the first backward pass, which may have its gradient from the forward pass, and in a second one."""
    with emulated():
        leaves, values = called(IN_BATCH, of_shapes(SMALL), "native")
        total = sum(values)
        first, second = (torch.autograd.grad(total, leaves, torch.tensor(d), retain_graph=True) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    finite = [bool(g.isfinite().any()) for g in first]
    assert finite == [d in (0.0, 1.0)] * 3 and all(bool(g.any()) == (d != 0) for g in first)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["student", "teacher", "map", "spatial"])
def test_what_is_not_finite_stays_where_it_belongs(where: str, bad: float) -> None:
    """In its image and level; gradients as on the CPU, rows as in the reference."""
    features, teacher = (laid_out(SHAPES, "fp32", "contiguous", seed) for seed in (1, 2))
    wanted = terms(SHAPES, teacher, 1)
    spoiled = {"student": features[0], "teacher": teacher[0], "map": wanted[0][0].target[0], "spatial": wanted[2][0].spatial[0]}[where]
    spoiled[1, ..., 2, 3] = bad
    up = [torch.full((3, 2), 0.5)] * 3
    got = in_any_order(lambda: with_gradients(kernels, features, wanted, up))
    rows = reference([x.double() for x in features], doubles(wanted))
    gradients = with_gradients(kernels, features, wanted, up)[3:]
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(got, [*rows, *gradients], strict=True))
    bad_rows = [int((~x.isfinite()).sum()) for x in got[:3]]
    assert bad_rows == {"student": [1, 1, 1], "map": [1, 0, 0]}.get(where, [0, 0, 1])
    assert not got[3][1].isfinite().all() and all(x.isfinite().all() for x in (got[3][0], *got[4:]))


def test_inline_in_any_layouts() -> None:
    """The gradients that pass the tap are of other layouts than the features."""
    losses = {"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.5, gamma=0.3)}
    for dtype in DTYPES:
        case = of_shapes(SMALL, layouts=("channels_last", "contiguous", "transposed"), dtypes=(dtype,))
        case["student_gradients"] = [1e-3 * x.to(DTYPES[dtype]).contiguous() for x in case["student_gradients"]]
        got = in_any_order(partial(of_the_tap, losses, case, "native", 1.0))
        want = of_the_tap(losses, wide(case), "reference", 1.0)
        assert all(g.dtype == x.dtype for g, x in zip(got, case["student_features"], strict=True))
        assert terms_error(got, want, [DTYPES[dtype]] * 3) < 1


def test_losses_with_factors_and_several_grains() -> None:
    losses = {"gkd": AIDLoss(GKDLoss()), "bmfi": BMFILoss(**GRAINS), "aid": AIDLoss(BMFILoss(alpha=0.5))}
    case = of_shapes(SMALL, layouts=("contiguous", "channels_last"))
    got = in_any_order(lambda: list(itertools.chain(*evaluated(losses, case, "native", 0.5))))
    values, gradients = evaluated(losses, wide(case), "reference", 0.5)
    assert len(got) == 6 and terms_error(got, values + gradients, [torch.float32] * 3) < 1


@pytest.mark.parametrize("shapes", [[(1, 5, 3, 4)] * 17, [(3, 1, 1, 1)], [(1, 600, 1, 1), (1, 1, 40, 60)], [(0, 3, 4, 5)] * 2], ids=len)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_levels_one_pixel_one_channel_and_no_image(layout: str, shapes: list[tuple[int, ...]]) -> None:
    features, teacher = (laid_out(shapes, "fp32", layout, seed) for seed in (1, 2))
    wanted = terms(shapes, teacher, 1)
    check(features, wanted)
    rows = check(features, wanted, pyramid([(len(shapes), shapes[0][0])] * 3, seed=5))
    assert [tuple(g.shape) for g in rows[3:]] == shapes


@pytest.mark.parametrize("parts", ["all", "map", "attention", "imitation"])
def test_results_are_laid_out_as_those_of_the_cpu(parts: str) -> None:
    """Rows, saved maps and vectors, and the state, which is 0 where nothing uses it."""
    features, teacher = (laid_out(SHAPES, "fp32", "contiguous", seed) for seed in (1, 2))
    chosen = {"all": slice(None), "map": slice(0, 1), "attention": slice(1, 2), "imitation": slice(2, 3)}[parts]
    (batch,) = batches(features, terms(SHAPES, teacher, 1)[chosen])
    given = (features, *batch.operands, *batch.options)
    for name in ("terms", "terms_with_gradient"):
        got = in_any_order(lambda name=name: getattr(torch.ops.kdkernels_emulated, name)(*given))
        want = getattr(torch.ops.kdkernels_native, name)(*given)
        assert [x.shape for x in got] == [x.shape for x in want]
        assert all(relative_error(a, b) < VALUE for a, b in zip(got, want, strict=True))
        assert torch.equal(got[4] == 0, want[4] == 0)


@pytest.mark.parametrize(("layout", "images", "imitations"), SAMPLES)
def test_operators_do_what_their_schemas_say(layout: str, images: int, imitations: int) -> None:
    with emulated():
        calls = term_calls("native", layout, images, imitations, "cpu")
        assert len(calls) == (4 if imitations == 1 else 2) and all(checked(call) for call in calls)


@pytest.mark.parametrize("name", ["terms", "terms_with_gradient"])
@pytest.mark.parametrize("case", REFUSED)
def test_terms_refuse(case: str, name: str) -> None:
    s, t, changed = REFUSED[case]
    with emulated(), pytest.raises(RuntimeError, match=r"level|expected|imitation|operands|unknown|float32|spatial") as error:
        operator(name)(*arguments(s, t, **changed))
    assert "csrc/" in str(error.value)


@pytest.mark.parametrize(("name", "count"), [("terms", 65), ("terms_with_gradient", 2), ("terms_with_gradient", 65)])
def test_they_refuse_more_imitations_than_they_take(name: str, count: int) -> None:
    with emulated(), pytest.raises(RuntimeError, match="imitations") as error:
        operator(name)(*arguments(S, S, imitations=count, scales=(1.0,) * count))
    assert "csrc/" in str(error.value)
    with emulated():
        (rows, *_) = operator("terms")(*arguments(S, S, imitations=64, scales=range(64)))
    assert torch.equal(rows, torch.zeros(64, 1, 2))


@pytest.mark.parametrize("wrong", ["grad", "saved", "fewer saved", "another shape", "another type", "more levels"])
@pytest.mark.parametrize("name", ["terms_backward", "terms_correct_gradient"])
def test_their_backward_refuses(name: str, wrong: str) -> None:
    """What is handed over with levels of the student: the gradients that arrive, or those that are to be made right."""
    if (name, wrong) == ("terms_backward", "another type"):
        # Which arriving gradients may have.
        wrong = "another shape"
    levels = [torch.ones_like(S[0])]
    with emulated():
        saved = operator("terms")(*arguments(S, S))[1:]
        given = {"grad": torch.full((1, 1, 2), 2.0), "saved": saved, "levels": levels}
        given |= {
            "grad": {"grad": torch.ones(1)},
            "saved": {"saved": [x[:1] for x in saved]},
            "fewer saved": {"saved": saved[:2]},
            "another shape": {"levels": [torch.ones(2, 3, 4, 4)]},
            "another type": {"levels": [levels[0].half()]},
            "more levels": {"levels": levels * 2},
        }[wrong]
        grad, saved, others = given.values()
        order = (grad, saved, others) if name == "terms_backward" else (others, grad, saved)
        with pytest.raises(RuntimeError, match=r"expected|level"):
            operator(name)(*order, *arguments(S, S))
    assert torch.equal(levels[0], torch.ones_like(S[0]))


def operator(name: str) -> Any:
    return getattr(torch.ops.kdkernels_emulated, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["gkd_bmfi", "gkd", "bmfi", "feature_imitation"])
def test_bytes_that_are_moved_are_those_predicted(name: str, dtype: str, layout: str) -> None:
    """The same as Triton's: 7 units for GKD and BMFI with their gradient, for an upstream gradient of 1."""
    entry, case = ENTRIES[name], Case("tiny", batch=1, channels=64, boxes=3, dtype=dtype, layout=layout)
    generator = torch.Generator().manual_seed(0)
    inputs = entry.inputs(case, generator, torch.device("cpu"))
    shapes = [x.shape for x in flat(entry.eager(**inputs))]
    set_backend("native")
    assert units("gkd_bmfi", Case(), "backward") == 7
    for mode in entry.modes:
        given = sampled(entry, inputs, mode, shapes, generator)
        with emulated() as emulator:
            emulator.reset_counts()
            bind(entry, entry.call, mode, own=True)(given)
            counts = emulator.counts()
        unit = case.batch * case.channels * case.pixels * DTYPES[dtype].itemsize
        assert counts["bytes_read"] + counts["bytes_written"] == units(name, case, mode) * unit, mode


@pytest.mark.parametrize("imitations", [0, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_held_beside_results_is_a_few_numbers_a_tile(dtype: str, imitations: int) -> None:
    """A map of errors with the values alone; of gradients no map and no vector, as the write pass makes its factors where it takes them."""
    images, channels, pixels = 2, 64, 1280
    features, teacher = (laid_out([(images, channels, 32, 40)], dtype, "contiguous", seed) for seed in (1, 2))
    (batch,) = batches(features, terms([x.shape for x in features], teacher, imitations))
    given, rows = (*batch.operands, *batch.options), 3 + imitations
    with emulated() as emulator:
        blocks = images * pixels // emulator.span(dtype != "fp32")
        sums, squares, errors = 4 * blocks * channels, 4 * blocks * imitations, 4 * images * pixels * imitations
        (_, *saved), grad = operator("terms")(features, *given), torch.full((rows, 1, images), 2.0)
        gradients = [torch.empty_like(x) for x in features]
        calls: dict[str, tuple[tuple[Any, ...], int]] = {
            "terms": ((features, *given), errors + sums),
            # The gradient, which is larger than the sums of the tiles, is there when these are not any more.
            "terms_with_gradient": ((features, *given), squares),
            "terms_backward": ((grad, saved, features, features, *given), 0),
            "terms_correct_gradient": ((gradients, grad, saved, features, *given), torch.int.itemsize),
        }
        for name, (arguments, most) in calls.items():
            assert held_beside(partial(operator(name), *arguments)) <= most, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["backward", "inline"])
def test_a_call_of_gkd_and_bmfi_holds_five_maps_beside_its_gradient(mode: str, dtype: str) -> None:
    """The raw map and sum_c |x| of the student; the map, the spatial attention and the imitation's weights of the teacher. And three
    vectors: the student's channel weights, sum_p |x| and the teacher's channel attention."""
    entry, case = ENTRIES["gkd_bmfi"], Case("tiny", batch=2, channels=64, boxes=3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = entry.inputs(case, generator, torch.device("cpu"))
    set_backend("native")
    given = sampled(entry, inputs, mode, [x.shape for x in flat(entry.eager(**inputs))], generator)
    with emulated():
        call = partial(bind(entry, entry.call, mode, own=True), given)
        call()
        peak = peak_bytes(torch.device("cpu"), call)
    gradient = sum(x.nbytes for x in inputs["student_features"])
    maps, vectors = 4 * case.batch * case.pixels, 4 * case.batch * case.channels * len(case.level_sizes)
    # State, rows and the tiles' squared errors.
    small = 4 << 10
    assert peak is not None and peak - gradient < 5 * maps + 3 * vectors + small, f"{(peak - gradient) / maps:.2f} maps"
