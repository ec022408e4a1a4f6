"""GKD and BMFI in one launch, on a GPU and as the emulator runs it: float64's answer, and the same bits whatever goes on beside it.

What the emulator cannot show is looked for on a GPU: blocks of real launches come in another order each time, most of all beside the work
of other streams. A deadlock shows as a test that does not end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from all_kernels import ONE_LAUNCH, chosen, in_one_launch, on_one_launch
from fused_support import PYRAMIDS, Level, built, of_one_graph, strides, value_error, wide
from gpu_support import DEVICE, Losses, both, captured, explicit, moved, settled, tensors
from levels import DTYPES, LAYOUTS, relative_error
from native_support import GRADIENT, VALUE, same_bits
from torch import Tensor

from benchmarks.measure.agreement import agree
from benchmarks.registry import ENTRIES, Case
from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss

Shapes = Sequence[tuple[int, int, int, int]]
on_gpu = pytest.mark.parametrize("way", [pytest.param(*in_one_launch.values, marks=(*in_one_launch.marks, pytest.mark.gpu))])
SHAPES: dict[str, Shapes] = {
    "odd": [(3, 20, 25, 30), (3, 20, 13, 15), (3, 20, 7, 8)],
    "one pixel": [(2, 130, 5, 7), (2, 130, 1, 1)],
    "one channel": [(1, 1, 9, 11)],
    "smallest first": [(2, 12, 3, 5), (2, 40, 16, 16)],
    "one large image": [(1, 5, 50, 60), (1, 300, 6, 6)],
    "eight levels": [(2, 3 + k, 9 - k, 4) for k in range(8)],
}
#: Small calls in a row, fewer where they are emulated.
CALLS = {"cpu": 9, "cuda": 400}


def case_of(shapes: Shapes, device: str, dtype: str = "fp32", layouts: Sequence[str] = ("contiguous",), seed: int = 1) -> dict[str, Any]:
    """All arguments of `FusedLoss`, the four pyramids of one type; layouts: of the levels, in turn."""
    kinds = [Level(shape, dtype, layouts[k % len(layouts)]) for k, shape in enumerate(shapes)]
    return built({**dict.fromkeys(PYRAMIDS, kinds), "padded": True, "seed": seed}, device)


def parts() -> Losses:
    return {"gkd": GKDLoss(weight=0.7, reduction="none"), "bmfi": AIDLoss(BMFILoss(weight=1.5, reduction="none"))}


def one(device: str = DEVICE) -> Tensor:
    return torch.ones((), device=device)


def differing(got: Sequence[Tensor], want: Sequence[Tensor]) -> Tensor:
    """How many elements are not the same number, NaN being none. Nobody waits for it."""
    return torch.stack([(a != b).sum() for a, b in zip(got, want, strict=True)]).sum()


@on_one_launch
@pytest.mark.parametrize("layouts", [("contiguous",), ("channels_last",), ("odd address", "channels_last, odd address", "gaps")], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_every_backward_of_a_graph(name: str, dtype: str, layouts: Sequence[str], device: str) -> None:
    """The gradient of an upstream gradient of 1 is made with the values, for others in the backward pass; both twice."""
    case, scales = case_of(SHAPES[name], device, dtype, layouts), (1.0, 0.25, 1024.0, 1.0, 0.25)
    with chosen(ONE_LAUNCH):
        values, gradients = of_one_graph(parts(), case, "auto", scales)
    wanted, slopes = of_one_graph(parts(), wide(case), "reference", scales)
    assert max(value_error(a, b) for a, b in zip(values, wanted, strict=True)) < VALUE
    for found, want in zip(gradients, slopes, strict=True):
        for got, exact, x in zip(found, want, case["student_features"], strict=True):
            assert got.dtype == x.dtype and strides(got) == strides(torch.empty_like(x))
            few = torch.finfo(got.dtype).eps if got.numel() < 64 else 0.0
            assert relative_error(got, exact) < max(GRADIENT[got.dtype], few)
    for again, first in ((3, 0), (4, 1)):
        assert all(same_bits(a, b) for a, b in zip(gradients[again], gradients[first], strict=True))


@on_one_launch
def test_it_is_differentiated_once_only(device: str) -> None:
    case = case_of(SHAPES["smallest first"], device)
    leaves = [x.requires_grad_() for x in case["student_features"]]
    with chosen(ONE_LAUNCH):
        total = sum(value.sum() for value in FusedLoss(both())(**case).values())
    gradient = torch.autograd.grad(total, leaves, create_graph=True)[0]
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@on_one_launch
@pytest.mark.parametrize("broken", PYRAMIDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_where_the_passes_have_it(broken: str, value: float, device: str) -> None:
    case = case_of(SHAPES["odd"], device)
    case[broken][1][1, 3, 2, 4] = value
    found = []
    for way in (ONE_LAUNCH, "native"):
        with chosen(way):
            found.append(explicit(parts(), case, torch.ones(3, 3, device=device)))
    assert not all(bool(x.isfinite().all()) for x in found[1])
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(*found, strict=True))


@on_one_launch
@pytest.mark.parametrize("missing", ["images", "boxes"])
def test_nothing_to_do_is_done_as_by_the_passes(missing: str, device: str) -> None:
    case = case_of([(0 if missing == "images" else 2, *shape[1:]) for shape in SHAPES["odd"]], device)
    padded = torch.zeros(case["student_features"][0].shape[0], 0, 4, device=device)
    case["boxes"] = padded, torch.zeros(padded.shape[:1], dtype=torch.int64, device=device)
    found = []
    for way in (ONE_LAUNCH, "native"):
        with chosen(way):
            found.append(explicit(both(), case, one(device)))
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and relative_error(a, b) < GRADIENT[torch.float32]


class Disturbance:
    """Work on another stream of the GPU, of ever other sizes: it takes multiprocessors and caches from whoever runs meanwhile."""

    def __init__(self, device: str) -> None:
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.memory = torch.zeros(1 << 24 if device == "cuda" else 1, device=device)
        self.draw = random.Random(0)

    def go_on(self) -> None:
        if self.stream is not None and self.draw.random() < 0.7:
            with torch.cuda.stream(self.stream):
                for _ in range(self.draw.randint(1, 4)):
                    self.memory[: 1 << self.draw.randint(8, 24)].add_(1.0)


@on_one_launch
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hundreds_of_calls_in_a_row_give_the_same_bits(dtype: str, device: str) -> None:
    """Of several sizes in turn, between which nobody waits: that one's blocks leave while the next one's come."""
    cases = [case_of(SHAPES[name], device, dtype) for name in ("odd", "eight levels", "one large image")]
    other = Disturbance(device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    with chosen(ONE_LAUNCH):
        first = [explicit(both(), case, one(device)) for case in cases]
        for turn in range(CALLS[device]):
            other.go_on()
            k = turn % len(cases)
            count += differing(explicit(both(), cases[k], one(device)), first[k])
    assert all(x.isfinite().all() for results in first for x in results)
    assert int(count) == 0


@on_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_streams_beside_each_other_do_not_disturb_each_other(dtype: str, way: str) -> None:
    """Two launches, each of which would fill the GPU and waits for its own blocks only."""
    cases = [settled(Case(name, channels=64, boxes=5, dtype=dtype)) for name in ("fcos-quarter", "tiny")]
    streams = [torch.cuda.Stream() for _ in cases]
    counts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in cases]
    with chosen(way), ExitStack() as together:
        wanted = [explicit(both(), case, one()) for case in cases]
        upstream = one()
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            together.callback(torch.cuda.current_stream().wait_stream, stream)
        for _ in range(100):
            for stream, case, want, count in zip(streams, cases, wanted, counts, strict=True):
                with torch.cuda.stream(stream):
                    count += differing(explicit(both(), case, upstream), want)
    assert [int(count) for count in counts] == [0, 0]


@on_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_graph_is_replayed_a_hundred_times_on_new_contents(dtype: str, way: str) -> None:
    """Counters that a replay left behind would make the next one wait for ever, or not at all."""
    given, d = settled(Case("tiny", channels=64, boxes=5, dtype=dtype)), one()
    features = [x for x in tensors(given) if x.dim() == 4]
    sizes = [float(x.float().std()) for x in features]
    count, unchanged = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    with chosen(way):
        graph, replayed = captured(lambda: explicit(both(), given, d))
        for turn in range(100):
            before = replayed[-1].clone()
            for x, size in zip(features, sizes, strict=True):
                x.copy_(torch.randn_like(x) * size)
            d.fill_(65536.0 if turn % 3 == 2 else 1.0)
            want = explicit(both(), given, d)
            for _ in range(1 + turn % 2):
                graph.replay()
            count += differing(replayed, want)
            unchanged += (replayed[-1] == before).all()
    assert (int(count), int(unchanged)) == (0, 0)


@on_gpu
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_sizes_agree_with_float64_and_with_the_passes(dtype: str, layout: str, batch: int, way: str) -> None:
    """Twice, as the queue of many tiles is longer than what runs at a time."""
    given = settled(Case("fcos", batch=batch, channels=256, dtype=dtype, layout=layout))
    with chosen(way):
        results, again = (explicit(both(), given, one()) for _ in range(2))
    with chosen("native"):
        by_passes = explicit(both(), given, one())
    with chosen("reference"):
        wanted = explicit(both(), moved(given, DEVICE, torch.float64), one().double())
    tolerances = ENTRIES["gkd_bmfi"].tolerances[dtype]
    assert int(differing(results, again)) == 0
    for place, (got, other, want) in enumerate(zip(results, by_passes, wanted, strict=True)):
        tolerance = tolerances.value if place < 2 else tolerances.gradient
        assert agree(got, want, tolerance).reason == "", f"result {place}"
        # Both may be off, to either side.
        assert relative_error(got, other) < 2 * tolerance, f"result {place}, by passes"
    for gradient, x in zip(results[2:], given["student_features"], strict=True):
        assert gradient.dtype == DTYPES[dtype] and gradient.stride() == x.stride()
