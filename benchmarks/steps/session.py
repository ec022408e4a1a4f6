"""All variants of one pair: built, checked, timed in turns."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..measure.cell import COMPILING, said
from ..measure.clock import quantiles
from ..measure.cold import cold_caches
from ..measure.memory import peak_bytes
from ..providers import absent, providers
from ..registry import ENTRIES
from .gate import Truth, error, refusal, truth
from .pairs import Pair
from .step import Bench, Step, Variant
from .timing import against, in_turns, ratio, shares

WARMUP_ROUNDS = 2


@dataclass
class Outcome:
    """What became of a variant.

    first_s: seconds of the first step, with cold caches of compiled code;   cold: whether nothing was compiled for it before
    error:   of distillation's gradient, None for a probe
    """

    status: str = "skipped"
    reason: str = "stopped before it was timed"
    first_s: float = 0.0
    cold: bool = False
    error: float | None = None
    peak: int | None = None
    times: list[float] = field(default_factory=list)


class Session:
    """Admits variants, measures them, gives their results. `tell` is called with lines about the progress.

    A process works on one session at a time: a new one makes torch.compile forget what it compiled for those before, because a function
    is compiled only so many times before torch gives up.
    """

    def __init__(self, pair: Pair, batch: int, device: torch.device, amp: bool, seed: int, tell: Callable[[str], None]):
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        self.device, self.amp, self.seed, self.tell = device, amp, seed, tell
        self.bench = Bench(pair, batch, device, amp, seed)
        self.steps: dict[Variant, Step] = {}
        self.outcomes: dict[Variant, Outcome] = {}
        self.rounds = 0
        self._truths: dict[str, Truth] = {}
        self._compiled: set[tuple[str | None, str | None]] = set()

    def admit(self, plan: Sequence[Variant]) -> None:
        """Builds and checks the steps of `plan`; those that fail, are wrong or cannot run here get no time."""
        self.outcomes = {variant: Outcome() for variant in plan}
        for variant, outcome in self.outcomes.items():
            try:
                outcome.status, outcome.reason = self._admit(variant, outcome)
            except Exception as problem:
                # An instrument that stops at the first broken provider measures none of the others.
                outcome.status, outcome.reason = "failed", said(problem)
            if outcome.status == "measured":
                self.tell(f"{variant.label}: first step {outcome.first_s:.1f} s")
            else:
                self.steps.pop(variant, None)
                self.tell(f"{variant.label}: {outcome.status}, {outcome.reason}")
        self._truths.clear()

    def _admit(self, variant: Variant, outcome: Outcome) -> tuple[str, str]:
        """Status and reason."""
        entry = provider = None
        if variant.loss is not None:
            entry, provider = ENTRIES[variant.loss], providers()[str(variant.provider)]
            if reason := absent(provider, self.device):
                return "absent", reason
            if variant.loss not in self._truths:
                self._truths[variant.loss] = truth(self.bench, variant, entry)
        step = self.steps[variant] = self.bench.step(variant, entry, provider)
        reason = ""
        with cold_caches(self.device) if variant.provider in COMPILING else nullcontext():
            start = time.perf_counter()
            if variant.loss is None:
                step().item()
            else:
                outcome.error = error(step, self._truths[variant.loss])
                reason = refusal(outcome.error, self.amp)
            outcome.first_s = time.perf_counter() - start
        # What one mode has compiled serves the other: only the first one's time is that of a cold compiler.
        outcome.cold = (variant.loss, variant.provider) not in self._compiled
        self._compiled.add((variant.loss, variant.provider))
        return ("rejected", reason) if reason else ("measured", "")

    def measure(self, rounds: int) -> None:
        """Times what was admitted, then its peak memory. Ctrl-C is raised before the first round is done; later the rest is left out."""
        for variant in list(self.steps):
            self._warm(variant)
        start = time.perf_counter()

        def tell(done: int) -> None:
            left = (time.perf_counter() - start) / done * (rounds - done)
            self.tell(f"round {done} of {rounds}, {left:.0f} s left")

        for variant, times in in_turns(self.steps, self.device, rounds, self.seed + 1, tell).items():
            self.outcomes[variant].times = times
            self.rounds = len(times)
        for variant, step in self.steps.items():
            self._look_back(step, self.outcomes[variant])

    def _warm(self, variant: Variant) -> None:
        try:
            for _ in range(WARMUP_ROUNDS):
                self.steps[variant]()
        except Exception as problem:  # such as too little memory, once the others are there
            outcome = self.outcomes[variant]
            outcome.status, outcome.reason = "failed", said(problem)
            del self.steps[variant]

    def _look_back(self, step: Step, outcome: Outcome) -> None:
        """Peak memory, and whether the losses are still numbers: NaN can take another time than work."""
        totals: list[torch.Tensor] = []
        outcome.peak = peak_bytes(self.device, lambda: totals.append(step()))
        if not totals[-1].isfinite():
            outcome.status, outcome.reason, outcome.times = "failed", "the loss is not finite after the timed steps", []

    def result(self, variant: Variant) -> dict[str, Any]:
        """The variant's part of its record."""
        outcome = self.outcomes[variant]
        times = {v: o.times for v, o in self.outcomes.items() if o.times}
        ms = quantiles(outcome.times) if outcome.times else None
        parts = shares(variant, times) if ms else dict.fromkeys(shares(Variant(None), {}))
        if outcome.status == "measured" and ms is None:
            outcome.status, outcome.reason = Outcome.status, Outcome.reason
        return {
            "variant": variant.name,
            "loss": variant.loss,
            "provider": variant.provider,
            "mode": variant.mode,
            "status": outcome.status,
            "reason": outcome.reason,
            "ms": ms,
            "rounds": len(outcome.times),
            "peak_mb": None if outcome.peak is None or not ms else outcome.peak / 1e6,
            "compile_s": max(0.0, outcome.first_s - ms["p50"] / 1e3) if ms and outcome.cold and variant.provider in COMPILING else None,
            "error": outcome.error,
            "shares": {name: part and part["p50"] for name, part in parts.items()},
            "share_quantiles": parts,
            "ratio_to_student": ratio(times, variant) if ms else None,
            "against": against(times, variant) if ms else {},
        }
