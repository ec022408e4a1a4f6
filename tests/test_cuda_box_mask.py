"""`box_mask` by the CUDA kernels, emulated: the cells of the reference and of the loops over boxes, in any order of the threads."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import box_mask_support as support
import pytest
import torch
from box_mask_support import PROFILED, SIZES, random_boxes
from cuda_support import ORDERS, in_any_order
from emulation import emulated
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases
from toolchain import needs_compiler
from torch import Tensor

from kdkernels import backend, functional
from kdkernels.ops.box_mask import KINDS

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(backend, "_choice", backend._choice)
    backend.set_backend("native")


#: Threads and blocks as they are numbered, where their order is not what a test is about.
as_numbered = partial(in_any_order, orders=ORDERS[:1])


def check(*args: Any, **options: Any) -> list[Tensor]:
    return support.check(as_numbered, *args, **options)


def check_in_any_order(*args: Any, **options: Any) -> list[Tensor]:
    return support.check(in_any_order, *args, **options)


@pytest.mark.parametrize(("placement", "expand"), [("centered", 2.0), ("centered", 1.3), ("released", 2.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_option(kind, placement, expand):
    boxes = cases.box_tensors([*cases.BOXES, []])
    for inner_ones, area_norm in itertools.product((True, False), repeat=2) if kind in PROFILED else [(True, True), (False, False)]:
        options = {"expand": expand, "placement": placement, "inner_ones": inner_ones, "area_norm": area_norm}
        masks = check(boxes, kind=kind, **options)
        assert any(bool(mask[:2].any()) for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_threads_blocks_and_boxes(kind):
    boxes = cases.box_tensors(random_boxes(5, [40, 0, 7], (120, 160)))
    sizes = [(15, 20), (37, 41), (2, 3), (1, 1)]
    masks = check_in_any_order(boxes, (120, 160), sizes, kind=kind)
    turned = check([one.flip(0) for one in boxes], (120, 160), sizes, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(masks, turned, strict=True))


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=2),
    image_size=st.tuples(st.floats(8, 90), st.floats(8, 90)) | st.sampled_from([(64, 96), (37, 1333)]),
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 70)), min_size=1, max_size=2),
    expand=st.sampled_from([0.3, 1.0, 1.1, 1.5, 2.0, 3.7, 60.0]),
    placement=st.sampled_from(["centered", "released"]),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@pytest.mark.parametrize("kind", KINDS)
def test_any_boxes(kind, seed, counts, image_size, sizes, expand, placement, flags):
    boxes = cases.box_tensors(random_boxes(seed, counts, image_size))
    options = {"expand": 2.0 if placement == "released" else expand, "inner_ones": flags[0], "area_norm": flags[1]}
    assert len(check_in_any_order(boxes, image_size, sizes, kind=kind, placement=placement, **options)) == len(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_by_loops(kind):
    masks = support.check_by_loops(as_numbered, [*cases.BOXES, []], cases.IMAGE_SIZE, SIZES, kind=kind, expand=1.5)
    assert any(bool(mask[:2].any()) for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_on_the_borders_of_cells(kind):
    """There x / width * W is often a rounding error beside the column, and expand * columns halfway between two whole numbers."""
    for width, columns in ((416, 13), (800, 100)):
        boxes = support.one_edge_each(width, columns)[:: 1 if columns < 20 else 7]
        for expand in (1.1, 2.5) if kind in PROFILED else (2.0,):
            (mask,) = check(boxes, (8, width), [(1, columns)], kind=kind, expand=expand)
            assert kind == "background" or bool((mask > 0).any((1, 2)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_area_and_beyond_the_image(kind):
    masks = check(support.ill_boxes(), sizes=[(8, 12), (3, 3)], kind=kind)
    assert all(bool((mask[0] == mask[0, 0, 0]).all()) for mask in masks), "a box without area was drawn"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expand", [1e-3, 1e6, 1e20, 3.4e38])
def test_windows_of_any_length(kind, expand):
    for area_norm in (True, False):
        masks = check(cases.box_tensors([*cases.BOXES, []]), sizes=SIZES[:3], kind=kind, expand=expand, area_norm=area_norm)
        assert all(bool(mask.isfinite().all()) for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_what_lies_beyond_them(kind):
    padded, counts = support.padded_boxes()
    masks = check((padded, counts), sizes=SIZES[:3], kind=kind)
    assert all(torch.equal(mask[2], mask[3]) for mask in masks)
    for dtype in (torch.int32, torch.int16, torch.int8):
        alike = check((padded, counts.to(dtype)), sizes=SIZES[:3], kind=kind)
        assert all(torch.equal(a, b) for a, b in zip(masks, alike, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_draw(kind):
    none = torch.zeros(0, 4)
    masks = check([none, none], kind=kind)
    assert all(float(mask.sum()) == pytest.approx(2.0 if kind == "background" else 0.0) for mask in masks)
    alike = check((torch.zeros(2, 0, 4), torch.tensor([0, 5])), kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(masks, alike, strict=True))
    assert [mask.numel() for mask in check((torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64)), kind=kind)] == [0] * len(SIZES)
    assert check([none], sizes=[], kind=kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_more_boxes_than_a_block_has_threads(kind):
    """The boxes of the two images are the same, first and last ones changed places: those of every portion are drawn."""
    (boxes,) = cases.box_tensors(random_boxes(7, [300], (800, 1344), largest=0.1))
    sizes = [(25, 42), (7, 11)]
    masks = check([boxes, boxes.flip(0)], (800, 1344), sizes, kind=kind)
    assert all(torch.equal(mask[0], mask[1]) for mask in masks) and (kind == "assigned" or bool(masks[0].any()))


@pytest.mark.parametrize("kind", ["gaussian", "background"])
def test_boxes_as_of_an_image(kind):
    boxes = cases.box_tensors(random_boxes(0, [20], (800, 1344), largest=0.2))
    masks = check(boxes, (800, 1344), support.PYRAMID, kind=kind)
    assert all(bool(mask.any()) for mask in masks)


@pytest.mark.parametrize("kind", ["exponential", "background"])
def test_many_tiles_on_one_side(kind):
    (wide, tall, _) = check(cases.box_tensors(random_boxes(1, [3, 2], (800, 800))), (800, 800), [(3, 1100), (1100, 3), (1, 1)], kind=kind)
    assert wide.shape == (2, 3, 1100) and tall.shape == (2, 1100, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_more_levels_than_a_launch_takes(kind):
    sizes = [*support.LEVELS, (6, 6), (2, 7), (1, 3)]
    boxes = support.squares(support.SIDES)
    masks = check([torch.cat(boxes), *boxes[-2:]], (8192, 8192), sizes, kind=kind)
    assert len(masks) == len(sizes)
    if kind == "assigned":
        assert [bool(mask[0].any()) for mask in masks] == [True] * 8 + [False] * 2


@pytest.mark.parametrize("kind", ["binary", "assigned"])
def test_levels_by_area(kind):
    """Boxes below, at and above the areas at which DeFeat's next level begins, more of these than there are levels."""
    masks = check(support.squares(support.SIDES), (8192, 8192), support.LEVELS, kind=kind)
    levels = [sum(bool(mask[image].any()) for mask in masks) for image in range(len(support.SIDES))]
    assert set(levels) == {1 if kind == "assigned" else len(support.LEVELS)}


@pytest.mark.parametrize("area_norm", [True, False])
@pytest.mark.parametrize("size", [(1, 3200), (100, 2990)])
def test_windows_so_long_that_their_ends_are_0(size, area_norm):
    """The exponential becomes subnormal there, alone or in a product, and then 0: at the same cells."""
    box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    (mask,) = check([box], size, [size], kind="exponential", expand=1.0, inner_ones=False, area_norm=area_norm)
    assert bool(((mask > 0) & (mask < torch.finfo(torch.float32).tiny)).any()) and int((mask == 0).sum()) < mask.numel() / 2


def test_boxes_of_other_strides_and_alignment():
    masks = check(support.strided_boxes())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(masks, check(cases.box_tensors()), strict=True))
    padded, counts = support.padded_boxes()
    shifted = torch.cat([torch.zeros(1), padded.flatten()])[1:].view(padded.shape)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 != padded.data_ptr() % 16
    assert all(torch.equal(a, b) for a, b in zip(check((padded, counts)), check((shifted, counts)), strict=True))


def test_one_launch_for_all_levels_and_a_second_one_for_the_background():
    for kind, launches in (("gaussian", 1), ("background", 2)):
        with emulated() as emulator:
            emulator.reset_counts()
            masks = functional.box_mask(cases.box_tensors(), cases.IMAGE_SIZE, SIZES, kind=kind)
            assert emulator.counts()["launches"] == launches and len(masks) == len(SIZES)


@pytest.mark.parametrize(("changed", "message"), support.REFUSED, ids=str)
def test_what_the_kernels_refuse(changed, message):
    with emulated(), pytest.raises(RuntimeError, match=message) as raised:
        torch.ops.kdkernels_emulated.box_mask(**{**support.ARGUMENTS, **changed})
    assert "box_mask" in str(raised.value) or "kdkernels" in str(raised.value)
