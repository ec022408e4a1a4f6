"""Where nothing is to learn the losses are 0 with zero gradient; non-finite input stays visible; wrong shapes are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import bmfi, cases, gkd
from oracle.compare import RTOL_MASK, assert_close, assert_levels_close

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, NonFinite

MAPS = {
    "paper": lambda **o: GKDLoss(**o),
    "release": lambda **o: GKDLoss(preset="release", **o),
    "softmax": lambda **o: GKDLoss(normalize="softmax", **o),
    "zscore": lambda **o: GKDLoss(normalize="zscore", **o),
    "plain": lambda **o: GKDLoss(normalize="none", rectify="none", **o),
    "second order": lambda **o: GKDLoss(grad_mode="second_order", **o),
}
ALL_BMFI = {"alpha": 0.4, "gamma": 0.3, "lambda_": 0.2, "beta_bg": 0.1}
LOSSES = {
    **MAPS,
    "imitation": lambda **o: GKDLoss(form="imitation", **o),
    "imitation without maps": lambda **o: GKDLoss(form="imitation", spatial=False, **o),
    "bmfi": lambda **o: BMFILoss(**ALL_BMFI, **o),
    "bmfi mean": lambda **o: BMFILoss(**ALL_BMFI, attention_from="mean", **o),
    "aid": lambda **o: AIDLoss(BMFILoss(**ALL_BMFI, **o)),
}


def _evaluate(loss, s, t, g_s, g_t, boxes=None, image_size=cases.IMAGE_SIZE):
    """The loss by FusedLoss, which hands each what it knows; without boxes given, one box an image."""
    images = s[0].shape[0] if len(s) else 0
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]])] * images if boxes is None else boxes
    return FusedLoss({"loss": loss})(s, t, g_s, g_t, boxes, image_size, torch.tensor(0.5))["loss"]


def _zero_gradient(loss, x) -> bool:
    return all(g is None or bool((g == 0).all()) for g in torch.autograd.grad(loss.sum(), x, allow_unused=True))


@pytest.mark.parametrize("name", LOSSES)
def test_empty_pyramid(name):
    got = _evaluate(LOSSES[name](), [], [], [], [])
    assert got.item() == 0
    assert _evaluate(LOSSES[name](reduction="none"), [], [], [], []).shape[0] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_no_images(name):
    x = [torch.zeros(0, 3, 4, 5, requires_grad=True), torch.zeros(0, 2, 2, 2, requires_grad=True)]
    empty = [level.detach() for level in x]
    got = _evaluate(LOSSES[name](reduction="none"), x, empty, empty, empty)
    assert got.shape == (2, 0)
    total = _evaluate(LOSSES[name](), x, empty, empty, empty)
    assert total.item() == 0
    assert _zero_gradient(total, x)


@pytest.mark.parametrize("name", LOSSES)
def test_single_cell_levels_and_single_channels(name):
    arrays = cases.four(1, [(2, 3, 1, 1), (2, 1, 3, 2), (2, 1, 1, 1)])
    x, t, g_s, g_t = (cases.tensors(levels, requires_grad=i == 0) for i, levels in enumerate(arrays))
    got = _evaluate(LOSSES[name](reduction="none"), x, t, g_s, g_t)
    gradients = torch.autograd.grad(got.sum(), x, allow_unused=True)
    assert torch.isfinite(got).all()
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
    if name in MAPS and name != "plain":
        assert got[[0, 2]].abs().max() == 0, "the map of a single cell is constant"
        assert all(gradients[level] is None or gradients[level].abs().max() == 0 for level in (0, 2))


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", ["paper", "release", "softmax", "zscore"])
def test_constant_maps(name, side):
    s, t, g_s, g_t = cases.four(2, [(2, 3, 3, 7)])
    if side != "teacher":
        s = [np.full_like(s[0], 0.1)]
    if side != "student":
        t = [np.full_like(t[0], -0.7)]
    x = cases.tensors(s, requires_grad=True)
    got = _evaluate(MAPS[name](), x, *(cases.tensors(levels) for levels in (t, g_s, g_t)))
    (gradient,) = torch.autograd.grad(got, x)
    assert torch.isfinite(got)
    assert torch.isfinite(gradient).all()
    if side == "both":
        assert abs(got.item()) < 1e-14
    if side != "teacher" and name != "softmax":
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", [name for name in LOSSES if "bmfi" not in name and name != "aid"])
def test_gradients_of_zero(name, which):
    s, t, g_s, g_t = cases.four(3)
    if which != "teacher":
        g_s = [np.zeros_like(level) for level in g_s]
    if which != "student":
        g_t = [np.zeros_like(level) for level in g_t]
    x = cases.tensors(s, requires_grad=True)
    got = _evaluate(LOSSES[name](), x, *(cases.tensors(levels) for levels in (t, g_s, g_t)))
    assert torch.isfinite(got)
    nothing = which != "student" if name.startswith("imitation") else which != "teacher"
    if nothing:
        assert _zero_gradient(got, x)
    if which == "both" or (nothing and name.startswith("imitation")):
        assert got.item() == 0


@pytest.mark.parametrize("name", ["paper", "release", "imitation"])
def test_a_level_without_gradient_contributes_nothing(name):
    s, t, g_s, g_t = cases.four(4)
    x = cases.tensors(s, requires_grad=True)
    student, teacher = cases.tensors(g_s), cases.tensors(g_t)
    student[1] = teacher[1] = None
    got = _evaluate(LOSSES[name](reduction="none"), x, cases.tensors(t), student, teacher, [torch.zeros(0, 4)] * 2)
    assert got[1].abs().max() == 0
    gradients = torch.autograd.grad(got.sum(), x, allow_unused=True)
    assert gradients[1] is None or gradients[1].abs().max() == 0
    if name != "imitation":
        want = gkd.map_value(s, t, g_s, g_t, gkd.PAPER if name == "paper" else gkd.RELEASE)
        assert_close(got[[0, 2]], want[[0, 2]])


BAD_BOXES = {
    "none": [],
    "right of the image": [[200.0, 5.0, 300.0, 40.0]],
    "above the image": [[5.0, -40.0, 50.0, -1.0]],
    "nan": [[math.nan, 5.0, 50.0, 40.0]],
    "all nan": [[math.nan] * 4],
    "inverted": [[50.0, 40.0, 5.0, 5.0]],
    "no area": [[5.0, 5.0, 5.0, 40.0], [5.0, 5.0, 50.0, 5.0]],
}


@pytest.mark.parametrize("bad", BAD_BOXES)
def test_boxes_without_area_leave_no_region_and_a_full_background(bad):
    s, t, _, _ = cases.four(5)
    x = cases.tensors(s, requires_grad=True)
    boxes = [torch.tensor(BAD_BOXES[bad]).reshape(-1, 4)] * 2
    region = BMFILoss(alpha=1.0, gamma=0.0)(x, cases.tensors(t), boxes, cases.IMAGE_SIZE)
    assert region.item() == 0
    assert _zero_gradient(region, x)
    options = bmfi.BMFI(**ALL_BMFI)
    got = BMFILoss(**ALL_BMFI, reduction="none")(x, cases.tensors(t), boxes, cases.IMAGE_SIZE)
    none = [np.zeros((0, 4))] * 2
    assert_close(got, bmfi.value(s, t, none, cases.IMAGE_SIZE, options), RTOL_MASK)
    want = bmfi.gradient(s, t, none, cases.IMAGE_SIZE, options, np.ones((3, 2)))
    assert_levels_close(torch.autograd.grad(got.sum(), x), want, RTOL_MASK)


@pytest.mark.parametrize("bad", BAD_BOXES)
@pytest.mark.parametrize("name", ["imitation", "weighted maps"])
def test_boxes_without_area_in_gkd(name, bad):
    s, t, g_s, g_t = (cases.tensors(levels, requires_grad=i == 0) for i, levels in enumerate(cases.four(6)))
    loss = GKDLoss(form="imitation") if name == "imitation" else GKDLoss(box_weight="sqrt_mask", average="n")
    got = loss(s, t, g_s, g_t, [torch.tensor(BAD_BOXES[bad]).reshape(-1, 4)] * 2, cases.IMAGE_SIZE)
    assert got.item() == 0
    assert _zero_gradient(got, s)


def test_the_root_of_the_mask_has_no_infinite_slope_at_its_zeros():
    s, t, g_s, g_t = (cases.tensors(levels, requires_grad=i == 0) for i, levels in enumerate(cases.four(7)))
    loss = GKDLoss(box_weight="sqrt_mask")(s, t, g_s, g_t, [torch.tensor([[0.0, 0.0, 10.0, 10.0]])] * 2, cases.IMAGE_SIZE)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, s))


def test_all_coefficients_zero_are_refused():
    with pytest.raises(ValueError, match="(?s)alpha.*all 0"):
        BMFILoss(alpha=0.0, gamma=0.0)


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("source", range(4), ids=["student features", "teacher features", "student gradients", "teacher gradients"])
@pytest.mark.parametrize("name", LOSSES)
def test_non_finite_input_stays_non_finite_and_is_found(name, source, bad):
    needed = {"imitation": (0, 1, 3), "imitation without maps": (0, 1, 3), "bmfi": (0, 1), "bmfi mean": (0, 1), "aid": (0, 1)}
    levels = [cases.tensors(x) for x in cases.four(10)]
    levels[source][1][1, 2, 0, 1] = bad
    loss = LOSSES[name](reduction="none")
    got = _evaluate(loss, *levels)
    if source not in needed.get(name, range(4)):
        assert torch.isfinite(got).all()
        assert loss.check() == []
        return
    assert not torch.isfinite(got[1, 1]), f"{got[1, 1].item()} hides {bad}"
    assert torch.isfinite(got).sum() == got.numel() - 1
    found = loss.check()
    assert found
    assert {(f.level, f.image) for f in found} == {(1, 1)}
    assert loss.check() == [], "reading the flag clears it"


def test_check_names_loss_and_term():
    s, t, g_s, g_t = (cases.tensors(levels) for levels in cases.four(11))
    s[2][0, 0, 0, 0] = math.nan
    frame = cases.box_tensors(), cases.IMAGE_SIZE
    loss = BMFILoss(**ALL_BMFI)
    loss(s, t, *frame)
    assert sorted(loss.check()) == [NonFinite("BMFILoss", term, 2, 0) for term in ("attention", "background", "region", "whole")]
    gkd_map, imitation = GKDLoss(), GKDLoss(form="imitation")
    gkd_map(s, t, g_s, g_t)
    imitation(s, t, None, g_t)
    assert gkd_map.check() == [NonFinite("GKDLoss", "map", 2, 0)]
    assert imitation.check() == [NonFinite("GKDLoss", "imitation", 2, 0)]


def test_the_flag_survives_later_finite_calls_until_it_is_read():
    s, t, g_s, g_t = (cases.tensors(levels) for levels in cases.four(12))
    broken = [level.clone() for level in s]
    broken[0][1] = math.inf
    loss = GKDLoss()
    loss(broken, t, g_s, g_t)
    loss(s, t, g_s, g_t)
    assert [(f.level, f.image) for f in loss.check()] == [(0, 1)]
    loss(s, t, g_s, g_t)
    assert loss.check() == []
    assert loss.state_dict() == {}


@pytest.mark.parametrize("name", LOSSES)
def test_raise_mode(name):
    levels = [cases.tensors(x) for x in cases.four(13)]
    loss = LOSSES[name](on_nonfinite="raise")
    assert torch.isfinite(_evaluate(loss, *levels))
    levels[1][2][1, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"(?s)level 2.*image 1"):
        _evaluate(loss, *levels)


@pytest.mark.parametrize("name", ["paper", "imitation", "bmfi"])
def test_shape_errors_list_the_levels_of_both_sides(name):
    s = cases.tensors(cases.pyramid(14, [(2, 3, 4, 6), (2, 3, 2, 3)]))
    with pytest.raises(ValueError, match=r"(?s)2, 3, 4, 6.*2, 3, 2, 3.*2, 3, 4, 6"):
        _evaluate(LOSSES[name](), s, s[:1], s, s[:1])
    if name != "paper":
        other = cases.tensors(cases.pyramid(15, [(2, 3, 4, 6), (2, 5, 2, 3)]))
        with pytest.raises(ValueError, match=r"(?s)2, 3, 4, 6.*2, 3, 2, 3.*2, 3, 4, 6.*2, 5, 2, 3"):
            _evaluate(LOSSES[name](), s, other, s, other)


@pytest.mark.parametrize("name", ["paper", "imitation", "bmfi"])
def test_both_sides_have_the_same_images_and_levels_of_one_pyramid_too(name):
    s, t = cases.tensors(cases.pyramid(15, [(2, 3, 4, 6)])), cases.tensors(cases.pyramid(15, [(1, 3, 4, 6)]))
    with pytest.raises(ValueError, match=r"(?s)2, 3, 4, 6.*1, 3, 4, 6"):
        _evaluate(LOSSES[name](), s, t, s, t, [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match=r"(?s)2, 3, 4, 6.*1, 3, 4, 6"):
        _evaluate(LOSSES[name](), s + t, s + t, s + t, s + t)


def test_gradients_must_fit_their_features():
    s = cases.tensors(cases.pyramid(16, [(2, 3, 4, 6)]))
    other = cases.tensors(cases.pyramid(17, [(2, 4, 4, 6)]))
    with pytest.raises(ValueError, match=r"(?s)student_gradients.*2, 4, 4, 6.*2, 3, 4, 6"):
        GKDLoss()(s, s, other, s)
    with pytest.raises(ValueError, match=r"(?s)teacher_gradients.*2, 4, 4, 6.*2, 3, 4, 6"):
        GKDLoss()(s, s, s, other)


def test_dicts_must_have_the_same_keys_in_the_same_order():
    a, b = cases.tensors(cases.pyramid(18, [(1, 2, 2, 2)] * 2))
    with pytest.raises(ValueError, match="p3"):
        BMFILoss()({"p3": a, "p4": b}, {"p4": b, "p3": a}, [torch.zeros(0, 4)], (8, 8))


@pytest.mark.parametrize(("missing", "index"), [("student_gradients", 2), ("teacher_gradients", 3)])
def test_missing_gradients_are_named(missing, index):
    args = [cases.tensors(levels) for levels in cases.four(19)]
    args[index] = None
    with pytest.raises(ValueError, match=missing):
        GKDLoss()(*args)


@pytest.mark.parametrize(
    "given", [{}, {"boxes": cases.box_tensors()}, {"image_size": cases.IMAGE_SIZE}], ids=["neither", "boxes", "image_size"]
)
def test_missing_boxes_or_image_size_are_named(given):
    s, t, g_s, g_t = (cases.tensors(levels) for levels in cases.four(20))
    missing = "image_size" if "boxes" in given else "boxes"
    with pytest.raises(ValueError, match=missing):
        BMFILoss()(s, t, **given)
    with pytest.raises(ValueError, match=missing):
        GKDLoss(box_weight="sqrt_mask")(s, t, g_s, g_t, **given)


def test_as_many_lists_of_boxes_as_images():
    s, t, _, _ = (cases.tensors(levels) for levels in cases.four(21))
    with pytest.raises(ValueError, match=r"(?s)3.*2"):
        BMFILoss()(s, t, [torch.zeros(0, 4)] * 3, cases.IMAGE_SIZE)
