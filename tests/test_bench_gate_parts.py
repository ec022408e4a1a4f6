"""The gate's parts: the oracle, new contents, poisoned memory, agreement; and every entry's honest providers are admitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gate_support import CPU, METHOD, SMALL, a_sample
from torch import Tensor

from benchmarks.call import bind
from benchmarks.measure.agreement import agree
from benchmarks.measure.contents import partly_renewed, renewed, same_bits
from benchmarks.measure.gate import fingerprint, gate, oracle, recheck
from benchmarks.measure.poison import Poison
from benchmarks.providers import providers
from benchmarks.registry import ENTRIES, Case


def test_the_oracle_is_float64_and_adds_what_arrives_inline() -> None:
    sample = a_sample(METHOD, "inline")
    both = oracle(METHOD, sample, "backward")
    assert [x.dtype for x in both] == [torch.float64] * 4 and both[0].shape == (3, 1)
    for got, own, g in zip(oracle(METHOD, sample, "inline"), both[1:], sample.arriving, strict=True):
        torch.testing.assert_close(got, own + g.double(), rtol=0, atol=0)
    assert [x.shape for x in oracle(METHOD, sample, "forward")] == [(3, 1)]


def test_fingerprints_see_one_bit_a_swap_and_a_version() -> None:
    sample = a_sample(METHOD, "backward")
    x = sample.inputs["t"][0]
    before = fingerprint(sample)
    assert fingerprint(sample) == before
    x.data.view(torch.int32).view(-1)[7] ^= 1
    assert fingerprint(sample) != before
    x.data.view(torch.int32).view(-1)[7] ^= 1
    assert fingerprint(sample) == before
    x.data.copy_(x.flip(-1))
    assert fingerprint(sample) != before
    x.data.copy_(x.flip(-1))
    x.add_(0)
    assert fingerprint(sample) != before


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_new_contents_differ_everywhere_and_are_of_the_same_kind(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    boxes, counts = torch.tensor([[[10.0, 20.0, 11.0, 22.0]] * 4] * 2), torch.tensor([4, 2])
    new = renewed([x, boxes, counts], generator)
    assert float((new[0] == x).double().mean()) < 0.02
    assert bool((new[1][..., 2:] > new[1][..., :2]).all()) and not bool((new[1] == boxes).any())
    assert torch.equal(new[2], counts)
    part = partly_renewed([x, boxes, counts], generator)
    assert 0.1 < float((part[0] != x).double().mean()) <= 0.3
    assert same_bits(part[1], boxes) and same_bits(part[2], counts)


def test_poisoned_memory_is_nan_and_writes_are_noted() -> None:
    x, free = torch.zeros(4), torch.zeros(4)
    with Poison([x]) as poison:
        made = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))]
        counts = torch.empty(3, dtype=torch.int64)
        free.add_(1)
        assert poison.written == []
        x[1:].detach().add_(1)
    assert all(bool(m.isnan().all()) for m in made)
    assert counts.tolist() == [torch.iinfo(torch.int64).max] * 3
    assert poison.written == ["aten.add_.Tensor"]


def gradient(elements: int = 10_000) -> Tensor:
    return torch.randn(1, 4, 1, elements // 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_no_element_is_wrong_unseen() -> None:
    want = gradient()
    want[..., :2] = 1e4
    assert agree(want.float(), want, 2e-5).reason == ""
    for wrong in (want[:, :1, :, 5:6], want[..., :2], want[..., -1:]):
        kept = wrong.clone()
        wrong.mul_(-1)
        got = want.float()
        wrong.copy_(kept)
        assert "of 10000 of the elements are wrong" in agree(got, want, 2e-5).reason


def test_two_large_elements_do_not_hide_the_rest() -> None:
    want = gradient()
    want[..., :2] = 1e4
    rest = want.clone()
    rest[..., 2:] *= 1 + 5e-5
    assert float((rest - want).norm() / want.norm()) < 1e-6, "to a plain L2 error they do"
    found = agree(rest.float(), want, 2e-5)
    assert found.reason == "relative error 5.0e-05 is above 2e-05"
    assert agree(rest.float(), want, 1e-4).reason == ""


def test_an_element_is_held_against_the_channels_of_its_pixel() -> None:
    """GKD at a map's extremum: gradients a thousand times the others', one of them of a weight that nearly cancels."""
    want = torch.randn(2, 16, 20, 20, dtype=torch.float64)
    want[0, :, 3, 4] *= 1e3
    want[0, 5, 3, 4] = 1e-3
    got = want.clone()
    got[0, 5, 3, 4] += 1e3 * 1e-6
    assert agree(got.float(), want, 2e-5).reason == ""
    got[0, 5, 3, 4] += 1e3 * 1e-3
    assert "1 of 12800 of the elements are wrong" in agree(got.float(), want, 2e-5).reason
    for k in range(3):  # of two pixels it may be the rounding of the large one, not of three
        got[0, 5, 3, 4] = want[0, 5, 3, 4]
        assert agree(got.float(), want, 2e-3).reason == ""
        got[0, 7, 9, k] += 0.5
    assert "1 of 12800 of the elements are wrong" in agree(got.float(), want, 2e-3).reason
    elsewhere = want.clone()
    elsewhere[1, 5, 3, 4] += 1e-2
    assert "1 of 12800 of the elements are wrong" in agree(elsewhere.float(), want, 2e-5).reason


def test_what_the_type_cannot_hold_is_no_error() -> None:
    tiny = 1e-6 * gradient()
    assert agree(tiny.half(), tiny, 1e-3).reason == ""
    assert agree(0.9 * tiny.half(), tiny, 1e-3).reason
    large = 3e4 * gradient()
    assert bool(large.half().isinf().any())
    assert agree(large.half(), large, 1e-3).reason == ""
    assert agree(large.half().abs(), large, 1e-3).reason
    assert agree(large.half().nan_to_num(0, 0, 0), large, 1e-3).reason
    assert "NaN" in agree(torch.full((1, 4, 1, 2500), float("inf")), gradient(), 2e-5).reason
    zero = torch.zeros(1, 4, 1, 10, dtype=torch.float64)
    assert agree(zero.float(), zero, 2e-5).error == 0
    assert agree(zero.float() + 1e-6, zero, 2e-5).reason
    assert "no verdict" in agree(zero.float(), zero + float("nan"), 2e-5).reason


def test_a_compiled_provider_is_admitted_and_runs_its_compiled_code() -> None:
    compiled, runs = 0, 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1

        def run(*args: Tensor) -> object:
            nonlocal runs
            runs += 1
            return graph.forward(*args)

        return run

    function = torch.compile(METHOD.eager, backend=backend, dynamic=False)
    call = bind(METHOD, function, "backward", own=False)
    sample = a_sample(METHOD, "backward")
    assert gate(METHOD, "backward", "fp32", call, sample, CPU).reason == ""
    assert (compiled, runs) == (1, 4)
    call(sample)
    assert (compiled, runs) == (1, 5), "nothing that the gate does makes torch.compile give up"


#: Of each provider types and layouts: fp16 is here in both, of the baselines too, which tests/test_registry.py has in the other types.
ADMITTED = [
    *((provider, dtype, "contiguous") for provider in ("paper", "eager", "reference") for dtype in ("fp32", "bf16")),
    *(("paper", "fp16", "channels_last"), ("eager", "fp16", "channels_last")),
    *(("eager", "fp16", "contiguous"), ("reference", "fp16", "contiguous")),
]


@pytest.mark.parametrize(("provider", "dtype", "layout"), ADMITTED)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_admitted(name: str, provider: str, dtype: str, layout: str) -> None:
    entry, chosen = ENTRIES[name], providers()[provider]
    case = Case("tiny", batch=1, channels=16, boxes=5, dtype=dtype, layout=layout)
    for mode in entry.modes:
        with chosen.active():
            call = bind(entry, chosen.function(entry), mode, own=chosen.backend is not None)
            sample = a_sample(entry, mode, case)
            before = fingerprint(sample)
            assert gate(entry, mode, dtype, call, sample, CPU).reason == ""
            assert recheck(entry, mode, dtype, call, [sample], CPU).reason == ""
            assert fingerprint(sample) == before


@pytest.mark.parametrize("name", ENTRIES)
def test_images_without_boxes_are_no_obstacle(name: str) -> None:
    entry = ENTRIES[name]
    sample = a_sample(entry, entry.modes[-1], replace(SMALL, boxes=0))
    assert gate(entry, entry.modes[-1], "fp32", bind(entry, entry.eager, entry.modes[-1], own=False), sample, CPU).reason == ""
