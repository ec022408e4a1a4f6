"""What only a GPU shows of fused kernels, Triton's and the native ones: real sizes, streams, graphs, several GPUs, memory, inductor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import all_kernels
import pytest
import torch
from gpu_support import (
    BACKENDS,
    DEVICE,
    Losses,
    both,
    captured,
    explicit,
    inline,
    mapped,
    moved,
    needs_cuda_library,
    settled,
    sides,
    tensors,
    without_waiting,
)
from levels import relative_error
from torch import Tensor

from benchmarks.call import bind, sample
from benchmarks.measure.agreement import agree
from benchmarks.measure.gate import oracle
from benchmarks.providers import reference_of
from benchmarks.registry import ENTRIES, LAYOUTS, Case, flat
from kdkernels import AIDLoss, BMFILoss, FusedLoss, set_backend

pytestmark = pytest.mark.gpu
TINY = Case("tiny", channels=64, boxes=5)
REAL = Case("fcos", batch=2, channels=256)
#: As in a training step of eight images.
STEP = Case("fcos", batch=8, channels=256, dtype="bf16")


@pytest.fixture(autouse=True, params=all_kernels.WAYS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with all_kernels.chosen(request.param):
        yield request.param


#: What is no call of GKD and BMFI alone.
by_passes = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
#: One launch is for explicit calls.
every_call = pytest.mark.parametrize(
    ("backend", "call"),
    [
        *(("triton", call) for call in (explicit, inline)),
        *(pytest.param("native", call, marks=needs_cuda_library) for call in (explicit, inline)),
        pytest.param(all_kernels.ONE_LAUNCH, explicit, marks=needs_cuda_library),
    ],
    indirect=["backend"],
)


def one() -> Tensor:
    return torch.ones((), device=DEVICE)


def renew(given: dict[str, Any], counts: list[int]) -> None:
    """New features, gradients and boxes in the memory of the old ones; `counts`: of the boxes, an image."""
    for x in tensors(given):
        if x.dim() == 4:
            x.copy_(torch.randn_like(x) * x.float().std())
    boxes, number = given["boxes"]
    boxes.copy_(boxes.roll(1, 0) * 0.9)
    number.copy_(torch.tensor(counts))


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    """Bit for bit, and finite."""
    return all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(got, want, strict=True))


@by_passes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES.values() if entry.kind == "primitive"])
def test_small_primitives_agree_with_float64(name: str, dtype: str, layout: str) -> None:
    """Without what the gate does besides: the GPU suite runs these under compute-sanitizer."""
    entry, generator = ENTRIES[name], torch.Generator().manual_seed(0)
    mode = "backward" if "backward" in entry.modes else "forward"
    given = entry.inputs(Case("tiny", channels=20, boxes=5, dtype=dtype, layout=layout), generator, torch.device(DEVICE))
    shapes = [value.shape for value in flat(reference_of(entry)(**given))]
    made = sample(entry, given, mode, shapes, generator)
    results, wanted = bind(entry, entry.call, mode, own=True)(made), oracle(entry, made, mode)
    for place, (got, want) in enumerate(zip(results, wanted, strict=True)):
        tolerance = entry.tolerances[dtype].value if place < len(shapes) else entry.tolerances[dtype].gradient
        assert agree(got, want, tolerance).reason == "", f"result {place}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["triton", all_kernels.in_one_launch], indirect=True)
def test_small_losses_agree_with_float64(dtype: str, layout: str, backend: str) -> None:
    """The GPU suite runs these under compute-sanitizer too; of the native passes the small call in test_gpu.py."""
    given = settled(Case("tiny", channels=20, boxes=5, dtype=dtype, layout=layout))
    results = explicit(both(), given, one())
    set_backend("reference")
    wanted = explicit(both(), moved(given, DEVICE, torch.float64), one().double())
    tolerances = ENTRIES["gkd_bmfi"].tolerances[dtype]
    for place, (got, want) in enumerate(zip(results, wanted, strict=True)):
        assert agree(got, want, tolerances.value if place < 2 else tolerances.gradient).reason == "", f"result {place}"


@by_passes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_all_losses_agree_with_float64_at_real_sizes(dtype: str, layout: str) -> None:
    given = settled(Case("fcos", batch=2, channels=256, dtype=dtype, layout=layout))
    losses: Losses = {**both(), "aid": AIDLoss(BMFILoss())}
    tolerances = ENTRIES["gkd_bmfi"].tolerances[dtype]
    results = explicit(losses, given, one())
    set_backend("reference")
    wanted = explicit(losses, moved(given, DEVICE, torch.float64), one().double())
    for place, (got, want) in enumerate(zip(results, wanted, strict=True)):
        assert agree(got, want, tolerances.value if place < len(losses) else tolerances.gradient).reason == "", f"result {place}"
    for got, x in zip(results[len(losses) :], given["student_features"], strict=True):
        assert got.dtype == x.dtype and got.stride() == x.stride()


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(lower: torch.dtype) -> None:
    given = settled(TINY)
    want = explicit(both(), given, one())
    with torch.autocast(DEVICE, dtype=lower):
        got = explicit(both(), given, one())
    assert same(got, want)


@every_call
def test_a_side_stream_gives_the_bits_of_the_default_stream(call: Callable[..., list[Tensor]]) -> None:
    given = settled(REAL)
    want = call(both(), given, one())
    later = mapped(given, torch.zeros_like)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Some 30 ms: a kernel on another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        for x, y in zip(tensors(later), tensors(given), strict=True):
            x.copy_(y)
        got = call(both(), later, one())
    torch.cuda.current_stream().wait_stream(side)
    assert same(got, want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@every_call
def test_a_graph_replays_with_other_contents_boxes_and_upstream_gradients(call: Callable[..., list[Tensor]], dtype: str) -> None:
    given = settled(Case("tiny", channels=64, boxes=5, dtype=dtype))
    losses, d = both(), one()
    graph, replayed = captured(lambda: call(losses, given, d))
    seen: list[Tensor] = []
    for upstream, counts in ((1.0, [5, 5]), (65536.0, [0, 3]), (65536.0, [5, 1]), (1.0, [0, 0])):
        renew(given, counts)
        d.fill_(upstream)
        want = call(losses, given, d)
        graph.replay()
        assert same(replayed, want)
        assert all(not torch.equal(replayed[-1], x) for x in seen)
        seen.append(replayed[-1].clone())
    assert len(seen) == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_call
def test_tensors_may_be_on_another_gpu_than_the_current_one(call: Callable[..., list[Tensor]]) -> None:
    given = settled(TINY)
    want = call(both(), given, one())
    with torch.cuda.device(0):
        got = call(both(), moved(given, "cuda:1"), one().to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {x.device for x in got} == {torch.device("cuda:1")}
    # Not the bits: the GPUs may differ.
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("boxes", ["padded", "listed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@every_call
def test_nothing_waits_for_the_gpu(call: Callable[..., list[Tensor]], dtype: str, boxes: str, backend: str) -> None:
    given = settled(Case("tiny", channels=64, boxes=5, dtype=dtype))
    if boxes == "listed":
        given["boxes"] = [b[: 2 * n + 1] for n, b in enumerate(given["boxes"][0])]
    third: Losses = {} if backend == all_kernels.ONE_LAUNCH else {"aid": AIDLoss(BMFILoss())}
    losses, d = {**both(), **third}, torch.full((), 1024.0, device=DEVICE)
    found = without_waiting(lambda: call(losses, given, d))
    assert all(x.isfinite().all() for x in found)


@by_passes
def test_the_teacher_side_does_not_wait_for_the_gpu() -> None:
    given, losses = settled(TINY), {**both(), "aid": AIDLoss(BMFILoss(beta_bg=0.1))}
    found = without_waiting(lambda: tensors(sides(losses, given)))
    assert found and all(x.isfinite().all() for x in found)


def test_memory_beside_inputs_and_gradient_is_that_of_a_few_maps(backend: str) -> None:
    """The bound, in fp32 maps (N, H*W) of all levels, by Triton's passes:

    2  kept for the backward:          the raw map and sum_c |x|
    3  of the small backward launch:   product_pixel, sign_pixel, error_pixel
    3  of the teacher, packed:         its map, its spatial attention, the imitation's weights
    and 4 vectors (N, C) of all levels: the student's channel weights, sum_p |x|, sign_channel, the teacher's channel attention. The channel
    sums of the read pass, another map, are given back before the small launch makes its three.

    By the native passes, whose write pass makes its numbers itself: without the three of the launch, and without sign_channel.

    In one launch, where nothing is given back before its end:

    2 + 3  as above, without those of the backward launch
    1      the boxes' masks
    2      of the tiles' channel sums, for each network one: a tile has 256 pixels, and there are 256 channels
    and 4 vectors: the channel weights of both, sum_p |x|, the teacher's channel attention.
    """
    given = settled(STEP)
    explicit(both(), given, one())
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = explicit(both(), given, one())
    held = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_allocated()
    maps = STEP.batch * STEP.pixels * 4
    vectors = STEP.batch * STEP.channels * len(STEP.level_sizes) * 4
    # State, rows, flags, the imitation's sums by program, and rounding to 512 bytes; of one launch, sums of tiles that are not full.
    small = (192 if backend == all_kernels.ONE_LAUNCH else 128) << 10
    assert all(x.isfinite().all() for x in results)
    most = 5 * maps + 3 * vectors if backend == "native" else 8 * maps + 4 * vectors
    assert peak - held < most + small, f"{(peak - held) / maps:.2f} maps"


@by_passes
def test_a_loss_that_inductor_compiled_is_the_eager_one() -> None:
    given, fused = settled(TINY), FusedLoss(both())

    def total(student: list[Tensor], case: dict[str, Any]) -> Tensor:
        return sum(fused(**{**case, "student_features": student}).values())

    leaves = [x.requires_grad_() for x in given.pop("student_features")]
    want = total(leaves, given)
    got = torch.compile(total, fullgraph=True)(leaves, given)
    assert relative_error(got.detach(), want.detach()) < 1e-6
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert relative_error(a, b) < 1e-6
