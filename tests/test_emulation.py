"""How the emulator of the CUDA kernels is built: no more compilers than there may be, and nothing left of earlier sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from emulation import jobs, remove_others


def test_compilers_are_as_many_as_asked_for_or_as_cores_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 5})
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "1")
    assert jobs() == 1


def test_what_no_source_has_any_more_is_removed(tmp_path: Path) -> None:
    for name in ("terms-new.o", "terms-old.o", "lock"):
        (tmp_path / name).touch()
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "emulator.so").touch()
    remove_others({tmp_path / name for name in ("terms-new.o", "lock", "new")})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["emulator.so", "lock", "new", "terms-new.o"]
