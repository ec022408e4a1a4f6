"""Two backends of one primitive in turns: only who is right gets a time, and every call is on inputs that no cache holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import log
from statistics import median
from typing import NamedTuple

from ..compare.statistics import FIRST, Judgement, judge
from ..measure.cell import Cell
from ..providers import Provider

#: What makes a difference that is worth a verdict. The smaller time decides without one.
THRESHOLD = 0.02
#: Calls of each in a round, and seconds before the first.
BURST, WARM = 5, 0.25


class Outcome(NamedTuple):
    """ms: name -> median of the rounds;   judgement: of the second's time over the first's;   rounds: how many"""

    ms: dict[str, float]
    judgement: Judgement
    rounds: int


def contest(cell: Cell, first: Provider, second: Provider, rounds: int, seed: int = 0) -> Outcome:
    """Rounds until there is a verdict, `rounds` at the most. Raises RuntimeError where one of the two is wrong, or raises itself."""
    pair = [first.name, second.name]
    for provider in (first, second):
        cell.admit(provider)
    _check(cell, pair)
    before = cell.contents()
    for name in pair:
        cell.warm(name, WARM)
    order, ms = random.Random(seed), {name: list[float]() for name in pair}
    for number in range(1, rounds + 1):
        for name in order.sample(pair, 2):
            burst = cell.turn(name, BURST)
            _check(cell, pair)
            ms[name].append(median(burst))
        if number >= FIRST:
            logs = [log(b / a) for a, b in zip(*ms.values(), strict=True)]
            found = judge(logs, THRESHOLD, rounds)
            if found.verdict != "undecided":
                break
    cell.recheck(before)
    _check(cell, pair)
    return Outcome({name: median(of) for name, of in ms.items()}, found, number)


def _check(cell: Cell, names: Sequence[str]) -> None:
    wrong = [f"{name}: {cell.attempts[name].checked.reason}" for name in names if name not in cell.admitted]
    if wrong:
        raise RuntimeError("; ".join(wrong))
