"""Comparing two versions: processes and checkouts that leave nothing behind, and whole comparisons of real versions."""

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
from pathlib import Path

import pytest
import torch

from benchmarks import cli, registry
from benchmarks.compare import statistics
from benchmarks.compare.process import Worker, WorkerError
from benchmarks.compare.rounds import Wanted
from benchmarks.compare.selection import add_selection, select
from benchmarks.compare.worker import Session
from benchmarks.compare.worktrees import RevisionError, changed, checkouts, repository
from benchmarks.providers import providers
from benchmarks.registry import ENTRIES, Case

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


@pytest.mark.parametrize("unbuilt, status", [("", "absent"), ("the native library could not be built: boom", "failed")])
def test_a_library_that_does_not_build_is_a_failure_and_not_an_absence(unbuilt: str, status: str) -> None:
    session = Session.__new__(Session)
    session._providers, session._absent = providers(), lambda *about: "no library"
    session._device, session._unbuilt, session._registry = torch.device("cpu"), unbuilt, registry
    cell = Wanted("feature_imitation", Case(), "forward", "native").as_dict()
    assert session.answer({"do": "open", "cell": cell, "verify": True}) == {"status": status, "reason": unbuilt or "no library"}
    assert session.answer({"do": "burst", "calls": 1})["status"] == "failed"


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
    assert not changed(top)  # an untracked file is none
    (top / "kdkernels" / "__init__.py").write_text("number = 3\n")
    assert changed(top)
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
CALL = '    return backend.call("feature_imitation", [*levels_s, *levels_t], levels_s, levels_t, spatial, channel)\n'


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
    options = ["--provider", "reference,eager", "--max-rounds", "4", "--json", "new/out.json", "--markdown", "out.md"]
    code = cli.main(["compare", "HEAD~1", "HEAD", *CELL, *options])
    printed = capsys.readouterr()
    assert code == 1, printed
    found = json.loads((package / "new" / "out.json").read_text())
    slow, control = found["cells"]
    assert slow["verdict"] == "slower" and slow["interval"][0] > 2 and len(slow["ratios"]) == 4
    assert control["verdict"] in ("same", "undecided") and control["control"]
    assert found["base"]["commit"] == git(package, "rev-parse", "HEAD~1") == found["base"]["provenance"]["commit"]
    assert printed.out.strip() == (package / "out.md").read_text().strip() and "| **slower** |" in printed.out
    assert clean(package)


def test_a_version_against_itself_is_the_same(package: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold that a busy machine's noise does not reach; where it does, further rounds decide."""
    monkeypatch.setattr(statistics, "FIRST", 4)
    large = ["--entry", "feature_imitation", "--case", "kitti", "--batch", "1", "--channels", "64", "--mode", "forward", "--device", "cpu"]
    options = ["--provider", "reference", "--max-rounds", "11", "--threshold", "40", "--json", "out.json"]
    code = cli.main(["compare", "HEAD", "HEAD", *large, *options])
    printed = capsys.readouterr()
    assert code == 0 and "1 same" in printed.out, printed
    assert 0.85 < json.loads((package / "out.json").read_text())["cells"][0]["ratio"] < 1.18


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
    said: list[str] = []
    while not (said and said[-1].startswith("head: ")):
        assert (line := process.stderr.readline()), said
        said.append(line)
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
