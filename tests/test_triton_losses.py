"""The losses as users call them, on the Triton kernels: values and gradients against the reference in float64, whatever the input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_support import DEVICES, DTYPES, ROUNDING, poisoned, pyramid, relative_error

from kdkernels import AIDLoss, BMFILoss, DistillationLoss, FusedLoss, GKDLoss, set_backend

pytestmark = pytest.mark.parametrize("device", DEVICES)
Shapes = Sequence[Sequence[int]]
NAN, INF = float("nan"), float("inf")
IMAGE_SIZE = (200, 336)
BOXES = [[[8.0, 10.0, 150.0, 130.0], [130.0, 20.0, 160.0, 150.0]], [[33.3, 5.1, 271.7, 160.2]]]
#: Image 1 has no box of any cell in all of them, image 0 in all but the first.
BAD_BOXES: dict[str, list[list[list[float]]]] = {
    "none in one image": [[[8.0, 10.0, 320.0, 190.0]], []],
    "none": [[], []],
    "outside or without area": [
        [[20.0, 30.0, 20.0, 90.0], [50.0, 60.0, 10.0, 20.0]],
        [[10.0, -80.0, 90.0, -5.0], [400.0, 10.0, 500.0, 90.0]],
    ],
}
PYRAMIDS = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
SMALL = [(2, 3, 3, 4), (2, 5, 2, 3), (2, 3, 4, 4)]
VALUE = 2e-5
#: A value below this is what rounding leaves of the difference of numbers near 1, as of two softmaxes of one cell.
NOTHING = 1e-2
#: The interpreter truncates to bf16 where a GPU rounds.
GRADIENT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
GRAINS = {"alpha": 0.4, "gamma": 0.3, "lambda_": 0.2, "beta_bg": 0.1}


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


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
    shape: tuple[int, ...]
    dtype: str
    layout: str


@st.composite
def shapes(draw: Any) -> list[tuple[int, ...]]:
    """One to seven levels. A map of a few pixels has all of them at its extremes and next to no gradient: it is one pixel or at least 6."""
    count, images = draw(st.sampled_from([1, 2, 3, 4, 7])), draw(st.integers(1, 2))
    height, width = (14, 19) if count < 4 else (5, 7)
    size = st.one_of(st.just((1, 1)), st.tuples(st.integers(2, height), st.integers(3, width)))
    return [(images, draw(st.sampled_from([1, 3, 8, 16, 20])), *draw(size)) for _ in range(count)]


@st.composite
def levels(draw: Any, sizes: Shapes) -> list[Level]:
    """Of one type or one type a level, each in any layout."""
    types, layouts = st.sampled_from(list(DTYPES)), st.sampled_from(list(LAYOUTS))
    kinds = [draw(types)] * len(sizes) if draw(st.booleans()) else [draw(types) for _ in sizes]
    return [Level(tuple(shape), kind, draw(layouts)) for shape, kind in zip(sizes, kinds, strict=True)]


@st.composite
def inputs(draw: Any, compares: bool) -> dict[str, Any]:
    """What `built` makes the arguments of `FusedLoss` of; where features are not compared, the teacher may have sizes of its own."""
    student = draw(shapes())
    teacher = student
    if not compares and draw(st.booleans()):
        teacher = [(n, draw(st.sampled_from([1, 5, 16])), max(1, h // 2), 2 * w) for n, _, h, w in student]
    drawn = {name: draw(levels(teacher if name.startswith("teacher") else student)) for name in PYRAMIDS}
    return {**drawn, "padded": draw(st.booleans()), "seed": draw(st.integers(0, 999))}


def built(drawn: dict[str, Any], device: str) -> dict[str, Any]:
    """All arguments of `FusedLoss` for what was drawn."""
    case = {}
    for k, name in enumerate(PYRAMIDS):
        random = pyramid([level.shape for level in drawn[name]], seed=4 * drawn["seed"] + k, device=device)
        case[name] = [LAYOUTS[level.layout](x.to(DTYPES[level.dtype])) for x, level in zip(random, drawn[name], strict=True)]
    count, images = len(case["student_features"]), case["student_features"][0].shape[0]
    boxes: Any = [torch.tensor(b, device=device) for b in BOXES[:images]]
    if drawn["padded"]:
        boxes = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True), torch.tensor([len(b) for b in boxes], device=device)
    losses = torch.rand(count, images, generator=torch.Generator().manual_seed(3)).to(device) * 3
    return {**case, "boxes": boxes, "image_size": IMAGE_SIZE, "teacher_losses": losses}


def options(**values: Sequence[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in values.items()})


common = {"reduction": ("sum", "none"), "weight": (1.0, 2.5)}
gkd_maps = options(
    **common,
    preset=("paper", "release"),
    channel_weight=(None, "signed", "abs"),
    activation=(None, "raw", "abs"),
    rectify=(None, "abs", "relu", "none"),
    normalize=("minmax", "softmax", "zscore", "none"),
    distance=("l1", "mse", "smooth_l1"),
    eps_mode=(None, "relative", "absolute"),
    temperature=(0.5, 2.0),
    average=("nhw", "n"),
    box_weight=("none", "sqrt_mask"),
    grad_mode=("detached_weights", "detached_weights", "none"),
)
gkd_imitations = options(
    **common,
    preset=("paper", "release"),
    form=("imitation",),
    spatial=(True, False),
    channel_weight=("signed", "abs"),
    normalize=("minmax", "softmax"),
    eps_mode=("relative", "absolute"),
)
bmfis = options(
    **common,
    alpha=(0.0, 0.4),
    gamma=(0.0, 0.3),
    lambda_=(0.0, 0.2),
    beta_bg=(0.0, 0.1),
    temperature=(0.5, 1.3),
    mask=("gaussian", "exponential", "area", "binary"),
    inner_ones=(True, False),
    area_norm=(True, False),
    placement=("centered", "released"),
    attention_from=("teacher", "mean"),
).filter(lambda o: o["alpha"] or o["gamma"] or o["lambda_"] or o["beta_bg"])
granularities = st.sampled_from([None, "image", "level", "level x image", "batch"])


def wide(case: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, boxes and teacher losses aside."""
    keep = ("boxes", "image_size", "teacher_losses")
    return {name: x if name in keep else [None if a is None else a.double().contiguous() for a in x] for name, x in case.items()}


def evaluated(
    losses: dict[str, DistillationLoss], case: dict[str, Any], backend: str, upstream: float | Sequence[Tensor] = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and the gradients of the student's levels, 0 where there is none; a loss alone is called without FusedLoss."""
    set_backend(backend)
    leaves = [x.detach().requires_grad_() for x in case["student_features"]]
    arguments = {**case, "student_features": leaves}
    if len(losses) == 1:
        (loss,) = losses.values()
        wanted = (*loss.argument_names, *(["teacher_losses"] if isinstance(loss, AIDLoss) else []))
        values = [loss(**{name: arguments[name] for name in wanted})]
    else:
        values = list(FusedLoss(losses)(**arguments).values())
    factors = [upstream] * len(values) if isinstance(upstream, float) else upstream
    slopes = [torch.ones_like(v) * d for v, d in zip(values, factors, strict=True)]
    chosen = [(v, d) for v, d in zip(values, slopes, strict=True) if v.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if chosen:
        found = torch.autograd.grad([v for v, _ in chosen], leaves, [d for _, d in chosen], allow_unused=True)
    return [v.detach() for v in values], [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def check(losses: dict[str, DistillationLoss], case: dict[str, Any]) -> float:
    """Holds values and every level's gradient against the reference; returns the largest error in units of what is allowed."""
    generator = torch.Generator().manual_seed(8)
    shape = len(case["student_features"]), case["student_features"][0].shape[0]
    upstream = [torch.rand(shape, generator=generator) + 0.5 if loss.reduction == "none" else torch.tensor(1.0) for loss in losses.values()]
    wanted, slopes = evaluated(losses, wide(case), "reference", upstream)
    # As AMP does, so that gradients in fp16 are neither subnormal nor infinite.
    largest = max(float(g.abs().max()) for g in slopes)
    scale = (
        2.0 ** (12 - math.ceil(math.log2(largest))) if largest and any(x.dtype == torch.float16 for x in case["student_features"]) else 1.0
    )
    with poisoned():
        values, gradients = evaluated(losses, case, "triton", [scale * d for d in upstream])
    assert all(v.dtype == torch.float32 and v.shape == w.shape for v, w in zip(values, wanted, strict=True))
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(gradients, case["student_features"], strict=True))
    errors = [float(((v - w).abs() / w.clamp(min=NOTHING)).max()) / VALUE for v, w in zip(values, wanted, strict=True)]
    # In a few elements roundings do not average out, of which there is one a call of the operator and one of their sum.
    allowed = [max(GRADIENT[g.dtype], 2 * ROUNDING[g.dtype] if g.numel() < 64 else 0.0) for g in gradients]
    errors += [relative_error(g, scale * w) / most for g, w, most in zip(gradients, slopes, allowed, strict=True)]
    assert not any(math.isnan(e) for e in errors)
    return max(errors)


# Shrinking would interpret hundreds of examples: a failure shows the one that was found.
few = functools.partial(settings, phases=[Phase.explicit, Phase.generate])


@few(max_examples=5)
@given(data=st.data())
def test_gkd_maps(data: Any, device: str) -> None:
    assert check({"loss": GKDLoss(**data.draw(gkd_maps))}, built(data.draw(inputs(False)), device)) < 1


@few(max_examples=4)
@given(data=st.data())
def test_gkd_imitations(data: Any, device: str) -> None:
    assert check({"loss": GKDLoss(**data.draw(gkd_imitations))}, built(data.draw(inputs(True)), device)) < 1


@few(max_examples=5)
@given(data=st.data())
def test_bmfi(data: Any, device: str) -> None:
    assert check({"loss": BMFILoss(**data.draw(bmfis))}, built(data.draw(inputs(True)), device)) < 1


@few(max_examples=3)
@given(data=st.data())
def test_several_losses_together(data: Any, device: str) -> None:
    losses: dict[str, DistillationLoss] = {"map": GKDLoss(**data.draw(gkd_maps)), "bmfi": BMFILoss(**data.draw(bmfis))}
    imitation = GKDLoss(**data.draw(gkd_imitations))
    losses["aid"] = AIDLoss(data.draw(st.sampled_from([losses["map"], losses["bmfi"], imitation])), granularity=data.draw(granularities))
    assert check(losses, built(data.draw(inputs(True)), device)) < 1


def fixed(device: str, layouts: Sequence[str] = ("contiguous",) * 3, dtypes: Sequence[str] = ("fp32",) * 3) -> dict[str, Any]:
    """Arguments of three small levels; layouts: the student's."""
    drawn = {name: [Level(shape, dtype, "contiguous") for shape, dtype in zip(SMALL, dtypes, strict=True)] for name in PYRAMIDS}
    drawn["student_features"] = [Level(*level) for level in zip(SMALL, dtypes, layouts, strict=True)]
    return built({**drawn, "padded": False, "seed": 1}, device)


def test_seven_levels_take_two_launches(device: str) -> None:
    shapes = [(1, 3, 2, 3), (1, 1, 4, 3), (1, 3, 1, 1), (1, 16, 5, 4), (1, 1, 1, 1), (1, 8, 3, 7), (1, 5, 2, 4)]
    drawn = {name: [Level(shape, "fp32", "contiguous") for shape in shapes] for name in PYRAMIDS}
    case = built({**drawn, "padded": True, "seed": 2}, device)
    assert check({"gkd": GKDLoss(), "bmfi": BMFILoss(**GRAINS, reduction="none")}, case) < 1


@pytest.mark.parametrize("layouts", [("contiguous", "channels_last", "transposed"), ("channels_last", "gaps", "images inside")])
def test_levels_of_different_layouts_with_the_gradient_from_the_forward_pass(device: str, layouts: tuple[str, ...]) -> None:
    """The gradient kernel leaves what is right as it is where the upstream gradient is 1, in the student's layout too."""
    assert check({"whole": BMFILoss(alpha=0.0, lambda_=1.0)}, fixed(device, layouts)) < 1


@pytest.mark.parametrize("bad", BAD_BOXES)
def test_boxes_that_leave_images_without_a_region(device: str, bad: str) -> None:
    case = fixed(device) | {"boxes": [torch.tensor(b, device=device).reshape(-1, 4) for b in BAD_BOXES[bad]]}
    assert check({"bmfi": BMFILoss(**GRAINS), "weighted": GKDLoss(box_weight="sqrt_mask")}, case) < 1
    region = BMFILoss(gamma=0.0, reduction="none")(*(case[name] for name in BMFILoss.argument_names))
    assert region[:, 1].eq(0).all() and bool(region[:, 0].ne(0).all()) == (bad == "none in one image")


@pytest.mark.parametrize("source", PYRAMIDS)
def test_non_finite_elements_are_found_where_the_reference_finds_them(device: str, source: str) -> None:
    case = fixed(device)
    for level, image, bad in ((0, 1, NAN), (1, 0, INF), (2, 1, -INF)):
        case[source][level][image, 1, 1, 1] = bad
    values, gradients = {}, {}
    found = {}
    for backend, given_case in (("triton", case), ("reference", wide(case))):
        losses: dict[str, DistillationLoss] = {
            "map": GKDLoss(preset="release", reduction="none"),
            "imitation": GKDLoss(form="imitation", reduction="none"),
            "bmfi": BMFILoss(**GRAINS, reduction="none"),
        }
        values[backend], gradients[backend] = evaluated(losses, given_case, backend)
        found[backend] = [report for loss in losses.values() for report in loss.check()]
    assert found["triton"] == found["reference"] and found["triton"]
    finite = torch.ones(3, 2, dtype=torch.bool, device=device)
    for got, want in zip(values["triton"], values["reference"], strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        torch.testing.assert_close(got, want.float(), rtol=VALUE, atol=0, equal_nan=True)
        finite &= want.isfinite()
    for mask, got, want in zip(finite, gradients["triton"], gradients["reference"], strict=True):
        # A teacher that is not finite gives a gradient of NaN where the reference's sign of NaN is 0.
        assert relative_error(got[mask], want[mask]) < GRADIENT[torch.float32]
        assert not got[~mask].isfinite().flatten(1).all(1).any()


def test_constant_features(device: str) -> None:
    case = fixed(device)
    case["student_features"][0].fill_(0.1)
    case["teacher_features"][1].fill_(-0.7)
    case["student_features"][2][0], case["teacher_features"][2][0] = 0.3, 0.3
    assert check({"map": GKDLoss(), "bmfi": BMFILoss(**GRAINS)}, case) < 1
    _, gradients = evaluated({"loss": GKDLoss()}, case, "triton")
    assert gradients[0].eq(0).all() and gradients[1].ne(0).any() and gradients[2][0].eq(0).all()


@pytest.mark.parametrize("missing", ["student_gradients", "teacher_gradients"])
def test_a_level_without_gradient_contributes_nothing_whatever_it_holds(device: str, missing: str) -> None:
    case = fixed(device)
    case[missing][1] = None
    assert check({"map": GKDLoss(), "imitation": GKDLoss(form="imitation"), "bmfi": BMFILoss()}, case) < 1
    for features in ("student_features", "teacher_features"):
        case[features][1][0, 0, 0, 0] = float("nan")
    values, (_, gradient, _) = evaluated({"loss": GKDLoss(reduction="none")}, case, "triton")
    assert values[0][1].eq(0).all() and values[0][[0, 2]].ne(0).all() and gradient.eq(0).all()
    values, (_, gradient, _) = evaluated({"loss": GKDLoss(form="imitation", reduction="none")}, case, "triton")
    assert missing == "student_gradients" or (values[0][1].eq(0).all() and gradient.eq(0).all())


def test_an_upstream_gradient_of_zero_gives_zero(device: str) -> None:
    # The forward pass has made the gradient for 1 already.
    _, gradients = evaluated({"map": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0, alpha=0.0)}, fixed(device), "triton", 0.0)
    assert all(g.eq(0).all() for g in gradients)


def test_the_losses_of_one_call_are_differentiated_one_by_one(device: str) -> None:
    case = fixed(device)
    found = {}
    for backend, given_case in (("triton", case), ("reference", wide(case))):
        set_backend(backend)
        leaves = [x.requires_grad_() for x in given_case["student_features"]]
        losses = {"gkd": GKDLoss(), "bmfi": BMFILoss(**GRAINS)}
        values = FusedLoss(losses)(**{**given_case, "student_features": leaves})
        found[backend] = [g for value in values.values() for g in torch.autograd.grad(value, leaves, retain_graph=True)]
    assert len(found["triton"]) == 6
    assert all(relative_error(a, b) < GRADIENT[torch.float32] for a, b in zip(found["triton"], found["reference"], strict=True))


def test_two_runs_are_equal_to_the_bit(device: str) -> None:
    case = fixed(device, ("contiguous", "channels_last", "gaps"), tuple(DTYPES))
    runs = [evaluated({"gkd": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0)}, case, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for one, two in zip(*runs, strict=True) for a, b in zip(one, two, strict=True))


def test_without_a_graph_the_values_are_the_same(device: str) -> None:
    case, losses = fixed(device), {"gkd": GKDLoss(), "bmfi": BMFILoss(lambda_=1.0, alpha=0.0, reduction="none")}
    values, _ = evaluated(losses, case, "triton")
    with torch.no_grad(), poisoned():
        again = FusedLoss(losses)(**case)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(again.values(), values, strict=True))


def test_what_only_the_reference_has_is_refused_by_name(device: str) -> None:
    set_backend("triton")
    case = fixed(device)
    arguments = [case[name] for name in GKDLoss.argument_names[:4]]
    with pytest.raises(RuntimeError, match="a weight per element is in the reference only"):
        GKDLoss(channel_weight="elementwise")(*arguments)
    arguments[2] = [(x * g).requires_grad_() for x, g in zip(arguments[0], arguments[2], strict=True)]
    with pytest.raises(RuntimeError, match="which only the reference gives") as error:
        GKDLoss(grad_mode="second_order")(*arguments)
    assert "choose 'auto' or 'reference'" in str(error.value)
