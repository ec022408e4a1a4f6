"""`terms_persistent`: the persistent CUDA kernel, run by the emulator, against float64, whichever block comes first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from emulation import emulated
from memory_support import held_beside
from native_support import GRADIENT, VALUE, same_bits
from operator_samples import checked
from toolchain import needs_compiler
from torch import Tensor

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, backend, ops, set_backend
from kdkernels.losses import DistillationLoss

pytestmark = needs_compiler
Sizes = tuple[tuple[int, int, int], ...]
Losses = dict[str, DistillationLoss]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES: dict[str, tuple[int, Sizes]] = {
    "odd": (3, ((20, 25, 30), (20, 13, 15), (20, 7, 8))),
    "one pixel": (2, ((130, 5, 7), (130, 1, 1))),
    "one channel": (1, ((1, 9, 11),)),
    "smallest first": (2, ((12, 3, 5), (40, 16, 16))),
    "wide": (1, ((5, 50, 60), (300, 6, 6))),
}
IMAGE = (100, 120)


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    set_backend("auto")
    yield
    set_backend("auto")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The primitives that are called, in order."""
    found: list[str] = []
    run = backend.call

    def call(primitive: str, *args: Any) -> Any:
        found.append(primitive)
        return run(primitive, *args)

    monkeypatch.setattr(backend, "call", call)
    return found


def case(dtype: torch.dtype, layout: str, images: int, sizes: Sizes) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def pyramid() -> list[Tensor]:
        levels = [torch.randn(images, *size, generator=generator) for size in sizes]
        return [x.to(dtype).to(memory_format=LAYOUTS[layout]) for x in levels]

    boxes = torch.tensor([[10.0, 10.0, 60.0, 50.0], [0.0, 0.0, 30.0, 90.0]]).expand(images, 2, 4).contiguous()
    counts = torch.arange(images) % 3
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    losses = torch.rand(len(sizes), images, generator=generator)
    return {**{name: pyramid() for name in names}, "boxes": (boxes, counts), "image_size": IMAGE, "teacher_losses": losses}


def both(**options: Any) -> Losses:
    return {"gkd": GKDLoss(weight=0.7, reduction="none", **options), "bmfi": BMFILoss(weight=1.5, reduction="none")}


def step(losses: Losses, given: dict[str, Any], *upstream: float) -> list[Tensor]:
    """The values, and the gradients of the levels for each of these upstream gradients, one after another."""
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    values = list(FusedLoss(losses)(**{**given, "student_features": leaves}).values())
    found = [value.detach() for value in values]
    for d in upstream:
        found += torch.autograd.grad(values, leaves, [torch.full_like(value, d) for value in values], retain_graph=True)
    return found


def one_launch(losses: Losses, given: dict[str, Any], *upstream: float, seed: int = 0, processors: int = 3) -> list[Tensor]:
    with emulated(seed, processors) as emulator, backend.assigned("terms_persistent", "native"):
        emulator.reset_counts()
        return step(losses, given, *upstream)


def directly(given: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the primitive itself; the student's levels are leaves."""
    names = ("teacher_features", "student_gradients", "teacher_gradients")
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    masks = [torch.rand(x.shape[0], *x.shape[2:]) for x in leaves]
    options = ops.PersistentOptions("abs", "l1", 1e-6, "relative", "nhw", 0.5)
    return ops.PersistentOperands(leaves, *(given[name] for name in names), masks), [0.5, 1.0, 2.0], options


def exact(losses: Losses, given: dict[str, Any], *upstream: float) -> list[Tensor]:
    wide = {
        name: [x.double() for x in value] if name.endswith(("features", "gradients")) else value for name, value in given.items()
    }
    set_backend("reference")
    try:
        return step(losses, wide, *upstream)
    finally:
        set_backend("auto")


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_are_those_of_float64(name: str, dtype: torch.dtype, layout: str) -> None:
    given, losses = case(dtype, layout, *SIZES[name]), both()
    got, want = one_launch(losses, given, 1.0, 0.25, 1.0), exact(losses, given, 1.0, 0.25, 1.0)
    assert max(error(a, b) for a, b in zip(got[:2], want[:2], strict=True)) < VALUE
    assert max(error(a, b) for a, b in zip(got[2:], want[2:], strict=True)) < GRADIENT[dtype]
    for gradient, x in zip(got[2:], given["student_features"] * 3, strict=True):
        assert gradient.dtype == x.dtype and gradient.stride() == x.stride()


@pytest.mark.parametrize(
    "options",
    [
        {"rectify": "relu", "eps": 1e-7, "eps_mode": "absolute"},
        {"distance": "mse", "rectify": "none"},
        {"distance": "smooth_l1", "average": "n"},
    ],
    ids=str,
)
def test_all_options_of_the_map(options: dict[str, Any]) -> None:
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    got, want = one_launch(both(**options), given, 1.0), exact(both(**options), given, 1.0)
    assert max(error(a, b) for a, b in zip(got[:2], want[:2], strict=True)) < VALUE
    assert max(error(a, b) for a, b in zip(got[2:], want[2:], strict=True)) < GRADIENT[torch.float32]


@pytest.mark.parametrize("outer", [("gkd",), ("bmfi",), ("gkd", "bmfi")])
def test_aid_weights_each_loss(outer: tuple[str, ...]) -> None:
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    losses = {name: AIDLoss(loss, alpha=0.9) if name in outer else loss for name, loss in both().items()}
    got, want = one_launch(losses, given, 1.0), exact(losses, given, 1.0)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < GRADIENT[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_value_depends_on_how_many_blocks_there_are_and_which_is_first(layout: str) -> None:
    given = case(torch.bfloat16, layout, *SIZES["odd"])
    first = one_launch(both(), given, 1.0)
    for seed, processors in ((1, 1), (5, 2), (9, 7), (11, 40)):
        other = one_launch(both(), given, 1.0, seed=seed, processors=processors)
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True)), f"seed {seed}, {processors} blocks"


def test_it_is_one_launch_that_moves_seven_units() -> None:
    """Two of them, the second read of both features, from the cache, on a GPU."""
    sizes = ((64, 32, 32), (64, 16, 16))
    given = case(torch.bfloat16, "contiguous", 2, sizes)
    with emulated() as emulator, backend.assigned("terms_persistent", "native"):
        emulator.reset_counts()
        step(both(), given)
        moved = emulator.counts()
    unit = sum(x.numel() * x.element_size() for x in given["student_features"])
    # The other two are the boxes' masks.
    assert moved["launches"] == 2
    assert (moved["bytes_read"], moved["bytes_written"]) == (6 * unit, unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_holds_the_channel_sums_of_one_read_of_each_network_beside_its_results(dtype: torch.dtype) -> None:
    """A read pass's sums of the tiles, of student and teacher: those of the features lie where those of the gradients were. And the
    teacher's channel weights, and some numbers a tile."""
    images, channels, tiles = 2, 64, 2 * 10
    given = case(dtype, "contiguous", images, ((channels, 32, 40 if dtype == torch.float32 else 80),))
    pyramids = [given[name] for name in ("student_features", "teacher_features", "student_gradients", "teacher_gradients")]
    masks = torch.rand(given["student_features"][0][:, 0].numel())
    arguments = (*pyramids, masks, None, "abs", "l1", 1e-6, True, "nhw", 0.5, [1.0] * 4)
    with emulated():
        beside = held_beside(partial(torch.ops.kdkernels_emulated.terms_persistent, *arguments))
    sums, weights, numbers = 2 * tiles * channels, images * channels, 12 * tiles
    assert beside < 4 * (sums + weights + numbers), f"{beside / 4 / tiles / channels:.2f} numbers a tile and channel"


@pytest.mark.parametrize("broken", ["student_features", "teacher_features", "student_gradients", "teacher_gradients"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_where_the_passes_have_it(broken: str, value: float) -> None:
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    given[broken][1][1, 3, 2, 4] = value
    got, want = one_launch(both(), given, 1.0), step(both(), given, 1.0)
    assert not all(bool(x.isfinite().all()) for x in want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize(
    ("losses", "change"),
    [
        ({"gkd": GKDLoss()}, {}),
        ({"gkd": GKDLoss(normalize="zscore"), "bmfi": BMFILoss()}, {}),
        ({"gkd": GKDLoss(channel_weight="abs"), "bmfi": BMFILoss()}, {}),
        ({"gkd": GKDLoss(activation="abs"), "bmfi": BMFILoss()}, {}),
        ({"gkd": GKDLoss(), "bmfi": BMFILoss(lambda_=0.1)}, {}),
        ({"gkd": GKDLoss(), "bmfi": BMFILoss(attention_from="mean")}, {}),
        ({"gkd": GKDLoss(), "bmfi": BMFILoss()}, {"dtype": torch.float16}),
        ({"gkd": GKDLoss(), "bmfi": BMFILoss()}, {"sizes": ((4, 3, 3),) * 9}),
    ],
)
def test_what_it_cannot_do_is_done_by_passes(losses: Losses, change: dict[str, Any], called: list[str]) -> None:
    given = case(change.get("dtype", torch.float32), "contiguous", 2, change.get("sizes", SIZES["odd"][1]))
    one_launch(losses, given, 1.0)
    assert "terms" in called and "terms_persistent" not in called


@pytest.mark.parametrize("preferred", [True, False])
def test_it_is_taken_where_it_is_preferred(preferred: bool, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def prefers(name: str, primitive: str, tensors: list[Tensor]) -> bool:
        asked.append((name, primitive))
        return preferred

    monkeypatch.setattr(backend, "prefers", prefers)
    with emulated():
        step(both(), case(torch.float32, "contiguous", *SIZES["odd"]), 1.0)
    assert asked == [("native", "terms_persistent")]
    assert ("terms_persistent" in called, "terms" in called) == (preferred, not preferred)


def test_tensors_on_a_cpu_are_refused(called: list[str]) -> None:
    """By a loss, which goes by passes, and by the primitive: `auto` has its reference, a named backend says why."""
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    with backend.assigned("terms_persistent", "native"):
        step(both(), given, 1.0)
    assert "terms" in called and "terms_persistent" not in called
    arguments = directly(given)
    want = ops.terms_persistent(*arguments)
    with emulated():
        got = ops.terms_persistent(*arguments)
    assert max(error(a.detach(), b.detach().double()) for a, b in zip(got, want, strict=True)) < VALUE
    set_backend("native")
    with pytest.raises(RuntimeError, match="cannot run terms_persistent: one launch is for a GPU, the tensors are on cpu"):
        ops.terms_persistent(*arguments)


@pytest.mark.parametrize("freed", [True, False])
def test_a_graph_behind_the_teachers_losses_is_left_alone(freed: bool) -> None:
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    losses: Losses = {name: AIDLoss(loss) for name, loss in both().items()}
    leaf = given["teacher_losses"].clone().requires_grad_()
    own = leaf * leaf
    if freed:
        own.sum().backward()
        leaf.grad = None
    want = one_launch(losses, {**given, "teacher_losses": own.detach()}, 1.0)
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    with emulated(), backend.assigned("terms_persistent", "native"):
        values = FusedLoss(losses)(**{**given, "student_features": leaves, "teacher_losses": own})
        sum(values.values()).sum().backward()
    assert leaf.grad is None
    assert all(same_bits(a, b) for a, b in zip([*values.values(), *(x.grad for x in leaves)], want, strict=True))


@pytest.mark.parametrize("factor", [torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0, device="meta")], ids=["float64", "elsewhere"])
def test_factors_that_are_no_fp32_constants_beside_the_features_are_refused(factor: torch.Tensor) -> None:
    operands, (_, *others), options = directly(case(torch.float32, "contiguous", *SIZES["odd"]))
    set_backend("native")
    with emulated(), pytest.raises(RuntimeError, match="gradients, masks or factors are in float64 or on another device"):
        ops.terms_persistent(operands, [factor, *others], options)
    set_backend("auto")
    with emulated():
        found = ops.terms_persistent(operands, [1, *others], options)
    assert all(x.isfinite().all() for x in found)


def test_the_primitives_factors_are_constants() -> None:
    operands, _, options = directly(case(torch.float32, "contiguous", *SIZES["odd"]))
    factors = [torch.tensor(2.0, requires_grad=True) for _ in range(3)]
    with emulated():
        values = ops.terms_persistent(operands, factors, options)
        sum(value.sum() for value in values).backward()
    assert all(factor.grad is None for factor in factors) and all(x.grad is not None for x in operands.s)


def test_a_teachers_features_may_require_a_gradient(called: list[str]) -> None:
    """As in a loop that asks autograd for the teacher's gradients."""
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    want = one_launch(both(), given, 1.0)
    leaves = [x.clone().requires_grad_() for x in given["teacher_features"]]
    got = one_launch(both(), {**given, "teacher_features": leaves}, 1.0)
    assert called.count("terms_persistent") == 2 and "terms" not in called
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("argument", ["student_gradients", "teacher_gradients"])
def test_what_is_no_pyramid_is_called_by_its_name(argument: str) -> None:
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    given[argument][1] = given[argument][1][0]
    with pytest.raises(ValueError, match=rf"^{argument}, level 1: expected shape \(N, C, H, W\)") as found:
        one_launch(both(), given)
    with pytest.raises(ValueError, match="expected shape") as by_passes:
        step(both(), given)
    assert str(found.value) == str(by_passes.value)


def test_the_passes_are_its_reference() -> None:
    given = case(torch.float32, "contiguous", *SIZES["odd"])
    with backend.assigned("terms_persistent", "reference"):
        by_passes = step(both(), given, 1.0)
    got = one_launch(both(), given, 1.0)
    assert max(error(a, b.double()) for a, b in zip(got, by_passes, strict=True)) < GRADIENT[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [2, 0])
def test_the_operator_is_what_its_schema_and_fake_say(images: int, layout: str) -> None:
    given = case(torch.float32, layout, images, SIZES["odd"][1])
    masks = torch.rand(images * sum(h * w for _, h, w in SIZES["odd"][1]))
    pyramids = [given[name] for name in ("student_features", "teacher_features", "student_gradients", "teacher_gradients")]
    arguments = ("abs", "l1", 1e-6, True, "nhw", 0.5, [1.0, 0.5, 0.25, 2.0])
    with emulated():
        call = (torch.ops.kdkernels.terms_persistent, ("native", *pyramids, masks, torch.rand(4, 3, images), *arguments))
        assert checked(call)


def test_more_than_eight_levels_are_refused_by_the_operator() -> None:
    given = case(torch.float32, "contiguous", 1, ((4, 3, 3),) * 9)
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    arguments = ("abs", "l1", 1e-6, True, "n", 0.5, [1.0] * 4)
    with emulated(), pytest.raises(RuntimeError, match="8 levels, got 9"):
        torch.ops.kdkernels_emulated.terms_persistent(*(given[name] for name in names), torch.zeros(81), None, *arguments)
    assert len(given["student_features"]) == 9
