"""`box_mask` by the CUDA kernels, emulated: what `test_native_box_mask` leaves out, in every order of threads and blocks."""

from __future__ import annotations

from typing import Any

import box_mask_support as support
import pytest
import torch
from box_mask_support import SIZES, random_boxes
from cuda_support import in_any_order
from emulation import emulated
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


def check(*args: Any, **options: Any) -> list[Tensor]:
    return support.check(in_any_order, *args, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_threads_blocks_and_boxes(kind):
    boxes = cases.box_tensors(random_boxes(5, [40, 0, 7], (120, 160)))
    sizes = [(15, 20), (37, 41), (2, 3), (1, 1)]
    masks = check(boxes, (120, 160), sizes, kind=kind)
    turned = check([one.flip(0) for one in boxes], (120, 160), sizes, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(masks, turned, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_more_boxes_than_a_block_has_threads(kind):
    """The boxes of the two images are the same, first and last ones changed places: those of every portion are drawn."""
    (boxes,) = cases.box_tensors(random_boxes(7, [300], (800, 1344), largest=0.1))
    sizes = [(25, 42), (7, 11)]
    masks = check([boxes, boxes.flip(0)], (800, 1344), sizes, kind=kind)
    assert all(torch.equal(mask[0], mask[1]) for mask in masks) and (kind == "assigned" or bool(masks[0].any()))


@pytest.mark.parametrize("kind", KINDS)
def test_more_levels_than_a_launch_takes(kind):
    sizes = [*support.LEVELS, (6, 6), (2, 7), (1, 3)]
    boxes = support.squares(support.SIDES)
    masks = check([torch.cat(boxes), *boxes[-2:]], (8192, 8192), sizes, kind=kind)
    assert len(masks) == len(sizes)
    if kind == "assigned":
        assert [bool(mask[0].any()) for mask in masks] == [True] * 8 + [False] * 2


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
