"""Hypothesis strategies for the inputs and options of losses on fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_support import IMAGE_SIZE, LAYOUTS, PYRAMIDS, Level, Shapes
from hypothesis import strategies as st
from levels import DTYPES

from kdkernels import AIDLoss, BMFILoss, DistillationLoss, GKDLoss


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


@st.composite
def boxes(draw: Any) -> list[list[list[float]]]:
    """Up to four boxes an image of two, some of them beyond its edges or without area."""
    height, width = IMAGE_SIZE
    x, y = (st.integers(-size, 5 * size).map(lambda quarter: quarter / 4) for size in (width, height))
    corners = st.tuples(x, y, x, y).map(lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])])
    return [draw(st.lists(corners, max_size=4)) for _ in range(2)]


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
#: Kind of loss -> its options; whether it compares features, which must then be of one size.
KINDS = {"gkd map": (gkd_maps, False), "gkd imitation": (gkd_imitations, True), "bmfi": (bmfis, True)}


@st.composite
def losses(draw: Any, kind: str) -> dict[str, DistillationLoss]:
    """One loss of a kind of `KINDS`, or for "several" a GKD map, BMFI and one of these or an imitation under AID."""
    if kind != "several":
        made = (BMFILoss if kind == "bmfi" else GKDLoss)(**draw(KINDS[kind][0]))
        return {"loss": made}
    found: dict[str, DistillationLoss] = {"map": GKDLoss(**draw(gkd_maps)), "bmfi": BMFILoss(**draw(bmfis))}
    imitation = GKDLoss(**draw(gkd_imitations))
    found["aid"] = AIDLoss(draw(st.sampled_from([found["map"], found["bmfi"], imitation])), granularity=draw(granularities))
    return found


def inputs_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """What a loss of the kind can be called with."""
    return inputs(KINDS.get(kind, (None, True))[1])
