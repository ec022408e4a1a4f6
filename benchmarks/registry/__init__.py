"""Every primitive and method, declared once: one file a name, as in kdkernels.ops and kdkernels.losses."""

from __future__ import annotations

import os
from importlib import import_module
from pkgutil import iter_modules

from .case import BATCHES, BOXES, CHANNELS, DTYPES, LAYOUTS, PYRAMIDS, QUICK, Case, all_cases
from .entry import MODES, UPSTREAM, Entry, Function, Inputs, Tolerance, flat

__all__ = [
    "BATCHES",
    "BOXES",
    "CHANNELS",
    "DTYPES",
    "ENTRIES",
    "LAYOUTS",
    "MODES",
    "PYRAMIDS",
    "QUICK",
    "UPSTREAM",
    "Case",
    "Entry",
    "Function",
    "Inputs",
    "Tolerance",
    "UNUSABLE",
    "all_cases",
    "flat",
]

#: File -> why it cannot be imported. Filled only for the workers of `compare`: an older kdkernels lacks what a newer entry calls, and
#: that must not keep the other entries from being compared. Everywhere else such an error is raised.
UNUSABLE: dict[str, str] = {}


def _entries(name: str) -> tuple[Entry, ...]:
    try:
        # Files without entries hold what several entries share.
        return getattr(import_module(f"{__name__}.{name}"), "ENTRIES", ())
    except (ImportError, AttributeError) as error:
        if "KDKERNELS_BENCH_PARTIAL" not in os.environ:
            raise
        UNUSABLE[name] = f"{type(error).__name__}: {error}"
        return ()


#: Name -> entry, of all files of this folder.
ENTRIES: dict[str, Entry] = {
    entry.name: entry for module in iter_modules(__path__) if module.name not in ("case", "entry") for entry in _entries(module.name)
}
