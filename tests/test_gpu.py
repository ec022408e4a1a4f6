"""What is promised on a GPU, whatever the backend: float64's answer, no host synchronisation, CUDA graphs, mixed precision, inline mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import all_kernels
import pytest
import torch
from gpu_support import BACKENDS, DEVICE, captured, moved, without_waiting
from torch import Tensor

from benchmarks.call import bind, sample
from benchmarks.measure.gate import gate
from benchmarks.providers import Provider, providers, reference_of
from benchmarks.registry import ENTRIES, Case, Entry, flat
from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, functional, set_backend
from kdkernels.reference.box_mask import box_mask as reference

pytestmark = pytest.mark.gpu
IMAGE_SIZE = (200, 336)
SHAPES = [(2, 16, 25, 42), (2, 16, 13, 21), (2, 16, 7, 11)]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
BOXES = [[[8.0, 10.0, 150.0, 130.0], [130.0, 20.0, 160.0, 150.0], [280.0, -12.0, 350.0, 125.0]], [[33.3, 5.1, 171.7, 160.2]]]


def losses() -> FusedLoss:
    return FusedLoss({"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.5, gamma=0.3, lambda_=0.2), "aid": AIDLoss(BMFILoss())})


def losses_of(way: str) -> FusedLoss:
    """What is called this way: the one launch takes two losses, and of BMFI two terms."""
    two = FusedLoss({"gkd": GKDLoss(), "aid": AIDLoss(BMFILoss(alpha=0.5, gamma=0.3))})
    return two if way == all_kernels.ONE_LAUNCH else losses()


def inputs(dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> dict[str, Any]:
    """Arguments of all losses on the CPU; the gradients have the size that a detector's have."""
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    found: dict[str, Any] = {
        name: [(torch.randn(shape) * (1e-2 if "gradients" in name else 1)).to(dtype).to(memory_format=layout) for shape in SHAPES]
        for name in names
    }
    boxes = [torch.tensor(image) for image in BOXES]
    return {**found, "boxes": boxes, "image_size": IMAGE_SIZE, "teacher_losses": torch.tensor([[0.4, 2.0]])}


def evaluate(loss: FusedLoss, given: dict[str, Any], d: float = 1.0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Values, and the gradients of d times their sum."""
    leaves = [x.detach().requires_grad_() for x in given["student_features"]]
    values = loss(**{**given, "student_features": leaves})
    gradients = torch.autograd.grad(list(values.values()), leaves, [value.new_full((), d) for value in values.values()])
    return {name: value.detach() for name, value in values.items()}, list(gradients)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want).norm() / want.norm()).item()


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.fixture(params=["reference", *all_kernels.WAYS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with all_kernels.chosen(request.param):
        yield request.param


#: What is no explicit call of GKD and BMFI.
by_passes = pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """No TF32 and no atomics: two ways to the same gradient can be compared then."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("chosen", ["auto", *BACKENDS])
def test_small_call_agrees_with_float64_on_the_cpu(chosen: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    given, tolerance = inputs(dtype, layout), TOLERANCES[dtype]
    # On the CPU, and in float64 anywhere, "auto" is the reference; kernels that are named refuse that.
    want_values, want_gradients = evaluate(losses(), moved(given, "cpu", torch.float64))
    set_backend(chosen)
    if chosen != "auto" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="it does not take float64"):
            evaluate(losses(), moved(given, DEVICE))
        return
    for d in (1.0, 1024.0):
        values, gradients = evaluate(losses(), moved(given, DEVICE), d)
        for name, value in values.items():
            assert value.device.type == DEVICE
            assert error(value, want_values[name]) < min(tolerance, 2e-5), name
        for level, (gradient, want) in enumerate(zip(gradients, want_gradients, strict=True)):
            assert gradient.dtype == dtype and gradient.device.type == DEVICE
            assert gradient.is_contiguous(memory_format=layout)
            assert error(gradient, d * want) < tolerance, f"level {level}, d = {d}"


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        (entry.name, mode, dtype)
        for entry in ENTRIES.values()
        for mode in entry.modes
        # Every call of the gate waits: 16 bit where a type can make a difference.
        for dtype in (("fp32", "bf16", "fp16") if mode in ("backward", "inline") else ("fp32",))
    ],
)
@pytest.mark.parametrize("provider", ["reference", "eager", *BACKENDS])
def test_providers_pass_the_gate_of_the_benchmarks(provider: str, name: str, mode: str, dtype: str) -> None:
    chosen = providers()[provider]
    with chosen.active():
        assert rejected(chosen, ENTRIES[name], mode, dtype) == ""


@pytest.mark.parametrize("mode", [mode for mode in ENTRIES["gkd_bmfi"].modes if mode.startswith("backward")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", [all_kernels.in_one_launch], indirect=True)
def test_the_one_launch_passes_the_gate_of_the_benchmarks(dtype: str, mode: str, backend: str) -> None:
    assert rejected(providers()["native"], ENTRIES["gkd_bmfi"], mode, dtype) == ""


def rejected(provider: Provider, entry: Entry, mode: str, dtype: str) -> str:
    """Why the gate does not admit the provider, which is active."""
    device, generator = torch.device(DEVICE), torch.Generator().manual_seed(0)
    given = entry.inputs(Case("tiny", batch=2, channels=16, boxes=5, dtype=dtype), generator, device)
    shapes = [value.shape for value in flat(reference_of(entry)(**given))]
    call = bind(entry, provider.function(entry), mode, own=provider.backend is not None)
    return gate(entry, mode, dtype, call, sample(entry, given, mode, shapes, generator), device).reason


def test_results_are_the_same_bit_for_bit_from_run_to_run(backend: str) -> None:
    given = moved(inputs(torch.float32), DEVICE)
    first, second = (evaluate(losses_of(backend), given) for _ in range(2))
    assert all(torch.equal(a, second[0][name]) for name, a in first[0].items())
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@by_passes
@pytest.mark.parametrize("kind", ["binary", "assigned", "area", "gaussian", "exponential", "background"])
def test_box_masks_are_those_of_the_cpu(kind: str, backend: str) -> None:
    corners = torch.rand(4, 50, 2) * torch.tensor([1344.0, 800.0])
    boxes = torch.cat([corners, corners + torch.rand(4, 50, 2) * 300], -1)
    sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    want = reference(list(boxes), (800, 1344), sizes, kind)
    got = functional.box_mask(list(boxes.to(DEVICE)), (800, 1344), sizes, kind)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu() == 0, b == 0)
        if kind in ("gaussian", "exponential"):  # each device has its own exp
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=0)
        else:
            assert torch.equal(a.cpu(), b)


def results(loss: FusedLoss, given: dict[str, Any]) -> list[Tensor]:
    values, gradients = evaluate(loss, given)
    return [*values.values(), *gradients]


def test_nothing_waits_for_the_gpu(backend: str) -> None:
    loss, given = losses_of(backend), moved(inputs(torch.bfloat16), DEVICE)
    assert all(x.isfinite().all() for x in without_waiting(lambda: results(loss, given)))


def test_a_cuda_graph_replays_forward_and_backward_on_new_contents(backend: str) -> None:
    loss, given = losses_of(backend), moved(inputs(torch.float32), DEVICE)
    graph, replayed = captured(lambda: results(loss, given))
    for level in given["student_features"]:
        level.copy_(torch.randn(level.shape))
    wanted = results(loss, given)
    graph.replay()
    assert all(error(got, want.double().cpu()) < 1e-6 for got, want in zip(replayed, wanted, strict=True))


def distilled(mode: str, student: torch.nn.Module, teacher: torch.nn.Module) -> Any:
    from kdkernels import Distiller

    return Distiller(copy.deepcopy(student), copy.deepcopy(teacher), {"gkd": GKDLoss(), "bmfi": BMFILoss()}, mode=mode)


def detectors() -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """Student, teacher and a batch, on the GPU."""
    from detectors import batch, detector

    images, targets = batch()
    return detector("fcos", 0).to(DEVICE), detector("fcos", 1).to(DEVICE), (moved(images, DEVICE), [moved(t, DEVICE) for t in targets])


@by_passes
def test_inline_gives_the_parameters_the_gradients_of_explicit(backend: str, exact_convolutions: None) -> None:
    student, teacher, shown = detectors()
    found = {}
    for mode in ("inline", "explicit"):
        distiller = distilled(mode, student, teacher)
        sum(distiller(*shown).values()).backward()
        assert distiller.last_values()["kd_gkd"] > 0
        found[mode] = torch.cat([p.grad.flatten().double().cpu() for p in distiller.student.parameters() if p.grad is not None])
        distiller.close()
    sum(student(*shown).values()).backward()
    bare = torch.cat([p.grad.flatten().double().cpu() for p in student.parameters() if p.grad is not None])
    assert error(found["inline"], found["explicit"]) < 1e-4
    assert error(bare, found["explicit"]) > 1e-2, "distillation makes no difference here, so the comparison says nothing"


@by_passes
@pytest.mark.parametrize("mode", ["inline", "explicit"])
def test_mixed_precision_steps_are_taken_or_skipped_as_a_whole(mode: str, backend: str) -> None:
    student, teacher, shown = detectors()
    distiller = distilled(mode, student, teacher)
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=1e-4)

    def step(scale: float) -> tuple[bool, float]:
        """Whether parameters changed, and the scale afterwards."""
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        before = [p.detach().clone() for p in distiller.student.parameters()]
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            found = distiller(*shown)
        scaler.scale(sum(value.float() for value in found.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in distiller.student.parameters())
        return any(not torch.equal(a, b) for a, b in zip(before, distiller.student.parameters(), strict=True)), scaler.get_scale()

    assert step(64.0) == (True, 64.0)
    assert all(value.isfinite() for value in distiller.last_values().values())
    assert step(2.0**40) == (False, 2.0**39)
    assert step(64.0) == (True, 64.0)
