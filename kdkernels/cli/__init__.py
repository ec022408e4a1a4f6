"""The command line. `main` is the `kdkernels` program; importing this package is cheap."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = {"typer": "typer", "rich": "rich", "yaml": "pyyaml"}


def main() -> None:
    """Run the command line; exits with the codes that `kdkernels --help` lists."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"kdkernels: the command line needs {', '.join(missing)}: pip install 'kdkernels[cli]'", file=sys.stderr)
        sys.exit(2)
    from .app import app

    app(prog_name="kdkernels")
