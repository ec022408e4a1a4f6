"""Running the command line in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from kdkernels.cli.app import app


def kdkernels(*arguments: str | Path) -> Result:
    """`kdkernels ARGUMENTS`; unforeseen exceptions are raised here, with their traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
