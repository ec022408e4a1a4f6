"""Candidates against the heuristic, in turns: who is wrong is out, the fastest of a short look meet the heuristic again, and one wins only
by the rule of `bench compare`: with near certainty faster by more than the threshold, and so in nearly all rounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from kdkernels.triton import launch

from ..compare.statistics import Judgement, judge
from ..measure.agreement import agree
from ..measure.cell import said
from ..measure.poison import spoil
from .calls import Call, Inputs

#: A candidate must take this much less of the heuristic's time, and none of its calls as much more.
THRESHOLD = 0.02
#: Rounds of the first look, how many of it go on, and calls of a kind in a round.
LOOK, FINALISTS, BURST = 3, 3, 5
#: Relative error of fp32 sums in another order.
TOLERANCE = 1e-5

#: Milliseconds of each call, in order: `Clock.measure`.
Measure = Callable[[Sequence[Callable[[], Any]]], list[float]]
Changes = Mapping[str, int]
#: Call -> milliseconds, the median of each round.
Times = dict[str, list[float]]
#: Of the heuristic's parameters: none.
NONE: Changes = {}


class Outcome(NamedTuple):
    """heuristic: its parameters;   parameters: the winner's, None if the heuristic stays

    heuristic_ms, ms: call -> median of the decisive rounds, of the heuristic and of the winner
    judgement:  of the winner's time over the heuristic's, or of who came closest; None if nobody looked faster
    rounds:     that were decisive;   candidates: how many were timed;   dropped: parameters -> why they were not
    """

    heuristic: dict[str, int]
    parameters: dict[str, int] | None
    heuristic_ms: dict[str, float]
    ms: dict[str, float] | None
    judgement: Judgement | None
    rounds: int
    candidates: int
    dropped: dict[str, str]


class Contest:
    """One kernel on samples of one type, layout and size; all take turns on the same samples, so that nobody finds them in the cache."""

    def __init__(self, kernel: str, calls: Mapping[str, Call], samples: Sequence[Inputs], measure: Measure, seed: int = 0) -> None:
        self.kernel, self.calls, self.samples, self.measure = kernel, calls, samples, measure
        self._turn = 0
        self._order = random.Random(seed)

    def run(self, candidates: Sequence[Changes], rounds: int) -> Outcome:
        """rounds: the most of the decision, `compare.statistics.FIRST` or more."""
        usual = self.heuristic()
        entered: list[Changes] = []
        dropped: dict[str, str] = {}
        for changes in candidates:
            if {**usual, **changes} == usual:
                continue
            if reason := self.wrong(changes):
                dropped[text(changes)] = reason
            else:
                entered.append(changes)
        first, *others = self._look(entered)
        distance = [median(logs(first, times)) for times in others]
        ranked = sorted(range(len(entered)), key=lambda k: distance[k])
        finalists = [entered[k] for k in ranked[:FINALISTS] if distance[k] < 0]
        if not finalists:
            return Outcome(usual, None, medians(first), None, None, 0, len(entered), dropped)
        first, others, judgements = self._decide(finalists, rounds)
        order = sorted(range(len(finalists)), key=lambda k: judgements[k].ratio)
        won = next((k for k in order if judgements[k].verdict == "faster" and not slows(first, others[k])), None)
        chosen = None if won is None else {**usual, **finalists[won]}
        ms = None if won is None else medians(others[won])
        told = judgements[order[0] if won is None else won]
        return Outcome(usual, chosen, medians(first), ms, told, count(first), len(entered), dropped)

    def heuristic(self) -> dict[str, int]:
        """The parameters that the kernel has without a table."""
        with launch.override(self.kernel, NONE) as used:
            next(iter(self.calls.values()))(self.samples[0])
        return dict(used)

    def wrong(self, changes: Changes) -> str:
        """Why these parameters cannot take part, "" if they can: an exception, or results that are not the heuristic's."""
        for name, call in self.calls.items():
            with launch.override(self.kernel, NONE):
                want = call(self.samples[0])
            spoil(want)
            try:
                with launch.override(self.kernel, changes):
                    got = call(self.samples[0])
            except Exception as error:  # such as more shared memory than there is
                return f"{name}: {said(error)}"
            for x, y in zip(got, want, strict=True):
                # Results of 16 bits may be rounded the other way.
                found = agree(x, y.double(), max(TOLERANCE, torch.finfo(y.dtype).eps / 8))
                if found.reason:
                    return f"{name}: not what the heuristic gives: {found.reason}"
        return ""

    def _look(self, entered: Sequence[Changes]) -> list[Times]:
        """Times of a few rounds, the heuristic's first."""
        times = self._none(entered)
        for _ in range(LOOK if entered else 1):
            self._round([NONE, *entered], times)
        return times

    def _decide(self, finalists: Sequence[Changes], rounds: int) -> tuple[Times, list[Times], list[Judgement]]:
        """Rounds until everybody has a verdict, `rounds` at the most: times of the heuristic and of all, and the verdicts."""
        times = self._none(finalists)
        verdicts = [""] * len(finalists)
        judgements: list[Judgement] = []
        for _ in range(rounds):
            self._round([NONE, *finalists], times)
            judgements = [judge(logs(times[0], of), THRESHOLD, rounds) for of in times[1:]]
            # As it was when it was first reached: the rule counts the looks.
            verdicts = [old or ("" if new.verdict == "undecided" else new.verdict) for old, new in zip(verdicts, judgements, strict=True)]
            if all(verdicts):
                break
        return times[0], times[1:], [j._replace(verdict=v or "undecided") for j, v in zip(judgements, verdicts, strict=True)]

    def _none(self, entered: Sequence[Changes]) -> list[Times]:
        """No times of the heuristic and of all who entered, once the device is warm."""
        self._round([NONE, *entered], [{name: [] for name in self.calls} for _ in range(len(entered) + 1)])
        return [{name: [] for name in self.calls} for _ in range(len(entered) + 1)]

    def _round(self, entered: Sequence[Changes], times: Sequence[Times]) -> None:
        """A burst of every call of each, in random order."""
        for k in self._order.sample(range(len(entered)), len(entered)):
            with launch.override(self.kernel, entered[k]):
                ms = self.measure([partial(call, self._next()) for call in self.calls.values() for _ in range(BURST)])
            for place, name in enumerate(self.calls):
                times[k][name].append(median(ms[place * BURST : (place + 1) * BURST]))

    def _next(self) -> Inputs:
        self._turn = (self._turn + 1) % len(self.samples)
        return self.samples[self._turn]


def logs(heuristic: Times, times: Times) -> list[float]:
    """Logarithm of time over the heuristic's, one a round, mean over the calls: each call counts alike."""
    ratios = [[log(b / a) for a, b in zip(heuristic[name], ms, strict=True)] for name, ms in times.items()]
    return [fmean(of_round) for of_round in zip(*ratios, strict=True)]


def slows(heuristic: Times, times: Times) -> bool:
    """Whether a single call takes more of the heuristic's time than the threshold allows."""
    return any(median(b / a for a, b in zip(heuristic[name], ms, strict=True)) >= 1 + THRESHOLD for name, ms in times.items())


def count(times: Times) -> int:
    """Rounds."""
    return len(next(iter(times.values())))


def medians(times: Times) -> dict[str, float]:
    return {name: median(ms) for name, ms in times.items()}


def text(parameters: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())
