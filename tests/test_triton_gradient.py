"""The Triton write pass against autograd in float64: every group of factors, layouts, sizes that vectors do not divide, addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_support import DEVICES, DTYPES, LAYOUTS, ROUNDING, poisoned, pyramid, relative_error

from kdkernels.pyramid import pack
from kdkernels.triton import gradient as module
from kdkernels.triton import levels
from kdkernels.triton.gradient import gradient

pytestmark = pytest.mark.parametrize("device", DEVICES)
# Rows of whole vectors; images of whole vectors, of odd rows; neither. In both layouts.
SHAPES = [(2, 16, 13, 21), (2, 3, 7, 11), (2, 8, 4, 6), (2, 20, 5, 8), (2, 1, 1, 1)]
#: Which factors a pair has: of the channel, of the pixel.
PAIRS = [(True, True), (True, False), (False, True), (False, False)]
ALL = {"product": (True, True), "sign": (True, True), "error": (True, True)}
GROUPS = [
    *({"product": pair, "absolute": absolute} for pair in PAIRS for absolute in (False, True)),
    *({"sign": pair} for pair in PAIRS[:3]),
    *({"error": pair} for pair in PAIRS),
    *({**ALL, "absolute": absolute} for absolute in (False, True)),
]


def factors(shapes: Sequence[Sequence[int]], device: str) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """For each pair different random vectors (N, C) and maps (N, H, W) a level."""
    vectors, maps = [shape[:2] for shape in shapes], [(shape[0], *shape[2:]) for shape in shapes]
    names = ("product", "sign", "error")
    return {name: (pyramid(vectors, seed=50 + k, device=device), pyramid(maps, seed=60 + k, device=device)) for k, name in enumerate(names)}


def wanted(x: Sequence[Tensor], chosen: dict[str, Any], found: dict[str, Any], target: Sequence[Tensor], arriving: Any) -> list[Tensor]:
    """Autograd's gradient of the sum whose derivative the write pass is, in float64."""
    leaves = [a.detach().double().cpu().contiguous().requires_grad_() for a in x]
    total = leaves[0].new_zeros(())
    for level, a in enumerate(leaves):

        def factor(name: str, side: int, neutral: float, level: int = level) -> Any:
            if not chosen[name][side]:
                return neutral
            value = found[name][side][level].double().cpu()
            return value[:, :, None, None] if side == 0 else value[:, None]

        if "product" in chosen:
            activated = a.abs() if chosen.get("absolute") else a
            total = total + (factor("product", 0, 1) * factor("product", 1, 1) * activated).sum()
        if "sign" in chosen:
            total = total + ((factor("sign", 0, 0) + factor("sign", 1, 0)) * a.abs()).sum()
        if "error" in chosen:
            difference = a - target[level].double().cpu()
            total = total + (factor("error", 0, 1) * factor("error", 1, 1) * difference.square()).sum() / 2
        if arriving is not None:
            total = total + (arriving[level].double().cpu() * a).sum()
    return list(torch.autograd.grad(total, leaves))


def written(x: Sequence[Tensor], chosen: dict[str, Any], found: dict[str, Any], target: Sequence[Tensor], arriving: Any) -> list[Tensor]:
    """What the kernel writes into poisoned results."""
    pairs = {
        name: tuple(pack(values) if has else None for has, values in zip(chosen[name], found[name], strict=True))
        for name in ("product", "sign", "error")
        if name in chosen
    }
    with poisoned():
        return gradient(x, target=target, arriving=arriving, absolute=chosen.get("absolute", False), **pairs)


def check(
    x: list[Tensor], chosen: dict[str, Any], target: list[Tensor] | None = None, arriving: list[Tensor] | None = None
) -> list[Tensor]:
    """The kernel's gradient, held against autograd's; target None: random in fp32."""
    shapes, device = [a.shape for a in x], str(x[0].device)
    target = pyramid(shapes, seed=9, device=device) if target is None else target
    found = factors(shapes, device)
    got = written(x, chosen, found, target, arriving)
    for a, one, want in zip(x, got, wanted(x, chosen, found, target, arriving), strict=True):
        assert one.dtype == a.dtype and one.shape == a.shape and one.stride() == torch.empty_like(a).stride()
        assert relative_error(one, want) < ROUNDING[a.dtype]
    return got


@pytest.mark.parametrize("arrives", [False, True], ids=["", "arriving"])
@pytest.mark.parametrize("chosen", GROUPS, ids=lambda chosen: "-".join(f"{name}{value}" for name, value in chosen.items()))
def test_every_group(device, chosen, arrives):
    shapes = [(1, 8, 4, 6), (1, 8, 3, 5), (1, 3, 7, 3)]
    got = check(pyramid(shapes, device=device), chosen, arriving=pyramid(shapes, seed=3, device=device) if arrives else None)
    assert len(got) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_layouts(device, dtype, layout):
    x, target, arriving = (pyramid(SHAPES, DTYPES[dtype], layout, seed, device) for seed in range(3))
    assert check(x, {**ALL, "absolute": True}, target, arriving)[0].dtype == DTYPES[dtype]


@pytest.mark.parametrize("types", [("bf16", "fp32", "fp16"), ("fp32", "bf16", "bf16"), ("fp16", "fp16", "fp32")], ids="-".join)
def test_target_and_arriving_gradients_of_other_types(device, types):
    x, target, arriving = (pyramid(SHAPES, DTYPES[name], seed=seed, device=device) for seed, name in enumerate(types))
    assert check(x, ALL, target, arriving)[0].dtype == DTYPES[types[0]]


def test_levels_of_different_types(device):
    x, arriving = ([pyramid([shape], dtype, device=device)[0] for shape, dtype in zip(SHAPES, kinds, strict=False)] for kinds in TYPES)
    assert [a.dtype for a in check(x, ALL, arriving=arriving)] == list(TYPES[0])


TYPES = [(torch.bfloat16, torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.float32, torch.float16, torch.float16)]


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("chosen", [ALL, {"product": (True, True)}], ids=["all", "product"])
def test_mixed_layouts(device, first, chosen):
    layouts = [first, *(name for name in LAYOUTS if name != first)]
    x = [pyramid([shape], layout=layouts[k % 2], seed=k, device=device)[0] for k, shape in enumerate(SHAPES)]
    target = [pyramid([shape], layout=layouts[(k + 1) % 2], seed=k + 20, device=device)[0] for k, shape in enumerate(SHAPES)]
    assert check(x, chosen, target, arriving=target[:])[1].shape == SHAPES[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_with_gaps_and_expanded_levels(device, layout):
    whole = pyramid([(2, 2 * c, h + 1, w + 2) for _, c, h, w in SHAPES[:3]], layout=layout, device=device)
    x = [a[:, ::2, 1:, :-2] for a in whole]
    target = [a[:, :1].expand_as(a) for a in x]
    assert len(check(x, ALL, target)) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_starts(device, dtype):
    x = [torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape) for a in pyramid(SHAPES, DTYPES[dtype], device=device)]
    assert all(a.storage_offset() == 1 and a.is_contiguous() for a in x)
    assert len(check(x, ALL, arriving=x[:])) == len(SHAPES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_larger_than_a_program(device, layout):
    # 1050 pixels are several tiles and several runs; their rows are no whole vectors of 16 bytes, those of 1040 are.
    got = check(pyramid([(1, 3, 25, 42), (1, 40, 26, 40), (1, 8, 25, 42)], torch.bfloat16, layout, device=device), ALL)
    assert len(got) == 3


@pytest.mark.parametrize("chosen", [ALL, {"product": (True, False)}], ids=["all", "product"])
def test_seven_levels_take_two_launches(device, chosen):
    shapes = [(1, c, h, h + 1) for c, h in [(3, 2), (8, 7), (5, 1), (8, 3), (2, 6), (16, 4), (4, 4)]]
    assert len(check(pyramid(shapes, device=device), chosen)) == 7 > levels.MOST_LEVELS


def test_no_images(device):
    x = pyramid([(0, 3, 4, 5), (0, 8, 2, 2)], torch.float16, device=device)
    got = gradient(x, product=(pack([a.new_zeros(0, a.shape[1]).float() for a in x]), None))
    assert [a.shape for a in got] == [a.shape for a in x] and {a.dtype for a in got} == {torch.float16}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_and_do_not_spread(device, bad):
    x, target = pyramid(SHAPES, device=device), pyramid(SHAPES, seed=1, device=device)
    x[0][1, 2, 3, 4] = bad
    found = factors(SHAPES, device)
    found["product"][1][2][0, 1, 1] = bad
    got = written(x, ALL, found, target, None)
    # One element of x, and all channels of one pixel.
    assert [int((~torch.isfinite(a)).sum()) for a in got] == [1, 0, 8, 0, 0]


def test_two_runs_are_equal_to_the_bit(device):
    x, target = pyramid(SHAPES, torch.bfloat16, device=device), pyramid(SHAPES, torch.bfloat16, seed=1, device=device)
    found = factors(SHAPES, device)
    first, second = (written(x, ALL, found, target, target) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=8)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3),
    layout=st.sampled_from(list(LAYOUTS)),
    chosen=st.sampled_from(GROUPS),
)
def test_any_shape(device, shapes, layout, chosen):
    x = pyramid([(2, *shape) for shape in shapes], torch.float16, layout, device=device)
    assert len(check(x, chosen, arriving=x[:])) == len(shapes)


@triton.jit
def _divide(along, inner, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out + lanes, module._divided(tl.load(along + lanes), inner))


@pytest.mark.parametrize("inner", [1, 3, 7, 41, 83, 1023, 1025, 12345, 2**20 + 1, 2**24 - 1, 2**24 + 1, 2**30 + 1, 2**31 - 9999])
def test_a_run_finds_its_rows(device, inner):
    # All elements that a run of 4096 can have whose start lies in the row's first or last elements.
    first = torch.arange(4096, dtype=torch.int32, device=device)
    for along in (first, first + (inner - 1)):
        out = torch.empty_like(along)
        _divide[(1,)](along, inner, out, 4096)
        assert torch.equal(out, along // inner)


def test_sizes_never_make_triton_compile_anew(device):
    # It does for integers that are 1 or divisible by 16.
    hidden = module.integers(range(5000))
    assert all(value != 1 and value % 16 for value in hidden)
    assert [(value - 3) >> 1 for value in hidden] == list(range(5000))


#: (C, H, W) of three images, of which the third lies beyond 2^31 elements: rows of whole vectors, images of whole vectors, neither.
#: Each number by itself is below 2^30, so that Triton passes 32 bits.
GREAT = [(8, 11592, 11592), (8, 11587, 11587), (3, 18923, 18923)]


@pytest.mark.parametrize("shape", GREAT, ids=str)
def test_addresses_beyond_2_to_the_31_elements(device, shape, monkeypatch):
    # On the CPU the memory is reserved and not touched: only the last program runs, which writes the last element.
    x = torch.empty(3, *shape, dtype=torch.float16, device=device)
    x.view(-1)[-1] = -4.0
    channel = torch.arange(1.0, 3 * shape[0] + 1, device=device)
    if device == "cpu":
        _run_the_last_program_only(monkeypatch, x)
    (got,) = gradient([x], product=(channel, None), absolute=True)
    assert x.numel() > 2**31
    assert float(got.view(-1)[-1]) == -float(channel[-1])


def _run_the_last_program_only(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    _, c, h, w = x.shape
    blocks = module._fitted(module.heuristic(x.dtype, False), h * w)
    (plan,) = module._plan(3, (c,), (h * w,), ((x.dtype,),), False, *(blocks[name] for name in module._BLOCKS))
    monkeypatch.setattr(module, "_plan", lambda *_: (plan._replace(grid=(1,)),))
    monkeypatch.setattr(module, "locate", lambda ends: (0, plan.grid[0] - 1))
    # The interpreter copies storages, which here lie on the CPU already, onto themselves.
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source, *args: self)
