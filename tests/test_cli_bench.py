"""`kdkernels bench` hands everything to the benchmarks, from a checkout and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from cli import kdkernels

from kdkernels.cli import bench
from kdkernels.cli.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--case", "fcos", "--provider", "eager,compile"],
        ["compare", "HEAD~1", ".", "--threshold", "5"],
        ["list", "-h", "--", "x"],
    ],
)
def test_all_arguments_and_the_exit_code_are_the_benchmarks_own(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    got = []

    class Benchmarks:
        @staticmethod
        def main(argv: list[str], prog: str) -> int:
            got.append((argv, prog))
            return 3

    monkeypatch.setattr(bench, "benchmarks", lambda: Benchmarks)
    assert kdkernels("bench", *arguments).exit_code == 3
    assert got == [(arguments, "kdkernels bench")]


def test_the_checkout_s_benchmarks_are_found_from_anywhere(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "kdkernels", "bench", "--provider", "nobody"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "kdkernels bench" in done.stderr and "nobody" in done.stderr and "eager" in done.stderr


def test_an_installation_without_benchmarks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.kdkernels, "__file__", str(tmp_path / "kdkernels" / "__init__.py"))
    with pytest.raises(UserError, match="has no benchmarks"):
        bench.benchmarks()
    result = kdkernels("bench", "list")
    assert result.exit_code == 2 and "has no benchmarks" in result.stderr


def test_a_wheel_made_from_the_source_distribution_holds_the_benchmarks(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "docs", "tests", "*.jsonl")
    shutil.copytree(ROOT, source, ignore=kept)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    # What is compiled of it, tests/test_build.py says.
    done = subprocess.run(build, capture_output=True, text=True, check=False, env={**os.environ, "KDKERNELS_BUILD": "none"})
    assert done.returncode == 0, done.stdout + done.stderr
    (packed,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= held
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as library:
        names = library.namelist()
        library.extractall(tmp_path / "installed")
    expected = {f"kdkernels/benchmarks/{path.relative_to(ROOT / 'benchmarks')}" for path in (ROOT / "benchmarks").rglob("*.py")}
    assert {name for name in names if name.startswith("kdkernels/benchmarks/")} == expected
    assert {name.partition("/")[0] for name in names} == {"kdkernels", "kdkernels-0.1.0.dist-info"}
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    listed = subprocess.run(
        [sys.executable, "-m", "kdkernels", "bench", "list"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert listed.returncode == 0, listed.stderr
    assert "feature_imitation" in listed.stdout and "compile-max" in listed.stdout
