"""`kdkernels bench`: the benchmarks' own command line, wherever they are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import typer

import kdkernels

from .errors import UserError, guarded

#: For `app.command`: everything behind `bench`, --help included, is for the benchmarks' own parser.
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@guarded
def bench(context: typer.Context) -> None:
    """Measure the distillation maths against its baselines; bench --help lists the modes (compare, report, step, tune, codegen, ...)."""
    raise typer.Exit(benchmarks().main(context.args, prog="kdkernels bench"))


def benchmarks() -> ModuleType:
    """benchmarks.cli: of the installed package (a wheel holds it as kdkernels.benchmarks), or of the checkout that this is.

    Raises UserError where there is neither.
    """
    package = Path(kdkernels.__file__).parent
    if (package / "benchmarks").is_dir():
        return importlib.import_module("kdkernels.benchmarks.cli")
    checkout = package.parent
    if not (checkout / "benchmarks" / "cli.py").is_file():
        raise UserError(f"this installation has no benchmarks: neither in {package} nor beside it")
    # In front: `benchmarks` is a common name, and an editable install puts kdkernels alone on the path.
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.cli")


def measurement(name: str) -> ModuleType:
    """A module of the benchmarks' `measure`, such as "memory"."""
    return importlib.import_module(f"{benchmarks().__name__.rpartition('.')[0]}.measure.{name}")
