"""Rounds of measurement: a fresh pair of processes each, taking turns cell by cell, until every cell has its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, log
from statistics import median
from typing import Any, Protocol

from ..registry import Case
from . import statistics
from .process import WorkerError
from .statistics import Judgement, judge

#: Who is first in each pair of turns: what drifts steadily through the turns favours nobody.
TURNS = ((0, 1), (1, 0), (0, 1), (1, 0))
TURN_MS = 100.0
MOST_CALLS = 200
#: Between turns, until the threads of the one that has just worked no longer spin.
PAUSE = 0.02
#: For importing and compiling, and for one turn.
OPEN_SECONDS, TURN_SECONDS = 600.0, 300.0
FAILURES = ("slower", "broken")


class Process(Protocol):
    """What `process.Worker` offers."""

    def send(self, request: dict[str, Any]) -> None: ...
    def receive(self, seconds: float) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """What is compared: one provider of one entry, on one case in one mode. `control`: the code measured is the same in both versions."""

    entry: str
    case: Case
    mode: str
    provider: str
    control: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"entry": self.entry, "case": self.case.as_dict(), "mode": self.mode, "provider": self.provider}

    @property
    def name(self) -> str:
        return f"{self.entry} {self.mode} by {self.provider} on {self.case.name}"


@dataclass
class Result:
    """Of one cell.

    ms:      (base, head) of each measured round, medians
    logs:    log(head / base) of each measured round, from pairs of turns
    verdict: "" while it is open, else slower, faster, same, undecided (the most rounds are over), broken (head fails), new (only base
             fails), removed (the provider ran in base and is absent in head), absent (from both)
    reason:  why, where numbers do not say it; also why a round gave no ratio
    """

    wanted: Wanted
    ms: list[tuple[float, float]] = field(default_factory=list)
    logs: list[float] = field(default_factory=list)
    judgement: Judgement | None = None
    verdict: str = ""
    reason: str = ""


class Side:
    """One version's process of the present round; a new one takes over where one has died.

    `start` makes a process; it is told whether the process is to say its provenance, which takes a while and stays the same.
    """

    def __init__(self, start: Callable[[bool], Process]) -> None:
        self._start = start
        self._process: Process | None = None
        self._greeted = False
        self.unable = ""  # why this version cannot run at all
        self.provenance: dict[str, Any] = {}

    def start(self) -> None:
        if self._process is None and not self.unable:
            self._process, self._greeted = self._start(not self.provenance), False

    def stop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def send(self, request: dict[str, Any]) -> None:
        self.start()
        if self._process is not None:
            self._process.send(request)

    def receive(self, seconds: float) -> dict[str, Any]:
        """The answer; a process that dies, hangs or talks nonsense is one with status "failed"."""
        if self._process is None:
            return {"status": "failed", "reason": self.unable}
        try:
            if not self._greeted:
                greeting = self._process.receive(OPEN_SECONDS)
                if greeting["status"] != "ready":
                    self.unable = f"this version cannot run: {greeting.get('reason', '')}"
                    self.stop()
                    return {"status": "failed", "reason": self.unable}
                self._greeted = True
                self.provenance = self.provenance or greeting["provenance"]
            return self._process.receive(seconds)
        except WorkerError as error:
            self.stop()
            return {"status": "failed", "reason": str(error)}

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        self.send(request)
        return self.receive(seconds)


class TurnFailed(RuntimeError):
    """A side could not finish a turn."""

    def __init__(self, side: int, reason: str) -> None:
        super().__init__(reason)
        self.side = side


def compare(
    wanted: Sequence[Wanted],
    sides: tuple[Side, Side],
    threshold: float,
    rounds: int,
    tell: Callable[[int, list[Result]], None],
    pause: float = PAUSE,
) -> list[Result]:
    """Measures (base, head) until every cell has a verdict, at most `rounds` rounds; `tell` hears of each round. Ends its processes."""
    results = [Result(cell) for cell in wanted]
    try:
        for number in range(1, rounds + 1):
            left = [result for result in results if not result.verdict]
            if not left:
                break
            # Who starts first changes, as does who has the first turn.
            order = (0, 1) if number % 2 else (1, 0)
            for side in order:
                sides[side].start()
            for result in left:
                _round(result, sides, order, pause)
                if len(result.logs) >= statistics.FIRST and not result.verdict:
                    result.judgement = judge(result.logs, threshold, rounds)
                    result.verdict = "" if result.judgement.verdict == "undecided" else result.judgement.verdict
            for side in order:
                sides[side].stop()
            tell(number, results)
    finally:
        for side in (0, 1):
            sides[side].stop()
    for result in results:
        if result.logs and result.judgement is None:
            result.judgement = judge(result.logs, threshold, rounds)
        result.verdict = result.verdict or "undecided"
    return results


def exit_code(results: Sequence[Result]) -> int:
    """0: nothing is slower or broken; 1: something is; 3: something is undecided, or a control differs and so nothing can be believed."""
    kernels = [result for result in results if not result.wanted.control]
    if any(result.verdict in FAILURES for result in kernels) or any(result.verdict == "broken" for result in results):
        return 1
    doubtful = any(result.verdict == "undecided" for result in kernels)
    return 3 if doubtful or any(result.verdict in ("slower", "faster") for result in results if result.wanted.control) else 0


def _round(result: Result, sides: tuple[Side, Side], order: tuple[int, int], pause: float) -> None:
    """Adds one ratio to `result`, or settles it without."""
    request = {"do": "open", "cell": result.wanted.as_dict(), "verify": not result.logs}
    for place in order:
        sides[place].send(request)
    opened = [side.receive(OPEN_SECONDS) for side in sides]
    states = [answer["status"] for answer in opened]
    reasons = [str(answer.get("reason", "")) for answer in opened]
    if states != ["ready", "ready"]:
        _settle(result, states, reasons)
    else:
        try:
            _take_turns(result, sides, order, pause)
        except TurnFailed as failure:
            states[failure.side], reasons[failure.side] = "failed", str(failure)
            _settle(result, states, reasons)
    for side, state in zip(sides, states, strict=True):
        if state == "ready":
            side.ask({"do": "close"}, TURN_SECONDS)


def _settle(result: Result, states: list[str], reasons: list[str]) -> None:
    """What a cell is that does not run on both sides."""
    (base, head), (base_reason, head_reason) = states, reasons
    if head in ("rejected", "failed"):
        result.verdict, result.reason = "broken", head_reason if base == "ready" else f"{head_reason} (base, too: {base_reason})"
    elif head == "absent":
        result.verdict, result.reason = "removed" if base == "ready" else "absent", head_reason
    elif result.logs:
        # Base has run before: a round without a ratio, not a cell that base lacks.
        result.reason = f"base, in one round: {base_reason}"
    else:
        result.verdict, result.reason = "new", f"base: {base_reason}"


def _take_turns(result: Result, sides: tuple[Side, Side], order: tuple[int, int], pause: float) -> None:
    def turn(side: int, calls: int) -> float:
        time.sleep(pause)
        # The first call of a turn wakes threads and refills caches.
        answer = sides[side].ask({"do": "burst", "calls": calls + 1}, TURN_SECONDS)
        if answer["status"] != "ready":
            raise TurnFailed(side, str(answer.get("reason", "")))
        times = answer.get("ms", [])
        if len(times) != calls + 1 or not all(0 < ms < inf for ms in times):
            raise TurnFailed(side, f"times that are none: {times!r:.200}")
        return median(times[1:])

    slowest = max(turn(side, 1) for side in order)
    calls = max(1, min(MOST_CALLS, round(TURN_MS / max(slowest, 1e-6))))
    for side in order:
        turn(side, calls)  # warm-up
    logs: list[float] = []
    ms: tuple[list[float], list[float]] = ([], [])
    for pair in TURNS:
        times = [0.0, 0.0]
        for place in pair:
            side = order[place]
            times[side] = turn(side, calls)
            ms[side].append(times[side])
        logs.append(log(times[1] / times[0]))
    result.ms.append((median(ms[0]), median(ms[1])))
    result.logs.append(median(logs))
