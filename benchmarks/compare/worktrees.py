"""The two versions, each in a folder of its own that lives as long as the comparison."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BUILD_SECONDS = 1800


class RevisionError(ValueError):
    """What was asked for cannot be compared; the message is for people."""


@dataclass(frozen=True)
class Tree:
    """One version, ready to be imported.

    revision: as it was given;   commit: its full name (of "." the commit underneath)
    dirty:    "." with changes that the commit does not have
    path:     the folder that holds the package kdkernels
    build:    why the native library could not be built; "" when it could, or has no sources
    """

    revision: str
    commit: str
    dirty: bool
    path: Path
    build: str = ""

    @property
    def name(self) -> str:
        short = self.commit[:10]
        if self.revision == ".":
            return f"{short} with changes" if self.dirty else f"{short} (working tree)"
        return short if self.commit.startswith(self.revision) else f"{self.revision} ({short})"

    def as_dict(self) -> dict[str, Any]:
        return {"revision": self.revision, "commit": self.commit, "dirty": self.dirty, "build": self.build}


def repository(folder: Path) -> Path:
    """The top of the git repository that `folder` lies in. Raises RevisionError outside of one."""
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    except FileNotFoundError:
        raise RevisionError("comparing versions needs git, which is not installed") from None
    except subprocess.CalledProcessError as error:
        raise RevisionError(f"comparing versions needs a git repository, and {folder} is not in one: {_said(error)}") from None


def changed(top: Path) -> bool:
    """Whether tracked files differ from the commit underneath."""
    return bool(_git(top, "status", "--porcelain", "--untracked-files=no").strip())


@contextmanager
def checkouts(top: Path, base: str, head: str) -> Iterator[tuple[Tree, Tree, Path]]:
    """Both versions checked out and built, and a folder for whatever else the comparison needs; all of it is gone afterwards.

    A revision "." is a copy of the working tree's files, tracked and untracked ones that git does not ignore: edits during the
    measurement do not get into it. Raises RevisionError for a revision that is unknown or has no kdkernels.
    """
    commits = {revision: _commit(top, revision) for revision in (base, head)}
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kdkernels-compare-")).resolve()
        stack.callback(_remove, top, folder)
        # Names of one length: paths end up in the environment, and its size moves the stack.
        trees = [_tree(top, revision, commits[revision], folder / name) for revision, name in ((base, "base"), (head, "head"))]
        yield trees[0], trees[1], folder


def _tree(top: Path, revision: str, commit: str, path: Path) -> Tree:
    dirty = False
    if revision == ".":
        dirty = bool(_git(top, "status", "--porcelain").strip())
        _copy(top, path)
    else:
        _git(top, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(path), commit)
    if not (path / "kdkernels" / "__init__.py").is_file():
        raise RevisionError(f"revision {revision!r} has no package kdkernels at its top")
    return Tree(revision, commit, dirty, path, _build(path))


def _commit(top: Path, revision: str) -> str:
    try:
        return _git(top, "rev-parse", "--verify", "--quiet", f"{'HEAD' if revision == '.' else revision}^{{commit}}").strip()
    except subprocess.CalledProcessError:
        shallow = _git(top, "rev-parse", "--is-shallow-repository").strip() == "true"
        hint = "; this clone is shallow: fetch the revision, or all of the history" if shallow else ""
        raise RevisionError(f"unknown revision {revision!r} in {top}{hint}") from None


def _copy(top: Path, path: Path) -> None:
    for name in filter(None, _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")):
        source, target = top / name, path / name
        if source.is_file():  # neither deleted nor a submodule's folder
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _build(path: Path) -> str:
    """Builds the native library in place where there are sources; why that failed, or ""."""
    if not any(file.suffix in (".cpp", ".cu") for file in (path / "csrc").rglob("*")):
        return ""
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=path,
            env={**_for_this_machine(), **os.environ},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"the native library was not built within {BUILD_SECONDS} s"
    return "" if done.returncode == 0 else f"the native library could not be built: {done.stderr.strip()[-1000:]}"


def _for_this_machine() -> dict[str, str]:
    """What setup.py is told unless the environment says otherwise: kernels for other GPUs, or for none, take minutes to compile."""
    if not torch.cuda.is_available():
        return {"KDKERNELS_BUILD": "cpu"}
    return {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}


def _remove(top: Path, folder: Path) -> None:
    """Nothing is left behind, not even when Ctrl-C is pressed twice."""
    with _uninterrupted():
        for path in sorted(folder.glob("*/.git")):
            subprocess.run(["git", "-C", str(top), "worktree", "remove", "--force", "--force", str(path.parent)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout


def _said(error: subprocess.CalledProcessError) -> str:
    return str(error.stderr).strip()
