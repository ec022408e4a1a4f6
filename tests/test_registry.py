"""The registry: every baseline computes what the reference does, and what is declared about bytes and inputs is true."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_support import needs_library
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels.losses
import kdkernels.ops
from benchmarks.call import Sample, bind, sample, widened
from benchmarks.providers import absent, providers, reference_of
from benchmarks.registry import ENTRIES, LAYOUTS, Case, Entry, Inputs, case, flat, published, settle, vectorised

CPU = torch.device("cpu")
GRADED = [name for name, entry in ENTRIES.items() if entry.differentiable is not None]
#: Not in the benchmarks' grid: odd sizes, small enough for hundreds of calls.
HELD_OUT = Case("held-out", batch=3, channels=10, boxes=5)


@pytest.fixture(autouse=True)
def held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(case.PYRAMIDS, "held-out", ((75, 106), (8, 16, 32)))


def made(entry: Entry, case: Case, seed: int = 5) -> Inputs:
    return entry.inputs(case, torch.Generator().manual_seed(seed), CPU)


def ready(entry: Entry, case: Case, mode: str, seed: int = 5) -> Sample:
    inputs = made(entry, case, seed)
    shapes = [x.shape for x in flat(entry.eager(**inputs))]
    return sample(entry, inputs, mode, shapes, torch.Generator().manual_seed(seed + 1))


def oracle(entry: Entry, given: Sample, mode: str) -> list[Tensor]:
    upcast = Sample(widened(given.inputs), widened(given.cotangents), widened(given.arriving))
    return bind(entry, reference_of(entry), mode, own=False)(upcast)


def assert_agree(entry: Entry, given: Sample, mode: str, got: list[Tensor], want: list[Tensor]) -> None:
    """Every value and every level's gradient within the entry's tolerance, besides what fp16 cannot hold."""
    values = len(want) - (0 if mode == "forward" else len(given.inputs[entry.differentiable]))
    dtype = next(name for name, t in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items() if t == got[-1].dtype)
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        kind = "value" if k < values else "gradient"
        assert a.shape == b.shape
        if kind == "gradient":
            own = given.inputs[entry.differentiable][k - values].dtype
        else:
            own = torch.float32 if entry.values_like is None else given.inputs[entry.values_like][k].dtype
        assert a.dtype == own
        limits = torch.finfo(a.dtype)
        allowed = getattr(entry.tolerances["fp32" if kind == "value" else dtype], kind) * float(b.norm())
        allowed += limits.tiny * limits.eps * b.numel() ** 0.5
        error = float((a.double() - b.clamp(-limits.max, limits.max)).norm())
        assert error <= allowed, f"{entry.name}, {mode}, {kind} {k}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("baseline", ["eager", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENTRIES)
def test_baselines_are_right(name: str, dtype: str, layout: str, baseline: str) -> None:
    entry = ENTRIES[name]
    for mode in entry.modes:
        given = ready(entry, replace(HELD_OUT, dtype=dtype, layout=layout), mode)
        got = bind(entry, getattr(entry, baseline), mode, own=False)(given)
        want = oracle(entry, given, mode)
        if mode == "inline":
            # Judged before it is lost in what arrives.
            got, want = ([a.double() - b.double() for a, b in zip(x, given.arriving, strict=True)] for x in (got, want))
            floor = [torch.finfo(x.dtype).eps * float(x.double().norm()) for x in given.arriving]
            for a, b, rounding in zip(got, want, floor, strict=True):
                assert float((a - b).norm()) <= entry.tolerances[dtype].gradient * float(b.norm()) + rounding
            continue
        assert_agree(entry, given, mode, got, want)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("name", ENTRIES)
def test_own_call_in_float32_and_inline_is_the_oracle(name: str, backend: str) -> None:
    entry = ENTRIES[name]
    for mode in entry.modes:
        given = ready(entry, HELD_OUT, mode)
        with providers()[backend].active():
            got = bind(entry, entry.call, mode, own=True)(given)
        for a, b in zip(got, oracle(entry, given, mode), strict=True):
            assert float((a.double() - b).norm()) <= 2e-5 * float(b.norm())


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in ("bmfi", "gkd_bmfi_separate", "terms_persistent", "gid")])
def test_eager_compiles_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is in others' graphs, and for GID, whose entry says why there is none."""
    monkeypatch.setitem(case.PYRAMIDS, "held-out", ((75, 106), (8,)))
    entry, mode = ENTRIES[name], "forward" if ENTRIES[name].differentiable is None else "backward"
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entry.eager, backend=counter, fullgraph=True, dynamic=False)
    given = ready(entry, HELD_OUT, mode)
    assert_agree(entry, given, mode, bind(entry, compiled, mode, own=False)(given), oracle(entry, given, mode))
    assert counter.frame_count == 1


@pytest.mark.parametrize("baseline", ["eager", "paper"])
@pytest.mark.parametrize("name", ["box_mask", "bmfi", "aid_bmfi", "gkd_bmfi", "gkd_bmfi_separate", "fgd", "fgfi", "defeat"])
def test_without_boxes(name: str, baseline: str) -> None:
    entry = ENTRIES[name]
    mode = entry.modes[1] if entry.differentiable else "forward"
    given = ready(entry, replace(HELD_OUT, boxes=0), mode)
    assert given.inputs["boxes"][0].shape == (3, 0, 4)
    got, want = bind(entry, getattr(entry, baseline), mode, own=False)(given), oracle(entry, given, mode)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("masks", [vectorised.box_masks, published.box_masks])
def test_masks_of_padded_and_edge_boxes(masks: Callable[..., list[Tensor]]) -> None:
    """Fewer boxes than rows, integer coordinates, boxes without area, outside, as large as the image, NaN."""
    padded = torch.tensor(
        [
            [[0, 0, 8, 8], [16, 24, 56, 64], [40, 40, 40, 60], [-50, -50, -1, -1]],
            [[-9, -9, 200, 200], [5, 5, 6, 6], [7, 7, 3, 9], [0, 0, 1, 1]],
            [[float("nan"), 0, 9, 9], [30, 20, 90, 21], [0, 0, 106, 75], [0, 0, 50, 50]],
        ]
    )
    boxes, sizes = (padded, torch.tensor([4, 2, 2])), [(10, 14), (5, 7), (3, 4)]
    want = kdkernels.ops.box_mask(boxes, (75, 106), sizes)
    for a, b in zip(masks(boxes, (75, 106), sizes), want, strict=True):
        assert b.max() > 0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_masks_in_several_rounds_are_the_same() -> None:
    given = made(ENTRIES["box_mask"], HELD_OUT)
    for a, b in zip(vectorised.box_masks(**given), vectorised.box_masks(**given, chunk=1), strict=True):
        assert torch.equal(a, b)


def test_every_primitive_and_every_loss_has_an_entry() -> None:
    primitives = {module.name for module in pkgutil.iter_modules(kdkernels.ops.__path__)}
    # Passes that several primitives share: what they cost is measured in the methods.
    shared = {"shared_read", "terms"}
    assert {name for name, entry in ENTRIES.items() if entry.kind == "primitive"} == primitives - shared
    public = {name for name in kdkernels.losses.__all__ if isinstance(x := getattr(kdkernels.losses, name), type) and _is_loss(x)}
    used = {type(loss).__name__ for e in ENTRIES.values() if e.losses for loss in e.losses().values()}
    assert used == public
    assert {entry.kind for entry in ENTRIES.values()} == {"primitive", "method"}


def _is_loss(x: type) -> bool:
    return issubclass(x, kdkernels.losses.DistillationLoss) and x is not kdkernels.losses.DistillationLoss


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_consistent(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.name == name
    assert (entry.differentiable is None) == (entry.modes == ("forward",))
    assert ("inline" not in entry.modes) or entry.losses is not None
    assert all(entry.ideal_bytes(HELD_OUT, mode) > 0 for mode in entry.modes)
    if entry.kind == "method":
        assert entry.eager(**made(entry, HELD_OUT)).shape == ()


@pytest.mark.parametrize("provider", ["eager", "reference"])
def test_convolutions_are_of_full_precision_where_a_provider_is_measured(provider: str) -> None:
    """But not in training steps, where the rest of the step has PyTorch's setting."""
    before, chosen = torch.backends.cudnn.allow_tf32, providers()[provider]
    with chosen.active():
        assert not torch.backends.cudnn.allow_tf32
    with chosen.active(tf32=True):
        assert torch.backends.cudnn.allow_tf32 == before
    assert torch.backends.cudnn.allow_tf32 == before


def test_units_are_the_contracts() -> None:
    assert {name: dict(entry.units) for name, entry in ENTRIES.items()} == {
        "channel_kl": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "channel_mean": {"forward": 1},
        "correlation": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "weighted_channel_sum": {"forward": 1, "backward": 2, "backward_scaled": 2},
        "attention": {"forward": 1, "backward": 3, "backward_scaled": 3},
        "random_mask": {"forward": 1.35},
        "spatial_pool": {"forward": 1, "backward": 2, "backward_scaled": 2},
        "feature_imitation": {"forward": 2, "backward": 3, "backward_scaled": 5},
        "logit_bce": {"forward": 2, "backward": 3, "backward_scaled": 5},
        "logit_kl": {"forward": 2, "backward": 3, "backward_scaled": 5},
        "map_distance": {"forward": 0, "backward": 0, "backward_scaled": 0},
        "box_mask": {"forward": 0},
        "gkd": {"forward": 4, "backward": 5, "backward_scaled": 5, "inline": 6},
        "gkd_imitation": {"forward": 3, "backward": 5, "backward_scaled": 6, "inline": 6},
        "bmfi": {"forward": 2, "backward": 5, "backward_scaled": 5, "inline": 6},
        "aid_bmfi": {"forward": 2, "backward": 5, "backward_scaled": 5, "inline": 6},
        "gkd_bmfi": {"forward": 4, "backward": 7, "backward_scaled": 9, "inline": 8},
        "gkd_bmfi_separate": {"forward": 6, "backward": 13, "backward_scaled": 13},
        "terms_persistent": {"backward": 5},
        "fitnets": {"forward": 2, "backward": 3, "backward_scaled": 5, "inline": 4},
        "cwd": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "pkd": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "pad": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "fgd": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "gmask": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "emask": {"forward": 2, "backward": 5, "backward_scaled": 5},
        "cam_gmask": {"forward": 6, "backward": 7, "backward_scaled": 9},
        "teacher_cam": {"forward": 3, "backward": 6, "backward_scaled": 6},
        "cam_only": {"forward": 4, "backward": 6, "backward_scaled": 6},
        "fgfi": {"forward": 4, "backward": 7, "backward_scaled": 7},
        "defeat": {"forward": 4, "backward": 7, "backward_scaled": 7},
        "mgd": {"forward": 5.35, "backward": 11.35, "backward_scaled": 11.35},
        "fbkd": {"forward": 4, "backward": 7, "backward_scaled": 7},
        "acam": {"forward": 6, "backward": 14, "backward_scaled": 14},
        "frs": {"forward": 4, "backward": 7, "backward_scaled": 7},
        "gid": {"forward": 0, "backward": 1, "backward_scaled": 1},
        "ld": {"forward": 0, "backward": 0, "backward_scaled": 0},
        "crosskd": {"forward": 0, "backward": 0, "backward_scaled": 0},
    }
    separate = {mode: ENTRIES["gkd"].units[mode] + ENTRIES["bmfi"].units[mode] for mode in ("forward", "backward", "backward_scaled")}
    assert ENTRIES["gkd_bmfi_separate"].units == {mode: n + (0 if mode == "forward" else 3) for mode, n in separate.items()}


def test_one_launch_is_measured_where_there_is_one_and_moves_two_units_less() -> None:
    whole, one = ENTRIES["gkd_bmfi"], ENTRIES["terms_persistent"]
    # Both features a second time.
    assert whole.units["backward"] - one.units["backward"] == 2
    given = ready(one, HELD_OUT, "backward")
    assert all(torch.equal(a, b) for a, b in zip(oracle(one, given, "backward"), oracle(whole, given, "backward"), strict=True))
    cuda, chosen = torch.device("cuda"), providers()
    assert [one.absent(name, Case(dtype=dtype), cuda) for name in ("triton", "native") for dtype in ("bf16", "fp32", "fp16")] == [
        *("", "", ""),
        *("", "", "fp16 goes by passes"),
    ]
    assert one.absent("native", Case(), CPU) == "one launch is for a GPU"
    assert absent(chosen["reference"], CPU, one, Case()) == absent(chosen["eager"], CPU, one, Case()) == ""
    assert absent(chosen["native"], CPU, one, Case()) == (absent(chosen["native"], CPU) or "one launch is for a GPU")


def test_ideal_bytes_by_hand() -> None:
    fcos = Case(batch=8, dtype="bf16")
    assert fcos.unit == 8 * 256 * (100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11) * 2 == 91_750_400
    assert ENTRIES["gkd_bmfi"].ideal_bytes(fcos, "backward") == 7 * 91_750_400
    assert ENTRIES["gkd_bmfi"].ideal_bytes(Case(), "inline") == 8 * 45_875_200
    tiny = Case("tiny", batch=1, channels=64, boxes=20, dtype="bf16")
    pixels = 32 * 52 + 16 * 26 + 8 * 13
    assert ENTRIES["channel_mean"].ideal_bytes(tiny, "forward") == 64 * pixels * 2
    assert ENTRIES["box_mask"].ideal_bytes(tiny, "forward") == pixels * 4 + 20 * 16 + 8
    assert ENTRIES["map_distance"].ideal_bytes(tiny, "forward") == 2 * pixels * 4 + 3 * 4
    assert ENTRIES["map_distance"].ideal_bytes(tiny, "backward_scaled") == 3 * pixels * 4 + 2 * 3 * 4


def test_small_bytes_are_those_of_the_tensors() -> None:
    """What the two primitives without pyramids read and write, counted on the tensors themselves."""
    for name in ("box_mask", "map_distance"):
        entry, given = ENTRIES[name], made(ENTRIES[name], HELD_OUT)
        touched = _tensors(given) + flat(entry.eager(**given))
        assert entry.ideal_bytes(HELD_OUT, "forward") == sum(x.nbytes for x in touched)


@pytest.mark.parametrize("name", ENTRIES)
def test_inputs_depend_on_the_generator_alone(name: str) -> None:
    entry = ENTRIES[name]
    first = _tensors(made(entry, HELD_OUT))
    torch.manual_seed(99)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, _tensors(made(entry, HELD_OUT)), strict=True))
    other = _tensors(made(entry, HELD_OUT, seed=6))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.is_floating_point())
    layout = replace(HELD_OUT, dtype="bf16", layout="channels_last")
    pyramids = [x for x in _tensors(made(entry, layout)) if x.dim() == 4]
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last) for x in pyramids)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("baseline", ["call", "eager", "paper"])
def test_calls_keep_no_state_and_change_no_input(name: str, baseline: str) -> None:
    """The same answer the second time, after other inputs, bit for bit, and inputs that nobody wrote to."""
    entry = ENTRIES[name]
    function, given, other = getattr(entry, baseline), made(entry, HELD_OUT), made(entry, HELD_OUT, seed=8)
    before, versions = [x.clone() for x in _tensors(given)], [x._version for x in _tensors(given)]
    first = flat(function(**given))
    function(**other)
    assert all(torch.equal(a, b) for a, b in zip(first, flat(function(**given)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, _tensors(given), strict=True))
    assert versions == [x._version for x in _tensors(given)]


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [x for value in inputs.values() if isinstance(value, Tensor | list | tuple) for x in _leaves(value)]


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _leaves(item)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("name", ["gkd_bmfi", "bmfi", "weighted_channel_sum", "map_distance", "cam_gmask"])
def test_settled_inputs_lie_off_the_jumps(name: str) -> None:
    """Settling again finds nothing; contents put on a jump are moved off it, without a trace on versions."""
    entry, given = ENTRIES[name], made(ENTRIES[name], HELD_OUT)
    levels = given[entry.differentiable]
    once = [x.clone() for x in levels]
    entry.settle(given)
    assert all(torch.equal(a, b) for a, b in zip(once, levels, strict=True))
    first, versions = levels[0], [x._version for x in levels]
    if name == "map_distance":
        first.data[0, 0, :2] = first.data[0].min()  # two minima
    elif name == "weighted_channel_sum":
        minimum = int(vectorised.channel_sum(first, given["w"][0])[0].abs().argmin())
        first.data[0, :, 0] = first.data[0].flatten(1)[:, minimum, None]  # many minima
    else:
        first.data.copy_(given["teacher_features"][0])  # the same attention everywhere
    spoiled = first.clone()
    entry.settle(given)
    assert not torch.equal(spoiled, first)
    assert versions == [x._version for x in levels]


def test_what_a_relu_gets_and_differing_numbers_are_moved_off_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 3, 5, 5, generator=generator), torch.randn(2, 3, 3, 3, generator=generator)
    bias = -F.conv2d(x, weight, padding=1)[0, :, 2, 2]

    def convolution(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    assert convolution(x).abs().min() < settle.RECTIFIED_MARGIN
    settle.settle_rectified([x], [convolution])
    assert convolution(x).abs().min() >= settle.RECTIFIED_MARGIN
    numbers, others = torch.tensor([0.0, 1.0, 1.00001, 2.0]), torch.ones(4)
    settle.settle_numbers([numbers], [others])
    assert numbers.tolist() == [0, 1, 1.125, 2]


def test_what_cannot_be_settled_is_said() -> None:
    x = torch.randn(1, 2, 3, 3)
    x[:, :, 0, 0] = 0
    with pytest.raises(RuntimeError, match="jumps"):
        settle.settle_features([x], [torch.ones(1, 2)])
