"""Comparing two versions: the rule's error rates, rounds with sides that misbehave, processes and checkouts that leave nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cli
from benchmarks.compare import statistics
from benchmarks.compare.process import Worker, WorkerError
from benchmarks.compare.rounds import Result, Side, Wanted, compare, exit_code
from benchmarks.compare.selection import add_selection, select
from benchmarks.compare.statistics import ALARMS, CONFIDENCE, FIRST, interval, judge, needed
from benchmarks.compare.table import markdown
from benchmarks.compare.worktrees import RevisionError, Tree, checkouts, repository
from benchmarks.registry import ENTRIES, Case

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


# --- processes


def worker(tmp_path: Path, code: str) -> Worker:
    return Worker([sys.executable, "-c", code], tmp_path / "log")


@pytest.mark.parametrize(
    "code, said",
    [
        ("import sys; sys.exit('some reason')", r"died \(exit code 1\): some reason"),
        ("import os; os.kill(os.getpid(), 11)", r"died \(signal SIGSEGV\)"),
        ("print('Compiling ...', flush=True); input()", "an answer that is none: 'Compiling ...'"),
        ("print('[1]', flush=True); input()", r"an answer that is none: '\[1\]'"),
        ("import time; time.sleep(60)", r"no answer within 0\.5 s"),
    ],
)
def test_a_worker_that_misbehaves_is_told_of_and_ended(tmp_path: Path, code: str, said: str) -> None:
    process = worker(tmp_path, code)
    with pytest.raises(WorkerError, match=said):
        process.receive(0.5 if "sleep" in code else 20)
    assert process._process.poll() is not None


def test_closing_a_worker_ends_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, json; p = subprocess.Popen(['sleep', '60']); print(json.dumps({'status': p.pid}), flush=True); input()"
    process = worker(tmp_path, code)
    child = process.receive(20)["status"]
    process.close()
    process.close()
    for _ in range(100):
        # A child whose parent is gone may wait for init to collect it.
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the worker's child lives on")


# --- checkouts


def git(top: Path, *words: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(top), *identity, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A repository with two commits and a dirty tree."""
    top = tmp_path / "repository"
    (top / "kdkernels").mkdir(parents=True)
    git(tmp_path, "init", "--quiet", str(top))
    (top / ".gitignore").write_text("*.log\n")
    for number in (1, 2):
        (top / "kdkernels" / "__init__.py").write_text(f"number = {number}\n")
        git(top, "add", ".")
        git(top, "commit", "--quiet", "--message", f"{number}")
    (top / "kdkernels" / "new.py").write_text("")
    (top / "noise.log").write_text("")
    return top


def test_checkouts_hold_the_versions_and_are_gone_afterwards(top: Path) -> None:
    (top / "kdkernels" / "__init__.py").write_text("number = 3\n")
    before = git(top, "status", "--porcelain")
    for base, head, numbers in (("HEAD~1", "HEAD", [1, 2]), ("HEAD", "HEAD", [2, 2]), ("HEAD~1", ".", [1, 3])):
        with checkouts(top, base, head) as (first, second, folder):
            found = [tree.path / "kdkernels" / "__init__.py" for tree in (first, second)]
            assert [path.read_text() for path in found] == [f"number = {number}\n" for number in numbers]
            assert second.dirty == (head == ".") and not first.dirty
            assert (second.path / "kdkernels" / "new.py").exists() == (head == ".")
            assert not (second.path / "noise.log").exists()
            assert second.commit == git(top, "rev-parse", "HEAD")
        assert not folder.exists()
        assert len(git(top, "worktree", "list").splitlines()) == 1
    assert git(top, "status", "--porcelain") == before


def test_checkouts_are_gone_after_ctrl_c(top: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checkouts(top, "HEAD~1", "HEAD") as (_, _, folder):
        raise KeyboardInterrupt
    assert not folder.exists() and len(git(top, "worktree", "list").splitlines()) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_worktrees_of_others_are_left_alone(top: Path, tmp_path: Path) -> None:
    git(top, "worktree", "add", "--quiet", "--detach", str(tmp_path / "other"))
    (tmp_path / "other").rename(tmp_path / "unplugged")  # on a disk that is not there just now
    with checkouts(top, "HEAD~1", "HEAD"):
        pass
    assert len(git(top, "worktree", "list").splitlines()) == 2


def test_wrong_revisions_are_named(top: Path, tmp_path: Path) -> None:
    with pytest.raises(RevisionError, match="unknown revision 'nowhere'"), checkouts(top, "HEAD", "nowhere"):
        pass
    git(top, "rm", "--quiet", "--cached", "kdkernels/__init__.py")
    git(top, "commit", "--quiet", "--message", "empty")
    with pytest.raises(RevisionError, match="revision 'HEAD' has no package kdkernels"), checkouts(top, "HEAD~1", "HEAD"):
        pass
    assert len(git(top, "worktree", "list").splitlines()) == 1
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{top}", "shallow")
    with pytest.raises(RevisionError, match="unknown revision 'HEAD~1'.*shallow"), checkouts(tmp_path / "shallow", "HEAD~1", "HEAD"):
        pass
    with pytest.raises(RevisionError, match="not in one"):
        repository(tmp_path)


def test_a_native_library_is_built_where_it_has_sources(top: Path) -> None:
    (top / "csrc").mkdir()
    (top / "csrc" / "ops.cpp").write_text("")
    (top / "setup.py").write_text("import sys, pathlib; pathlib.Path('built').write_text(' '.join(sys.argv[1:]))\n")
    with checkouts(top, "HEAD", ".") as (base, head, _):
        assert not (base.path / "built").exists() and base.build == ""
        assert (head.path / "built").read_text() == "build_ext --inplace" and head.build == ""
    (top / "setup.py").write_text("raise SystemExit('no compiler')\n")
    with checkouts(top, "HEAD", ".") as (_, head, _):
        assert head.build == "the native library could not be built: no compiler"


# --- all of it, with real processes

CODE = Path(__file__).parents[1]
CELL = ["--entry", "feature_imitation", "--case", "tiny", "--batch", "1", "--channels", "64", "--mode", "forward", "--device", "cpu"]
OPERATOR = "kdkernels/ops/feature_imitation.py"
CALL = '    return backend.call("feature_imitation", levels_s, levels_s, levels_t, spatial, channel)\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with kdkernels as it is, which is the current folder; what the comparison makes lies in tmp_path/temporary."""
    top = tmp_path / "repository"
    shutil.copytree(CODE / "kdkernels", top / "kdkernels", ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    git(tmp_path, "init", "--quiet", str(top))
    git(top, "add", ".")
    git(top, "commit", "--quiet", "--message", "base")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(top)
    return top


def commit(top: Path, file: str, old: str, new: str) -> None:
    text = (top / file).read_text()
    assert text.count(old) == 1
    (top / file).write_text(text.replace(old, new))
    git(top, "commit", "--quiet", "--all", "--message", "change")


def clean(top: Path) -> bool:
    return not list((top.parent / "temporary").iterdir()) and len(git(top, "worktree", "list").splitlines()) == 1


def test_a_slower_commit_is_slower_and_what_it_leaves_alone_is_not(
    package: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`eager` contains nothing of kdkernels: the comparison of a version with itself, inside the other one."""
    # Processes take seconds to start; for a difference this large four rounds will do.
    monkeypatch.setattr(statistics, "FIRST", 4)
    monkeypatch.setattr(statistics, "ALARMS", 2 / 2**4)
    commit(package, OPERATOR, CALL, 4 * CALL.replace("return ", "") + CALL)
    options = ["--provider", "reference,eager", "--max-rounds", "4", "--json", "out.json", "--markdown", "out.md"]
    code = cli.main(["compare", "HEAD~1", "HEAD", *CELL, *options])
    printed = capsys.readouterr()
    assert code == 1, printed
    found = json.loads((package / "out.json").read_text())
    slow, control = found["cells"]
    assert slow["verdict"] == "slower" and slow["interval"][0] > 2 and len(slow["ratios"]) == 4
    assert control["verdict"] in ("same", "undecided") and control["control"]
    assert found["base"]["commit"] == git(package, "rev-parse", "HEAD~1") == found["base"]["provenance"]["commit"]
    assert printed.out.strip() == (package / "out.md").read_text().strip() and "| **slower** |" in printed.out
    assert clean(package)


def test_a_commit_that_breaks_the_value_is_broken(package: Path, capsys: pytest.CaptureFixture) -> None:
    """In the reference, which is that version's own oracle as well."""
    commit(package, OPERATOR, CALL, CALL.replace("return ", "return 1.01 * "))
    assert cli.main(["compare", "HEAD~1", ".", *CELL, "--provider", "reference"]) == 1
    printed = capsys.readouterr()
    assert "1 broken" in printed.out and "this version's reference disagrees with the benchmark's eager form" in printed.out
    assert "round 1 of" in printed.err and "round 2 of" not in printed.err
    assert clean(package)


def test_a_base_that_lacks_what_the_benchmarks_import(package: Path, capsys: pytest.CaptureFixture) -> None:
    git(package, "mv", "kdkernels/inline.py", "kdkernels/tapped.py")
    git(package, "commit", "--quiet", "--message", "without inline")
    assert cli.main(["compare", "HEAD", "HEAD~1", *CELL, "--provider", "reference"]) == 0
    printed = capsys.readouterr().out
    assert "1 new" in printed and "base: this version cannot run: ModuleNotFoundError: No module named 'kdkernels.inline'" in printed


def test_a_base_that_lacks_what_one_entry_calls(package: Path) -> None:
    """Workers go on without that entry."""
    (package / "kdkernels" / "functional.py").write_text("")
    code = "import benchmarks.registry as r; print(sorted(r.UNUSABLE)[:1], 'feature_imitation' in r.ENTRIES)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(CODE)])}
    environment["KDKERNELS_BENCH_PARTIAL"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "False" in done.stdout and "[]" not in done.stdout, done.stderr


def test_a_comparison_that_is_stopped_leaves_nothing_behind(package: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "compare", "HEAD", "HEAD", *CELL]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(CODE)}, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.startswith("head: ") for line in process.stderr)
    time.sleep(0.5)
    assert not clean(package)
    process.send_signal(signal.SIGTERM)
    assert "nothing is left behind" in process.communicate(timeout=20)[1]
    assert process.returncode == 130 and clean(package)


@pytest.mark.parametrize(
    "words, said",
    [
        (["HEAD", "nowhere"], "unknown revision 'nowhere'"),
        (["HEAD", "HEAD", "--entry", "nothing"], "choose from"),
        (["HEAD", "HEAD", "--max-rounds", "3"], "fewer than 8 rounds"),
        (["HEAD", "HEAD", "--threshold", "0"], "more than 0"),
        (["HEAD", "HEAD", "--entry", "feature_imitation", "--mode", "inline"], "nothing to compare"),
        (["HEAD"], "HEAD"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_started(package: Path, capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    assert cli.main(["compare", *words]) == 2
    assert said in capsys.readouterr().err
    assert clean(package)


def test_without_options_one_case_and_a_control() -> None:
    parser = argparse.ArgumentParser()
    add_selection(parser)
    chosen = select(parser.parse_args(["--device", "cpu"]))
    assert {cell.case.name for cell in chosen} == {Case("tiny").name}
    assert [cell.provider for cell in chosen if cell.control] == ["eager"]
    assert {cell.entry for cell in chosen} == set(ENTRIES)
    assert not any(cell.mode == "backward_scaled" for cell in chosen)
    assert {cell.mode for cell in select(parser.parse_args(["--mode", "backward_scaled"]))} == {"backward_scaled"}
    assert {cell.case.batch for cell in select(parser.parse_args(["--batch", "1,8", "--device", "cpu"]))} == {1, 8}
