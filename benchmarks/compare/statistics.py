"""From paired ratios to a verdict.

A round gives one number a cell: the logarithm of head's time over base's. Rounds are independent, because each has fresh processes, and
without a difference between the versions a round is as likely above 1 as below, whatever the noise looks like. An alarm ("slower" or
"faster") therefore needs two things:

- the bootstrap interval of the median ratio lies wholly beyond the threshold, and
- so many single rounds do that fair coin tosses would get there, at any of the looks together, in less than `ALARMS` of all comparisons.

The second is what makes the first one honest: with few rounds a percentile bootstrap of a median is too narrow, and looking again after
every round gives chance many tries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from typing import NamedTuple

import numpy as np

#: Rounds before the first verdict: with fewer, even all of them on one side are no rare chance.
FIRST = 8
#: Share of comparisons of equal versions that may end in an alarm, both directions together, all looks together.
ALARMS = 0.01
#: How often the interval covers the true median, at the least.
CONFIDENCE = 0.95
#: Share of the resampled medians that takes: of few rounds, the middle 95 % cover it in as little as 91 % of cases.
INSIDE = 0.99
RESAMPLES = 20_000


class Judgement(NamedTuple):
    """ratio: median of head / base; low, high: its bootstrap interval; verdict: "slower", "faster", "same" or "undecided"."""

    ratio: float
    low: float
    high: float
    verdict: str


def judge(logs: Sequence[float], threshold: float, rounds: int) -> Judgement:
    """The verdict after these log ratios, one a round, where `rounds` is the most there may be; `threshold`: 0.03 for 3 %."""
    low, high = interval(logs)
    up, down = log(1 + threshold), log(1 - threshold)
    enough = needed(rounds).get(len(logs), len(logs) + 1)
    verdict = "undecided"
    if low > up and sum(x > up for x in logs) >= enough:
        verdict = "slower"
    elif high < down and sum(x < down for x in logs) >= enough:
        verdict = "faster"
    elif down < low and high < up and len(logs) >= FIRST:
        verdict = "same"
    return Judgement(exp(float(np.median(logs))), exp(low), exp(high), verdict)


def interval(logs: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of the median that covers it with `CONFIDENCE`; the same numbers give the same interval."""
    lower, upper, weights = _medians(len(logs))
    ranked = np.sort(np.asarray(logs, dtype=float))
    medians = (ranked[lower] + ranked[upper]) / 2
    order = np.argsort(medians)
    ends = np.searchsorted(np.cumsum(weights[order]), [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    low, high = medians[order[ends]]
    return float(low), float(high)


@lru_cache(maxsize=64)
def _medians(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which two ranks are in the middle of a resample, and how often: that depends on the number of rounds alone, not on their values."""
    draws = np.sort(np.random.default_rng(0).integers(0, size, (RESAMPLES, size)), axis=1)
    middle, counts = np.unique(draws[:, [(size - 1) // 2, size // 2]], axis=0, return_counts=True)
    return middle[:, 0], middle[:, 1], counts / RESAMPLES


@lru_cache(maxsize=8)
def needed(last: int) -> dict[int, int]:
    """Rounds seen -> how many must lie beyond the threshold on one side, from `FIRST` to `last`. Looks without an entry raise no alarm.

    A walk of fair coin tosses crosses this boundary with a probability of at most ALARMS / 2. The first look may spend what it takes that
    all of its rounds suffice; the rest is spent evenly over the later ones, for small differences that need more rounds.
    """
    first = 2.0**-FIRST
    alive, spent, boundary = {0: 1.0}, 0.0, {}
    for seen in range(1, last + 1):
        tossed: dict[int, float] = {}
        for count, probability in alive.items():
            for heads in (count, count + 1):
                tossed[heads] = tossed.get(heads, 0.0) + probability / 2
        alive = tossed
        if seen < FIRST:
            continue
        allowed = first + (ALARMS / 2 - first) * (seen - FIRST) / max(1, last - FIRST)
        for count in sorted(alive, reverse=True):
            if spent + alive[count] > allowed:
                break
            spent += alive.pop(count)
            boundary[seen] = count
    return boundary
