"""`box_mask` by the native kernels, for the CPU and for CUDA: the cells of the reference and of the loops over boxes, and their numbers up
to the last bits of exp.

Every comparison also runs with all instructions of the machine and with one thread and two, or in several orders of a GPU's threads: the
results are equal to the bit.
"""

from __future__ import annotations

import itertools
from typing import Any

import box_mask_support as support
import native_support
import numpy as np
import pytest
import torch
from box_mask_support import PROFILED, SIZES, random_boxes
from cuda_support import MACHINES
from hypothesis import given
from hypothesis import strategies as st
from native_support import needs_library
from oracle import cases
from torch import Tensor

from kdkernels import backend, functional, library
from kdkernels.ops.box_mask import KINDS

pytestmark = needs_library


@pytest.fixture(autouse=True, params=MACHINES)
def machine(request):
    with request.param():
        yield


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(backend, "_choice", backend._choice)
    backend.set_backend("native")


def check(*args: Any, **options: Any) -> list[Tensor]:
    return support.check(native_support.same_everywhere, *args, **options)


def check_by_loops(*args: Any, **options: Any) -> list[Tensor]:
    return support.check_by_loops(native_support.same_everywhere, *args, **options)


@pytest.mark.parametrize(("placement", "expand"), [("centered", 2.0), ("centered", 1.5), ("released", 2.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_option(kind, placement, expand):
    for inner_ones, area_norm in itertools.product((True, False), repeat=2):
        options = {"expand": expand, "placement": placement, "inner_ones": inner_ones, "area_norm": area_norm}
        masks = check_by_loops([*cases.BOXES, []], cases.IMAGE_SIZE, SIZES, kind=kind, **options)
        assert any(bool(mask[:2].any()) for mask in masks)


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    image_size=st.tuples(st.floats(8, 90), st.floats(8, 90)) | st.sampled_from([(64, 96), (37, 1333)]),
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 70)), min_size=1, max_size=3),
    expand=st.sampled_from([0.3, 1.0, 1.1, 1.5, 2.0, 3.7, 60.0]),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@pytest.mark.parametrize("placement", ["centered", "released"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_boxes(kind, placement, seed, counts, image_size, sizes, expand, flags):
    boxes = cases.box_tensors(random_boxes(seed, counts, image_size))
    options = {"expand": 2.0 if placement == "released" else expand, "inner_ones": flags[0], "area_norm": flags[1]}
    assert len(check(boxes, image_size, sizes, kind=kind, placement=placement, **options)) == len(sizes)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    image_size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    # Products whose rounding in fp32 does not move a tie: the loops multiply in float64.
    expand=st.sampled_from([1.0, 1.5, 2.0, 2.5]),
)
# Of `assigned` the loops widen a box thinner than a cell on that axis only, where the reference makes it one cell.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "assigned"])
def test_any_boxes_by_loops(kind, seed, count, size, image_size, expand):
    assert check_by_loops(random_boxes(seed, [count], image_size), image_size, [size], kind=kind, expand=expand)[0].shape == (1, *size)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_on_the_borders_of_cells(kind):
    """There x / width * W is often a rounding error beside the column, and expand * columns halfway between two whole numbers."""
    for width, columns in ((416, 13), (1344, 168), (800, 100)):
        for expand in (1.1, 1.3, 2.5) if kind in PROFILED else (2.0,):
            (mask,) = check(support.one_edge_each(width, columns), (8, width), [(1, columns)], kind=kind, expand=expand)
            assert kind == "background" or bool((mask > 0).any((1, 2)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_area_and_beyond_the_image(kind):
    masks = check(support.ill_boxes(), sizes=[(8, 12), (3, 3)], kind=kind)
    assert all(bool((mask[0] == mask[0, 0, 0]).all()) for mask in masks), "a box without area was drawn"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expand", [1e-3, 1e6, 1e10, 1e20, 3e37, 3.4e38])
def test_windows_of_any_length(kind, expand):
    for area_norm in (True, False):
        masks = check(cases.box_tensors([*cases.BOXES, []]), kind=kind, expand=expand, area_norm=area_norm)
        assert all(bool(mask.isfinite().all()) for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_what_lies_beyond_them(kind):
    padded, counts = support.padded_boxes()
    masks = check((padded, counts), kind=kind)
    assert all(torch.equal(mask[2], mask[3]) for mask in masks)
    for dtype in (torch.int32, torch.int16, torch.int8):
        alike = functional.box_mask((padded, counts.to(dtype)), cases.IMAGE_SIZE, SIZES, kind=kind)
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
def test_a_hundred_boxes_an_image_in_any_order(kind):
    boxes = cases.box_tensors(random_boxes(0, [100, 100], (800, 1344), largest=0.2))
    masks = check(boxes, (800, 1344), support.PYRAMID, kind=kind)
    turned = functional.box_mask([one.flip(0) for one in boxes], (800, 1344), support.PYRAMID, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(masks, turned, strict=True)) and bool(masks[0].any())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_longer_than_a_band(kind):
    sizes = [(3, 9001), (9001, 3), (1, 1)]
    (wide, tall, _) = check(cases.box_tensors(random_boxes(1, [3, 0, 2], (800, 800))), (800, 800), sizes, kind=kind)
    assert wide.shape == (3, 3, 9001) and tall.shape == (3, 9001, 3)


@pytest.mark.parametrize("kind", ["binary", "assigned"])
def test_levels_by_area(kind):
    """Boxes below, at and above the areas at which DeFeat's next level begins, more of these than there are levels."""
    masks = check(support.squares(support.SIDES), (8192, 8192), support.LEVELS, kind=kind)
    levels = [sum(bool(mask[image].any()) for mask in masks) for image in range(len(support.SIDES))]
    assert set(levels) == {1 if kind == "assigned" else len(support.LEVELS)}


@pytest.mark.parametrize("area_norm", [True, False])
@pytest.mark.parametrize("size", [(1, 3200), (800, 3000)])
def test_windows_so_long_that_their_ends_are_0(size, area_norm):
    """The exponential becomes subnormal there, alone or in a product, and then 0: at the same cells."""
    box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    (mask,) = check([box], size, [size], kind="exponential", expand=1.0, inner_ones=False, area_norm=area_norm)
    assert 0 < int((mask == 0).sum()) < mask.numel() / 2
    assert bool(((mask > 0) & (mask < torch.finfo(torch.float32).tiny)).any())


def test_boxes_of_other_types_and_strides():
    whole = [np.floor(one) for one in cases.BOXES]
    for dtype in (torch.float64, torch.int64, torch.float16):
        assert bool(check(cases.box_tensors(whole, dtype))[0].any())
    masks = check(support.strided_boxes())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(masks, check(cases.box_tensors()), strict=True))
    required = functional.box_mask([one.requires_grad_() for one in cases.box_tensors()], cases.IMAGE_SIZE, SIZES)
    assert not required[0].requires_grad


def test_the_operator():
    for shape, sizes in (((2, 3, 4), [5, 6, 1, 2]), ((2, 0, 4), [3, 3]), ((0, 2, 4), [3, 3])):
        counts = torch.full(shape[:1], shape[1], dtype=torch.int32)
        arguments = ("native", 50 * torch.rand(shape), counts, [64.0, 96.0], sizes, "background", 2.0, False, True, True)
        checked = torch.library.opcheck(torch.ops.kdkernels.box_mask.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("changed", "message"), support.REFUSED, ids=str)
def test_what_the_library_refuses(changed, message):
    with pytest.raises(RuntimeError, match=message) as raised:
        library._kernel("native", "box_mask", "box_mask")(**{**support.ARGUMENTS, **changed})
    assert "box_mask" in str(raised.value) or "kdkernels" in str(raised.value)
