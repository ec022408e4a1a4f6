"""One entry, case and mode: inputs that no cache holds, providers that passed the gate, and their times."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call import Call, Sample, bind
from ..providers import Provider
from ..registry import Case, Entry, Function
from .bandwidth import Copy
from .clock import Clock, quantiles
from .cold import cold_caches
from .gate import Checked, fingerprint, gate, recheck
from .memory import peak_bytes, resident_bytes
from .profile import host_times, launches, runs_compiled
from .samples import MOST_SAMPLES, nbytes, samples

#: Milliseconds of so many calls.
Burst = Callable[[int], list[float]]
#: Their first call compiles.
COMPILING = ("compile", "compile-max", "triton")
#: A provider's time is spread over so many bursts, and nobody is judged by fewer calls than `LEAST_CALLS`.
ROUNDS, LEAST_CALLS = 10, 5
#: A round has so many copies.
COPIES = 3
#: A capture takes tens of milliseconds.
MOST_GRAPHS = 32


@dataclass
class Attempt:
    """What became of a provider.

    status:  "measured" (admitted), "rejected" (by the gate) or "failed" (an exception)
    compile: seconds of the first call with cold caches, in this mode or an earlier one; None for providers that compile nothing
    """

    provider: Provider
    call: Call
    status: str
    checked: Checked
    compile: float | None = None
    ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)


class Functions:
    """The providers' functions of one entry and case, shared by its modes: what is compiled is compiled once without gradient and once
    with, not once a mode.

    New ones make torch.compile forget those before: a function is compiled only so many times before torch gives up and runs it eagerly.
    """

    def __init__(self, entry: Entry) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        self.entry = entry
        #: (provider, with gradient) -> seconds of the first call with cold caches.
        self.compile: dict[tuple[str, bool], float] = {}
        self._made: dict[str, Function] = {}

    def of(self, provider: Provider) -> Function:
        if provider.name not in self._made:
            self._made[provider.name] = provider.function(self.entry)
        return self._made[provider.name]


class Cell:
    """One entry, case and mode: samples rotated past three times the last-level cache, admitted providers.

    A process works on one cell at a time. `functions`: those of the entry's and case's other modes; made here when None. `copy_ms`: of
    the copies that took their turns when the providers were timed.
    """

    def __init__(
        self, entry: Entry, case: Case, mode: str, device: torch.device, seed: int = 0, functions: Functions | None = None
    ) -> None:
        self.functions = Functions(entry) if functions is None else functions
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.entry, self.case, self.mode, self.device, self.seed = entry, case, mode, device, seed
        self.clock = Clock(device)
        self.attempts: dict[str, Attempt] = {}
        self.samples = samples(entry, case, mode, device, seed)
        self.copy_ms: list[float] = []
        self._rotation = 0
        self._order = random.Random(seed)

    @property
    def sample_bytes(self) -> int:
        """Bytes of the inputs of one call."""
        return nbytes(self.samples[0])

    @property
    def admitted(self) -> list[str]:
        return [name for name, attempt in self.attempts.items() if attempt.status == "measured"]

    def admit(self, provider: Provider) -> Checked:
        """Takes the time of a first call and lets the gate decide. Never raises on behalf of the provider: its exception is the reason."""
        own = provider.backend is not None
        attempt = self.attempts[provider.name] = Attempt(provider, lambda _: [], "failed", Checked("", None, None))
        try:
            attempt.call = bind(self.entry, self.functions.of(provider), self.mode, own)
            with provider.active():
                attempt.compile = self._first_call(provider.name, attempt.call)
        except Exception as error:
            attempt.checked = Checked(said(error), None, None)
            return attempt.checked
        with provider.active():
            attempt.checked = gate(self.entry, self.mode, self.case.dtype, attempt.call, self.samples[0], self.device, self.seed)
            attempt.status = "rejected" if attempt.checked.reason else "measured"
            self._check_compiled(attempt)
        return attempt.checked

    def burst(self, name: str, calls: int) -> list[float]:
        """Milliseconds of some calls of an admitted provider, each on the next sample."""
        attempt = self.attempts[name]
        with attempt.provider.active():
            return self.clock.measure([partial(attempt.call, self._next()) for _ in range(calls)])

    def time(self, seconds: float, copy: Copy | None = None) -> dict[str, list[float]]:
        """Milliseconds of each admitted provider: in every round a burst of each, in random order, and some of `copy`, until each had
        `seconds`; then the same for CUDA graphs of the calls. A provider that raises, or is not what it was when it was admitted, loses
        its times."""
        before = self.contents()
        self._rounds({name: partial(self.burst, name) for name in self.admitted}, seconds, lambda attempt: attempt.ms, copy)
        graphs = {name: replays for name in self.admitted if (replays := self._graphs(name))}
        replay = {name: partial(self._replay, replays) for name, replays in graphs.items()}
        self._rounds(replay, seconds / 2, lambda attempt: attempt.graph_ms)
        del graphs, replay
        self.recheck(before)
        return {name: self.attempts[name].ms for name in self.admitted}

    def contents(self) -> list[Any]:
        """What the samples hold, to be compared with what they hold later; the last thing before providers are timed."""
        gc.collect()
        return [fingerprint(s) for s in self.samples]

    def warm(self, name: str, seconds: float) -> float:
        """Runs an admitted provider for `seconds`, once at least; seconds that a call takes with all that surrounds it."""
        return self._warm(name, partial(self.burst, name), seconds)

    def turn(self, name: str, calls: int) -> list[float]:
        """Milliseconds of a burst, kept for the provider's figures; [] when it raises, which costs it its times."""
        ms = self._guarded(name, partial(self.burst, name), calls)
        self.attempts[name].ms += ms
        return ms

    def recheck(self, before: list[Any]) -> None:
        """After the timing: who touched the inputs (`before`: `contents` then), or is not what it was, loses its times."""
        touched = [fingerprint(s) for s in self.samples] != before
        for name in self.admitted:
            self._recheck(self.attempts[name], touched)

    def figures(self, name: str) -> dict[str, Any]:
        """What a record says of a provider, whatever became of it; times only if it was timed."""
        attempt = self.attempts[name]
        figures: dict[str, Any] = {
            "status": attempt.status,
            "reason": attempt.checked.reason,
            "error": {"value": attempt.checked.value, "gradient": attempt.checked.gradient},
            "compile_s": attempt.compile,
            "calls": len(attempt.ms),
            "rotated_bytes": self.sample_bytes * len(self.samples),
        }
        if attempt.status == "measured" and attempt.ms:
            figures["ms"] = quantiles(attempt.ms)
            figures["graph_ms"] = quantiles(attempt.graph_ms) if attempt.graph_ms else None
            with attempt.provider.active():
                call = partial(attempt.call, self._next())
                figures["peak_bytes"] = peak_bytes(self.device, call)
                figures["resident_bytes"] = resident_bytes(self.device, call)
                figures["host_us"], figures["wall_ms"] = host_times(self.device, call, LEAST_CALLS)
                # Last: a profiler that was attached once may slow what is enqueued after it.
                figures["launches"] = launches(self.device, call)
        return figures

    def _rounds(
        self,
        bursts: Mapping[str, Burst],
        seconds: float,
        times: Callable[[Attempt], list[float]],
        copy: Copy | None = None,
    ) -> None:
        """Warms each for a quarter of `seconds`, then bursts in rounds of random order."""
        one = {name: self._warm(name, burst, seconds / 4) for name, burst in bursts.items()}
        left = dict.fromkeys(one, seconds)
        while running := [name for name in left if self.attempts[name].status == "measured" and self._unfinished(name, left, times)]:
            self._order.shuffle(running)
            if copy is not None:
                self.copy_ms += copy.measure(COPIES)
            for name in running:
                calls = max(1, min(MOST_SAMPLES, int(seconds / ROUNDS / one[name])))
                start = time.perf_counter()
                times(self.attempts[name]).extend(self._guarded(name, bursts[name], calls))
                left[name] -= time.perf_counter() - start

    def _unfinished(self, name: str, left: dict[str, float], times: Callable[[Attempt], list[float]]) -> bool:
        return left[name] > 0 or len(times(self.attempts[name])) < LEAST_CALLS

    def _warm(self, name: str, burst: Burst, seconds: float) -> float:
        """Runs for `seconds`, once at least; seconds that a call takes with all that surrounds it."""
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < seconds:
            if not self._guarded(name, burst, 1):
                break
            calls += 1
        return (time.perf_counter() - start) / max(1, calls)

    def _guarded(self, name: str, burst: Burst, calls: int) -> list[float]:
        """The burst; [] and a failed provider when it raises."""
        try:
            return burst(calls)
        except Exception as error:
            attempt = self.attempts[name]
            attempt.status, attempt.checked = "failed", attempt.checked._replace(reason=f"while it was timed: {said(error)}")
            return []

    def _recheck(self, attempt: Attempt, touched: bool) -> None:
        reason = "the inputs changed while the providers of this cell were timed; who did it is not known" if touched else ""
        with attempt.provider.active():
            try:
                if not touched:
                    after = recheck(self.entry, self.mode, self.case.dtype, attempt.call, self.samples, self.device)
                    reason = after.reason and f"after it was timed: {after.reason}"
            except Exception as error:  # such as too little memory for the oracle: what others have measured stays
                reason = f"it could not be checked after it was timed: {said(error)}"
            if reason:
                attempt.status, attempt.checked = "rejected", attempt.checked._replace(reason=reason)
            self._check_compiled(attempt)

    def _check_compiled(self, attempt: Attempt) -> None:
        """torch.compile that runs eagerly is not to be sold as torch.compile."""
        if attempt.status != "measured" or not attempt.provider.name.startswith("compile"):
            return
        if not runs_compiled(partial(attempt.call, self._next())):
            attempt.status, attempt.checked = "rejected", attempt.checked._replace(reason="torch.compile runs all of it eagerly")

    def _graphs(self, name: str) -> list[Callable[[], None]]:
        """A graph of the provider's call for every sample, `MOST_GRAPHS` at the most; [] where it cannot be captured, or where a replay
        does not compute what the call does: what the host works out stays as it was at the capture."""
        replays: list[Callable[[], None]] = []
        attempt = self.attempts[name]
        with attempt.provider.active():
            for s in self.samples[:MOST_GRAPHS]:
                graph = self.clock.graph(partial(attempt.call, s))
                if graph is None or (not replays and not self._replays_right(s, *graph)):
                    return []
                replays.append(graph[0])
        return replays

    def _replays_right(self, s: Sample, replay: Callable[[], None], results: Sequence[Tensor]) -> bool:
        def call(_: Sample) -> list[Tensor]:
            replay()
            return [x.clone() for x in results]

        return recheck(self.entry, self.mode, self.case.dtype, call, [s], self.device).reason == ""

    def _replay(self, replays: Sequence[Callable[[], None]], calls: int) -> list[float]:
        return self.clock.measure([replays[self._turn() % len(replays)] for _ in range(calls)])

    def _next(self) -> Sample:
        return self.samples[self._turn()]

    def _turn(self) -> int:
        """All providers share one rotation: nobody finds in the cache what another one has just read."""
        self._rotation = (self._rotation + 1) % len(self.samples)
        return self._rotation

    def _first_call(self, name: str, call: Call) -> float | None:
        """Compiles what has to be compiled; the seconds that it took in the first mode that needed it."""
        key = (name, self.mode != "forward")
        if name not in COMPILING or key in self.functions.compile:
            self._seconds(call)
        else:
            with cold_caches(self.device):
                self.functions.compile[key] = self._seconds(call)
        return self.functions.compile.get(key)

    def _seconds(self, call: Call) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call(self.samples[0])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def said(error: BaseException) -> str:
    """Type and first line of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
