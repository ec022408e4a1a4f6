"""`box_mask`: every kind and option cell by cell against the loops; the box arithmetic at the edges of fp32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import boxes as box_oracle
from oracle import cases
from oracle.compare import RTOL_MASK, assert_close

from kdkernels import functional

SIZES = [(8, 12), (5, 6), (3, 3), (1, 2), (1, 1)]
KINDS = ["gaussian", "exponential", "area", "binary", "assigned", "background"]
EXACT = {"area", "binary", "assigned", "background"}


def _check(boxes, image_size=cases.IMAGE_SIZE, sizes=SIZES, tensors=None, **options):
    got = functional.box_mask(cases.box_tensors(boxes) if tensors is None else tensors, image_size, sizes, **options)
    want = box_oracle.box_mask(boxes, image_size, sizes, **options)
    for level, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == torch.float32
        assert ((a > 0).numpy() == (b > 0)).all(), f"level {level}: other cells are covered"
        # One fp32 quotient rounds the same way everywhere; the windows have two exponentials and a product before it.
        exact = options.get("kind") in EXACT
        assert_close(a, b, rtol=0.0 if exact else RTOL_MASK, what=f"{options} level {level}")
    return got


@pytest.mark.parametrize("kind", KINDS)
def test_two_boxes_overlap_and_partly_outside(kind):
    got = _check(cases.BOXES, kind=kind)
    assert any(level[0].max() > 0 for level in got)
    assert any(level[1].max() > 0 for level in got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", range(3))
def test_each_box_alone(kind, image):
    _check([cases.BOXES[0][image : image + 1]], kind=kind)


@pytest.mark.parametrize("kind", ["gaussian", "exponential", "background"])
@pytest.mark.parametrize(
    "options", [{"expand": 1.0}, {"expand": 1.5}, {"expand": 3.0}, {"inner_ones": False}, {"area_norm": False}], ids=str
)
def test_options_of_the_windows(kind, options):
    _check(cases.BOXES, kind=kind, **options)


@pytest.mark.parametrize("kind", ["gaussian", "exponential"])
@pytest.mark.parametrize("inner_ones", [True, False])
def test_released_placement(kind, inner_ones):
    inside = [np.array([[40.0, 24.0, 56.0, 40.0], [20.0, 10.0, 50.0, 50.0]]), np.array([[2.0, 3.0, 14.0, 12.0]])]
    got = _check(inside, kind=kind, placement="released", inner_ones=inner_ones)
    assert got[0][0].max() > 0
    assert got[0][1].max() == 0, "a box in the outer quarter falls outside the released crop"


def test_a_box_by_hand():
    # 16 x 8 grid of a 128 x 64 image: the box covers columns 4..5 and rows 2..3, the window columns 3..6 and rows 1..4, its area is 16.
    (mask,) = functional.box_mask([torch.tensor([[32.0, 16.0, 48.0, 32.0]])], (64, 128), [(8, 16)])
    cell = mask[0] * 16
    assert cell[2:4, 4:6].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert cell[1, 3].item() == pytest.approx(math.exp(-1), rel=1e-6)
    assert cell[1, 4].item() == pytest.approx(math.exp(-0.5) * math.exp(-0.125), rel=1e-6)
    assert cell[1, 5].item() == pytest.approx(math.exp(-0.5), rel=1e-6)
    assert cell[4, 6].item() == pytest.approx(math.exp(-0.25), rel=1e-6)
    assert int((mask > 0).sum()) == 16


def test_fgd_area_includes_the_far_edges():
    (mask,) = functional.box_mask([torch.tensor([[32.0, 16.0, 48.0, 32.0]])], (64, 128), [(8, 16)], kind="area")
    assert int((mask > 0).sum()) == 9
    assert mask.max().item() == pytest.approx(1 / 9)


def test_every_box_has_the_same_weight_budget_whatever_its_size():
    big, small = torch.tensor([[0.0, 0.0, 512.0, 512.0]]) + 256, torch.tensor([[0.0, 0.0, 64.0, 64.0]]) + 480
    options = {"kind": "gaussian", "expand": 1.0}
    sums = [functional.box_mask([box], (1024, 1024), [(64, 64)], **options)[0].sum().item() for box in (big, small)]
    assert sums == pytest.approx([1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "box",
    [
        [float("nan"), 1.0, 20.0, 20.0],
        [1.0, 1.0, 20.0, float("nan")],
        [40.0, 10.0, 20.0, 30.0],
        [10.0, 10.0, 10.0, 30.0],
        [200.0, 10.0, 300.0, 30.0],
        [-50.0, -60.0, -10.0, -20.0],
        [0.0, 64.0, 20.0, 90.0],
    ],
    ids=["nan x1", "nan y2", "inverted", "no area", "right of the image", "left of the image", "touching the lower edge"],
)
def test_boxes_without_area_are_skipped(box, kind):
    box = np.array([box])
    _check([np.concatenate([box, cases.BOXES[0][:1]]), box], kind=kind)
    (alone,) = functional.box_mask(cases.box_tensors([box]), (64, 64), [(4, 4)], kind=kind)
    assert alone.unique().tolist() == ([1 / 16] if kind == "background" else [0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_boxes_are_clipped(kind):
    _check([np.array([[-math.inf, 10.0, 40.0, math.inf]])], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_boxes(kind):
    none = np.zeros((0, 4))
    got = _check([none, cases.BOXES[1], none], kind=kind)
    assert_close(got[0][0].sum(), np.array(1.0 if kind == "background" else 0.0), rtol=1e-6, what="sum")
    _check([none], kind=kind)


def test_a_box_over_the_whole_image_leaves_no_background():
    got = _check([np.array([[0.0, 0.0, 96.0, 64.0]])], kind="background")
    assert all(level.abs().max() == 0 for level in got)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_boxes_with_counts_are_the_same(kind):
    padded = torch.full((3, 4, 4), 7.0)
    padded[0, :3], padded[1, :1] = torch.tensor(cases.BOXES[0]), torch.tensor(cases.BOXES[1])
    padded[:, 3] = torch.tensor([0.0, 0.0, 90.0, 60.0])
    counts = torch.tensor([3, 1, 0])
    _check([*cases.BOXES, np.zeros((0, 4))], tensors=(padded, counts), kind=kind)


def test_the_order_of_the_boxes_does_not_matter():
    boxes = cases.box_tensors()
    want = functional.box_mask(boxes, cases.IMAGE_SIZE, SIZES)
    for order in ([1, 0, 2], [2, 1, 0], [1, 2, 0]):
        got = functional.box_mask([boxes[0][order], boxes[1]], cases.IMAGE_SIZE, SIZES)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_floor_and_ceil_take_the_product_before_the_quotient():
    # 224 of 416 pixels is exactly column 7 of 13, but x / width * W is a rounding error above 7 there, and its ceil 8; 456 of 1344 is
    # column 57 of 168, and the other order a rounding error below it.
    above = below = 0
    for width, cells in ((416, 13), (1344, 21), (1344, 42), (1344, 168), (800, 100)):
        for edge in range(1, cells):
            if (edge * width) % cells:
                continue
            x = float(edge * width // cells)
            left, right = torch.tensor([[0.0, 0.0, x, 8.0]]), torch.tensor([[x, 0.0, float(width), 8.0]])
            (mask,) = functional.box_mask([left, right], (8, width), [(1, cells)], kind="binary")
            assert mask.sum((1, 2)).tolist() == [edge, cells - edge], (width, cells, edge)
            other_order = np.float32(np.float32(x) / np.float32(width)) * np.float32(cells)
            above, below = above + (other_order > edge), below + (other_order < edge)
    assert above > 0, "the cases would not catch the other order in ceil"
    assert below > 0, "the cases would not catch the other order in floor"
    rng = np.random.RandomState(0)
    for _ in range(60):
        x1, y1, w, h = rng.randint(0, 1200), rng.randint(0, 300), rng.randint(1, 140), rng.randint(1, 75)
        _check([np.array([[x1, y1, x1 + w, y1 + h]], dtype=np.float64)], (375, 1333), [(12, 42)], kind="binary")


def test_assigned_keeps_one_cell_of_a_box_without_a_whole_one():
    # The released code looks at both axes at once: a box that is thinner than a cell one way marks a single cell.
    got = _check([np.array([[62.0, 3.0, 96.0, 14.0]])], (64, 96), [(3, 5)], kind="assigned")
    assert got[0].sum() == 1


@pytest.mark.parametrize("side", [20.0, 55.9, 56.0, 111.0, 112.0, 223.5, 224.0, 448.0, 1000.0])
def test_assigned_puts_a_box_on_one_level(side):
    got = _check([np.array([[8.0, 8.0, 8.0 + side, 8.0 + side]])], (1024, 1024), [(32, 32), (16, 16), (8, 8)], kind="assigned")
    assert [bool(level.max() > 0) for level in got].count(True) == 1
    level = min(max(math.floor(math.log2(side / 56)), 0), 2)
    assert got[level].max() == 1


def test_boxes_of_other_dtypes_are_taken_as_fp32():
    want = functional.box_mask(cases.box_tensors(), cases.IMAGE_SIZE, SIZES)
    assert all(
        torch.equal(a, b)
        for a, b in zip(functional.box_mask(cases.box_tensors(dtype=torch.float64), cases.IMAGE_SIZE, SIZES), want, strict=True)
    )
    whole = [np.floor(one) for one in cases.BOXES]
    _check(whole, tensors=cases.box_tensors(whole, torch.int64))
    _check(whole, tensors=cases.box_tensors(whole, torch.float16))


@given(
    seed=st.integers(0, 999),
    count=st.integers(0, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    image_size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    kind=st.sampled_from(KINDS),
    expand=st.sampled_from([1.0, 1.5, 2.0, 2.5]),
)
def test_any_boxes(seed, count, size, image_size, kind, expand):
    rng = np.random.RandomState(seed)
    corner = rng.uniform(-0.2, 1.0, (count, 2)) * image_size[::-1]
    boxes = np.concatenate([corner, corner + rng.uniform(-0.1, 0.9, (count, 2)) * image_size[::-1]], axis=1)
    _check([boxes.astype(np.float32).astype(np.float64)], image_size, [size], kind=kind, expand=expand)


def test_no_levels_and_no_images():
    assert functional.box_mask(cases.box_tensors(), cases.IMAGE_SIZE, []) == []
    assert functional.box_mask([], cases.IMAGE_SIZE, [(2, 3)])[0].shape == (0, 2, 3)


def test_wrong_boxes_and_options_are_refused():
    with pytest.raises(ValueError, match=r"3, 5"):
        functional.box_mask([torch.zeros(3, 5)], cases.IMAGE_SIZE, SIZES)
    with pytest.raises(ValueError, match="circle"):
        functional.box_mask(cases.box_tensors(), cases.IMAGE_SIZE, SIZES, kind="circle")
    with pytest.raises(ValueError, match="left"):
        functional.box_mask(cases.box_tensors(), cases.IMAGE_SIZE, SIZES, placement="left")
