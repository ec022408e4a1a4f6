"""`box_mask` by the kernels for GPUs against the reference: the same cells, and the same numbers wherever no exponential is among them."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from all_kernels import on_gpu_kernels, poisoned
from gpu_support import BACKENDS
from oracle import cases
from triton_support import DEVICES

from kdkernels import backend as backends
from kdkernels import functional
from kdkernels.ops.box_mask import KINDS, fused
from kdkernels.reference.box_mask import box_mask as reference
from kdkernels.triton import launch

PROFILED = ("gaussian", "exponential")
#: The last one has two tiles.
SIZES = [(8, 12), (3, 3), (1, 1), (23, 25)]
NAN, INF = math.nan, math.inf


def _moved(boxes, device):
    return type(boxes)(b.to(device) for b in boxes)


def _check(
    backend,
    boxes,
    device,
    image_size=cases.IMAGE_SIZE,
    sizes=SIZES,
    kind="gaussian",
    expand=2.0,
    placement="centered",
    flags=(True, True),
    tolerance=2e-6,
):
    """Masks on the CPU, after their comparison with the reference."""
    options = (image_size, sizes, kind, expand, placement, *flags)
    with poisoned(backend):
        masks = [mask.cpu() for mask in fused(backend, _moved(boxes, device), *options)]
    for level, (got, want) in enumerate(zip(masks, reference(boxes, *options), strict=True)):
        where = f"{options[2:]} level {level}"
        assert got.shape == want.shape and got.dtype == torch.float32, where
        assert torch.equal(got == 0, want == 0), where
        if kind in PROFILED:
            # The smallest numbers of fp32 are 1.4e-45 apart.
            assert bool(((got - want).abs() <= tolerance * want + 3e-45).all()), where
        else:
            assert torch.equal(got, want), where
    return masks


@on_gpu_kernels
@pytest.mark.parametrize(("placement", "expand"), [("centered", 2.0), ("centered", 1.3), ("released", 2.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_option(kind, placement, expand, backend, device):
    boxes = cases.box_tensors([*cases.BOXES, []])
    for flags in itertools.product((True, False), repeat=2) if kind in PROFILED else [(True, True), (False, False)]:
        masks = _check(backend, boxes, device, kind=kind, placement=placement, expand=expand, flags=flags)
        assert any(bool(mask[:2].any()) for mask in masks)


@on_gpu_kernels
@pytest.mark.parametrize("seed", range(24))
def test_any_boxes(seed, backend, device):
    """Without hypothesis, which GPU machines may lack."""
    draw, rng = random.Random(seed), np.random.RandomState(seed)
    image_size = draw.choice([(64, 96), (37, 1333), (rng.uniform(8, 90), rng.uniform(8, 90))])
    images = []
    for _ in range(draw.randint(1, 3)):
        corner = rng.uniform(-0.2, 1.0, (draw.randint(0, 6), 2)) * image_size[::-1]
        images.append(np.concatenate([corner, corner + rng.uniform(-0.1, 0.9, corner.shape) * image_size[::-1]], axis=1))
    boxes = cases.box_tensors([np.round(one) if draw.random() < 0.3 else one for one in images])
    sizes = [(draw.randint(1, 15), draw.randint(1, 40)) for _ in range(draw.randint(1, 3))]
    placement = draw.choice(["centered", "released"])
    expand = 2.0 if placement == "released" else draw.choice([0.3, 1.0, 1.1, 1.5, 2.0, 3.7])
    flags = (draw.random() < 0.5, draw.random() < 0.5)
    masks = _check(backend, boxes, device, image_size, sizes, KINDS[seed % len(KINDS)], expand, placement, flags)
    assert len(masks) == len(sizes)


@on_gpu_kernels
@pytest.mark.parametrize("kind", ["binary", "assigned"])
def test_borders_of_cells(kind, backend, device):
    """Edges on the borders between two cells, where x / width * W may be a rounding error to either side."""
    above = below = 0
    for width, columns in ((416, 13), (1344, 168), (800, 100)):
        edges = np.arange(1, columns)
        other_order = np.float32(edges * width / columns) / np.float32(width) * np.float32(columns)
        edges = edges[(edges % 8 == 1) | (other_order != edges)]
        x = edges * width / columns
        boxes = [torch.tensor([[0.0, 0.0, v, 8.0]]) for v in x] + [torch.tensor([[v, 0.0, width, 8.0]]) for v in x]
        (mask,) = _check(backend, boxes, device, (8, width), [(1, columns)], kind)
        assert mask.sum((1, 2)).tolist() == [*edges, *(columns - edges)]
        above, below = above + int((other_order > np.arange(1, columns)).sum()), below + int((other_order < np.arange(1, columns)).sum())
    assert above > 0 and below > 0, "the cases would not catch the other order"


@on_gpu_kernels
@pytest.mark.parametrize("expand", [1.1, 1.3, 1.5, 2.5])
def test_lengths_of_windows_at_ties(expand, backend, device):
    """expand * size halfway between two whole numbers, exactly or but for a rounding error."""
    sides = range(1, 16)
    boxes = [torch.tensor([[160.0, 0.0, 160.0 + 8 * side, 8.0]]) for side in sides]
    (mask,) = _check(backend, boxes, device, (8, 480), [(1, 60)], "gaussian", expand)
    lengths = (mask > 0).sum((1, 2)).tolist()
    assert lengths == [math.floor(float(np.float32(np.float32(expand) * np.float32(side)) + np.float32(0.5))) for side in sides]


@on_gpu_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_area_and_beyond_the_image(kind, backend, device):
    ill = [
        [NAN, 1, 20, 20], [1, NAN, 20, 20], [1, 1, NAN, 20], [1, 1, 20, NAN], [40, 10, 20, 30], [10, 10, 10, 30], [200, 10, 300, 30],
        [-50, -60, -10, -20], [0, 64, 20, 90], [INF, 0, INF, 9], [-INF, 0, -INF, 9], [0, 0, 0, 0], [-0.0, -0.0, 0.0, 9],
    ]  # fmt: skip
    beyond = [[-INF, 10, 40, INF], [-5, -5, 500, 3], [1e30, -1e30, INF, 1e30], [90, 60, 1e38, 1e38]]
    smallest = [[0, 0, 1e-40, 1e-40], [0, 0, 1e-45, 64]]
    boxes = [torch.tensor(one, dtype=torch.float32) for one in (ill, beyond, smallest)]
    masks = _check(backend, boxes, device, sizes=[(8, 12), (3, 3)], kind=kind)
    assert all(bool((mask[0] == mask[0].flatten()[0]).all()) for mask in masks)


@on_gpu_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_what_lies_beyond_them(kind, backend, device):
    padded = torch.full((5, 4, 4), NAN)
    padded[:, 3] = torch.tensor([0.0, 0.0, 90.0, 60.0])
    padded[0, :3], padded[1, :1] = torch.tensor(cases.BOXES[0]), torch.tensor(cases.BOXES[1])
    counts = torch.tensor([3, 1, 0, -2, 9])
    masks = _check(backend, (padded, counts), device, kind=kind)
    alike = fused(backend, _moved((padded, counts.to(torch.int32)), device), cases.IMAGE_SIZE, SIZES, kind, 2.0, "centered", True, True)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(masks, alike, strict=True))
    assert all(torch.equal(mask[2], mask[3]) for mask in masks)


@on_gpu_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_draw(kind, backend, device):
    none = torch.zeros(0, 4)
    masks = _check(backend, [none, none], device, kind=kind)
    assert all(float(mask.sum()) == pytest.approx(2.0 if kind == "background" else 0.0) for mask in masks)
    _check(backend, (torch.zeros(2, 0, 4), torch.tensor([0, 0])), device, kind=kind)
    _check(backend, (torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64)), device, kind=kind)
    assert _check(backend, [none], device, sizes=[], kind=kind) == []


@on_gpu_kernels
@pytest.mark.parametrize("kind", ["gaussian", "assigned", "background"])
def test_more_levels_than_a_launch_takes(kind, backend, device):
    """Seven levels, not in the order of their sizes; boxes of DeFeat's every level."""
    sizes = [(2, 3), (8, 8), (1, 1), (9, 17), (4, 4), (5, 2), (3, 3)]
    sides = [56 * 2**k - less for k in range(8) for less in (0, 0.1)]
    boxes = [torch.tensor([[100.0, 50.0, 100 + side, 50 + side] for side in some]) for some in (sides[::2], sides[1::2])]
    masks = _check(backend, boxes, device, (8192, 8192), sizes, kind)
    if kind == "assigned":
        assert [bool(mask.any()) for mask in masks] == [True] * 7


@on_gpu_kernels
@pytest.mark.parametrize("kind", ["gaussian", "background"])
def test_many_boxes(kind, backend, device):
    rng = np.random.RandomState(0)
    corner = rng.uniform(0, 90, (110, 2))
    boxes = cases.box_tensors([np.concatenate([corner, corner + rng.uniform(1, 9, (110, 2))], axis=1)])
    (mask,) = _check(backend, boxes, device, (100, 100), [(13, 21)], kind)
    assert bool(mask.any())


@on_gpu_kernels
@pytest.mark.parametrize("kind", ["gaussian", "background"])
def test_more_tiles_than_cells_in_one(kind, backend, device):
    (mask,) = _check(backend, cases.box_tensors(), device, sizes=[(23, 1301)], kind=kind)
    assert bool(mask.any())


@pytest.mark.parametrize("device", DEVICES)
def test_more_tiles_of_triton_than_cells_in_one(device):
    """Its launch parameters make the tiles."""
    with launch.override("box_mask", {"BLOCK": 16}):
        (mask,) = _check("triton", cases.box_tensors(), device, sizes=[(17, 19)], kind="background")
    assert mask.sum((1, 2)).tolist() == pytest.approx([1.0, 1.0], rel=1e-6)


@on_gpu_kernels
def test_windows_so_long_that_their_ends_are_0(backend, device):
    box = torch.tensor([[0.0, 0.0, 3200.0, 1.0]])
    # The interpreter's fma rounds twice.
    tolerance = 2e-6 if device == "cuda" else 4e-6
    (mask,) = _check(backend, [box], device, (1, 3200), [(1, 3200)], "exponential", 1.0, flags=(False, False), tolerance=tolerance)
    assert 0 < int((mask == 0).sum()) < 1600


@on_gpu_kernels
def test_boxes_of_other_types_and_strides(backend, device):
    whole = [np.floor(one) for one in cases.BOXES]
    for dtype in (torch.float64, torch.int64, torch.float16):
        masks = _check(backend, cases.box_tensors(whole, dtype), device)
        assert bool(masks[0].any())
    rows = torch.tensor(np.stack([cases.BOXES[0]] * 2)).float().transpose(1, 2).contiguous().transpose(1, 2)
    assert not rows.is_contiguous()
    _check(backend, (rows, torch.tensor([3, 9, 2, 9])[::2]), device)
    assert not fused(backend, [one.to(device).requires_grad_() for one in cases.box_tensors()], cases.IMAGE_SIZE, SIZES, "gaussian", 2.0,
                     "centered", True, True)[0].requires_grad  # fmt: skip


@on_gpu_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_and_any_order_of_boxes_are_equal_to_the_bit(kind, backend, device):
    boxes = cases.box_tensors()
    once, again, turned = (_check(backend, b, device, kind=kind) for b in (boxes, boxes, [boxes[0].flip(0), boxes[1]]))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, again, turned, strict=True))


@on_gpu_kernels
def test_chosen_by_name(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_choice", backend)
    monkeypatch.setitem(backends._implementations["reference"], "box_mask", None)
    boxes = cases.box_tensors()
    got = functional.box_mask(_moved(boxes, device), cases.IMAGE_SIZE, SIZES, kind="area")
    want = reference(boxes, cases.IMAGE_SIZE, SIZES, kind="area")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    assert functional.box_mask([], cases.IMAGE_SIZE, [(2, 3)])[0].shape == (0, 2, 3)
    padded, counts = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True).to(device), torch.tensor([3, 1])
    got = functional.box_mask((padded, counts), cases.IMAGE_SIZE, SIZES, kind="area")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@on_gpu_kernels
def test_the_operator(backend, device):
    for shape, sizes in (((2, 3, 4), [5, 6, 1, 2]), ((2, 0, 4), [3, 3]), ((0, 2, 4), [3, 3])):
        counts = torch.full(shape[:1], shape[1], dtype=torch.int32, device=device)
        boxes = 50 * torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
        arguments = (backend, boxes, counts, [64.0, 96.0], sizes, "background", 2.0, False, True, True)
        checked = torch.library.opcheck(torch.ops.kdkernels.box_mask.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checked.values()) == {"SUCCESS"}


@on_gpu_kernels
def test_compiled_for_any_image_size(backend, device):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def drawn(boxes, feature):
        height, width = feature.shape[2:]
        return fused(backend, boxes, (64, 96), [(height, width), (height // 2, width // 2)], "background", 2.0, "centered", True, True)

    compiled = torch.compile(drawn, backend=counting, fullgraph=True, dynamic=True)
    boxes = _moved(cases.box_tensors(), device)
    for size in ((8, 12), (6, 10), (16, 14)):
        feature = torch.zeros(2, 1, *size, device=device)
        assert all(torch.equal(a, b) for a, b in zip(compiled(boxes, feature), drawn(boxes, feature), strict=True))
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_waits_for_the_gpu_nor_stops_a_capture(kind, backend):
    boxes = _moved(cases.box_tensors(), "cuda")
    padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True), torch.tensor([3, 1], device="cuda")
    want = fused(backend, boxes, cases.IMAGE_SIZE, SIZES, kind, 2.0, "centered", True, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (boxes, padded):
            masks = fused(backend, given, cases.IMAGE_SIZE, SIZES, kind, 2.0, "centered", True, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(masks, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = fused(backend, boxes, cases.IMAGE_SIZE, SIZES, kind, 2.0, "centered", True, True)
    for mask in masks:
        mask.fill_(NAN)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(masks, want, strict=True))
