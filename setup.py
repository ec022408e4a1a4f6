"""Builds the pure-Python package, with the benchmarks inside; pyproject.toml holds the metadata."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithBenchmarks(build_py):
    """A wheel holds benchmarks/ as kdkernels.benchmarks, so that `kdkernels bench` works without a checkout. An editable install
    finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "kdkernels" / "benchmarks"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build, which may have had files that are no more
        for source in sorted(Path("benchmarks").rglob("*.py")):
            file = target / source.relative_to("benchmarks")
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, file)


setup(cmdclass={"build_py": BuildWithBenchmarks})
