"""Comparing two versions: the rule's error rates, and rounds with sides that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compare.process import WorkerError
from benchmarks.compare.rounds import Result, Side, Wanted, compare, exit_code
from benchmarks.compare.statistics import ALARMS, CONFIDENCE, FIRST, interval, judge, needed
from benchmarks.compare.table import markdown
from benchmarks.compare.worktrees import Tree
from benchmarks.registry import Case

LAST = 20
#: What rounds may look like when the versions are equal: log ratios, symmetric around 0, of any size and shape.
NOISE: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "quiet": lambda random: 0.005 * random.standard_normal(LAST),
    "normal": lambda random: 0.05 * random.standard_normal(LAST),
    "vast": lambda random: 10.0 * random.standard_normal(LAST),
    "heavy": lambda random: 0.05 * random.standard_cauchy(LAST),
    "outliers": lambda random: random.choice([0.005, 0.5], LAST, p=[0.8, 0.2]) * random.standard_normal(LAST),
    "two memory layouts": lambda random: random.choice([0.0, 0.1], (2, LAST)).T @ [1, -1] + 0.001 * random.standard_normal(LAST),
    "restless spells": lambda random: np.exp(0.5 * np.cumsum(random.standard_normal(LAST))) * 0.02 * random.standard_normal(LAST),
}


def final(logs: np.ndarray, threshold: float = 0.03) -> str:
    """The verdict after as many rounds as it takes, as `compare` goes about it."""
    for seen in range(FIRST, LAST + 1):
        verdict = judge(logs[:seen], threshold, LAST).verdict
        if verdict != "undecided":
            return verdict
    return "undecided"


@pytest.mark.parametrize("kind", NOISE)
def test_equal_versions_rarely_raise_an_alarm(kind: str) -> None:
    random = np.random.default_rng(1)
    verdicts = [final(NOISE[kind](random)) for _ in range(2000)]
    assert sum(verdict in ("slower", "faster") for verdict in verdicts) <= ALARMS * len(verdicts)
    if kind == "quiet":
        assert verdicts.count("same") > 0.99 * len(verdicts)


@pytest.mark.parametrize("last", [FIRST, LAST, 60])
def test_coin_tosses_cross_the_boundary_within_the_bound(last: int) -> None:
    """The worst noise there is: every round far beyond the threshold, up as likely as down."""
    random = np.random.default_rng(2)
    heads = np.cumsum(random.integers(0, 2, (200_000, last), dtype=np.int8), axis=1)
    crossed = np.zeros(len(heads), dtype=bool)
    for seen, count in needed(last).items():
        crossed |= (heads[:, seen - 1] >= count) | (heads[:, seen - 1] <= seen - count)
    assert 0.5 * ALARMS < crossed.mean() <= ALARMS
    assert needed(last)[FIRST] == FIRST


@pytest.mark.parametrize("change, noise, least", [(0.10, 0.03, 0.95), (0.05, 0.01, 0.9), (-0.10, 0.03, 0.95), (1.0, 0.3, 0.95)])
def test_real_differences_are_found(change: float, noise: float, least: float) -> None:
    random = np.random.default_rng(3)
    wanted = "slower" if change > 0 else "faster"
    # Student's t with three degrees of freedom: every so often a round is far off.
    verdicts = [final(log(1 + change) + noise / 1.7 * random.standard_t(3, LAST)) for _ in range(200)]
    assert verdicts.count(wanted) >= least * len(verdicts)
    assert verdicts.count("same") == 0


def test_a_difference_beyond_the_threshold_is_hardly_ever_called_same() -> None:
    random = np.random.default_rng(4)
    verdicts = [final(log(1.05) + 0.02 * random.standard_normal(LAST)) for _ in range(300)]
    assert verdicts.count("same") <= 0.02 * len(verdicts)


@pytest.mark.parametrize("rounds", [FIRST, 9, 11, 13, LAST])
def test_the_interval_covers_the_median_as_often_as_it_says(rounds: int) -> None:
    random = np.random.default_rng(5)
    ends = [interval(random.standard_t(3, rounds)) for _ in range(3000)]
    assert CONFIDENCE <= np.mean([low <= 0 <= high for low, high in ends]) < 0.998


def test_the_interval_is_a_function_of_the_numbers() -> None:
    assert interval([0.1] * 8) == pytest.approx((0.1, 0.1))
    assert interval([1.0, 2.0, 3.0]) == interval([3.0, 1.0, 2.0])


def test_a_judgement_says_what_it_saw() -> None:
    found = judge([log(1.5)] * FIRST, 0.03, LAST)
    assert found == (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5), "slower")
    assert judge([log(1.5)] * (FIRST - 1), 0.03, LAST).verdict == "undecided"
    assert judge([0.0] * (FIRST - 1), 0.03, LAST).verdict == "undecided"
    # All intervals beyond the threshold, and still a round too few on that side.
    assert judge([*[log(1.5)] * (FIRST - 1), 0.0], 0.03, LAST).verdict == "undecided"


# --- rounds


Speed = Callable[[dict[str, Any]], float | dict[str, Any]]


class Fake:
    """A worker in this process: `speed` in ms a call, or what it answers instead."""

    def __init__(
        self, speed: Callable[[dict[str, Any]], float | dict[str, Any]], dies: str = "", greeting: dict[str, Any] | None = None
    ) -> None:
        self.speed, self.dies, self.cell = speed, dies, {}
        self.answers: list[dict[str, Any]] = [greeting or {"status": "ready", "provenance": {"seed": 0}}]
        self.closed = False

    def send(self, request: dict[str, Any]) -> None:
        assert not self.closed
        if request["do"] == "open":
            self.cell = request["cell"]
        speed = self.speed(self.cell)
        if request["do"] == self.dies:
            self.answers.append({"dies": True})
        elif isinstance(speed, dict):
            self.answers.append(speed)
        elif request["do"] == "burst":
            self.answers.append({"status": "ready", "ms": [speed] * request["calls"]})
        else:
            self.answers.append({"status": "ready"})

    def receive(self, seconds: float) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if "dies" in answer:
            raise WorkerError("the process died (signal SIGSEGV)")
        return answer

    def close(self) -> None:
        self.closed = True


def cells(*entries: str, control: str = "") -> list[Wanted]:
    return [Wanted(entry, Case(), "backward", "reference", entry == control) for entry in entries]


def run(wanted: list[Wanted], base: Callable[[], Fake], head: Callable[[], Fake], rounds: int = LAST) -> dict[str, Result]:
    made: list[Fake] = []

    def start(make: Callable[[], Fake]) -> Callable[[bool], Fake]:
        return lambda describe: made.append(make()) or made[-1]  # type: ignore[func-returns-value]

    results = compare(wanted, (Side(start(base)), Side(start(head))), 0.03, rounds, lambda number, results: None, pause=0)
    assert all(fake.closed for fake in made)
    return {result.wanted.entry: result for result in results}


def noisy(factor: Callable[[str], float], seed: int, noise: float = 0.01) -> Callable[[], Fake]:
    """Processes that are each a little different, on a machine that slows down steadily."""
    random, slow = np.random.default_rng(seed), [1.0]

    def make() -> Fake:
        process = exp(noise * random.standard_normal())

        def speed(cell: dict[str, Any]) -> float:
            slow[0] *= 1.0001
            return factor(cell["entry"]) * process * slow[0] * exp(noise * random.standard_normal())

        return Fake(speed)

    return make


def test_rounds_tell_slow_from_fast_and_from_equal() -> None:
    factors = {"slow": 1.3, "fast": 0.7, "equal": 1.0}
    results = run(cells(*factors), noisy(lambda entry: 1.0, 1), noisy(factors.__getitem__, 2))
    assert {entry: result.verdict for entry, result in results.items()} == {"slow": "slower", "fast": "faster", "equal": "same"}
    assert results["slow"].judgement is not None and results["slow"].judgement.ratio == pytest.approx(1.3, abs=0.05)
    assert len(results["slow"].logs) == FIRST
    assert exit_code(list(results.values())) == 1
    assert exit_code([results["fast"], results["equal"]]) == 0


def test_equal_versions_under_drift_and_noise_between_processes() -> None:
    names = [f"cell {i}" for i in range(60)]
    found = [result.verdict for result in run(cells(*names), noisy(lambda entry: 1.0, 3, 0.04), noisy(lambda entry: 1.0, 4, 0.04)).values()]
    assert "slower" not in found and "faster" not in found


def test_what_stays_undecided_is_measured_up_to_the_bound_and_no_more() -> None:
    results = run(
        cells("near", "far"), lambda: Fake(lambda cell: 1.0), lambda: Fake(lambda cell: 1.03 if cell["entry"] == "near" else 2.0), 12
    )
    # A ratio of just the threshold is neither beyond nor within it.
    assert results["near"].verdict == "undecided" and len(results["near"].logs) == 12
    assert results["far"].verdict == "slower" and len(results["far"].logs) == FIRST
    assert exit_code([results["near"]]) == 3
    assert exit_code(list(results.values())) == 1


def status(state: str, reason: str = "") -> Callable[[], Fake]:
    return lambda: Fake(lambda cell: {"status": state, "reason": reason})


def fine() -> Fake:
    return Fake(lambda cell: 1.0)


@pytest.mark.parametrize(
    "base, head, verdict, reason, code",
    [
        (fine, status("rejected", "value off by 0.1"), "broken", "value off by 0.1", 1),
        (status("failed", "Boom"), status("rejected", "off"), "broken", "off (base, too: Boom)", 1),
        (status("rejected", "was wrong"), fine, "new", "base: was wrong", 0),
        (status("absent", "no Triton"), fine, "new", "base: no Triton", 0),
        (fine, status("absent", "no Triton"), "removed", "no Triton", 0),
        (status("absent", "no Triton"), status("absent", "no Triton"), "absent", "no Triton", 0),
        (fine, lambda: Fake(lambda cell: 1.0, dies="burst"), "broken", "the process died (signal SIGSEGV)", 1),
        (fine, lambda: Fake(lambda cell: 1.0, dies="open"), "broken", "the process died (signal SIGSEGV)", 1),
        (lambda: Fake(lambda cell: 1.0, dies="open"), fine, "new", "base: the process died (signal SIGSEGV)", 0),
        (fine, lambda: Fake(lambda cell: -1.0), "broken", "times that are none: [-1.0, -1.0]", 1),
        (
            lambda: Fake(lambda cell: 1.0, greeting={"status": "failed", "reason": "No module named 'kdkernels.inline'"}),
            fine,
            "new",
            "base: this version cannot run: No module named 'kdkernels.inline'",
            0,
        ),
        (
            fine,
            lambda: Fake(lambda cell: 1.0, greeting={"status": "failed", "reason": "SyntaxError"}),
            "broken",
            "this version cannot run: SyntaxError",
            1,
        ),
    ],
)
def test_a_cell_that_does_not_run_on_both_sides(
    base: Callable[[], Fake], head: Callable[[], Fake], verdict: str, reason: str, code: int
) -> None:
    results = run(cells("a", "b"), base, head)
    assert [(result.verdict, result.reason, result.logs) for result in results.values()] == [(verdict, reason, [])] * 2
    assert exit_code(list(results.values())) == code


def test_a_crash_costs_one_cell_and_not_those_after_it() -> None:
    def head() -> Fake:
        fake = Fake(lambda cell: 1.0)
        fake.speed = lambda cell: setattr(fake, "dies", "burst" if cell.get("entry") == "bad" else "") or 1.0  # type: ignore[func-returns-value]
        return fake

    results = run(cells("good", "bad", "last"), fine, head)
    assert {entry: result.verdict for entry, result in results.items()} == {"good": "same", "bad": "broken", "last": "same"}


def test_a_base_that_fails_in_a_later_round_costs_that_round_only() -> None:
    count = iter(range(100))

    def base() -> Fake:
        return Fake(lambda cell: 1.0, dies="open" if next(count) == 3 else "")

    result = run(cells("a"), base, fine)["a"]
    assert result.verdict == "same" and len(result.logs) == FIRST
    assert result.reason == "base, in one round: the process died (signal SIGSEGV)"


def test_a_control_that_differs_makes_everything_doubtful() -> None:
    results = run(cells("a", "eager", control="eager"), fine, lambda: Fake(lambda cell: 2.0 if cell["entry"] == "eager" else 1.0))
    assert results["a"].verdict == "same" and results["eager"].verdict == "slower"
    assert exit_code(list(results.values())) == 3
    trees = [Tree(name, "0" * 40, False, Path(name)) for name in ("main", "topic")]
    assert "**A control differs**" in markdown(list(results.values()), *trees, {}, 0.03)


def test_the_table_puts_first_what_needs_a_look_and_gives_every_reason() -> None:
    def head() -> Fake:
        times = {
            "same": 1.0,
            "slow": 2.0,
            "bad": {"status": "rejected", "reason": "a | b\nsecond line"},
            "gone": {"status": "absent", "reason": "x"},
        }
        return Fake(lambda cell: times[cell["entry"]] if cell else 1.0)  # type: ignore[return-value]

    def base() -> Fake:
        return Fake(lambda cell: {"status": "absent", "reason": "no library"} if cell.get("entry") == "gone" else 1.0)

    results = list(run(cells("same", "gone", "slow", "bad"), base, head).values())
    trees = [Tree("main", "a" * 40, False, Path("a")), Tree(".", "b" * 40, True, Path("b"), "the native library could not be built: boom")]
    machine = {"device": "cpu", "cpu": "A CPU", "threads": 2, "versions": {"torch": "2.11"}}
    text = markdown(results, trees[0], trees[1], machine, 0.03)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|") == rows[4].count("|") == 11
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["**broken**", "**slower**", "same"]
    assert "bbbbbbbbbb with changes against main (aaaaaaaaaa): 1 broken, 1 slower, 1 same" in text.splitlines()[0]
    assert "2.000 to 2.000" in text and "a | b second line" in text
    assert "absent from both: reference (x)" in text and "boom" in text and "A CPU, 2 threads" in text
