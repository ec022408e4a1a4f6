"""The gate before the clock: who is wrong, or right for the wrong reason, gets no time.

A call is made several times on one sample whose contents are replaced in place between the calls, in ways that neither addresses, nor
versions, nor a few of the elements betray. Its results are read at once, without synchronising, and held against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import floor, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Sample, bind, widened
from ..providers import reference_of
from ..registry import Entry
from .agreement import agree, bulk_of
from .contents import (
    Kept,
    content_hash,
    fingerprint,
    identity,
    partly_renewed,
    renewed,
    same_bits,
    settled,
    snapshot,
    tensors,
    write,
)
from .poison import Poison, hold, other_stream, spoil
from .state import State

__all__ = ["Checked", "fingerprint", "gate", "oracle", "recheck"]

Contents = list[Tensor]
Change = Callable[[Contents, torch.Generator], Contents]
#: Of many tiny samples so many are looked at after timing.
RECHECKED = 4
#: Answers of the reference that are kept: those of one cell's gate, which all its providers share.
_KEPT_ANSWERS = 5
_answers: list[tuple[Entry, str, tuple[int, ...], list[Tensor]]] = []


class Checked(NamedTuple):
    """reason:   "" when admitted, else why it gets no time, for people
    value:    largest relative error of a value, None if none was compared
    gradient: largest relative error of a level's gradient (inline: of d * dKD), None if none was compared
    """

    reason: str
    value: float | None
    gradient: float | None


class Rejected(Exception):
    """Says why."""


def oracle(entry: Entry, sample: Sample, mode: str) -> list[Tensor]:
    """What a call must return, in float64, from the reference backend on upcast inputs: values, then gradients; inline: the gradients."""
    answer = _reference(entry, sample, mode)
    return [own + g.double() for own, g in zip(answer, sample.arriving, strict=True)] if mode == "inline" else answer


def gate(entry: Entry, mode: str, dtype: str, call: Call, sample: Sample, device: torch.device, seed: int = 0) -> Checked:
    """Everything that must hold before a time is taken. Leaves the sample's contents and torch's global state as they were."""
    kept, exam = Kept(sample), _Exam(entry, mode, dtype, call, device, seed)
    try:
        exam.admit(sample, kept.contents)
    except Rejected as rejected:
        return exam.checked(str(rejected))
    finally:
        kept.restore()
    return exam.checked()


def recheck(entry: Entry, mode: str, dtype: str, call: Call, samples: Sequence[Sample], device: torch.device) -> Checked:
    """After timing: the call is still right on new contents, in every sample (of many: in some of them).

    That the samples are what they were is for the caller to see, who takes a `fingerprint` of each after the last admission (a rejected
    provider may have left its trace on versions) and again after timing. Leaves contents and state as they were.
    """
    exam = _Exam(entry, mode, dtype, call, device, seed=1)
    new: Contents | None = None
    for sample in samples[:: -(-len(samples) // RECHECKED)]:
        kept = Kept(sample)
        try:
            # The same in all samples: one answer of the reference serves them.
            new = exam.renewed(sample, kept.contents) if new is None else new
            exam.attempt(sample, new)
        except Rejected as rejected:
            return exam.checked(str(rejected))
        finally:
            kept.restore()
    return exam.checked()


class _Exam:
    """The calls of one provider, and what was seen so far."""

    def __init__(self, entry: Entry, mode: str, dtype: str, call: Call, device: torch.device, seed: int) -> None:
        self.entry, self.mode, self.call, self.device = entry, mode, call, device
        self.tolerance = entry.tolerances[dtype]
        self.generator = torch.Generator().manual_seed(seed)
        self.errors: dict[str, float] = {}
        self.decoy: Contents = []
        self.earlier: list[tuple[Tensor, Tensor]] = []

    def checked(self, reason: str = "") -> Checked:
        return Checked(reason, self.errors.get("value"), self.errors.get("gradient"))

    def admit(self, sample: Sample, original: Contents) -> None:
        """Four calls: as it is, all new (in poisoned memory), a part of that new, as at first. Raises Rejected."""
        self.attempt(sample, original)
        new = self.renewed(sample, original)
        self.attempt(sample, new, poison=True)
        self.attempt(sample, self.renewed(sample, new, partly_renewed))
        self.attempt(sample, original)
        self._unchanged_since()

    def renewed(self, sample: Sample, contents: Contents, change: Change = renewed) -> Contents:
        """Other contents, which the sample holds when this returns."""
        write(tensors(sample), change(contents, self.generator))
        return settled(self.entry, sample)

    def attempt(self, sample: Sample, contents: Contents, poison: bool = False) -> None:
        """One call on these contents and all that is looked at. Raises Rejected."""
        xs = tensors(sample)
        write(xs, contents)
        want = self._answer(sample)
        ready, before = snapshot(xs), identity(sample)
        state, guard = State(self.device), Poison(xs) if poison else None
        # What a call on another stream would read while this one is held up.
        write(xs, self.decoy or ready)
        try:
            results, read = self._called(sample, xs, ready, guard)
        finally:
            changed = state.put_back()
        self.decoy = ready
        if changed:
            raise Rejected(f"changes {' and '.join(changed)}")
        _check_inputs(sample, before, ready, guard.written if guard else [])
        self._unchanged_since()
        self.earlier = list(zip(results, read, strict=True))
        self._check_forms(sample, results, want)
        self._check_values(sample, read, want)

    def _called(self, sample: Sample, xs: list[Tensor], ready: Contents, guard: Poison | None) -> tuple[list[Tensor], list[Tensor]]:
        """The results of one call and copies of them, made at once on the same stream. Raises Rejected for any exception."""
        try:
            with other_stream(self.device):
                spoil([x for x, _ in self.earlier])
                hold(self.device)
                write(xs, ready)
                with guard or nullcontext():
                    results = self.call(sample)
                if not isinstance(results, (list, tuple)) or any(type(x) is not Tensor for x in results):
                    raise Rejected(f"returns {_kinds(results)} where a list of plain tensors is wanted")
                # The last first: who fills results in the background is least far there.
                return list(results), snapshot(results[::-1])[::-1]
        except Rejected:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise Rejected(f"{type(error).__name__}: {lines[0]}") from error

    def _answer(self, sample: Sample) -> list[Tensor]:
        want = _reference(self.entry, sample, self.mode)
        if self.mode != "inline":
            return want
        _balance(sample.arriving, want)
        return [own + g.double() for own, g in zip(want, sample.arriving, strict=True)]

    def _unchanged_since(self) -> None:
        if not all(same_bits(result, read) for result, read in self.earlier):
            raise Rejected("a result changed after the call had returned it")

    def _check_forms(self, sample: Sample, got: list[Tensor], want: list[Tensor]) -> None:
        if len(got) != len(want):
            raise Rejected(f"returns {len(got)} tensors, wanted {len(want)}")
        inputs = tensors(sample)
        owned = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
        dtypes = self._dtypes(sample, len(want))
        for k, (x, wanted, dtype) in enumerate(zip(got, want, dtypes, strict=True)):
            form, right = (tuple(x.shape), x.dtype, x.device), (tuple(wanted.shape), dtype, inputs[0].device)
            if form != right:
                raise Rejected(f"{self._name(sample, k, len(want))} is {form}, wanted {right}")
            if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
                raise Rejected(f"{self._name(sample, k, len(want))} is an expanded view: most of it was never written")
            if x.numel() and x.untyped_storage().data_ptr() in owned:
                raise Rejected(f"{self._name(sample, k, len(want))} lies in the memory of an input")

    def _check_values(self, sample: Sample, got: list[Tensor], want: list[Tensor]) -> None:
        values = len(want) - len(self._leaves(sample))
        for k, (x, wanted) in enumerate(zip(got, want, strict=True)):
            kind = "value" if k < values else "gradient"
            arriving = sample.arriving[k] if self.mode == "inline" else None
            found = agree(x, wanted, getattr(self.tolerance, kind), arriving)
            if found.error is not None:
                self.errors[kind] = max(self.errors.get(kind, 0.0), found.error)
            if found.reason:
                raise Rejected(f"{self._name(sample, k, len(want))}: {found.reason}")

    def _leaves(self, sample: Sample) -> list[Tensor]:
        """Those whose gradients a call returns, behind the values."""
        name = self.entry.differentiable
        return [] if self.mode == "forward" or name is None else sample.inputs[name]

    def _dtypes(self, sample: Sample, results: int) -> list[torch.dtype]:
        """Values are fp32 unless the entry says whose type they have; a gradient has its feature's type."""
        leaves, like = self._leaves(sample), self.entry.values_like
        values = [torch.float32] * (results - len(leaves)) if like is None else [x.dtype for x in sample.inputs[like]]
        return [*values, *(x.dtype for x in leaves)]

    def _name(self, sample: Sample, k: int, results: int) -> str:
        values = results - len(self._leaves(sample))
        return f"value {k}" if k < values else f"the gradient of level {k - values}"


def _reference(entry: Entry, sample: Sample, mode: str) -> list[Tensor]:
    """As `oracle`, but inline without the arriving gradients. The newest answers are kept, by the bits of what they were made from."""
    key = content_hash(tensors(sample))
    for known in _answers:
        if known[0] is entry and known[1:3] == (mode, key):
            return known[3]
    wide = Sample(*(widened(part) for part in (sample.inputs, sample.cotangents)))
    with torch.enable_grad():
        answer = bind(entry, reference_of(entry), "forward" if mode == "forward" else "backward", own=False)(wide)
    if mode == "inline":
        answer = answer[-len(sample.arriving) :]
    _answers.append((entry, mode, key, [x.double() for x in answer]))
    del _answers[:-_KEPT_ANSWERS]
    return _answers[-1][3]


def _balance(arriving: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    """Scales each level's arriving gradient by a power of two to the size of d * dKD: below a rounding of a much larger G_S any error could
    hide. An inline loss does not depend on the scale of G_S, which is why d * dKD stays what it was."""
    for g, x in zip(arriving, own, strict=True):
        size, arrived = bulk_of(x).typical, bulk_of(g).typical
        if size and arrived:
            # Kept below the largest number of its type.
            room = torch.finfo(g.dtype).max / 4 / float(g.abs().max())
            g.data.mul_(2.0 ** min(round(log2(size / arrived)), floor(log2(room))))


def _check_inputs(sample: Sample, before: tuple[Any, ...], contents: Contents, written: list[str]) -> None:
    if identity(sample) != before:
        raise Rejected("changes its inputs: their values, versions, flags or gradients, or the lists that hold them")
    if not all(same_bits(x, content) for x, content in zip(tensors(sample), contents, strict=True)):
        raise Rejected("changes the values of its inputs")
    if written:
        raise Rejected(f"writes to the memory of its inputs ({', '.join(sorted(set(written)))})")


def _kinds(results: Any) -> str:
    if not isinstance(results, (list, tuple)):
        return type(results).__name__
    return " and ".join(sorted({type(x).__name__ for x in results}))
