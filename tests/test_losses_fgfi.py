"""FGFI: which positions its mask chooses, and anchors that do not fit."""

from __future__ import annotations

import pytest
import torch
from method_support import anchors, call, given, made

from kdkernels import FusedLoss
from kdkernels.losses import fgfi

GRID = (3, 4)
#: One square of 16 pixels a cell, and one of 32 around the same centre.
SQUARES = torch.tensor(
    [
        [16 * x + 8 - half, 16 * y + 8 - half, 16 * x + 8 + half, 16 * y + 8 + half]
        for y in range(GRID[0])
        for x in range(GRID[1])
        for half in (8.0, 16.0)
    ]
)


def _masks(boxes, *coarser):
    """Of the level of the squares, and of others of a single position."""
    given = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    return fgfi.near_anchors([SQUARES, *coarser], given, [GRID, *[(1, 1)] * len(coarser)])


def _mask(boxes):
    return _masks(boxes)[0]


def test_the_best_anchors_of_a_box_are_chosen_and_those_above_half_of_their_overlap():
    one = torch.zeros(GRID)
    one[1, 2] = 1
    # An anchor itself: no other has an overlap above one half.
    assert torch.equal(_mask([SQUARES[2 * 6].tolist()])[0], one)
    # Over two cells alike, each with an IoU of 1/2; the large anchors around both have (16 * 24) / (32 * 32 + 2 * 256 - 16 * 24).
    pair = torch.zeros(GRID)
    pair[1, 1:3] = 1
    assert torch.equal(_mask([[16.0, 16.0, 48.0, 32.0]])[0], pair)


def test_the_best_anchor_of_a_box_is_that_of_all_levels():
    # Half of the coarse anchor, and two of the squares of one size.
    box = [16.0, 16.0, 48.0, 32.0]
    for coarse, fine, of_coarse in (([16.0, 16.0, 48.0, 48.0], 2, 1), (box, 0, 1), ([0.0, 0.0, 64.0, 64.0], 2, 0)):
        masks = _masks([[box]], torch.tensor([coarse]))
        assert [float(m.sum()) for m in masks] == [fine, of_coarse]
    # Each box has its own best anchor, whatever the round that it is in.
    fine = SQUARES[2 * 6].tolist()
    both = _masks([[box, fine]], torch.tensor([box]))
    assert torch.equal(both[0], _mask([[fine]])) and float(both[1]) == 1


def test_a_box_that_touches_no_anchor_or_is_none_chooses_nothing():
    nan = float("nan")
    boxes = [[500.0, 500.0, 600.0, 600.0], [20.0, 20.0, 20.0, 20.0], [nan, 1.0, 20.0, 20.0]]
    assert all(float(_mask([b]).sum()) == 0 for b in (*boxes, []))
    assert torch.equal(_mask([[*boxes, SQUARES[0].tolist()]]), _mask([SQUARES[0].tolist()]))


def test_images_have_their_own_masks_and_rounds_make_no_difference(monkeypatch):
    boxes = [SQUARES[:3].tolist(), [], SQUARES[[5, 20]].tolist()]
    want = _mask(boxes)
    assert want.shape == (3, *GRID) and float(want[1].sum()) == 0
    assert torch.equal(want[2], _mask([boxes[2]])[0])
    every = _masks(boxes, SQUARES[5:6])
    monkeypatch.setattr(fgfi, "CHUNK", 1)
    assert torch.equal(_mask(boxes), want)
    assert all(torch.equal(a, b) for a, b in zip(_masks(boxes, SQUARES[5:6]), every, strict=True))


def test_where_nothing_is_chosen_the_level_is_0():
    case = given(1, boxes=[[[900.0, 900.0, 950.0, 950.0]]] * 3)
    rows = call(made("fgfi", case, reduction="none"), case)
    assert float(rows.detach().abs().max()) == 0
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(rows.sum(), case["student_features"]))


def test_anchors_go_by_the_names_of_the_levels():
    case = given(3)
    loss = made("fgfi", case)
    want = call(loss, case)
    named = {**case, **{key: dict(zip("abcd", case[key], strict=True)) for key in ("student_features", "teacher_features")}}
    assert torch.equal(call(loss, named), want)
    by_name = dict(reversed(list(zip("abcd", anchors(), strict=True))))
    assert torch.equal(call(loss, {**named, "anchors": by_name}), want)
    assert torch.equal(FusedLoss({"own": loss})(**{**named, "anchors": by_name})["own"], want)
    with pytest.raises(ValueError, match=r"anchors are of levels \['d', 'c', 'b', 'a'\], teacher_features have \[0: \(3, 4, 6, 9\)"):
        call(loss, {**case, "anchors": by_name})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: [None, *a[1:]], "anchors, level 0: expected a tensor, got NoneType"),
        (lambda a: [*a[:3], a[3].tolist()], "anchors, level 3: expected a tensor, got list"),
        (lambda a: a[0], "anchors must be a list, tuple or dict .* one a level; got Tensor"),
    ],
)
def test_anchors_of_other_types_are_named(change, said):
    case = given(2)
    with pytest.raises(TypeError, match=said):
        call(made("fgfi", case), {**case, "anchors": change(anchors())})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[:3], r"anchors are of 3 levels, teacher_features have .*\(3, 4, 6, 9\)"),
        (lambda a: [a[0][:-1], *a[1:]], r"level 0: anchors have shape \(107, 4\), teacher_features \(3, 4, 6, 9\)"),
        (lambda a: [a[0], a[1][:, :3], *a[2:]], r"level 1: anchors have shape \(30, 3\)"),
        (lambda a: [*a[:3], a[3][:0]], r"level 3: anchors have shape \(0, 4\)"),
        (lambda a: None, "FGFILoss needs anchors, which is missing"),
    ],
)
def test_anchors_that_do_not_fit_are_named(change, said):
    case = given(2)
    with pytest.raises(ValueError, match=said):
        call(made("fgfi", case), {**case, "anchors": change(anchors())})
