"""The gate lets the honest through and nobody else: cheats and bugs, each with the reason it must be given."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gate_support import CPU, METHOD, SMALL, a_sample
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.call import Call, Sample, bind
from benchmarks.measure import gate as gate_module
from benchmarks.measure.contents import content_hash, tensors, write
from benchmarks.measure.gate import Checked, fingerprint, gate, recheck
from benchmarks.registry import Entry

Cheat = Callable[[Call], Call]


def checked(cheat: Cheat, mode: str, entry: Entry = METHOD, device: torch.device = CPU) -> Checked:
    call = cheat(bind(entry, entry.eager, mode, own=False))
    return gate(entry, mode, "fp32", call, a_sample(entry, mode, device=device), device)


def copies(results: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in results]


def cached(key: Callable[[Sample], object]) -> Cheat:
    """The first result for each key, for ever."""

    def cheat(call: Call) -> Call:
        known: dict[object, list[Tensor]] = {}
        return lambda sample: copies(known.setdefault(key(sample), call(sample)))

    return cheat


def after_the_third(call: Call) -> Call:
    known: list[list[Tensor]] = []

    def cheat(sample: Sample) -> list[Tensor]:
        if len(known) < 3:
            known.append(call(sample))
        return copies(known[-1])

    return cheat


def changing(change: Callable[[list[Tensor]], None]) -> Cheat:
    """The right results, and then `change`d."""

    def cheat(call: Call) -> Call:
        def wrong(sample: Sample) -> list[Tensor]:
            results = copies(call(sample))
            change(results)
            return results

        return wrong

    return cheat


def doing(deed: Callable[[Sample], object]) -> Cheat:
    """The right results, besides a `deed`."""

    def cheat(call: Call) -> Call:
        def wrong(sample: Sample) -> list[Tensor]:
            results = call(sample)
            deed(sample)
            return results

        return wrong

    return cheat


def returning(change: Callable[[list[Tensor], Sample], object]) -> Cheat:
    return lambda call: lambda sample: change(call(sample), sample)


def fills_in_a_thread(call: Call) -> Call:
    def cheat(sample: Sample) -> list[Tensor]:
        right = call(sample)
        results = [torch.zeros_like(x) for x in right]

        def fill() -> None:
            time.sleep(0.05)
            for x, y in zip(results, right, strict=True):
                x.copy_(y)

        threading.Thread(target=fill).start()
        return results

    return cheat


def lucky(call: Call) -> Call:
    """Leaves half of its outputs unwritten, and what lies there happens to be right, unless it was poisoned."""

    def cheat(sample: Sample) -> list[Tensor]:
        made = []
        for x in call(sample):
            out = torch.empty_like(x)
            written = torch.arange(x.numel()).view(x.shape) < x.numel() / 2
            made.append(torch.where(written | ~out.isnan(), x, out))
        return made

    return cheat


def half_written(call: Call) -> Call:
    def cheat(sample: Sample) -> list[Tensor]:
        made = []
        with _disable_current_modes():
            for x in call(sample):
                out = torch.empty_like(x)
                few = max(1, x.numel() // 2)
                out.view(-1)[:few] = x.reshape(-1)[:few]
                made.append(out)
        return made

    return cheat


def remembers_the_teacher(call: Call) -> Call:
    """Its side is the same in every step, is it not?"""
    known: dict[int, list[Tensor]] = {}

    def cheat(sample: Sample) -> list[Tensor]:
        teacher = known.setdefault(id(sample), copies(sample.inputs["t"]))
        return call(replace(sample, inputs={**sample.inputs, "t": teacher}))

    return cheat


def one_buffer(call: Call) -> Call:
    """As a CUDA graph does it: every call writes to the same memory."""
    buffers: list[Tensor] = []

    def cheat(sample: Sample) -> list[Tensor]:
        results = call(sample)
        buffers.extend(copies(results)[len(buffers) :])
        for buffer, x in zip(buffers, results, strict=True):
            buffer.copy_(x)
        return [x.view(x.shape) for x in buffers]

    return cheat


def noise(size: float) -> Cheat:
    def add(results: list[Tensor]) -> None:
        for x in results:
            x.mul_(1 + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))

    return changing(add)


def there_and_back(sample: Sample) -> None:
    with torch.no_grad():
        sample.inputs["t"][0].mul_(2).div_(2)


def there_and_back_unseen(sample: Sample) -> None:
    sample.inputs["t"][0].data.mul_(2).div_(2)


def nan_in_one(results: list[Tensor]) -> None:
    results[-1].view(-1)[-1] = float("nan")


def threads(sample: Sample) -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)


CHEATS: dict[str, tuple[Cheat, str]] = {
    "cached by address": (cached(lambda sample: sample.inputs["s"][0].data_ptr()), "wrong"),
    "cached by id": (cached(id), "wrong"),
    "cached by version": (cached(lambda sample: [(x.data_ptr(), x._version) for x in tensors(sample)].__repr__()), "wrong"),
    "cached by some elements": (cached(lambda sample: tuple(x.view(-1)[:8].tolist() for x in sample.inputs["s"]).__repr__()), "wrong"),
    "cached teacher": (remembers_the_teacher, "wrong"),
    "cached after the third call": (after_the_third, "wrong"),
    "filled in a thread": (fills_in_a_thread, "wrong"),
    "half written": (half_written, ""),
    "half written, and lucky": (lucky, "NaN"),
    "one NaN": (changing(nan_in_one), "1 of"),
    "noise of 1e-2": (noise(1e-2), "relative error"),
    "noise of 1e-3, as of bf16": (noise(1e-3), "relative error"),
    "changes an input": (doing(lambda sample: sample.inputs["t"][0].data.add_(1)), "changes the values of its inputs"),
    "changes an input and back": (doing(there_and_back), "versions"),
    "changes an input and back, unseen": (doing(there_and_back_unseen), "writes to the memory"),
    "empties a list": (doing(lambda sample: sample.inputs["t"].pop()), "lists"),
    "replaces a tensor": (doing(lambda sample: sample.inputs["t"].__setitem__(0, sample.inputs["t"][0].clone())), "lists"),
    "replaces an input's memory": (doing(lambda sample: setattr(sample.inputs["t"][0], "data", torch.zeros(3))), "changes its inputs"),
    "one buffer": (one_buffer, "changed after"),
    "lies in an input": (returning(lambda results, sample: [*results[:-1], sample.inputs["channel"][0].view(-1)]), ""),
    "one result missing": (returning(lambda results, sample: results[:-1] if len(results) > 1 else []), "wanted"),
    "another type": (returning(lambda results, sample: [*results[:-1], results[-1].double()]), "float64"),
    "another shape": (returning(lambda results, sample: [*results[:-1], results[-1][None]]), "wanted"),
    "another kind of tensor": (returning(lambda results, sample: [torch.nn.Parameter(x) for x in results]), "Parameter"),
    "no list": (returning(lambda results, sample: iter(results)), "iterator"),
    "an exception with grad mode off": (lambda call: lambda sample: [torch._C._set_grad_enabled(False)][1], "IndexError"),
    "an exception": (lambda call: lambda sample: [][0], "IndexError: list index out of range"),
    "random numbers": (doing(lambda sample: torch.rand(1)), "the random state"),
    "grad mode": (doing(lambda sample: torch._C._set_grad_enabled(False)), "grad mode"),
    "the default dtype": (doing(lambda sample: torch.set_default_dtype(torch.float64)), "the default dtype"),
    "deterministic algorithms": (doing(lambda sample: torch.use_deterministic_algorithms(True)), "deterministic"),
    "threads": (doing(threads), "number of threads"),
    "denormal numbers": (doing(lambda sample: torch.set_flush_denormal(True)), "denormal"),
}


@pytest.mark.parametrize("mode", ["forward", "backward", "inline"])
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_rejected(name: str, mode: str) -> None:
    cheat, word = CHEATS[name]
    reason = checked(cheat, mode).reason
    assert reason and word in reason


@pytest.mark.parametrize("mode", ["forward", "backward", "backward_scaled", "inline"])
def test_the_honest_pass(mode: str) -> None:
    found = checked(lambda call: call, mode)
    assert found.reason == ""
    assert (found.value is None) == (mode == "inline")
    assert (found.gradient is None) == (mode == "forward")


BACKWARD_CHEATS: dict[str, tuple[Cheat, str]] = {
    "a level's gradient is zero": (changing(lambda results: results[-1].zero_()), "the gradient of level 2"),
    "the last element is zero": (changing(lambda results: results[-3].view(-1)[-1].zero_()), "1 of 6656 of the elements are wrong"),
    "six elements are huge": (changing(lambda results: results[-3].view(-1)[:6].fill_(1e9)), "6 of 6656 of the elements are wrong"),
    "levels are swapped": (returning(lambda results, sample: [*results[:-2], results[-1], results[-2]]), "wanted"),
    "an expanded view": (
        returning(lambda results, sample: [*results[:-1], results[-1][:, :1].expand(results[-1].shape)]),
        "expanded view",
    ),
    "an input's memory": (returning(lambda results, sample: [*results[:-1], sample.inputs["t"][-1]]), "memory of an input"),
    "a .grad": (doing(lambda sample: setattr(sample.inputs["s"][0], "grad", torch.zeros(1, 4, 32, 52))), "changes its inputs"),
    "no more gradients": (doing(lambda sample: sample.inputs["s"][0].requires_grad_(False)), "changes its inputs"),
}


@pytest.mark.parametrize("mode", ["backward", "inline"])
@pytest.mark.parametrize("name", BACKWARD_CHEATS)
def test_a_cheat_with_gradients_is_rejected(name: str, mode: str) -> None:
    cheat, word = BACKWARD_CHEATS[name]
    assert word in checked(cheat, mode).reason


INLINE_CHEATS: dict[str, Cheat] = {
    "only what arrives": returning(lambda results, sample: copies(sample.arriving)),
    "without what arrives": returning(lambda results, sample: [x - g for x, g in zip(results, sample.arriving, strict=True)]),
    "upstream gradient of 1": lambda call: lambda sample: call(replace(sample, cotangents=[torch.ones_like(d) for d in sample.cotangents])),
    "adds to what arrives": returning(lambda results, sample: [g.copy_(x) for g, x in zip(sample.arriving, results, strict=True)]),
}


@pytest.mark.parametrize("name", INLINE_CHEATS)
def test_an_inline_cheat_is_rejected(name: str) -> None:
    assert checked(INLINE_CHEATS[name], "inline").reason


@pytest.mark.parametrize("size", [1e3, 1e-3, 1e6])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_inline_error_cannot_hide_below_what_arrives(dtype: str, size: float) -> None:
    entry, dtypes = METHOD, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    sample = a_sample(entry, "inline", replace(SMALL, dtype=dtype))
    for g in sample.arriving:
        g.mul_(size).clamp_(-3e4, 3e4)
    before = fingerprint(sample)
    honest = bind(entry, entry.eager, "inline", own=False)

    def wrong(sample: Sample) -> list[Tensor]:
        """d * dKD is 5 % too small."""
        right = honest(sample)
        return [(g.float() + 0.95 * (x.float() - g.float())).to(dtypes[dtype]) for x, g in zip(right, sample.arriving, strict=True)]

    assert gate(entry, "inline", dtype, honest, sample, CPU).reason == ""
    assert "relative error" in gate(entry, "inline", dtype, wrong, sample, CPU).reason
    assert fingerprint(sample) == before


def test_all_is_as_it_was_after_a_cheat() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    for cheat, _ in [*CHEATS.values(), *BACKWARD_CHEATS.values()]:
        sample = a_sample(METHOD, "backward")
        ids, contents = [id(x) for x in tensors(sample)], content_hash(tensors(sample))
        assert gate(METHOD, "backward", "fp32", cheat(bind(METHOD, METHOD.eager, "backward", own=False)), sample, CPU).reason
        assert [id(x) for x in tensors(sample)] == ids
        assert content_hash(tensors(sample)) == contents
        assert [x.requires_grad for x in sample.inputs["s"]] == [True] * 3 and sample.inputs["s"][0].grad is None
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled() and float(torch.tensor(1e-310, dtype=torch.float64)) != 0


def test_recheck_finds_who_stopped_working_while_it_was_timed() -> None:
    entry, honest = METHOD, bind(METHOD, METHOD.eager, "backward", own=False)
    samples = [a_sample(entry, "backward", seed=seed) for seed in range(3)]
    known: dict[int, list[Tensor]] = {}
    calls = 0

    def cheat(sample: Sample) -> list[Tensor]:
        """Works for ten calls, then remembers; never cheats on the first sample."""
        nonlocal calls
        calls += 1
        if calls <= 10 or sample is samples[0]:
            return honest(sample)
        return copies(known.setdefault(id(sample), honest(sample)))

    assert gate(entry, "backward", "fp32", cheat, samples[0], CPU).reason == ""
    before = [fingerprint(sample) for sample in samples]
    for k in range(15):
        cheat(samples[k % 3])
    assert [fingerprint(sample) for sample in samples] == before
    assert recheck(entry, "backward", "fp32", honest, samples, CPU).reason == ""
    assert "wrong" in recheck(entry, "backward", "fp32", cheat, samples, CPU).reason
    assert [fingerprint(sample) for sample in samples] == before


def test_work_elsewhere_reads_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that does not wait for the current one, played on the CPU: it sees memory as it is when the hold begins."""
    sample, seen = a_sample(METHOD, "backward"), []
    monkeypatch.setattr(gate_module, "hold", lambda device: seen.append(copies([x.detach() for x in tensors(sample)])))
    honest = bind(METHOD, METHOD.eager, "backward", own=False)

    def cheat(sample: Sample) -> list[Tensor]:
        with _disable_current_modes():
            now = copies([x.detach() for x in tensors(sample)])
            write(tensors(sample), seen[-1])
            results = honest(sample)
            write(tensors(sample), now)
        return results

    assert "wrong" in gate(METHOD, "backward", "fp32", cheat, sample, CPU).reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("which", ["default", "own"])
def test_another_stream_is_rejected(which: str) -> None:
    device = torch.device("cuda")
    stream = torch.cuda.default_stream() if which == "default" else torch.cuda.Stream()

    def cheat(call: Call) -> Call:
        def elsewhere(sample: Sample) -> list[Tensor]:
            with torch.cuda.stream(stream):
                return call(sample)

        return elsewhere

    assert checked(lambda call: call, "backward", device=device).reason == ""
    assert checked(cheat, "backward", device=device).reason
