"""The losses on the native kernels, what is particular to the CPU: every mixture of types and layouts, sizes around bands and vectors."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from fused_strategies import bmfis, boxes, inputs_of, shapes
from fused_strategies import losses as losses_of
from fused_support import GRAINS, INF, LAYOUTS, NAN, PYRAMIDS, SMALL, Level, Losses, built, check, evaluated, of_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES
from native_support import needs_library, same_bits, same_everywhere
from torch import Tensor

from kdkernels import AIDLoss, BMFILoss, GKDLoss, set_backend
from kdkernels.losses.aid import GRANULARITIES

pytestmark = needs_library


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


def every(reduction: str = "sum") -> Losses:
    """What all rows and both passes take part in, in several calls of the operator."""
    imitation = GKDLoss(form="imitation", reduction=reduction)
    return {"gkd": GKDLoss(reduction=reduction), "imitation": imitation, "bmfi": BMFILoss(**GRAINS, reduction=reduction)}


def one_batch() -> Losses:
    """One call of the operator, which makes its gradient in the forward pass but in fp16."""
    return {"gkd": GKDLoss(preset="release"), "bmfi": BMFILoss(alpha=0.4, gamma=0.3)}


def of_kinds(sizes: Any, kinds: dict[str, list[tuple[str, str]]], seed: int = 1) -> dict[str, Any]:
    """Arguments of FusedLoss. kinds: for each of `PYRAMIDS` types and layouts that the levels have in turn."""
    drawn = {name: [Level(tuple(shape), *kinds[name][k % len(kinds[name])]) for k, shape in enumerate(sizes)] for name in PYRAMIDS}
    return built({**drawn, "padded": True, "seed": seed}, "cpu")


@pytest.mark.parametrize("kind", ["gkd map", "gkd imitation", "bmfi", "several"])
@settings(max_examples=120)
@given(data=st.data())
def test_any_loss_of_anything(kind: str, data: Any) -> None:
    assert check(data.draw(losses_of(kind)), built(data.draw(inputs_of(kind)), "cpu"), "native") < 1


@settings(max_examples=80)
@given(sizes=shapes(), given_boxes=boxes(), options=bmfis, padded=st.booleans())
def test_any_boxes(sizes: Any, given_boxes: Any, options: Any, padded: bool) -> None:
    drawn = {name: [Level(shape, "fp32", "contiguous") for shape in sizes] for name in PYRAMIDS}
    case = built({**drawn, "padded": padded, "seed": 3, "boxes": given_boxes}, "cpu")
    assert check({"bmfi": BMFILoss(**options), "weighted": GKDLoss(box_weight="sqrt_mask")}, case, "native") < 1


@pytest.mark.parametrize("student", DTYPES)
def test_types_of_their_own(student: str) -> None:
    """Student, teacher and both gradients: the rows of a level that its target does not match are widened first."""
    for teacher, gradients in itertools.product(DTYPES, DTYPES):
        kinds = {"student_features": student, "teacher_features": teacher, "student_gradients": gradients, "teacher_gradients": "bf16"}
        for layout in ("contiguous", "channels_last"):
            case = of_kinds(SMALL, {name: [(kind, layout)] for name, kind in kinds.items()})
            assert check(every(), case, "native") < 1, (teacher, gradients, layout)


@pytest.mark.parametrize("student", LAYOUTS)
def test_layouts_of_student_and_teacher(student: str) -> None:
    for teacher in LAYOUTS:
        kinds = {name: [("fp32", teacher if name.startswith("teacher") else student)] for name in PYRAMIDS}
        assert check(every(), of_kinds(SMALL, kinds), "native") < 1, teacher


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_of_layouts_and_types_of_their_own(dtype: str) -> None:
    layouts, others = list(LAYOUTS), [name for name in DTYPES if name != dtype]
    kinds = {
        name: [(kind, layout) for kind, layout in zip(itertools.cycle([dtype, others[k % 2]]), layouts[k:] + layouts[:k], strict=False)]
        for k, name in enumerate(PYRAMIDS)
    }
    sizes = [(2, 3 + k, 3 + k % 2, 4 + k) for k in range(len(layouts))]
    assert check(every(), of_kinds(sizes, kinds), "native") < 1


SIZES = {
    "one pixel": [(2, 5, 1, 1), (2, 1, 1, 1), (2, 64, 1, 1)],
    "one channel": [(2, 1, 5, 7), (2, 1, 1, 40), (2, 1, 47, 61)],
    "a row or a column": [(2, 6, 1, 33), (2, 6, 33, 1), (2, 6, 1, 31)],
    "widths around vectors": [(2, 4, 3, 15), (2, 4, 1, 16), (2, 4, 1, 17), (2, 4, 3, 11), (2, 4, 2, 31)],
    "channels around vectors and rows taken at once": [(2, c, 3, 5) for c in (2, 3, 5, 7, 15, 16, 17, 31, 33)],
    "around a band": [(1, 3, 23, 89), (1, 3, 32, 64), (1, 3, 3, 683), (1, 5, 64, 64), (1, 2, 17, 241)],
    "several bands": [(2, 6, 71, 97), (2, 3, 50, 84), (2, 17, 13, 21)],
    "one image": [(1, 8, 7, 9), (1, 4, 3, 5)],
    "three images": [(3, 8, 7, 9), (3, 4, 3, 5)],
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: str, layout: str) -> None:
    case = of_kinds(SIZES[name], {part: [(dtype, layout)] for part in PYRAMIDS})
    assert check(every(), case, "native") < 1
    assert check(one_batch(), case, "native") < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_images(layout: str) -> None:
    case = of_kinds([(0, 3, 4, 5), (0, 1, 1, 1)], {name: [("bf16", layout), ("fp16", layout)] for name in PYRAMIDS})
    for losses in (every(), one_batch()):
        values, gradients = evaluated(losses, case, "native")
        assert [value.item() for value in values] == [0.0] * len(losses)
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in case["student_features"]]


def flat(losses: Any, case: dict[str, Any], d: float) -> list[Tensor]:
    """Values and gradients, of losses made anew."""
    return [x for part in evaluated(losses(), case, "native", d) for x in part]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
@pytest.mark.parametrize("losses", [every, one_batch])
def test_the_same_bits_with_all_instructions_and_threads(losses: Any, layout: str) -> None:
    types = dict(zip(PYRAMIDS, ("bf16", "fp16", "fp32", "bf16"), strict=True))
    sizes = [(2, 9, 50, 83), (2, 21, 13, 17), (2, 3, 1, 1)]
    case = of_kinds(sizes, {name: [(kind, layout), ("fp32", layout)] for name, kind in types.items()})
    for d in (1.0, 0.3):
        found = same_everywhere(partial(flat, losses, case, d))
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("grains", [c for k in range(1, 5) for c in itertools.combinations(GRAINS, k)], ids="+".join)
def test_every_mixture_of_grains(grains: tuple[str, ...]) -> None:
    chosen: dict[str, Any] = {name: GRAINS[name] if name in grains else 0.0 for name in GRAINS}
    for dtype, attention_from in itertools.product(DTYPES, ("teacher", "mean")):
        case = of_kinds(SMALL, {name: [(dtype, "contiguous"), (dtype, "channels_last")] for name in PYRAMIDS})
        assert check({"bmfi": BMFILoss(**chosen, attention_from=attention_from, reduction="none")}, case, "native") < 1


BASES: dict[str, Any] = {"map": GKDLoss, "imitation": partial(GKDLoss, form="imitation"), "bmfi": partial(BMFILoss, **GRAINS)}


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("name", BASES)
def test_adaptive_weights(name: str, granularity: str | None) -> None:
    """Alone, and beside the same loss, whose rows it shares."""
    case = of_shapes(SMALL, layouts=("channels_last", "contiguous"), dtypes=tuple(DTYPES))
    base = BASES[name]
    aid = AIDLoss(base(reduction="none"), granularity=granularity)
    assert check({"aid": aid}, case, "native") < 1
    assert check({"aid": aid, "plain": base()}, case, "native") < 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("source", PYRAMIDS)
def test_what_is_not_finite_stays_in_its_image_and_level(source: str, value: float, layout: str) -> None:
    """All else has the bits that it had. Levels of several bands, the last pixel of which is the bad one."""
    sizes = [(2, 3, 47, 61), (2, 5, 3, 5)]
    kinds = {name: [("fp32", layout)] for name in PYRAMIDS}
    losses = every("none")
    before = evaluated(losses, of_kinds(sizes, kinds), "native")
    assert not any(loss.check() for loss in losses.values())
    case = of_kinds(sizes, kinds)
    case[source][0][1, 2, -1, -1] = value
    after = evaluated(losses, case, "native")
    for old, new in zip(before[0], after[0], strict=True):
        assert same_bits(old[0, :1], new[0, :1]) and same_bits(old[1], new[1])
    assert any(not new[0, 1].isfinite() for new in after[0])
    assert same_bits(before[1][0][0], after[1][0][0]) and same_bits(before[1][1], after[1][1])
    assert not after[1][0][1].isfinite().all()
    found = {(report.level, report.image) for loss in losses.values() for report in loss.check()}
    assert found == {(0, 1)}


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_that_are_not_finite_or_nothing(dtype: str, value: float) -> None:
    """At one level and image of one loss: all else has the bits that it has where it is 1."""
    case = of_shapes(SMALL, layouts=("contiguous", "channels_last"), dtypes=(dtype,))
    losses = {"gkd": GKDLoss(reduction="none"), "bmfi": BMFILoss(alpha=0.4, gamma=0.3, reduction="none")}
    upstream = [torch.ones(3, 2), torch.ones(3, 2)]
    _, plain = evaluated(losses, case, "native", upstream)
    upstream[1][1, 0] = value
    _, found = evaluated(losses, case, "native", upstream)
    assert same_bits(found[0], plain[0]) and same_bits(found[1][1], plain[1][1]) and same_bits(found[2], plain[2])
    hit = found[1][0]
    assert hit.isfinite().all() if value == 0 else not hit.isfinite().any()
    _, (one, two, three) = evaluated(losses, case, "native", [torch.full((3, 2), value)] * 2)
    assert all(g.eq(0).all() if value == 0 else not g.isfinite().any() for g in (one, two, three))
